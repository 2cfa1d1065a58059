"""Gradients of a held-out loss, kept apart from those of training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metaopt_torch.build import Built
from metaopt_torch.containers import FSDP1
from metaopt_torch.core_step import reduction
from metaopt_torch.shards import local

__all__ = ["HeldOut", "check_held_out"]


class HeldOut:
    """What has come to parameters inside of the context, since the last step.

    Attributes
    ----------
    grads : dict of parameter to tensor
    """

    def __init__(self) -> None:
        self.grads: dict[Tensor, Tensor] = {}
        self._inside = False

    def check_outside(self, what: str) -> None:
        """Raise where `what` is called inside of the context."""
        if self._inside:
            msg = (
                f"`{what}` must not be called inside `with opt.meta_gradients():`, where `.grad` "
                "is that of the held-out loss: leave it first."
            )
            raise RuntimeError(msg)

    @contextmanager
    def collected(self, built: Built, scaler: Any) -> Iterator[None]:
        """Have `.grad` empty inside, add to `grads` what came, and put back what was there."""
        params = [leaf.param for leaf in built.leaves.values()]
        with torch.no_grad():
            before = [(param, param.grad, _backup(param.grad)) for param in params]
        self._inside = True
        try:
            for param in params:
                param.grad = None
            yield
            with torch.no_grad():
                found = {p: _taken(p.grad) for p in params if p.grad is not None}
        finally:
            self._inside = False
            with torch.no_grad():
                for param, grad, backup in before:
                    if grad is not None and backup is not None:
                        grad.copy_(backup)
                    param.grad = grad
        for leaf in built.leaves.values():
            if leaf.param in found and found[leaf.param].layout != torch.strided:
                layout = found[leaf.param].layout
                msg = f"The held-out gradient of {leaf.name!r} must be dense; got layout {layout}."
                raise TypeError(msg)
        if not found:
            msg = (
                "No gradient has come to a parameter of this optimizer inside `with "
                "opt.meta_gradients():`. Call `backward` there, on a loss of these parameters; in "
                "a step in which step sizes are to rest, leave out the context."
            )
            raise RuntimeError(msg)
        with torch.no_grad():
            if scaler is not None:
                _unscale([*found.values()], scaler, reduction(built.leaves))
            for param, grad in found.items():
                known = self.grads.get(param)
                self.grads[param] = grad if known is None else known + grad


def _backup(grad: Tensor | None) -> Tensor | None:
    """Return a copy of a gradient that a backward pass may overwrite: of a part of a buffer.

    DistributedDataParallel has all gradients in one with `gradient_as_bucket_view`.
    """
    return None if grad is None or _alone(grad) else grad.detach().clone()


def _taken(grad: Tensor) -> Tensor:
    return grad.detach() if _alone(grad) else grad.detach().clone()


def _alone(grad: Tensor) -> bool:
    """Return whether nothing else lies in a gradient's storage."""
    memory = local(grad)
    if memory.layout != torch.strided:
        return True
    return memory.untyped_storage().nbytes() == memory.numel() * memory.element_size()


def _unscale(
    grads: Sequence[Tensor], scaler: Any, reduce: Callable[[list[Any]], Sequence[Any]] | None
) -> None:
    """Divide gradients by the scale of a GradScaler, in place; all are 0 where one overflowed."""
    arrays = [local(grad) for grad in grads]
    device = arrays[0].device
    factor = scaler.scale(torch.ones((), device=device)).double().reciprocal().float()
    for array in arrays:
        array.mul_(factor.to(array.device))
    finite = torch.stack([torch.isfinite(array).all().to(device) for array in arrays]).all()
    lost = finite.logical_not().float()
    if reduce is not None:
        (lost,) = reduce([lost])
    for array in arrays:
        array.masked_fill_(lost.to(array.device) != 0.0, 0.0)


def check_held_out(built: Built, *, zero: bool) -> None:
    """Raise ValueError where gradients of a held-out loss cannot be kept apart.

    Parameters
    ----------
    built : Built
    zero : bool
        Whether a ZeroRedundancyOptimizer has made the optimizer.
    """
    if zero:
        msg = (
            "`held_out` does not go with ZeroRedundancyOptimizer, where a process would keep apart "
            "the gradients of its own parameters alone; use `fully_shard`."
        )
        raise ValueError(msg)
    for name, leaf in built.leaves.items():
        if getattr(leaf.param, FSDP1, False):
            msg = (
                f"`held_out` does not go with FullyShardedDataParallel, which holds gradients of "
                f"{name!r} elsewhere than in `.grad`; use `fully_shard`."
            )
            raise ValueError(msg)
