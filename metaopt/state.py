"""The state of a run."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from metaopt.arrays import Leaves, per_leaf

__all__ = ["State", "arrays_of", "each_array"]

#: The names that lead to an array: of the field, and of the keys in it.
Path = tuple[str, ...]


@dataclass(frozen=True)
class State:
    """Everything MetaOptimize carries from step to step: arrays and nothing else.

    Floating arrays have the compute dtype of their leaf, the wider of the parameter's dtype and
    float32; what belongs to blocks has the widest of these. A *leaf* is one named parameter array.
    Values per block ("blocks" below) are one vector in order of first appearance, at weight
    level a mapping of leaf to array of its shape. Mappings are ordered like the parameters at
    `init`. Of several discounts, `trace`, `average`, `slot_traces`, `meta_grad` and of `meta_slots`
    the moments and "decided" have a leading axis, an entry for each.

    Parameters
    ----------
    step : array, shape (), int32
        Calls of `step` so far, skipped ones left out.
    count : mapping of leaf to array, shape (), int32
        Steps in which the leaf had a gradient.
    meta_count : blocks, int32
        Meta updates made since the trace started; 0 where it starts in the next step.
    beta : blocks
        Meta-parameters; the step sizes are sigma(beta).
    meta_slots : mapping of slot to blocks
        Moments of the meta update, and how near the end of its fast start is; "compensation", what
        rounding took from beta; "peak", the largest step size since the trace started; with
        `recover` "scale", the largest meta-gradient of late, and "recoveries", how often the block
        has gone back; of several discounts "decided", in how many meta updates the direction of
        each was the least.
    slots : mapping of leaf to mapping of slot to array of the leaf's shape
        Moments of the base update.
    trace : mapping of leaf to array
        How the leaf depends on past meta-parameters, docs/mathematics.md section 3: of the leaf's
        shape where condensed; `(m, *shape)`, one column per block, where dense. Of the leaves that
        have no average.
    average : mapping of leaf to array of the leaf's shape
        Where the trace is the distance from the weights to a moving average of them, that average
        in its place (section 10); of no meaning before the leaf's first step.
    slot_traces : mapping of leaf to mapping of slot to array like the leaf's trace
        The same of the moments; only of those that feed back.
    beta_trace : mapping of "beta" or slot to blocks
        The same of the meta update's state (Y), with one leading axis of columns where dense;
        empty where it does not feed back and stays E.
    third_trace : mapping of leaf to array of shape `(m, m, *shape)`
        How the leaf's trace depends on past meta-parameters (Z); empty unless
        `approximation="full"` and it feeds back.
    meta_grad : blocks
        The last meta-gradient z, as it was.
    restarts : array, int32
        How often the trace started anew, after a meta-gradient that was not finite, a collapse of
        the step size or a bound that it met: an entry per block, at weight level per leaf.
    skipped : array, shape (), int32
        Steps left out by `skip_nonfinite`.
    learned : mapping of name to mapping of field to its value
        Of each number of a rule that is learned, `beta`, `meta_count`, `meta_slots`, `meta_grad`,
        `restarts`, `trace`, `slot_traces`, `beta_trace` and `third_trace` of its own, of one
        discount: docs/mathematics.md section 15.
    """

    step: Any
    count: Leaves[Any]
    meta_count: Any
    beta: Any
    meta_slots: Leaves[Any]
    slots: Leaves[Leaves[Any]]
    trace: Leaves[Any]
    average: Leaves[Any]
    slot_traces: Leaves[Leaves[Any]]
    beta_trace: Leaves[Any]
    third_trace: Leaves[Any]
    meta_grad: Any
    restarts: Any
    skipped: Any
    learned: Leaves[Leaves[Any]] = field(default_factory=OrderedDict)


def each_array(function: Callable[[Path, Any], Any], state: State) -> State:
    """Return a state with what a function makes of each array and the names that lead to it.

    Parameters
    ----------
    function : callable
        From a tuple of names, ("slots", "w", "exp_avg"), and an array.
    state : State
    """

    def within(path: Path, value: Any) -> Any:
        if isinstance(value, Mapping):
            return per_leaf((key, within((*path, key), part)) for key, part in value.items())
        return function(path, value)

    return State(
        **{one.name: within((one.name,), getattr(state, one.name)) for one in fields(state)}
    )


def arrays_of(state: State) -> dict[Path, Any]:
    """Return the arrays of a state by the names that lead to them, in order.

    Parameters
    ----------
    state : State
    """
    found: dict[Path, Any] = {}
    each_array(found.__setitem__, state)
    return found
