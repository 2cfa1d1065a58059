"""MetaOptimize in place on arrays of CuPy and NumPy, in one pass over memory."""

from metaopt_kernels.optimizer import MetaOptimizer

__all__ = ["MetaOptimizer"]
