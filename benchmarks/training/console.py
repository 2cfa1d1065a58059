"""Jobs one after the other, with a bar for all of them and one for the job at hand."""

from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.training.data import DataMissingError
from benchmarks.training.loop import Job, TakenError, run
from benchmarks.training.tasks import Task

__all__ = ["train"]


def train(
    jobs: Sequence[Job],
    logs: Path,
    data: Path | None,
    *,
    device: str = "cpu",
    tasks: dict[str, type[Task]] | None = None,
) -> int:
    """Run jobs, and say which are left out for want of data or a package.

    Parameters
    ----------
    jobs : sequence of Job
    logs : Path
        Folder.
    data : Path, optional
        Folder with data sets.
    device : str
    tasks : dict of name to Task, optional
        In place of those of the comparison.

    Returns
    -------
    int
        How many were left out.
    """
    left_out: dict[str, int] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bars:
        whole, one = bars.add_task("jobs", total=len(jobs)), bars.add_task("", total=1)
        for job in jobs:
            bars.reset(one, description=f"{job.task}: {job.method.label}", total=1)

            def progress(done: int, total: int) -> None:
                bars.update(one, completed=done, total=total)

            try:
                run(job, logs, data=data, device=device, tasks=tasks, progress=progress)
            except (DataMissingError, ImportError) as error:
                if str(error) not in left_out:
                    bars.print(f"{job.task}: {job.method.label} is left out. {error}")
                left_out[str(error)] = left_out.get(str(error), 0) + 1
            except TakenError:
                bars.print(f"{job.task}: {job.method.label} is left to another process.")
            bars.advance(whole)
    return sum(left_out.values())
