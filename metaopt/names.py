"""Rules by name, as configuration files and trainers hand them over: in strings and mappings."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from metaopt import rules

__all__ = ["base_of", "plain", "rule_of"]

#: Names of rules that are other rules' with other defaults in the field: none have decay here.
ALIASES = {"adam": "adamw", "nadam": "nadamw"}


def rule_of(argument: str, given: Any) -> Any:
    """Return the rule that a name stands for, or a mapping with a name; anything else as it is.

    Parameters
    ----------
    argument : str
        What messages call it.
    given : str, mapping or Rule
        "adamw", {"name": "adamw", "betas": [0.9, 0.99]}, or in place of the name of a shipped rule
        the dotted path of a class, "my_rules.Sign". Case, "_" and "-" do not matter in names.

    Raises
    ------
    ValueError, TypeError
        If there is no such rule, it has no such option, or an option has a wrong value.
    """
    if isinstance(given, str):
        given = {"name": given}
    if not _is_spec(given):
        return given
    options = {key: plain(value) for key, value in given.items() if key != "name"}
    cls = _class(argument, given["name"])
    known: tuple[Field[Any], ...] = fields(cls) if is_dataclass(cls) else ()
    names = [field.name for field in known if field.init]
    for option in options if names else ():
        if option not in names:
            msg = f"`{argument}` {given['name']!r} has no option {option!r}{_close(option, names)}."
            raise ValueError(msg)
    if "rule" in options:  # one around another, as FastStart is
        options["rule"] = rule_of(f"{argument}.rule", options["rule"])
    try:
        return cls(**options)
    except TypeError as error:
        msg = f"`{argument}` {given['name']!r} cannot be made of {options}: {error}"
        raise TypeError(msg) from error


def base_of(given: Any) -> Any:
    """Return `base` with rules in the place of names: one rule, or rules by pattern."""
    if isinstance(given, Mapping) and not _is_spec(given):
        return {pattern: rule_of(f"base[{pattern!r}]", rule) for pattern, rule in given.items()}
    return rule_of("base", given)


def plain(value: Any) -> Any:
    """Return lists, such as those of JSON and OmegaConf, as tuples, and mappings as dicts."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(plain, value))
    return value


def _is_spec(given: Any) -> bool:
    """Say whether this is a mapping with the name of a rule, and not one of patterns to rules."""
    return isinstance(given, Mapping) and isinstance(given.get("name"), str)


def _class(argument: str, name: str) -> Any:
    """Return the class that a name or a dotted path stands for."""
    shipped = {cls.__name__.lower(): cls for cls in rules.SHIPPED}
    found = _folded(name)
    if ALIASES.get(found, found) in shipped:
        return shipped[ALIASES.get(found, found)]
    module, dot, attribute = name.rpartition(".")
    if not dot:
        msg = (
            f"`{argument}` must be a rule or the name of one; got {name!r}"
            f"{_close(found, [*shipped, *ALIASES])}. A rule of your own is named by the dotted "
            'path of its class, "module.Class".'
        )
        raise ValueError(msg)
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        msg = f"`{argument}` must be the dotted path of a rule's class; got {name!r}: {error}."
        raise ValueError(msg) from error
    if not isinstance(cls, type):
        msg = f"`{argument}` must be the dotted path of a rule's class; {name!r} is {cls!r}."
        raise TypeError(msg)
    return cls


def _folded(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _close(name: str, names: Sequence[str]) -> str:
    """Return how a message goes on: by what was meant, perhaps, and by what there is."""
    close = get_close_matches(name, names, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    return f"{meant} There are: {', '.join(sorted(names))}"
