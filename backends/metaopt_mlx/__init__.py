"""MetaOptimize for MLX: an optimizer like those of `mlx.optimizers`."""

from importlib import import_module
from importlib.util import find_spec

if find_spec("mlx") is None:
    msg = "metaopt_mlx needs MLX: pip install mlx, or mlx[cpu] on Linux"
    raise ModuleNotFoundError(msg)
if not hasattr(import_module("metaopt"), "MetaOptimize"):
    msg = (
        "the package `metaopt` that is installed is another, of 2014: pip uninstall metaopt, and "
        "install metaoptimize again"
    )
    raise ImportError(msg)

from metaopt_mlx.optimizer import MetaOptimizer, from_config

__all__ = ["MetaOptimizer", "from_config"]
