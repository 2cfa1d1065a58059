"""A recurrent network that has to remember: the adding problem."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.training.layers import Linear, drawn
from benchmarks.training.tasks.task import CHUNK, Measures, Task

__all__ = ["AddingProblem"]

WIDTH = 32


class AddingProblem(Task):
    """A GRU of width 32 that adds two of 30 numbers (Hochreiter and Schmidhuber, 1997).

    Each step of a sequence has a number, uniform in [0, 1], and a mark: 1 for one number of the
    first half and one of the second, else 0. After the last step the network says the sum of the
    two. Batches of 32, drawn anew in every step; the error is squared. Who always says 1 has 0.167.

    Parameters
    ----------
    seeds : sequence of int
    """

    steps: ClassVar[int] = 1500
    every: ClassVar[int] = 50
    metric: ClassVar[str] = "test.loss"
    more_is_better: ClassVar[bool] = False
    judged_by: ClassVar[str] = "squared error on 512 other sequences at the end"
    target: ClassVar[float] = 0.01
    weight_decay: ClassVar[float] = 0.1
    groups: ClassVar[dict[str, tuple[str, ...]]] = {"output": ("output.*",), "cell": ("*",)}
    size: ClassVar[int] = 32
    length: ClassVar[int] = 30
    tested: ClassVar[int] = 512

    def __init__(self, seeds: Sequence[int], **_: Any) -> None:
        super().__init__(seeds)
        bound = WIDTH**-0.5
        self.from_input = drawn(seeds, (2, 3 * WIDTH), bound, 0)
        self.from_state = drawn(seeds, (WIDTH, 3 * WIDTH), bound, 1)
        self.input_bias = drawn(seeds, (3 * WIDTH,), bound, 2)
        self.state_bias = drawn(seeds, (3 * WIDTH,), bound, 3)
        self.output = Linear(seeds, WIDTH, 1, 2)
        self._test = _sequences(np.random.default_rng(2**32), self.tested, self.length)
        self._drawn: tuple[int, Tensor, Tensor] | None = None

    def _examples(self, step: int) -> tuple[Tensor, Tensor]:
        chunk, within = divmod(step, CHUNK)
        if self._drawn is None or self._drawn[0] != chunk:
            made = {
                seed: _sequences(
                    np.random.default_rng((seed, chunk)), CHUNK * self.size, self.length
                )
                for seed in dict.fromkeys(self.seeds)
            }
            inputs, sums = (
                torch.stack([made[seed][part] for seed in self.seeds]) for part in (0, 1)
            )
            self._drawn = (chunk, inputs, sums)
        part = slice(within * self.size, (within + 1) * self.size)
        return self._drawn[1][:, part], self._drawn[2][:, part]

    def _sums(self, inputs: Tensor) -> Tensor:
        """Return what the network says, (runs, n), of inputs (runs, n, length, 2)."""
        runs, n, length, _ = inputs.shape
        given = torch.baddbmm(self.input_bias[:, None], inputs.flatten(1, 2), self.from_input)
        state = given.new_zeros(runs, n, WIDTH)
        for x in given.reshape(runs, n, length, -1).unbind(2):
            kept = torch.baddbmm(self.state_bias[:, None], state, self.from_state)
            gates = (x[..., : 2 * WIDTH] + kept[..., : 2 * WIDTH]).sigmoid()
            reset, update = gates.chunk(2, dim=2)
            new = (x[..., 2 * WIDTH :] + reset * kept[..., 2 * WIDTH :]).tanh()
            state = torch.lerp(new, state, update)
        return self.output(state).squeeze(2)

    def forward(self, step: int) -> Measures:
        """Return the squared error on a batch."""
        inputs, sums = self._examples(step)
        return {"loss": (self._sums(inputs) - sums).square().mean(1)}

    def evaluate(self) -> Measures:
        """Return the squared error on sequences that are the same for all seeds."""
        inputs, sums = self._test
        runs = len(self.seeds)
        found = self._sums(inputs.expand(runs, -1, -1, -1))
        return {"loss": (found - sums).square().mean(1)}


def _sequences(rng: np.random.Generator, n: int, length: int) -> tuple[Tensor, Tensor]:
    """Return sequences (n, length, 2) of numbers and marks, and the sums of what is marked."""
    half = length // 2
    inputs = np.zeros((n, length, 2), dtype=np.float32)
    inputs[..., 0] = rng.random((n, length), dtype=np.float32)
    for start, end in ((0, half), (half, length)):
        inputs[np.arange(n), rng.integers(start, end, size=n), 1] = 1.0
    return torch.from_numpy(inputs), torch.from_numpy(inputs.prod(axis=2).sum(axis=1))
