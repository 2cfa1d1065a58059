"""How many runs end stuck, with and without the rule by which a block starts anew.

    python -m benchmarks.stuck [--output benchmarks/results]

Thirty small tasks in float64, AdamW as `base`, from a step size of 1e-3. A run is stuck where its
step size ends below a hundredth of one that would still help and does not grow (`small_tasks`).
"""

import argparse
import os
import platform
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import metaopt as mo
from benchmarks.small_tasks import SmallTasks, stuck

__all__ = ["main"]

METAS: dict[str, Any] = {
    "Adam": mo.AdamW(),
    "`FastStart` of Adam": mo.FastStart(mo.AdamW(), retreat=0.0),
}
META_LRS = (1e-3, 1e-2, 3e-2, 1e-1)
#: Parts of its peak below which the step size of a block has it start anew; 0 for never.
COLLAPSES = (0.0, 1e-4, 1e-3, 1e-2)
STEPS = 2000


def counted(tasks: SmallTasks, seeds: int) -> dict[tuple[float, str, float], tuple[int, float]]:
    """Return how many runs end stuck, and the least step size, by collapse, meta and meta_lr."""
    found = {}
    for collapse, (name, meta), meta_lr in product(COLLAPSES, METAS.items(), META_LRS):
        opt = mo.MetaOptimize(
            base=mo.AdamW(), meta=meta, step_size=1e-3, meta_lr=meta_lr, blocks="node", discount=1.0
        )
        runs, least = 0, np.inf
        for seed in range(1, seeds + 1):
            with mock.patch.object(mo.meta, "COLLAPSE", collapse):
                params, sizes = tasks.run(opt, tasks.start, STEPS, seed)
            runs += int(np.sum(stuck(tasks, mo.AdamW(), params, sizes, seed)))
            least = min(least, float(np.min(sizes)))
        found[collapse, name, meta_lr] = runs, least
    return found


def report(found: dict[tuple[float, str, float], tuple[int, float]], seeds: int) -> Iterator[str]:
    """Yield the lines of the page."""
    each = len(SmallTasks().tasks) * seeds
    yield "# Runs that end stuck"
    yield ""
    yield (
        f"Made by `python -m benchmarks.stuck`: runs of {STEPS:,} steps on thirty small tasks "
        f"with {seeds} seeds, {each} for each number, that end with a step size less than a "
        "hundredth of one that would still help, and no larger than 50 steps before; base AdamW, "
        "from 1e-3. A "
        "block starts anew where its step size is below a part of its peak, 1e-2 in metaopt, or "
        "where it comes to the end of its range (2**-63 is 1.1e-19). In brackets the least step "
        f"size of all steps. {platform.machine()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, numpy {np.__version__}, metaopt {mo.__version__}."
    )
    yield ""
    heads = ["never" if part == 0.0 else f"{part:g}" for part in COLLAPSES]
    yield f"| meta update | `meta_lr` | {' | '.join(heads)} |"
    yield "|" + " --- |" * (2 + len(COLLAPSES))
    for name in METAS:
        for meta_lr in META_LRS:
            cells = [found[part, name, meta_lr] for part in COLLAPSES]
            said = " | ".join(f"{runs} ({least:.0e})" for runs, least in cells)
            yield f"| {name} | {meta_lr:g} | {said} |"
    totals = [
        sum(runs for (part, *_), (runs, _) in found.items() if part == at) for at in COLLAPSES
    ]
    all_runs = each * len(METAS) * len(META_LRS)
    yield f"| of all {all_runs} | | {' | '.join(map(str, totals))} |"


def main(arguments: list[str] | None = None) -> None:
    """Count, print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--output", type=Path, help="folder for the table")
    options = parser.parse_args(arguments)
    text = "\n".join(report(counted(SmallTasks(), options.seeds), options.seeds)) + "\n"
    print(text)
    if options.output is not None:
        (options.output / "stuck.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
