"""The engine: the order of a step, for the leaves and blocks of a plan.

docs/mathematics.md sections 2, 3, 7 and 11. What happens to one leaf is in `metaopt.leaf`, to the
blocks in `metaopt.meta`; here is what looks at several leaves, and what follows what.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import sub
from typing import Any, TypeAlias

from metaopt.arrays import Leaves, cast, full, kind_of, map_leaves, namespace, per_leaf, solid
from metaopt.configuration import Configuration
from metaopt.inputs import check_products
from metaopt.jets import Jet, scaled
from metaopt.leaf import (
    Leaf,
    advance,
    discount_where,
    discounted,
    follow,
    has_average,
    taken,
    with_lr,
)
from metaopt.meta import BlockRow, begun, carried, meta_step
from metaopt.plan import OF_NUMBER, Plan
from metaopt.rules.learned import bound
from metaopt.state import State
from metaopt.step_sizes import StepSizeMap, step_sizes

__all__ = [
    "Given",
    "Reduce",
    "each_horizon",
    "make_step",
    "move_blocks",
    "sizes_of",
    "values_of_leaf",
]

#: From sums over the parts of the leaves that a device holds to those over all devices.
Reduce: TypeAlias = Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Across:
    """The devices that hold parts of the leaves; by default, this one has all.

    Parameters
    ----------
    reduce, copies
        As `MetaOptimize.step` takes them.
    """

    reduce: Reduce | None = None
    copies: Mapping[str, int] = field(default_factory=dict)

    def sums(self, plans: Sequence[Plan], values: list[Any], lost: Any) -> tuple[list[Any], Any]:
        """Return values per block of plans, and a count, summed over the devices; any may be None.

        At weight level a device has all of what its weights need.
        """
        whole = [
            value is None or plan.blocks.partition.per_leaf
            for plan, value in zip(plans, values, strict=True)
        ]
        pairs = list(zip(values, whole, strict=True))
        arrays = [value for value, has_all in pairs if not has_all]
        arrays += [] if lost is None else [lost]
        if self.reduce is None or not arrays:
            return values, lost
        sums = iter(self.reduce(arrays))
        values = [value if has_all else next(sums) for value, has_all in pairs]
        return values, lost if lost is None else next(sums)

    def apart(self, plan: Plan) -> bool:
        """Say whether devices may differ in which parts of a block's leaves have gradients."""
        return self.reduce is not None and not plan.blocks.partition.per_leaf

    def counted(self, plan: Plan, by_leaf: Any) -> Any:
        """Return counts by block; at weight level by leaf, of which each device has a part."""
        if not plan.blocks.partition.per_leaf or self.reduce is None:
            return by_leaf
        (counts,) = self.reduce([by_leaf])
        if not self.copies:
            return counts
        shares = [self.copies.get(name, 1) for name in plan.blocks.views]
        return namespace(counts).stack([counts[i] // share for i, share in enumerate(shares)])


@dataclass(frozen=True)
class Given:
    """What a step is handed, beside the state; all of it checked.

    Parameters
    ----------
    params, grads, hvp, third, hessian_diagonal, unit_steps
        As `MetaOptimize.step` takes them.
    meta_grads : mapping of leaf to array or None
        With what the meta-gradient is made: the gradients themselves, or those of another loss, of
        which leaves may be left out.
    lrs : mapping of leaf to float or array, shape ()
        Multipliers; arrays in the leaf's compute dtype.
    across : Across
    """

    params: Mapping[str, Any]
    grads: Mapping[str, Any]
    lrs: Leaves[Any]
    hvp: Callable[[Any], Mapping[str, Any]] | None
    third: Callable[[Any, Any], Mapping[str, Any]] | None
    hessian_diagonal: Mapping[str, Any] | None
    unit_steps: Mapping[str, Any]
    meta_grads: Mapping[str, Any]
    across: "Across"

    @property
    def present(self) -> list[str]:
        """The leaves that have a gradient."""
        return [name for name in self.lrs if self.grads[name] is not None]

    @property
    def active(self) -> Leaves[Any]:
        """Whether each leaf moves: True or False where known, else a boolean array."""
        return per_leaf(
            (name, self.grads[name] is not None and lr != 0.0) for name, lr in self.lrs.items()
        )


def make_step(
    config: Configuration, plan: Plan, state: State, given: Given
) -> tuple[Leaves[Any], Leaves[Leaf | None], State, Any]:
    """Return what a step takes from the leaves, their next rows, and the next state.

    The former two are None for leaves without a gradient. Last comes whether all that came in was
    finite; None where `skip_nonfinite` does not ask.
    """
    curved, present = plan.curvature != "none", given.present
    rectified = config.rectified and curved
    sides = [Side.of(config, plan, state, given)]
    for name, number in plan.learned.items():
        sides.append(Side.of(config.learned[name], number, of_number(state, name), given))
    values = per_leaf((name, cast(given.grads[name], plan.dtypes[name])) for name in present)
    sources = values
    if config.held_out:
        judges = ((name, given.meta_grads.get(name)) for name in present)
        sources = per_leaf(
            (name, cast(grad, plan.dtypes[name])) for name, grad in judges if grad is not None
        )
    found = [meta_gradient(side, sources, given) for side in sides]
    lost = None
    if config.skip_nonfinite:
        units = {name: given.unit_steps[name] for name in present if name in given.unit_steps}
        lost = not_finite(plan, values, units, *([sources] if config.held_out else []))
    if config.skip_nonfinite and lost is None and given.across.reduce is not None:
        lost = full(state.step, (), 0, plan.beta_dtype)  # those of other devices count
    plans = [side.plan for side in sides]
    found, lost = given.across.sums(plans, found, lost)
    sides = [side.given(z) for side, z in zip(sides, found, strict=True)]
    if curved:
        sides = [side.curved(values, given) for side in sides]
        lost_here = None
        if config.skip_nonfinite:
            lost_here = not_finite(plan, *(part for s in sides for part in (s.tangents, s.bent)))
        terms, lost_here = given.across.sums(plans, [side.z_trace for side in sides], lost_here)
        sides = [replace(side, z_trace=term) for side, term in zip(sides, terms, strict=True)]
        lost = lost if lost_here is None else lost + lost_here

    moves = [
        move_blocks(
            side.config,
            side.plan,
            side.state,
            side.z,
            present=None
            if given.across.apart(side.plan)
            else blocks_present(side.plan, present, state.step),
            mask=side.mask,
            z_trace=side.z_trace,
            across=given.across,
        )
        for side in sides
    ]

    (own, *numbers), ((new, sizes), *others) = sides, moves

    def plain(jet: Any) -> Any:
        """Return the value of a learned number, a jet where the rule is fed with these."""
        return Jet(jet.value) if curved else jet.value

    deltas: Leaves[Any] = per_leaf((name, None) for name in plan.shapes)
    moved: list[Leaves[Leaf | None]] = [OrderedDict(deltas) for _ in sides]
    for name in present:
        dtype, ndim, lr = plan.dtypes[name], len(plan.shapes[name]), given.lrs[name]
        alpha, rule = taken(_sizes_of_leaf(plan, sizes, name), lr, dtype), plan.rules[name]
        learned = {
            side.plan.place: side.number(jet, name)
            for side, (_, jet) in zip(numbers, others, strict=True)
            if name in side.plan.placed
        }
        diagonal = cast(given.hessian_diagonal[name], dtype) if rectified else None  # type: ignore[index]
        deltas[name], moved[0][name] = advance(
            bound(with_lr(rule, lr), {place: plain(jet) for place, jet in learned.items()}),
            own.table[name],
            Jet(values[name]) if rectified else own.grad(values, name),
            alpha,
            discount=1.0 if curved else discounts(plan, name, own.active[name], config.discount),
            mask=None
            if curved
            else _kept(own.table[name], plan.layout.columns(own.mask, name, ndim)),
            rectified=diagonal,
            unit_step=cast(given.unit_steps[name], dtype) if name in given.unit_steps else None,
        )
        for side, rows_after in zip(numbers, moved[1:], strict=True):
            if name in side.table:
                rows_after[name] = side.followed(name, values, alpha.value, lr, learned)
    finite = None if lost is None else lost == 0.0
    after = next_state(state, moved[0], new, own.z)
    if numbers:
        states = (
            next_state(side.state, rows_after, new_blocks, side.z)
            for side, rows_after, (new_blocks, _) in zip(numbers, moved[1:], others, strict=True)
        )
        parts = zip(plan.learned, map(part_of_number, states), strict=True)
        after = replace(after, learned=per_leaf(parts))
    return deltas, moved[0], after, finite


@dataclass(frozen=True)
class Side:
    """What a step follows: how weights depend on step sizes, or on a number that is learned.

    Parameters
    ----------
    config, plan, state
        The optimizer's, or those of the number.
    active : mapping of leaf to bool or boolean array
    table : mapping of leaf to Leaf
        Rows as the step began; `curved`, discounted.
    z : blocks
        Meta-gradient, as it counts.
    mask : blocks, bool
        Whose traces go on.
    z_trace : blocks, optional
        Terms A and B of section 3.
    tangents, bent : mapping of leaf to array
        First and second derivatives of the gradients, where curvature is followed.
    """

    config: Configuration
    plan: Plan
    state: State
    active: Leaves[Any]
    table: Leaves[Leaf]
    z: Any = None
    mask: Any = None
    z_trace: Any = None
    tangents: Mapping[str, Any] = field(default_factory=dict)
    bent: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Configuration, plan: Plan, state: State, given: Given) -> "Side":
        """Return a side as a step begins."""
        present = plan.shapes if plan.curvature != "none" else given.present
        names = [name for name in present if name in plan.shapes]
        return cls(config, plan, state, given.active, rows(plan, given.params, state, names))

    @property
    def traces(self) -> dict[str, Any]:
        """How the weights depend on what is followed."""
        return {name: leaf.param.first for name, leaf in self.table.items()}

    def given(self, z: Any) -> "Side":
        """Return the side with its meta-gradient, and rows of a learned number discounted."""
        z = map_leaves(begun, z, self.state.meta_count)
        side = replace(self, z=z, mask=map_leaves(carried, z, self.state.meta_count))
        return side.discounted() if self.plan.place and self.plan.curvature == "none" else side

    def discounted(self) -> "Side":
        """Return the side with its rows discounted and restarted."""
        discount = self.config.discount
        table = discounted_rows(self.plan, self.table, self.active, self.mask, discount)
        return replace(self, table=table)

    def curved(self, values: Leaves[Any], given: Given) -> "Side":
        """Return the side with rows discounted and the derivatives of gradients."""
        plan, copies, active = self.plan, given.across.copies, self._active
        side = self.discounted()
        hats = side.traces
        tangents, z_trace = grad_traces(plan, hats, given), None
        if plan.beta_feeding:
            z_trace = products(plan, self.traces, active, tangents, copies)
        bent: Mapping[str, Any] = {}
        if plan.third:
            thirds = {name: leaf.param.second for name, leaf in side.table.items()}
            term_b = products(plan, thirds, active, values, copies)
            z_trace = term_b if z_trace is None else map_leaves(lambda a, b: a + b, z_trace, term_b)
            again = _discounted_again(plan, side.table, active, self.config.discount)
            side = replace(side, table=again)
            bent = grad_seconds(plan, hats, again, given)
        return replace(side, tangents=tangents, bent=bent, z_trace=z_trace)

    @property
    def _active(self) -> Leaves[Any]:
        return per_leaf((name, self.active[name]) for name in self.table)

    @property
    def follows(self) -> dict[str, Any]:
        """Whether each leaf moves and has a trace."""
        return {name: _follows(leaf, self.active[name]) for name, leaf in self.table.items()}

    def grad(self, values: Leaves[Any], name: str) -> Jet[Any]:
        """Return a leaf's gradient with its derivatives."""
        if self.plan.curvature == "none":
            return Jet(values[name])
        order = 2 if self.plan.third else 1
        return Jet(values[name], self.tangents[name], self.bent.get(name), order)

    def number(self, sizes: Jet[Any], name: str) -> Jet[Any]:
        """Return the value of a learned number for a leaf, with its derivative."""
        size = _sizes_of_leaf(self.plan, sizes, name)
        jet = taken(size, 1.0, self.plan.dtypes[name])
        return Jet(self.config.start, jet.first) if self.config.fixed else jet

    def followed(
        self,
        name: str,
        values: Leaves[Any],
        alpha: Any,
        lr: Any,
        learned: Mapping[str, Jet[Any]],
    ) -> Leaf:
        """Return a leaf's row of a learned number after a step."""
        plan = self.plan
        own = plan.place if name in plan.placed else None
        numbers = {at: jet if at == own else Jet(jet.value) for at, jet in learned.items()}
        return follow(
            bound(with_lr(plan.rules[name], lr), numbers),
            self.table[name],
            self.grad(values, name),
            alpha,
            in_direction=plan.in_direction,
        )


def of_number(state: State, name: str) -> State:
    """Return the state with what is a learned number's own in the place of the step size's."""
    return replace(state, average=per_leaf(()), learned=per_leaf(()), **state.learned[name])


def part_of_number(state: State) -> Leaves[Any]:
    """Return what is a learned number's own: the inverse of `of_number`."""
    return per_leaf((part, getattr(state, part)) for part in OF_NUMBER)


def meta_gradient(side: Side, sources: Leaves[Any], given: Given) -> Any:
    """Return the meta-gradient of step sizes or a learned number, over this device's parts.

    `sources` are gradients, of this step's loss or of a held-out one, of some of the leaves.
    """
    follows = {name: moves for name, moves in side.follows.items() if name in sources}
    z = products(side.plan, side.traces, follows, sources, given.across.copies)
    if z is None:
        return map_leaves(namespace(side.state.step).zeros_like, side.state.meta_grad)
    return z


def accepted(old: State, new: State, finite: Any) -> State:
    """Return the new state, where not all that came in was finite (None: not asked) the old one."""
    if finite is not None:
        xp = namespace(finite)

        def select(after: Any, before: Any) -> Any:
            return xp.where(finite, after, before)

        skipped = old.skipped + cast(xp.logical_not(finite), old.skipped.dtype)
        fields = {
            name: map_leaves(select, part, getattr(old, name)) for name, part in vars(new).items()
        }
        new = State(**(fields | {"skipped": skipped}))
    return State(**{name: map_leaves(solid, part) for name, part in vars(new).items()})


def rows(plan: Plan, params: Mapping[str, Any], state: State, names: Iterable[str]) -> Leaves[Leaf]:
    """Return the rows of leaves as a step begins; the trace is the distance to an average.

    Taken anew in every step, it has in it whatever was done to the weights since the last one.
    """
    order = 2 if plan.third else 1
    table: Leaves[Leaf] = OrderedDict()
    for name in names:
        param, average = cast(params[name], plan.dtypes[name]), state.average.get(name)
        if average is None:
            trace = state.trace[name]
        else:
            trace = each_horizon(plan, partial(sub, param), average)
        slot_traces: Mapping[str, Any] = state.slot_traces.get(name, {})
        table[name] = Leaf(
            Jet(param, trace, state.third_trace.get(name), order),
            per_leaf(
                (slot, Jet(value, slot_traces.get(slot), order=order))
                for slot, value in state.slots[name].items()
            ),
            state.count[name],
            average,
        )
    return table


def traces_now(plan: Plan, params: Mapping[str, Any], state: State) -> Leaves[Any]:
    """Return the traces of all leaves; 0 where there is no average yet to be distant from."""

    def of(leaf: Leaf) -> Any:
        trace = leaf.param.first
        if leaf.average is None:
            return trace
        return namespace(trace).where(has_average(leaf.count), trace, 0.0)

    table = rows(plan, params, state, plan.shapes)
    return per_leaf((name, of(leaf)) for name, leaf in table.items())


def next_state(state: State, moved: Leaves[Leaf | None], new: dict[str, Any], z: Any) -> State:
    """Return the state of the leaves' next rows, those of before where there is none."""

    def column(old: Mapping[str, Any], of: Callable[[str, Leaf], Any]) -> Any:
        return per_leaf(
            (name, kept if (leaf := moved[name]) is None else of(name, leaf))
            for name, kept in old.items()
        )

    def slots(old: Mapping[str, Any], of: Callable[[Any], Any]) -> Any:
        def row(name: str, leaf: Leaf) -> Any:
            found = ((slot, of(leaf.slots[slot]), kept) for slot, kept in old[name].items())
            # the trace of a slot that nothing reaches in this step is 0
            return per_leaf(
                (slot, namespace(kept).zeros_like(kept) if new is None else new)
                for slot, new, kept in found
            )

        return column(old, row)

    return State(
        step=state.step + 1,
        count=column(state.count, lambda _, leaf: leaf.count),
        slots=slots(state.slots, lambda jet: jet.value),
        trace=column(state.trace, lambda _, leaf: leaf.param.first),
        average=column(state.average, lambda _, leaf: leaf.average),
        slot_traces=slots(state.slot_traces, lambda jet: jet.first),
        third_trace=column(state.third_trace, lambda _, leaf: leaf.param.second),
        meta_grad=z,
        skipped=state.skipped,
        learned=state.learned,
        **new,
    )


def move_blocks(
    config: Configuration,
    plan: Plan,
    state: State,
    z: Any,
    *,
    present: Any = None,
    mask: Any = None,
    z_trace: Any = None,
    across: "Across | None" = None,
) -> tuple[dict[str, Any], Jet[Any]]:
    """Return the blocks' part of the next state, and the step sizes to take with their derivatives.

    Parameters
    ----------
    config, plan, state
    z : blocks
        Meta-gradient: see `metaopt.meta.begun`.
    present : blocks, bool, optional
        Which blocks have a leaf with a gradient; None for all.
    mask : blocks, bool
        Whose traces go on; needed where these feed back.
    z_trace : blocks, with a leading axis of columns where dense, optional
        Terms A and B of section 3.
    across : Across, optional
        The devices that hold parts of the leaves. At weight level each has a part of each leaf's
        blocks, and what is counted by leaf is added up.
    """
    across = Across() if across is None else across
    curved = plan.curvature == "exact" or plan.beta_feeding
    start = plan.layout.start(state.beta) if curved else None
    lo, hi = config.limits(plan.blocks, state.beta)
    after: dict[str | None, BlockRow] = {}
    restarts: dict[str | None, Any] = {}
    sizes: dict[str | None, Jet[Any]] = {}
    for key, row in block_rows(plan, state, start, mask).items():
        pick = partial(_piece, key)
        now = _towards(row, pick(start), config.discount)
        after[key], restarts[key] = meta_step(
            config.meta,
            config.sigma_map,
            now,
            Jet(pick(z), pick(z_trace)),
            meta_lr=in_dtype(config.meta_lr, plan.beta_dtype),
            bounds=(pick(lo), pick(hi)),
            present=pick(present),
            held=row,
        )
        beta = after[key].beta if config.meta_first else now.beta
        columns = pick(start) if beta.first is None else beta.first
        sizes[key] = step_sizes(config.sigma_map, beta.value, columns, order=1 + plan.third)

    def blocks_of(take: Callable[[BlockRow], Any]) -> Any:
        return _joined({key: take(row) for key, row in after.items()})

    def by_slot(slots: Iterable[str], take: Callable[[Any], Any]) -> Any:
        def of(slot: str) -> Any:
            return blocks_of(lambda row: take(row.jet(slot)))

        return per_leaf((slot, of(slot)) for slot in slots)

    lost = across.counted(plan, plan.blocks.total(_joined(restarts)))
    new = {
        "beta": blocks_of(lambda row: row.beta.value),
        "meta_count": blocks_of(lambda row: row.count),
        "meta_slots": by_slot(state.meta_slots, lambda jet: jet.value),
        "beta_trace": by_slot(plan.beta_feeding, lambda jet: jet.first),
        "restarts": state.restarts + cast(lost, state.restarts.dtype),
    }
    return new, _joined_jets(sizes)


def block_rows(plan: Plan, state: State, start: Any, mask: Any) -> dict[str | None, BlockRow]:
    """Return the rows of the block table as a step begins: one, at weight level one for each leaf.

    The traces Y are restarted, to `start` (E), in columns outside the mask.
    """
    feeding = plan.beta_feeding
    columns = plan.layout.beta_columns(mask) if feeding else None

    def jet(key: str | None, slot: str, values: Any) -> Any:
        value = _piece(key, values)
        if slot not in feeding:
            return Jet(value)
        xp, target = namespace(value), _piece(key, start)
        target = target if slot == "beta" else xp.zeros_like(target)
        return Jet(
            value, xp.where(_piece(key, columns), _piece(key, state.beta_trace[slot]), target)
        )

    return {
        key: BlockRow(
            jet(key, "beta", state.beta),
            {slot: jet(key, slot, values) for slot, values in state.meta_slots.items()},
            _piece(key, state.meta_count),
        )
        for key in (state.beta if isinstance(state.beta, Mapping) else [None])
    }


def _towards(row: BlockRow, start: Any, discount: Any) -> BlockRow:
    """Return a row with its traces discounted: that of beta towards E, the others towards 0."""
    if row.beta.first is None or (isinstance(discount, float) and discount == 1.0):
        return row
    factor = in_dtype(discount, row.beta.value.dtype)
    beta = factor * row.beta.first + (1.0 - factor) * start
    slots = {
        slot: jet if jet.first is None else Jet(jet.value, factor * jet.first)
        for slot, jet in row.slots.items()
    }
    return BlockRow(Jet(row.beta.value, beta), slots, row.count)


def _piece(key: str | None, values: Any) -> Any:
    """Return the part of values per block that is one array: all of it, or one leaf's."""
    return values[key] if isinstance(values, Mapping) else values


def _joined(parts: Mapping[str | None, Any]) -> Any:
    """Return values per block of their parts."""
    return parts[None] if None in parts else OrderedDict(parts)


def _joined_jets(parts: Mapping[str | None, Jet[Any]]) -> Jet[Any]:
    """Return step sizes of all blocks; first is the very value where it is so in all parts."""
    value = _joined({key: jet.value for key, jet in parts.items()})
    shared = all(jet.first is jet.value for jet in parts.values())
    first = value if shared else _joined({key: jet.first for key, jet in parts.items()})
    curved = any(jet.second is not None for jet in parts.values())
    return Jet(
        value, first, _joined({key: jet.second for key, jet in parts.items()}) if curved else None
    )


def sizes_of(sigma: StepSizeMap, beta: Any) -> Jet[Any]:
    """Return the step sizes of values per block, and their derivatives along their own beta."""
    pieces = beta.items() if isinstance(beta, Mapping) else [(None, beta)]
    return _joined_jets({key: step_sizes(sigma, piece) for key, piece in pieces})


def _sizes_of_leaf(plan: Plan, sizes: Jet[Any], name: str) -> Jet[Any]:
    """Return the learned step sizes of a leaf, broadcastable to it, with their derivatives."""

    def of(values: Any) -> Any:
        return plan.blocks.expand_leaf(values, name, len(plan.shapes[name]))

    value = of(sizes.value)
    first = value if sizes.first is sizes.value else of(sizes.first)
    return Jet(value, first, None if sizes.second is None else of(sizes.second), sizes.order)


def values_of_leaf(plan: Plan, values: Any, name: str) -> Any:
    """Return a leaf's part of values per block, broadcastable to it, in its compute dtype."""
    return cast(plan.blocks.expand_leaf(values, name, len(plan.shapes[name])), plan.dtypes[name])


def discounts(plan: Plan, name: str, active: Any, discount: Any) -> Any:
    """Return the discount of a leaf's traces, several as a tuple: `metaopt.leaf.discount_where`."""
    dtype = plan.dtypes[name]
    if not plan.horizons:
        return discount_where(active, discount, dtype)
    return tuple(discount_where(active, one, dtype) for one in discount)


def _column(discounts: Any, leaf: Leaf) -> Any:
    """Return the discounts of a leaf's traces as what multiplies these, several as one array."""
    like, trace = leaf.param.value, leaf.param.first
    if not isinstance(discounts, tuple):
        return discounts
    assert trace is not None  # so only in the middle of a step
    xp, dtype = namespace(like), like.dtype
    column = [full(like, (), d, dtype) if isinstance(d, float) else d for d in discounts]
    return xp.reshape(xp.stack(column), (-1,) + (1,) * (trace.ndim - 1))


def _follows(leaf: Leaf, moves: Any) -> Any:
    """Say whether a leaf moves and has a trace: see `metaopt.leaf.has_average`."""
    if leaf.average is None or moves is False:
        return moves
    return has_average(leaf.count) if moves is True else has_average(leaf.count) & moves


def _kept(leaf: Leaf, columns: Any) -> Any:
    """Say where the trace of a leaf does not restart."""
    return columns if leaf.average is None else columns & has_average(leaf.count)


def blocks_present(plan: Plan, names: Iterable[str], like: Any) -> Any:
    """Say which blocks have one of these leaves, those with gradients; None where all have."""
    family_of = plan.blocks.family_of
    present = {family_of[name] for name in names if name in family_of}
    if len(present) == len(plan.blocks.families):
        return None
    kind = namespace(like).bool
    return plan.blocks.from_names(
        {key: full(like, (), key in present, kind) for key in plan.blocks.families}
    )


def products(
    plan: Plan,
    traces: Mapping[str, Any],
    active: Mapping[str, Any],
    arrays: Mapping[str, Any],
    copies: Mapping[str, int],
) -> Any:
    """Return the leaves' traces times `arrays`, over the leaves that move, values per block.

    Of H and gradients it is the meta-gradient z, of H and derivatives of gradients term A of
    section 3, of Z and gradients term B; of several discounts with a leading axis of them. None
    where no leaf moves. A leaf of which several devices have copies counts as one share of as many.
    """
    moving = {name: moves for name, moves in active.items() if moves is not False}
    if not moving:
        return None

    def total(traces: Mapping[str, Any]) -> Any:
        partials = {}
        for name, moves in moving.items():
            part = plan.layout.partial(traces[name], arrays[name], name, plan.beta_dtype)
            if moves is not True:
                part = namespace(part).where(moves, part, 0.0)
            if copies.get(name, 1) != 1 and not plan.blocks.partition.per_leaf:
                part = part / copies[name]
            partials[name] = part
        return plan.layout.gather(partials)

    return each_horizon(plan, total, {name: traces[name] for name in moving})


def each_horizon(plan: Plan, function: Callable[[Any], Any], values: Any) -> Any:
    """Return `function` of values; of several discounts, of each one's by themselves, together."""
    if not plan.horizons:
        return function(values)
    found = [
        function(map_leaves(partial(_entry, horizon), values)) for horizon in range(*plan.horizons)
    ]
    return map_leaves(_stacked, *found)


def _entry(horizon: int, array: Any) -> Any:
    return array[horizon, ...]


def _stacked(*arrays: Any) -> Any:
    return namespace(arrays[0]).stack(list(arrays))


def in_dtype(number: Any, dtype: Any) -> Any:
    """Return a hyperparameter that may be an array in `dtype`; a float goes with all."""
    return number if isinstance(number, float) else cast(number, dtype)


def discounted_rows(
    plan: Plan, table: Leaves[Leaf], active: Leaves[Any], mask: Any, discount: Any
) -> Leaves[Leaf]:
    """Return all rows discounted and restarted, of which curvature needs the Hessian products."""
    result: Leaves[Leaf] = OrderedDict()
    for name, leaf in table.items():
        moves = active[name]
        if moves is not True:  # its overflow, no part of z, would spread through the Hessian
            finite = partial(_finite_traces, moves)
            leaf = leaf._replace(param=finite(leaf.param), slots=map_leaves(finite, leaf.slots))
        columns = plan.layout.columns(mask, name, len(plan.shapes[name]))
        factor = _column(discounts(plan, name, moves, discount), leaf)
        result[name] = discounted(leaf, factor, columns)
    return result


def _discounted_again(
    plan: Plan, table: Leaves[Leaf], active: Leaves[Any], discount: Any
) -> Leaves[Leaf]:
    """Return rows with Z discounted once more: h' is a function of the h before its discount."""

    def again(name: str, leaf: Leaf) -> Leaf:
        factor, param = discount_where(active[name], discount, plan.dtypes[name]), leaf.param
        if isinstance(factor, float) and factor == 1.0:
            return leaf
        second = scaled(param.second, factor)
        return leaf._replace(param=Jet(param.value, param.first, second, param.order))

    return per_leaf((name, again(name, leaf)) for name, leaf in table.items())


def _finite_traces(moves: Any, jet: Jet[Any]) -> Jet[Any]:
    """Return a jet with 0 in place of derivatives that are not finite, unless its leaf moves."""

    def finite(trace: Any) -> Any:
        if trace is None:
            return None
        xp = namespace(trace)
        is_finite = xp.isfinite(trace)
        return xp.where(is_finite if moves is False else is_finite | moves, trace, 0.0)

    return Jet(jet.value, finite(jet.first), finite(jet.second), jet.order)


def grad_traces(plan: Plan, hats: Mapping[str, Any], given: Given) -> Leaves[Any]:
    """Return the derivative of each gradient, Hessian times trace; None for leaves without one."""
    grads, diagonal = given.grads, given.hessian_diagonal
    if diagonal is not None and plan.curvature == "diagonal":
        return per_leaf(
            (name, None if grads[name] is None else cast(diagonal[name], hat.dtype) * hat)
            for name, hat in hats.items()
        )
    assert given.hvp is not None  # `inputs.check_curvature` has seen to it
    lead = len(plan.horizons)  # the columns of all horizons are so many tangents

    def as_columns(name: str) -> Any:
        hat = hats[name]
        if not lead:
            return hat
        columns = math.prod(hat.shape[: lead + 1])
        return namespace(hat).reshape(hat, (columns, *hat.shape[lead + 1 :]))

    tangents = kind_of(grads)((name, as_columns(name)) for name in grads)
    found = given.hvp(tangents)
    check_products("hvp", found, tangents, grads)

    def product(name: str, hat: Any) -> Any:
        array = cast(found[name], hat.dtype)
        return namespace(array).reshape(array, hat.shape) if lead else array

    return per_leaf(
        (name, None if grads[name] is None else product(name, hat)) for name, hat in hats.items()
    )


def grad_seconds(
    plan: Plan, hats: Mapping[str, Any], table: Mapping[str, Leaf], given: Given
) -> Leaves[Any]:
    """Return the second-order parts of the gradients, section 3, *Z*."""
    m, grads = plan.layout.blocks.size, given.grads
    assert given.hvp is not None
    assert given.third is not None
    kind = kind_of(grads)
    seconds = {name: leaf.param.second for name, leaf in table.items()}

    def reshaped(array: Any, *leading: int, name: str) -> Any:
        return namespace(array).reshape(array, (*leading, *plan.shapes[name]))

    tangents = kind((name, hats[name]) for name in grads)
    pairs = kind((name, reshaped(seconds[name], m * m, name=name)) for name in grads)
    bent, turned = given.third(tangents, tangents), given.hvp(pairs)
    check_products("third", bent, seconds, grads)
    check_products("hvp", turned, pairs, grads)

    def second(name: str) -> Any:
        product = reshaped(cast(turned[name], plan.dtypes[name]), m, m, name=name)
        return cast(bent[name], plan.dtypes[name]) + product

    return per_leaf((name, None if grads[name] is None else second(name)) for name in hats)


def not_finite(plan: Plan, *mappings: Mapping[str, Any]) -> Any:
    """Return in how many of the arrays in the mappings inf or NaN stands; None if there is none."""
    total = None
    for array in (value for mapping in mappings for value in mapping.values()):
        if array is not None:
            xp = namespace(array)
            lost = cast(xp.any(xp.logical_not(xp.isfinite(array))), plan.beta_dtype)
            total = lost if total is None else total + lost
    return total
