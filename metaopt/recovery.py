"""Back to the average of the weights where they have diverged; docs/mathematics.md section 11."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from metaopt.arrays import cast, map_leaves, namespace, per_leaf
from metaopt.leaf import has_average, usable
from metaopt.meta import SCALE
from metaopt.plan import Plan
from metaopt.state import State

__all__ = ["recovered"]

#: A meta-gradient beyond so many times the largest of late is a sign of divergence, and the
#: average stays out of it: one share of weights of 1e90 would leave nothing to go back to.
ODD = 100.0


def recovered(
    plan: Plan,
    moves: Mapping[str, Any],
    old: tuple[Mapping[str, Any], State],
    new: tuple[Mapping[str, Any], State],
) -> tuple[dict[str, Any], State]:
    """Return the parameters and the state after a step with `recover`.

    Nothing that is not finite stays in weights and moments. In blocks whose meta-gradient is not
    `usable` the weights are those of the average, and moments are 0; of the blocks' own state
    `metaopt.meta.meta_step` has seen to that.

    Parameters
    ----------
    plan : Plan
    moves : mapping of leaf name to bool or boolean array
        Of the leaves that have a gradient, which have a multiplier other than 0.
    old, new : pair of params and State
        Before and after the step.
    """
    (old_params, before), (new_params, after) = old, new
    z = after.meta_grad
    lost = map_leaves(lambda z: namespace(z).logical_not(usable(z)), z)
    odd = map_leaves(
        lambda z, scale: (scale > 0.0) & (namespace(z).abs(z) > ODD * scale),
        *(z, before.meta_slots[SCALE]),
    )
    params, slots, average = dict(new_params), dict(after.slots), dict(after.average)
    for name, moving in moves.items():
        param, new_param, mean = old_params[name], new_params[name], before.average[name]
        xp, had = namespace(mean), has_average(before.count[name])
        back, strange = (plan.blocks.expand_leaf(part, name, param.ndim) for part in (lost, odd))
        back = back & moving
        kept = xp.where(xp.isfinite(new_param), new_param, param)
        weights = xp.where(back, xp.where(had, mean, param), kept)
        params[name] = cast(weights, param.dtype)  # in its byte order
        average[name] = xp.where((back | strange) & had, mean, after.average[name])
        slots[name] = per_leaf(
            (slot, _cleared(back, value, param.shape)) for slot, value in after.slots[name].items()
        )
    ordered = {
        "slots": per_leaf((name, slots[name]) for name in after.slots),
        "average": per_leaf((name, average[name]) for name in after.average),
    }
    return params, replace(after, **ordered)


def _cleared(back: Any, slot: Any, shape: Any) -> Any:
    """Return a moment with 0 where weights go back, or where it is not finite."""
    xp = namespace(slot)
    if slot.shape != shape:  # of a shape of its own: with any of its weights
        back = xp.any(back)
    return xp.where(back | xp.logical_not(xp.isfinite(slot)), 0.0, slot)
