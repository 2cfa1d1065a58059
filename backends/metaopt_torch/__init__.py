"""MetaOptimize for PyTorch: an optimizer whose step sizes tune themselves."""

from metaopt_torch.optimizer import MetaOptimizer

__all__ = ["MetaOptimizer"]
