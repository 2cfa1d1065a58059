"""What tells how the adaptation is doing."""

import operator
from collections.abc import Mapping
from typing import Any

from metaopt import inputs
from metaopt.arrays import Array, map_leaves, namespace, solid
from metaopt.blocks import Blocks
from metaopt.configuration import Configuration
from metaopt.meta import COLLAPSE, PEAK, RECOVERIES, pinned
from metaopt.state import State
from metaopt.step import Across, traces_now

__all__ = ["diagnostics", "named"]


def diagnostics(
    config: Configuration, state: State, params: Mapping[str, Array], across: Across
) -> dict[str, Any]:
    """Return what `MetaOptimize.diagnostics` does."""
    plan, xp = config.plan_of(state), namespace(state.step)
    inputs.check_copies(across.copies, plan.shapes)
    inputs.check_names("params", params, plan.shapes)
    inputs.check_leaves("params", params, inputs.averages_and_traces(state), plan.shapes)
    blocks = plan.blocks
    squares = {
        name: plan.layout.square(trace, name, plan.beta_dtype)
        for name, trace in traces_now(plan, params, state).items()
    }
    if not blocks.partition.per_leaf:
        squares = {name: square / across.copies.get(name, 1) for name, square in squares.items()}
    total, _ = across.sums(plan, plan.layout.gather(squares), None)
    norms = map_leaves(xp.sqrt, total)
    zeros = map_leaves(xp.zeros_like, state.meta_grad)
    sizes = map_leaves(config.sigma_map.value, state.beta)
    collapsed = map_leaves(
        lambda size, peak: (size > 0.0) & (size < COLLAPSE**0.5 * peak),
        *(sizes, state.meta_slots[PEAK]),
    )
    restarts = (
        {name: state.restarts[index] for index, name in enumerate(blocks.views)}
        if blocks.partition.per_leaf
        else blocks.by_name(state.restarts)
    )
    found = {
        "beta": named(blocks, state.beta),
        "meta_grad": named(blocks, state.meta_grad),
        "trace_norm": named(blocks, norms),
        "pinned": named(blocks, _pinned(config, blocks, state.beta)),
        "collapsed": named(blocks, collapsed),
        "asleep": named(blocks, map_leaves(operator.eq, state.meta_grad, zeros)),
        "restarts": {name: solid(array) for name, array in restarts.items()},
        "skipped": state.skipped,
    }
    if config.recover:
        found["recoveries"] = named(blocks, state.meta_slots[RECOVERIES])
    return found


def named(blocks: Blocks, values: Any) -> dict[str, Any]:
    """Return values per block by the names of blocks, as arrays."""
    return {name: solid(array) for name, array in blocks.by_name(values).items()}


def _pinned(config: Configuration, blocks: Blocks, beta: Any) -> Any:
    """Say which blocks are at a bound."""
    lo, hi = config.limits(blocks, beta)
    if not isinstance(beta, Mapping):
        return pinned(beta, lo, hi)
    return {
        name: pinned(piece, *(end[name] if isinstance(end, Mapping) else end for end in (lo, hi)))
        for name, piece in beta.items()
    }
