"""
NumPy: weight decay that is learned, from training data and from held-out data
==============================================================================

The training loss does not see that a model overfits, so by it alone weight decay only shrinks. Held
out data sees it.
"""

# %%
# A regression with more noise than the examples can average: 70 to train on, 60 inputs.
import matplotlib.pyplot as plt
import numpy as np

import metaopt as mo

rng = np.random.default_rng(0)
truth = 0.1 * rng.normal(size=60)


def examples(count):
    inputs = rng.normal(size=(count, 60))
    return inputs, inputs @ truth + 2.0 * rng.normal(size=count)


train, held_out, test = examples(70), examples(70), examples(1000)


def loss(weights, part):
    inputs, targets = part
    return np.mean((inputs @ weights - targets) ** 2)


def gradient(weights, part):
    inputs, targets = part
    return {"w": 2.0 * inputs.T @ (inputs @ weights - targets) / len(targets)}


def run(held):
    base = mo.AdamW(weight_decay=mo.Learned(0.1, meta_lr=1e-2), betas=(mo.Learned(0.9), 0.999))
    opt = mo.MetaOptimize(base=base, step_size=1e-3, held_out=held)
    params = {"w": np.zeros(60)}
    state, history = opt.init(params), []
    for _ in range(1500):
        more = {"meta_grads": gradient(params["w"], held_out)} if held else {}
        params, state = opt.step(params, gradient(params["w"], train), state, **more)
        numbers = opt.hyperparameters(state)
        history.append(
            (
                loss(params["w"], test),
                numbers["weight_decay"]["all"],
                numbers["betas[0]"]["all"],
                opt.step_sizes(state)["all"],
            )
        )
    return np.array(history).T


# %%
# Learned from the training loss, the decay vanishes and the test loss rises. Learned from held-out
# gradients, it grows until the model no longer overfits.
figure, axes = plt.subplots(2, 2, sharex=True, figsize=(8, 6), layout="constrained")
for held, label in ((False, "from training data"), (True, "from held-out data")):
    for one, values in zip(axes.flat, run(held), strict=True):
        one.plot(values, label=label)
for one, title in zip(
    axes.flat, ("test loss", "weight decay", "momentum, betas[0]", "step size"), strict=True
):
    one.set_title(title)
axes[0, 1].set_yscale("log")
axes[1, 1].set_yscale("log")
axes[0, 0].legend()
plt.show()
