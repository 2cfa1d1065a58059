"""MetaOptimize for PyTorch: an optimizer whose step sizes tune themselves."""

from importlib import import_module
from importlib.util import find_spec

if find_spec("torch") is None:
    msg = "metaopt_torch needs PyTorch: pip install torch"
    raise ModuleNotFoundError(msg)
if not hasattr(import_module("metaopt"), "MetaOptimize"):
    msg = (
        "the package `metaopt` that is installed is another, of 2014: pip uninstall metaopt, and "
        "install metaoptimize again"
    )
    raise ImportError(msg)

from metaopt_torch.lr_finder import FoundLR, find_lr
from metaopt_torch.optimizer import MetaOptimizer, from_config
from metaopt_torch.wrapped import WrappedOptimizer, wrap

__all__ = ["FoundLR", "MetaOptimizer", "WrappedOptimizer", "find_lr", "from_config", "wrap"]
