"""
NumPy: a target that moves, and a step size for each weight
===========================================================

Sutton's tracking task: of twenty inputs five matter, and one of their weights changes its sign now
and then. IDBD finds out which inputs matter.
"""

# %%
# The task, and IDBD as a preset.
import matplotlib.pyplot as plt
import numpy as np

import metaopt as mo

rng = np.random.default_rng(0)
target = np.concatenate([np.ones(5), np.zeros(15)])
opt = mo.presets.idbd(meta_lr=1e-2, step_size=0.05)
params = {"w": np.zeros(20)}
state = opt.init(params)

errors, sizes = [], []
for step in range(20_000):
    if step % 20 == 0:
        target[rng.integers(5)] *= -1.0
    inputs = rng.normal(size=20)
    error = params["w"] @ inputs - (target @ inputs + rng.normal())
    params, state = opt.step(
        params, {"w": error * inputs}, state, hessian_diagonal={"w": inputs**2}
    )
    errors.append(0.5 * error**2)
    sizes.append(opt.step_sizes(state)["w"])

# %%
# Step sizes of the inputs that matter rise, those of the others fall.
sizes = np.array(sizes)
figure, (above, below) = plt.subplots(2, sharex=True, layout="constrained")
window = np.ones(500) / 500
above.plot(np.convolve(errors, window, mode="valid"))
above.set_ylabel("error, mean of 500")
below.semilogy(sizes[:, 5:], color="tab:gray", linewidth=0.7)
below.semilogy(sizes[:, :5], color="tab:blue")
below.set(ylabel="step sizes", xlabel="step")
plt.show()
