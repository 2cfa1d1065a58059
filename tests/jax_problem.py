"""What the tests of metaopt_jax share: parameters, a loss, and configurations."""

from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from metaopt_conformance.tolerances import relative_error, rounding

import metaopt as mo

__all__ = ["CONFIGURATIONS", "NAMES", "by_name", "close", "diagonal", "loss", "options_of"]
__all__ += ["start", "update"]

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "scalar": {},
    "tensor": {"blocks": "tensor", "meta": mo.AdamW()},
    "node": {"blocks": mo.blocks.node(-1), "base": mo.RMSprop()},
    "weight": {"blocks": "weight", "bounds": (1e-5, 1e-1), "base": mo.SGD(momentum=0.9)},
    "named": {"blocks": {"head": "head.*", "rest": "*"}},
    "rules": {"base": {"head.*": mo.Lion(), "*": mo.AdamW()}},
    "bare": {"base": mo.SGD(), "meta": mo.SGD(), "discount": 1.0},
    "identity": {"sigma": "identity", "step_size": 0.01},
    "meta first": {"meta_first": True, "discount": 0.9},
    "delayed": {"base": mo.AdamW(delayed=True)},
    "skip": {"skip_nonfinite": True},
    "discounts": {"discount": (0.9, 1.0), "meta": mo.AdamW()},
    "discounts by weight": {"discount": (0.0, 0.9, 1.0), "blocks": "weight", "meta": mo.AdamW()},
    "skipping discounts": {"discount": (0.9, 1.0), "skip_nonfinite": True, "blocks": "tensor"},
    "exact discounts": {"discount": (0.9, 1.0), "curvature": "exact", "blocks": "tensor"},
    "diagonal discounts": {"discount": (0.9, 1.0), "curvature": "diagonal"},
    "identity discounts": {"discount": (0.9, 1.0), "sigma": "identity", "step_size": 0.01},
    "exact": {"curvature": "exact", "approximation": "2x2", "blocks": "tensor", "meta": mo.AdamW()},
    "full": {"curvature": "exact", "approximation": "full", "meta": mo.AdamW()},
    "diagonal": {"curvature": "diagonal", "approximation": "2x2", "meta": mo.SGD()},
}

NAMES = ["head.bias", "head.kernel", "layers.0.kernel", "layers.2.0", "scale"]


def options_of(name: str) -> dict[str, Any]:
    """Return the arguments of a configuration."""
    usual: dict[str, Any] = {
        "base": mo.AdamW(weight_decay=0.1),
        "meta": mo.Lion(),
        "step_size": 1e-2,
        "discount": 1.0,
    }
    return usual | CONFIGURATIONS[name]


def start(dtype: str = "float32") -> Any:
    """Return nested parameters with an empty, a 0-d and a missing leaf."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "head": {"kernel": array(4, 3), "bias": array(3)},
        "layers": [{"kernel": array(2, 1, 2)}, None, (array(0, 2),)],
        "scale": array(),
    }


def loss(params: Any) -> Any:
    """Return a loss whose Hessian is diagonal."""
    return sum(jnp.sum(jnp.cosh(leaf - 1.0)) for leaf in jax.tree.leaves(params))


def diagonal(params: Any) -> Any:
    """Return the diagonal of its Hessian."""
    return jax.tree.map(lambda leaf: jnp.cosh(leaf - 1.0), params)


def update(tx: Any, params: Any, state: Any, **extra: Any) -> Any:
    """Return parameters and state after one update, by the loss above."""
    given = {"value_fn": loss, "hessian_diagonal": diagonal(params)}
    updates, state = tx.update(jax.grad(loss)(params), state, params, **(given | extra))
    return optax.apply_updates(params, updates), state


def by_name(tree: Any) -> dict[str, Any]:
    """Return a pytree's leaves by the names that the adapter gives them."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return OrderedDict(
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths
    )


def close(got: Any, want: Any, steps: int) -> None:
    """Assert that two pytrees are equal to the rounding of so many float32 steps."""
    structures: list[Any] = [jax.tree.structure(got), jax.tree.structure(want)]
    assert structures[0] == structures[1]
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, one), other in pairs:
        if "compensation" in jax.tree_util.keystr(path):
            continue  # it is what was rounded away
        assert one.dtype == other.dtype
        assert relative_error(one, other) < rounding("float32", operations=60, steps=steps)
