"""What a wrap gains: optimizers of others at their best lr, and with one that `wrap` learns.

    python -m benchmarks.wrapped --logs runs --data FOLDER --output benchmarks/results

Muon with AdamW for what is no matrix, SOAP, and AdamW with moments of eight bits: from step sizes
that are far too small, against the best of a grid of fixed lr and of peaks of a cosine. A run that
was killed goes on where it was; what is finished is not run again.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.training.cells import Cell, best_of, cells, shown, worst_of
from benchmarks.training.console import train
from benchmarks.training.goals import NAMES as TITLES
from benchmarks.training.loop import Job
from benchmarks.training.methods import Peer
from benchmarks.training.results import Result, read
from benchmarks.training.studies import SEEDS
from benchmarks.training.tasks import TASKS
from benchmarks.training.wrapped import INNER, KINDS, NAMES
from metaopt.demo.report import number

__all__ = ["main"]

#: Fixed lr and peaks of schedules: half decades. Those of the first task reach further down.
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
GRIDS = {"digits": (1e-4, 3e-4, *GRID)}
STARTS = (1e-6, 1e-4, 1e-2)
DESCRIBED = {
    "Muon": "torch's, with steps as long as AdamW's, and AdamW for what is no matrix",
    "SOAP": "pytorch_optimizer's",
    "8-bit AdamW": "torchao's, and AdamW for arrays of less than 4,096 numbers",
}
#: In place of the task's.
STEPS = {"digits": 1000, "characters": 500, "autoencoder": 500, "logistic": 1000}
#: In the order in which they are run, as far as they have matrices, or some of `QUANTIZED` numbers.
WHERE = (
    ("digits", "Muon"),
    ("digits", "SOAP"),
    ("characters", "Muon"),
    ("characters", "SOAP"),
    ("autoencoder", "Muon"),
    ("autoencoder", "SOAP"),
    ("logistic", "SOAP"),
    ("characters", "8-bit AdamW"),
)


def jobs(seeds: tuple[int, ...]) -> Iterator[Job]:
    """Yield all runs, those that matter most first."""
    for task, inner in WHERE:
        for name, (which, kind) in NAMES.items():
            if which == inner:
                grid = GRIDS.get(task, GRID)
                yield Job(
                    task=task,
                    method=Peer(name=name),
                    starts=STARTS if kind.startswith("wrapped") else grid,
                    seeds=seeds,
                    steps=STEPS[task],
                )


def report(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of the page."""
    made_with = sorted({one for run in results for one in run.made_with})
    run = {NAMES[result.label][0] for result in results}
    known = [f"{inner} ({what})" for inner, what in DESCRIBED.items() if inner in run]
    yield "# What a wrap gains"
    yield ""
    yield (
        f"Made by `python -m benchmarks.wrapped`: {', '.join(known)}; with the task's weight "
        "decay. Each at the "
        f"best fixed lr of {', '.join(map(number, GRID))} (and 1e-4, 3e-4 on the digits) and the "
        "best such peak of a warm-up and cosine, by the very measure that is shown, which flatters "
        "them; and wrapped by "
        f"`metaopt_torch.wrap` with its defaults, from {', '.join(map(number, STARTS))}, the worst "
        "and the best of these. Muon and AdamW have one lr where it is given, and a step size each "
        "where it is learned. *Wrapped* is judged at averaged weights, *cosine on top* at the "
        f"last. Tasks are those of [learning.md](learning.md). {os.cpu_count()} cores; made with "
        f"{'; '.join(made_with)}."
    )
    for task, kind in TASKS.items():
        table = cells([run for run in results if run.task == task], kind)
        if not table:
            continue
        seeds = max(cell.seeds for cell in table)
        yield ""
        yield f"## {TITLES[task]}"
        yield ""
        yield f"{table[0].steps:,} steps; judged by {kind.judged_by}; means of {seeds} seeds."
        yield ""
        heads = ("best fixed", "best cosine", *(f"{k}: worst, best start" for k in KINDS[2:]))
        yield f"| optimizer | {' | '.join(heads)} |"
        yield "|" + " --- |" * (1 + len(heads))
        for inner in INNER:
            found = {k: _of(table, inner, k) for k in KINDS}
            if any(found.values()):
                yield f"| {inner} | {' | '.join(_entry(found[k], k) for k in KINDS)} |"


def _of(table: Sequence[Cell], inner: str, kind: str) -> list[Cell]:
    return [cell for cell in table if NAMES[cell.method.label] == (inner, kind)]


def _entry(some: Sequence[Cell], kind: str) -> str:
    if not some:
        return "not run"
    best, worst = best_of(some), worst_of(some)
    if not kind.startswith("wrapped"):
        return f"{shown(best.mean, best.kind)} at {number(best.start)}"
    return (
        f"{shown(worst.mean, worst.kind)} from {number(worst.start)}, "
        f"{shown(best.mean, best.kind)} from {number(best.start)}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Train what is not trained yet, print the tables, and write them where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", action="append", choices=tuple(STEPS))
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder (default runs)")
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--output", type=Path, help="folder for the tables")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="of this process (default 1)")
    parser.add_argument("--report", action="store_true", help="of what is finished; train nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    wanted = [job for job in jobs(SEEDS[: options.seeds]) if job.task in (options.task or STEPS)]
    left_out = 0 if options.report else train(wanted, options.logs, options.data)
    methods = {(job.task, job.method) for job in wanted}
    results = [run for run in read(options.logs) if (run.task, run.method) in methods]
    text = "\n".join(report(results)) + "\n"
    print(text)
    if options.output is not None:
        (options.output / "wrapped.md").write_text(text, encoding="utf-8")
    return left_out


if __name__ == "__main__":
    sys.exit(main())
