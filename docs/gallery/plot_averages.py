"""
NumPy: averaged weights in place of a schedule
==============================================

With noisy gradients the last weights are noisy too. Their average comes with the traces and costs
nothing.
"""

# %%
# Least squares, with gradients of a few examples.
import matplotlib.pyplot as plt
import numpy as np

import metaopt as mo

rng = np.random.default_rng(1)
inputs = rng.normal(size=(2000, 30))
targets = inputs @ rng.normal(size=30) + rng.normal(size=2000)
best = np.linalg.lstsq(inputs, targets)[0]


def excess(weights):
    """Return by how much the loss is above the least there is."""
    return np.mean((inputs @ (weights - best)) ** 2)


opt = mo.MetaOptimize(base=mo.Averaged(mo.AdamW()))
params = {"w": np.zeros(30)}
state = opt.init(params)
last, latest, late = [], [], []
for _ in range(3000):
    rows = rng.integers(2000, size=10)
    error = inputs[rows] @ params["w"] - targets[rows]
    params, state = opt.step(params, {"w": inputs[rows].T @ error / 10}, state)
    last.append(excess(params["w"]))
    latest.append(excess(state.average["w"][0]))
    late.append(excess(opt.averaged_params(state, params)["w"]))

# %%
# An average of the last hundred steps comes with every run that has a discount of 0.99;
# `metaopt.Averaged` keeps one whose window grows.
figure, axes = plt.subplots(layout="constrained")
axes.semilogy(last, label="last weights")
axes.semilogy(latest, label="average of the last hundred steps")
axes.semilogy(late, label="average of the last part of the run")
axes.set(xlabel="step", ylabel="loss above the least")
axes.legend()
plt.show()
