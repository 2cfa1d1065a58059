"""Update rules, a formula each for either role.

`FastStart` is a meta update alone, `Averaged` and `Opaque` are base updates.
"""

from dataclasses import is_dataclass

from metaopt.rules.adamw import AdamW
from metaopt.rules.averaged import Averaged
from metaopt.rules.fast_start import FastStart
from metaopt.rules.lion import Lion
from metaopt.rules.nadamw import NAdamW
from metaopt.rules.opaque import Opaque
from metaopt.rules.rmsprop import RMSprop
from metaopt.rules.rule import Rule
from metaopt.rules.sgd import SGD

__all__ = ["SGD", "AdamW", "Averaged", "FastStart", "Lion", "NAdamW", "Opaque", "RMSprop", "Rule"]

#: The classes above: what files may name, and the project's tests prove to be elementwise.
SHIPPED: tuple[type, ...] = tuple(filter(is_dataclass, map(globals().__getitem__, __all__)))
