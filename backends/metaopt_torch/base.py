"""The parameter groups and the state of a `MetaOptimizer`: made, edited, saved and loaded."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

import metaopt as mo
from metaopt.rules import Rule
from metaopt_torch import curvature as curvatures
from metaopt_torch import rounding as roundings
from metaopt_torch.block_state import block_state_keys
from metaopt_torch.build import Built, build
from metaopt_torch.changes import renamed
from metaopt_torch.compiler import chosen
from metaopt_torch.containers import (
    Containers,
    check_agreement,
    check_group,
    check_shared,
    group_called,
    zero_group,
)
from metaopt_torch.core_state import check_whole, whole, write
from metaopt_torch.core_step import check_sharding
from metaopt_torch.curvature import DoubleBackward
from metaopt_torch.groups import (
    FROZEN,
    MADE_WITH,
    OPTIONS,
    check_groups,
    check_options,
    check_rounding,
    take_keys,
    warn_of_small_lr,
    warn_of_unused_decay,
)
from metaopt_torch.held_out import HeldOut, check_held_out
from metaopt_torch.hessian_free import HessianFree, Opened
from metaopt_torch.hyperparameters import agreed, hyperparameters
from metaopt_torch.in_backward import InBackward
from metaopt_torch.loading import aligned, check_fits
from metaopt_torch.watch import Watch

__all__ = ["BaseOptimizer", "check_training"]


class BaseOptimizer(torch.optim.Optimizer):
    """What `MetaOptimizer` is beside its steps.

    Groups and state may be edited between steps: everything public looks at them first, by
    `_refresh`, and what steps rely on is built anew where they differ.
    """

    _whose_lr = "`lr`"  # in warnings

    def __init__(
        self,
        params: Any,
        config: mo.MetaOptimize,
        options: dict[str, Any],
        *,
        hvp: str,
        rounding: str,
        compile: bool | None,
        process_group: Any,
    ) -> None:
        for name, value, choices in (
            ("hvp", hvp, curvatures.CHOICES),
            ("rounding", rounding, roundings.CHOICES),
        ):
            if value not in choices:
                msg = f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}."
                raise ValueError(msg)
        if compile not in (True, False, None):
            msg = f"`compile` must be True, False or None; got {compile!r}."
            raise TypeError(msg)
        self._given = config
        self._hvp, self._rounding, self._compile = hvp, rounding, compile
        check_group(process_group)
        self._process_group = process_group
        self._forget()
        defaults = agreed(self._rules) | dict.fromkeys(OPTIONS) | options
        check_options(defaults)
        super().__init__(params, defaults)
        warn_of_small_lr(self.param_groups, self._whose_lr)
        warn_of_unused_decay(config.base, options["weight_decay"], self.param_groups)
        if options["weight_decay"] is None:
            self.defaults["weight_decay"] = agreed(self._rules).get("weight_decay")
        zero = zero_group()
        if zero is not None:
            self._process_group = zero if process_group is None else process_group
            if any(group["block"] is None for group in self.param_groups):
                check_shared(mo.blocks.partition(config.blocks))
        self._build()
        if self._process_group is not None:
            check_agreement(self._process_group, self._ready.blocks_by_group())

    def _forget(self) -> None:
        """Have nothing built, neither at first nor in a copy."""
        self._built: Built | None = None
        self._engine: HessianFree | None = None
        self._watch = Watch(())
        self._evaluating = False  # whether averages stand in the place of the parameters
        self._held_out = HeldOut()
        self._opened: Opened | None = None  # a step that has begun in a backward pass
        self._in_backward: InBackward | None = None
        self._double_backward = DoubleBackward()

    # in training, wherever it is called: tensors of inference have no versions, by which edits show
    @torch.inference_mode(False)
    @torch.no_grad()
    def _build(self, before: Built | None = None) -> None:
        """Make what steps need from groups and state; `before` was made before these changed."""
        if before is None and not any(group["params"] for group in self.param_groups):
            return  # as long as there are none
        # put back where it fails, so that a group's names still tell who was edited
        names = [group.get("param_names") for group in self.param_groups]
        try:
            if before is not None:
                new_names = renamed(self.param_groups, before.leaves)
                for group, own in zip(self.param_groups, new_names, strict=True):
                    self._complete(group)
                    if own is not None:
                        group["param_names"] = own
                check_groups(self.param_groups)
            check_rounding(self._rounding, self.param_groups)
            built = build(
                self._given,
                self.param_groups,
                self.state,
                kahan=self._rounding == "kahan",
                before=before,
                containers=Containers(self._process_group),
            )
        except Exception:
            for group, kept in zip(self.param_groups, names, strict=True):
                if kept is not None:
                    group["param_names"] = kept
            raise
        if built.in_core:
            check_sharding(built)
        if built.config.held_out:
            check_held_out(built, zero=zero_group() is not None)
        devices = {param.device for group in self.param_groups for param in group["params"]}
        compiles = chosen(self._compile, devices)
        self._engine = HessianFree(built, self._rounding, compiles, self._engine)
        self._built = built
        options = ("param_names", "step_size", "bounds", "block", "maximize")
        self._watch = Watch((*options, *built.block_state.keys()))
        self._watch.see(self.param_groups, self.state)

    def _refresh(self, *, decay: bool = True, evaluating: bool = False) -> None:
        """Look at groups and state, and with `decay` at the groups' hyperparameters."""
        if not evaluating:
            check_training(self._evaluating)
            check_closed(self._opened)
        elif self._opened is not None:
            return
        if self._built is None:
            self._build()
            return
        edited = self._watch.differs(self.param_groups, self.state)
        if edited or self._built.counts.edited() or (decay and self._built.outdated()):
            self._build(self._built)

    def _complete(self, group: dict[str, Any]) -> None:
        """Have a group say what all groups say."""
        for name in (*OPTIONS, *agreed(self._rules)):
            group.setdefault(name, self.defaults[name])

    @property
    def _rules(self) -> Sequence[Rule]:
        base = self._given.base
        return list(base.values()) if isinstance(base, Mapping) else [base]

    @property
    def _ready(self) -> Built:
        if self._built is None:
            msg = (
                f"`params` holds no parameter yet, in {len(self.param_groups)} groups, and there "
                "are step sizes for parameters alone. Add some by `add_param_group`."
            )
            raise ValueError(msg)
        return self._built

    @property
    def config(self) -> mo.MetaOptimize:
        """The core's configuration, with what the groups say."""
        self._refresh(evaluating=True)
        return self._ready.config

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, also in mid-training.

        Parameters
        ----------
        param_group : dict
            As for the constructor.

        Raises
        ------
        ValueError, TypeError
            If an option is misspelt or wrong; nothing is changed then.
        """
        check_training(self._evaluating)
        check_closed(self._opened)
        own = {"hvp": self._hvp, "rounding": self._rounding, "compile": self._compile}
        own["process_group"] = self._process_group
        hyper = {name for rule in self._rules for name in hyperparameters(rule)}
        state = {MADE_WITH, FROZEN, *block_state_keys(self._given.meta)}
        take_keys(param_group, self._given, own, hyper, state)
        before = list(self.param_groups)
        super().add_param_group(param_group)
        _without_duplicates(param_group)
        try:
            check_groups(self.param_groups)
            if self._built is not None:
                self._build(self._built)
        except Exception:
            self.param_groups[:] = before
            raise

    def share_memory(self) -> Self:
        """Move all state to shared memory, for processes that train one model together.

        As `torch.nn.Module.share_memory` does, before these processes are started. They learn one
        step size for each block then, and step what is small less fast, as it cannot be packed.
        """
        for held in (*self.state.values(), *self.param_groups):
            for value in held.values():
                if isinstance(value, Tensor):
                    value.share_memory_()
        return self

    def core_state(self) -> mo.State:
        """Return the state in the core's form, copied, for `metaopt.save` and other libraries.

        With sharded parameters this is a collective call: every device gets the whole state.

        Raises
        ------
        ValueError
            If plain tensors hold parts of parameters, whose shapes are not known.
        """
        self._refresh()
        check_whole(self._ready)
        return whole(self._ready)

    def load_core_state(self, state: mo.State) -> None:
        """Take a state in the core's form, such as `metaopt.load` returns.

        Parameters
        ----------
        state : metaopt.State
            Of tensors, of the whole parameters, made with `config`.

        Raises
        ------
        ValueError
            If it is the state of another configuration or of other parameters, or if plain tensors
            hold parts of these. Nothing is changed then.
        """
        self._refresh()
        check_whole(self._ready)
        self._ready.config.step_sizes(state)  # which checks it
        write(self._ready, state)
        self._build(self._built)

    # as torch's own, for it is called while others compile
    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return the groups and the state of their parameters, by number, as torch does.

        The state of parameters that have left the groups is not in it.
        """
        self._refresh(decay=False)
        if self._built is None:
            return super().state_dict()
        everything, here = self.state, {id(leaf.param) for leaf in self._built.leaves.values()}
        if all(id(param) in here for param in everything):
            return super().state_dict()
        kept = ((param, entry) for param, entry in everything.items() if id(param) in here)
        self.state = defaultdict(dict, kept)
        try:
            return super().state_dict()
        finally:
            self.state = everything

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; in its own dtypes, whatever those of the parameters.

        By name where parameters have names there and here, so that they may come in another order;
        else by position.

        Parameters
        ----------
        state_dict : dict

        Raises
        ------
        ValueError
            If it belongs to other parameters, to another configuration or another optimizer.
            Nothing is changed then.
        """
        self._refresh()
        if self._built is None:
            super().load_state_dict(state_dict)
            return
        before = {"param_groups": self.param_groups, "state": self.state}
        leaves, found = [*self._built.leaves.values()], []

        def look(_: Any, given: dict[str, Any]) -> dict[str, Any]:  # at what other hooks make of it
            options = dict.fromkeys(OPTIONS) | self.defaults
            given = aligned(given, self.param_groups, self._given, options)
            check_fits(given, leaves, self.param_groups, self._given, self._rounding, options)
            found.append(given)
            return given

        hook = self.register_load_state_dict_pre_hook(look)
        self._loading = True
        try:
            super().load_state_dict(state_dict)
            numbers = [n for group in found[0]["param_groups"] for n in group["params"]]
            for number, leaf in zip(numbers, leaves, strict=True):
                # torch casts to the parameter's dtype, which would lose half of a trace
                self.state[leaf.param] = {
                    key: torch.as_tensor(value).detach().to(leaf.param.device, copy=True)
                    for key, value in found[0]["state"].get(number, {}).items()
                    if key != "compensation" or key in leaf.state or not leaf.state
                }
            self._build()
        except Exception:
            self.__dict__.update(before)
            raise
        finally:
            self._loading = False
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle consists of."""
        check_training(self._evaluating)
        check_closed(self._opened)
        own = ("_given", "_hvp", "_rounding", "_compile")
        kept = {name: self.__dict__[name] for name in own}
        leaves = () if self._built is None else self._built.leaves.values()
        groups = {leaf.shard.group for leaf in leaves} - {None}
        # a copied parameter does not say any more that it is a shard
        name = next(iter(groups)).group_name if len(groups) == 1 else None
        return super().__getstate__() | kept | {"_process_group": name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` or `load_state_dict` hands over."""
        super().__setstate__(state)
        if isinstance(state.get("_process_group"), str):
            self._process_group = group_called(state["_process_group"])
        for group in self.param_groups:
            self._complete(group)
        if not self.__dict__.get("_loading", False):  # torch's `load_state_dict` calls this too
            self._forget()
            self._build()

    def __repr__(self) -> str:
        """Return the rules and the options of the groups."""
        given = self._given
        lines = [f"MetaOptimizer(base={given.base!r}, meta={given.meta!r}"]
        for index, group in enumerate(self.param_groups):
            options = ", ".join(f"{name}={group[name]!r}" for name in OPTIONS)
            lines.append(f"    group {index}: {len(group['params'])} parameters, {options}")
        return "\n".join([*lines, ")"])


def check_training(evaluating: bool) -> None:
    """Raise where averages stand in the place of the parameters."""
    if evaluating:
        msg = (
            "Inside `with opt.averaged_params():` the parameters are averages, and nothing can be "
            "done that is for those of training, such as a step, a copy or a checkpoint: leave it "
            "first. `step_sizes` may be called, and the model's own `state_dict`."
        )
        raise RuntimeError(msg)


def check_closed(opened: Opened | None) -> None:
    """Raise where a step has begun in a backward pass, and some parameters have made theirs."""
    if opened is not None:
        msg = (
            "A step has begun in the backward pass (`step_in_backward`), and some parameters have "
            "made theirs: call `step` first, which makes the rest of it."
        )
        raise RuntimeError(msg)


def _without_duplicates(group: dict[str, Any]) -> None:
    """Keep parameters that a group has twice, of which torch warns, in their first place alone."""
    places = {id(param): index for index, param in reversed([*enumerate(group["params"])])}
    if len(places) < len(group["params"]):
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][index] for index in sorted(places.values())]
