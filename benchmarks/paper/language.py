"""The language model on TinyStories."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.paper.llama import Llama
from benchmarks.training.stories import stories
from benchmarks.training.tasks import Measures, Task

__all__ = ["TinyStories"]


class TinyStories(Task):
    """Texts of 256 tokens of TinyStories, batches of 128, 30,000 steps.

    Parameters
    ----------
    seeds : sequence of int
        One.
    data : Path
        Folder with TinyStories, see `benchmarks.training.stories.stories`.
    smoke : bool
        A narrow network, few and short texts.
    """

    replicated: ClassVar[bool] = False
    compiled: ClassVar[bool] = True
    steps: ClassVar[int] = 30_000
    every: ClassVar[int] = 500
    metric: ClassVar[str] = "test.loss"
    more_is_better: ClassVar[bool] = False
    judged_by: ClassVar[str] = "test loss at the end"
    target: ClassVar[float] = 1.5
    weight_decay: ClassVar[float] = 0.1

    def __init__(
        self, seeds: Sequence[int], data: Path | None = None, smoke: bool = False, **_: Any
    ) -> None:
        super().__init__(seeds)
        train, test, vocabulary = stories(data)
        self._train, self._test = torch.from_numpy(train), torch.from_numpy(test)
        self.batch_size, self.length = (2, 32) if smoke else (128, 256)
        tested = 4 if smoke else 1000
        starts = np.linspace(0, len(test) - self.length - 1, tested).astype(np.int64)
        self._starts = torch.from_numpy(starts)
        torch.manual_seed(seeds[0])  # of the initial weights
        size: dict[str, int] = {"width": 48, "layers": 2, "hidden": 96} if smoke else {}
        self.network = Llama(vocabulary, **size, length=self.length)

    def _loss(self, tokens: Tensor, starts: Tensor) -> Tensor:
        texts = tokens[starts[:, None] + torch.arange(self.length + 1)].long()
        texts = texts.to(self.network.tokens.weight.device)
        scores = self.network(texts[:, :-1])
        return nn.functional.cross_entropy(scores.flatten(0, 1), texts[:, 1:].flatten())

    def forward(self, step: int) -> Measures:
        """Return the entropy per token, in nats, on a batch."""
        (starts,) = self.batch(step, self.batch_size, len(self._train) - self.length - 1)
        return {"loss": self._loss(self._train, starts).reshape(1)}

    def evaluate(self) -> Measures:
        """Return the entropy per token on texts that are not trained on."""
        losses = [self._loss(self._test, part) * len(part) for part in self._starts.split(50)]
        return {"loss": (torch.stack(losses).sum() / len(self._starts)).reshape(1)}
