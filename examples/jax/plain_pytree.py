"""A training loop on a plain pytree: clipping before, a schedule on top of the learned step sizes.

    python examples/jax/plain_pytree.py

`lr` is a multiplier, 1 by default; the step taken is `lr` times what has been learned. Any of
optax's schedules drives it.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from metaopt_jax import MetaOptimizeTransformation, metaoptimize

import metaopt as mo


def model() -> dict[str, Any]:
    """Return the parameters of a small network."""
    keys = jax.random.split(jax.random.key(0))
    return {
        f"layer{i}": {
            "kernel": jax.random.normal(key, shape) / jnp.sqrt(shape[0]),
            "bias": jnp.zeros(shape[1]),
        }
        for i, (key, shape) in enumerate(zip(keys, [(8, 32), (32, 1)], strict=True))
    }


def loss(params: dict[str, Any], x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean squared error."""
    hidden = jnp.tanh(x @ params["layer0"]["kernel"] + params["layer0"]["bias"])
    return jnp.mean((hidden @ params["layer1"]["kernel"] + params["layer1"]["bias"] - y) ** 2)


def batches(steps: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yield inputs and targets."""
    for key in jax.random.split(jax.random.key(1), steps):
        x = jax.random.normal(key, (64, 8))
        yield x, jnp.sin(x[:, :1]) + x[:, 1:2]


def main(steps: int = 1000) -> tuple[dict[str, Any], MetaOptimizeTransformation, Any]:
    """Train, and return the parameters, the transformation and its state."""
    schedule = optax.warmup_cosine_decay_schedule(0.1, 1.0, steps // 20, steps)
    meta = metaoptimize(
        base=mo.AdamW(weight_decay=0.01),
        step_size=1e-5,  # where they start; too small on purpose
        blocks={"kernels": "*.kernel", "biases": "*.bias"},
        lr=schedule,
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), meta)

    def train_step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    compiled = jax.jit(train_step, donate_argnums=(0, 1))
    params = model()
    state = tx.init(params)
    for step, (x, y) in enumerate(batches(steps)):
        params, state, value = compiled(params, state, x, y)
        if step % 100 == 0:
            sizes = ", ".join(f"{name} {size:.1e}" for name, size in meta.step_sizes(state).items())
            print(f"{step:5} loss {value:.4f}  step sizes: {sizes}")
    return params, meta, state


if __name__ == "__main__":
    main()
