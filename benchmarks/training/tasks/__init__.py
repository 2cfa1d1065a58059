"""The tasks of the comparison, by name."""

from training.tasks.digits import DigitsNetwork
from training.tasks.images import ContinualAsReleased, ContinualCifar100, ConvolutionalCifar10
from training.tasks.linear import DriftingRegression, LogisticRegression
from training.tasks.task import Measures, Task
from training.tasks.text import CharacterModel

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
