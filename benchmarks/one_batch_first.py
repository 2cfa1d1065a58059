"""What is left of a network that has learned one batch by heart, once it sees all data.

    python -m benchmarks.one_batch_first --logs runs --output benchmarks/results

Training by the README's settings, with and without the discount, and at fixed step sizes: 1000
steps on one batch of the digits, whose loss asks for ever larger step sizes, then 3000 on all. A
run that was killed goes on where it was; what is finished is not run again.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.training.console import train
from benchmarks.training.loop import Job
from benchmarks.training.methods import Method
from benchmarks.training.results import Result, read
from benchmarks.training.studies import DISCOUNTED, GRIDS, SEEDS, STARTS
from benchmarks.training.tasks import Task
from benchmarks.training.tasks.digits import DigitsNetwork, OneBatchFirst
from metaopt.demo.report import number

__all__ = ["main"]

#: The same network with and without the one batch.
TASKS: dict[str, type[Task]] = {"one-batch-first": OneBatchFirst, "digits": DigitsNetwork}
README = replace(DISCOUNTED, weight_decay=0.0)
METHODS = {
    README: STARTS,
    replace(README, discount=1.0): STARTS,
    Method(base="AdamW", weight_decay=0.0): GRIDS["AdamW"],
}


def jobs(seeds: tuple[int, ...]) -> Iterator[Job]:
    """Yield all runs."""
    for task in TASKS:
        for method, starts in METHODS.items():
            yield Job(task=task, method=method, starts=starts, seeds=seeds)


def report(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of the page."""
    made_with = sorted({one for run in results for one in run.made_with})
    seeds = len({run.seed for run in results})
    yield "# One batch first"
    yield ""
    yield (
        f"Made by `python -m benchmarks.one_batch_first`: the digits network, "
        f"{OneBatchFirst.alone:,} steps on one and the same batch of {OneBatchFirst.size}, then "
        f"{DigitsNetwork.steps:,} on all data; without it these alone. Means of {seeds} seeds, "
        "without weight decay; *dead* are hidden units that are 0 on all training images. "
        f"Made with {'; '.join(made_with)}."
    )
    yield ""
    yield (
        "| method | start | step size after the one batch | dead then | dead at the end | "
        "test accuracy at the end | without the one batch |"
    )
    yield "|" + " --- |" * 7
    for method, starts in METHODS.items():
        for start in starts:
            first, usual = (
                [run for run in results if (run.task, run.method, run.start) == key]
                for key in ((task, method, start) for task in TASKS)
            )
            if not first or not usual:
                continue
            at = first[0].at.index(OneBatchFirst.alone)
            sizes = sorted(values[at] for run in first for values in run.sizes.values())
            size = f"{number(sizes[0])} to {number(sizes[-1])}" if method.meta else ""
            then, end = (
                f"{100 * statistics.fmean(run.series['test.dead'][index] for run in first):.0f}%"
                for index in (at, -1)
            )
            yield (
                f"| {method.label} | {number(start)} | {size} | {then} | {end} | "
                f"{_accuracy(first)} | {_accuracy(usual)} |"
            )


def _accuracy(results: Sequence[Result]) -> str:
    """Return the mean over seeds, and the least."""
    values = [100 * run.series["test.accuracy"][-1] for run in results]
    return f"{statistics.fmean(values):.1f}%, at worst {min(values):.1f}%"


def main(arguments: list[str] | None = None) -> int:
    """Train what is not trained yet, print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder (default runs)")
    parser.add_argument("--output", type=Path, help="folder for the table")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="of this process (default 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    wanted = list(jobs(SEEDS[: options.seeds]))
    left_out = train(wanted, options.logs, None, tasks=TASKS)
    methods = {(job.task, job.method) for job in wanted}
    results = [run for run in read(options.logs) if (run.task, run.method) in methods]
    text = "\n".join(report(results)) + "\n"
    print(text)
    if options.output is not None:
        (options.output / "one_batch_first.md").write_text(text, encoding="utf-8")
    return left_out


if __name__ == "__main__":
    sys.exit(main())
