"""What an update rule is."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from metaopt.arrays import ArrayT, Shape, is_number
from metaopt.jets import Jet
from metaopt.rules.learned import Learned, Number, bound, learned_number, within

__all__ = [
    "Rule",
    "Slots",
    "decay_step_size",
    "in_role",
    "is_opaque",
    "scope_of",
    "slot_shapes",
    "weight_decay_at",
]

Slots: TypeAlias = Mapping[str, ArrayT]

#: What a rule may be handed at once: any of a leaf's weights, or the leaf in its own shape.
SCOPES = ("weight", "leaf")


class Rule(Protocol):
    """A first-order update, written as one formula for its direction.

    The same rule serves as base update on the weights and as meta update on the step sizes, but
    for `FastStart`.
    A rule of your own is a frozen dataclass with these members; docs/your_own_rule.md has five.

    Five more members are optional:

    scope : {"weight", "leaf"}, default "leaf"
        "weight" says that the direction is elementwise: weights may be flattened, packed, cut and
        sharded, kernels generated, and with curvature the formula is fed with jets. What is not
        provably elementwise is refused when an optimizer is made. A rule of scope "leaf" is
        handed whole leaves in their own shapes, and goes with `curvature="none"`.
    uses_param : bool, default False
        Whether `direction` takes the weights as its fourth argument, `param`; base updates alone.
    slot_shapes : method from the leaf's shape to a mapping of slot name to shape
        For scope "leaf": the shapes of slots that have not the leaf's.
    learnable : mapping of field to "decay" or "exp", default empty
        The fields that may hold a `metaopt.Learned`, or a tuple of numbers in which one is: decay
        rates, which lie between 0 and 1, and other positive numbers. A rule is then made anew, with
        an array or a jet in the place of the number, for every step: what checks such a field has
        to let all three pass.
    decay_step_size : float or None, default None
        Step size of weight decay, before the multiplier `lr`; None for the learned one. A field,
        in whose place an array is put for every step.
    """

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays of state kept per parameter, of its shape and zero at first."""
        ...

    @property
    def weight_decay(self) -> Number:
        """Decoupled weight decay: the parameters lose step size times this times themselves."""
        ...

    def direction(
        self, grad: ArrayT, slots: Slots[ArrayT], count: ArrayT
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Return the direction u, of the shape and dtype of `grad`, and the next slots.

        Of scope "weight", called with arrays, or with a jet for every argument: use operators with
        Python numbers and the functions of `metaopt.numerics`, and no branch on a value.

        Parameters
        ----------
        grad : array
        slots : mapping of slot name to array
        count : array, shape (), dtype of `grad`
            Number of this step, the first being 1.
        """
        ...


def scope_of(rule: Rule) -> str:
    """Return the scope of a rule, "weight" or "leaf"; the latter where it does not say."""
    return getattr(rule, "scope", "leaf")


def uses_param(rule: Rule) -> bool:
    """Say whether the direction of a rule takes the weights."""
    return getattr(rule, "uses_param", False)


def decay_step_size(rule: Rule) -> Any:
    """Return the step size of a rule's weight decay; None where it is the learned one."""
    return getattr(rule, "decay_step_size", None)


def weight_decay_at(rule: Rule, step_size: float) -> Any:
    """Return the weight decay that takes as much at a fixed step size, where it is coupled to it.

    docs/mathematics.md section 5, *Weight decay apart*.
    """
    own = decay_step_size(rule)
    return rule.weight_decay if own is None else rule.weight_decay * own / step_size


def learnable(rule: Rule) -> Mapping[str, str]:
    """Return the fields of a rule, or the one within, that may be learned, and the map of each."""
    return getattr(rule if within(rule) is None else within(rule), "learnable", {})


def is_opaque(rule: Rule) -> bool:
    """Say whether the steps of a rule are made elsewhere: see `metaopt.Opaque`."""
    return getattr(rule, "opaque", False)


def slot_shapes(rule: Rule, shape: Shape) -> dict[str, Shape]:
    """Return the shape of each slot of a leaf of this shape.

    Raises
    ------
    ValueError
        If the rule gives a shape for what is no slot of it, or one that is no shape.
    """
    own = rule.slot_shapes(shape) if hasattr(rule, "slot_shapes") else {}
    for slot, found in own.items():
        if slot not in rule.slots:
            msg = f"`slot_shapes` of {rule!r} has {slot!r}, which `slots` does not name."
            raise ValueError(msg)
        if not isinstance(found, tuple) or not all(isinstance(n, int) and n >= 0 for n in found):
            msg = f"`slot_shapes` of {rule!r} must give tuples of int; got {found!r} for {slot!r}."
            raise ValueError(msg)
    return {slot: own.get(slot, shape) for slot in rule.slots}


class ResultError(ValueError):
    """A rule that returns, or asks for, what it has not declared; the message says what."""


class _Declared(dict[str, Any]):
    """Slots that say which rule asks for one that it did not declare."""

    def __init__(self, rule: Rule, slots: Mapping[str, Any]) -> None:
        super().__init__(slots)
        self._rule = rule

    def __missing__(self, slot: str) -> Any:
        msg = f"{self._rule!r} asks for slot {slot!r}; its `slots` are {tuple(self._rule.slots)}."
        raise ResultError(msg)


def direction_of(
    rule: Rule, grad: Any, slots: Mapping[str, Any], count: Any, param: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Return what `direction` of a rule does, handing it the weights if it takes them.

    What a rule of scope "leaf" returns is checked here, in every step; of scope "weight" it has
    been proved once, by `metaopt.rules.elementwise.check_elementwise`.
    """
    more = (param,) if uses_param(rule) else ()
    result = rule.direction(grad, _Declared(rule, slots), count, *more)
    return result if scope_of(rule) == "weight" else checked(rule, result, grad, slots)


def checked(
    rule: Rule, result: Any, grad: Any, slots: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return a direction and the next slots, or raise ResultError unless they fit these."""
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
        msg = f"`direction` of {rule!r} must return a direction and a mapping of slots."
        raise ResultError(msg)
    direction, new = result
    if new.keys() != slots.keys():
        odd = [f"lacks slot {slot!r}" for slot in slots if slot not in new]
        odd += [f"has slot {slot!r}, unknown to `slots`" for slot in new if slot not in slots]
        msg = f"What `direction` of {rule!r} returns {odd[0]}; expected exactly {list(slots)}."
        raise ResultError(msg)
    pairs = {"the direction": (direction, grad)}
    pairs |= {f"slot {slot!r}": (new[slot], old) for slot, old in slots.items()}
    for what, (found, like) in pairs.items():
        want, got = _outline(like), _outline(found)
        if want != got:
            msg = f"`direction` of {rule!r} must return {what} as {want}; got {got}."
            raise ResultError(msg)
    return direction, dict(new)


def _outline(value: Any) -> str:
    """Return shape and dtype of an array in words, the type of anything else."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return f"a {type(value).__name__}"
    return f"shape {tuple(value.shape)} and dtype {value.dtype}"


def in_role(rule: Any, role: str) -> Any:
    """Return a rule as it acts in a role, "base" or "meta": some have another `eps` in either.

    Itself where it is that already, so that what is compiled for it stays.
    """
    return rule.in_role(role) if hasattr(rule, "in_role") else rule


def feeding_slots(rule: Rule) -> tuple[str, ...]:
    """Return the slots whose change can reach the direction of this or a later step.

    Found by pushing a change of each slot through the formula and seeing where it arrives.
    """
    reaches, feeding = _reached(rule)
    while more := {slot for slot in rule.slots if reaches[slot] & feeding} - feeding:
        feeding = feeding | more
    return tuple(slot for slot in rule.slots if slot in feeding)


def _reached(rule: Rule) -> tuple[dict[str, set[str]], set[str]]:
    """Return which next slots a change of each slot reaches, and which reach the direction."""
    reaches: dict[str, set[str]] = {}
    direct = set()
    for slot in rule.slots:
        direction, slots = _push(rule, slot)
        reaches[slot] = {name for name, jet in slots.items() if jet.first is not None}
        if direction.first is not None:
            direct.add(slot)
    return reaches, direct


def fed_by(rule: Rule, place: str, start: float) -> tuple[bool, tuple[str, ...]]:
    """Say whether a number of a rule changes this direction, and which slots carry its change.

    Those alone that feed back: their change reaches the direction of this or a later step. The
    weight decay of a rule that sees whole leaves, through which no jets go, is in no direction.
    """
    if scope_of(rule) == "leaf":
        return False, ()
    one = np.ones(())
    direction, slots = _push(bound(rule, {place: Jet(one * start, one)}), "")
    reaches, _ = _reached(rule)
    feeding = set(feeding_slots(rule))
    found = {slot for slot, jet in slots.items() if jet.first is not None} & feeding
    while more := {name for slot in found for name in reaches[slot] & feeding} - found:
        found = found | more
    return direction.first is not None, tuple(slot for slot in rule.slots if slot in found)


def follows_weights(rule: Rule) -> bool:
    """Say whether a change of the weights can change the direction of this or a later step.

    It does so through the gradient, or directly where the rule takes the weights.
    """
    feeding = feeding_slots(rule)
    for source in ("grad", "param") if uses_param(rule) else ("grad",):
        direction, slots = _push(rule, source)
        if direction.first is not None or any(slots[name].first is not None for name in feeding):
            return True
    return False


def _push(rule: Rule, source: str) -> tuple[Jet[Any], Mapping[str, Jet[Any]]]:
    """Run the formula on ones, with a change of `source`: a slot, "grad" or "param"."""
    one = np.ones(())
    jets = {
        name: Jet(one, one if name == source else None) for name in ("grad", "param", *rule.slots)
    }
    slots = {slot: jets[slot] for slot in rule.slots}
    return direction_of(rule, jets["grad"], slots, Jet(one), jets["param"])


def decay_rate(name: str, value: Any) -> Any:
    """Return a decay rate as a Python float, or raise unless it lies in [0, 1)."""
    if isinstance(value, Learned):
        return learned_number(name, value, 0.0, 1.0)
    number = as_number(name, value)
    if isinstance(number, float) and not 0.0 <= number < 1.0:
        msg = f"`{name}` must lie in [0, 1); got {value}."
        raise ValueError(msg)
    return number


def decay_rates(name: str, values: Any) -> tuple[Any, Any]:
    """Return two decay rates, or raise unless there are two in [0, 1)."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 2:
        msg = f"`{name}` must be two numbers in [0, 1); got {values!r}."
        raise ValueError(msg)
    return decay_rate(f"{name}[0]", values[0]), decay_rate(f"{name}[1]", values[1])


def not_negative(name: str, value: Any) -> Any:
    """Return a hyperparameter as a Python float, or raise unless it is finite and at least 0."""
    if isinstance(value, Learned):
        return learned_number(name, value, 0.0, math.inf)
    number = as_number(name, value)
    if isinstance(number, float) and not 0.0 <= number < math.inf:
        msg = f"`{name}` must be finite and not negative; got {value}."
        raise ValueError(msg)
    return number


def optional(name: str, value: Any) -> Any:
    """Return a hyperparameter as `not_negative` does, or None where it is left out."""
    return None if value is None else not_negative(name, value)


def check_rule(name: str, rule: Any) -> None:
    """Raise TypeError unless `rule` has what a rule must have."""
    members = ("slots", "weight_decay", "direction")
    if isinstance(rule, type) or not all(hasattr(rule, member) for member in members):
        msg = f"`{name}` must be a rule such as metaopt.AdamW(); got {rule!r}."
        raise TypeError(msg)
    if scope_of(rule) not in SCOPES:
        msg = f'`{name}` must have the `scope` "weight" or "leaf"; got {scope_of(rule)!r}.'
        raise ValueError(msg)
    if scope_of(rule) == "weight" and hasattr(rule, "slot_shapes"):
        msg = (
            f'`{name}` has `slot_shapes`, which go with the `scope` "leaf"; slots of scope '
            f'"weight" have the shape of the leaf. Got {rule!r}.'
        )
        raise ValueError(msg)


def as_number(name: str, value: Any) -> Any:
    """Return a number as a Python float: NumPy's would promote the arrays it meets.

    Jets and arrays, for derivatives with respect to a hyperparameter, pass as they are.
    """
    if isinstance(value, int) and abs(value) >= 2**1023:
        return math.inf if value > 0 else -math.inf
    if is_number(value):
        return float(value)
    if isinstance(value, Jet) or (hasattr(value, "dtype") and not isinstance(value, np.generic)):
        return value
    msg = f"`{name}` must be a number; got {value!r}."
    raise TypeError(msg)


def settle(rule: Any, **fields: Any) -> None:
    """Set fields of a frozen rule while it is being made."""
    for name, value in fields.items():
        object.__setattr__(rule, name, value)
