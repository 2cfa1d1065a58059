"""What is compared: a configuration in words, and the optimizer that it means for a task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from metaopt_torch import MetaOptimizer
from torch import Tensor

import metaopt as mo
from benchmarks.training import peers, wrapped
from benchmarks.training.replicas import side_by_side, starts_of_blocks
from benchmarks.training.schedules import cosine
from benchmarks.training.tasks import Measures, Task
from benchmarks.training.trials import Clipped, Offsets
from metaopt.configuration import META

__all__ = ["BASES", "METAS", "Method", "Peer", "Updater", "updater"]

Forward = Callable[[], Measures]

BASES: dict[str, Callable[[float], Any]] = {
    "AdamW": lambda decay: mo.AdamW(weight_decay=decay),
    "averaged AdamW": lambda decay: mo.Averaged(mo.AdamW(weight_decay=decay)),
    "Lion": lambda decay: mo.Lion(weight_decay=decay),
    "RMSprop": lambda decay: mo.RMSprop(weight_decay=decay),
    "SGDm": lambda decay: mo.SGD(momentum=0.9, weight_decay=decay),
    "SGD": lambda decay: mo.SGD(weight_decay=decay),
    # As the authors' released code acts, once its step sizes are multiplied by ten for AdamW and
    # Adam: it sums first moments and has an epsilon of 1e-10 inside of the root; SGDm lags a step.
    "AdamW as released": lambda decay: mo.AdamW(eps=1e-5, weight_decay=decay),
    "RMSprop as released": lambda decay: mo.RMSprop(eps=1e-5, weight_decay=decay),
    "SGDm as released": lambda decay: mo.SGD(momentum=0.9, weight_decay=decay, delayed=True),
}
METAS: dict[str, Any] = {
    "default": META,
    "Adam": mo.AdamW(),
    "Lion": mo.Lion(),
    "fast Adam": mo.FastStart(mo.AdamW(), retreat=0.0),
    "fast Lion": mo.FastStart(mo.Lion(), retreat=0.0),
    "fast Adam 1": mo.FastStart(mo.AdamW(), patience=1, retreat=0.0),
    "fast Lion 1": mo.FastStart(mo.Lion(), patience=1, retreat=0.0),
    "SGD": mo.SGD(),
    "RMSprop": mo.RMSprop(),
    "Adam as released": mo.AdamW(eps=1e-5),
    "clipped Adam": Clipped(mo.AdamW()),
    "clipped Lion": Clipped(mo.Lion()),
    "Adam and offsets": Offsets(mo.AdamW()),
    "fast Adam and offsets": Offsets(mo.FastStart(mo.AdamW(), retreat=0.0)),
}


#: Steps from which it pays to compile the optimizer of a large network, and of any.
LONG_ENOUGH, VERY_LONG = 1000, 20_000
#: Options that a label mentions where they are not these.
PLAIN: dict[str, Any] = {
    "discount": 1.0,
    "curvature": "none",
    "bounds": None,
    "sigma": "exp",
    "meta_first": False,
}


class Updater(Protocol):
    """Makes steps, whatever the optimizer asks of the loop around it."""

    def step(self, step: int, forward: Forward) -> Measures:
        """Make a step and return what `forward` returned."""

    def averaged(self) -> Sequence[Tensor] | None:
        """Return averages of the task's parameters that are judged in their place, if there are."""

    def step_sizes(self) -> dict[str, Tensor]:
        """Return the learned step sizes by block, empty where there are none."""

    def state_dict(self) -> Any:
        """Return what a run goes on from, or None where it has to start again."""

    def load_state_dict(self, state: Any) -> None:
        """Take what `state_dict` returned."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A base update at fixed, scheduled or learned step sizes.

    Parameters
    ----------
    base : str
        Of `BASES`.
    meta : str, optional
        Of `METAS`; without it step sizes stay as they are.
    meta_lr, discount, blocks, curvature, bounds, meta_first, sigma
        As for `MetaOptimizer`; `blocks="groups"` stands for those that the task names. Curvature
        "diagonal" is the task's own where it knows it, and else an estimate from one probe;
        "rectified" is that of IDBD.
    schedule : {"constant", "cosine"}
        "cosine": from 0 up to the step size, then down to 0 by a cosine; multiplies learned ones.
    warm_up : float
        Part of the run in which "cosine" goes up.
    weight_decay : float, optional
        In place of the task's; the task's is that of all bases but SGD.
    averages : bool
        Whether averaged weights are judged, which come with a discount below 1.
    """

    base: str
    meta: str | None = None
    meta_lr: float = 1e-3
    discount: float | tuple[float, ...] = 1.0
    blocks: str = "scalar"
    curvature: str = "none"
    bounds: tuple[float, float] | None = None
    sigma: str = "exp"
    meta_first: bool = False
    schedule: str = "constant"
    warm_up: float = 0.1
    weight_decay: float | None = None
    averages: bool = False

    @property
    def label(self) -> str:
        """The method in words."""
        if self.meta is None:
            words = [self.base, "fixed" if self.schedule == "constant" else "warm-up and cosine"]
        else:
            words = [f"({self.base}, {self.meta})", self.blocks, f"meta_lr {self.meta_lr:g}"]
            for option, plain in PLAIN.items():
                if getattr(self, option) != plain:
                    words.append(f"{option} {getattr(self, option)}")
            if self.schedule != "constant":
                words.append(f"{self.schedule} on top")
                if self.warm_up:
                    words.append(f"warm-up {self.warm_up:g}")
        if self.weight_decay is not None:
            words.append(f"weight decay {self.weight_decay:g}")
        if self.averages:
            words.append("averaged")
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An optimizer of others; see `training.peers`, and `training.wrapped` for what is wrapped."""

    name: str

    @property
    def label(self) -> str:
        """The method in words."""
        return self.name


def updater(method: Method | Peer, task: Task, starts: tuple[float, ...], steps: int) -> Updater:
    """Return what makes the steps of a run.

    Parameters
    ----------
    method : Method or Peer
    task : Task
    starts : tuple of float
        Initial, peak or fixed step size of each run.
    steps : int
        Of the whole run, for schedules.
    """
    if isinstance(method, Peer) and method.name in wrapped.NAMES:
        return wrapped.updater(method.name, task, starts, steps)
    if isinstance(method, Peer):
        return peers.updater(method.name, task, starts[0], steps)
    return _Ordinary(method, task, starts, steps)


class _Ordinary:
    def __init__(self, method: Method, task: Task, starts: tuple[float, ...], steps: int) -> None:
        named = list(task.named_parameters())
        blocks: Any = dict(task.groups) if method.blocks == "groups" else method.blocks
        step_size: Any = starts[0]
        if task.replicated:
            blocks = side_by_side(blocks)
            shapes = {name: tuple(param.shape) for name, param in named}
            step_size = starts_of_blocks(blocks, shapes, starts)
        decay = method.weight_decay
        if decay is None:
            decay = 0.0 if method.base.startswith("SGD") else task.weight_decay
        meta = METAS[method.meta or "SGD"]
        if isinstance(meta, Offsets):
            meta = replace(meta, runs=len(starts))
        self._task, self._method, self._steps = task, method, steps
        self._optimizer = MetaOptimizer(
            named,
            base=BASES[method.base](decay),
            meta=meta,
            step_size=step_size,
            meta_lr=method.meta_lr if method.meta else 0.0,
            discount=method.discount,
            blocks=blocks,
            sigma=method.sigma,
            bounds=method.bounds,
            curvature=mo.curvature.Diagonal(rectified=True)
            if method.curvature == "rectified"
            else method.curvature,
            meta_first=method.meta_first,
            compile=steps >= (LONG_ENOUGH if task.compiled else VERY_LONG),
        )

    def step(self, step: int, forward: Forward) -> Measures:
        if self._method.schedule == "cosine":
            for group in self._optimizer.param_groups:
                group["lr"] = cosine(step, self._steps, self._method.warm_up)
        self._optimizer.zero_grad()
        measures = forward()
        loss = measures["loss"].sum()
        if self._method.curvature == "none":
            loss.backward()
            self._optimizer.step()
        elif self._method.curvature == "exact":
            self._optimizer.backward(loss)
            self._optimizer.step()
        else:
            diagonal = self._task.hessian_diagonal()
            if diagonal is None:
                diagonal = self._estimate(loss, step)
            else:
                loss.backward()
            self._optimizer.step(hessian_diagonal=diagonal)
        return measures

    def _estimate(self, loss: Tensor, step: int) -> dict[str, Any]:
        """Return Hutchinson's estimate from one probe, and leave the gradients behind."""
        params = dict(self._task.named_parameters())
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        generator = torch.Generator().manual_seed(step)
        probes = {
            name: (2.0 * torch.randint(2, (1, *p.shape), generator=generator) - 1.0)
            for name, p in params.items()
        }

        def hvp(tangents: Any) -> dict[str, Tensor]:
            found = torch.autograd.grad(
                grads, list(params.values()), [tangents[name][0] for name in params]
            )
            return {name: part[None] for name, part in zip(params, found, strict=True)}

        diagonal = mo.curvature.hutchinson(hvp, probes)
        for param, grad in zip(params.values(), grads, strict=True):
            param.grad = grad.detach()
        return dict(diagonal)

    def averaged(self) -> list[Tensor] | None:
        if not self._method.averages:
            return None
        opt = self._optimizer
        params = {name: param.detach() for name, param in self._task.named_parameters()}
        return list(opt.config.averaged_params(opt.core_state(), params).values())

    def step_sizes(self) -> dict[str, Tensor]:
        return self._optimizer.step_sizes()

    def state_dict(self) -> Any:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._optimizer.load_state_dict(state)
