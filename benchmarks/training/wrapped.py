"""Optimizers of others at fixed, scheduled and, by `metaopt_torch.wrap`, learned step sizes."""

import importlib
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from metaopt_torch import WrappedOptimizer, wrap
from torch import Tensor, nn

from benchmarks.training.schedules import cosine
from benchmarks.training.tasks import Measures, Task

__all__ = ["INNER", "KINDS", "NAMES", "Runs", "updater"]

Named = Sequence[tuple[str, nn.Parameter]]

#: How the lr comes about: a number; up to it and down by a cosine; learned, and weights judged at
#: averages; learned and a cosine on top.
KINDS = ("fixed", "warm-up and cosine", "wrapped", "wrapped, cosine on top")
#: torchao keeps the moments of smaller arrays as they are.
QUANTIZED = 4096


def _split(named: Named, first: Callable[[Tensor], bool]) -> tuple[Named, Named]:
    """Return the parameters for which something holds, and the others."""
    kinds = [first(param) for _, param in named]
    one, other = (
        [pair for pair, is_first in zip(named, kinds, strict=True) if is_first is which]
        for which in (True, False)
    )
    return one, other


def _adamw(named: Named, decay: float) -> Any:
    return torch.optim.AdamW(named, lr=1.0, weight_decay=decay)


def _muon(named: Named, decay: float) -> dict[str, Any]:
    matrices, others = _split(named, lambda param: param.ndim == 2)
    made: dict[str, Any] = {}
    if matrices:
        # whose steps are as long as AdamW's, so that one lr serves both where it is not learned
        made["matrices"] = torch.optim.Muon(
            matrices, lr=1.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
    if others:
        made["others"] = _adamw(others, decay)
    return made


def _soap(named: Named, decay: float) -> dict[str, Any]:
    make = importlib.import_module("pytorch_optimizer").SOAP
    return {"all": make(named, lr=1.0, weight_decay=decay)}


def _quantized(named: Named, decay: float) -> dict[str, Any]:
    make = importlib.import_module("torchao.optim").AdamW8bit
    large, small = _split(named, lambda param: param.numel() >= QUANTIZED)
    quantized = make(large, lr=1.0, weight_decay=decay)
    return {"large": quantized, "small": _adamw(small, decay)}


#: From named parameters and weight decay to optimizers with an lr of 1, by the names of blocks.
INNER: dict[str, Callable[[Named, float], dict[str, Any]]] = {
    "Muon": _muon,
    "SOAP": _soap,
    "8-bit AdamW": _quantized,
}
#: The two by the name of a `Peer`.
NAMES = {f"{inner}, {kind}": (inner, kind) for inner, kind in product(INNER, KINDS)}


class Runs:
    """Several runs side by side, each with optimizers of its own.

    Parameters
    ----------
    inner : str
        Of `INNER`.
    kind : str
        Of `KINDS`.
    task : Task
    starts : sequence of float
        The lr, its peak, or where learned ones start, of each run.
    steps : int
        Of the whole run.
    """

    def __init__(
        self, inner: str, kind: str, task: Task, starts: Sequence[float], steps: int
    ) -> None:
        self._steps, self._restarts = steps, inner == "8-bit AdamW"
        self._warm_up = {"warm-up and cosine": 0.1, "wrapped, cosine on top": 0.0}.get(kind)
        self._learned = kind.startswith("wrapped")
        self._averages = kind == "wrapped"
        self._whole = dict(task.named_parameters())
        #: Parameters without the axis of runs, in the task's own memory.
        self._own: list[dict[str, nn.Parameter]] = []
        self._optimizers: list[list[Any]] = []
        self._first: list[float] = []
        for run, start in enumerate(starts):
            own = {name: nn.Parameter(param.detach()[run]) for name, param in self._whole.items()}
            made = INNER[inner](list(own.items()), task.weight_decay)
            self._own.append(own)
            if self._learned:
                self._optimizers.append([wrap(made, step_size=start, compile=False)])
            else:
                self._optimizers.append(list(made.values()))
            self._first.append(1.0 if self._learned else start)
        self._scale(1.0)

    def _scale(self, factor: float) -> None:
        """Have all lr be what they were at first times `factor`."""
        for optimizers, first in zip(self._optimizers, self._first, strict=True):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(first * factor)
                else:
                    group["lr"] = first * factor

    def step(self, step: int, forward: Callable[[], Measures]) -> Measures:
        """Make a step and return what `forward` returned."""
        if self._warm_up is not None:
            self._scale(cosine(step, self._steps, self._warm_up))
        for param in self._whole.values():
            param.grad = None
        measures = forward()
        measures["loss"].sum().backward()
        for run, (own, optimizers) in enumerate(zip(self._own, self._optimizers, strict=True)):
            for name, param in own.items():
                grad = self._whole[name].grad
                param.grad = None if grad is None else grad[run]
            for optimizer in optimizers:
                optimizer.step()
        return measures

    @property
    def _wrapped(self) -> list[WrappedOptimizer]:
        return [optimizers[0] for optimizers in self._optimizers] if self._learned else []

    def averaged(self) -> list[Tensor] | None:
        """Return averages of the task's parameters that are judged in their place, if there are."""
        if not self._averages:
            return None
        runs = [optimizer.averaged_params(copy=True) for optimizer in self._wrapped]
        return [torch.stack([averages[name] for averages in runs]) for name in self._whole]

    def step_sizes(self) -> dict[str, Tensor]:
        """Return the learned step sizes by block, of all runs; empty where there are none."""
        runs = [optimizer.step_sizes() for optimizer in self._wrapped]
        return (
            {name: torch.stack([sizes[name] for sizes in runs]) for name in runs[0]} if runs else {}
        )

    def state_dict(self) -> Any:
        """Return what the runs go on from, or None where they have to start again."""
        if self._restarts:  # its arrays are no plain tensors
            return None
        return [[optimizer.state_dict() for optimizer in some] for some in self._optimizers]

    def load_state_dict(self, state: Any) -> None:
        """Take what `state_dict` returned."""
        for optimizers, kept in zip(self._optimizers, state, strict=True):
            for optimizer, one in zip(optimizers, kept, strict=True):
                optimizer.load_state_dict(one)


def updater(name: str, task: Task, starts: Sequence[float], steps: int) -> Runs:
    """Return what makes the steps of runs side by side.

    Parameters
    ----------
    name : str
        Of `NAMES`.
    task, starts, steps
        As `Runs` takes them.

    Raises
    ------
    ImportError
        If a package is not installed.
    """
    return Runs(*NAMES[name], task, starts, steps)
