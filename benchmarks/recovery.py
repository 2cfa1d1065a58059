"""What becomes of runs that diverge, with and without `recover`.

    python -m benchmarks.recovery [--output benchmarks/results]

Rosenbrock's function of 2, 10 and 50 variables in float64, SGD as `base` under `FastStart(AdamW())`
from a step size of 1e-6: once it grows too large, the weights leave for infinity.
"""

import argparse
import os
import platform
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import metaopt as mo

__all__ = ["main"]

SIZES = (2, 10, 50)
DISCOUNTS = (0.99, 0.999, 1.0)
META_LRS = (1e-2, 1e-1)
STEPS = 3000


def rosenbrock(w: Any) -> float:
    """Return the function, 0 where all variables are 1."""
    return float(np.sum(100.0 * (w[1:] - w[:-1] ** 2) ** 2 + (1.0 - w[:-1]) ** 2))


def gradient(w: Any) -> Any:
    """Return its gradient."""
    bend, grad = w[1:] - w[:-1] ** 2, np.zeros_like(w)
    grad[:-1] = -400.0 * w[:-1] * bend - 2.0 * (1.0 - w[:-1])
    grad[1:] += 200.0 * bend
    return grad


def run(size: int, discount: float, meta_lr: float, *, recover: bool) -> tuple[float, int]:
    """Return the loss at the end over that at the start, and how often the run went back."""
    opt = mo.MetaOptimize(
        base=mo.SGD(),
        meta=mo.FastStart(mo.AdamW(), retreat=0.0),
        step_size=1e-6,
        meta_lr=meta_lr,
        discount=discount,
        recover=recover,
    )
    start = np.where(np.arange(size) % 2 == 0, -1.2, 1.0)
    params: Any = {"w": start}
    state = opt.init(params)
    with np.errstate(all="ignore"):
        for _ in range(STEPS):
            params, state = opt.step(params, {"w": gradient(params["w"])}, state)
        share = rosenbrock(params["w"]) / rosenbrock(start)
    return share, int(state.meta_slots["recoveries"][0]) if recover else 0


def report() -> Iterator[str]:
    """Yield the lines of the page."""
    yield "# Runs that diverge"
    yield ""
    yield (
        f"Made by `python -m benchmarks.recovery`: Rosenbrock's function after {STEPS:,} steps, "
        "over what it was at the start, and how often the run went back; SGD under "
        "`FastStart(AdamW())`, from 1e-6. "
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}, numpy {np.__version__}, metaopt {mo.__version__}."
    )
    yield ""
    yield "| variables | `discount` | `meta_lr` | without | with `recover` | went back |"
    yield "|" + " --- |" * 6
    for size, discount, meta_lr in product(SIZES, DISCOUNTS, META_LRS):
        without, _ = run(size, discount, meta_lr, recover=False)
        share, times = run(size, discount, meta_lr, recover=True)
        yield f"| {size} | {discount:g} | {meta_lr:g} | {without:.2g} | {share:.2g} | {times} |"


def main(arguments: list[str] | None = None) -> None:
    """Run, print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for the table")
    options = parser.parse_args(arguments)
    text = "\n".join(report()) + "\n"
    print(text)
    if options.output is not None:
        (options.output / "recovery.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
