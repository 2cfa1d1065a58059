"""The state of a leaf: checked, completed, and made anew where its parameter was replaced."""

from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from metaopt.plan import Spec
from metaopt_torch.changes import Index, copy_entries
from metaopt_torch.leaf import Leaf
from metaopt_torch.memory import stored
from metaopt_torch.shards import LocalShard, local

__all__ = ["check_state", "complete", "is_stale", "restart_rows"]


def is_stale(state: Mapping[str, Any], shard: LocalShard) -> bool:
    """Return whether a state is of steps that were never made, before the parameter was sharded.

    FullyShardedDataParallel may wrap a model whose optimizer exists already.
    """
    arrays = [value for key, value in state.items() if key != "step"]
    if shard.group is None or all(tuple(array.shape) == shard.shape for array in arrays):
        return False
    return int(state.get("step", 0)) == 0


def check_state(leaf: Leaf, keys: Iterable[str]) -> None:
    """Raise where what a leaf's state has under these keys cannot be gone on with."""
    state = leaf.state
    for key in state.keys() & {*keys, "compensation"}:
        value, what = state[key], f"`state[...][{key!r}]` of parameter {leaf.name!r}"
        if isinstance(value, Tensor):
            value = local(value)
            if value.layout != torch.strided or not stored(value):
                msg = f"{what} must be dense and lie in its storage; got one that does not."
                raise ValueError(msg)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        if key == "step" and shape not in ((), (1,)) and not isinstance(value, Real):
            msg = f"{what} must be the number of its steps; got {value!r}."
            raise ValueError(msg)
        if key in leaf.rule.slots and shape != leaf.shape_of(key):
            msg = (
                f"{what} must be a tensor of shape {leaf.shape_of(key)} on this device; got "
                f"{repr(value) if shape is None else shape}. Change it as the parameter was "
                "changed, or give the parameter an empty state, to start afresh."
            )
            raise ValueError(msg)
    lacking = [key for key in leaf.rule.slots if key not in state]
    if "step" in state and lacking:
        msg = (
            f"`state` of parameter {leaf.name!r} has the number of its steps, but no "
            f"{lacking[0]!r}: a moment that starts afresh goes with a count that does. Put it "
            "back, or give the parameter an empty state."
        )
        raise ValueError(msg)


def complete(
    leaf: Leaf,
    specs: Mapping[str, Spec],
    begin: Mapping[str, Tensor],
    *,
    kahan: bool,
    columns: Callable[[str], Index],
) -> None:
    """Add to a leaf's state what it lacks; new numbers are zero where `begin` says nothing else.

    What has not the shape of the parameter starts afresh: those who replace parameters do not know
    of all that there is. Dense traces have their columns in the order of the blocks, which
    `columns` has by key.
    """
    memory, stride = local(leaf.param), leaf.param.stride()
    _exchange(leaf, specs)
    old = leaf.state.get("compensation")
    if kahan and not _fits(old, memory.dtype, leaf.shard.shape, memory.device):
        zeros = torch.zeros_like(memory, memory_format=torch.preserve_format)
        leaf.state["compensation"] = leaf.shard.wrap(zeros, leaf.param.shape, stride)
    for key, spec in specs.items():
        if key == "step":
            leaf.state.setdefault(key, torch.zeros((), dtype=spec.dtype, device=memory.device))
            continue
        own = leaf.own_shape(key)
        lead = () if own else spec.shape[: len(spec.shape) - leaf.param.dim()]
        shape = spec.shape if own else (*lead, *leaf.shard.shape)
        old = leaf.state.get(key)
        order = columns(key)
        reordered = bool(lead) and order != list(range(len(order)))
        if _fits(old, spec.dtype, shape, memory.device) and not reordered:
            continue
        if lead or own:
            new = torch.zeros(shape, dtype=spec.dtype, device=memory.device)
        else:
            new = torch.zeros_like(memory, dtype=spec.dtype, memory_format=torch.preserve_format)
        if key in begin:
            new.copy_(begin[key])
        elif key in leaf.averages:  # the trace begins at 0
            new.copy_(memory)
        if isinstance(old, Tensor) and local(old).shape[len(lead) :] == shape[len(lead) :]:
            if lead:
                copy_entries(local(old), new, order, range(len(lead)))
            else:
                new.copy_(local(old))
        strides = _contiguous(spec.shape) if lead or own else stride
        leaf.state[key] = leaf.shard.wrap(new, spec.shape, strides)


def _fits(value: Any, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> bool:
    """Return whether this is a tensor as a step needs it."""
    if not isinstance(value, Tensor):
        return False
    here = local(value)
    return here.dtype == dtype and tuple(here.shape) == shape and here.device == device


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _exchange(leaf: Leaf, keys: Iterable[str]) -> None:
    """Make of a trace the average that it is the distance to, or the reverse, where keys say so.

    What is kept depends on the dtype of a parameter, which may have changed.
    """
    for old, new in leaf.exchanged.items():
        if old in leaf.state and old not in keys and new in keys:
            kept = leaf.state.pop(old)
            fits = isinstance(kept, Tensor) and local(kept).shape == leaf.shard.shape
            if fits and int(leaf.state.get("step", 0)):  # before the first step the trace is 0
                weights = local(leaf.param).detach().to(kept.dtype)
                leaf.state[new] = leaf.shard.wrap(
                    weights - local(kept), leaf.param.shape, leaf.param.stride()
                )


def restart_rows(leaf: Leaf, specs: Mapping[str, Spec], begin: Mapping[str, Tensor]) -> None:
    """Have entries whose state is zero throughout start as those of new parameters do.

    Scripts that add rows to a parameter fill its state with zeros, whatever it holds.
    """
    averages = [key for key in leaf.averages if key in leaf.state]
    first = {**begin, **dict.fromkeys(averages, local(leaf.param))}
    held = {key: local(leaf.state[key]) for key in specs if key != "step"}
    held = {key: value for key, value in held.items() if value.shape == leaf.shard.shape}
    if not first.keys() & held.keys():
        return
    new = torch.stack([value == 0 for value in held.values()]).all(dim=0)
    for key in first.keys() & held.keys():
        held[key].copy_(torch.where(new, first[key].to(held[key].dtype), held[key]))
