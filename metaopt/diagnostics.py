"""What tells how the adaptation is doing."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from metaopt import inputs
from metaopt.arrays import Array, map_leaves, namespace, solid
from metaopt.blocks import Blocks
from metaopt.configuration import Configuration
from metaopt.meta import COLLAPSE, DECIDED, PEAK, RECOVERIES, all_horizons, pinned
from metaopt.plan import Plan
from metaopt.state import State
from metaopt.step import Across, each_horizon, of_number, traces_now

__all__ = ["diagnostics", "named"]


def diagnostics(
    config: Configuration, state: State, params: Mapping[str, Array], across: Across
) -> dict[str, Any]:
    """Return what `MetaOptimize.diagnostics` does."""
    plan = config.plan_of(state)
    inputs.check_copies(across.copies, plan.shapes)
    inputs.check_names("params", params, plan.shapes)
    inputs.check_leaves("params", params, inputs.averages_and_traces(state), plan.shapes)
    found = _of_blocks(config, plan, state, params, across) | {"skipped": state.skipped}
    if plan.learned:
        found["learned"] = {
            name: _of_blocks(config.learned[name], part, of_number(state, name), params, across)
            for name, part in plan.learned.items()
        }
    return found


def _of_blocks(
    config: Configuration, plan: Plan, state: State, params: Mapping[str, Array], across: Across
) -> dict[str, Any]:
    """Return what tells of the step sizes' blocks, or those of a learned number."""
    blocks, xp = plan.blocks, namespace(state.step)

    def squares(traces: Mapping[str, Any]) -> Any:
        found = {
            name: plan.layout.square(trace, name, plan.beta_dtype) for name, trace in traces.items()
        }
        if not blocks.partition.per_leaf:
            found = {name: square / across.copies.get(name, 1) for name, square in found.items()}
        return plan.layout.gather(found)

    norms = each_horizon(plan, squares, traces_now(plan, params, state))
    (norms,), _ = across.sums([plan], [norms], None)
    norms = map_leaves(xp.sqrt, norms)
    rests = map_leaves(lambda z, beta: all_horizons(z == 0.0, beta), state.meta_grad, state.beta)
    sizes = map_leaves(config.sigma_map.value, state.beta)
    collapsed = map_leaves(
        lambda size, peak: (size > 0.0) & (size < COLLAPSE**0.5 * peak),
        *(sizes, state.meta_slots[PEAK]),
    )
    by_block = partial(named, blocks)
    restarts = (
        {name: state.restarts[index] for index, name in enumerate(blocks.views)}
        if blocks.partition.per_leaf
        else blocks.by_name(state.restarts)
    )
    found = {
        "beta": named(blocks, state.beta),
        "meta_grad": each_horizon(plan, by_block, state.meta_grad),
        "trace_norm": each_horizon(plan, by_block, norms),
        "pinned": named(blocks, map_leaves(pinned, state.beta, *config.limits(blocks, state.beta))),
        "collapsed": named(blocks, collapsed),
        "asleep": named(blocks, rests),
        "restarts": {name: solid(array) for name, array in restarts.items()},
    }
    if plan.horizons:
        found["decided"] = each_horizon(plan, by_block, state.meta_slots[DECIDED])
    if config.recover:
        found["recoveries"] = named(blocks, state.meta_slots[RECOVERIES])
    return found


def named(blocks: Blocks, values: Any) -> dict[str, Any]:
    """Return values per block by the names of blocks, as arrays."""
    return {name: solid(array) for name, array in blocks.by_name(values).items()}
