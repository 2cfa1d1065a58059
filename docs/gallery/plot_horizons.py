"""
NumPy: several horizons, of which the most optimistic decides
=============================================================

A short discount is right where the target moves, a discount of 1 where it stays. With both at once
nobody has to choose.
"""

# %%
# The same regression twice: with a target that stays, and with one that drifts.
import matplotlib.pyplot as plt
import numpy as np

import metaopt as mo


def run(discount, drift, steps=4000):
    rng = np.random.default_rng(2)
    target, params = rng.normal(size=10), {"w": np.zeros(10)}
    opt = mo.MetaOptimize(discount=discount)
    state, errors = opt.init(params), []
    for _ in range(steps):
        target = target + drift * rng.normal(size=10)
        inputs = rng.normal(size=(4, 10))
        error = inputs @ (params["w"] - target) + rng.normal(size=4)
        params, state = opt.step(params, {"w": inputs.T @ error / 4}, state)
        errors.append(np.sum((params["w"] - target) ** 2))
    return np.array(errors)


# %%
# Shown is the squared distance to the target, as a mean of 200 steps.
figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8, 4), layout="constrained")
for one, drift in zip(axes, (0.0, 0.03), strict=True):
    for discount in (0.99, 1.0, (0.99, 1.0)):
        smooth = np.convolve(run(discount, drift), np.ones(200) / 200, mode="valid")
        one.semilogy(smooth, label=f"discount={discount}")
    one.set(xlabel="step", title="target drifts" if drift else "target stays")
axes[0].set_ylabel("squared distance to the target")
axes[0].legend()
plt.show()
