"""A small residual network with batch normalization on CIFAR-100's coarse classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from benchmarks.training.data import coarse
from benchmarks.training.layers import BatchNorm, Linear, convolved, rows
from benchmarks.training.tasks.images import evaluated, sample, scaled
from benchmarks.training.tasks.task import Measures, Task

__all__ = ["ResidualCifar100"]

CHANNELS = (8, 16, 32)


class _Block(nn.Module):
    """Two convolutions with batch normalization, beside a bypass."""

    def __init__(self, seeds: Sequence[int], inputs: int, outputs: int, salt: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.first = Linear(seeds, 9 * inputs, outputs, salt)
        self.first_norm = BatchNorm(seeds, outputs)
        self.second = Linear(seeds, 9 * outputs, outputs, salt + 1)
        self.second_norm = BatchNorm(seeds, outputs)
        if self.stride > 1:
            self.bypass = Linear(seeds, inputs, outputs, salt + 2)
            self.bypass_norm = BatchNorm(seeds, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, at half the resolution where there are more channels."""
        y = self.first_norm(convolved(self.first, x, 3, stride=self.stride)).relu()
        y = self.second_norm(convolved(self.second, y, 3))
        if self.stride > 1:
            x = self.bypass_norm(convolved(self.bypass, x, 1, stride=self.stride))
        return (x + y).relu()


class ResidualCifar100(Task):
    """A residual network of eight layers on CIFAR-100's 20 coarse classes; batches of 64.

    A convolution of stride 2 and three blocks of 8, 16 and 32 channels at 16, 8 and 4 pixels, all
    with batch normalization. Tested on 2000 of the test images, the same ones always, with the
    statistics that 256 training images have at the weights that are tested: so averages of weights
    have their own. No augmentation.

    Parameters
    ----------
    seeds : sequence of int
    data : Path
        Folder with CIFAR-100, see `benchmarks.training.data.cifar`.
    """

    steps: ClassVar[int] = 1000
    every: ClassVar[int] = 100
    metric: ClassVar[str] = "test.accuracy"
    more_is_better: ClassVar[bool] = True
    judged_by: ClassVar[str] = "test accuracy at the end"
    target: ClassVar[float] = 0.3
    weight_decay: ClassVar[float] = 0.1
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "norms": ("*norm.*",),
        "output": ("output.*",),
        "convolutions": ("*",),
    }
    size: ClassVar[int] = 64
    #: Training images whose statistics a test is made with.
    normed_by: ClassVar[int] = 256

    def __init__(self, seeds: Sequence[int], data: Path | None = None, **_: Any) -> None:
        super().__init__(seeds)
        sets = coarse(data)
        self._images, self._labels = sets["train"]
        self._test = sample(*sets["test"])
        self.stem = Linear(seeds, 9 * 3, CHANNELS[0], 0)
        self.stem_norm = BatchNorm(seeds, CHANNELS[0])
        before = (CHANNELS[0], *CHANNELS[:-1])
        self.blocks = nn.ModuleList(
            [
                _Block(seeds, inputs, outputs, 1 + 3 * block)
                for block, (inputs, outputs) in enumerate(zip(before, CHANNELS, strict=True))
            ]
        )
        self.output = Linear(seeds, CHANNELS[-1], 20, 50)

    def _values(self, images: Tensor) -> Tensor:
        x = scaled(images)
        x = self.stem_norm(convolved(self.stem, x, 3, stride=2)).relu()
        for block in self.blocks:
            x = block(x)
        return self.output(x.mean((3, 4)))

    def forward(self, step: int) -> Measures:
        """Return cross entropy and accuracy on a batch."""
        index = self.batch(step, self.size, len(self._labels))
        loss, accuracy = rows(self._values(self._images[index]), self._labels[index])
        return {"loss": loss, "accuracy": accuracy}

    def evaluate(self) -> Measures:
        """Return cross entropy and accuracy on the test images, in parts."""
        self._values(self._images[: self.normed_by].expand(len(self.seeds), -1, -1, -1, -1))
        self.eval()
        try:
            return evaluated(self._values, *self._test, len(self.seeds))
        finally:
            self.train()
