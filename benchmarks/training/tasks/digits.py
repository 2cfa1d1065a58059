"""Handwritten digits: a network of two hidden layers, and an autoencoder."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.training.layers import Linear, rows
from benchmarks.training.tasks.task import Measures, Task
from metaopt.demo.data import load_digits

__all__ = ["Autoencoder", "DigitsNetwork", "OneBatchFirst"]


class DigitsNetwork(Task):
    """A 64-128-128-10 network with ReLU on scikit-learn's digits, batches of 64.

    Parameters
    ----------
    seeds : sequence of int
    """

    steps: ClassVar[int] = 3000
    every: ClassVar[int] = 25
    metric: ClassVar[str] = "test.accuracy"
    more_is_better: ClassVar[bool] = True
    judged_by: ClassVar[str] = "test accuracy at the end"
    target: ClassVar[float] = 0.95
    weight_decay: ClassVar[float] = 0.1
    groups: ClassVar[dict[str, tuple[str, ...]]] = {"hidden": ("0.*", "1.*"), "output": ("2.*",)}
    size: ClassVar[int] = 64

    def __init__(self, seeds: Sequence[int], **_: Any) -> None:
        super().__init__(seeds)
        digits = load_digits()
        self._train = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
        self._test = torch.from_numpy(digits.test_images), torch.from_numpy(digits.test_labels)
        widths = (64, 128, 128, 10)
        for layer, (inputs, outputs) in enumerate(pairwise(widths)):
            self.add_module(str(layer), Linear(seeds, inputs, outputs, layer))

    def _values(self, x: Tensor) -> Tensor:
        layers = list(self.children())
        for layer in layers[:-1]:
            x = layer(x).relu()
        return layers[-1](x)

    def forward(self, step: int) -> Measures:
        """Return cross entropy and accuracy on a batch."""
        images, labels = self._train
        index = self.batch(step, self.size, len(labels))
        loss, accuracy = rows(self._values(images[index]), labels[index])
        return {"loss": loss, "accuracy": accuracy}

    def evaluate(self) -> Measures:
        """Return cross entropy and accuracy on the test images."""
        runs = len(self.seeds)
        images, labels = self._test
        loss, accuracy = rows(self._values(images.expand(runs, -1, -1)), labels.expand(runs, -1))
        return {"loss": loss, "accuracy": accuracy}


class OneBatchFirst(DigitsNetwork):
    """The digits network, trained on one and the same batch before it sees the others.

    Parameters
    ----------
    seeds : sequence of int
    """

    #: Steps on the one batch.
    alone: ClassVar[int] = 1000
    steps: ClassVar[int] = alone + DigitsNetwork.steps
    every: ClassVar[int] = 100

    def batch(self, step: int, size: int, among: int) -> Tensor:
        """Return which examples a step sees: those of step 0 as long as it is alone."""
        return super().batch(0 if step < self.alone else step, size, among)

    def evaluate(self) -> Measures:
        """Return also "dead", the part of hidden units that are 0 on all training images."""
        images, _ = self._train
        x, dead = images.expand(len(self.seeds), -1, -1), []
        for layer in list(self.children())[:-1]:
            x = layer(x).relu()
            dead.append((x == 0.0).all(1))
        return super().evaluate() | {"dead": torch.cat(dead, 1).float().mean(1)}


class Autoencoder(Task):
    """A 64-64-32-8-32-64-64 network with tanh that reproduces scikit-learn's digits.

    The code of eight numbers and the outputs are linear; the loss is the squared error, summed over
    pixels. Batches of 64.

    Parameters
    ----------
    seeds : sequence of int
    """

    steps: ClassVar[int] = 3000
    every: ClassVar[int] = 100
    metric: ClassVar[str] = "test.loss"
    more_is_better: ClassVar[bool] = False
    judged_by: ClassVar[str] = "squared error of a test image at the end"
    target: ClassVar[float] = 1.1
    weight_decay: ClassVar[float] = 0.1
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "encoder": ("0.*", "1.*", "2.*"),
        "decoder": ("3.*", "4.*", "5.*"),
    }
    size: ClassVar[int] = 64

    def __init__(self, seeds: Sequence[int], **_: Any) -> None:
        super().__init__(seeds)
        digits = load_digits()
        self._train = torch.from_numpy(digits.train_images)
        self._test = torch.from_numpy(digits.test_images)
        widths = (64, 64, 32, 8, 32, 64, 64)
        for layer, (inputs, outputs) in enumerate(pairwise(widths)):
            self.add_module(str(layer), Linear(seeds, inputs, outputs, layer))

    def _error(self, images: Tensor) -> Tensor:
        x = images
        for name, layer in self.named_children():
            x = layer(x) if name in ("2", "5") else layer(x).tanh()
        return (x - images).square().sum(2).mean(1)

    def forward(self, step: int) -> Measures:
        """Return the squared error of an image on a batch."""
        return {"loss": self._error(self._train[self.batch(step, self.size, len(self._train))])}

    def evaluate(self) -> Measures:
        """Return the squared error of an image on the test images."""
        return {"loss": self._error(self._test.expand(len(self.seeds), -1, -1))}
