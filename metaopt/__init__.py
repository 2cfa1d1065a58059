"""MetaOptimize on any array library: step sizes that tune themselves."""

from metaopt import (
    blocks,
    curvature,
    installation,
    leaf,
    meta,
    numerics,
    presets,
    projection,
    rules,
    step_sizes,
)
from metaopt.checkpoint import load, save
from metaopt.log import Log
from metaopt.metaoptimize import MetaOptimize
from metaopt.rules import *  # noqa: F403
from metaopt.rules.learned import Learned
from metaopt.state import State
from metaopt.step_sizes import *  # noqa: F403

installation.check_folder()

__version__ = "0.1.0.dev0"

__all__ = [
    "Learned",
    "Log",
    "MetaOptimize",
    "State",
    "blocks",
    "curvature",
    "leaf",
    "load",
    "meta",
    "numerics",
    "presets",
    "projection",
    "rules",
    "save",
]
__all__ += rules.__all__
__all__ += step_sizes.__all__
