"""The state of a run as optax carries it: pytrees like the parameters."""

from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import metaopt as mo
from metaopt.arrays import map_leaves, per_leaf
from metaopt.configuration import Configuration
from metaopt.meta import COMPENSATION, DECIDED, PEAK
from metaopt.plan import OF_NUMBER, Plan
from metaopt.step import sizes_of
from metaopt_jax.leaves import Structure
from metaopt_jax.sharded import on_each, spelled_out

__all__ = ["MetaOptimizeState", "each_horizon", "from_core", "learned_from_core"]
__all__ += ["like_params", "to_core", "without_leaves"]


#: Of a learned number, what is a value per block, and what a mapping to these.
OWN, KEYED = ("beta", "meta_count", "meta_grad"), ("meta_slots", "beta_trace")


class MetaOptimizeState(NamedTuple):
    """What MetaOptimize carries from update to update: arrays and nothing else.

    A `metaopt.State` (docs/mathematics.md section 3) whose values by leaf are pytrees like the
    parameters, in the compute dtype: the wider of the parameter's and float32. Values per block
    ("blocks" below) are one vector, in the order of `step_sizes`; with `blocks="weight"` a pytree
    like the parameters. Of several discounts each has traces, a last meta-gradient and moments of
    the meta update of its own: in place of a pytree like the parameters is then a tuple of them,
    one for each discount, and vectors have a leading axis.

    Parameters
    ----------
    count : array, shape (), int32
        Updates made; what a schedule is given.
    learned_step_sizes : blocks
        Step sizes sigma(beta) after the last update, before the multiplier `lr`.
    beta : blocks
        Meta-parameters; the next step is taken with these.
    trace_or_average : pytree like the parameters
        How they depend on past meta-parameters; with curvature "exact" each with a leading axis,
        one column per block. Where that is the distance to an average of the parameters, as for
        float32 ones it is by default, this average (docs/mathematics.md section 10).
    slots : mapping of slot to pytree like the parameters
        Moments of the base update; `optax.MaskedNode()` for leaves whose rule has no such slot.
    meta_grad : blocks
        The last meta-gradient.
    meta_slots : mapping of slot to blocks
        Moments of the meta update, and what else it keeps of a block: see `metaopt.State`.
    leaf_counts : array, int32, one per leaf
        Updates in which the leaf had a gradient.
    meta_counts : blocks, int32
        Meta updates made since the trace started.
    restarts : array, int32
        Meta-gradients that were not finite, one per block; with "weight" one per leaf.
    skipped : array, shape (), int32
        Updates left out by `skip_nonfinite`.
    slot_traces : mapping of slot to pytree like the traces
    beta_trace : blocks, with a leading axis where there is one column per block; or empty
    meta_slot_traces : mapping of slot to blocks like `beta_trace`
    third_trace : pytree like the traces with one leading axis more, or empty
        As in `metaopt.State`, whose `beta_trace` is both of these; empty where nothing feeds back.
    learned : mapping of name to mapping of field to its value
        As in `metaopt.State`, of numbers of rules that are learned; in pytrees like the parameters
        `optax.MaskedNode()` for leaves of other rules.
    """

    count: Any
    learned_step_sizes: Any
    beta: Any
    trace_or_average: Any
    slots: Any
    meta_grad: Any
    meta_slots: Any
    leaf_counts: Any
    meta_counts: Any
    restarts: Any
    skipped: Any
    slot_traces: Any
    beta_trace: Any
    meta_slot_traces: Any
    third_trace: Any
    learned: Any


def each_horizon(
    opt: mo.MetaOptimize, function: Callable[[Any], Any], leaves: Mapping[str, Any]
) -> Any:
    """Return a function of values by leaf; of several discounts a tuple, of the values of each."""
    if not opt.horizons:
        return function(leaves)
    return tuple(
        function(map_leaves(lambda array, k=k: array[k, ...], leaves)) for k in range(*opt.horizons)
    )


def like_params(state: MetaOptimizeState, opt: mo.MetaOptimize) -> Any:
    """Return a pytree like the parameters: the traces of the shortest horizon."""
    return state.trace_or_average[0] if opt.horizons else state.trace_or_average


def _own_slots(opt: mo.MetaOptimize) -> tuple[str, ...]:
    """Return the slots of the meta update of which each of several discounts has its own."""
    return (*opt.meta.slots, DECIDED) if opt.horizons else ()


def from_core(
    state: mo.State, opt: mo.MetaOptimize, structure: Structure, plan: Plan
) -> MetaOptimizeState:
    """Return the core's state as pytrees.

    Slots of other shapes than their leaves' every device has whole.
    """

    def blocks(values: Any) -> Any:
        return structure.pytree(values) if isinstance(values, Mapping) else on_each(values)

    def own_blocks(values: Any) -> Any:
        if not isinstance(values, Mapping):
            return on_each(values)
        return each_horizon(opt, structure.pytree, values)

    own, shapes = _own_slots(opt), plan.shapes
    meta_slot_traces = dict(state.beta_trace)
    beta_trace = meta_slot_traces.pop("beta", None)

    def by_slot(values: Mapping[str, Any]) -> Any:
        return structure.by_key(
            values, dict.fromkeys(key for some in values.values() for key in some)
        )

    new = MetaOptimizeState(
        count=state.step,
        # a copy where it is beta itself: no two arrays of a state may share memory to be donated
        learned_step_sizes=jax.tree.map(
            lambda size, beta: jnp.copy(size) if size is beta else size,
            blocks(sizes_of(opt.sigma_map, state.beta).value),
            blocks(state.beta),
        ),
        beta=blocks(state.beta),
        trace_or_average=each_horizon(opt, structure.pytree, {**state.trace, **state.average}),
        slots=by_slot(
            {
                name: {
                    slot: value if value.shape == shapes[name] else on_each(value)
                    for slot, value in slots.items()
                }
                for name, slots in state.slots.items()
            }
        ),
        meta_grad=own_blocks(state.meta_grad),
        meta_slots={
            slot: own_blocks(values) if slot in own else blocks(values)
            for slot, values in state.meta_slots.items()
        },
        leaf_counts=jnp.stack(list(state.count.values())),
        meta_counts=blocks(state.meta_count),
        restarts=on_each(state.restarts),
        skipped=state.skipped,
        slot_traces=each_horizon(opt, by_slot, state.slot_traces),
        beta_trace={} if beta_trace is None else blocks(beta_trace),
        meta_slot_traces={slot: blocks(values) for slot, values in meta_slot_traces.items()},
        third_trace=structure.pytree(state.third_trace) if state.third_trace else {},
        learned=learned_from_core(state, structure),
    )
    return spelled_out(new)


def learned_from_core(state: mo.State, structure: Structure) -> dict[str, Any]:
    """Return the core's state of the numbers that are learned as pytrees."""
    return {name: _number_from_core(part, structure) for name, part in state.learned.items()}


def _number_from_core(part: Mapping[str, Any], structure: Structure) -> dict[str, Any]:

    def blocks(values: Any) -> Any:
        return structure.some(values) if isinstance(values, Mapping) else on_each(values)

    slots = dict.fromkeys(key for some in part["slot_traces"].values() for key in some)
    return {
        **{field: blocks(part[field]) for field in OWN},
        **{field: {key: blocks(value) for key, value in part[field].items()} for field in KEYED},
        "restarts": on_each(part["restarts"]),
        "trace": structure.some(part["trace"]),
        "slot_traces": structure.by_key(part["slot_traces"], slots),
    }


def _number_to_core(part: Mapping[str, Any], config: Configuration, structure: Structure) -> Any:
    """Return the state of a learned number as the core takes it."""
    per_weight = mo.blocks.partition(config.blocks).per_leaf

    def blocks(values: Any) -> Any:
        return structure.those_of(values) if per_weight else values

    traces = structure.by_leaf(part["slot_traces"])
    found = {
        **{field: blocks(part[field]) for field in OWN},
        **{
            field: per_leaf((key, blocks(value)) for key, value in part[field].items())
            for field in KEYED
        },
        "restarts": part["restarts"],
        "trace": structure.those_of(part["trace"]),
        "slot_traces": per_leaf((name, slots) for name, slots in traces.items() if slots),
        "third_trace": per_leaf(()),
    }
    return per_leaf((field, found[field]) for field in OF_NUMBER)


def to_core(
    state: MetaOptimizeState,
    opt: mo.MetaOptimize,
    structure: Structure,
    averaged: Container[str] = (),
) -> mo.State:
    """Return the state as the core takes it: the inverse of `from_core`.

    `averaged` are the leaves that keep averages, see `metaopt.plan.Plan`.
    """
    per_weight, own = mo.blocks.partition(opt.blocks).per_leaf, _own_slots(opt)

    def leaves(tree: Any) -> Any:
        return structure.leaves(tree, "state")

    def of_each(function: Callable[[Any], Any], trees: Any) -> Any:
        if not opt.horizons:
            return function(trees)
        return map_leaves(lambda *arrays: jnp.stack(arrays), *map(function, trees))

    def blocks(values: Any) -> Any:
        return leaves(values) if per_weight else values

    def own_blocks(values: Any) -> Any:
        return of_each(leaves, values) if per_weight else values

    kept = of_each(leaves, state.trace_or_average)
    return mo.State(
        step=state.count,
        count=per_leaf((name, state.leaf_counts[i]) for i, name in enumerate(structure.names)),
        meta_count=blocks(state.meta_counts),
        beta=blocks(state.beta),
        meta_slots=per_leaf(
            (slot, own_blocks(values) if slot in own else blocks(values))
            for slot, values in state.meta_slots.items()
        ),
        slots=structure.by_leaf(state.slots),
        trace=per_leaf((name, kept[name]) for name in kept if name not in averaged),
        average=per_leaf((name, kept[name]) for name in kept if name in averaged),
        slot_traces=per_leaf(
            (name, traces)
            for name, traces in of_each(structure.by_leaf, state.slot_traces).items()
            if traces
        ),
        beta_trace=per_leaf(
            (key, blocks(values))
            for key, values in [("beta", state.beta_trace), *state.meta_slot_traces.items()]
            if jax.tree.leaves(values)
        ),
        third_trace=leaves(state.third_trace)
        if jax.tree.leaves(state.third_trace)
        else per_leaf(()),
        meta_grad=own_blocks(state.meta_grad),
        restarts=state.restarts,
        skipped=state.skipped,
        learned=per_leaf(
            (name, _number_to_core(state.learned[name], config, structure))
            for name, config in opt.learned.items()
        ),
    )


def without_leaves(opt: mo.MetaOptimize, structure: Structure) -> MetaOptimizeState:
    """Return the state of parameters without a leaf: a group of `optax.partition` that is empty.

    `optax.tree.map_params` makes one, too, to see where a state has pytrees like the parameters.
    """
    nothing = structure.pytree({})
    rules = opt.base.values() if isinstance(opt.base, Mapping) else [opt.base]
    per_weight = mo.blocks.partition(opt.blocks).per_leaf

    def number() -> Any:  # in place of none: orbax saves no arrays without an entry
        return jnp.zeros((), jnp.int32)

    def blocks() -> Any:
        return nothing if per_weight else jnp.zeros(())

    def own(part: Any) -> Any:
        return (part,) * opt.horizons[0] if opt.horizons else part

    def own_blocks() -> Any:
        return own(nothing) if per_weight else blocks()

    return MetaOptimizeState(
        count=number(),
        learned_step_sizes=blocks(),
        beta=blocks(),
        trace_or_average=own(nothing),
        slots={slot: nothing for rule in rules for slot in rule.slots},
        meta_grad=own_blocks(),
        meta_slots={slot: own_blocks() for slot in _own_slots(opt) or opt.meta.slots}
        | {slot: blocks() for slot in (COMPENSATION, PEAK)},
        leaf_counts=number(),
        meta_counts=blocks(),
        restarts=number(),
        skipped=number(),
        slot_traces=number(),
        beta_trace=number(),
        meta_slot_traces=number(),
        third_trace=number(),
        learned=number(),
    )
