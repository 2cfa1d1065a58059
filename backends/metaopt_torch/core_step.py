"""A step by the core's own `MetaOptimize.step`, for all that is not done in passes over buckets.

That is curvature, and a step size for every weight.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.blocks import Blocks
from metaopt.step import Reduce
from metaopt_torch.build import Built
from metaopt_torch.core_state import assemble, write
from metaopt_torch.groups import multiplier_of
from metaopt_torch.leaf import Leaf
from metaopt_torch.rounding import lost, rounded
from metaopt_torch.shards import Devices, device_count, local, summed

__all__ = ["check_sharding", "copies", "core_step", "project", "reduction", "wide"]


def core_step(
    built: Built,
    grads: Mapping[str, Tensor],
    rounding: str,
    derivatives: Mapping[str, Any],
    meta_grads: Mapping[str, Tensor] | None = None,
) -> None:
    """Move the leaves that have a gradient, in place.

    `derivatives` are `hvp`, `third` and `hessian_diagonal` as `MetaOptimize.step` takes them, and
    so are `meta_grads`.
    """
    leaves = built.leaves

    def signed(found: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return gradients, or derivatives of them, of what is minimized."""
        result: dict[str, Tensor | None] = {}
        for name, leaf in leaves.items():
            array = found.get(name)
            if array is not None:
                array = local(array).detach().to(leaf.dtype)
                array = -array if leaf.group["maximize"] else array
            result[name] = array
        return result

    def derivative(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *tangents: signed(function(*tangents))

    options: dict[str, Any] = {
        name: derivative(value) if callable(value) else value for name, value in derivatives.items()
    }
    new_params, new_state = built.config.step(
        {name: wide(leaf) for name, leaf in leaves.items()},
        signed(grads),
        assemble(built),
        lr={name: multiplier_of(leaf.group) for name, leaf in leaves.items()},
        reduce=reduction(leaves),
        copies=copies(leaves),
        meta_grads=None if meta_grads is None else signed(meta_grads),
        **options,
    )
    for name in grads:
        _put(leaves[name], new_params[name], rounding)
    write(built, new_state)


def project(
    built: Built, function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], rounding: str
) -> None:
    """Project the parameters, and push their traces through, in place.

    `function` is from weights by name to projected ones. ValueError is raised where parameters are
    distributed: a function of a shard need not be that of the whole.
    """
    leaves = built.leaves
    for name, leaf in leaves.items():
        if leaf.shard.over is not None:
            msg = (
                f"`project` needs whole parameters; of {name!r} this process holds a part. Project "
                "it by hand, and give `bounds` where weights stay at a bound."
            )
            raise ValueError(msg)

    def jvp(weights: Mapping[str, Tensor], tangents: Mapping[str, Tensor]) -> Any:
        with warnings.catch_warnings():  # of what torch itself imports with its first derivative
            warnings.simplefilter("ignore", DeprecationWarning)
            importlib.import_module("torch._decomp.decompositions_for_jvp")
        # of clones, as a function may work in place
        own = {name: weight.clone() for name, weight in weights.items()}
        return torch.func.jvp(function, (own,), (dict(tangents),))

    params = {name: wide(leaf) for name, leaf in leaves.items()}
    new_params, new_state = built.config.project(params, assemble(built), jvp)
    for name, new in new_params.items():
        if new is not params[name]:
            _put(leaves[name], new, rounding)
    write(built, new_state)


def _put(leaf: Leaf, new: Tensor, rounding: str) -> None:
    """Write a parameter, and keep what rounding takes from it where that is kept."""
    memory = local(leaf.param)
    narrow = rounded(new, memory.dtype, rounding) if new.dtype != memory.dtype else new
    memory.copy_(narrow)
    if "compensation" in leaf.state:
        local(leaf.state["compensation"]).copy_(lost(new, memory.dtype))


def wide(leaf: Leaf) -> Tensor:
    """Return a parameter in the compute dtype, with what rounding has kept from it."""
    weights = local(leaf.param).detach().to(leaf.dtype)
    if "compensation" in leaf.state:
        weights = weights + local(leaf.state["compensation"])
    return weights


def _devices(leaves: Mapping[str, Leaf], *, groups: bool) -> dict[Devices, set[int]]:
    """Return which devices share leaves: process groups, and unless only these meshes by axes."""
    found: dict[Devices, set[int]] = {}
    for leaf in leaves.values():
        shard = leaf.shard
        if shard.over is not None and (shard.mesh is None or not groups):
            found.setdefault(shard.over, set()).update(shard.axes)
    return found


def copies(leaves: Mapping[str, Leaf], *, groups: bool = False) -> dict[str, int]:
    """Return how often the sums of `reduction` count the same shard of each leaf."""
    devices = _devices(leaves, groups=groups)
    return {
        name: math.prod(
            device_count(over, axes - set(leaf.shard.axes))
            for over, axes in devices.items()
            if over is not leaf.shard.group
        )
        for name, leaf in leaves.items()
    }


def reduction(leaves: Mapping[str, Leaf], *, groups: bool = False) -> Reduce | None:
    """Return what adds sums over the devices that hold shards of the leaves; None for one device.

    With `groups` only over those that hold shards of plain tensors.
    """
    devices = _devices(leaves, groups=groups)
    if not devices:
        return None

    def reduce(arrays: list[Any]) -> list[Any]:
        sizes = [array.numel() for array in arrays]
        total = torch.cat([array.reshape(-1) for array in arrays])
        for over, axes in devices.items():
            total = summed(total, over, axes)
        return [
            piece.reshape(array.shape)
            for piece, array in zip(total.split(sizes), arrays, strict=True)
        ]

    return reduce


def check_sharding(built: Built) -> None:
    """Raise ValueError where leaves are distributed in a way that this kind of step cannot take."""
    if built.config.recover:
        for name, leaf in built.leaves.items():
            if leaf.shard.over is not None:
                msg = f"`recover` needs whole parameters; of {name!r} this process holds a part."
                raise ValueError(msg)
    shards = [leaf.shard for leaf in built.leaves.values()]
    if all(shard.over is None for shard in shards):
        return
    if built.plan.learned:
        for number in (built.plan, *built.plan.learned.values()):
            _check_blocks(number.blocks, "learned numbers")
    if built.plan.curvature == "none":  # a step size for every weight needs no other device
        return
    if any(shard.group is not None for shard in shards) or len({s.mesh for s in shards}) > 1:
        msg = (
            '`curvature` other than "none" needs all parameters to be whole or DTensors of one '
            "mesh; these are not."
        )
        raise ValueError(msg)
    if len({shard.axes for shard in shards}) > 1:
        msg = (
            '`curvature` other than "none" needs all parameters to be sharded along the same '
            "dimensions of a mesh; these are not."
        )
        raise ValueError(msg)
    _check_blocks(built.plan.blocks, '`curvature` other than "none"')


def _check_blocks(blocks: Blocks, what: str) -> None:
    """Raise ValueError where a leaf, of which devices have parts, has several blocks of a kind."""
    for name, view in blocks.views.items():
        if view != () and not blocks.partition.per_leaf:
            msg = (
                f"`blocks` gives {name!r} several step sizes; with {what} "
                "a sharded parameter can have one alone."
            )
            raise ValueError(msg)
