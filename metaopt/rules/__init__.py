"""Update rules: one formula each, for either role, base or meta; `FastStart` is a meta update."""

from dataclasses import is_dataclass

from metaopt.rules.adamw import AdamW
from metaopt.rules.fast_start import FastStart
from metaopt.rules.lion import Lion
from metaopt.rules.nadamw import NAdamW
from metaopt.rules.rmsprop import RMSprop
from metaopt.rules.rule import Rule
from metaopt.rules.sgd import SGD

__all__ = ["SGD", "AdamW", "FastStart", "Lion", "NAdamW", "RMSprop", "Rule"]

#: The classes above: what files may name, and the project's tests prove to be elementwise.
SHIPPED: tuple[type, ...] = tuple(filter(is_dataclass, map(globals().__getitem__, __all__)))
