"""MetaOptimize for JAX: an optax gradient transformation."""

from metaopt_jax.state import MetaOptimizeState
from metaopt_jax.transform import MetaOptimizeTransformation, metaoptimize, transformation

__all__ = ["MetaOptimizeState", "MetaOptimizeTransformation", "metaoptimize", "transformation"]
