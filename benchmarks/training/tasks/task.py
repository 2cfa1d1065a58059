"""What a task is: networks side by side, their losses, and how they are judged."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Measures", "Task"]

#: Values by name, each a tensor with an entry for every run.
Measures = dict[str, Tensor]

#: Steps whose random numbers are drawn at once.
CHUNK = 256


class Task(nn.Module, ABC):
    """Networks side by side on one problem; what a step sees depends on seed and step alone.

    Parameters
    ----------
    seeds : sequence of int
        One for each run; equal ones see equal data from equal weights.
    """

    #: Steps of a run, and between two entries of its log.
    steps: ClassVar[int]
    every: ClassVar[int]
    #: What a run is judged by, as "part.measure", and whether more of it is better: its mean over
    #: this part of the run at the end, or for 0 the last entry of the log.
    metric: ClassVar[str]
    more_is_better: ClassVar[bool]
    judged_over: ClassVar[float] = 0.0
    #: The same in words.
    judged_by: ClassVar[str]
    #: What counts as having arrived.
    target: ClassVar[float]
    #: A run has diverged where it ends with a loss this many times that of its start.
    worse: ClassVar[float] = 1.5
    #: Decoupled weight decay of AdamW, Lion and RMSprop; SGD has none.
    weight_decay: ClassVar[float] = 0.0
    #: Whether optimizers are compiled: worth its seconds for long runs of large networks.
    compiled: ClassVar[bool] = False
    #: Whether parameters have a leading axis of runs; without it there is one run.
    replicated: ClassVar[bool] = True
    #: Named groups of parameters that `blocks="groups"` stands for.
    groups: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self.seeds = tuple(seeds)
        self._chunk: tuple[int, int, Tensor] | None = None

    @abstractmethod
    def forward(self, step: int) -> Measures:
        """Return at least the losses of a step's data as "loss", each of shape (runs,)."""

    def evaluate(self) -> Measures:
        """Return measures on data that is not trained on; none where training is the test."""
        return {}

    def hessian_diagonal(self) -> dict[str, Tensor] | None:
        """Return the diagonal of the last step's Hessian by name, where it is known."""
        return None

    def batch(self, step: int, size: int, among: int) -> Tensor:
        """Return which examples a step sees, drawn with replacement: integers (runs, size)."""
        chunk, within = divmod(step, CHUNK)
        if self._chunk is None or self._chunk[:2] != (chunk, size):
            drawn = {
                seed: np.random.default_rng((seed, chunk)).integers(among, size=(CHUNK, size))
                for seed in set(self.seeds)
            }
            stacked = np.stack([drawn[seed] for seed in self.seeds], axis=1)
            self._chunk = (chunk, size, torch.from_numpy(stacked))
        return self._chunk[2][within]
