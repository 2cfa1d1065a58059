"""The state at the start of a run."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from metaopt import inputs
from metaopt.arrays import Array, at_hand, cast, full, home, namespace, per_leaf, solid, to_numpy
from metaopt.configuration import Configuration
from metaopt.plan import Plan
from metaopt.state import State

__all__ = ["beta", "state"]


def state(config: Configuration, plan: Plan, params: Mapping[str, Array]) -> State:
    """Return the state of a run that has made no step."""
    like = next(iter(params.values()))
    parts = _begun(config, plan, params, like)
    parts["learned"] = per_leaf(
        (name, per_leaf(_begun(config.learned[name], number, params, like).items()))
        for name, number in plan.learned.items()
    )
    return State(**parts)


def _begun(
    config: Configuration, plan: Plan, params: Mapping[str, Array], like: Any
) -> dict[str, Any]:
    """Return the parts of a state, or of the state of a learned number, at the start."""
    specs = {name: spec for name, spec in plan.state.items() if name != "learned"}
    parts = {name: _zeros(spec, like, params) for name, spec in specs.items()}
    parts["beta"] = beta(config, plan, params)
    if plan.beta_feeding:
        parts["beta_trace"]["beta"] = plan.layout.start(parts["beta"])
    return parts


def beta(config: Configuration, plan: Plan, params: Mapping[str, Array]) -> Any:
    """Return the meta-parameters of the initial step sizes, values per block."""
    blocks, xp = plan.blocks, namespace(next(iter(params.values())))
    keys = blocks.families
    sizes = config.step_size
    if isinstance(sizes, Mapping):
        inputs.check_names("step_size", sizes, keys, "block")
    values = {}
    for key, family in keys.items():
        size = sizes[key] if isinstance(sizes, Mapping) else sizes
        known = at_hand(size)
        size = to_numpy(size).astype(np.float64) if known else cast(size, plan.beta_dtype)
        shape = plan.shapes[key] if blocks.partition.per_leaf else (family.size,)
        if size.shape not in ((), shape):
            msg = f"`step_size[{key!r}]` has shape {size.shape}; expected () or {shape}."
            raise ValueError(msg)
        like = params[key] if blocks.partition.per_leaf else next(iter(params.values()))
        zeros = (
            xp.zeros_like(like, dtype=plan.beta_dtype)
            if blocks.partition.per_leaf
            else full(like, shape, 0.0, plan.beta_dtype)
        )
        start: Any = config.sigma_map.inverse(size)
        if known:  # a number is sent nowhere, an array to the device
            start = float(start) if start.ndim == 0 else start
        if not isinstance(start, float):
            start = xp.asarray(start, dtype=plan.beta_dtype, device=home(like))
        values[key] = solid(zeros + start)
    return blocks.from_names(values)


def _zeros(spec: Any, like: Any, params: Mapping[str, Any], leaf: Any = None) -> Any:
    """Return zeros as specified, beside `like`; what a key says is a leaf's lies like the leaf."""
    if isinstance(spec, Mapping):
        return per_leaf(
            (key, _zeros(part, like, params, params.get(key) if leaf is None else leaf))
            for key, part in spec.items()
        )
    if leaf is None:
        return full(like, spec.shape, 0, spec.dtype)
    columns = spec.shape[: len(spec.shape) - leaf.ndim]
    if columns + tuple(leaf.shape) != spec.shape:  # a count, or a slot of a shape of its own
        return full(leaf, spec.shape, 0, spec.dtype)
    zeros = cast(namespace(leaf).zeros_like(leaf), spec.dtype)  # keeps order and sharding
    if columns == ():
        return zeros
    return zeros + full(leaf, columns + (1,) * leaf.ndim, 0, spec.dtype)
