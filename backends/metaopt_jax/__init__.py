"""MetaOptimize for JAX: an optax gradient transformation."""

from importlib import import_module
from importlib.util import find_spec

if find_spec("jax") is None or find_spec("optax") is None:
    msg = "metaopt_jax needs JAX and optax: pip install jax optax"
    raise ModuleNotFoundError(msg)
if not hasattr(import_module("metaopt"), "MetaOptimize"):
    msg = (
        "the package `metaopt` that is installed is another, of 2014: pip uninstall metaopt, and "
        "install metaoptimize again"
    )
    raise ImportError(msg)

from metaopt_jax.state import MetaOptimizeState
from metaopt_jax.transform import MetaOptimizeTransformation, from_config, metaoptimize
from metaopt_jax.wrapped import WrappedState, wrap

__all__ = [
    "MetaOptimizeState",
    "MetaOptimizeTransformation",
    "WrappedState",
    "from_config",
    "metaoptimize",
    "wrap",
]
