"""MetaOptimize for Keras 3: an optimizer like those of `keras.optimizers`."""

from importlib import import_module
from importlib.util import find_spec

if find_spec("keras") is None:
    msg = "metaopt_keras needs Keras 3: pip install keras"
    raise ModuleNotFoundError(msg)
if not hasattr(import_module("metaopt"), "MetaOptimize"):
    msg = (
        "the package `metaopt` that is installed is another, of 2014: pip uninstall metaopt, and "
        "install metaoptimize again"
    )
    raise ImportError(msg)
try:
    backend = import_module("keras").backend.backend()
except ModuleNotFoundError as error:  # of Keras's default backend
    if error.name is None or error.name.partition(".")[0] != "tensorflow":
        raise
    backend = "tensorflow"
if backend not in ("torch", "jax"):
    msg = (
        f"metaopt_keras runs on Keras's backends torch and jax, and this is {backend}: set the "
        "environment variable KERAS_BACKEND to one of them before Keras is imported"
    )
    raise ImportError(msg)

from metaopt_keras.optimizer import MetaOptimizer, from_config

__all__ = ["MetaOptimizer", "from_config"]
