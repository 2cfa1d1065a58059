"""The experiments of the MetaOptimize paper, one command each.

    python -m benchmarks.reproduce cifar10 --data FOLDER --logs runs
    python -m benchmarks.reproduce continual-cifar100 --data FOLDER --logs runs --released
    python -m benchmarks.reproduce report --logs runs --output benchmarks/results

As printed in the paper, or with `--released` as the authors' released code acts. A run that was
killed goes on where it was; what is finished is not run again. `--part 0/4` runs every fourth job
from the first on, so that several processes share the work, or a GPU.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.paper.settings import EXPERIMENTS, PAPER_TASKS, runs
from benchmarks.training.console import train


def part(text: str) -> tuple[int, int]:
    """Return "0/4" as two numbers."""
    first, of = map(int, text.split("/"))
    if not 0 <= first < of:
        msg = f"`--part` must be from 0/n to n-1/n; got {text!r}."
        raise argparse.ArgumentTypeError(msg)
    return first, of


def main(arguments: list[str] | None = None) -> int:
    """Answer the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("experiment", choices=(*EXPERIMENTS, "report"))
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder (default runs)")
    parser.add_argument("--output", type=Path, help="folder for the page and pictures of `report`")
    parser.add_argument("--released", action="store_true", help="as the authors' code acts")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of this process (default torch's)")
    parser.add_argument("--part", type=part, default=(0, 1), help="of the jobs, such as 0/4")
    parser.add_argument("--smoke", action="store_true", help="two steps of each: does it run?")
    options = parser.parse_args(arguments)
    if options.experiment == "report":
        from benchmarks.paper.report import report

        report(options.logs, options.output)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    first, of = options.part
    jobs = list(
        runs(
            options.experiment,
            released=options.released,
            smoke=options.smoke,
            precision=options.precision,
        )
    )[first::of]
    # networks side by side see an image a step each: nothing for a GPU
    together = any(PAPER_TASKS[job.task].replicated for job in jobs)
    device = "cpu" if together else options.device
    return train(jobs, options.logs, options.data, device=device, tasks=PAPER_TASKS)


if __name__ == "__main__":
    sys.exit(main())
