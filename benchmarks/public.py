"""Tasks of the step-size literature in their own units, with this library's defaults.

    python -m benchmarks.public [--a1a FILE] [--output benchmarks/results]

Sutton's tracking task (1992): 20 normal inputs, of which 5 matter, with weights of 1 or -1; every
20 examples one of these turns its sign. Counted is the squared error of predictions before they
are learned from, over the last part of a run. Then logistic regression by whole gradients: how many
until the gradient's norm is a thousandth of what it was at first, at weights of 0.

IDBD, Autostep, LMS, Adam and gradient descent are written here; what has a grid is shown at the
best of it, by the very measure that is shown, which flatters it. Of ours nothing is chosen.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import metaopt as mo
from benchmarks.training.replicas import side_by_side, starts_of_blocks

__all__ = ["IDBD", "LMS", "Adam", "Autostep", "Ours", "main", "track"]

SEEDS, STEPS, LAST = range(5), 20_000, 10_000
INPUTS, RELEVANT, EVERY = 20, 5, 20
#: Initial step sizes of the table on these; LMS and Adam go on with them.
STARTS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
#: The start of IDBD and Autostep where their own parameter is chosen.
USUAL = 0.05
THETAS = (1e-3, 3e-3, 5e-3, 1e-2, 2e-2, 5e-2)
GRID = tuple(float(size) for size in np.geomspace(1e-3, 1.0, 13))
#: Of logistic regression: the most gradients, examples and features made up, step sizes.
MOST, MADE_UP, SIZES = 5000, (500, 50), tuple(float(s) for s in np.geomspace(1e-3, 10.0, 9))
TOLERANCE = 1e-3


class Learner(Protocol):
    """What learns weights, arrays (settings, seeds, inputs)."""

    weights: Any

    def learn(self, grad: Any, x: Any) -> None:
        """Learn from gradients of half the squared error, and the inputs (seeds, inputs)."""


def _column(values: Sequence[float]) -> Any:
    return np.asarray(values, dtype=np.float64)[:, None, None]


class LMS:
    """Gradient descent at fixed step sizes, one for each setting."""

    def __init__(self, sizes: Sequence[float], shape: tuple[int, int]) -> None:
        self.sizes, self.weights = _column(sizes), np.zeros((len(sizes), *shape))

    def learn(self, grad: Any, x: Any) -> None:  # noqa: ARG002
        """Make a step."""
        self.weights = self.weights - self.sizes * grad


class Adam(LMS):
    """Adam, Kingma and Ba (2015), and so AdamW without weight decay."""

    def __init__(self, sizes: Sequence[float], shape: tuple[int, int]) -> None:
        super().__init__(sizes, shape)
        self.mean, self.square, self.count = 0.0, 0.0, 0

    def learn(self, grad: Any, x: Any) -> None:  # noqa: ARG002
        """Make a step."""
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * grad
        self.square = 0.999 * self.square + 0.001 * grad * grad
        mean = self.mean / (1.0 - 0.9**self.count)
        root = np.sqrt(self.square / (1.0 - 0.999**self.count))
        self.weights = self.weights - self.sizes * mean / (root + 1e-8)


class IDBD(LMS):
    """Sutton (1992), figure 2: a step size for each weight; `theta` is the meta step size."""

    def __init__(
        self, sizes: Sequence[float], shape: tuple[int, int], theta: Sequence[float]
    ) -> None:
        super().__init__(sizes, shape)
        self.theta, self.trace = _column(theta), np.zeros_like(self.weights)
        self.beta = np.log(self.sizes) + self.trace

    def learn(self, grad: Any, x: Any) -> None:
        """Make a step."""
        self.beta = self.beta - self.theta * grad * self.trace
        alpha = np.exp(self.beta)
        self.weights = self.weights - alpha * grad
        self.trace = self.trace * np.maximum(1.0 - alpha * x * x, 0.0) - alpha * grad


class Autostep(LMS):
    """Mahmood, Sutton, Degris and Pilarski (2012), table 1, with their `mu` and `tau`."""

    mu, tau = 1e-2, 1e4

    def __init__(self, sizes: Sequence[float], shape: tuple[int, int]) -> None:
        super().__init__(sizes, shape)
        self.trace, self.scale = np.zeros_like(self.weights), np.zeros_like(self.weights)
        self.alpha = self.sizes + self.trace

    def learn(self, grad: Any, x: Any) -> None:
        """Make a step."""
        product, square = -grad * self.trace, x * x
        size = np.abs(product)
        decayed = self.scale + self.alpha * square * (size - self.scale) / self.tau
        self.scale = np.maximum(size, decayed)
        ratio = np.divide(product, self.scale, out=np.zeros_like(product), where=self.scale > 0.0)
        alpha = self.alpha * np.exp(self.mu * ratio)
        self.alpha = alpha / np.maximum(np.sum(alpha * square, axis=-1, keepdims=True), 1.0)
        self.weights = self.weights - self.alpha * grad
        self.trace = self.trace * (1.0 - self.alpha * square) - self.alpha * grad


class Ours:
    """metaopt with its defaults; all runs side by side, their blocks apart."""

    def __init__(
        self, sizes: Sequence[float], shape: tuple[int, int], base: Any, blocks: str
    ) -> None:
        self._shape = (len(sizes), *shape)
        params = {"w": np.zeros((len(sizes) * shape[0], shape[1]))}
        partition = side_by_side(blocks)
        shapes = {"w": params["w"].shape}
        starts = starts_of_blocks(partition, shapes, np.repeat(sizes, shape[0]).tolist())
        self._opt = mo.MetaOptimize(base=base, blocks=partition, step_size=starts)
        self._params: Any = params
        self._state = self._opt.init(params)
        self.weights = params["w"].reshape(self._shape)

    def learn(self, grad: Any, x: Any) -> None:  # noqa: ARG002
        """Make a step."""
        grads = {"w": np.asarray(grad).reshape(self._params["w"].shape)}
        self._params, self._state = self._opt.step(self._params, grads, self._state)
        self.weights = self._params["w"].reshape(self._shape)


OURS: dict[str, tuple[Any, str]] = {
    "metaopt, all defaults": (mo.AdamW(), "scalar"),
    'metaopt, `blocks="weight"`': (mo.AdamW(), "weight"),
    "metaopt, `base=SGD()`": (mo.SGD(), "scalar"),
    'metaopt, `base=SGD()`, `blocks="weight"`': (mo.SGD(), "weight"),
}


def examples(seeds: Sequence[int], steps: int) -> Iterator[tuple[Any, Any]]:
    """Yield inputs (seeds, inputs) and targets (seeds,) of the tracking task."""
    rngs = [np.random.default_rng(300 + seed) for seed in seeds]
    signs = np.ones((len(rngs), RELEVANT))
    for step in range(steps):
        if step and step % EVERY == 0:
            for own, rng in zip(signs, rngs, strict=True):
                own[rng.integers(RELEVANT)] *= -1.0
        x = np.stack([rng.standard_normal(INPUTS) for rng in rngs])
        yield x, np.sum(x[:, :RELEVANT] * signs, axis=-1)


def track(learner: Learner, seeds: Sequence[int], steps: int, last: int) -> Any:
    """Return the mean squared errors over the last examples, (settings, seeds); inf, diverged."""
    total: Any = 0.0
    with np.errstate(all="ignore"):
        for step, (x, y) in enumerate(examples(seeds, steps)):
            error = np.sum(learner.weights * x, axis=-1) - y
            if step >= steps - last:
                total = total + error * error
            learner.learn(error[..., None] * x, x)
    mean = total / last
    return np.where(np.isfinite(mean) & (mean < 1e6), mean, np.inf)


@dataclass(frozen=True)
class Row:
    """A method on the tracking task: errors by start and seed, and what was chosen."""

    by_start: Any
    best: Any
    chosen: str


def tracked(seeds: Sequence[int], steps: int, last: int) -> dict[str, Row]:
    """Return what each method comes to."""
    shape = (len(seeds), INPUTS)

    def best_of(errors: Any, settings: Sequence[float], what: str) -> tuple[Any, str, float]:
        index = int(np.argmin(np.mean(errors, axis=-1)))
        text = f"{what} {settings[index]:.2g}, best of {len(settings)}"
        return errors[index], text, settings[index]

    rows: dict[str, Row] = {}
    for name, (base, blocks) in OURS.items():
        errors = track(Ours(STARTS, shape, base, blocks), seeds, steps, last)
        rows[name] = Row(errors, errors[STARTS.index(1e-4)], "nothing; starts at 1e-4")
    usual = IDBD([USUAL] * len(THETAS), shape, THETAS)
    best, text, theta = best_of(track(usual, seeds, steps, last), THETAS, "`theta`")
    errors = track(IDBD(STARTS, shape, [theta] * len(STARTS)), seeds, steps, last)
    rows["IDBD"] = Row(errors, best, f"{text}; starts at {USUAL:g}")
    both = track(Autostep((USUAL, *STARTS), shape), seeds, steps, last)
    rows["Autostep"] = Row(both[1:], both[0], f"nothing; starts at {USUAL:g}")
    for name, kind in (("LMS", LMS), ("AdamW, no decay", Adam)):
        errors = track(kind((*GRID, *STARTS), shape), seeds, steps, last)
        best, text, _ = best_of(errors[: len(GRID)], GRID, "step size")
        rows[name] = Row(errors[len(GRID) :], best, text)
    return rows


def read_libsvm(path: Path) -> tuple[Any, Any]:
    """Return features (examples, features) and labels of 1 and -1 of a file in LIBSVM's format.

    Raises
    ------
    ValueError
        If a line is not in that format, or labels are not of two kinds.
    """
    rows, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        label, *pairs = line.split("#")[0].split() or [""]
        if not label:
            continue
        try:
            rows.append({int(at): float(value) for at, value in (p.split(":") for p in pairs)})
            labels.append(float(label))
        except ValueError as error:
            msg = f"`--a1a` must be in LIBSVM's format, `label index:value ...`; line {number}: "
            raise ValueError(msg + repr(line[:60])) from error
    kinds = sorted(set(labels))
    if len(kinds) != 2:
        msg = f"`--a1a` must have labels of two kinds; got {kinds[:5]} in {path}."
        raise ValueError(msg)
    features = np.zeros((len(rows), max(max(row, default=0) for row in rows)))
    for features_of, row in zip(features, rows, strict=True):
        for at, value in row.items():
            features_of[at - 1] = value
    return features, np.where(np.asarray(labels) == kinds[1], 1.0, -1.0)


def made_up(seed: int) -> tuple[Any, Any]:
    """Return sparse binary features, frequent and rare ones, and labels with noise."""
    rng, (count, features) = np.random.default_rng(400 + seed), MADE_UP
    x = (rng.random((count, features)) < np.geomspace(0.5, 0.02, features)).astype(np.float64)
    score = x @ rng.normal(size=features) + rng.logistic(size=count)
    return x, np.where(score > np.median(score), 1.0, -1.0)


def gradients_needed(
    make: Callable[[tuple[int, int]], Learner], data: Sequence[tuple[Any, Any]], most: int
) -> Any:
    """Return how many gradients are computed until they are small, (settings, data); inf, never.

    Of the mean logistic loss with an L2 term of 1 over the number of examples.
    """
    x, labels = (np.stack(some) for some in zip(*data, strict=True))
    learner = make((len(x), x.shape[-1]))
    signed = x * labels[..., None]
    first, found = None, np.full(learner.weights.shape[:2], np.inf)
    with np.errstate(all="ignore"):
        for count in range(1, most + 1):
            margins = (signed @ learner.weights[..., None])[..., 0]
            shares = -1.0 / (1.0 + np.exp(margins))
            grad = (shares[..., None, :] @ signed)[..., 0, :] + learner.weights
            grad = np.where(np.isfinite(grad), grad, 0.0) / x.shape[1]
            norm = np.sqrt(np.sum(grad * grad, axis=-1))
            first = norm if first is None else first
            healthy = np.max(np.abs(learner.weights), axis=-1) < 1e6
            found = np.where((norm <= TOLERANCE * first) & healthy & (found > count), count, found)
            if np.all(np.isfinite(found)):
                break
            learner.learn(grad, None)
    return found


def smoothness(x: Any) -> float:
    """Return the largest curvature that the loss can have."""
    return float(np.linalg.norm(x, 2) ** 2 / 4.0 + 1.0) / len(x)


def counted(data: Sequence[tuple[Any, Any]], most: int) -> dict[str, tuple[Any, str]]:
    """Return gradients needed by method, and what was chosen."""
    rows: dict[str, tuple[Any, str]] = {}
    for name, (base, blocks) in OURS.items():
        ours = partial(Ours, [1e-4], base=base, blocks=blocks)
        rows[name] = gradients_needed(ours, data, most)[0], "nothing; starts at 1e-4"
    own = [1.0 / smoothness(x) for x, _ in data]
    each = [
        gradients_needed(partial(LMS, [size]), [one], most)[0, 0]
        for size, one in zip(own, data, strict=True)
    ]
    rows["gradient descent at 1/L"] = np.asarray(each), "L, the bound on the curvature"
    kinds: dict[str, type[LMS]] = {"gradient descent": LMS, "AdamW, no decay": Adam}
    for name, kind in kinds.items():
        found = gradients_needed(partial(kind, SIZES), data, most)
        index = int(np.argmin(np.median(found, axis=-1)))
        rows[name] = found[index], f"step size {SIZES[index]:.2g}, best of {len(SIZES)}"
    return rows


def _number(value: float) -> str:
    return "diverges" if value == np.inf else f"{value:.3g}"


def _spread(errors: Any) -> str:
    if not np.all(np.isfinite(errors)):
        return f"{int(np.sum(~np.isfinite(errors)))} of {errors.size} diverge"
    return f"{np.mean(errors):.2f} ({np.min(errors):.2f} to {np.max(errors):.2f})"


def _counts(found: Any) -> str:
    def text(value: float) -> str:
        return f"{value:.0f}" if np.isfinite(value) else "never"

    if found.size == 1:
        return text(found[0])
    return f"{text(np.median(found))} ({text(np.min(found))} to {text(np.max(found))})"


def report(
    a1a: Path | None, seeds: Sequence[int], steps: int, last: int, most: int
) -> Iterator[str]:
    """Yield the lines of the page."""
    began = time.process_time()
    yield "# Tasks of the literature, with the defaults"
    yield ""
    yield (
        f"Made by `python -m benchmarks.public`, {len(seeds)} seeds. What is not ours is "
        "written in that script. Best of a grid is by the measure shown, which flatters it; of "
        f"ours nothing is chosen. {platform.machine()}, {os.cpu_count()} cores, "
        f"{platform.system()}, Python {platform.python_version()}, numpy {np.__version__}, "
        f"metaopt {mo.__version__}."
    )
    rows = tracked(seeds, steps, last)
    yield ""
    yield "## Tracking"
    yield ""
    yield (
        f"Sutton's task (1992): {INPUTS} inputs, {RELEVANT} of which matter; one of their weights "
        f"turns its sign every {EVERY} examples. Mean squared error over the last {last:,} of "
        f"{steps:,} examples: mean over seeds, least and largest."
    )
    yield ""
    yield "| method | squared error | chosen |"
    yield "| --- | --- | --- |"
    for name, row in rows.items():
        yield f"| {name} | {_spread(row.best)} | {row.chosen} |"
    yield ""
    least = min(rows, key=lambda name: float(np.mean(rows[name].best)))
    floor = float(np.mean(rows[least].best))
    behind = ", ".join(
        f"{np.mean(rows[name].best) / floor:.2f} ({name.removeprefix('metaopt, ')})"
        for name in OURS
    )
    yield (
        f"The least error is that of {least}. Ours, over it: {behind}. Step sizes do not change "
        "what the base is: the defaults are to be held against AdamW, those with `base=SGD()` "
        'against LMS, and with `blocks="weight"` against IDBD and Autostep.'
    )
    yield ""
    yield "## From which initial step size"
    yield ""
    yield (
        "The same, by the initial step size; LMS and AdamW stay with theirs. IDBD has the `theta` "
        f"that is best from {USUAL:g}. Mean over seeds; `diverges` where one does."
    )
    yield ""
    yield f"| method | {' | '.join(f'{start:g}' for start in STARTS)} |"
    yield "|" + " --- |" * (len(STARTS) + 1)
    for name, row in rows.items():
        cells = (_number(float(np.mean(errors))) for errors in row.by_start)
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    lowest = {name: np.mean(row.by_start, axis=-1) for name, row in rows.items()}
    least = min(lowest, key=lambda name: float(np.min(lowest[name])))
    start = STARTS[int(np.argmin(lowest[least]))]
    yield f"The least of these is {np.min(lowest[least]):.3g}, of {least} from {start:g}."
    yield ""
    yield "## Logistic regression by whole gradients"
    yield ""
    yield (
        f"Gradients computed until their norm is {TOLERANCE:g} of the first, of the mean loss with "
        f"an L2 term of 1 over the number of examples; never: not within {most:,}. "
        "Median over data sets, least and most."
    )
    tables = {
        f"Made up: {len(seeds)} sets of {MADE_UP[0]} examples with {MADE_UP[1]} binary "
        "features, frequent and rare ones": [made_up(seed) for seed in seeds]
    }
    if a1a is not None:
        x, y = read_libsvm(a1a)
        tables[f"a1a, from `{a1a.name}`: {x.shape[0]} examples with {x.shape[1]} features"] = [
            (x, y)
        ]
    for title, data in tables.items():
        yield ""
        yield f"{title}."
        yield ""
        yield "| method | gradients | chosen |"
        yield "| --- | --- | --- |"
        for name, (found, chosen) in counted(data, most).items():
            yield f"| {name} | {_counts(found)} | {chosen} |"
    if a1a is None:
        yield ""
        yield (
            "a1a was left out, as no file was given: `--a1a FILE`, in LIBSVM's text format. What "
            "is made up above is not it."
        )
    yield ""
    yield f"All of it took {(time.process_time() - began) / 60.0:.1f} minutes of one core."


def main(arguments: list[str] | None = None) -> None:
    """Run, print the tables, and write them where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--a1a", type=Path, help="a1a in LIBSVM's text format")
    parser.add_argument("--output", type=Path, help="folder for the page")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    options = parser.parse_args(arguments)
    sizes = (range(2), 60, 20, 5) if options.smoke else (SEEDS, STEPS, LAST, MOST)
    text = "\n".join(report(options.a1a, *sizes)) + "\n"
    print(text)
    if options.output is not None:
        (options.output / "public.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
