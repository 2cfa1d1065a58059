"""
JAX: a whole run within one scan
================================

The transformation is optax's kind, so a run is one compiled program.
"""

# %%
# Fit a sine with a small network, in `jax.lax.scan`.
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from metaopt_jax import metaoptimize

x = jnp.linspace(-3.0, 3.0, 128)[:, None]
y = jnp.sin(2.0 * x)


def network(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss_of(params):
    return jnp.mean((network(params, x) - y) ** 2)


keys = jax.random.split(jax.random.key(0))
params = {
    "w1": jax.random.normal(keys[0], (1, 32)),
    "b1": jnp.zeros(32),
    "w2": jax.random.normal(keys[1], (32, 1)) / 6.0,
    "b2": jnp.zeros(1),
}
tx = metaoptimize(step_size=1e-6)


@jax.jit
def train(params):
    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (loss, tx.step_sizes(state)["all"])

    (params, state), history = jax.lax.scan(step, (params, tx.init(params)), length=2000)
    return tx.averaged_params(state, params), history


averaged, (losses, sizes) = train(params)

# %%
# The loss, and the step size that made it.
figure, (above, below) = plt.subplots(2, sharex=True, layout="constrained")
above.semilogy(losses)
above.set_ylabel("loss")
below.semilogy(sizes)
below.set(ylabel="step size", xlabel="step")
plt.show()

# %%
# The averaged weights are what to evaluate.
figure, axes = plt.subplots(layout="constrained")
axes.plot(x, y, label="target")
axes.plot(x, network(averaged, x), "--", label="network at averaged weights")
axes.legend()
plt.show()
