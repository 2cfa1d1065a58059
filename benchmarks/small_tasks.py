"""Thirty small tasks side by side, a row of parameters each, for learned step sizes to survive."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import metaopt as mo

__all__ = ["SmallTasks", "stuck"]

WIDTH = 21
SAMPLES = 64
#: Fixed step sizes that are tried from where a run ended, and for how long.
TRIED = (1e-4, 1e-3, 1e-2, 1e-1)
TRIAL = 200
#: Steps in which a step size that is too small should have grown.
LATELY = 50

Rows = Any


@dataclass(frozen=True)
class Task:
    """A loss of a row of parameters, and how noisy its gradients are.

    Parameters
    ----------
    name : str
    start : array (parameters,)
    value_and_grad : callable
        From parameters and which samples to use, to the loss and its gradient.
    batch : int
        Samples a step; all of them where it is SAMPLES.
    noise : float
        Standard deviation of what is added to every gradient.
    """

    name: str
    start: Any
    value_and_grad: Callable[[Any, Any], tuple[Any, Any]]
    batch: int = SAMPLES
    noise: float = 0.0


def parabola(eigenvalues: Any, minimum: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    def value_and_grad(w: Any, at: Any) -> tuple[Any, Any]:  # noqa: ARG001
        grad = eigenvalues * (w - minimum)
        return 0.5 * np.sum(grad * (w - minimum)), grad

    return value_and_grad


def linear(kind: str, inputs: Any, targets: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return a linear model's mean loss: "squares", "logistic" or "hinge"."""

    def value_and_grad(w: Any, at: Any) -> tuple[Any, Any]:
        x, y = inputs[at], targets[at]
        out = x @ w
        if kind == "squares":
            losses, slopes = 0.5 * (out - y) ** 2, out - y
        elif kind == "hinge":
            losses, slopes = np.maximum(0.0, 1.0 - out * y), np.where(out * y < 1.0, -y, 0.0)
        else:
            losses = np.logaddexp(0.0, -out * y)
            slopes = -y * np.exp(-np.logaddexp(0.0, out * y))
        return np.mean(losses), slopes @ x / len(x)

    return value_and_grad


def network(relu: bool, inputs: Any, targets: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return half the squared error of a network of two inputs and five hidden units."""

    def value_and_grad(w: Any, at: Any) -> tuple[Any, Any]:
        x, y = inputs[at], targets[at]
        weight, bias, out, last = w[:10].reshape(5, 2), w[10:15], w[15:20], w[20]
        before = x @ weight.T + bias
        hidden = np.maximum(before, 0.0) if relu else np.tanh(before)
        error = hidden @ out + last - y
        back = np.outer(error, out) * ((before > 0.0) if relu else 1.0 - hidden**2)
        parts = [(back.T @ x).ravel(), back.sum(0), error @ hidden, [error.sum()]]
        return 0.5 * np.mean(error**2), np.concatenate(parts) / len(x)

    return value_and_grad


def rough(power: int, minimum: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return the sum of |w - minimum| to a power, over that power."""

    def value_and_grad(w: Any, at: Any) -> tuple[Any, Any]:  # noqa: ARG001
        error = w - minimum
        grad = np.sign(error) * np.abs(error) ** (power - 1)
        return np.sum(np.abs(error) ** power) / power, grad

    return value_and_grad


def make(rng: Any) -> list[Task]:
    tasks = []
    for orders in (0, 2, 4):  # of magnitude between the largest curvature and the smallest
        for noise in (0.0, 0.1, 1.0):
            loss = parabola(np.logspace(0, -orders, 8), rng.normal(size=8))
            tasks.append(Task(f"parabola {orders} {noise}", np.zeros(8), loss, noise=noise))
    for kind, orders, noise, batch in (
        *(("squares", 0, noise, batch) for noise, batch in ((0.5, 1), (0.5, 8), (0.0, 1))),
        *(("squares", orders, 0.5, batch) for orders, batch in ((2, 1), (2, 8), (1, SAMPLES))),
        *(("logistic", 0, noise, 1) for noise in (0.0, 1.0)),
        *(("logistic", orders, 1.0, 8) for orders in (0, 1)),
        ("logistic", 0, 1.0, SAMPLES),
        ("logistic", 1, 0.0, 8),
        ("hinge", 0, 0.0, 8),
        ("hinge", 0, 1.0, 1),
    ):
        inputs = rng.normal(size=(SAMPLES, 8)) * np.logspace(0, -orders, 8)
        targets = inputs @ (2.0 * rng.normal(size=8)) + noise * rng.normal(size=SAMPLES)
        loss = linear(kind, inputs, targets if kind == "squares" else np.sign(targets))
        tasks.append(Task(f"{kind} {orders} {noise} {batch}", np.zeros(8), loss, batch))
    for name, relu, batch in (
        ("xor", False, 4),
        ("xor", True, SAMPLES),
        ("sine", True, 4),
        ("sine", False, 1),
        ("noise", False, 4),
    ):
        inputs = rng.normal(size=(SAMPLES, 2))
        targets = {
            "xor": np.sign(inputs[:, 0] * inputs[:, 1]),
            "sine": np.sin(2.0 * inputs[:, 0]) + 0.3 * inputs[:, 1],
            "noise": np.sin(inputs[:, 0]) + rng.normal(size=SAMPLES),
        }[name]
        start = 0.5 * rng.normal(size=WIDTH)
        tasks.append(Task(f"network {name}", start, network(relu, inputs, targets), batch))
    for power in (1, 4):
        loss = rough(power, rng.normal(size=8))
        tasks.append(Task(f"power {power}", np.zeros(8), loss, noise=0.1))
    return tasks


class SmallTasks:
    """All tasks; parameters are rows of one array, padded with zeros that have no gradient."""

    def __init__(self) -> None:
        self.tasks = make(np.random.default_rng(0))
        self.start = np.zeros((len(self.tasks), WIDTH))
        for row, task in zip(self.start, self.tasks, strict=True):
            row[: len(task.start)] = task.start

    def gradients(self, params: Rows, rng: Any) -> Rows:
        """Return the gradients of a step."""
        grads = np.zeros_like(self.start)
        for row, w, task in zip(grads, params, self.tasks, strict=True):
            size = len(task.start)
            at = slice(None) if task.batch == SAMPLES else rng.integers(SAMPLES, size=task.batch)
            row[:size] = task.value_and_grad(w[:size], at)[1]
            row[:size] += task.noise * rng.normal(size=size)
        return grads

    def losses(self, params: Rows) -> Any:
        """Return the losses over all samples, without noise."""
        pairs = zip(params, self.tasks, strict=True)
        return np.array([t.value_and_grad(w[: len(t.start)], slice(None))[0] for w, t in pairs])

    def run(
        self, opt: mo.MetaOptimize, params: Rows, steps: int, seed: int
    ) -> tuple[Rows, list[Any]]:
        """Return the parameters at the end and the step sizes after each step, one per task.

        Parameters
        ----------
        opt : metaopt.MetaOptimize
            With `blocks="node"`: a step size for each row.
        params : array (tasks, WIDTH)
        steps, seed : int
        """
        rng, leaves = np.random.default_rng(seed), {"rows": params}
        state, sizes = opt.init(leaves), []
        for _ in range(steps):
            grads = {"rows": self.gradients(leaves["rows"], rng)}
            leaves, state = opt.step(leaves, grads, state)
            sizes.append(opt.step_sizes(state)["rows"])
        return leaves["rows"], sizes


def stuck(tasks: SmallTasks, base: mo.Rule, params: Rows, sizes: list[Any], seed: int) -> Any:
    """Say which tasks ended with a step size that is far too small and does not grow.

    One is where a fixed step size more than a hundred times the last one takes, within `TRIAL`
    steps from there, 2% or more off what the loss has fallen by, and the last one is no larger
    than `LATELY` steps before.

    Parameters
    ----------
    tasks : SmallTasks
    base : Rule
        The update of the weights.
    params, sizes
        As `SmallTasks.run` returns them.
    seed : int
        Of the trials.

    Returns
    -------
    array (tasks,), bool
    """
    last = sizes[-1]
    small = (last < 0.01 * max(TRIED)) & (last <= sizes[-LATELY])
    if not np.any(small):
        return small
    losses = tasks.losses(params)
    best, best_size = losses.copy(), last.copy()
    for size in TRIED:
        fixed = mo.MetaOptimize(
            base=base, meta=mo.SGD(), step_size=size, meta_lr=0.0, blocks="node", discount=1.0
        )
        after = tasks.losses(tasks.run(fixed, params, TRIAL, seed)[0])
        best, best_size = np.minimum(after, best), np.where(after < best, size, best_size)
    would_help = losses - best > 0.02 * (tasks.losses(tasks.start) - best)
    return small & (last < 0.01 * best_size) & would_help
