"""A model of equinox: what is trained is filtered out of it, and trained like any pytree.

python examples/jax/equinox_model.py
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from metaopt_jax import MetaOptimizeTransformation, metaoptimize

import metaopt as mo


def loss(model: eqx.nn.MLP, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean squared error."""
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def main(steps: int = 500) -> tuple[eqx.nn.MLP, MetaOptimizeTransformation, Any]:
    """Train, and return the model, the transformation and its state."""
    model = eqx.nn.MLP(8, 1, width_size=32, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    tx = metaoptimize(
        base=mo.AdamW(),
        blocks="tensor",
    )
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all-except-first")
    def train_step(batch: Any, model: eqx.nn.MLP, state: Any) -> Any:
        value, grads = eqx.filter_value_and_grad(loss)(model, *batch)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    for step, key in enumerate(jax.random.split(jax.random.key(1), steps)):
        x = jax.random.normal(key, (64, 8))
        y = jnp.sin(x[:, :1]) + x[:, 1:2]
        model, state, value = train_step((x, y), model, state)
        if step % 100 == 0:
            sizes = ", ".join(f"{name} {size:.1e}" for name, size in tx.step_sizes(state).items())
            print(f"{step:5} loss {value:.4f}  step sizes: {sizes}")
    return model, tx, state


if __name__ == "__main__":
    main()
