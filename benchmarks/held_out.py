"""What is learned from held-out gradients, and what from those of training, where a model overfits.

    python -m benchmarks.held_out [--output benchmarks/results]

Two tasks. The digits network with 40% of the training labels drawn anew: 1150 images for training
and 287 for the held-out batches, whose labels are as noisy. And a linear regression on 100
examples with 60 inputs and much noise: 70 for training, 30 held out. The rows that learn from
gradients of training alone have all of these for training. AdamW from a step size of 1e-4 (for the
regression 1e-3), the defaults in all else; weight decay 0.1, or learned from there. What is
measured, the loss of a test set without noise, takes no part in anything.
"""

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import metaopt as mo
from benchmarks.meta_parameters import Task, noisy, regression

__all__ = ["main"]

SEEDS = range(3)
DECAY = 0.1
#: By name: the weight decay, and in every how many steps there is a held-out gradient; 0 for none.
KINDS: dict[str, tuple[Any, int]] = {
    "training": (DECAY, 0),
    "held out, each step": (DECAY, 1),
    "held out, every fourth step": (DECAY, 4),
    "training, and weight decay learned": (mo.Learned(DECAY, meta_lr=1e-2), 0),
    "held out, and weight decay learned": (mo.Learned(DECAY, meta_lr=1e-2), 1),
}


TASKS: dict[str, Callable[[int], Task]] = {"digits": noisy, "regression": regression}


def run(task: Task, decay: Any, every: int, seed: int) -> dict[str, float]:
    """Return the measures at the end, the least test loss on the way, and what was learned."""
    opt = mo.MetaOptimize(
        base=mo.AdamW(weight_decay=decay), step_size=task.step_size, held_out=every > 0
    )
    rng, params = np.random.default_rng(1000 + seed), task.params
    state, least = opt.init(params), np.inf
    for step in range(task.steps):
        batch = task.draw(rng, step, "train" if every else "all")
        grads, judge = task.grads(params, *batch), None
        if every and step % every == 0:
            judge = task.grads(params, *task.draw(rng, step, "held out"))
        params, state = opt.step(params, grads, state, meta_grads=judge)
        if step % 50 == 49:
            least = min(least, task.measure(params, batch)["test loss"])
    learned = opt.hyperparameters(state).get("weight_decay")
    return task.measure(params, batch) | {
        "least on the way": least,
        "step size": float(opt.step_sizes(state)["all"]),
        "weight decay": float(decay if learned is None else learned["all"]),
    }


def report() -> Iterator[str]:
    """Yield the lines of the page."""
    yield "# Held-out gradients"
    yield ""
    yield (
        f"Made by `python -m benchmarks.held_out`, which says what is run: means over "
        f"{len(SEEDS)} seeds and, in brackets, least and largest; the step size and the weight "
        "decay at the end by their geometric means. "
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}, numpy {np.__version__}, metaopt {mo.__version__}."
    )
    for name, make in TASKS.items():
        rows: dict[str, list[dict[str, float]]] = {
            kind: [run(make(seed), *settings, seed) for seed in SEEDS]
            for kind, settings in KINDS.items()
        }
        columns = list(rows["training"][0])
        yield ""
        yield f"## {name.capitalize()}"
        yield ""
        yield f"| learns from | {' | '.join(columns)} |"
        yield "|" + " --- |" * (len(columns) + 1)
        for kind, runs in rows.items():
            cells = (_cell(column, [found[column] for found in runs]) for column in columns)
            yield f"| {kind} | {' | '.join(cells)} |"


def _cell(column: str, values: list[float]) -> str:
    if column in ("step size", "weight decay"):
        return f"{np.exp(np.mean(np.log(values))):.2g}"
    return f"{np.mean(values):.3f} ({min(values):.3f}, {max(values):.3f})"


def main(arguments: list[str] | None = None) -> None:
    """Run, print the tables, and write them where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for the tables")
    options = parser.parse_args(arguments)
    lines = []
    for line in report():
        print(line, flush=True)
        lines.append(line)
    if options.output is not None:
        text = "\n".join(lines) + "\n"
        (options.output / "held_out.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
