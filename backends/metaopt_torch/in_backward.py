"""Steps that are made in the backward pass, so that gradients can be freed as they come."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from metaopt_torch.build import Built

__all__ = ["InBackward", "check_in_backward"]


class InBackward:
    """Hooks of parameters; `remove` takes them away, and steps are made by `step` again.

    Parameters
    ----------
    optimizer : object with a method `_arrived`, which takes a parameter
    params : iterable of tensors
    """

    def __init__(self, optimizer: Any, params: Iterable[Tensor]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._handles = [
            param.register_post_accumulate_grad_hook(self._arrived)
            for param in params
            if param.requires_grad
        ]

    @property
    def active(self) -> bool:
        """Whether parameters step in the backward pass."""
        return bool(self._handles)

    def remove(self) -> None:
        """Have `step` make whole steps again, from the next one on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._arrived(param)


def check_in_backward(built: Built) -> None:
    """Raise ValueError where a leaf cannot be stepped before all gradients are there."""
    config = built.config
    reasons = {
        "`skip_nonfinite`, which looks at all gradients before anything moves": (
            config.skip_nonfinite
        ),
        "`meta_first`, where step sizes are those after the meta update": config.meta_first,
        "`held_out`, whose gradients come by themselves": config.held_out,
        "`recover`, which looks at all gradients before anything moves": config.recover,
        "`curvature`, which differentiates the gradients": built.plan.curvature != "none",
        "numbers that are learned": bool(built.plan.learned),
        '`blocks="weight"`': built.block_state.per_leaf,
        "parameters that are sharded": any(
            leaf.shard.over is not None for leaf in built.leaves.values()
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            msg = (
                f"`step_in_backward` does not go with {reason}. Leave it out: `step` after the "
                "backward pass needs nothing else."
            )
            raise ValueError(msg)
