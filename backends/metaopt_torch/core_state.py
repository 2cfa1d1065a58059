"""The state in the core's form: of this device's parts, for a step, or of whole parameters."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.leaf import usable
from metaopt.plan import Spec
from metaopt_torch.build import Built
from metaopt_torch.leaf import TRACES
from metaopt_torch.shards import gathered, local, sliced
from metaopt_torch.state_keys import Path, state_key, walk

__all__ = ["assemble", "check_whole", "whole", "write"]


def assemble(built: Built) -> mo.State:
    """Return this device's state, of the very tensors; zeros for leaves that have none yet."""
    return _state(built, lambda path, spec: _held(built, path, spec))


def write(built: Built, state: mo.State) -> None:
    """Copy a state, as `assemble` returns it or of whole parameters, into the tensors held here."""
    for path, spec in walk(built.plan.state):
        value, held = _get(state, path), _held(built, path, spec)
        if value is held:  # a step leaves it alone
            continue
        name, _ = state_key(path, per_leaf=built.block_state.per_leaf)
        if name is not None and value.shape != held.shape:
            value = sliced(value, built.leaves[name].shard)
        held.copy_(value)


def _held(built: Built, path: Path, spec: Spec) -> Tensor:
    name, key = state_key(path, per_leaf=built.block_state.per_leaf)
    if name is None:
        return built.block_state[key]
    leaf = built.leaves[name]
    if key in leaf.state:
        return local(leaf.state[key])
    shape = spec.shape
    if key != "step" and not leaf.own_shape(key):
        shape = (*spec.shape[: -leaf.param.dim() or None], *leaf.shard.shape)
    return torch.zeros(shape, dtype=spec.dtype, device=leaf.param.device)


def check_whole(built: Built) -> None:
    """Raise ValueError where parameters are shards that keep no shape."""
    for name, leaf in built.leaves.items():
        if leaf.shard.group is not None:
            msg = (
                f"The core's state needs whole parameters; of {name!r} this process holds a "
                "part without its shape. Use `state_dict` and torch.distributed.checkpoint."
            )
            raise ValueError(msg)


def whole(built: Built) -> mo.State:
    """Return the state of whole parameters, copied; of those that a group holds, this shard's."""
    # after a step of one pass, traces are yet to restart where z cannot be used
    keep = None if built.z_first else usable(built.block_state["meta_grad"])

    def tensor(path: Path, spec: Spec) -> Tensor:
        name, key = state_key(path, per_leaf=built.block_state.per_leaf)
        if name is None:
            return built.block_state[key].clone()
        leaf = built.leaves[name]
        if key not in leaf.state:
            return torch.zeros(spec.shape, dtype=spec.dtype, device=leaf.param.device)
        value = gathered(leaf.state[key])
        if key in TRACES and keep is not None:
            columns = built.plan.layout.columns(keep, name, len(spec.shape)).to(value.device)
            begin = gathered(leaf.param.detach()) if key == "average" else 0.0
            value = torch.where(columns, value, begin)
        return value

    return _state(built, tensor)


def _state(built: Built, tensor: Callable[[Path, Spec], Tensor]) -> mo.State:
    """Return a state of the tensors for each place in it."""

    def tree(spec: Any, path: Path) -> Any:
        if isinstance(spec, Mapping):
            return OrderedDict((key, tree(part, (*path, key))) for key, part in spec.items())
        return tensor(path, spec)

    return mo.State(**{field: tree(spec, (field,)) for field, spec in built.plan.state.items()})


def _get(state: mo.State, path: Path) -> Any:
    value: Any = getattr(state, path[0])
    for key in path[1:]:
        value = value[key]
    return value
