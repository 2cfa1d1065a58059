"""Any optimizer of torch's, with step sizes that tune themselves."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.configuration import META, META_LR, STEP_SIZE, RuleLike
from metaopt.step import sizes_of
from metaopt_torch.base import check_training
from metaopt_torch.build import Built
from metaopt_torch.core_step import core_step
from metaopt_torch.frozen import frozen_step
from metaopt_torch.groups import OPTIONS
from metaopt_torch.inner import (
    Piece,
    check_all_held,
    check_options_kept,
    check_schedulers,
    check_wrapped,
    divided,
    mark_wrapped,
    merged,
    outer_group,
    read_options,
    separate_lrs,
    split,
)
from metaopt_torch.leaf import Group, Leaf
from metaopt_torch.loading import aligned
from metaopt_torch.shards import local
from metaopt_torch.tuned import TunedOptimizer
from metaopt_torch.watch import Watch

__all__ = ["WrappedOptimizer", "wrap"]

#: The class of every wrapper's base update: the optimizers that are wrapped.
_OPAQUE = mo.Opaque()


class _States(defaultdict[Tensor, dict[str, Any]]):
    """States of parameters, which count as none as long as the wrapped optimizers have none.

    torch.distributed.checkpoint then makes them some before it looks for keys to load.
    """

    inner: tuple[torch.optim.Optimizer, ...] = ()

    def __bool__(self) -> bool:
        return len(self) > 0 and (not self.inner or any(one.state for one in self.inner))


class WrappedOptimizer(TunedOptimizer):
    """What `wrap` returns.

    Attributes
    ----------
    inner : tuple of torch.optim.Optimizer
        The optimizers that are wrapped; their groups have the options that count, but for `lr`.
    """

    _whose_lr = "`lr` of the optimizer that is wrapped"

    def __init__(
        self,
        optimizers: Sequence[tuple[str | None, torch.optim.Optimizer]],
        config: mo.MetaOptimize,
        *,
        compile: bool | None,
        process_group: Any,
    ) -> None:
        self.inner = tuple(optimizer for _, optimizer in optimizers)
        self._blocks = tuple(block for block, _ in optimizers)
        self._pieces: list[tuple[torch.optim.Optimizer, Piece]] = []
        #: What was last read for groups of ours, which are not to say anything else.
        self._read: list[tuple[Group, dict[str, Any]]] = []
        #: What was last written into groups of the wrapped, which are not to say anything else.
        self._written: list[tuple[Group, float]] = []
        self._ours = False  # whether groups that are added are made here
        groups = [
            outer_group(optimizer, group, block)
            for block, optimizer in optimizers
            for group in optimizer.param_groups
        ]
        self._ours = True
        super().__init__(
            groups,
            config,
            {"lr": 1.0, "weight_decay": None, "maximize": False},
            hvp="autograd",
            rounding="nearest",
            compile=compile,
            process_group=process_group,
        )
        self._ours = False
        self.state = _States(dict, self.state)
        self.state.inner = self.inner

    @torch.inference_mode(False)
    @torch.no_grad()
    def _build(self, before: Built | None = None) -> None:
        self._inner_watch: Watch | None = None  # until all is built
        super()._build(before)
        if self._built is None:
            return
        pieces = [
            (optimizer, piece)
            for optimizer in self.inner
            for piece in split(optimizer, self._built)
        ]
        check_all_held(self._built, [piece for _, piece in pieces])
        self._pieces = pieces
        separate_lrs(self.inner)
        if self._built.in_core:
            _check_units(self._built)
        self._inner_watch = Watch(())
        self._inner_watch.see(self._inner_groups(), {})
        mark_wrapped(self.inner)
        if not self._read:
            self._read_options()

    def _refresh(self, *, decay: bool = True, evaluating: bool = False) -> None:
        super()._refresh(decay=decay, evaluating=evaluating)
        watch = self._inner_watch
        if not evaluating and (watch is None or watch.differs(self._inner_groups(), {})):
            self._build(self._built)

    def _inner_groups(self) -> list[Group]:
        return [group for optimizer in self.inner for group in optimizer.param_groups]

    # as torch's own optimizers do it: the public way imports Dynamo, which takes a second
    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step with the gradients that are there: the wrapped optimizers make it.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients, and returns the loss. Called once.

        Returns
        -------
        What `closure` returned, or None.

        Raises
        ------
        TypeError, ValueError
            If a gradient is sparse, a parameter or its gradient has come by another shape or
            device, a group's option is wrong, or a wrapped optimizer has come by a parameter that
            is not in our groups. Nothing is changed then.
        """
        check_training(self._evaluating)
        self._held_out.check_outside("step")
        for optimizer in self.inner:
            check_schedulers(optimizer)
        self._refresh(decay=False)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not any(group["params"] for group in self.param_groups):  # yet, or any more
            return loss
        self._read_groups()
        with torch.no_grad():
            grads, meta_grads = self._grads(), self._meta_grads()
            sizes = None if self._ready.in_core else self._follow(grads, meta_grads)
        if self._ready.in_core:
            self._step_in_core(grads, meta_grads)
        elif sizes is not None:
            self._set_lr(sizes)
            self._step_inner()
        self._held_out.grads.clear()
        return loss

    def _read_groups(self) -> None:
        """Have our groups say of weight decay and sign what those of the wrapped say now.

        ValueError is raised where something was written that is not to be said there.
        """
        own = {id(piece.group) for _, piece in self._pieces}
        for group, lr in self._written:
            if id(group) in own and not isinstance(group["lr"], Tensor) and group["lr"] != lr:
                msg = (
                    "`lr` in the groups of `inner` is written in every step, and cannot be edited "
                    f"there; got {group['lr']!r}. Write to the groups of the wrapper, whose `lr` "
                    "multiplies the step sizes."
                )
                raise ValueError(msg)
        here = {id(group) for group in self.param_groups}
        for group, read in self._read:
            if id(group) in here:
                check_options_kept(group, read)
        self._read_options()

    def _read_options(self) -> None:
        self._read = []
        for optimizer, piece in self._pieces:
            read = read_options(optimizer, piece.group)
            piece.outer.update(read)
            self._read.append((piece.outer, read))

    def _follow(
        self, grads: Mapping[str, Tensor], meta_grads: Mapping[str, Tensor] | None
    ) -> Tensor | None:
        """Update averages and step sizes, and return those to step with; None for no step."""
        built, engine = self._ready, self._engine
        assert engine is not None  # it is made with `_ready`
        beta, config = built.block_state["beta"], built.config
        # a copy, for the meta update writes where it lies
        sizes = sizes_of(config.sigma_map, beta.clone()).value
        # asked for alone where it is needed: that waits for the device
        skipped = built.block_state["skipped"].clone() if config.skip_nonfinite else None
        if engine.step(grads, meta_grads):  # whose packing is no edit
            self._watch.see(self.param_groups, self.state)
        if skipped is not None and bool(skipped != built.block_state["skipped"]):
            return None
        return sizes_of(config.sigma_map, beta.clone()).value if config.meta_first else sizes

    def _step_in_core(
        self, grads: Mapping[str, Tensor], meta_grads: Mapping[str, Tensor] | None
    ) -> None:
        """Make the step of the wrapped optimizers at one lr, and let the core take its share of it.

        For parameters with several step sizes, of which an optimizer can have but one.
        """
        built = self._ready
        with torch.no_grad():
            before = {name: local(built.leaves[name].param).clone() for name in grads}
            # there are optimizers that add their decay to a gradient in place, or turn its sign
            grads = {name: grad.clone() for name, grad in grads.items()}
        lrs = self._set_one_lr()
        try:
            self._step_inner()
            with torch.no_grad():
                unit_steps = {
                    name: (old - local(built.leaves[name].param)) / lrs[name]
                    for name, old in before.items()
                }
        finally:  # also where a wrapped optimizer or one of its hooks raises
            with torch.no_grad():
                for name, old in before.items():
                    local(built.leaves[name].param).copy_(old)
        with torch.no_grad():
            if built.frozen:
                frozen_step(built, grads, "nearest", unit_steps)
                return
            core_step(built, grads, "nearest", {"unit_steps": unit_steps}, meta_grads)
            built.counts.settle()

    def _step_inner(self) -> None:
        for optimizer in self.inner:
            optimizer.step()

    @torch.no_grad()
    def _set_lr(self, sizes: Tensor) -> None:
        """Write the step sizes of blocks, times the multipliers, into the wrapped groups.

        Where a group's `lr` is a tensor it is written in place, and no device is waited for.
        """
        numbers: list[float] | None = None
        self._written = []
        for _, piece in self._pieces:
            if isinstance(piece.group["lr"], Tensor):
                piece.group["lr"].copy_(torch.as_tensor(sizes[piece.block] * piece.lr))
            else:
                numbers = sizes.tolist() if numbers is None else numbers
                self._write(piece.group, numbers[piece.block] * float(piece.lr))

    def _write(self, group: Group, lr: float) -> None:
        group["lr"] = lr
        self._written.append((group, lr))

    @torch.no_grad()
    def _set_one_lr(self) -> dict[str, Tensor]:
        """Write into each wrapped group one lr for all its step sizes; return it by parameter.

        A power of two, which divides exactly, and not much above the largest of them: there are
        optimizers whose steps are proportional to it up to some lr alone.
        """
        built = self._ready
        found: dict[str, Tensor] = {}
        self._written = []
        for _, piece in self._pieces:
            betas = [self._largest_beta(leaf) for leaf in piece.leaves if leaf.state and leaf.size]
            if not betas:
                continue
            largest = sizes_of(built.config.sigma_map, torch.stack(betas).max()).value
            lr = largest * torch.as_tensor(piece.lr).to(largest)
            _, exponent = torch.frexp(torch.where(lr > 0.0, lr, largest))
            one_lr = torch.ldexp(torch.ones_like(largest), exponent)
            if isinstance(piece.group["lr"], Tensor):
                piece.group["lr"].copy_(one_lr)
            else:
                self._write(piece.group, one_lr.item())
            found |= {leaf.name: one_lr.to(leaf.device, leaf.dtype) for leaf in piece.leaves}
        return found

    def _largest_beta(self, leaf: Leaf) -> Tensor:
        """Return the largest beta of a leaf's blocks, where those of all blocks are."""
        block_state = self._ready.block_state
        if block_state.per_leaf:
            return local(leaf.state["beta"]).max().to(block_state["step"].device)
        return block_state["beta"][int(leaf.blocks.min()) : int(leaf.blocks.max()) + 1].max()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to a wrapped optimizer, also in mid-training.

        Parameters
        ----------
        param_group : dict
            As the wrapped optimizer takes it; beside that `block`, `step_size` and `bounds`, and
            where several are wrapped `optimizer`, the number of the one that gets it. Where they
            have names, `block` is that name by default, as it is of their other groups.

        Raises
        ------
        ValueError, TypeError
            If an option is wrong; nothing is changed then.
        """
        if self._ours:
            super().add_param_group(param_group)
            return
        given = dict(param_group)
        number = given.pop("optimizer", None if len(self.inner) > 1 else 0)
        if not isinstance(number, int) or not 0 <= number < len(self.inner):
            msg = (
                "`optimizer` of a group must be the number of the wrapped optimizer that gets it, "
                f"from 0 to {len(self.inner) - 1}; got {number!r}."
            )
            raise ValueError(msg)
        inner = self.inner[number]
        before = list(inner.param_groups)
        inner.add_param_group(given)
        self._ours = True
        try:
            own = outer_group(inner, inner.param_groups[-1], self._blocks[number])
            super().add_param_group(own)
        except Exception:
            inner.param_groups[:] = before
            raise
        finally:
            self._ours = False

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return groups and state by number, as torch does, those of the wrapped among them."""
        return merged(super().state_dict(), self.inner, self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here and into the wrapped optimizers.

        By name where parameters have names there and here, else by position.

        Parameters
        ----------
        state_dict : dict

        Raises
        ------
        ValueError
            If it belongs to other parameters, to another configuration or other optimizers.
            Nothing is changed then.
        """
        self._refresh()
        options = dict.fromkeys(OPTIONS) | self.defaults
        given = aligned(state_dict, self.param_groups, self._given, options)
        own, parts = divided(given, self.inner, self.param_groups)
        before = [(optimizer, optimizer.__dict__.copy()) for optimizer in self.inner]
        try:
            for optimizer, part in zip(self.inner, parts, strict=bool(parts)):
                optimizer.load_state_dict(part)
            super().load_state_dict(own)
        except Exception:
            for optimizer, attributes in before:
                optimizer.__dict__.update(attributes)
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle consists of."""
        own = {"inner": self.inner, "_blocks": self._blocks, "_ours": False}
        own |= {"_pieces": [], "_read": [], "_written": []}
        return super().__getstate__() | own

    def __repr__(self) -> str:
        """Return the wrapped optimizers, the meta update and the options of the groups."""
        lines = [f"WrappedOptimizer(meta={self._given.meta!r}"]
        for optimizer in self.inner:
            lines += [f"    {line}" for line in repr(optimizer).splitlines()]
        return "\n".join([*lines, ")"])


def _check_units(built: Built) -> None:
    """Raise where the step of an optimizer at lr 1 cannot be cut into the steps of blocks."""
    if built.config.skip_nonfinite:
        msg = (
            "`skip_nonfinite` must be False where parameters have several step sizes each: what is "
            "not finite would be in the moments of the wrapped optimizer by then; got True."
        )
        raise ValueError(msg)
    for name, leaf in built.leaves.items():
        if leaf.shard.over is not None and not built.block_state.per_leaf:
            msg = (
                f"`blocks` gives a parameter several step sizes, which needs whole parameters; of "
                f"{name!r} this process holds a part."
            )
            raise ValueError(msg)
        if leaf.param.dtype != leaf.dtype:
            msg = (
                f"`blocks` gives {name!r} several step sizes, which needs float32 or wider: its "
                f"step at lr 1 has to be found in its numbers; got {leaf.param.dtype}."
            )
            raise ValueError(msg)


def wrap(
    optimizer: torch.optim.Optimizer
    | Iterable[torch.optim.Optimizer]
    | Mapping[str, torch.optim.Optimizer],
    *,
    meta: RuleLike = META,
    step_size: float | Mapping[str, Any] = STEP_SIZE,
    meta_lr: float = META_LR,
    discount: float | tuple[float, ...] | None = None,
    blocks: Any = "scalar",
    bounds: Any = None,
    held_out: bool = False,
    meta_first: bool = False,
    skip_nonfinite: bool = False,
    compile: bool | None = None,
    process_group: Any = None,
) -> WrappedOptimizer:
    r"""Return an optimizer around others, whose step sizes tune themselves.

    docs/wrap.md; docs/mathematics.md section 10. Any optimizer will do whose steps are proportional
    to its lr: what is learned needs of it the weights before its steps, and nothing else.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer, or iterable or mapping of them
        What makes the steps, untouched but for the `lr` of its groups, which is set in every step
        to the learned step size times the one that the group had: so give it `lr=1.0`, and other
        values where groups are to have other shares. Where groups have several step sizes they are
        cut into as many. Of a mapping, each has a block of its name.
    meta : Rule, or name of one
        The update of the step sizes.
    step_size, meta_lr, discount, blocks, bounds, held_out, meta_first, skip_nonfinite
        As for `metaopt.MetaOptimize`. A group of a wrapped optimizer may have `step_size`,
        `bounds` and `block`, the name of the block that all its parameters share.
    compile, process_group
        As for `MetaOptimizer`.

    Returns
    -------
    WrappedOptimizer
        A torch.optim.Optimizer. Its groups are those of `optimizer` when it is made; their `lr`
        multiplies the step sizes, and is what schedulers drive. All other options stay in the
        groups of `inner`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described, if steps are known not to be proportional to the lr, or
        if an optimizer is wrapped already or learns its step sizes.

    Examples
    --------
    >>> import metaopt as mo
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = wrap(
    ...     {
    ...         "matrix": torch.optim.Muon([model.weight], lr=1.0),
    ...         "bias": torch.optim.AdamW([model.bias], lr=1.0),
    ...     },
    ...     meta=mo.FastStart(mo.AdamW()),
    ...     compile=False,
    ... )
    >>> model(torch.ones(4, 3)).square().mean().backward()
    >>> opt.step()
    >>> sorted(opt.step_sizes())
    ['bias', 'matrix']
    """
    found: list[tuple[str | None, Any]]
    if isinstance(optimizer, Mapping):
        found = list(optimizer.items())
    elif isinstance(optimizer, torch.optim.Optimizer) or not isinstance(optimizer, Iterable):
        found = [(None, optimizer)]
    else:
        found = [(None, one) for one in optimizer]
    if not found:
        msg = f"`optimizer` must be one or more; got {optimizer!r}."
        raise ValueError(msg)
    for _, one in found:
        check_wrapped(one)
    config = mo.MetaOptimize(
        base=_OPAQUE,
        meta=meta,
        step_size=step_size,
        meta_lr=meta_lr,
        discount=discount,
        blocks=blocks,
        bounds=bounds,
        held_out=held_out,
        meta_first=meta_first,
        skip_nonfinite=skip_nonfinite,
    )
    return WrappedOptimizer(found, config, compile=compile, process_group=process_group)
