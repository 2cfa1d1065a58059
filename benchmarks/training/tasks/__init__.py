"""The tasks of the comparison, by name."""

from benchmarks.training.tasks.digits import Autoencoder, DigitsNetwork
from benchmarks.training.tasks.images import (
    ContinualAsReleased,
    ContinualCifar100,
    ConvolutionalCifar10,
    FineTuning,
)
from benchmarks.training.tasks.linear import (
    DriftingRegression,
    LogisticRegression,
    ShiftingRegression,
)
from benchmarks.training.tasks.recurrent import AddingProblem
from benchmarks.training.tasks.residual import ResidualCifar100
from benchmarks.training.tasks.task import Measures, Task
from benchmarks.training.tasks.text import ByteModel, CharacterModel

__all__ = ["TASKS", "Measures", "Task"]

TASKS: dict[str, type[Task]] = {
    "drift": DriftingRegression,
    "logistic": LogisticRegression,
    "digits": DigitsNetwork,
    "characters": CharacterModel,
    "cifar10": ConvolutionalCifar10,
    "continual": ContinualCifar100,
    "continual-as-released": ContinualAsReleased,
    "shifts": ShiftingRegression,
    "adding": AddingProblem,
    "residual": ResidualCifar100,
    "bytes": ByteModel,
    "autoencoder": Autoencoder,
    "finetuning": FineTuning,
}
