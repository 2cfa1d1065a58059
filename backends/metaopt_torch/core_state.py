"""The state in the core's form: of this device's parts, for a step, or of whole parameters."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.leaf import usable
from metaopt.meta import all_horizons
from metaopt.plan import Spec
from metaopt_torch.build import Built
from metaopt_torch.leaf import Leaf
from metaopt_torch.shards import gathered, local, sliced
from metaopt_torch.state_keys import Path, Place

__all__ = ["assemble", "check_whole", "going_on", "whole", "write"]


def assemble(built: Built) -> mo.State:
    """Return this device's state, of the very tensors; zeros for leaves that have none yet."""
    return _state(built, lambda place: place.joined(_held(built, place)))


def write(built: Built, state: mo.State) -> None:
    """Copy a state, as `assemble` returns it or of whole parameters, into the tensors held here."""
    for path, place in built.places.items():
        parts = place.parts(_get(state, path))
        for value, held in zip(parts, _held(built, place), strict=True):
            if value is held:  # a step leaves it alone
                continue
            if place.leaf is not None and value.shape != held.shape:
                value = sliced(value, built.leaves[place.leaf].shard)
            held.copy_(value)


def _held(built: Built, place: Place) -> list[Tensor]:
    if place.leaf is None:
        return [built.block_state[key] for key in place.keys]
    leaf, shape = built.leaves[place.leaf], place.spec.shape
    key = place.keys[0]
    if key in leaf.state:
        return [local(leaf.state[key]) for key in place.keys]
    if key != "step" and not leaf.own_shape(key):
        shape = (*shape[: -leaf.param.dim() or None], *leaf.shard.shape)
    zeros = torch.zeros(shape, dtype=place.spec.dtype, device=leaf.param.device)
    return [zeros] * len(place.keys)


def check_whole(built: Built) -> None:
    """Raise ValueError where parameters are shards that keep no shape."""
    for name, leaf in built.leaves.items():
        if leaf.shard.group is not None:
            msg = (
                f"The core's state needs whole parameters; of {name!r} this process holds a "
                "part without its shape. Use `state_dict` and torch.distributed.checkpoint."
            )
            raise ValueError(msg)


def going_on(built: Built) -> Tensor | None:
    """Return the blocks whose traces do not restart, None for all.

    After a step of one pass, traces are yet to restart where z cannot be used.
    """
    if built.z_first:
        return None
    state = built.block_state
    return torch.as_tensor(all_horizons(usable(state["meta_grad"]), state["beta"]))


def whole(built: Built) -> mo.State:
    """Return the state of whole parameters, copied; of those that a group holds, this shard's."""
    mask = going_on(built)

    def of_leaf(leaf: Leaf, key: str, spec: Spec) -> Tensor:
        if key not in leaf.state:
            if leaf.state and key in leaf.averages:  # the trace is 0
                return gathered(leaf.param.detach()).to(spec.dtype, copy=True)
            return torch.zeros(spec.shape, dtype=spec.dtype, device=leaf.param.device)
        value = gathered(leaf.state[key])
        if key in leaf.exchanged and mask is not None:
            columns = built.plan.layout.columns(mask, leaf.name, len(spec.shape)).to(value.device)
            begin = gathered(leaf.param.detach()) if key in leaf.averages else 0.0
            value = torch.where(columns, value, begin)
        return value

    def tensor(place: Place) -> Tensor:
        if place.leaf is None:
            return built.block_state[place.keys[0]].clone()
        leaf = built.leaves[place.leaf]
        return place.joined([of_leaf(leaf, key, place.spec) for key in place.keys])

    return _state(built, tensor)


def _state(built: Built, tensor: Callable[[Place], Tensor]) -> mo.State:
    """Return a state of the tensors for each place in it."""

    def tree(spec: Any, path: Path) -> Any:
        if isinstance(spec, Mapping):
            return OrderedDict((key, tree(part, (*path, key))) for key, part in spec.items())
        return tensor(built.places[path])

    return mo.State(**{field: tree(spec, (field,)) for field, spec in built.plan.state.items()})


def _get(state: mo.State, path: Path) -> Any:
    value: Any = getattr(state, path[0])
    for key in path[1:]:
        value = value[key]
    return value
