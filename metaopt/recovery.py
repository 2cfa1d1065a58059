"""Back to the average of the weights where they have diverged; docs/mathematics.md section 11."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from metaopt.arrays import Leaves, cast, map_leaves, namespace, per_leaf
from metaopt.leaf import has_average, usable
from metaopt.meta import SCALE, all_horizons
from metaopt.plan import Plan
from metaopt.rules.averaged import MEAN, Averaged
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

    def strange_size(z: Any, scale: Any) -> Any:
        xp = namespace(z)
        usual = all_horizons(xp.logical_not(xp.abs(z) > ODD * scale), scale)
        return (scale > 0.0) & xp.logical_not(usual)

    lost = map_leaves(
        lambda z, like: namespace(z).logical_not(all_horizons(usable(z), like)), z, after.beta
    )
    odd = map_leaves(strange_size, z, before.meta_slots[SCALE])
    params, slots, average = dict(new_params), dict(after.slots), dict(after.average)
    returned = {}
    for name, moving in moves.items():
        param, new_param, means = old_params[name], new_params[name], before.average[name]
        mean = means[0, ...] if plan.horizons else means  # that of the shortest horizon
        xp, had = namespace(mean), has_average(before.count[name])
        back, strange = (plan.blocks.expand_leaf(part, name, param.ndim) for part in (lost, odd))
        returned[name] = back = back & moving
        kept = xp.where(xp.isfinite(new_param), new_param, param)
        weights = xp.where(back, xp.where(had, mean, param), kept)
        params[name] = cast(weights, param.dtype)  # in its byte order
        average[name] = xp.where((back | strange) & had, means, after.average[name])
        # an average of a rule's own starts anew, at the weights
        anew: dict[str, Any] = {MEAN: weights} if isinstance(plan.rules[name], Averaged) else {}
        slots[name] = per_leaf(
            (slot, _cleared(back, value, anew.get(slot, 0.0), param.shape))
            for slot, value in after.slots[name].items()
        )
    ordered = {
        "slots": per_leaf((name, slots[name]) for name in after.slots),
        "average": per_leaf((name, average[name]) for name in after.average),
        "learned": _begun_anew(after.learned, returned),
    }
    return params, replace(after, **ordered)


def _begun_anew(learned: Leaves[Leaves[Any]], back: Mapping[str, Any]) -> Leaves[Leaves[Any]]:
    """Return the states of learned numbers, whose traces are 0 where weights go back."""

    def cleared(traces: Any, name: str) -> Any:
        if name not in back:
            return traces
        return map_leaves(lambda trace: _cleared(back[name], trace, 0.0, trace.shape), traces)

    return per_leaf(
        (
            name,
            per_leaf(
                (
                    field,
                    per_leaf((leaf, cleared(traces, leaf)) for leaf, traces in part.items())
                    if field in ("trace", "slot_traces")
                    else part,
                )
                for field, part in parts.items()
            ),
        )
        for name, parts in learned.items()
    )


def _cleared(back: Any, slot: Any, anew: Any, shape: Any) -> Any:
    """Return a slot as it is `anew` where weights go back, or where it is not finite."""
    xp = namespace(slot)
    if slot.shape != shape:  # of a shape of its own: with any of its weights
        back = xp.any(back)
    return xp.where(back | xp.logical_not(xp.isfinite(slot)), anew, slot)
