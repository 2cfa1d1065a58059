"""A small convolutional network on CIFAR-10, fine-tuned, and continual learning on CIFAR-100."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.training.data import Split, cifar, coarse
from benchmarks.training.layers import Linear, convolved, rows
from benchmarks.training.tasks.task import Measures, Task

__all__ = ["ContinualAsReleased", "ContinualCifar100", "ConvolutionalCifar10", "FineTuning"]


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

    def __init__(self, seeds: Sequence[int], data: Path | None = None, **_: Any) -> None:
        super().__init__(seeds)
        sets = self.sets(data)
        self._images, self._labels = sets["train"]
        self._test = sample(*sets["test"])
        widths = (3, 8, 16, 32)
        for layer, (inputs, outputs) in enumerate(pairwise(widths)):
            self.add_module(str(layer), Linear(seeds, 9 * inputs, outputs, layer))
        self.add_module("3", Linear(seeds, 32 * 4 * 4, 10, 3))

    @staticmethod
    def sets(data: Path | None) -> dict[str, Split]:
        """Return the images and labels to train on and to test on."""
        return cifar(data, 10)

    def _values(self, images: Tensor) -> Tensor:
        layers: list[Any] = list(self.children())
        *convolutions, last = layers
        x = scaled(images)
        for layer in convolutions:
            x = convolved(layer, x, 3, stride=2).relu()
        return last(x.flatten(2))

    def forward(self, step: int) -> Measures:
        """Return cross entropy and accuracy on a batch."""
        index = self.batch(step, self.size, len(self._labels))
        loss, accuracy = rows(self._values(self._images[index]), self._labels[index])
        return {"loss": loss, "accuracy": accuracy}

    def evaluate(self) -> Measures:
        """Return cross entropy and accuracy on the test images, in parts."""
        return evaluated(self._values, *self._test, len(self.seeds))


class FineTuning(ConvolutionalCifar10):
    """The network for CIFAR-10, trained on ten coarse classes of CIFAR-100, learns the ten others.

    Before: 1000 steps on the first ten with AdamW and a cosine from 3e-3, for each seed. Then the
    last layer is drawn anew, and all weights are trained on 10,000 images of the others.

    Parameters
    ----------
    seeds : sequence of int
    data : Path
        Folder with CIFAR-100, see `benchmarks.training.data.cifar`.
    """

    steps: ClassVar[int] = 500
    every: ClassVar[int] = 50
    target: ClassVar[float] = 0.4
    #: Steps before, and images to learn from after.
    before: ClassVar[int] = 1000
    images: ClassVar[int] = 10_000

    def __init__(self, seeds: Sequence[int], data: Path | None = None, **_: Any) -> None:
        super().__init__(seeds, data)
        self._images, self._labels = sample(self._images, self._labels, self.images)
        learned = [_pretrained(seed, data, self.before) for seed in seeds]
        with torch.no_grad():
            for name, param in self.named_parameters():
                if not name.startswith("3."):
                    param.copy_(torch.cat([of_seed[name] for of_seed in learned]))

    @staticmethod
    def sets(data: Path | None) -> dict[str, Split]:
        """Return the images of the last ten coarse classes."""
        return _of_classes(data, 10)


class _Pretraining(ConvolutionalCifar10):
    @staticmethod
    def sets(data: Path | None) -> dict[str, Split]:
        """Return the images of the first ten coarse classes."""
        return _of_classes(data, 0)


def _of_classes(data: Path | None, first: int) -> dict[str, Split]:
    """Return CIFAR-100's images of ten coarse classes, which become 0 to 9."""
    found = {}
    for split, (images, labels) in coarse(data).items():
        chosen = (labels >= first) & (labels < first + 10)
        found[split] = images[chosen], labels[chosen] - first
    return found


@lru_cache(maxsize=8)
def _pretrained(seed: int, data: Path | None, steps: int) -> dict[str, Tensor]:
    """Return the weights of a network that has learned the first ten coarse classes."""
    task = _Pretraining((seed,), data)
    opt = torch.optim.AdamW(task.parameters(), lr=3e-3, weight_decay=task.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for step in range(steps):
        opt.zero_grad()
        task(step)["loss"].sum().backward()
        opt.step()
        schedule.step()
    return {name: param.detach() for name, param in task.named_parameters()}


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


def sample(images: Tensor, labels: Tensor, n: int = 2000) -> tuple[Tensor, Tensor]:
    """Return n of the images and their labels, always the same ones."""
    chosen = np.random.default_rng(0).permutation(len(labels))[:n]
    return images[chosen], labels[chosen]


def evaluated(
    values: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, runs: int
) -> Measures:
    """Return cross entropy and accuracy of all runs on the same images, looked at in parts.

    Parameters
    ----------
    values : callable
        From images (runs, n, 3, height, width) to scores (runs, n, classes).
    images : tensor (n, 3, height, width)
    labels : integer tensor (n,)
    runs : int
    """
    losses, hits = torch.zeros(runs), torch.zeros(runs)
    for some, of_some in zip(images.split(250), labels.split(250), strict=True):
        scores = values(some.expand(runs, -1, -1, -1, -1))
        loss, accuracy = rows(scores, of_some.expand(runs, -1))
        losses += len(some) / len(images) * loss
        hits += len(some) / len(images) * accuracy
    return {"loss": losses, "accuracy": hits}


def scaled(images: Tensor) -> Tensor:
    """Return pixels of 0 to 255 as numbers of about unit variance."""
    return (images.to(torch.float32) - 121.0) / 64.0
