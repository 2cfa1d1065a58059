"""What the columns of wrapped optimizers have in common, whatever the library."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import metaopt as mo
from metaopt.arrays import Leaves, per_leaf

__all__ = ["options_of", "slots_of"]


def options_of(opt: mo.MetaOptimize, wrap: Callable[..., Any]) -> dict[str, Any]:
    """Return the options of a configuration that an adapter's `wrap` takes as well."""
    taken = inspect.signature(wrap).parameters
    return {
        option.name: getattr(opt, option.name) for option in fields(opt) if option.name in taken
    }


def slots_of(rules: Mapping[str, Any], moment: Callable[[str, str], Any]) -> Leaves[Leaves[Any]]:
    """Return a state's slots, from a function of leaf and slot to the moment of what is wrapped."""
    return per_leaf(
        (name, per_leaf((slot, moment(name, slot)) for slot in rule.slots))
        for name, rule in rules.items()
    )
