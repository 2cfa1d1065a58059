"""A step by the core's own `MetaOptimize.step`, for all that is not done in passes over runs.

That is curvature, and a step size for every weight.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.step import Reduce
from metaopt_torch.build import Built
from metaopt_torch.core_state import assemble, write
from metaopt_torch.groups import multiplier_of
from metaopt_torch.rounding import lost, rounded
from metaopt_torch.runs import Leaf
from metaopt_torch.shards import devices, local, summed_along

__all__ = ["check_parts", "copies", "core_step", "project", "reduction"]


def core_step(
    built: Built, grads: Mapping[str, Tensor], rounding: str, derivatives: Mapping[str, Any]
) -> None:
    """Move the leaves that have a gradient, in place.

    Parameters
    ----------
    built : Built
    grads : mapping of leaf name to tensor
    rounding : {"nearest", "stochastic", "kahan"}
    derivatives : mapping
        `hvp`, `third` and `hessian_diagonal` as `MetaOptimize.step` takes them.
    """
    leaves = built.leaves
    params = {name: _wide(leaf) for name, leaf in leaves.items()}
    signed = {name: _signed(leaf, grads.get(name)) for name, leaf in leaves.items()}
    state = assemble(built)
    options: dict[str, Any] = {
        name: _derivative(built, value) if callable(value) else value
        for name, value in derivatives.items()
    }
    new_params, new_state = built.config.step(
        params,
        signed,
        state,
        lr={name: multiplier_of(leaf.group) for name, leaf in leaves.items()},
        reduce=reduction(leaves),
        copies=copies(leaves),
        **options,
    )
    for name in grads:
        _put(leaves[name], new_params[name], rounding)
    write(built, new_state)


def project(
    built: Built, function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], rounding: str
) -> None:
    """Project the parameters, and push their traces through, in place.

    Parameters
    ----------
    built : Built
    function : callable
        From weights by name to projected ones.
    rounding : {"nearest", "stochastic", "kahan"}

    Raises
    ------
    ValueError
        If parameters are distributed: a function of a part need not be that of the whole.
    """
    leaves = built.leaves
    for name, leaf in leaves.items():
        if leaf.part.over is not None:
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

    params = {name: _wide(leaf) for name, leaf in leaves.items()}
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
        local(leaf.state["compensation"]).copy_(lost(new, narrow))


def _wide(leaf: Leaf) -> Tensor:
    """Return a parameter in the compute dtype, with what rounding has kept from it."""
    wide = local(leaf.param).detach().to(leaf.dtype)
    if "compensation" in leaf.state:
        wide = wide + local(leaf.state["compensation"])
    return wide


def _signed(leaf: Leaf, grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    grad = local(grad).detach().to(leaf.dtype)
    return -grad if leaf.group["maximize"] else grad


def _derivative(built: Built, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a derivative of gradients as one of the signed gradients."""

    def signed(*tangents: Any) -> dict[str, Any]:
        found = function(*tangents)
        return {name: _signed(leaf, found.get(name)) for name, leaf in built.leaves.items()}

    return signed


def _ways(leaves: Mapping[str, Leaf], *, groups: bool) -> dict[Any, set[int]]:
    """Return what sums are taken over: meshes and along which dimensions, and groups; or these."""
    ways: dict[Any, set[int]] = {}
    for leaf in leaves.values():
        part = leaf.part
        if part.over is not None and (part.mesh is None or not groups):
            ways.setdefault(part.over, set()).update(part.axes)
    return ways


def copies(leaves: Mapping[str, Leaf], *, groups: bool = False) -> dict[str, int]:
    """Return how often the sums of `reduction` count the same part of each leaf."""
    ways = _ways(leaves, groups=groups)
    return {
        name: math.prod(
            devices(over, axes - set(leaf.part.axes))
            for over, axes in ways.items()
            if over is not leaf.part.group
        )
        for name, leaf in leaves.items()
    }


def reduction(leaves: Mapping[str, Leaf], *, groups: bool = False) -> Reduce | None:
    """Return what adds sums over the devices that hold parts of the leaves; None for one device.

    Parameters
    ----------
    leaves : mapping of name to Leaf
    groups : bool
        Only over those that hold parts of plain tensors.
    """
    ways = _ways(leaves, groups=groups)
    if not ways:
        return None

    def reduce(arrays: list[Any]) -> list[Any]:
        sizes = [array.numel() for array in arrays]
        total = torch.cat([array.reshape(-1) for array in arrays])
        for over, axes in ways.items():
            total = summed_along(total, over, sorted(axes))
        return [
            piece.reshape(array.shape)
            for piece, array in zip(total.split(sizes), arrays, strict=True)
        ]

    return reduce


def check_parts(built: Built) -> None:
    """Raise ValueError where leaves are distributed in a way that this kind of step cannot take."""
    if built.config.recover:
        for name, leaf in built.leaves.items():
            if leaf.part.over is not None:
                msg = f"`recover` needs whole parameters; of {name!r} this process holds a part."
                raise ValueError(msg)
    if built.plan.curvature == "none":  # a step size for every weight needs no other device
        return
    parts = [leaf.part for leaf in built.leaves.values()]
    if all(part.over is None for part in parts):
        return
    if any(part.group is not None for part in parts) or len({p.mesh for p in parts}) > 1:
        msg = (
            '`curvature` other than "none" needs all parameters to be whole or DTensors of one '
            "mesh; these are not."
        )
        raise ValueError(msg)
    if len({part.axes for part in parts}) > 1:
        msg = (
            '`curvature` other than "none" needs all parameters to be sharded along the same '
            "dimensions of a mesh; these are not."
        )
        raise ValueError(msg)
    for name, view in built.plan.blocks.views.items():
        if view != () and not built.plan.blocks.partition.per_leaf:
            msg = (
                f'`blocks` gives {name!r} several step sizes; with `curvature` other than "none" '
                "a sharded parameter can have one alone."
            )
            raise ValueError(msg)
