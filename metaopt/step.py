"""The parts of a step that look at several leaves; docs/mathematics.md sections 2, 3, 7 and 11."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from metaopt.arrays import Leaves, cast, filled, kind_of, map_leaves, namespace, per_leaf
from metaopt.inputs import check_products
from metaopt.jets import outer
from metaopt.passes import has_average
from metaopt.plan import Plan
from metaopt.rules.move import hat
from metaopt.state import State
from metaopt.step_sizes import StepSizeMap

__all__ = ["Reduce", "awake_leaves"]

#: From sums over the parts of the leaves that a device holds to those over all devices.
Reduce: TypeAlias = Callable[[list[Any]], Sequence[Any]]


def awake_leaves(grads: Mapping[str, Any], lrs: Leaves[Any]) -> Leaves[Any]:
    """Say for each leaf whether it moves: True or False where known, else a boolean array."""
    return per_leaf((name, grads[name] is not None and lr != 0.0) for name, lr in lrs.items())


def blocks_present(plan: Plan, names: Iterable[str], like: Any) -> Any:
    """Say which blocks have one of these leaves, those with gradients; None where all have."""
    present = {plan.blocks.family_of[name] for name in names}
    if len(present) == len(plan.blocks.families):
        return None
    kind = namespace(like).bool
    return plan.blocks.from_names(
        {key: filled(like, (), key in present, kind) for key in plan.blocks.families}
    )


def traces(
    plan: Plan, params: Mapping[str, Any], state: State, names: Iterable[str]
) -> Leaves[Any]:
    """Return the traces of leaves as a step begins, of one with an average the distance to it.

    Taken anew in every step, it has in it whatever was done to the weights since the last one.
    """
    return per_leaf(
        (name, params[name] - state.average[name] if name in plan.averaged else state.trace[name])
        for name in names
    )


def with_trace(plan: Plan, state: State, awake: Leaves[Any]) -> Leaves[Any]:
    """Say for each leaf whether it moves and has a trace: see `metaopt.passes.has_average`."""
    return per_leaf(
        (
            name,
            has_average(state.count[name]) & moves
            if name in plan.averaged and moves is not False
            else moves,
        )
        for name, moves in awake.items()
    )


def goes_on(plan: Plan, state: State, finite: Any, name: str) -> Any:
    """Say where the trace of a leaf does not restart, in a shape that goes with it."""
    keep = plan.layout.columns(finite, name, len(plan.shapes[name]))
    return keep & has_average(state.count[name]) if name in plan.averaged else keep


def product_with_trace(
    plan: Plan,
    traces: Mapping[str, Any],
    awake: Leaves[Any],
    arrays: Mapping[str, Any],
    copies: Mapping[str, int],
) -> Any:
    """Return the leaves' traces times `arrays`, over the leaves that move, values per block.

    Of H and gradients it is the meta-gradient z, of H and derivatives of gradients term A of
    section 3, of Z and gradients term B. None where no leaf moves. A leaf of which several devices
    have copies counts as one share of as many.
    """
    partials = {}
    for name, moves in awake.items():
        if moves is False:
            continue
        array = cast(arrays[name], plan.dtypes[name])
        part = plan.layout.partial(traces[name], array, name, plan.beta_dtype)
        if moves is not True:
            part = namespace(part).where(moves, part, 0.0)
        if copies.get(name, 1) != 1 and not plan.blocks.partition.per_leaf:
            part = part / copies[name]
        partials[name] = part
    return plan.layout.gather(partials) if partials else None


class Hatted(NamedTuple):
    """A leaf's traces, discounted and restarted."""

    trace: Any
    slot_traces: Mapping[str, Any]
    third: Any


def in_dtype(number: Any, dtype: Any) -> Any:
    """Return a hyperparameter that may be an array in `dtype`; a float goes with all."""
    return number if isinstance(number, float) else cast(number, dtype)


def leaf_discount(plan: Plan, name: str, moves: Any, discount: Any) -> Any:
    """Return the discount of a leaf's traces: 1 where it rests."""
    dtype = plan.dtypes[name]
    if moves is True or (isinstance(discount, float) and discount == 1.0):
        return in_dtype(discount, dtype)
    if moves is False:
        return 1.0
    if isinstance(discount, float):
        discount = filled(moves, (), discount, dtype)
    return namespace(moves).where(moves, cast(discount, dtype), filled(moves, (), 1.0, dtype))


def hatted(
    plan: Plan, state: State, awake: Leaves[Any], finite: Any, discount: Any
) -> Leaves[Hatted]:
    """Return all leaves' hatted traces, of which curvature needs the Hessian products."""
    result: Leaves[Hatted] = OrderedDict()
    for name, moves in awake.items():
        keep = plan.layout.columns(finite, name, len(plan.shapes[name]))
        factor = leaf_discount(plan, name, moves, discount)
        trace: Any = state.trace[name]
        slots: Mapping[str, Any] = state.slot_traces.get(name, {})
        third: Any = state.third_trace.get(name)
        if moves is not True:  # its overflow, no part of z, would spread through the Hessian
            carried = partial(carried_on, moves)
            trace, slots = carried(trace), map_leaves(carried, slots)
            third = None if third is None else carried(third)
        if third is not None:  # a pair restarts with either of its columns
            third = hat(hat(third, factor, keep), 1.0, keep[:, None, ...])
        result[name] = Hatted(
            hat(trace, factor, keep),
            {slot: hat(trace, factor, keep) for slot, trace in slots.items()},
            third,
        )
    return result


def carried_on(moves: Any, trace: Any) -> Any:
    """Return a trace with 0 in place of what is not finite, unless its leaf moves."""
    xp = namespace(trace)
    keep = xp.isfinite(trace)
    return xp.where(keep if moves is False else keep | moves, trace, 0.0)


def hatted_beta_trace(
    plan: Plan, state: State, finite: Any, discount: Any
) -> tuple[Leaves[Any], Leaves[Any]]:
    """Return Y discounted towards E, and as it is, both at E in columns whose z is not finite."""
    hats: Leaves[Any] = OrderedDict()
    held: Leaves[Any] = OrderedDict()
    if not plan.beta_feeding:
        return hats, held
    start = plan.layout.start(state.beta)
    zeros = map_leaves(lambda piece: namespace(piece).zeros_like(piece), start)
    keep = plan.layout.beta_columns(finite)

    def restarted(trace: Any, keep: Any, target: Any) -> Any:
        return namespace(trace).where(keep, trace, target)

    def mixed(trace: Any, target: Any) -> Any:
        if isinstance(discount, float) and discount == 1.0:
            return trace
        factor = in_dtype(discount, trace.dtype)
        return factor * trace + (1.0 - factor) * target

    for key, trace in state.beta_trace.items():
        target = start if key == "beta" else zeros
        held[key] = map_leaves(restarted, trace, keep, target)
        hats[key] = map_leaves(mixed, held[key], target)
    return hats, held


def grad_traces(
    plan: Plan,
    hats: Mapping[str, Hatted],
    grads: Mapping[str, Any],
    hvp: Callable[[Any], Mapping[str, Any]] | None,
    hessian_diagonal: Mapping[str, Any] | None,
) -> Leaves[Any]:
    """Return the derivative of each gradient, Hessian times trace; None for leaves without one."""
    if hessian_diagonal is not None and plan.curvature == "diagonal":
        return per_leaf(
            (
                name,
                None
                if grads[name] is None
                else cast(hessian_diagonal[name], plan.dtypes[name]) * hats[name].trace,
            )
            for name in hats
        )
    assert hvp is not None  # `inputs.check_curvature` has seen to it
    tangents = kind_of(grads)((name, hats[name].trace) for name in grads)
    products = hvp(tangents)
    check_products("hvp", products, tangents, grads)
    return per_leaf(
        (name, None if grads[name] is None else cast(products[name], plan.dtypes[name]))
        for name in hats
    )


def grad_seconds(
    plan: Plan,
    awake: Leaves[Any],
    hats: Mapping[str, Hatted],
    grads: Mapping[str, Any],
    hvp: Callable[[Any], Mapping[str, Any]],
    third: Callable[[Any, Any], Mapping[str, Any]],
    discount: Any,
) -> tuple[Leaves[Any], Leaves[Any]]:
    """Return the second-order parts of the weights and of the gradients, section 3, *Z*."""
    m = plan.layout.blocks.size
    kind = kind_of(grads)
    # h' is a function of the h before its discount: the trace of h is discounted twice
    seconds = per_leaf(
        (name, hat(hats[name].third, leaf_discount(plan, name, moves, discount), None))
        for name, moves in awake.items()
    )

    def reshaped(array: Any, *leading: int, name: str) -> Any:
        return namespace(array).reshape(array, (*leading, *plan.shapes[name]))

    tangents = kind((name, hats[name].trace) for name in grads)
    pairs = kind((name, reshaped(seconds[name], m * m, name=name)) for name in grads)
    bent, turned = third(tangents, tangents), hvp(pairs)
    check_products("third", bent, seconds, grads)
    check_products("hvp", turned, pairs, grads)

    def second(name: str) -> Any:
        product = reshaped(cast(turned[name], plan.dtypes[name]), m, m, name=name)
        return cast(bent[name], plan.dtypes[name]) + product

    return seconds, per_leaf((name, None if grads[name] is None else second(name)) for name in hats)


def slopes(sigma: StepSizeMap, beta: Any) -> tuple[Any, Any]:
    """Return the step sizes and their derivative per block, one object where the two are equal."""
    value = map_leaves(sigma.value, beta)
    rate: Any = map_leaves(sigma.first, beta, value)
    if isinstance(beta, Mapping) and all(rate[key] is value[key] for key in value):
        rate = value
    return value, rate


def rates(
    plan: Plan, sigma: StepSizeMap, beta: Any, beta_trace: Mapping[str, Any]
) -> tuple[Any, Any, Any]:
    """Return the step sizes and their first two derivatives, before the multiplier, per block.

    The first is the very object of the step sizes where the two are equal; the second, along all
    pairs of columns, is None where no third trace is kept.
    """
    value, rate = slopes(sigma, beta)
    if plan.curvature == "exact" or beta_trace:
        columns = beta_trace["beta"] if beta_trace else plan.layout.start(beta)
        rate = map_leaves(lambda rate, column: rate * column, rate, columns)
    bend = None
    if plan.third:
        bend = map_leaves(
            lambda piece, value, column: sigma.second(piece, value) * outer(column, column),
            *(beta, value, beta_trace["beta"]),
        )
    return value, rate, bend


def not_finite(plan: Plan, *mappings: Mapping[str, Any]) -> Any:
    """Return in how many of the arrays in the mappings inf or NaN stands; None if there is none."""
    total = None
    for array in (value for mapping in mappings for value in mapping.values()):
        if array is not None:
            xp = namespace(array)
            lost = cast(xp.any(xp.logical_not(xp.isfinite(array))), plan.beta_dtype)
            total = lost if total is None else total + lost
    return total


def reduced(reduce: Reduce | None, plan: Plan, value: Any, lost: Any) -> tuple[Any, Any]:
    """Return a value per block, and a count, summed over the devices that hold parts of leaves.

    Either may be None. At weight level a device has all of what its weights need.
    """
    whole = reduce is None or plan.blocks.partition.per_leaf
    arrays = [array for array in (None if whole else value, lost) if array is not None]
    if reduce is None or not arrays:
        return value, lost
    sums = iter(reduce(arrays))
    value = value if whole or value is None else next(sums)
    return value, lost if lost is None else next(sums)
