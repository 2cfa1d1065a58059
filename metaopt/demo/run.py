"""One training run: its configuration, the training loop, and what came out."""

import math
from dataclasses import dataclass

import numpy as np

from metaopt.demo import network
from metaopt.demo.data import Digits
from metaopt.metaoptimize import MetaOptimize
from metaopt.rules import SGD, AdamW, FastStart, Lion, RMSprop
from metaopt.rules.rule import Rule

__all__ = ["BASES", "BATCH", "METAS", "Result", "Run", "train"]

BATCH = 128
EVALUATE_EVERY = 25

#: Weight decay as in the MetaOptimize paper, except for SGD: there it outweighs the gradient on
#: these digits, and the step size that MetaOptimize then finds is next to nothing.
BASES: dict[str, Rule] = {
    "adamw": AdamW(weight_decay=0.1),
    "lion": Lion(weight_decay=0.1),
    "rmsprop": RMSprop(weight_decay=0.1),
    "sgdm": SGD(momentum=0.9),
}
#: Adam as it is by default, with a faster start.
METAS: dict[str, Rule] = {"adam": FastStart(), "lion": Lion()}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What determines a run completely.

    Parameters
    ----------
    base, meta : str
        Keys of `BASES` and `METAS`. Without `meta` the step size stays fixed.
    step_size : float
        Initial, or fixed.
    meta_lr : float
        Step size of the meta update; 0 without `meta`.
    blocks : {"scalar", "tensor"}
    steps : int
    seed : int
        Of the initial weights and of the batches, which are therefore the same in all runs.
    """

    base: str
    meta: str | None = None
    step_size: float
    meta_lr: float = 0.0
    blocks: str = "scalar"
    steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured during a run, at the step numbers `steps`.

    Parameters
    ----------
    run : Run
    steps : tuple of int
        From 0, before the first step, to the last; short of that where the run diverged.
    train_loss, test_accuracy : tuple of float
        On the whole training and test set, one value for each of `steps`; at the averaged weights
        where the step size is tuned.
    step_sizes : dict of block name to tuple of float
        The same for the step size of every block.
    diverged_at : int or None
        The step with the first loss that was not finite; the run ends there.
    """

    run: Run
    steps: tuple[int, ...]
    train_loss: tuple[float, ...]
    test_accuracy: tuple[float, ...]
    step_sizes: dict[str, tuple[float, ...]]
    diverged_at: int | None

    @property
    def final_loss(self) -> float:
        """Training loss at the end, infinite where the run diverged."""
        return self.train_loss[-1] if self.diverged_at is None else math.inf

    @property
    def final_accuracy(self) -> float:
        """Test accuracy at the end, NaN where the run diverged."""
        return self.test_accuracy[-1] if self.diverged_at is None else math.nan

    @property
    def final_step_sizes(self) -> tuple[float, float]:
        """Smallest and largest step size of all blocks, the last that were measured."""
        last = [values[-1] for values in self.step_sizes.values()]
        return min(last), max(last)

    def steps_to(self, accuracy: float) -> int | None:
        """Return the first of `steps` with at least this test accuracy, None if there is none."""
        measured = zip(self.steps, self.test_accuracy, strict=True)
        return next((step for step, value in measured if value >= accuracy), None)


def train(run: Run, digits: Digits) -> Result:
    """Return what comes out of a run; the same for the same arguments."""
    opt = MetaOptimize(
        base=BASES[run.base],
        meta=METAS[run.meta or "adam"],  # of no consequence at `meta_lr` 0
        step_size=run.step_size,
        meta_lr=run.meta_lr,
        blocks=run.blocks,
        discount=1.0 if run.meta is None else None,  # for averaged weights
    )
    weights, batches = (np.random.default_rng(seed) for seed in _seeds(run.seed))
    params = network.init(weights)
    state = opt.init(params)
    images, labels = digits.train_images, digits.train_labels

    steps: list[int] = []
    train_loss: list[float] = []
    test_accuracy: list[float] = []
    step_sizes: dict[str, list[float]] = {name: [] for name in opt.step_sizes(state)}
    diverged_at = None
    with np.errstate(all="ignore"):  # a run that diverges is a result, not a warning
        for step in range(run.steps + 1):
            if step % EVALUATE_EVERY == 0 or step == run.steps:
                judged = params if run.meta is None else opt.averaged_params(state, params)
                value = network.loss(judged, images, labels)
                if not math.isfinite(value):
                    diverged_at = step
                    break
                steps.append(step)
                train_loss.append(value)
                test_accuracy.append(
                    network.accuracy(judged, digits.test_images, digits.test_labels)
                )
                for name, size in opt.step_sizes(state).items():
                    step_sizes[name].append(float(size))
            if step == run.steps:
                break
            batch = batches.integers(len(labels), size=BATCH)
            value, grads = network.loss_and_grads(params, images[batch], labels[batch])
            if not math.isfinite(value):
                diverged_at = step
                break
            params, state = opt.step(params, grads, state)
    return Result(
        run=run,
        steps=tuple(steps),
        train_loss=tuple(train_loss),
        test_accuracy=tuple(test_accuracy),
        step_sizes={name: tuple(sizes) for name, sizes in step_sizes.items()},
        diverged_at=diverged_at,
    )


def _seeds(seed: int) -> list[np.random.SeedSequence]:
    """Return independent seeds for the weights and for the batches."""
    return np.random.SeedSequence(seed).spawn(2)
