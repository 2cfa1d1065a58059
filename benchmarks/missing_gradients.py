"""What steps cost in which some parameters have no gradient, in turns in one process, as ratios.

    python -m benchmarks.missing_gradients [--problem small] [--rounds 40]

As when layers are dropped. Every contender makes the same steps, in turns; reported are medians of
times, and of the ratios, step by step, to `torch.optim.AdamW(fused=True)`.
"""

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from metaopt_torch import MetaOptimizer

import metaopt as mo
from benchmarks.contenders import Shapes
from benchmarks.contenders.shapes import PROBLEMS
from benchmarks.contenders.torch_steps import parameters, waiting

SHAPES: dict[str, Shapes] = {
    "small": {f"layers.{index // 6}.{index % 6}": (1000,) for index in range(60)},
    **PROBLEMS,
}
#: Whether a layer rests in a step.
RESTS: dict[str, Callable[[int, int], bool]] = {
    "no layer rests": lambda layer, step: False,  # noqa: ARG005
    "every other layer, every other step": lambda layer, step: layer % 2 == step % 2 == 1,
    "each layer in a fifth of the steps": lambda layer, step: (
        random.Random(f"{layer} {step}").random() < 0.2
    ),
}
MAKE: dict[str, Callable[[Sequence[Any]], Any]] = {
    "AdamW, fused": lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW": torch.optim.AdamW,
    **{
        f"AdamW + Lion, {blocks}": functools.partial(
            MetaOptimizer,
            base=mo.AdamW(weight_decay=0.1),
            meta=mo.Lion(),
            blocks=blocks,
            discount=1.0,
        )
        for blocks in ("scalar", "tensor")
    },
}
#: Steps that are not counted.
WARM_UP = 20


def times(shapes: Shapes, rests: Callable[[int, int], bool], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each contender's steps, taken in turns."""
    layers: dict[str, int] = {}
    of = [layers.setdefault(".".join(name.split(".")[:2]), len(layers)) for name in shapes]
    params = {name: list(parameters(shapes).values()) for name in MAKE}
    grads = {name: [param.grad for param in some] for name, some in params.items()}
    steps = {name: waiting(make(params[name]).step) for name, make in MAKE.items()}
    found: dict[str, list[float]] = {name: [] for name in MAKE}
    for t in range(rounds + WARM_UP):
        for name, step in steps.items():
            for param, grad, layer in zip(params[name], grads[name], of, strict=True):
                param.grad = None if rests(layer, t) else grad
            start = time.perf_counter()
            step()
            found[name].append(time.perf_counter() - start)
    return {name: seconds[WARM_UP:] for name, seconds in found.items()}


def main() -> None:
    """Measure all contenders on the problems, and print a table of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--problem", action="append", choices=tuple(SHAPES))
    parser.add_argument("--rounds", type=int, default=40, help="steps timed of each (default 40)")
    options = parser.parse_args()
    for problem in options.problem or SHAPES:
        for pattern, rests in RESTS.items():
            found = times(SHAPES[problem], rests, options.rounds)
            over = next(iter(found.values()))
            print(f"\n| {problem}, {pattern} | ms | ratio |\n| --- | --- | --- |")
            for name, seconds in found.items():
                ratios = [mine / theirs for mine, theirs in zip(seconds, over, strict=True)]
                ratio = statistics.median(ratios)
                print(f"| {name} | {1e3 * statistics.median(seconds):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
