"""The numbers of a base rule that parameter groups hold: weight decay, betas, momentum, eps."""

from collections.abc import Iterable, Mapping
from dataclasses import Field, fields, is_dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from metaopt.rules import Rule

__all__ = [
    "Number",
    "adjusted",
    "agreed",
    "arguments",
    "as_numbers",
    "hyperparameters",
    "overrides",
    "with_arrays",
]

#: What names of arrays begin with that stand for hyperparameters in a pass.
PREFIX = "rule."

Number: TypeAlias = float | tuple[float, ...]


def hyperparameters(rule: Rule) -> dict[str, Number]:
    """Return the floats, and tuples of them, that a parameter group may say otherwise."""
    found: dict[str, Number] = {"weight_decay": rule.weight_decay}
    known: tuple[Field[Any], ...] = fields(rule) if is_dataclass(rule) else ()
    for field in known:
        value = getattr(rule, field.name)
        if isinstance(value, float) or (
            isinstance(value, tuple) and all(isinstance(number, float) for number in value)
        ):
            found[field.name] = value
    return found


def agreed(rules: Iterable[Rule]) -> dict[str, Number]:
    """Return the hyperparameters that all of these rules have, with one value.

    Zeros are left out, but that of weight decay: a rule without momentum has no state for any.
    """
    each = [hyperparameters(rule) for rule in rules]
    return {
        name: value
        for name, value in (each[0] if each else {}).items()
        if (value or name == "weight_decay") and all(other.get(name) == value for other in each)
    }


def overrides(own: Mapping[str, Number], group: Mapping[str, Any]) -> dict[str, Number]:
    """Return what a group says of the hyperparameters `own` of a rule, where it differs."""
    found = {}
    for name, value in own.items():
        said = group.get(name)
        said = tuple(said) if isinstance(said, list) else said
        if said is not None and said != value:
            found[name] = said
    return found


def arguments(own: Mapping[str, Number], group: Mapping[str, Any]) -> dict[str, Number]:
    """Return the hyperparameters that a pass is handed, the rule's `own` being constants in it.

    Weight decay is among them wherever there is any: it may have a schedule, and what is constant
    is compiled anew when it changes.
    """
    decay = own["weight_decay"] if group["weight_decay"] is None else group["weight_decay"]
    return ({"weight_decay": decay} if decay else {}) | overrides(own, group)


def adjusted(rule: Rule, group: Mapping[str, Any], made: dict[Any, Rule]) -> Rule:
    """Return a rule with the hyperparameters of a group; equal ones are one object of `made`.

    ValueError or TypeError is raised for a value that the rule cannot have, or with which it would
    keep other state.
    """
    changed = overrides(hyperparameters(rule), group)
    if not changed:
        return rule
    key = (id(rule), *changed.items())
    if key not in made:
        new: Rule = replace(rule, **changed)  # type: ignore[type-var]
        if new.slots != rule.slots:
            name = next(name for name in changed if name != "weight_decay")
            msg = (
                f"`{name}` of a group cannot be {changed[name]!r} where `base` is {rule!r}: "
                f"that would keep other state. Say it in the rule."
            )
            raise ValueError(msg)
        made[key] = new
    return made[key]


def as_numbers(changed: Mapping[str, Number]) -> dict[str, float]:
    """Return hyperparameters as single numbers, under the names that `with_arrays` looks for."""
    found: dict[str, float] = {}
    for name, value in changed.items():
        if isinstance(value, tuple):
            found |= {f"{PREFIX}{name}.{index}": float(part) for index, part in enumerate(value)}
        else:
            found[f"{PREFIX}{name}"] = float(value)
    return found


def with_arrays(rule: Rule, arrays: Mapping[str, Tensor]) -> Rule:
    """Return a rule with those of its hyperparameters that are among the arguments of a pass."""
    changed: dict[str, Any] = {}
    for key, array in arrays.items():
        if key.startswith(PREFIX):
            name, *index = key.removeprefix(PREFIX).split(".")
            changed[name] = (*changed.get(name, ()), array) if index else array
    return replace(rule, **changed) if changed else rule  # type: ignore[type-var]
