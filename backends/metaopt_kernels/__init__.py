"""MetaOptimize in place on arrays of CuPy and NumPy, in one pass over memory."""

from importlib import import_module

if not hasattr(import_module("metaopt"), "MetaOptimize"):
    msg = (
        "the package `metaopt` that is installed is another, of 2014: pip uninstall metaopt, and "
        "install metaoptimize again"
    )
    raise ImportError(msg)

from metaopt_kernels.optimizer import MetaOptimizer, from_config

__all__ = ["MetaOptimizer", "from_config"]
