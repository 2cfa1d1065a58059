"""Averaged weights for evaluation, which come with the traces; docs/mathematics.md section 10."""

from collections.abc import Mapping
from typing import Any

from metaopt.arrays import at_hand, cast, kind_of, namespace, solid, to_numpy
from metaopt.configuration import Configuration
from metaopt.leaf import has_average
from metaopt.plan import Plan
from metaopt.rules.averaged import MEAN, Averaged
from metaopt.rules.rule import Rule, decay_step_size
from metaopt.state import State
from metaopt.step_sizes import is_exponential

__all__ = ["average_of", "averaged_params", "check_averages"]


def check_averages(config: Configuration, plan: Plan) -> None:
    """Raise ValueError where a leaf has no average: in a trace, or of an `Averaged` rule."""
    if all(isinstance(rule, Averaged) for rule in plan.rules.values()):
        return
    advice = "or give `Averaged(...)` as `base`"
    if plan.curvature != "none" or not is_exponential(config.sigma_map):
        msg = (
            'averaged weights need `curvature` "none" and `sigma` "exp", where the traces are '
            f"distances to them, {advice}; got {config.curvature!r} and {config.sigma!r}."
        )
        raise ValueError(msg)
    apart = [rule for rule in plan.rules.values() if not isinstance(rule, Averaged)]
    apart = [rule for rule in apart if decay_step_size(rule) is not None and rule.weight_decay]
    if apart:
        msg = (
            "averaged weights need a weight decay that the step size multiplies: with a "
            "`decay_step_size` what the traces are distances to is smaller than the weights "
            f"(docs/mathematics.md section 10). Give `Averaged(...)` as `base`; got {apart[0]!r}."
        )
        raise ValueError(msg)
    shortest = config.discounts[0]
    if at_hand(shortest) and float(to_numpy(shortest)) == 1.0:
        msg = (
            "averaged weights need a `discount` below 1, as (0.99, 1.0) has: at 1 the average is "
            f"where the run began; {advice}. Got {config.discount!r}."
        )
        raise ValueError(msg)


def average_of(
    rule: Rule,
    param: Any,
    count: Any,
    slots: Mapping[str, Any],
    *,
    trace: Any = None,
    average: Any = None,
) -> Any:
    """Return the average of a leaf's weights, in their dtype; before its first step these.

    Parameters
    ----------
    rule : Rule
    param : array
    count : array, shape ()
        Steps that the leaf has made.
    slots : mapping of slot to array
        With the mean of `rule`, where that is `Averaged`.
    trace, average : arrays like the weights, in the compute dtype
        Else those of the shortest horizon; one of them.
    """
    if isinstance(rule, Averaged):
        wide = cast(param, slots[MEAN].dtype)
        mean = rule.average(slots[MEAN], count, wide)
    else:
        wide = cast(param, (trace if average is None else average).dtype)
        mean = wide - trace if average is None else average
    return cast(namespace(wide).where(has_average(count), mean, wide), param.dtype)


def averaged_params(
    config: Configuration, plan: Plan, params: Mapping[str, Any], state: State
) -> dict[str, Any]:
    """Return what `MetaOptimize.averaged_params` does."""
    check_averages(config, plan)

    def shortest(traces: Mapping[str, Any], name: str) -> Any:
        found = traces.get(name)
        return found[0, ...] if found is not None and plan.horizons else found

    def of(name: str, param: Any) -> Any:
        kept = {"trace": shortest(state.trace, name), "average": shortest(state.average, name)}
        rule, slots = plan.rules[name], state.slots[name]
        return solid(average_of(rule, param, state.count[name], slots, **kept))

    return kind_of(params)((name, of(name, param)) for name, param in params.items())
