"""MetaOptimize on any array library: step sizes that tune themselves."""

from metaopt import blocks, curvature, numerics, passes, presets, rules
from metaopt.checkpoint import load, save
from metaopt.metaoptimize import MetaOptimize
from metaopt.rules import SGD, AdamW, FastStart, Lion, RMSprop, Rule
from metaopt.state import State
from metaopt.step_sizes import Exp, Identity, Sigmoid, Softplus

__version__ = "0.1.0.dev0"

__all__ = [
    "SGD",
    "AdamW",
    "Exp",
    "FastStart",
    "Identity",
    "Lion",
    "MetaOptimize",
    "RMSprop",
    "Rule",
    "Sigmoid",
    "Softplus",
    "State",
    "blocks",
    "curvature",
    "load",
    "numerics",
    "passes",
    "presets",
    "rules",
    "save",
]
