"""A model of flax.nnx, whose `nnx.Optimizer` takes the transformation as it takes those of optax.

    python examples/jax/flax_nnx.py

With curvature, too: the loss is an argument of `update`, as a function of the parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from metaopt_jax import MetaOptimizeTransformation, metaoptimize

import metaopt as mo


class Network(nnx.Module):
    """A small network."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(8, 32, rngs=rngs)
        self.outer = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the outputs for a batch of inputs."""
        return self.outer(jnp.tanh(self.inner(x)))


def loss(model: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean squared error."""
    return jnp.mean((model(x) - y) ** 2)


def main(
    steps: int = 300, curvature: str = "exact"
) -> tuple[Network, MetaOptimizeTransformation, Any]:
    """Train, and return the model, the transformation and its optimizer."""
    model = Network(nnx.Rngs(0))
    tx = metaoptimize(
        base=mo.AdamW(),
        meta=mo.AdamW(),
        step_size=1e-4,
        meta_lr=1e-2,
        blocks={"inner": "inner.*", "outer": "outer.*"},
        curvature=curvature,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Network, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> Any:
        graph, _, others = nnx.split(model, nnx.Param, ...)
        value, grads = nnx.value_and_grad(loss)(model, x, y)
        optimizer.update(
            model, grads, value_fn=lambda params: loss(nnx.merge(graph, params, others), x, y)
        )
        return value

    for step, key in enumerate(jax.random.split(jax.random.key(1), steps)):
        x = jax.random.normal(key, (64, 8))
        value = train_step(model, optimizer, x, jnp.sin(x[:, :1]) + x[:, 1:2])
        if step % 100 == 0:
            learned = tx.step_sizes(optimizer.opt_state)
            sizes = ", ".join(f"{name} {size:.1e}" for name, size in learned.items())
            print(f"{step:5} loss {value:.4f}  step sizes: {sizes}")
    return model, tx, optimizer


if __name__ == "__main__":
    main()
