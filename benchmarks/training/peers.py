"""Runs with the optimizers of others: what makes their steps, and what each needs beside."""

import importlib
from collections.abc import Callable
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
    "Prodigy, cosine": "prodigyopt",
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

    def averaged(self) -> list[Tensor] | None:
        """Return averages of the parameters that are judged in their place, if there are."""
        return None

    def step_sizes(self) -> dict[str, Tensor]:
        """Return no step sizes."""
        return {}

    def state_dict(self) -> Any:
        """Return what a run goes on from."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Take what `state_dict` returned."""
        self._optimizer.load_state_dict(state)


class _Cosine(Torch):
    """With a cosine from its step size down to 0, without a warm-up."""

    def __init__(self, optimizer: Any, steps: int) -> None:
        super().__init__(optimizer)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def step(self, step: int, forward: Callable[[], Measures]) -> Measures:
        measures = super().step(step, forward)
        self._schedule.step()
        return measures

    def state_dict(self) -> Any:
        return {"optimizer": super().state_dict(), "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


class _ScheduleFree(Torch):
    """Its parameters are where gradients are taken, and its averages what is used."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._params = [param for group in optimizer.param_groups for param in group["params"]]

    def averaged(self) -> list[Tensor]:
        self._optimizer.eval()
        averages = [param.detach().clone() for param in self._params]
        self._optimizer.train()
        return averages


class _Restarting(Torch):
    """One whose state cannot be saved, or not completely: its runs start again."""

    def state_dict(self) -> Any:
        return None


class _DoG(_Restarting):
    """With the average of the weights that its authors call crucial, judged by it."""

    def __init__(self, optimizer: Any, average: Any) -> None:
        super().__init__(optimizer)
        self._average = average

    def step(self, step: int, forward: Callable[[], Measures]) -> Measures:
        measures = super().step(step, forward)
        self._average.step()
        return measures

    def averaged(self) -> list[Tensor]:
        return list(self._average.averaged_model.parameters())


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


def updater(name: str, task: Task, start: float, steps: int) -> Any:
    """Return what makes the steps of a run with a peer.

    Parameters
    ----------
    name : str
        Of `PEERS`.
    task : Task
        With one run: these optimizers have numbers that all weights share.
    start : float
        Initial step size, for those that have one.
    steps : int
        Of the whole run, for the cosine that the authors of Prodigy advise.

    Raises
    ------
    ImportError
        If its package is not installed.
    """
    params = list(task.parameters())
    if name in OPTIMIZERS:
        return _KINDS.get(name, Torch)(OPTIMIZERS[name](params))
    if name == "Prodigy, cosine":
        return _Cosine(OPTIMIZERS["Prodigy"](params), steps)
    if name == "DoG, averaged":
        average = importlib.import_module("dog").PolynomialDecayAverager(task)
        return _DoG(OPTIMIZERS["DoG"](params), average)
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
