"""The tasks of the comparison, by name."""

from benchmarks.training.tasks.digits import DigitsNetwork
from benchmarks.training.tasks.images import (
    ContinualAsReleased,
    ContinualCifar100,
    ConvolutionalCifar10,
)
from benchmarks.training.tasks.linear import DriftingRegression, LogisticRegression
from benchmarks.training.tasks.task import Measures, Task
from benchmarks.training.tasks.text import CharacterModel

__all__ = ["TASKS", "Measures", "Task"]

TASKS: dict[str, type[Task]] = {
    "drift": DriftingRegression,
    "logistic": LogisticRegression,
    "digits": DigitsNetwork,
    "characters": CharacterModel,
    "cifar10": ConvolutionalCifar10,
    "continual": ContinualCifar100,
    "continual-as-released": ContinualAsReleased,
}
