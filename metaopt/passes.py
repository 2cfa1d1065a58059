"""The passes that a step is made of, for adapters to call or to compile on their own.

A step is `leaf_product` per leaf, summed to the meta-gradient by `Blocks.partial` per leaf and
`Blocks.gather` (`Blocks.reduce` is both in one call); `leaf_pass` per leaf; and `meta_pass`. The
meta-gradient is known before a trace is written, as a restart, the Hessian-vector products and
`meta_first` all need it. Where it is needed for restarts alone, `fused_pass` does both passes over
a leaf in one, and a trace restarts one step later; `one_pass` is that with all that it needs of
the state.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from metaopt.arrays import Array, cast, namespace
from metaopt.blocks import Blocks
from metaopt.jets import Jet
from metaopt.numerics import exact_sum
from metaopt.rules.move import averaged, chosen, hat, move, move_second
from metaopt.rules.rule import Rule, direction_of
from metaopt.step_sizes import StepSizeMap

__all__ = [
    "COMPENSATION",
    "PEAK",
    "RECOVERIES",
    "SCALE",
    "Leaf",
    "LeafStep",
    "MetaStep",
    "begun",
    "carried",
    "fused_pass",
    "has_average",
    "leaf_pass",
    "leaf_product",
    "meta_pass",
    "one_pass",
    "pinned",
    "usable",
]

#: What rounding has taken from beta: without it a meta update below half the distance to the next
#: number would never move it.
COMPENSATION = "compensation"
#: The largest step size since the trace started.
PEAK = "peak"
#: With `recover`, the largest meta-gradient of late; and how often the block has recovered.
SCALE, RECOVERIES = "scale", "recoveries"
#: What a recovery divides the step size by, and how much of the scale is left after a step.
RECOVERY, FORGET = 3.0, 0.999
#: A step size below this share of its peak has collapsed (section 11).
COLLAPSE = 1e-2


class Leaf(NamedTuple):
    """One leaf at the start of a step.

    Parameters
    ----------
    param, grad : arrays of one shape, any floating dtype
    slots : mapping of slot to array, compute dtype
        Like `param`, or of the shapes that the rule gives them.
    count : array, shape (), int32
        Steps made before this one.
    trace : array like `param`, compute dtype, or None
        It may have a leading axis of columns. None where the leaf keeps an average in its place.
    average : array like `param`, in the dtype of both, optional
        Average of the weights, of which the trace is their distance (section 10).
    slot_traces : mapping of slot to array like `trace`, default empty
        Of the slots whose traces are kept.
    third_trace : array with two leading axes of columns, optional
        Second-order part of `param`, where the approximation is full.
    """

    param: Any
    grad: Any
    slots: Mapping[str, Any]
    count: Any
    trace: Any
    average: Any = None
    slot_traces: Mapping[str, Any] = {}
    third_trace: Any = None

    @property
    def dtype(self) -> Any:
        """The compute dtype."""
        return (self.trace if self.average is None else self.average).dtype


class LeafStep(NamedTuple):
    """What `leaf_pass` returns: w' = w - delta, and the leaf's next state.

    Parameters
    ----------
    delta : array like the leaf, compute dtype
    slots, trace, average, slot_traces, third_trace
        As in `Leaf`.
    """

    delta: Any
    slots: dict[str, Any]
    trace: Any
    average: Any
    slot_traces: dict[str, Any]
    third_trace: Any


class MetaStep(NamedTuple):
    """What `meta_pass` returns: the next state of the meta update.

    Parameters
    ----------
    beta, meta_slots, meta_count, restarts, beta_trace
        As in `State`.
    """

    beta: Any
    meta_slots: Any
    meta_count: Any
    restarts: Any
    beta_trace: Any


def leaf_product(trace: Any, grad: Any) -> Any:
    """Return h * g elementwise; its sum over a block is the block's meta-gradient (section 2).

    Parameters
    ----------
    trace : array like the leaf, compute dtype
        That from before the step.
    grad : array like the leaf, compute dtype
    """
    return trace * grad


def usable(z: Any) -> Any:
    """Say where a meta-gradient is finite, and its square as well (section 11).

    Parameters
    ----------
    z : array, values per block
    """
    xp = namespace(z)
    return xp.abs(z) < (2.0**511 if z.dtype == xp.float64 else 2.0**63)


def begun(z: Any, meta_count: Any) -> Any:
    """Return meta-gradients as they count: 0 where a trace starts in this step (section 11).

    Parameters
    ----------
    z : array, values per block
    meta_count : array like `z`
    """
    return namespace(z).where(meta_count > 0, z, 0.0)


def carried(z: Any, meta_count: Any) -> Any:
    """Say whose traces go on: the others start anew in this step (section 11).

    Parameters
    ----------
    z : array, values per block
    meta_count : array like `z`
    """
    return usable(z) & (meta_count > 0)


def fused_pass(
    rule: Rule,
    leaf: Leaf,
    lr: Any,
    lr_trace: Any,
    *,
    keep: Any,
    discount: Any = 1.0,
    inject: str = "update",
) -> tuple[Any, LeafStep]:
    """Return what `leaf_product` and `leaf_pass` return, in one pass over the leaf; section 11.

    Without curvature alone. The meta-gradient is not known when the trace is written; so a trace
    restarts in the step after, from 0 (an adapter's own state knows the last meta-gradient).

    Parameters
    ----------
    rule, leaf, lr, lr_trace
        As in `leaf_pass`.
    keep : boolean array broadcastable to the leaf, or None for everywhere
        Where the meta-gradient of the step before was `usable`.
    discount, inject
        As in `leaf_pass`.
    """
    if leaf.average is None:
        leaf = leaf._replace(trace=hat(leaf.trace, 1.0, keep))
    else:
        keep = has_average(leaf.count) if keep is None else keep & has_average(leaf.count)
        average = chosen(keep, leaf.average, leaf.param)
        leaf = leaf._replace(trace=leaf.param - average, average=average)
    product = leaf_product(leaf.trace, cast(leaf.grad, leaf.dtype))
    return product, leaf_pass(rule, leaf, lr, lr_trace, discount=discount, inject=inject)


def has_average(count: Any) -> Any:
    """Say whether the average of a leaf holds: from its first step on.

    Until then its trace is 0, whatever is done to the weights: most are loaded in that time.

    Parameters
    ----------
    count : array, shape (), int32
        Steps that the leaf has made.
    """
    return count > 0


def one_pass(
    rule: Rule,
    leaf: Leaf,
    value: Any,
    rate: Any,
    *,
    lr: Any,
    meta_grad: Any,
    discount: Any,
    inject: str = "update",
) -> tuple[Any, Any, LeafStep]:
    """Return a leaf's next parameter, its product and its next state from the present state alone.

    The whole of a leaf's step without curvature, sections 7, 10 and 11, for a kernel that is
    generated from it (`metaopt.tracer`) or compiled. With `meta_pass` it makes a step.

    Parameters
    ----------
    rule, leaf
        As in `leaf_pass`.
    value, rate : arrays broadcastable to the leaf, floating
        The leaf's learned step sizes and their derivatives, before the multiplier.
    lr : array, shape (), compute dtype
        The multiplier; where it is 0 the leaf rests, and its product is 0.
    meta_grad : array broadcastable to the leaf
        The meta-gradient of the step before.
    discount : array, shape (), compute dtype
        Discount of the trace.
    inject
        As in `leaf_pass`.

    Returns
    -------
    param : array of the leaf's dtype
    product : array, compute dtype
    step : LeafStep
    """
    dtype, xp = leaf.dtype, namespace(lr)
    awake = lr != 0.0
    product, step = fused_pass(
        rule,
        leaf,
        lr * cast(value, dtype),
        lr * cast(rate, dtype),
        keep=usable(meta_grad),
        discount=xp.where(awake, discount, xp.ones_like(discount)),
        inject=inject,
    )
    param = cast(cast(leaf.param, dtype) - step.delta, leaf.param.dtype)
    return param, namespace(product).where(awake, product, 0.0), step


def leaf_pass(
    rule: Rule,
    leaf: Leaf,
    lr: Any,
    lr_trace: Any,
    *,
    grad_trace: Any = None,
    discount: Any = 1.0,
    keep: Any = None,
    inject: str = "update",
    rectified: Any = None,
    grad_second: Any = None,
    lr_second: Any = None,
) -> LeafStep:
    r"""Return a leaf's step and its next slots and traces; elementwise where the rule is.

    docs/mathematics.md sections 3 and 10. Without curvature (`grad_trace` None, no `slot_traces`)
    the rule sees plain arrays; else jets, and the same formula yields the tangents.

    Parameters
    ----------
    rule : Rule
    leaf : Leaf
    lr : array broadcastable to the leaf, compute dtype
        Step size taken, :math:`\alpha`.
    lr_trace : array broadcastable to the trace, compute dtype
        Its derivative; pass `lr` itself where the two are equal, and they share a product. Where
        the leaf keeps an average they are, and it is not looked at.
    grad_trace : array like the trace, optional
        Derivative of the gradient: Hessian times the discounted trace. Where it is given, the
        leaf's traces are discounted and restarted already (`metaopt.rules.move.hat`).
    discount : float or array, shape (), default 1.0
        Discount of the trace.
    keep : boolean array broadcastable to the trace, optional
        Where False, the trace restarts (section 11).
    inject : {"update", "gradient"}, default "update"
        What a change of the step size multiplies, section 10.
    rectified : array like the leaf, optional
        Diagonal of the Hessian, capped as in IDBD (section 12); for SGD without momentum.
    grad_second, lr_second : arrays like the third trace, optional
        Second-order parts of the gradient and of `lr`; needed where the leaf has a third trace.

    Returns
    -------
    LeafStep
        In the compute dtype.
    """
    dtype = leaf.dtype
    param, grad, count = (
        cast(leaf.param, dtype),
        cast(leaf.grad, dtype),
        cast(leaf.count + 1, dtype),
    )
    direction_trace = direction_second = followed = retain = third_trace = None
    slot_traces: dict[str, Any] = {}
    if grad_trace is None and not leaf.slot_traces:
        direction, slots = direction_of(rule, grad, leaf.slots, count, param)
    else:
        order = 1 if leaf.third_trace is None else 2
        jets = {
            slot: Jet(value, leaf.slot_traces.get(slot), order=order)
            for slot, value in leaf.slots.items()
        }
        jet, moved = direction_of(
            rule,
            Jet(grad, grad_trace, grad_second, order),
            jets,
            Jet(count, order=order),
            Jet(param, leaf.trace, leaf.third_trace, order),
        )
        direction, direction_trace, direction_second = jet.value, jet.first, jet.second
        slots = {slot: moved[slot].value for slot in leaf.slots}
        slot_traces = {slot: moved[slot].first for slot in leaf.slot_traces}
    if inject == "gradient":
        plain = rule.without_momentum()
        kept = {slot: leaf.slots[slot] for slot in plain.slots}
        followed, _ = direction_of(plain, grad, kept, count, param)
    if rectified is not None:
        retain = namespace(param).clip(1.0 - lr * (rule.weight_decay + rectified), min=0.0)
    if leaf.average is not None:
        delta = move(param, direction, lr, rule.weight_decay).delta
        trace = param - leaf.average if leaf.trace is None else leaf.trace
        average = averaged(leaf.average, trace, lr, rule.weight_decay, discount)
        return LeafStep(delta, slots, None, chosen(keep, average, param), {}, None)
    moved_param = move(
        param,
        direction,
        lr,
        rule.weight_decay,
        trace=leaf.trace,
        direction_trace=direction_trace,
        lr_trace=lr_trace,
        followed=followed,
        retain=retain,
        discount=discount,
        keep=keep,
    )
    if leaf.third_trace is not None:
        third_trace = move_second(
            param,
            direction,
            lr,
            rule.weight_decay,
            trace=leaf.trace,
            direction_trace=direction_trace,
            lr_trace=lr_trace,
            third_trace=leaf.third_trace,
            direction_second=direction_second,
            lr_second=lr_second,
        )
    return LeafStep(moved_param.delta, slots, moved_param.trace, None, slot_traces, third_trace)


def meta_pass(
    rule: Rule,
    blocks: Blocks,
    sigma: StepSizeMap,
    z: Any,
    beta: Any,
    meta_slots: Mapping[str, Any],
    meta_count: Any,
    restarts: Array,
    *,
    meta_lr: Any,
    bounds: tuple[Any, Any],
    present: Any = None,
    beta_trace: Mapping[str, Any],
    held_trace: Mapping[str, Any],
    z_trace: Any = None,
    reduce: Callable[[list[Any]], Sequence[Any]] | None = None,
    copies: Mapping[str, int] | None = None,
) -> MetaStep:
    """Return the next meta-parameters, meta state, counts and their traces.

    docs/mathematics.md sections 3, 6, 7, 8 and 11. "Blocks" are values per block as in `State`.

    Parameters
    ----------
    rule : Rule
        The meta update.
    blocks : Blocks
    sigma : StepSizeMap
    z : blocks
        Meta-gradient, 0 for blocks that rest: see `begun`.
    beta, meta_slots, meta_count, restarts
        As in `State`.
    meta_lr : float, or array of shape () in the dtype of beta
    bounds : pair of float or blocks
        Bounds on beta, not on the step sizes.
    present : blocks, bool, optional
        Which blocks have a leaf with a gradient. A trace can start in those alone, so the others
        wait for it. None for all.
    beta_trace : mapping
        Y as in `State`, discounted and restarted; empty where Y stays E.
    held_trace : mapping
        Y restarted but not discounted: what the rows of blocks that stay are left at.
    z_trace : blocks, with a leading axis of columns where dense, optional
        Terms A and B of section 3.
    reduce, copies : optional
        As `MetaOptimize.step` takes them. At weight level a device has a part of each leaf's
        blocks, and what is counted by leaf is added up.
    """
    pieces = {
        key: _meta_piece(
            rule,
            sigma,
            pick(z),
            pick(beta),
            {slot: pick(values) for slot, values in meta_slots.items()},
            pick(meta_count),
            meta_lr,
            tuple(pick(bound) if isinstance(bound, Mapping) else bound for bound in bounds),
            pick(present),
            {slot: pick(values) for slot, values in beta_trace.items()},
            {slot: pick(values) for slot, values in held_trace.items()},
            pick(z_trace),
        )
        for key, pick in _pieces(beta)
    }

    def blocks_of(take: Callable[[_Piece], Any]) -> Any:
        return (
            OrderedDict((key, take(piece)) for key, piece in pieces.items())
            if isinstance(beta, Mapping)
            else take(pieces[None])
        )

    lost = blocks.total(blocks_of(lambda piece: piece.restarts))
    if isinstance(beta, Mapping) and reduce is not None:
        (lost,) = reduce([lost])
        if copies:
            xp = namespace(lost)
            lost = xp.stack([lost[i] // copies.get(name, 1) for i, name in enumerate(blocks.views)])
    return MetaStep(
        blocks_of(lambda piece: piece.beta),
        OrderedDict(
            (slot, blocks_of(lambda piece, slot=slot: piece.slots[slot]))  # type: ignore[misc]
            for slot in meta_slots
        ),
        blocks_of(lambda piece: piece.count),
        restarts + cast(lost, restarts.dtype),
        OrderedDict(
            (slot, blocks_of(lambda piece, slot=slot: piece.traces[slot]))  # type: ignore[misc]
            for slot in beta_trace
        ),
    )


class _Piece(NamedTuple):
    beta: Any
    slots: dict[str, Any]
    count: Any
    restarts: Any
    traces: dict[str, Any]


def _meta_piece(
    rule: Rule,
    sigma: StepSizeMap,
    z: Any,
    beta: Array,
    slots: dict[str, Any],
    count: Any,
    meta_lr: Any,
    bounds: tuple[Any, ...],
    present: Any,
    traces: dict[str, Any],
    held: dict[str, Any],
    z_trace: Any,
) -> _Piece:
    """Return the meta update of one array of blocks; what does not move stays as it was."""
    xp = namespace(beta)
    starts = count == 0
    finite = usable(z)
    moves = finite & (z != 0.0)
    z = xp.where(moves, z, 0.0)
    steps = cast(count + 1, beta.dtype)
    given = {slot: slots[slot] for slot in rule.slots}
    if traces:
        jets = {slot: Jet(value, traces.get(slot)) for slot, value in given.items()}
        direction, jets = direction_of(rule, Jet(z, z_trace), jets, Jet(steps))
        new = {slot: jets[slot].value for slot in given}
        moved = move(
            beta,
            direction.value,
            meta_lr,
            rule.weight_decay,
            trace=traces["beta"],
            direction_trace=direction.first,
        )
        new_traces = {slot: moved.trace if slot == "beta" else jets[slot].first for slot in traces}
    else:
        unit, new = direction_of(rule, z, given, steps)
        moved = move(beta, unit, meta_lr, rule.weight_decay)
        new_traces = {}
    exact, lost = exact_sum(beta, slots[COMPENSATION] - moved.delta)
    lo, hi = bounds
    new_beta = xp.where(exact < lo, lo, xp.where(exact > hi, hi, exact))
    meets = pinned(new_beta, *bounds) & xp.logical_not(pinned(beta, *bounds))
    size: Any = sigma.value(new_beta)
    peak: Any = xp.maximum(slots[PEAK], size)
    # the trace is of moves far longer than those of now, or the step size has met a bound
    collapsed = (size > 0.0) & (size < COLLAPSE * peak)
    restart = moves & (meets | collapsed)
    started = starts if present is None else starts & present
    new |= {COMPENSATION: xp.where(new_beta == exact, lost, 0.0), PEAK: peak}
    if SCALE in slots:
        new[SCALE] = xp.maximum(xp.abs(z), FORGET * slots[SCALE])
        new[RECOVERIES] = slots[RECOVERIES]
    new = {slot: xp.where(moves, new[slot], slots[slot]) for slot in slots}
    new_traces = {slot: xp.where(moves, new_traces[slot], held[slot]) for slot in traces}
    lasting = (COMPENSATION, RECOVERIES, *getattr(rule, "lasting", ()))
    piece = _Piece(
        xp.where(moves, new_beta, beta),
        {slot: new[slot] if slot in lasting else xp.where(restart, 0.0, new[slot]) for slot in new},
        xp.where(restart, xp.zeros_like(count), count + cast(moves | started, count.dtype)),
        restart | xp.logical_not(finite),
        {
            slot: new_traces[slot]
            if slot in ("beta", *lasting)
            else xp.where(restart, 0.0, new_traces[slot])
            for slot in traces
        },
    )
    return _recovered(piece, finite, lo, lasting) if SCALE in slots else piece


def _recovered(piece: _Piece, finite: Any, lo: Any, lasting: tuple[str, ...]) -> _Piece:
    """Return blocks of which those without a usable meta-gradient start anew, with less."""
    xp = namespace(piece.beta)
    lower = piece.beta - math.log(RECOVERY)
    slots = {
        slot: value if slot in lasting else xp.where(finite, value, 0.0)
        for slot, value in piece.slots.items()
    }
    slots[COMPENSATION] = xp.where(finite, slots[COMPENSATION], 0.0)
    slots[RECOVERIES] = slots[RECOVERIES] + xp.where(finite, 0.0, xp.ones_like(lower))
    return piece._replace(
        beta=xp.where(finite, piece.beta, xp.where(lower < lo, lo, lower)),
        slots=slots,
        count=xp.where(finite, piece.count, xp.zeros_like(piece.count)),
    )


def pinned(beta: Any, lo: Any, hi: Any) -> Any:
    """Say where beta is at a bound, but for rounding: also that of a step away and back.

    Parameters
    ----------
    beta : array, values per block
    lo, hi : arrays like it, or floats
    """
    xp = namespace(beta)
    at_lo, at_hi = (xp.abs(beta - bound) <= 1e-5 * xp.abs(beta) for bound in (lo, hi))
    return at_lo | at_hi


def _pieces(beta: Any) -> list[tuple[str | None, Callable[[Any], Any]]]:
    """Return for each array of blocks its key and what picks its part out of values per block."""
    if not isinstance(beta, Mapping):
        return [(None, lambda values: values)]
    return [
        (key, lambda values, key=key: None if values is None else values[key])  # type: ignore[misc]
        for key in beta
    ]
