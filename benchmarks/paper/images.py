"""ResNet-18 on CIFAR-10 and on ImageNet."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.paper.resnet import GROUPS, ResNet18
from benchmarks.training.data import cifar
from benchmarks.training.imagenet import ImageSet, image_sets
from benchmarks.training.tasks import Measures, Task

__all__ = ["Cifar10", "ImageNet"]


class _Classifier(Task):
    """One network; every image once in each pass, in an order of seed and pass."""

    replicated: ClassVar[bool] = False
    compiled: ClassVar[bool] = True
    metric: ClassVar[str] = "test.accuracy"
    more_is_better: ClassVar[bool] = True
    judged_by: ClassVar[str] = "test accuracy at the end"
    weight_decay: ClassVar[float] = 0.1
    groups: ClassVar[dict[str, tuple[str, ...]]] = GROUPS
    size: ClassVar[int]

    network: ResNet18

    def __init__(self, seeds: Sequence[int], smoke: bool) -> None:
        super().__init__(seeds)
        (self.seed,) = seeds
        torch.manual_seed(self.seed)  # of the initial weights
        self.batch_size = 4 if smoke else self.size

    def order(self, epoch: int, among: int) -> Any:
        """Return the order in which a pass sees the images."""
        return np.random.default_rng((self.seed, epoch)).permutation(among)

    def _measures(self, images: Tensor, labels: Tensor) -> Measures:
        values = self.network(images)
        hits = (values.detach().argmax(1) == labels).float().mean()
        return {
            "loss": nn.functional.cross_entropy(values, labels).reshape(1),
            "accuracy": hits.reshape(1),
        }

    def _judged(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Measures:
        self.network.eval()
        sums: dict[str, Any] = {}
        count = 0
        for images, labels in batches:
            for name, value in self._measures(images, labels).items():
                sums[name] = sums.get(name, 0.0) + len(labels) * value
            count += len(labels)
        self.network.train()
        return {name: total / count for name, total in sums.items()}


class Cifar10(_Classifier):
    """CIFAR-10 for 60 passes in batches of 100, without augmentation.

    Parameters
    ----------
    seeds : sequence of int
        One.
    data : Path
        Folder with CIFAR-10, see `benchmarks.training.data.cifar`.
    smoke : bool
        A narrow network, small batches and few test images.
    """

    steps: ClassVar[int] = 60 * 500
    every: ClassVar[int] = 500
    target: ClassVar[float] = 0.9
    size: ClassVar[int] = 100

    def __init__(
        self, seeds: Sequence[int], data: Path | None = None, smoke: bool = False, **_: Any
    ) -> None:
        super().__init__(seeds, smoke)
        self.network = ResNet18(10, large=False, width=8 if smoke else 64)
        for split, (images, labels) in cifar(data, 10).items():
            kept = slice(32) if smoke and split == "test" else slice(None)
            self.register_buffer(f"{split}_images", images[kept], persistent=False)
            self.register_buffer(f"{split}_labels", labels[kept], persistent=False)
        self._epoch, self._order = -1, torch.empty(0)

    def forward(self, step: int) -> Measures:
        """Return cross entropy and accuracy on a batch."""
        images, labels = self.get_buffer("train_images"), self.get_buffer("train_labels")
        epoch, within = divmod(step, len(labels) // self.batch_size)
        if epoch != self._epoch:
            order = torch.from_numpy(self.order(epoch, len(labels)))
            self._epoch, self._order = epoch, order.to(images.device)
        index = self._order[within * self.batch_size : (within + 1) * self.batch_size]
        return self._measures(_scaled(images[index]), labels[index])

    def evaluate(self) -> Measures:
        """Return cross entropy and accuracy on the test images."""
        images, labels = self.get_buffer("test_images"), self.get_buffer("test_labels")
        parts = zip(images.split(500), labels.split(500), strict=True)
        return self._judged((_scaled(part), truth) for part, truth in parts)


class ImageNet(_Classifier):
    """ImageNet for 90 passes in batches of 256, random crops and flips.

    The small subset of 50 classes at 64 by 64 pixels is a stand-in for trials.

    Parameters
    ----------
    seeds : sequence of int
        One.
    data : Path
        Folder with ImageNet, see `benchmarks.training.imagenet.image_sets`.
    smoke : bool
        A narrow network, small batches and few test images.
    """

    steps: ClassVar[int] = 90 * (1_281_167 // 256)
    every: ClassVar[int] = 1_281_167 // 256
    target: ClassVar[float] = 0.7
    size: ClassVar[int] = 256

    def __init__(
        self, seeds: Sequence[int], data: Path | None = None, smoke: bool = False, **_: Any
    ) -> None:
        super().__init__(seeds, smoke)
        sets = image_sets(data, small=smoke)
        self._train, self._test = sets["train"], sets["test"]
        self._tested = min(32, len(self._test)) if smoke else len(self._test)
        self._workers = 0 if smoke else 8
        self.network = ResNet18(self._train.classes, large=True, width=8 if smoke else 64)
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None
        self._next = -1

    def _batches_from(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches from a step on, passes without end."""
        each = max(1, len(self._train) // self.batch_size)
        while True:
            epoch, within = divmod(step, each)
            order = self.order(epoch, len(self._train))
            keys = [(self.seed, epoch, int(index)) for index in order]
            parts = [
                keys[at * self.batch_size : (at + 1) * self.batch_size]
                for at in range(within, each)
            ]
            yield from self._loaded(self._train, parts)
            step += len(parts)

    def _loaded(self, images: ImageSet, parts: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = torch.utils.data.DataLoader(
            images, batch_sampler=parts, num_workers=self._workers, pin_memory=False
        )
        device = self.network.last.weight.device
        for pictures, labels in loader:
            yield pictures.to(device), labels.to(device)

    def forward(self, step: int) -> Measures:
        """Return cross entropy and accuracy on a batch."""
        if step != self._next or self._batches is None:
            self._batches = self._batches_from(step)
        self._next = step + 1
        return self._measures(*next(self._batches))

    def evaluate(self) -> Measures:
        """Return cross entropy and accuracy on the test images."""
        keys = [(0, 0, index) for index in range(self._tested)]
        parts = [keys[at : at + 256] for at in range(0, len(keys), 256)]
        return self._judged(self._loaded(self._test, parts))


def _scaled(images: Tensor) -> Tensor:
    """Return pixels between -1 and 1."""
    return images.to(torch.float32) / 127.5 - 1.0
