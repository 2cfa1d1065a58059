"""What an update rule is."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeAlias

import numpy as np

from metaopt.arrays import ArrayT, is_number
from metaopt.jets import Jet

__all__ = ["Rule", "Slots"]

Slots: TypeAlias = Mapping[str, ArrayT]


class Rule(Protocol):
    """A first-order update, written as one formula for its direction.

    The same rule serves as base update on the weights and as meta update on the step sizes, but
    for `FastStart`.
    A rule of your own is a frozen dataclass with these members; see docs/mathematics.md section 5.
    """

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays of state kept per parameter, all of its shape and zero at first."""
        ...

    @property
    def weight_decay(self) -> float:
        """Decoupled weight decay: the parameters lose step size times this times themselves."""
        ...

    def direction(
        self, grad: ArrayT, slots: Slots[ArrayT], count: ArrayT
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Return the direction u, of the shape and dtype of `grad`, and the next slots.

        Called with arrays, or with a jet for every argument; use operators with Python numbers
        and the functions of `metaopt.numerics`, and no branch on a value. A rule that does
        otherwise, such as one that is not elementwise, runs with `curvature="none"` alone.

        Parameters
        ----------
        grad : array
        slots : mapping of slot name to array
        count : array, shape (), dtype of `grad`
            Number of this step, the first being 1.
        """
        ...

    def without_momentum(self) -> Self | Any:
        """Return the rule whose direction is u0 of `trace="gradient"`, section 10.

        Raises
        ------
        ValueError
            If the rule has no such form.
        """
        ...


def feeding_slots(rule: Rule) -> tuple[str, ...]:
    """Return the slots whose change can reach the direction of this or a later step.

    Found by pushing a change of each slot through the formula and seeing where it arrives.
    """
    reaches: dict[str, set[str]] = {}
    direct = set()
    for slot in rule.slots:
        direction, slots = _push(rule, slot)
        reaches[slot] = {name for name, jet in slots.items() if jet.first is not None}
        if direction.first is not None:
            direct.add(slot)
    feeding = direct
    while more := {slot for slot in rule.slots if reaches[slot] & feeding} - feeding:
        feeding = feeding | more
    return tuple(slot for slot in rule.slots if slot in feeding)


def follows_gradient(rule: Rule) -> bool:
    """Say whether a change of the gradient can change the direction of this or a later step."""
    direction, slots = _push(rule, "grad")
    feeding = feeding_slots(rule)
    return direction.first is not None or any(slots[name].first is not None for name in feeding)


def _push(rule: Rule, source: str) -> tuple[Jet[Any], dict[str, Jet[Any]]]:
    """Run the formula on ones, with a change of `source` ("grad" or a slot) alone."""
    one = np.ones(())
    jets = {name: Jet(one, one if name == source else None) for name in ("grad", *rule.slots)}
    grad = jets.pop("grad")
    return rule.direction(grad, jets, Jet(one))


def decay_rate(name: str, value: Any) -> Any:
    """Return a decay rate as a Python float, or raise unless it lies in [0, 1)."""
    number = as_number(name, value)
    if isinstance(number, float) and not 0.0 <= number < 1.0:
        msg = f"`{name}` must lie in [0, 1); got {value}."
        raise ValueError(msg)
    return number


def decay_rates(name: str, values: Any) -> tuple[Any, Any]:
    """Return two decay rates, or raise unless there are two in [0, 1)."""
    if not isinstance(values, tuple | list) or len(values) != 2:
        msg = f"`{name}` must be two numbers in [0, 1); got {values!r}."
        raise ValueError(msg)
    return decay_rate(f"{name}[0]", values[0]), decay_rate(f"{name}[1]", values[1])


def not_negative(name: str, value: Any) -> Any:
    """Return a hyperparameter as a Python float, or raise unless it is finite and at least 0."""
    number = as_number(name, value)
    if isinstance(number, float) and not 0.0 <= number < math.inf:
        msg = f"`{name}` must be finite and not negative; got {value}."
        raise ValueError(msg)
    return number


def check_rule(name: str, rule: Any) -> None:
    """Raise TypeError unless `rule` has what a rule must have."""
    members = ("slots", "weight_decay", "direction")
    if isinstance(rule, type) or not all(hasattr(rule, member) for member in members):
        msg = f"`{name}` must be a rule such as metaopt.AdamW(); got {rule!r}."
        raise TypeError(msg)


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


def refuse_delayed(rule: Any) -> None:
    """Raise for a rule with delayed moments, which has no form without momentum."""
    if rule.delayed:
        msg = f'`trace="gradient"` is not defined for delayed moments; got {rule!r}.'
        raise ValueError(msg)
