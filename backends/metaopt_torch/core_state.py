"""The state in the core's form: of this device's parts, for a step, or of whole parameters."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.passes import usable
from metaopt.plan import Spec
from metaopt_torch.build import Built
from metaopt_torch.places import Path, paths, place
from metaopt_torch.runs import KEPT
from metaopt_torch.shards import gathered, local, window

__all__ = ["assemble", "take", "whole", "write"]


def assemble(built: Built) -> mo.State:
    """Return this device's state, of the very tensors; zeros for leaves that have none yet."""
    return _state(built, lambda path, spec: _held(built, path, spec))


def write(built: Built, state: mo.State) -> None:
    """Copy a state into the tensors that `assemble` returns."""
    for path, spec in paths(built.plan.state):
        value, held = _get(state, path), _held(built, path, spec)
        if held is not value:
            held.copy_(value)


def _held(built: Built, path: Path, spec: Spec) -> Tensor:
    name, key = place(path, per_leaf=built.vectors.per_leaf)
    if name is None:
        return built.vectors[key]
    leaf = built.leaves[name]
    if key in leaf.state:
        return local(leaf.state[key])
    shape = spec.shape
    if key != "step" and not leaf.own_shape(key):
        shape = (*spec.shape[: -leaf.param.dim() or None], *leaf.part.shape)
    return torch.zeros(shape, dtype=spec.dtype, device=leaf.param.device)


def whole(built: Built, *, restarts: bool) -> mo.State:
    """Return the state of whole parameters, copied; of those that a group holds, this part's.

    Parameters
    ----------
    built : Built
    restarts : bool
        Whether traces are yet to restart where the last meta-gradient cannot be used.
    """
    keep = usable(built.vectors["meta_grad"]) if restarts else None

    def tensor(path: Path, spec: Spec) -> Tensor:
        name, key = place(path, per_leaf=built.vectors.per_leaf)
        if name is None:
            return built.vectors[key].clone()
        leaf = built.leaves[name]
        if key not in leaf.state:
            return torch.zeros(spec.shape, dtype=spec.dtype, device=leaf.param.device)
        value = gathered(leaf.state[key])
        if key in KEPT and keep is not None:
            columns = built.plan.layout.columns(keep, name, len(spec.shape)).to(value.device)
            begin = gathered(leaf.param.detach()) if key == "average" else 0.0
            value = torch.where(columns, value, begin)
        return value

    return _state(built, tensor)


def take(built: Built, state: mo.State) -> None:
    """Copy the state of whole parameters into this device's parts."""
    for path, _ in paths(built.plan.state):
        value = _get(state, path)
        name, key = place(path, per_leaf=built.vectors.per_leaf)
        if name is None:
            built.vectors[key].copy_(value)
            continue
        leaf = built.leaves[name]
        if key in leaf.state:
            held = local(leaf.state[key])
            whole = key == "step" or leaf.own_shape(key)
            held.copy_(value if whole else window(value, leaf.part))


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
