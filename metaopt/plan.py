"""What a configuration means for leaves of given names, shapes and dtypes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from metaopt.arrays import Leaves, Namespace, Shape, compute_dtype, is_narrow, per_leaf
from metaopt.blocks import Blocks, Partition, first_match
from metaopt.curvature import Curvature
from metaopt.meta import COMPENSATION, DECIDED, PEAK, RECOVERIES, SCALE
from metaopt.rules.rule import (
    Rule,
    fed_by,
    feeding_slots,
    follows_weights,
    is_opaque,
    slot_shapes,
)
from metaopt.traces import Layout, choose_layout

__all__ = [
    "OF_NUMBER",
    "LearnedNumber",
    "Plan",
    "Spec",
    "patterns_by_leaf",
    "rules_by_leaf",
    "with_learned",
]


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype of an array."""

    shape: Shape
    dtype: Any


@dataclass(frozen=True, slots=True)
class Plan:
    """The leaves' rules, blocks and dtypes, and which traces are kept.

    Parameters
    ----------
    shapes : mapping of leaf to tuple of int
    rules : mapping of leaf to Rule
        Base update of each leaf.
    dtypes : mapping of leaf to dtype
        Compute dtype, the wider of the leaf's own and float32.
    beta_dtype : dtype
        The widest of these, in which blocks are held and sums are taken.
    blocks : Blocks
    layout : Layout
    curvature : {"none", "diagonal", "exact"}
        What the traces need: "none" also where nothing feeds back.
    feeding : mapping of leaf to tuple of str
        Slots whose traces are kept.
    beta_feeding : tuple of str
        Keys of `State.beta_trace`, empty where Y stays E.
    third : bool
        Whether `State.third_trace` is kept.
    horizons : tuple of int
        The leading axis of what each of several discounts has its own of: traces, averages, the
        meta update's moments and the meta-gradient. Empty where `discount` is one number.
    averaged : frozenset of str
        Leaves whose trace is the distance from their weights to an average of them, which is kept
        in its place (section 10).
    state : mapping of field to Spec or (nested) mapping of them
        What a `State` consists of.
    learned : mapping of name to Plan
        Of each number of a rule that is learned, with blocks and traces of its own; `rules` has the
        value that it starts from.
    place : str
        Of the plan of a learned number, where it stands in the rules of the leaves in `placed`.
    placed : frozenset of str
        The leaves whose step it has a part in; others are reached through the Hessian alone.
    in_direction : bool
        Whether a change of it reaches directions, and not only the decay of the weights.
    """

    shapes: Leaves[Shape]
    rules: Leaves[Rule]
    dtypes: Leaves[Any]
    beta_dtype: Any
    blocks: Blocks
    layout: Layout
    curvature: str
    feeding: Leaves[tuple[str, ...]]
    beta_feeding: tuple[str, ...]
    third: bool
    horizons: Shape
    averaged: frozenset[str]
    state: dict[str, Any]
    learned: Mapping[str, "Plan"] = field(default_factory=dict)
    place: str = ""
    placed: frozenset[str] = frozenset()
    in_direction: bool = True


@dataclass(frozen=True, slots=True)
class Following:
    """What the traces follow, given the rules."""

    curvature: str
    beta: bool = False
    third: bool = False
    average: bool = False


def following(
    rules: Leaves[Rule],
    meta: Rule,
    curvature: Curvature,
    approximation: str,
    discount: Any,
    *,
    whole: bool,
) -> Following:
    """Return the curvature that the traces need, and which of Y and Z are kept.

    `whole` says whether a change of the step size multiplies the whole step that it makes: without
    curvature the traces are then distances to averages of the weights.
    """
    if (isinstance(discount, float) and discount == 0.0) or curvature.kind == "none":
        return Following("none", average=whole)
    beta = approximation != "l" and follows_weights(meta)
    if not beta and not any(map(follows_weights, _distinct(rules).values())):
        return Following("none", average=whole)  # no direction depends on the weights
    return Following(curvature.kind, beta, third=beta and approximation == "full")


def _distinct(rules: Leaves[Rule]) -> dict[int, Rule]:
    """Return each rule once, by identity: one of a user's own need not be hashable."""
    return {id(rule): rule for rule in rules.values()}


def make_plan(
    xp: Namespace,
    shapes: Leaves[Shape],
    dtypes: Leaves[Any],
    *,
    rules: Leaves[Rule],
    meta: Rule,
    partition: Partition,
    follow: Following,
    traced: frozenset[str],
    horizons: Shape = (),
    recover: bool = False,
) -> Plan:
    """Return the plan for leaves of these shapes and dtypes; those in `traced` keep their traces.

    Raises
    ------
    ValueError
        If the partition does not fit the leaves, or dense traces are too large.
    """
    blocks = partition.bind(shapes)
    compute = per_leaf((name, compute_dtype(dtype, xp)) for name, dtype in dtypes.items())
    feeds = {
        key: feeding_slots(rule)
        for key, rule in _distinct(rules).items()
        if follow.curvature != "none"
    }
    feeding = per_leaf((name, feeds.get(id(rule), ())) for name, rule in rules.items())
    beta_feeding = ("beta", *feeding_slots(meta)) if follow.beta else ()
    beta_dtype = xp.float64 if xp.float64 in compute.values() else xp.float32
    layout = choose_layout(blocks, shapes, dense=follow.curvature == "exact", third=follow.third)
    plan = Plan(
        shapes=shapes,
        rules=rules,
        dtypes=compute,
        beta_dtype=beta_dtype,
        blocks=blocks,
        layout=layout,
        curvature=follow.curvature,
        feeding=feeding,
        beta_feeding=beta_feeding,
        third=follow.third,
        horizons=horizons,
        # a difference of narrower weights would have no more digits than they have; but where
        # steps are made elsewhere it may be all that is known of them
        averaged=frozenset(
            name
            for name, dtype in dtypes.items()
            if follow.average
            and name not in traced
            and (is_opaque(rules[name]) or not is_narrow(dtype, xp))
        ),
        state={},
    )
    own = (*meta.slots, *((DECIDED,) if horizons else ()))
    shared = (COMPENSATION, PEAK, *((SCALE, RECOVERIES) if recover else ()))
    return replace(plan, state=_state(plan, own, shared, xp.int32))


def _state(
    plan: Plan, own: tuple[str, ...], shared: tuple[str, ...], integer: Any
) -> dict[str, Any]:
    """Return the shape and dtype of every array of a state.

    Of the meta update's slots each horizon has its `own`, and others are `shared`.
    """
    layout, shapes, dtypes, several = plan.layout, plan.shapes, plan.dtypes, plan.horizons
    blocks, families = layout.blocks, len(layout.blocks.families)

    def per_block(columns: Shape = (), dtype: Any = plan.beta_dtype) -> Any:
        if blocks.partition.per_leaf:
            views = blocks.views.items()
            return per_leaf((name, Spec(columns + shape, dtype)) for name, shape in views)
        return Spec((*columns, blocks.size), dtype)

    def traces(slots: tuple[str, ...], name: str) -> Any:
        shape = several + layout.shape(shapes[name])
        return per_leaf((slot, Spec(shape, dtypes[name])) for slot in slots)

    return {
        "step": Spec((), integer),
        "count": per_leaf((name, Spec((), integer)) for name in shapes),
        "meta_count": per_block(dtype=integer),
        "beta": per_block(),
        "meta_slots": per_leaf(
            (slot, per_block(several if slot in own else ())) for slot in (*own, *shared)
        ),
        "slots": per_leaf(
            (
                name,
                per_leaf(
                    (slot, Spec(shape, dtypes[name]))
                    for slot, shape in slot_shapes(rule, shapes[name]).items()
                ),
            )
            for name, rule in plan.rules.items()
        ),
        "trace": per_leaf(
            (name, Spec(several + layout.shape(shape), dtypes[name]))
            for name, shape in shapes.items()
            if name not in plan.averaged
        ),
        "average": per_leaf(
            (name, Spec(several + shape, dtypes[name]))
            for name, shape in shapes.items()
            if name in plan.averaged
        ),
        "slot_traces": per_leaf(
            (name, traces(slots, name)) for name, slots in plan.feeding.items() if slots
        ),
        "beta_trace": per_leaf((key, per_block(layout.leading)) for key in plan.beta_feeding),
        "third_trace": per_leaf(
            (name, Spec(layout.leading * 2 + shape, dtypes[name])) for name, shape in shapes.items()
        )
        if plan.third
        else per_leaf(()),
        "meta_grad": per_block(several),
        "restarts": Spec((families if blocks.partition.per_leaf else blocks.size,), integer),
        "skipped": Spec((), integer),
        "learned": per_leaf(()),
    }


#: What a state has of a number of a rule that is learned, as it has of the step size.
OF_NUMBER = (
    *("beta", "meta_count", "meta_slots", "beta_trace", "meta_grad", "restarts"),
    *("trace", "slot_traces", "third_trace"),
)


@dataclass(frozen=True, slots=True)
class LearnedNumber:
    """A number of a rule that is learned.

    Parameters
    ----------
    place : str
        Where in the rule it stands.
    start : float
    placed : frozenset of str
        The leaves that have the rule.
    partition : Partition
    meta : Rule
        That of its own meta update.
    """

    place: str
    start: float
    placed: frozenset[str]
    partition: Partition
    meta: Rule


def with_learned(plan: Plan, numbers: Mapping[str, LearnedNumber]) -> Plan:
    """Return a plan in which numbers of rules are learned.

    Raises
    ------
    ValueError
        If a partition does not fit the leaves, or dense traces are too large.
    """
    if not numbers:
        return plan
    integer = plan.state["step"].dtype
    learned = {name: _of_number(plan, number, integer) for name, number in numbers.items()}
    states = per_leaf((name, number.state) for name, number in learned.items())
    return replace(plan, learned=learned, state=plan.state | {"learned": states})


def _of_number(plan: Plan, number: LearnedNumber, integer: Any) -> Plan:
    """Return the plan of a number that is learned."""
    curved, dense = plan.curvature != "none", plan.curvature == "exact"
    # through the Hessian every leaf depends on it
    names = [name for name in plan.shapes if dense or name in number.placed]
    own = {name: plan.shapes[name] for name in plan.shapes if name in number.placed}
    blocks = Partition.bind(number.partition, own)  # patterns need not match these leaves
    shapes = per_leaf((name, plan.shapes[name]) for name in names)
    rules = per_leaf((name, plan.rules[name]) for name in names)
    fed = {
        key: fed_by(rule, number.place, number.start)
        for key, rule in _distinct(rules).items()
        if any(rules[name] is rule for name in own)
    }
    feeding = {
        key: feeding_slots(rule) if curved else fed[key][1]
        for key, rule in _distinct(rules).items()
    }
    found = replace(
        plan,
        shapes=shapes,
        rules=rules,
        dtypes=per_leaf((name, plan.dtypes[name]) for name in names),
        blocks=blocks,
        layout=choose_layout(blocks, shapes, dense=dense, third=plan.third),
        feeding=per_leaf((name, feeding[id(rule)]) for name, rule in rules.items()),
        beta_feeding=("beta", *feeding_slots(number.meta)) if plan.beta_feeding else (),
        horizons=(),
        averaged=frozenset(),
        place=number.place,
        placed=number.placed,
        in_direction=curved or any(direct or slots for direct, slots in fed.values()),
    )
    state = _state(found, number.meta.slots, (COMPENSATION, PEAK), integer)
    return replace(found, state={name: state[name] for name in OF_NUMBER})


def rules_by_leaf(
    base: Rule | Mapping[str, Rule], leaves: Leaves[Any], what: str = "base"
) -> Leaves[Rule]:
    """Return the rule of each leaf: the one rule, or that of the first pattern that matches.

    `what` is the argument that patterns are of, in messages.

    Raises
    ------
    ValueError
        If no pattern matches a leaf, or a pattern is the first match of none.
    """
    if not isinstance(base, Mapping):
        return per_leaf((name, base) for name in leaves)
    return per_leaf((name, base[key]) for name, key in patterns_by_leaf(base, leaves, what).items())


def patterns_by_leaf(
    base: Mapping[str, Any], leaves: Leaves[Any], what: str = "base"
) -> Leaves[str]:
    """Return the pattern of each leaf: the first that matches; raise as `rules_by_leaf` does."""
    patterns = list(base)
    won = {name: first_match(name, patterns) for name in leaves}
    for name, index in won.items():
        if index is None:
            msg = f'`{what}` has no pattern that matches leaf {name!r}; add one, or a last one "*".'
            raise ValueError(msg)
    for index, pattern in enumerate(patterns):
        if index not in won.values():
            msg = (
                f"`{what}` pattern {pattern!r} is the first match of no leaf; leaves: "
                f"{', '.join(leaves)}."
            )
            raise ValueError(msg)
    return per_leaf((name, patterns[index or 0]) for name, index in won.items())
