"""Logistic regression on real data, end to end: step sizes that tune themselves.

    python examples/logistic_regression.py

Breast cancer, 569 patients with 30 measurements each, of scikit-learn. The one import below decides
where it runs: `import cupy as xp` puts arrays, gradients and steps on a GPU, and nothing else
changes.
"""

import numpy as xp  # or: import cupy as xp
from metaopt_kernels import MetaOptimizer
from sklearn.datasets import load_breast_cancer

EPOCHS = 30
BATCH = 32

measurements, malignant = load_breast_cancer(return_X_y=True)
inputs = xp.asarray(measurements, dtype="float32")
labels = xp.asarray(1 - malignant, dtype="float32")  # 1 is malignant
shuffled = xp.random.RandomState(0).permutation(len(labels))
train, test = shuffled[:400], shuffled[400:]
inputs = (inputs - inputs[train].mean(axis=0)) / inputs[train].std(axis=0)

params = {"weight": xp.zeros(30, dtype="float32"), "bias": xp.zeros((), dtype="float32")}
opt = MetaOptimizer(params, base="adamw", blocks="tensor")


def probability(rows):
    """Return the probability of being malignant, of each row."""
    return 1.0 / (1.0 + xp.exp(-(inputs[rows] @ params["weight"] + params["bias"])))


for epoch in range(EPOCHS):
    for batch in xp.split(train[: len(train) // BATCH * BATCH], len(train) // BATCH):
        error = probability(batch) - labels[batch]  # of the log loss, by the linear part
        opt.step({"weight": inputs[batch].T @ error / BATCH, "bias": error.mean()})
    if epoch % 5 == 4:
        right = float(xp.mean((probability(test) > 0.5) == (labels[test] > 0.5)))
        sizes = {name: f"{float(size):.1e}" for name, size in opt.step_sizes().items()}
        print(f"epoch {epoch + 1:2}  right on test {right:.1%}  step sizes {sizes}")
