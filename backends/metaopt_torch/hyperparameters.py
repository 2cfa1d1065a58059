"""The numbers of a base rule that parameter groups hold: weight decay, betas, momentum, eps."""

from collections.abc import Iterable, Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any, TypeAlias

from torch import Tensor

import metaopt as mo
from metaopt.rules import Rule
from metaopt.rules.learned import bound, field_of, layers, learned_in, within
from metaopt.rules.rule import decay_step_size

__all__ = [
    "DECAY_STEP_SIZE",
    "PREFIX",
    "Number",
    "adjusted",
    "agreed",
    "arguments",
    "as_numbers",
    "check_not_learned",
    "hyperparameters",
    "misplaced",
    "overrides",
    "with_arrays",
]

#: The hyperparameter that the multiplier `lr` multiplies as it does the step size.
DECAY_STEP_SIZE = "decay_step_size"
#: Prefix of the names of those arguments of a pass that are hyperparameters.
PREFIX = "rule."

Number: TypeAlias = float | tuple[float, ...]


def hyperparameters(rule: Rule) -> dict[str, Number]:
    """Return the floats, and tuples of them, that a parameter group may say otherwise.

    Those of the rule within, where one is around another.
    """
    if within(rule) is not None:
        return hyperparameters(within(rule))
    decay = rule.weight_decay
    found: dict[str, Number] = {} if isinstance(decay, mo.Learned) else {"weight_decay": decay}
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
    """Return what a group says of the hyperparameters `own` of a rule, where it differs.

    ValueError is raised where that is to be learned.
    """
    found = {}
    # where weight decay is learned it is not in `own`, and a group may say a number instead
    names: dict[str, Any] = {**own, **({} if "weight_decay" in own else {"weight_decay": None})}
    for name, value in names.items():
        said = group.get(name)
        said = tuple(said) if isinstance(said, list) else said
        if said is not None and said != value:
            check_not_learned(name, said)
            found[name] = said
    return found


def check_not_learned(name: str, said: Any) -> None:
    """Raise ValueError where a group, or the constructor, says a number that is to be learned."""
    if any(isinstance(number, mo.Learned) for number in (said if type(said) is tuple else (said,))):
        msg = (
            f"`{name}` of parameters must be numbers; got {said!r}. Give what is to be learned in "
            "the rule, as `base=metaopt.AdamW(weight_decay=metaopt.Learned(0.1))`; for some "
            "parameters alone, in a rule by a pattern of `base`."
        )
        raise ValueError(msg)


def _said_in_vain(rule: Rule, group: Mapping[str, Any]) -> str | None:
    """Return a hyperparameter that a group says although its rule learns it, None without one.

    Weight decay may be said: it takes the place of the learned one.
    """
    names = {field_of(place): None for place in learned_in(rule)}
    return next((n for n in names if n != "weight_decay" and group.get(n) is not None), None)


def arguments(own: Mapping[str, Number], group: Mapping[str, Any]) -> dict[str, Number]:
    """Return the hyperparameters that are arguments of a pass; others of `own` are constants in it.

    These are what the group says otherwise, and weight decay and its step size wherever there are
    any. Schedules may change those, and a pass is compiled anew when a constant changes.
    """
    decay = own.get("weight_decay") if group["weight_decay"] is None else group["weight_decay"]
    found = {"weight_decay": decay} if decay else {}
    learned = "weight_decay" not in own and group["weight_decay"] is None
    if (decay or learned) and DECAY_STEP_SIZE in own:
        found[DECAY_STEP_SIZE] = own[DECAY_STEP_SIZE]
    return found | overrides(own, group)


def adjusted(rule: Rule, group: Mapping[str, Any], made: dict[Any, Rule]) -> Rule:
    """Return a rule with the hyperparameters of a group; equal ones are one object of `made`.

    ValueError or TypeError is raised for a value that the rule cannot have, or with which it would
    keep other state, or in whose place is one that is learned.
    """
    vain = _said_in_vain(rule, group)
    if vain is not None:
        msg = (
            f"`{vain}` of a group is {group[vain]!r}, but `base` learns it, in {rule!r}: leave it "
            "out of the group, and give these parameters another rule by a pattern of `base`."
        )
        raise ValueError(msg)
    changed = overrides(hyperparameters(rule), group)
    if _lacks_decay_step_size(rule, group):
        msg = (
            f"`{DECAY_STEP_SIZE}` of a group is {group[DECAY_STEP_SIZE]!r}, but that of its rule "
            f"is None, in {rule!r}: say one there, which groups may change then."
        )
        raise ValueError(msg)
    if not changed:
        return rule
    key = (id(rule), *changed.items())
    if key not in made:
        new: Rule = bound(rule, changed)
        if new.slots != rule.slots:
            name = next(name for name in changed if name != "weight_decay")
            msg = (
                f"`{name}` of a group cannot be {changed[name]!r} where `base` is {rule!r}: "
                f"that would keep other state. Say it in the rule."
            )
            raise ValueError(msg)
        made[key] = new
    return made[key]


def misplaced(rule: Rule, group: Mapping[str, Any]) -> bool:
    """Return whether a group says a number that its rule learns or has no place for.

    It would have no effect: `adjusted` raises.
    """
    return _said_in_vain(rule, group) is not None or _lacks_decay_step_size(rule, group)


def _lacks_decay_step_size(rule: Rule, group: Mapping[str, Any]) -> bool:
    """Return whether a group says `decay_step_size`, which its rule has as a field that is None."""
    if group.get(DECAY_STEP_SIZE) is None:
        return False
    *_, inner = layers(rule)
    known = is_dataclass(inner) and any(field.name == DECAY_STEP_SIZE for field in fields(inner))
    return known and decay_step_size(inner) is None


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
    new: Rule = bound(rule, changed)
    return new
