"""A small language model on characters: one transformer layer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.training.data import shakespeare
from benchmarks.training.layers import Linear, drawn
from benchmarks.training.tasks.task import Measures, Task

__all__ = ["CharacterModel"]

WIDTH, HEADS = 48, 4


class CharacterModel(Task):
    """One transformer layer of width 48 on Tiny Shakespeare, batches of 16 texts of 32 characters.

    Parameters
    ----------
    seeds : sequence of int
    data : Path
        Folder with tinyshakespeare.txt or tinyshakespeare.txt.xz.
    """

    steps: ClassVar[int] = 1000
    every: ClassVar[int] = 50
    metric: ClassVar[str] = "test.loss"
    more_is_better: ClassVar[bool] = False
    judged_by: ClassVar[str] = "test loss at the end"
    target: ClassVar[float] = 2.3
    weight_decay: ClassVar[float] = 0.1
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "embeddings": ("characters", "places", "last.*"),
        "layer": ("*",),
    }
    size: ClassVar[int] = 16
    length: ClassVar[int] = 32

    def __init__(self, seeds: Sequence[int], data: Path | None = None, **_: Any) -> None:
        super().__init__(seeds)
        train, test, vocabulary = shakespeare(data)
        self._train = torch.from_numpy(train)
        starts = torch.linspace(0, len(test) - self.length - 1, 64).long()
        self._test = torch.from_numpy(test)[starts[:, None] + torch.arange(self.length + 1)]
        self.characters = drawn(seeds, (vocabulary, WIDTH), 0.1, 100)
        self.places = drawn(seeds, (self.length, WIDTH), 0.1, 101)
        self.before = nn.Parameter(torch.ones(len(seeds), WIDTH))
        self.attention = Linear(seeds, WIDTH, 3 * WIDTH, 51)
        self.mixed = Linear(seeds, WIDTH, WIDTH, 52)
        self.between = nn.Parameter(torch.ones(len(seeds), WIDTH))
        self.up = Linear(seeds, WIDTH, 4 * WIDTH, 53)
        self.down = Linear(seeds, 4 * WIDTH, WIDTH, 54)
        self.after = nn.Parameter(torch.ones(len(seeds), WIDTH))
        self.last = Linear(seeds, WIDTH, vocabulary, 55)

    def _loss(self, text: Tensor) -> Tensor:
        """Return the entropy per character of each run's texts, (runs, n, length + 1)."""
        runs, n, _ = text.shape
        vocabulary = self.characters.shape[1]
        inputs, targets = text[..., :-1], text[..., 1:]
        offset = vocabulary * torch.arange(runs)[:, None, None]
        x = nn.functional.embedding(inputs + offset, self.characters.reshape(-1, WIDTH))
        x = (x + self.places[:, None]).reshape(runs, -1, WIDTH)
        heads = self.attention(_normed(x, self.before)).reshape(
            runs * n, self.length, 3, HEADS, WIDTH // HEADS
        )
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.mixed(mixed.transpose(1, 2).reshape(runs, -1, WIDTH))
        x = x + self.down(nn.functional.gelu(self.up(_normed(x, self.between))))
        scores = self.last(_normed(x, self.after))
        entropy = nn.functional.cross_entropy(
            scores.transpose(1, 2), targets.reshape(runs, -1), reduction="none"
        )
        return entropy.mean(1)

    def forward(self, step: int) -> Measures:
        """Return the entropy per character, in nats, on a batch."""
        starts = self.batch(step, self.size, len(self._train) - self.length - 1)
        return {"loss": self._loss(self._train[starts[..., None] + torch.arange(self.length + 1)])}

    def evaluate(self) -> Measures:
        """Return the entropy per character on 64 texts spread over the last tenth of the plays."""
        return {"loss": self._loss(self._test.expand(len(self.seeds), -1, -1))}


def _normed(x: Tensor, gain: Tensor) -> Tensor:
    scale = torch.rsqrt(x.square().mean(2, keepdim=True) + 1e-6 / math.sqrt(WIDTH))
    return x * scale * gain[:, None]
