"""Runs with the optimizers of others: what makes their steps, and what each needs beside."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from metaopt_torch import MetaOptimizer
from torch import Tensor

import metaopt as mo
from benchmarks.peers import OPTIMIZERS
from benchmarks.training.tasks import Measures, Task

__all__ = ["PACKAGES", "PEERS", "Torch", "updater"]

#: Distribution that has each of them; hypergradient descent has none and is the preset, which
#: equals its literature form.
PACKAGES: dict[str, str | None] = {
    "Prodigy": "prodigyopt",
    "schedule-free AdamW": "schedulefree",
    "D-Adaptation Adam": "dadaptation",
    "DoG, averaged": "dog-optimizer",
    "mechanic AdamW": "mechanic-pytorch",
    "gdtuo Adam/Adam": "gradient-descent-the-ultimate-optimizer",
    "hypergradient Adam": None,
}
PEERS = tuple(PACKAGES)


class Torch:
    """A `torch.optim.Optimizer`.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def step(self, step: int, forward: Callable[[], Measures]) -> Measures:  # noqa: ARG002
        """Make a step and return what `forward` returned."""
        self._optimizer.zero_grad()
        measures = forward()
        measures["loss"].sum().backward()
        self._optimizer.step()
        return measures

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Hold the weights that are to be judged meanwhile."""
        yield

    def step_sizes(self) -> dict[str, Tensor]:
        """Return no step sizes."""
        return {}

    def state_dict(self) -> Any:
        """Return what a run goes on from."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Take what `state_dict` returned."""
        self._optimizer.load_state_dict(state)


class _ScheduleFree(Torch):
    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self._optimizer.eval()
        try:
            yield
        finally:
            self._optimizer.train()


class _Restarting(Torch):
    """One whose state cannot be saved, or not completely: its runs start again."""

    def state_dict(self) -> Any:
        return None


class _DoG(_Restarting):
    """With the average of the weights that its authors call crucial, judged by it."""

    def __init__(self, optimizer: Any, task: Task, average: Any) -> None:
        super().__init__(optimizer)
        self._task, self._average = task, average

    def step(self, step: int, forward: Callable[[], Measures]) -> Measures:
        measures = super().step(step, forward)
        self._average.step()
        return measures

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        params = list(self._task.parameters())
        own = [param.detach().clone() for param in params]
        averaged = list(self._average.averaged_model.parameters())
        with torch.no_grad():
            for param, value in zip(params, averaged, strict=True):
                param.copy_(value)
            yield
            for param, value in zip(params, own, strict=True):
                param.copy_(value)


class _Hypergradient(Torch):
    def step_sizes(self) -> dict[str, Tensor]:
        sizes: dict[str, Tensor] = self._optimizer.step_sizes()
        return sizes


class _Gdtuo(_Restarting):
    """Gradient descent, the ultimate optimizer: it puts new tensors into the module every step."""

    def __init__(self, wrapper: Any, adam: Any) -> None:
        super().__init__(None)
        self._wrapper, self._adam = wrapper, adam

    def step(self, step: int, forward: Callable[[], Measures]) -> Measures:  # noqa: ARG002
        self._wrapper.begin()
        measures = forward()
        self._wrapper.zero_grad()
        measures["loss"].sum().backward(create_graph=True)
        self._wrapper.step()
        return measures

    def step_sizes(self) -> dict[str, Tensor]:
        return {"all": self._adam.parameters["alpha"].detach().reshape(1)}


#: Of those that are more than a `torch.optim.Optimizer`, or less.
_KINDS: dict[str, type[Torch]] = {
    "schedule-free AdamW": _ScheduleFree,
    "mechanic AdamW": _Restarting,
}


def updater(name: str, task: Task, start: float) -> Any:
    """Return what makes the steps of a run with a peer.

    Parameters
    ----------
    name : str
        Of `PEERS`.
    task : Task
        With one run: these optimizers have numbers that all weights share.
    start : float
        Initial step size, for those that have one.

    Raises
    ------
    ImportError
        If its package is not installed.
    """
    params = list(task.parameters())
    if name in OPTIMIZERS:
        return _KINDS.get(name, Torch)(OPTIMIZERS[name](params))
    if name == "DoG, averaged":
        average = importlib.import_module("dog").PolynomialDecayAverager(task)
        return _DoG(OPTIMIZERS["DoG"](params), task, average)
    if name == "gdtuo Adam/Adam":
        gdtuo = importlib.import_module("gradient_descent_the_ultimate_optimizer.gdtuo")
        adam = gdtuo.Adam(alpha=start, optimizer=gdtuo.Adam())
        wrapper = gdtuo.ModuleWrapper(task, optimizer=adam)
        wrapper.initialize()
        return _Gdtuo(wrapper, adam)
    preset = mo.presets.hypergradient(mo.AdamW(), step_size=start, meta_lr=1e-8)
    return _Hypergradient(
        MetaOptimizer(
            task.named_parameters(),
            base=preset.base,
            meta=preset.meta,
            step_size=preset.step_size,
            meta_lr=preset.meta_lr,
            discount=preset.discount,
            sigma=preset.sigma,
            meta_first=preset.meta_first,
            compile=False,
        )
    )
