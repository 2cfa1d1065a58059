"""Small language models, of characters and of bytes: transformer layers."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.training.data import Array, shakespeare, wikitext
from benchmarks.training.layers import Linear, drawn
from benchmarks.training.tasks.task import Measures, Task

__all__ = ["ByteModel", "CharacterModel"]

HEADS = 4


class _Layer(nn.Module):
    """Causal attention and a network of one hidden layer, each after a norm and beside a bypass."""

    def __init__(self, seeds: Sequence[int], width: int, salt: int) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.ones(len(seeds), width))
        self.attention = Linear(seeds, width, 3 * width, salt)
        self.mixed = Linear(seeds, width, width, salt + 1)
        self.between = nn.Parameter(torch.ones(len(seeds), width))
        self.up = Linear(seeds, width, 4 * width, salt + 2)
        self.down = Linear(seeds, 4 * width, width, salt + 3)

    def forward(self, x: Tensor, length: int) -> Tensor:
        """Return the outputs for inputs (runs, n * length, width)."""
        runs, _, width = x.shape
        heads = self.attention(_normed(x, self.before)).reshape(
            -1, length, 3, HEADS, width // HEADS
        )
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.mixed(mixed.transpose(1, 2).reshape(runs, -1, width))
        return x + self.down(nn.functional.gelu(self.up(_normed(x, self.between))))


class _LanguageModel(Task):
    """Transformer layers that predict each token of a text from those before it."""

    metric: ClassVar[str] = "test.loss"
    more_is_better: ClassVar[bool] = False
    judged_by: ClassVar[str] = "test loss at the end"
    weight_decay: ClassVar[float] = 0.1
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "embeddings": ("tokens", "places", "last.*"),
        "layers": ("*",),
    }
    size: ClassVar[int] = 16
    depth: ClassVar[int]
    width: ClassVar[int]
    length: ClassVar[int]

    def __init__(self, seeds: Sequence[int], data: Path | None = None, **_: Any) -> None:
        super().__init__(seeds)
        train, test, vocabulary = self.texts(data)
        self._train = torch.from_numpy(train)
        starts = torch.linspace(0, len(test) - self.length - 1, 64).long()
        self._test = torch.from_numpy(test)[starts[:, None] + torch.arange(self.length + 1)]
        self.tokens = drawn(seeds, (vocabulary, self.width), 0.1, 100)
        self.places = drawn(seeds, (self.length, self.width), 0.1, 101)
        self.layers = nn.ModuleList(
            [_Layer(seeds, self.width, 51 + 10 * layer) for layer in range(self.depth)]
        )
        self.after = nn.Parameter(torch.ones(len(seeds), self.width))
        self.last = Linear(seeds, self.width, vocabulary, 55)

    @staticmethod
    @abstractmethod
    def texts(data: Path | None) -> tuple[Array, Array, int]:
        """Return the tokens to train on and to test on, integers, and how many there are."""

    def _scores(self, tokens: Tensor) -> Tensor:
        """Return scores of what follows, (runs, n * length, vocabulary) for (runs, n, length)."""
        runs = len(tokens)
        vocabulary, width = self.tokens.shape[1:]
        offset = vocabulary * torch.arange(runs)[:, None, None]
        x = nn.functional.embedding(tokens.long() + offset, self.tokens.reshape(-1, width))
        x = (x + self.places[:, None]).reshape(runs, -1, width)
        for layer in self.layers:
            x = layer(x, self.length)
        scores: Tensor = self.last(_normed(x, self.after))
        return scores

    def _loss(self, text: Tensor) -> Tensor:
        """Return the entropy per token of each run's texts, (runs, n, length + 1)."""
        entropy = nn.functional.cross_entropy(
            self._scores(text[..., :-1]).transpose(1, 2),
            text[..., 1:].long().flatten(1),
            reduction="none",
        )
        return entropy.mean(1)

    def forward(self, step: int) -> Measures:
        """Return the entropy per token, in nats, on a batch."""
        starts = self.batch(step, self.size, len(self._train) - self.length - 1)
        return {"loss": self._loss(self._train[starts[..., None] + torch.arange(self.length + 1)])}

    def evaluate(self) -> Measures:
        """Return the entropy per token on 64 texts spread over those to test on."""
        return {"loss": self._loss(self._test.expand(len(self.seeds), -1, -1))}


class CharacterModel(_LanguageModel):
    """One transformer layer of width 48 on Tiny Shakespeare, batches of 16 texts of 32 characters.

    Parameters
    ----------
    seeds : sequence of int
    data : Path
        Folder with tinyshakespeare.txt or tinyshakespeare.txt.xz.
    """

    steps: ClassVar[int] = 1000
    every: ClassVar[int] = 50
    target: ClassVar[float] = 2.3
    depth: ClassVar[int] = 1
    width: ClassVar[int] = 48
    length: ClassVar[int] = 32

    @staticmethod
    def texts(data: Path | None) -> tuple[Array, Array, int]:
        """Return nine tenths of the plays, the last tenth, and the number of characters."""
        return shakespeare(data)


class ByteModel(_LanguageModel):
    """Two transformer layers of width 48 on the bytes of WikiText-2, batches of 16 texts of 48.

    Parameters
    ----------
    seeds : sequence of int
    data : Path
        Folder with WikiText-2, see `benchmarks.training.data.wikitext`.
    """

    steps: ClassVar[int] = 1000
    every: ClassVar[int] = 50
    target: ClassVar[float] = 2.1
    depth: ClassVar[int] = 2
    width: ClassVar[int] = 48
    length: ClassVar[int] = 48

    @staticmethod
    def texts(data: Path | None) -> tuple[Array, Array, int]:
        """Return the parts to train on and to validate by, and 256."""
        found = wikitext(data)
        return found["train"], found["valid"], 256


def _normed(x: Tensor, gain: Tensor) -> Tensor:
    width = x.shape[2]
    scale = torch.rsqrt(x.square().mean(2, keepdim=True) + 1e-6 / math.sqrt(width))
    return x * scale * gain[:, None]
