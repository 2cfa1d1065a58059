"""MetaOptimizer, a `torch.optim.Optimizer` whose step sizes tune themselves."""

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.arrays import map_leaves, per_leaf
from metaopt.rules import Rule
from metaopt_torch import curvature as curvatures
from metaopt_torch import rounding as roundings
from metaopt_torch.alignment import aligned
from metaopt_torch.build import Built, build
from metaopt_torch.changes import renamed
from metaopt_torch.compiler import missing
from metaopt_torch.containers import (
    Containers,
    check_agreement,
    check_group,
    check_shared,
    group_called,
    zero_group,
)
from metaopt_torch.core_state import take, whole
from metaopt_torch.core_step import check_parts, copies, core_step, project, reduction
from metaopt_torch.curvature import (
    ADVICE,
    RandomState,
    by_autograd,
    by_central_difference,
    check_graph,
)
from metaopt_torch.groups import (
    MADE_WITH,
    OPTIONS,
    check_groups,
    check_numbers,
    check_options,
    check_rounding,
    configured,
    take_keys,
    warn_of_unused_decay,
)
from metaopt_torch.hessian_free import HessianFree
from metaopt_torch.hyperparameters import agreed, hyperparameters
from metaopt_torch.runs import KEPT, Leaf
from metaopt_torch.shards import gathered, placed
from metaopt_torch.sharing import shared
from metaopt_torch.vectors import names_of_vectors
from metaopt_torch.watch import Watch

__all__ = ["MetaOptimizer"]


class MetaOptimizer(torch.optim.Optimizer):
    r"""Wraps a base update and adapts its step sizes online with a meta update.

    docs/mathematics.md; `metaopt.MetaOptimize` describes the options that both have.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor), or of dicts
        As for every optimizer of torch's. Named parameters, `model.named_parameters()`, give
        `blocks` and `base` their names; parameters without names are called "0", "1" and so on.
        A group may have its own `lr`, `weight_decay`, `maximize`, `step_size`, `bounds`, and
        `block`: the name of the block that all its leaves share.
    base, meta : Rule
        The update of the weights, or several by name pattern, and that of the step sizes.
    step_size, meta_lr, discount, blocks, sigma, bounds, approximation, curvature, trace, \
meta_first, skip_nonfinite, recover
        As for `metaopt.MetaOptimize`.
    lr : float or tensor, default 1.0
        Multiplies the learned step sizes; what learning-rate schedulers drive. 0 freezes.
    weight_decay : float, optional
        In place of that of the rules.
    maximize : bool, default False
    hvp : {"autograd", "central"}, default "autograd"
        Where Hessian-vector products for `curvature="exact"` come from: from gradients made by
        `backward`, by differentiating them, or from gradients of displaced parameters, for which
        `step` needs a closure.
    rounding : {"nearest", "stochastic", "kahan"}, default "nearest"
        Of bfloat16 and float16 parameters, whose small steps would be lost: "stochastic" rounds up
        or down at random (bfloat16 alone), "kahan" keeps what was lost in one more array of the
        parameter's dtype.
    compile : bool, optional
        Whether to compile the step with `torch.compile`. By default where a compiler is found.
    process_group : ProcessGroup, optional
        Of processes that each hold a part of the parameters in plain tensors, whatever cut them:
        meta-gradients are summed over it. DTensors and FullyShardedDataParallel need none.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described, or two do not go together.

    Examples
    --------
    >>> import metaopt as mo
    >>> model = torch.nn.Linear(3, 1)
    >>> opt = MetaOptimizer(model.parameters(), base=mo.AdamW(), meta=mo.Lion(), compile=False)
    >>> loss = model(torch.ones(4, 3)).square().mean()
    >>> loss.backward()
    >>> opt.step()
    >>> sorted(opt.step_sizes())
    ['all']
    """

    def __init__(
        self,
        params: Any,
        *,
        base: Rule | Mapping[str, Rule],
        meta: Rule,
        step_size: float | Mapping[str, Any] = 1e-4,
        meta_lr: float = 1e-3,
        discount: float = 1.0,
        blocks: Any = "scalar",
        sigma: Any = "exp",
        bounds: Any = None,
        approximation: str = "l",
        curvature: Any = "none",
        trace: str = "update",
        meta_first: bool = False,
        skip_nonfinite: bool = False,
        recover: bool = False,
        lr: float | Tensor = 1.0,
        weight_decay: float | None = None,
        maximize: bool = False,
        hvp: str = "autograd",
        rounding: str = "nearest",
        compile: bool | None = None,
        process_group: Any = None,
    ) -> None:
        for name, value, choices in (
            ("hvp", hvp, curvatures.CHOICES),
            ("rounding", rounding, roundings.CHOICES),
        ):
            if value not in choices:
                msg = f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}."
                raise ValueError(msg)
        self._given = mo.MetaOptimize(
            base=base,
            meta=meta,
            step_size=step_size,
            meta_lr=meta_lr,
            discount=discount,
            blocks=blocks,
            sigma=sigma,
            bounds=bounds,
            approximation=approximation,
            curvature=curvature,
            trace=trace,
            meta_first=meta_first,
            skip_nonfinite=skip_nonfinite,
            recover=recover,
        )
        self._hvp, self._rounding, self._compile = hvp, rounding, compile
        check_group(process_group)
        self._process_group = process_group
        self._built: Built | None = None
        self._engine: HessianFree | None = None
        self._watch = Watch(())
        #: What `backward` made since the last step, and its version; whether a graph was seen.
        self._twice: list[tuple[weakref.ref[Tensor], int]] = []
        self._checked = False
        given: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        defaults = agreed(self._rules) | dict.fromkeys(OPTIONS) | given
        check_options(defaults)
        super().__init__(params, defaults)
        warn_of_unused_decay(base, weight_decay, self.param_groups)
        if weight_decay is None:
            self.defaults["weight_decay"] = agreed(self._rules).get("weight_decay")
        zero = zero_group()
        if zero is not None:
            self._process_group = zero if process_group is None else process_group
            if any(group["block"] is None for group in self.param_groups):
                check_shared(mo.blocks.partition(blocks))
        self._build()
        if self._process_group is not None:
            check_agreement(self._process_group, self._blocks_by_group())

    def _build(self, before: Built | None = None) -> None:
        """Make what a step needs from groups and state.

        Parameters
        ----------
        before : Built, optional
            What was made when they were others, of the same run.
        """
        if before is None and not any(group["params"] for group in self.param_groups):
            return  # as long as there are none
        names = [group.get("param_names") for group in self.param_groups]
        try:
            if before is not None:
                self._complete_groups(before)
            check_rounding(self._rounding, self.param_groups)
            with torch.no_grad():
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
        self._in_core = (
            built.plan.curvature != "none" or built.vectors.per_leaf or built.config.recover
        )
        if self._in_core:
            check_parts(built)
        self._engine = HessianFree(built, self._rounding, self._compiler(), self._engine)
        self._built = built
        options = ("param_names", "step_size", "bounds", "block", "maximize")
        self._watch = Watch((*options, *built.vectors.names()))
        self._watch.see(self.param_groups, self.state)

    def _complete(self, group: dict[str, Any]) -> None:
        """Have a group say what all groups say."""
        for name in (*OPTIONS, *agreed(self._rules)):
            group.setdefault(name, self.defaults[name])

    def _complete_groups(self, before: Built) -> None:
        """Have groups that were edited say all that groups say, and check them."""
        for group, names in zip(
            self.param_groups, renamed(self.param_groups, before.leaves), strict=True
        ):
            self._complete(group)
            if names is not None:
                group["param_names"] = names
        check_groups(self.param_groups)

    def _compiler(self) -> bool | None:
        """Say whether to compile, None where that was left open; warn if it cannot be."""
        if self._compile is not None:
            return self._compile
        devices = {param.device for group in self.param_groups for param in group["params"]}
        lacking = [text for device in devices if (text := missing(device)) is not None]
        if lacking:
            warnings.warn(
                f"torch.compile lacks {lacking[0]}: steps are run eagerly, several times "
                "slower. Pass `compile=False` for that without this warning.",
                stacklevel=4,
            )
        return False if lacking else None

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
        own = {"hvp": self._hvp, "rounding": self._rounding, "compile": self._compile}
        own["process_group"] = self._process_group
        hyper = {name for rule in self._rules for name in hyperparameters(rule)}
        state = {MADE_WITH, *names_of_vectors(self._given.meta)}
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

    @property
    def config(self) -> mo.MetaOptimize:
        """The core's configuration, with what the groups say."""
        self._refresh()
        return self._ready.config

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
    def _hessian_free(self) -> HessianFree:
        assert self._engine is not None
        return self._engine

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients those of a loss, in a form that can be differentiated again.

        In place of `loss.backward()` for `curvature="exact"` with `hvp="autograd"`.

        Parameters
        ----------
        loss : tensor, shape ()

        Raises
        ------
        ValueError
            If it is not one number, or depends on no parameter of this optimizer that requires a
            gradient.
        TypeError
            If it is no tensor.
        """
        if not isinstance(loss, Tensor):
            msg = f"`loss` must be a tensor; got {type(loss).__name__}."
            raise TypeError(msg)
        self._refresh()
        leaves = [leaf.param for leaf in self._ready.leaves.values() if leaf.param.requires_grad]
        if loss.numel() != 1:
            msg = f"`loss` must be one number; got shape {tuple(loss.shape)}."
            raise ValueError(msg)
        if not leaves:
            msg = (
                f"`loss` has no gradient: of {len(self._ready.leaves)} parameters of this "
                "optimizer none requires one. Call `requires_grad_()` on those that are to move."
            )
            raise ValueError(msg)
        found: Sequence[Tensor | None] = [None]
        if loss.requires_grad:
            found = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        if all(grad is None for grad in found):
            why = "on others alone" if loss.requires_grad else "on nothing that requires a gradient"
            msg = (
                f"`loss` must depend on a parameter of this optimizer; got one that depends {why}. "
                "Compute it from the parameters that the optimizer was given, outside of "
                "`torch.no_grad`."
            )
            raise ValueError(msg)
        self._twice = [known for known in self._twice if known[0]() is not None]
        for param, grad in zip(leaves, found, strict=True):
            if grad is not None:
                param.grad = grad if param.grad is None else param.grad + grad
                self._twice.append((weakref.ref(param.grad), param.grad._version))

    # as torch's own optimizers do it: the public way imports Dynamo, which takes a second
    @torch._disable_dynamo
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        hvp: Callable[..., Any] | None = None,
        third: Callable[..., Any] | None = None,
        hessian_diagonal: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make a step with the gradients that are there.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients, and returns the loss.
        hvp, third, hessian_diagonal : optional
            As for `metaopt.MetaOptimize.step`, in place of the optimizer's own.

        Returns
        -------
        What `closure` returned, or None.

        Raises
        ------
        TypeError, ValueError
            If a gradient is sparse, a parameter or its gradient has come by another shape or
            device, a group's option is wrong, or what `curvature` needs is missing. Nothing is
            changed then.
        """
        if self._built is None:
            self._build()
        if not any(group["params"] for group in self.param_groups):  # yet, or any more
            with torch.enable_grad():
                return None if closure is None else closure()
        exact = self._ready.plan.curvature == "exact" and hvp is None
        if exact and self._hvp == "central" and closure is None:
            msg = '`step` needs a closure for `hvp="central"`: gradients of displaced parameters.'
            raise ValueError(msg)
        random = None
        if exact and self._hvp == "central":
            self._refresh()
            random = RandomState({leaf.param.device for leaf in self._ready.leaves.values()})
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            grads = self._grads()
            if not self._in_core:
                if self._hessian_free.step(grads):
                    self._watch.see(self.param_groups, self.state)
                return loss
            derivatives = {"hvp": hvp, "third": third, "hessian_diagonal": hessian_diagonal}
            if exact:
                derivatives |= self._derivatives(grads, closure, random, third)
            core_step(self._ready, grads, self._rounding, derivatives)
            self._ready.counts.settle()
            self._twice = []
            for leaf in self._ready.leaves.values():
                if leaf.param.grad is not None and leaf.param.grad.requires_grad:
                    leaf.param.grad = leaf.param.grad.detach()  # and let go of the graph
        return loss

    def _derivatives(
        self, grads: Mapping[str, Tensor], closure: Any, random: Any, third: Any
    ) -> dict[str, Any]:
        """Return where second derivatives come from."""
        params = {name: leaf.param for name, leaf in self._ready.leaves.items()}
        if not grads:  # products of leaves without a gradient are None
            return dict.fromkeys(("hvp", "third"), lambda tangents, *_: dict.fromkeys(tangents))
        if self._hvp == "central":
            reduce = reduction(self._ready.leaves)
            return {"hvp": by_central_difference(closure, params, grads, random, reduce)}
        # those of a loss without second derivatives have no graph, wherever they come from
        made = {(id(grad()), version) for grad, version in self._twice}
        own = [params[name].grad for name in grads]
        constant = all(grad is not None and (id(grad), grad._version) in made for grad in own)
        if not constant and not any(grad.requires_grad for grad in grads.values()):
            msg = (
                '`curvature="exact"` needs gradients that can be differentiated; that of '
                f"{next(iter(grads))!r} has no graph. Call `optimizer.backward(loss)` in place of "
                "`loss.backward()`; and where gradients are constants, change none of them in "
                f"place before the step. {ADVICE}"
            )
            raise ValueError(msg)
        if not self._checked:
            check_graph(grads)
            self._checked = True
        hvp, by_twice = by_autograd(grads, params)
        return {"hvp": hvp, "third": by_twice if third is None else third}

    def _grads(self) -> dict[str, Tensor]:
        """Return the gradients by name, after a look at what may have changed since last time."""
        self._refresh(decay=False)
        for group in self.param_groups:
            check_numbers(group)
        if self._in_core:
            self._refresh()  # elsewhere a group's weight decay is handed to every pass
        self._check_shared()
        grads, rebuild = {}, False
        for name, leaf in self._ready.leaves.items():
            grad = leaf.param.grad
            rebuild |= leaf.changed()
            if grad is None:
                continue
            if grad.layout != torch.strided:
                msg = f"The gradient of {name!r} must be dense; got layout {grad.layout}."
                raise TypeError(msg)
            grads[name] = grad if leaf.part.mesh is None else placed(grad, leaf.param)
            rebuild |= not leaf.state
        if rebuild:  # one that was frozen has a gradient now, or another dtype or shape
            self._build(self._built)
        for name, grad in grads.items():
            self._ready.leaves[name].check(grad)
        return grads

    @torch._disable_dynamo
    @torch.no_grad()
    def project(self, function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
        """Project the parameters in place, and push their traces through the projection.

        For weights that are held somewhere after a step: clipped to a box, within a norm, pruned
        (docs/mathematics.md section 10). Where they are projected by hand, the way to the bound
        that holds a weight stays in the trace, and step sizes may then rise without end.

        Parameters
        ----------
        function : callable
            From the parameters by name, float32 or wider, to projected ones; those that stay as
            they are may be left out. It is differentiated forward by `torch.func.jvp`.

        Raises
        ------
        ValueError, TypeError
            If it returns something else, if parameters are distributed, or with
            `approximation="full"`. Nothing is changed then.

        Examples
        --------
        >>> import metaopt as mo
        >>> param = torch.nn.Parameter(torch.tensor([0.5, -1.0]))
        >>> opt = MetaOptimizer([("w", param)], base=mo.SGD(), meta=mo.SGD(), compile=False)
        >>> opt.project(lambda params: {"w": params["w"].clamp(min=0.0)})
        >>> param.tolist()
        [0.5, 0.0]
        """
        self._refresh()
        project(self._ready, function, self._rounding)

    def step_sizes(self) -> dict[str, Tensor]:
        """Return the learned step sizes by block, before the multiplier `lr`.

        Nothing is copied to the host.

        Returns
        -------
        dict of block name to tensor
            As `metaopt.MetaOptimize.step_sizes`; on the device, float32 or wider.
        """
        self._refresh(decay=False)
        if self._built is None:
            return {}
        beta = map_leaves(torch.clone, self._per_block("beta"))  # which some maps return as it is
        return dict(self._by_name(self._ready.config.slopes(beta)[0]))

    def diagnostics(self) -> dict[str, Any]:
        """Return what tells how the adaptation is doing; tensors, nothing is copied to the host.

        With sharded parameters this is a collective call: trace norms are sums over all devices.

        Returns
        -------
        dict
            "beta", "meta_grad" and "trace_norm", each a mapping like `step_sizes`; "restarts";
            "skipped". See `metaopt.MetaOptimize.diagnostics`.
        """
        self._refresh()
        leaves = self._ready.leaves
        return self._ready.config.diagnostics(
            self._whole(),
            {name: gathered(leaf.param.detach()) for name, leaf in leaves.items()},
            reduce=reduction(leaves, groups=True),
            copies=copies(leaves, groups=True),
        )

    def core_state(self) -> mo.State:
        """Return the state in the core's form, copied, for `metaopt.save` and other libraries.

        With sharded parameters this is a collective call: every device gets the whole state.

        Raises
        ------
        ValueError
            If plain tensors hold parts of parameters, whose shapes are not known.
        """
        self._refresh()
        self._check_shapes()
        return self._whole()

    def _blocks_by_group(self) -> list[list[str]]:
        """Return the blocks of each group, those that others before it have apart."""
        seen: set[str] = set()
        found: dict[int, list[str]] = {id(group): [] for group in self.param_groups}
        for name, key in self._ready.plan.blocks.family_of.items():
            if key not in seen:
                seen.add(key)
                found[id(self._ready.leaves[name].group)].append(key)
        return list(found.values())

    def share_memory(self) -> "MetaOptimizer":
        """Move all state to shared memory, for processes that train one model together.

        As `torch.nn.Module.share_memory` does, before these processes are started. They learn one
        step size for each block then, and step what is small less fast, as it cannot be packed.
        """
        for held in (*self.state.values(), *self.param_groups):
            for value in held.values():
                if isinstance(value, Tensor):
                    value.share_memory_()
        return self

    def _check_shared(self) -> None:
        """Raise where processes share the state of parameters, but not that of blocks."""
        for leaf in self._ready.leaves.values():
            if leaf.state:
                if leaf.shared and not shared(self._ready.vectors["step"]):
                    msg = (
                        f"`state` of {leaf.name!r} is in shared memory, the step sizes in "
                        "`param_groups` are not: call `share_memory` of the optimizer, before the "
                        "processes are started."
                    )
                    raise ValueError(msg)
                return

    def _check_shapes(self) -> None:
        """Raise where parameters are parts that keep no shape."""
        for name, leaf in self._ready.leaves.items():
            if leaf.part.group is not None:
                msg = (
                    f"The core's state needs whole parameters; of {name!r} this process holds a "
                    "part without its shape. Use `state_dict` and torch.distributed.checkpoint."
                )
                raise ValueError(msg)

    def _whole(self) -> mo.State:
        return whole(self._ready, restarts=not self._in_core and not self._hessian_free.two_passes)

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
        self._check_shapes()
        self._ready.config.step_sizes(state)  # which checks it
        take(self._ready, state)
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
        whole, here = self.state, {id(leaf.param) for leaf in self._ready.leaves.values()}
        if all(id(param) in here for param in whole):
            return super().state_dict()
        kept = ((param, entry) for param, entry in whole.items() if id(param) in here)
        self.state = defaultdict(dict, kept)
        try:
            return super().state_dict()
        finally:
            self.state = whole

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
        leaves, found = list(self._ready.leaves.values()), []

        def look(_: Any, given: dict[str, Any]) -> dict[str, Any]:  # at what other hooks make of it
            options = dict.fromkeys(OPTIONS) | self.defaults
            given = aligned(given, self.param_groups, self._given, options)
            self._check_fits(given, leaves)
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
                    if key in leaf.state or key in KEPT or not leaf.state
                }
            self._build()
        except Exception:
            self.__dict__.update(before)
            raise
        finally:
            self._loading = False
            hook.remove()

    def _check_fits(self, state_dict: dict[str, Any], leaves: Sequence[Leaf]) -> None:
        """Raise where a state's arrays have not the shapes that they have here, or its groups."""
        groups = state_dict["param_groups"]
        numbers = [number for group in groups for number in group["params"]]
        lengths = [[len(group["params"]) for group in some] for some in (groups, self.param_groups)]
        if lengths[0] != lengths[1]:
            return  # torch says so
        mismatch = self._ready.vectors.mismatch(groups)
        for own, group in zip(self.param_groups, groups, strict=True):
            kept, expected = group.get(MADE_WITH), own[MADE_WITH]
            if kept is not None and kept != expected:
                mismatch = f"it was made with {kept}; expected {expected}"
        for number, leaf in zip(numbers, leaves, strict=True):
            mismatch = leaf.mismatch(state_dict["state"].get(number, {})) or mismatch
        if mismatch is not None:
            msg = f"`state_dict` does not fit this optimizer: {mismatch}."
            raise ValueError(msg)
        given = [
            dict.fromkeys(OPTIONS) | self.defaults | group | {"params": own["params"]}
            for group, own in zip(groups, self.param_groups, strict=True)
        ]
        check_groups(given)
        check_rounding(self._rounding, given)
        configured(self._given, given)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle consists of."""
        own = ("_given", "_hvp", "_rounding", "_compile")
        kept = {name: self.__dict__[name] for name in own}
        leaves = () if self._built is None else self._built.leaves.values()
        groups = {leaf.part.group for leaf in leaves} - {None}
        # a copied parameter does not say any more that it is a part
        name = next(iter(groups)).group_name if len(groups) == 1 else None
        return super().__getstate__() | kept | {"_process_group": name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` or `load_state_dict` hands over."""
        super().__setstate__(state)
        if isinstance(state.get("_process_group"), str):
            self._process_group = group_called(state["_process_group"])
        for group in self.param_groups:
            self._complete(group)
        if not self.__dict__.get("_loading", False):
            self._built, self._engine, self._twice, self._checked = None, None, [], False
            self._build()

    def __repr__(self) -> str:
        """Return the rules and the options of the groups."""
        given = self._given
        lines = [f"MetaOptimizer(base={given.base!r}, meta={given.meta!r}"]
        for index, group in enumerate(self.param_groups):
            options = ", ".join(f"{name}={group[name]!r}" for name in OPTIONS)
            lines.append(f"    group {index}: {len(group['params'])} parameters, {options}")
        return "\n".join([*lines, ")"])

    def _per_block(self, name: str) -> Any:
        """Return what `State` calls by this name, values per block."""
        if not self._ready.vectors.per_leaf:
            return self._ready.vectors[name]
        leaves = self._ready.leaves.values()
        return per_leaf((leaf.name, leaf.state[name]) for leaf in leaves if leaf.state)

    def _by_name(self, values: Any) -> Mapping[str, Tensor]:
        return values if isinstance(values, Mapping) else self._ready.plan.blocks.by_name(values)

    def _refresh(self, *, decay: bool = True) -> None:
        """See what was done to groups and state, and, with `decay`, to the groups' weight decay."""
        if self._built is None:
            self._build()
            return
        edited = self._watch.differs(self.param_groups, self.state)
        if edited or self._ready.counts.edited() or (decay and self._ready.outdated()):
            self._build(self._built)


def _without_duplicates(group: dict[str, Any]) -> None:
    """Keep parameters that a group has twice, of which torch warns, in their first place alone."""
    places = {id(param): index for index, param in reversed([*enumerate(group["params"])])}
    if len(places) < len(group["params"]):
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][index] for index in sorted(places.values())]
