"""Convex tasks: linear regressions whose target drifts or shifts, and logistic regression."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.training.layers import drawn
from benchmarks.training.tasks.task import CHUNK, Measures, Task

__all__ = ["DriftingRegression", "LogisticRegression", "ShiftingRegression"]


class DriftingRegression(Task):
    """Sutton's tracking task (1992): 20 inputs, 5 matter, one of those flips every 20 steps.

    Inputs are standard normal, weights of the target 1 or -1, an example a step. The error before
    each step is what counts, over the second half of the run.

    Parameters
    ----------
    seeds : sequence of int
    """

    steps: ClassVar[int] = 10_000
    every: ClassVar[int] = 500
    metric: ClassVar[str] = "train.loss"
    more_is_better: ClassVar[bool] = False
    judged_over: ClassVar[float] = 0.5
    judged_by: ClassVar[str] = "half the squared error of predictions, over the second half"
    target: ClassVar[float] = 2.0

    inputs: ClassVar[int] = 20
    relevant: ClassVar[int] = 5
    period: ClassVar[int] = 20

    def __init__(self, seeds: Sequence[int], **_: Any) -> None:
        super().__init__(seeds)
        self.weight = nn.Parameter(torch.zeros(len(seeds), self.inputs))
        self._drawn: tuple[int, list[Tensor]] | None = None
        self._inputs: Tensor = torch.zeros(len(seeds), self.inputs)

    def _examples(self, step: int) -> list[Tensor]:
        chunk, within = divmod(step, CHUNK)
        if self._drawn is None or self._drawn[0] != chunk:
            made = {seed: self._stretch(seed, chunk) for seed in set(self.seeds)}
            parts = zip(*(made[seed] for seed in self.seeds), strict=True)
            self._drawn = (chunk, [torch.from_numpy(np.stack(part, axis=1)) for part in parts])
        return [part[within] for part in self._drawn[1]]

    def _stretch(self, seed: int, chunk: int) -> tuple[Any, ...]:
        """Return the inputs and targets of a chunk of steps, as float32."""
        x = np.random.default_rng((seed, chunk)).standard_normal((CHUNK, self.inputs))
        steps = chunk * CHUNK + np.arange(CHUNK)
        flips = np.random.default_rng((seed, 2**31)).integers(
            self.relevant, size=int(steps[-1]) // self.period + 1
        )
        flipped = np.cumsum(np.eye(self.relevant, dtype=np.int64)[flips], axis=0)
        weights = 1.0 - 2.0 * (flipped[steps // self.period] % 2)
        y = np.sum(x[:, : self.relevant] * weights, axis=1)
        return x.astype(np.float32), y.astype(np.float32)

    def forward(self, step: int) -> Measures:
        """Return half the squared error as "loss"."""
        self._inputs, y = self._examples(step)
        return {"loss": 0.5 * ((self._inputs * self.weight).sum(1) - y).square()}

    def hessian_diagonal(self) -> dict[str, Tensor]:
        """Return the squared inputs."""
        return {"weight": self._inputs.square()}


class ShiftingRegression(DriftingRegression):
    """A linear regression whose target drifts and shifts, with noise of heavy tails.

    20 inputs, standard normal, an example a step. The weights of the target are drawn anew every
    500 steps, standard normal, and in between make a random walk of 0.01 a step. The noise of the
    target has Student's distribution of 3 degrees of freedom. Trained on half the squared error,
    judged by half the squared distance of predictions from the target without noise.

    Parameters
    ----------
    seeds : sequence of int
    """

    steps: ClassVar[int] = 5000
    every: ClassVar[int] = 500
    metric: ClassVar[str] = "train.error"
    judged_by: ClassVar[str] = "half the squared error but for the noise, over the second half"
    target: ClassVar[float] = 2.5
    #: Weights that stand still may be far from a new target where the first was learned.
    worse: ClassVar[float] = 30.0

    period: ClassVar[int] = 500
    walk: ClassVar[float] = 0.01
    degrees: ClassVar[float] = 3.0

    def _stretch(self, seed: int, chunk: int) -> tuple[Any, ...]:
        """Return the inputs of a chunk of steps, and targets with and without noise."""
        rng = np.random.default_rng((seed, chunk))
        x = rng.standard_normal((CHUNK, self.inputs))
        noise = rng.standard_t(self.degrees, CHUNK)
        steps = chunk * CHUNK + np.arange(CHUNK)
        weights = self._path(seed)[steps]
        y = np.sum(x * weights, axis=1)
        return tuple(part.astype(np.float32) for part in (x, y + noise, y))

    def _path(self, seed: int) -> Any:
        """Return the weights of the target at every step."""
        stretches = -(-(self.steps + CHUNK) // self.period)
        moves = np.random.default_rng((seed, 2**31)).standard_normal(
            (stretches, self.period, self.inputs)
        )
        moves[:, 1:] *= self.walk
        return np.cumsum(moves, axis=1).reshape(-1, self.inputs)

    def forward(self, step: int) -> Measures:
        """Return half the squared error as "loss", and as "error" that without noise."""
        self._inputs, noisy, clean = self._examples(step)
        prediction = (self._inputs * self.weight).sum(1)
        return {
            "loss": 0.5 * (prediction - noisy).square(),
            "error": 0.5 * (prediction.detach() - clean).square(),
        }


class LogisticRegression(Task):
    """Logistic regression on Wisconsin breast cancer, 569 cases, with a penalty of 1e-3 |w|^2 / 2.

    Batches of 32. Judged by the objective on all cases: its minimum is finite and known.

    Parameters
    ----------
    seeds : sequence of int
    """

    steps: ClassVar[int] = 3000
    every: ClassVar[int] = 100
    metric: ClassVar[str] = "test.loss"
    more_is_better: ClassVar[bool] = False
    judged_by: ClassVar[str] = "the objective on all cases at the end"
    target: ClassVar[float] = 0.065
    size: ClassVar[int] = 32

    def __init__(self, seeds: Sequence[int], **_: Any) -> None:
        super().__init__(seeds)
        from sklearn.datasets import load_breast_cancer

        x, y = load_breast_cancer(return_X_y=True)
        x = (x - x.mean(0)) / x.std(0)
        self._x = torch.tensor(x, dtype=torch.float32)
        self._y = torch.tensor(y, dtype=torch.float32)
        self.weight = drawn(seeds, (x.shape[1],), 0.1, 0)
        self.bias = nn.Parameter(torch.zeros(len(seeds), 1))

    def _objective(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("rnk,rk->rn", x, self.weight) + self.bias
        entropy = nn.functional.binary_cross_entropy_with_logits(scores, y, reduction="none")
        hits = ((scores.detach() > 0) == (y > 0.5)).to(scores.dtype)
        return entropy.mean(1) + 0.5e-3 * self.weight.square().sum(1), hits.mean(1)

    def forward(self, step: int) -> Measures:
        """Return objective and accuracy on a batch."""
        index = self.batch(step, self.size, len(self._y))
        loss, accuracy = self._objective(self._x[index], self._y[index])
        return {"loss": loss, "accuracy": accuracy}

    def evaluate(self) -> Measures:
        """Return objective and accuracy on all cases."""
        runs = len(self.seeds)
        loss, accuracy = self._objective(self._x.expand(runs, -1, -1), self._y.expand(runs, -1))
        return {"loss": loss, "accuracy": accuracy}
