"""Does it learn? MetaOptimize against fixed and scheduled step sizes and against its peers.

    python -m benchmarks.learning compare --task digits --logs runs
    python -m benchmarks.learning maps --task digits --logs runs
    python -m benchmarks.learning long --logs runs
    python -m benchmarks.learning time --task digits --logs runs
    python -m benchmarks.learning report --logs runs --output benchmarks/results

A run that was killed goes on where it was; what is finished is not run again. Every run's log is a
file of JSON lines. Tasks with data sets need `--data`, a folder; without it they are left out.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.protocol import ProtocolError, check
from benchmarks.training.console import train
from benchmarks.training.loop import Job
from benchmarks.training.studies import JUDGING, SEEDS, comparison, long, maps
from benchmarks.training.tasks import TASKS
from benchmarks.training.timing import time_methods


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """Yield the jobs that the command line asks for."""
    seeds = SEEDS[:1] if options.smoke else SEEDS[: options.seeds]
    for task in options.task or TASKS:
        if options.study == "compare":
            jobs = comparison(task, seeds)
        elif options.study == "long":
            jobs = long(task, seeds)
        else:
            jobs = maps(task, seeds, options.steps)
        for job in jobs:
            yield replace(job, starts=job.starts[:1], steps=3) if options.smoke else job


def main(arguments: list[str] | None = None) -> int:
    """Answer the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("study", choices=("compare", "long", "maps", "time", "report"))
    parser.add_argument("--task", action="append", choices=tuple(TASKS))
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder (default runs)")
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--output", type=Path, help="folder for tables and plots of `report`")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many (default all five)")
    parser.add_argument("--steps", type=int, help="steps of each run of `maps`")
    parser.add_argument("--threads", type=int, default=1, help="of this process (default 1)")
    parser.add_argument("--smoke", action="store_true", help="three steps of each: does it run?")
    options = parser.parse_args(arguments)
    if options.study == "report":
        from benchmarks.training.report import report

        report(options.logs, options.output)
        return 0
    torch.set_num_threads(options.threads)
    scored = options.study == "compare" and set(options.task or TASKS) & set(JUDGING)
    if scored and not options.smoke:
        try:
            check(options.seeds)
        except ProtocolError as error:
            parser.error(f"{', '.join(sorted(scored))}: {error}")
    if options.study == "time":
        for task in options.task or TASKS:
            print(time_methods(task, options.data, options.logs).read_text())
        return 0
    return train(list(jobs_of(options)), options.logs, options.data)


if __name__ == "__main__":
    sys.exit(main())
