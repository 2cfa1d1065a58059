"""Numbers of a rule that are learned in place of being given."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias

from metaopt.arrays import is_number

__all__ = [
    "Learned",
    "Number",
    "at_start",
    "bound",
    "field_of",
    "layers",
    "learned_in",
    "learned_number",
    "within",
]


@dataclass(frozen=True, slots=True)
class Learned:
    """A hyperparameter of a base update that is learned, in the place of its number.

    docs/mathematics.md section 15: `metaopt.AdamW(weight_decay=metaopt.Learned(0.1))`. It is
    learned as step sizes are, with `meta`, but without a `FastStart`. Equal ones in the same place
    of several rules are one number.

    Parameters
    ----------
    start : float
        Value to start from; inside the range of the map.
    map : {"decay", "exp", "identity", "softplus"} or StepSizeMap, optional
        From what is learned to the value. By default what the rule says of the number: "decay", the
        logarithm of 1 - value, for decay rates, and "exp", the logarithm, for weight decay and
        `eps`.
    meta_lr : float, optional
        Step size of the meta update; by default 1e-3. With 0 the number stays what it is.
    bounds : (float, float), optional
        Least and largest value.
    blocks : optional
        Which weights share a value, as `metaopt.MetaOptimize` takes it; by default those that share
        a step size.
    name : str, optional
        What it is called in `hyperparameters` and in states; by default by its place in the rule,
        after a pattern of `base` where another rule has another number there.

    Raises
    ------
    TypeError
        If `start` is no number, or `name` no string.
    ValueError
        If it is not finite, or `name` is empty; from the rule or the optimizer, if it does not fit.
    """

    start: float
    map: Any = None
    meta_lr: Any = None
    bounds: tuple[float, float] | None = None
    blocks: Any = None
    name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.start, bool) or not is_number(self.start):
            msg = f"`start` of a Learned must be a number; got {self.start!r}."
            raise TypeError(msg)
        start = float(self.start)
        if not abs(start) < float("inf"):
            msg = f"`start` of a Learned must be finite; got {self.start!r}."
            raise ValueError(msg)
        object.__setattr__(self, "start", start)
        if self.name is not None and not isinstance(self.name, str):
            msg = f"`name` of a Learned must be a string; got {self.name!r}."
            raise TypeError(msg)
        if self.name == "":
            msg = "`name` of a Learned must not be empty; leave it out for the usual one."
            raise ValueError(msg)
        for name in ("bounds", "blocks"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))


#: What a hyperparameter may be.
Number: TypeAlias = float | Learned


def learned_number(name: str, learned: Learned, lo: float, hi: float) -> Learned:
    """Return a number that is learned, or raise unless it starts inside of what it may be.

    The least value itself is inside where a map of one's own may reach it.
    """
    above = lo < learned.start or (lo == learned.start and learned.map is not None)
    if not above or not learned.start < hi:
        msg = (
            f"`{name}` must start between {lo:g} and {hi:g}, exclusively, to be learned; got "
            f"{learned.start:g}."
        )
        raise ValueError(msg)
    return learned


def learned_in(rule: Any) -> dict[str, Learned]:
    """Return the numbers of a rule that are learned, by place: "eps", or "betas[0]" in a tuple.

    Of the rule within, where one is around another.
    """
    if not is_dataclass(rule):
        return {}
    if within(rule) is not None:
        return learned_in(within(rule))
    found = {}
    for field in fields(rule):
        value = getattr(rule, field.name)
        if isinstance(value, Learned):
            found[field.name] = value
        elif isinstance(value, tuple):
            places = ((f"{field.name}[{index}]", part) for index, part in enumerate(value))
            found |= {place: part for place, part in places if isinstance(part, Learned)}
    return found


def within(rule: Any) -> Any:
    """Return the rule that one is around; None for one that is by itself."""
    inner = getattr(rule, "rule", None)
    return inner if is_dataclass(inner) else None


def layers(rule: Any) -> Iterator[Any]:
    """Yield a rule, the one that it is around, and so on."""
    while rule is not None:
        yield rule
        rule = within(rule)


def field_of(place: str) -> str:
    """Return the field of a rule that a place is in."""
    return place.partition("[")[0]


def bound(rule: Any, values: Mapping[str, Any]) -> Any:
    """Return a rule with values in some places; itself where there are none."""
    if not values:
        return rule
    if within(rule) is not None:
        return replace(rule, rule=bound(within(rule), values))
    changed: dict[str, Any] = {}
    for place, value in values.items():
        name = field_of(place)
        index = re.search(r"\[(\d+)\]$", place)
        if index is None:
            changed[name] = value
        else:
            parts = list(changed.get(name, getattr(rule, name)))
            parts[int(index[1])] = value
            changed[name] = tuple(parts)
    return replace(rule, **changed)


def at_start(rule: Any) -> Any:
    """Return a rule with the numbers that its learned ones start from; itself without any."""
    return bound(rule, {place: learned.start for place, learned in learned_in(rule).items()})
