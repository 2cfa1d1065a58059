"""A fixed learning rate for a plain optimizer, found by learning it for a while."""

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from metaopt.configuration import BASE, STEP_SIZE, RuleLike
from metaopt_torch.optimizer import MetaOptimizer

__all__ = ["FoundLR", "find_lr"]

#: Step sizes that the two runs start from.
STARTS = (STEP_SIZE, 10.0 * STEP_SIZE)
#: The runs agree if their step sizes differ by at most this factor; they go on for at most so many
#: rounds until they do.
AGREES, ROUNDS = 1.5, 5


@dataclass(frozen=True)
class FoundLR:
    """What `find_lr` has found.

    Parameters
    ----------
    lr : float
        For all parameters.
    ratios : dict of block name to float
        What the lr of a block is times `lr`; their geometric mean over all weights is 1.
    settled : bool
        Whether the two runs agree. Where they do not, gradients say too little: take more data a
        step, or more steps.
    steps : int
        Steps that each run made.
    blocks : dict of parameter name to block name
    """

    lr: float
    ratios: dict[str, float]
    settled: bool
    steps: int
    blocks: dict[str, str]

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return parameter groups for a plain optimizer, one a block, each with its `lr`.

        Parameters
        ----------
        model : torch.nn.Module
            That of `find_lr`, or another with parameters of these names.

        Raises
        ------
        ValueError
            If a parameter that requires a gradient has another name.
        """
        members: dict[str, list[tuple[str, Tensor]]] = {block: [] for block in self.ratios}
        for name, param in model.named_parameters():
            if name in self.blocks:
                members[self.blocks[name]].append((name, param))
            elif param.requires_grad:
                msg = f"`model` must have the parameters of `find_lr`; it has {name!r} as well."
                raise ValueError(msg)
        return [
            {"params": params, "lr": self.lr * self.ratios[block]}
            for block, params in members.items()
            if params
        ]


def find_lr(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    loader: Iterable[Any],
    *,
    base: RuleLike = BASE,
    blocks: Any = "scalar",
    steps: int = 300,
) -> FoundLR:
    """Return a fixed learning rate for a plain optimizer, as torch.optim.AdamW.

    Two copies of the model are trained with `MetaOptimizer` and all its defaults, one from a step
    size of 1e-4 and one from 1e-3. A run says the median of its step size over the second half of
    the last `steps` steps, the answer is the geometric mean of the two. Where they differ by more
    than a factor of 1.5 both go on for `steps` more, up to five times in all.

    The model and its buffers are not touched; its gradients, and the random states of Python, NumPy
    and torch, are afterwards what they were.

    Parameters
    ----------
    model : torch.nn.Module
        As training starts with it, in training mode. It has to be one that `copy.deepcopy` copies.
    loss : callable
        From a model, which is one of the copies, and a batch to the loss, a tensor of shape ().
    loader : iterable
        Of batches. It is begun anew where it ends.
    base : Rule, or name of one, default "adamw"
        That the learning rate is for. Momentum of `metaopt.SGD` averages: for
        `torch.optim.SGD` give `dampening=momentum` along, or multiply the result by 1 - momentum.
    blocks : optional
        Which parameters have a ratio of their own, as for `MetaOptimizer`: "tensor", or names.
    steps : int, default 300
        Of each run, and of each round.

    Returns
    -------
    FoundLR

    Raises
    ------
    ValueError
        If nothing can be trained, a loss is not finite or is that of another model than it was
        handed, `loader` has no batch, or has them once only; from `MetaOptimizer`, if an option
        does not fit.
    TypeError
        If an argument is of another kind.

    Examples
    --------
    >>> model = torch.nn.Linear(3, 1)
    >>> batches = [torch.randn(8, 3) for _ in range(10)]
    >>> def loss(model, batch):
    ...     return (model(batch) - batch.sum(1, keepdim=True)).square().mean()
    >>> found = find_lr(model, loss, batches)
    >>> opt = torch.optim.AdamW(model.parameters(), lr=found.lr)
    """
    _check(model, loss, loader, steps)
    with _random_states_kept(model), _grads_kept(model):
        runs = [_Run(model, loss, loader, start, base, blocks) for start in STARTS]
        weights = runs[0].weights
        total = sum(weights.values())
        made, settled = 0, False
        while not settled and made < ROUNDS * steps:
            made += steps
            medians = [run.median(steps) for run in runs]  # logarithms by block
            means = [math.fsum(weights[b] * log[b] for b in weights) / total for log in medians]
            settled = abs(means[0] - means[1]) <= math.log(AGREES)
    middle = math.fsum(means) / len(means)
    logs = {block: math.fsum(log[block] for log in medians) / len(medians) for block in weights}
    return FoundLR(
        lr=math.exp(middle),
        ratios={block: math.exp(log - middle) for block, log in logs.items()},
        settled=settled,
        steps=made,
        blocks=runs[0].blocks,
    )


class _Run:
    """A copy of the model, and what trains it."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        loader: Iterable[Any],
        start: float,
        base: RuleLike,
        blocks: Any,
    ) -> None:
        self._given, self._model = model, copy.deepcopy(model)
        self._loss, self._batches = loss, _cycled(loader)
        named = [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
        self._opt = MetaOptimizer(named, base=base, blocks=blocks, step_size=start, compile=False)
        plan = self._opt.config.plan(cast("dict[str, Any]", dict(named)))
        if any(plan.blocks.views.values()) or plan.blocks.partition.per_leaf:
            msg = (
                "`blocks` must give each parameter one step size, as groups of plain optimizers "
                f'do: "scalar", "tensor" or names; got {blocks!r}.'
            )
            raise ValueError(msg)
        #: The block of each parameter, and the number of weights of each block.
        self.blocks: dict[str, str] = dict(plan.blocks.family_of)
        self.weights = dict.fromkeys(self.blocks.values(), 0)
        for name, param in named:
            self.weights[self.blocks[name]] += param.numel()
        self._made = 0

    def median(self, steps: int) -> Mapping[str, float]:
        """Make steps; return the logarithm of each block's median step size in the second half."""
        sizes = []
        for step in range(steps):
            self._step()
            if 2 * step >= steps:
                own = self._opt.step_sizes()
                sizes.append(torch.stack([own[block] for block in self.weights]))
        medians = torch.stack(sizes).log().median(dim=0).values
        return dict(zip(self.weights, medians.tolist(), strict=True))

    def _step(self) -> None:
        self._opt.zero_grad()
        with torch.enable_grad():
            value = self._loss(self._model, next(self._batches))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            msg = (
                "`loss` must return a tensor of one number that depends on the parameters of the "
                f"model that it is handed; got {value!r}."
            )
            raise TypeError(msg)
        if not torch.isfinite(value):
            msg = f"`loss` must be finite; got {value.item()} in step {self._made}."
            raise ValueError(msg)
        value.backward()
        own, given = self._model.parameters(), self._given.named_parameters()
        reached = [name for name, param in given if param.grad is not None]
        if reached or all(param.grad is None for param in own):
            of_whom = f"used {reached[0]!r} of yours" if reached else "used another"
            msg = (
                f"`loss` must use the model that it is handed, a copy of yours; it {of_whom}. "
                "Detach what it only compares with."
            )
            raise ValueError(msg)
        self._opt.step()
        self._made += 1


def _check(model: Any, loss: Any, loader: Any, steps: Any) -> None:
    if not isinstance(model, nn.Module):
        msg = f"`model` must be a torch.nn.Module; got {type(model).__name__}."
        raise TypeError(msg)
    if not any(param.requires_grad for param in model.parameters()):
        msg = "`model` must have a parameter that requires a gradient; got none."
        raise ValueError(msg)
    if not callable(loss):
        msg = f"`loss` must be callable, with a model and a batch; got {loss!r}."
        raise TypeError(msg)
    if not isinstance(loader, Iterable):
        msg = f"`loader` must be an iterable of batches; got {type(loader).__name__}."
        raise TypeError(msg)
    if isinstance(loader, Iterator):
        msg = (
            "`loader` must be an iterable that can be begun anew, as a DataLoader or a list; got "
            f"a {type(loader).__name__}, which has its batches once."
        )
        raise ValueError(msg)
    if isinstance(steps, bool) or not isinstance(steps, int):
        msg = f"`steps` must be a whole number; got {steps!r}."
        raise TypeError(msg)
    if steps < 10:
        msg = f"`steps` must be at least 10; got {steps}."
        raise ValueError(msg)


def _cycled(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield batches without end."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            msg = "`loader` must have a batch; got none."
            raise ValueError(msg)


@contextmanager
def _random_states_kept(model: nn.Module) -> Iterator[None]:
    """Have the random states of Python, NumPy and torch in the end as they were."""
    devices = {param.device for param in model.parameters() if param.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([d.index or 0 for d in devices], device_type=kind):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


@contextmanager
def _grads_kept(model: nn.Module) -> Iterator[None]:
    """Take the gradients away inside, so that new ones are seen, and put them back."""
    before = [(param, param.grad) for param in model.parameters()]
    try:
        for param, _ in before:
            param.grad = None
        yield
    finally:
        for param, grad in before:
            param.grad = grad
