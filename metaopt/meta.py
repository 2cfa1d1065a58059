"""The meta update, from the meta-gradients of blocks to their next step sizes.

docs/mathematics.md sections 3, 6, 8 and 11.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from metaopt.arrays import cast, namespace
from metaopt.jets import Jet, scaled, total
from metaopt.leaf import usable
from metaopt.numerics import exact_sum
from metaopt.rules.fast_start import FastStart
from metaopt.rules.rule import Rule, direction_of
from metaopt.step_sizes import StepSizeMap

__all__ = [
    "COMPENSATION",
    "DECIDED",
    "PEAK",
    "RECOVERIES",
    "SCALE",
    "BlockRow",
    "all_horizons",
    "begun",
    "carried",
    "meta_step",
    "pinned",
]

#: What rounding has taken from beta: without it a meta update below half the distance to the next
#: number would never move it.
COMPENSATION = "compensation"
#: The largest step size since the trace started.
PEAK = "peak"
#: With `recover`, the largest meta-gradient of late; and how often the block has recovered.
SCALE, RECOVERIES = "scale", "recoveries"
#: With several discounts, in how many meta updates the direction of each was the least.
DECIDED = "decided"
#: What a recovery divides the step size by, and how much of the scale is left after a step.
RECOVERY, FORGET = 3.0, 0.999
#: A step size below this share of its peak has collapsed (section 11).
COLLAPSE = 1e-2


class BlockRow(NamedTuple):
    """A row of the block table: blocks that are one array, before a meta update or after it.

    Parameters
    ----------
    beta : Jet
        Meta-parameters, and where these feed back how they depend on past ones (Y).
    slots : mapping of slot to Jet
        As `State.meta_slots`: those of the rule, `COMPENSATION` and `PEAK`, with recovery also
        `SCALE` and `RECOVERIES`. Of several discounts, each has its own of the rule's, along a
        leading axis, and of `DECIDED`.
    count : array like beta, int32
    """

    beta: Jet[Any]
    slots: Mapping[str, Jet[Any]]
    count: Any

    def jet(self, slot: str) -> Jet[Any]:
        """Return a slot, or beta by this name, as `State.beta_trace` has it."""
        return self.beta if slot == "beta" else self.slots[slot]


def begun(z: Any, meta_count: Any) -> Any:
    """Return meta-gradients as they count: 0 where a trace starts in this step (section 11).

    Parameters
    ----------
    z : array, values per block; of several discounts, with a leading axis of them
    meta_count : array, values per block
    """
    return namespace(z).where(meta_count > 0, z, 0.0)


def carried(z: Any, meta_count: Any) -> Any:
    """Say whose traces go on: the others start anew in this step (section 11).

    The traces of all horizons of a block start anew together.

    Parameters
    ----------
    z : array, values per block; of several discounts, with a leading axis of them
    meta_count : array, values per block
    """
    return all_horizons(usable(z), meta_count) & (meta_count > 0)


def all_horizons(flags: Any, like: Any) -> Any:
    """Say where flags hold for all horizons.

    Parameters
    ----------
    flags : boolean array like `like`; of several discounts, with a leading axis of them
    like : array, values per block
    """
    return flags if flags.ndim == like.ndim else namespace(flags).all(flags, axis=0)


def meta_step(
    rule: Rule,
    sigma: StepSizeMap,
    row: BlockRow,
    z: Jet[Any],
    *,
    meta_lr: Any,
    bounds: tuple[Any, Any],
    present: Any = None,
    held: BlockRow | None = None,
) -> tuple[BlockRow, Any]:
    """Return the next row, and which blocks restart.

    Parameters
    ----------
    rule : Rule
        The meta update.
    sigma : StepSizeMap
    row : BlockRow
        Its traces discounted and restarted.
    z : Jet
        Meta-gradient, 0 for blocks that rest: see `begun`; terms A and B of section 3. Of several
        discounts, with a leading axis of them: beta moves along the least of their directions,
        that which asks for the largest step size (section 10).
    meta_lr : float, or array of shape () in the dtype of beta
    bounds : pair of arrays like beta
        Bounds on beta, not on the step sizes.
    present : array like beta, bool, optional
        Which blocks have a leaf with a gradient. A trace can start in those alone, so the others
        wait for it. None for all.
    held : BlockRow, optional
        The row with traces restarted but not discounted: what blocks that stay are left at.
    """
    beta, count = row.beta.value, row.count
    xp, held = namespace(beta), row if held is None else held
    starts = count == 0 if present is None else (count == 0) & present
    finite = all_horizons(usable(z.value), beta)
    moves = finite & xp.logical_not(all_horizons(z.value == 0.0, beta))
    unit, new = _direction(rule, row, Jet(xp.where(moves, z.value, 0.0), z.first))
    if DECIDED in row.slots:
        least = xp.min(unit.value, axis=0)
        decided = cast(unit.value == least, beta.dtype)
        new |= {DECIDED: Jet(row.slots[DECIDED].value + decided)}
        unit = Jet(least)
    if isinstance(rule, FastStart):
        unit = _retreated(rule, unit, row.slots, new)
    exact, lost = exact_sum(beta, row.slots[COMPENSATION].value - meta_lr * unit.value)
    lo, hi = bounds
    new_beta = xp.where(exact < lo, lo, xp.where(exact > hi, hi, exact))
    meets = pinned(new_beta, lo, hi) & xp.logical_not(pinned(beta, lo, hi))
    size: Any = sigma.value(new_beta)
    peak: Any = xp.maximum(row.slots[PEAK].value, size)
    # the trace is of moves far longer than those of now, or the step size has met a bound
    collapsed = (size > 0.0) & (size < COLLAPSE * peak)
    restart = moves & (meets | collapsed)
    new |= {COMPENSATION: Jet(xp.where(new_beta == exact, lost, 0.0)), PEAK: Jet(peak)}
    if SCALE in row.slots:
        size_of_z = xp.abs(z.value)
        size_of_z = size_of_z if size_of_z.ndim == beta.ndim else xp.max(size_of_z, axis=0)
        scale = xp.maximum(size_of_z, FORGET * row.slots[SCALE].value)
        new |= {SCALE: Jet(scale), RECOVERIES: row.slots[RECOVERIES]}
    lasting = (COMPENSATION, DECIDED, RECOVERIES, *getattr(rule, "lasting", ()))

    def chosen(slot: str) -> Any:
        old, after = held.slots[slot], new[slot]
        value = xp.where(moves, after.value, old.value)
        first = old.first
        if first is not None:  # of a slot that nothing reaches in this step it is 0
            first = xp.where(moves, 0.0 if after.first is None else after.first, first)
        if slot not in lasting:
            value = xp.where(restart, 0.0, value)
            first = None if first is None else xp.where(restart, 0.0, first)
        return Jet(value, first)

    first = held.beta.first
    if first is not None:
        moved = total(row.beta.first, scaled(unit.first, -meta_lr))
        first = xp.where(moves, moved, first)
    after = BlockRow(
        Jet(xp.where(moves, new_beta, beta), first),
        {slot: chosen(slot) for slot in row.slots},
        xp.where(restart, xp.zeros_like(count), count + cast(moves | starts, count.dtype)),
    )
    if SCALE in row.slots:
        after = _recovered(after, finite, lo, lasting)
    return after, restart | xp.logical_not(finite)


def _recovered(row: BlockRow, finite: Any, lo: Any, lasting: tuple[str, ...]) -> BlockRow:
    """Return a row whose blocks without a usable meta-gradient start anew, with a smaller step."""
    xp = namespace(finite)
    beta = row.beta.value
    lower = beta - math.log(RECOVERY)
    slots = {
        slot: jet if slot in lasting else Jet(xp.where(finite, jet.value, 0.0))
        for slot, jet in row.slots.items()
    }
    slots[COMPENSATION] = Jet(xp.where(finite, slots[COMPENSATION].value, 0.0))
    again = xp.where(finite, 0.0, xp.ones_like(lower))
    slots[RECOVERIES] = Jet(slots[RECOVERIES].value + again)
    return BlockRow(
        Jet(xp.where(finite, beta, xp.where(lower < lo, lo, lower))),
        slots,
        xp.where(finite, row.count, xp.zeros_like(row.count)),
    )


def _direction(rule: Rule, row: BlockRow, z: Jet[Any]) -> tuple[Jet[Any], dict[str, Jet[Any]]]:
    """Return the direction and the rule's next slots; it sees jets only where these feed back."""
    count = cast(row.count + 1, row.beta.value.dtype)
    if row.beta.first is None:
        values = {slot: row.slots[slot].value for slot in rule.slots}
        unit, new = direction_of(rule, z.value, values, count)
        return Jet(unit), {slot: Jet(new[slot]) for slot in rule.slots}
    slots = {slot: row.slots[slot] for slot in rule.slots}
    unit, new = direction_of(rule, z, slots, Jet(count))
    return unit, dict(new)


def _retreated(
    rule: FastStart, unit: Jet[Any], slots: Mapping[str, Jet[Any]], new: Mapping[str, Jet[Any]]
) -> Jet[Any]:
    """Return the direction, in the step in which a block's start ends back; section 6."""
    if rule.retreat is None or (isinstance(rule.retreat, float) and rule.retreat == 0.0):
        return unit
    before, after = (
        all_horizons(rule.over({slot: jet.value for slot, jet in some.items()}), unit.value)
        for some in (slots, new)
    )
    xp = namespace(unit.value)
    ends = after & xp.logical_not(before)
    first = None if unit.first is None else xp.where(ends, 0.0, unit.first)
    return Jet(xp.where(ends, rule.retreat * rule.factor, unit.value), first)


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
