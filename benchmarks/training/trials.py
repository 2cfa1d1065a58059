"""Meta updates that were tried as cures and are no part of the library."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Clipped", "Offsets"]

Slots = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Clipped:
    """A meta update whose meta-gradients are clipped to the root of their mean square before.

    Parameters
    ----------
    rule : Rule
    beta : float
        What a mean square keeps in a step.
    """

    rule: Any
    beta: float = 0.99

    @property
    def slots(self) -> tuple[str, ...]:
        """Those of `rule`, and the mean square."""
        return (*self.rule.slots, "mean_sq")

    @property
    def weight_decay(self) -> float:
        """That of `rule`."""
        return float(self.rule.weight_decay)

    def direction(
        self, grad: Tensor, slots: Slots, count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the direction of `rule` and the next slots."""
        mean_sq, weight = slots["mean_sq"], 1.0 - self.beta ** (count - 1.0)
        bound = torch.where(weight > 0.0, (mean_sq / weight).sqrt(), torch.inf)
        clipped = torch.minimum(torch.maximum(grad, -bound), bound)
        own = {slot: slots[slot] for slot in self.rule.slots}
        direction, new = self.rule.direction(clipped, own, count)
        return direction, {**new, "mean_sq": self.beta * mean_sq + (1.0 - self.beta) * grad * grad}


@dataclass(frozen=True, slots=True)
class Offsets:
    """One step size for all weights of a run, and a slower offset from it for each block.

    Parameters
    ----------
    rule : Rule
        What moves the step size by the sum of all meta-gradients, and an offset by its own.
    runs : int
        How many are side by side; their blocks alternate.
    part : float
        By how much offsets are slower.
    """

    rule: Any
    runs: int = 1
    part: float = 0.1

    @property
    def slots(self) -> tuple[str, ...]:
        """Those of `rule`, for the step size and for its offsets."""
        return tuple(f"{of}.{slot}" for of in ("all", "offset") for slot in self.rule.slots)

    @property
    def weight_decay(self) -> float:
        """0: offsets have none."""
        return 0.0

    def direction(
        self, grad: Tensor, slots: Slots, count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of both directions and the next slots."""
        by_run = grad.reshape(-1, self.runs)
        total = torch.zeros_like(grad)
        new: dict[str, Tensor] = {}
        for of, given, speed in (
            ("all", by_run.sum(0).expand_as(by_run).reshape(grad.shape), 1.0),
            ("offset", grad, self.part),
        ):
            own = {slot: slots[f"{of}.{slot}"] for slot in self.rule.slots}
            direction, moved = self.rule.direction(given, own, count)
            total = total + speed * direction
            new |= {f"{of}.{slot}": value for slot, value in moved.items()}
        return total, new
