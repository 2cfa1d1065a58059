"""A small convolutional network on CIFAR-10, and continual learning on CIFAR-100."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.training.data import cifar
from benchmarks.training.layers import Linear, convolved, rows
from benchmarks.training.tasks.task import Measures, Task

__all__ = ["ContinualAsReleased", "ContinualCifar100", "ConvolutionalCifar10"]


class ConvolutionalCifar10(Task):
    """Three convolutions of stride 2, of 8, 16 and 32 channels, and a linear layer; batches of 64.

    Tested on 2000 of the test images, the same ones always; no augmentation.

    Parameters
    ----------
    seeds : sequence of int
    data : Path
        Folder with CIFAR-10, see `benchmarks.training.data.cifar`.
    """

    steps: ClassVar[int] = 1000
    every: ClassVar[int] = 100
    metric: ClassVar[str] = "test.accuracy"
    more_is_better: ClassVar[bool] = True
    judged_by: ClassVar[str] = "test accuracy at the end"
    target: ClassVar[float] = 0.5
    weight_decay: ClassVar[float] = 0.1
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "convolutions": ("0.*", "1.*", "2.*"),
        "output": ("3.*",),
    }
    size: ClassVar[int] = 64
    tested: ClassVar[int] = 2000

    def __init__(self, seeds: Sequence[int], data: Path | None = None, **_: Any) -> None:
        super().__init__(seeds)
        sets = cifar(data, 10)
        self._images, self._labels = sets["train"]
        images, labels = sets["test"]
        chosen = np.random.default_rng(0).permutation(len(labels))[: self.tested]
        self._test_images, self._test_labels = images[chosen], labels[chosen]
        widths = (3, 8, 16, 32)
        for layer, (inputs, outputs) in enumerate(pairwise(widths)):
            self.add_module(str(layer), Linear(seeds, 9 * inputs, outputs, layer))
        self.add_module("3", Linear(seeds, 32 * 4 * 4, 10, 3))

    def _values(self, x: Tensor) -> Tensor:
        layers: list[Any] = list(self.children())
        *convolutions, last = layers
        for layer in convolutions:
            x = convolved(layer, x, 3, stride=2).relu()
        return last(x.flatten(2))

    def forward(self, step: int) -> Measures:
        """Return cross entropy and accuracy on a batch."""
        index = self.batch(step, self.size, len(self._labels))
        loss, accuracy = rows(self._values(scaled(self._images[index])), self._labels[index])
        return {"loss": loss, "accuracy": accuracy}

    def evaluate(self) -> Measures:
        """Return cross entropy and accuracy on the test images, in parts."""
        runs, losses, hits = len(self.seeds), [], []
        for start in range(0, self.tested, 250):
            images = scaled(self._test_images[start : start + 250]).expand(runs, -1, -1, -1, -1)
            labels = self._test_labels[start : start + 250].expand(runs, -1)
            loss, accuracy = rows(self._values(images), labels)
            losses.append(loss)
            hits.append(accuracy)
        return {"loss": torch.stack(losses).mean(0), "accuracy": torch.stack(hits).mean(0)}


class ContinualCifar100(Task):
    """Ten tasks of ten classes each, one pass over each, an image a step: as printed in the paper.

    Two convolutions of 3 by 3 with 16 and 32 channels, each with ReLU and 2 by 2 pooling, and a
    linear layer of ten outputs, which all tasks use in turn. Every image is first predicted, then
    learned from; accuracy is that of the predictions. Nothing is reset between tasks.

    Parameters
    ----------
    seeds : sequence of int
        Of the weights, of the order of the classes and of the images.
    data : Path
        Folder with CIFAR-100, see `benchmarks.training.data.cifar`.
    """

    steps: ClassVar[int] = 50_000
    every: ClassVar[int] = 250
    metric: ClassVar[str] = "train.accuracy"
    more_is_better: ClassVar[bool] = True
    judged_over: ClassVar[float] = 1.0
    judged_by: ClassVar[str] = "accuracy of predictions, over the whole run"
    target: ClassVar[float] = 0.35
    weight_decay: ClassVar[float] = 0.1
    compiled: ClassVar[bool] = True
    #: Units between the convolutions and the outputs.
    hidden: ClassVar[tuple[int, ...]] = ()
    groups: ClassVar[dict[str, tuple[str, ...]]] = {"last layer": ("2.*",), "others": ("*",)}

    def __init__(self, seeds: Sequence[int], data: Path | None = None, **_: Any) -> None:
        super().__init__(seeds)
        images, labels = cifar(data, 100)["train"]
        self._images = images
        labels_of = labels.numpy()
        unique = list(dict.fromkeys(seeds))
        orders = [_order(seed, labels_of) for seed in unique]
        self._index, self._within = (
            torch.from_numpy(np.stack([order[part] for order in orders], axis=1)) for part in (0, 1)
        )
        self._of_runs = torch.tensor([unique.index(seed) for seed in seeds])
        widths = (32 * 8 * 8, *self.hidden, 10)
        layers = [(9 * 3, 16), (9 * 16, 32), *pairwise(widths)]
        for layer, (inputs, outputs) in enumerate(layers):
            self.add_module(str(layer), Linear(seeds, inputs, outputs, layer))

    def image(self, step: int) -> Tensor:
        """Return the images of a step, one for each of the different seeds: (seeds, 3, 32, 32)."""
        return self._images[self._index[step]]

    def forward(self, step: int) -> Measures:
        """Return cross entropy and accuracy on a step's image."""
        x = (self.image(step).to(torch.float32) / 255)[self._of_runs][:, None]
        layers: list[Any] = list(self.children())
        first, second, *dense, last = layers
        for layer in (first, second):
            x = convolved(layer, x, 3).relu()
            x = nn.functional.max_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])
        x = x.flatten(2)
        for layer in dense:
            x = layer(x).relu()
        loss, accuracy = rows(last(x), self._within[step][self._of_runs][:, None])
        return {"loss": loss, "accuracy": accuracy}


class ContinualAsReleased(ContinualCifar100):
    """The same as the authors' released code has it: 128 hidden units more, and augmentation.

    Images are padded by 4, cropped at random and flipped half of the time.

    Parameters
    ----------
    seeds, data
        As for `ContinualCifar100`.
    """

    hidden: ClassVar[tuple[int, ...]] = (128,)
    groups: ClassVar[dict[str, tuple[str, ...]]] = {"last layer": ("3.*",), "others": ("*",)}

    def __init__(self, seeds: Sequence[int], data: Path | None = None, **more: Any) -> None:
        super().__init__(seeds, data, **more)
        drawn = [np.random.default_rng((seed, 1)) for seed in dict.fromkeys(seeds)]
        self._shifts = np.stack([rng.integers(9, size=(self.steps, 2)) for rng in drawn])
        self._flips = np.stack([rng.integers(2, size=self.steps) for rng in drawn])

    def image(self, step: int) -> Tensor:
        """Return the images of a step, shifted and flipped."""
        padded = nn.functional.pad(super().image(step), (4, 4, 4, 4))
        made = []
        for picture, shift, flip in zip(
            padded, self._shifts[:, step], self._flips[:, step], strict=True
        ):
            down, right = map(int, shift)
            part = picture[:, down : down + 32, right : right + 32]
            made.append(part.flip(2) if flip else part)
        return torch.stack(made)


def _order(seed: int, labels: Any) -> tuple[Any, Any]:
    """Return which image each step sees, and its class within the task."""
    rng = np.random.default_rng(seed)
    index, within = [], []
    for chosen in rng.permutation(100).reshape(10, 10):
        found = rng.permutation(np.flatnonzero(np.isin(labels, chosen)))
        index.append(found)
        within.append(np.argmax(labels[found][:, None] == chosen, axis=1))
    return np.concatenate(index), np.concatenate(within)


def scaled(images: Tensor) -> Tensor:
    """Return pixels of 0 to 255 as numbers of about unit variance."""
    return (images.to(torch.float32) - 121.0) / 64.0
