"""What a Hessian-free step costs: its time over that of the plain base rule.

    python benchmarks/step_cost.py [--rounds 20] [--output benchmarks/results]

Both run in one process, in turns, on the same gradients, in float32 NumPy; reported are the ratio
of the medians and the quartiles of the ratios taken round by round. The plain rule is the very rule
with a fixed step size: its direction, its step, nothing else. "tensors" are the 62 parameter
tensors of ResNet-18 for ten classes, "flat" is one vector of ten million weights.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import metaopt as mo
from metaopt.rules.move import move

Arrays = dict[str, Any]

PAIRS: dict[str, tuple[Any, Any]] = {
    "AdamW + Lion": (mo.AdamW(weight_decay=0.1), mo.Lion()),
    "Lion + Lion": (mo.Lion(weight_decay=0.1), mo.Lion()),
    "RMSprop + Adam": (mo.RMSprop(weight_decay=0.1), mo.AdamW()),
    "SGD momentum + Adam": (mo.SGD(momentum=0.9, weight_decay=0.1), mo.AdamW()),
}


def resnet18_shapes(classes: int = 10) -> dict[str, tuple[int, ...]]:
    """Return the shapes of ResNet-18's parameters, named as in torchvision."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}

    def batch_norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    batch_norm("bn1", 64)
    inputs = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1.weight"] = (width, inputs, 3, 3)
            batch_norm(f"{name}.bn1", width)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            batch_norm(f"{name}.bn2", width)
            if inputs != width:
                shapes[f"{name}.downsample.0.weight"] = (width, inputs, 1, 1)
                batch_norm(f"{name}.downsample.1", width)
            inputs = width
    shapes["fc.weight"], shapes["fc.bias"] = (classes, 512), (classes,)
    return shapes


PROBLEMS: dict[str, dict[str, tuple[int, ...]]] = {
    "flat": {"weights": (10_000_000,)},
    "tensors": resnet18_shapes(),
}


def plain_step(rule: Any, grads: Arrays) -> Callable[[], None]:
    """Return a function that makes one step of the rule at a fixed step size."""
    lr = np.float32(1e-4)
    params = {name: np.zeros_like(grad) for name, grad in grads.items()}
    slots = {
        name: {slot: np.zeros_like(grad) for slot in rule.slots} for name, grad in grads.items()
    }
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        for name, grad in grads.items():
            direction, slots[name] = rule.direction(grad, slots[name], np.asarray(count, "float32"))
            params[name] = params[name] - move(params[name], direction, lr, rule.weight_decay).delta

    return step


def meta_step(opt: mo.MetaOptimize, grads: Arrays) -> Callable[[], None]:
    """Return a function that makes one step of MetaOptimize."""
    params = {name: np.zeros_like(grad) for name, grad in grads.items()}
    state = opt.init(params)

    def step() -> None:
        nonlocal params, state
        params, state = opt.step(params, grads, state)

    return step


@dataclass(frozen=True)
class Cost:
    """Times of two steps, in turns."""

    problem: str
    pair: str
    blocks: str
    plain: list[float]
    meta: list[float]

    @property
    def ratio(self) -> float:
        """Ratio of the medians."""
        return statistics.median(self.meta) / statistics.median(self.plain)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the ratios round by round."""
        ratios = [meta / plain for meta, plain in zip(self.meta, self.plain, strict=True)]
        first, _, third = statistics.quantiles(ratios, n=4)
        return first, third


def seconds(step: Callable[[], None]) -> float:
    """Return how long one step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(problem: str, pair: str, blocks: str, rounds: int) -> Cost:
    """Measure one pair on one problem; the first two rounds are not counted."""
    rng = np.random.default_rng(0)
    grads = {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in PROBLEMS[problem].items()
    }
    base, meta = PAIRS[pair]
    plain = plain_step(base, grads)
    tuned = meta_step(mo.MetaOptimize(base=base, meta=meta, blocks=blocks), grads)
    times = [(seconds(plain), seconds(tuned)) for _ in range(rounds + 2)][2:]
    return Cost(problem, pair, blocks, [a for a, _ in times], [b for _, b in times])


def table(costs: list[Cost], rounds: int) -> str:
    """Return the results as Markdown."""
    sizes = {
        name: sum(math.prod(shape) for shape in shapes.values())
        for name, shapes in PROBLEMS.items()
    }
    lines = [
        "# Cost of a Hessian-free step over the plain base rule, NumPy float32",
        "",
        "Made by `python benchmarks/step_cost.py`. "
        f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}, metaopt {mo.__version__}; {rounds} rounds in turns in one "
        "process; the ratio is that of the medians, in brackets the quartiles round by round.",
        "",
        "| problem | base + meta | blocks | plain ms | MetaOptimize ms | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cost in costs:
        first, third = cost.quartiles
        lines.append(
            f"| {cost.problem} ({len(PROBLEMS[cost.problem])} arrays, {sizes[cost.problem]:,} "
            f"weights) | {cost.pair} | {cost.blocks} | {1e3 * statistics.median(cost.plain):.1f} | "
            f"{1e3 * statistics.median(cost.meta):.1f} | {cost.ratio:.2f} "
            f"({first:.2f} to {third:.2f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all pairs on all problems and print, and with `--output` write, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="steps timed of each (default 20)")
    parser.add_argument("--output", type=Path, help="folder for step_cost_numpy.md")
    options = parser.parse_args()
    costs = [
        measure(problem, pair, blocks, options.rounds)
        for problem in PROBLEMS
        for pair in PAIRS
        for blocks in (("scalar", "tensor") if pair == "AdamW + Lion" else ("scalar",))
    ]
    text = table(costs, options.rounds)
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "step_cost_numpy.md").write_text(text)


if __name__ == "__main__":
    main()
