"""The handwritten digits of scikit-learn, split once and for all."""

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Digits", "load_digits"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Digits:
    """Images of handwritten digits, 8 by 8 pixels between 0 and 1, and which digit each shows."""

    train_images: Array  # (1437, 64) float32
    train_labels: Array  # (1437,) integers 0 to 9
    test_images: Array  # (360, 64) float32
    test_labels: Array  # (360,)


def load_digits() -> Digits:
    """Return the data set, a fifth of it held out for testing with every digit in proportion.

    The split is fixed: seeds of runs do not change it.
    """
    from sklearn import datasets, model_selection  # imported late, as `--help` does without it

    images, labels = datasets.load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    parts = model_selection.train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    train_images, test_images, train_labels, test_labels = parts
    return Digits(train_images, train_labels, test_images, test_labels)
