"""What logs say: one result for each run."""

import io
import json
import math
import statistics
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.training.loop import finished, replace_file
from benchmarks.training.methods import Method, Peer
from benchmarks.training.tasks import Task

__all__ = ["Result", "archive", "method_of", "read"]


@dataclass(frozen=True)
class Result:
    """One run.

    Parameters
    ----------
    task : str
    method : Method or Peer
    start : float
    seed, steps : int
    at : tuple of int
        Steps of the entries of its log.
    series : dict of name to tuple of float
        Measures at these steps, "train.loss" and so on; NaN where there is none.
    sizes : dict of block to tuple of float
        Step sizes at these steps.
    precision : str
        Of products and convolutions.
    made_with : tuple of str
        Commits, machines and versions, where the log says them.
    """

    task: str
    method: Method | Peer
    start: float
    seed: int
    steps: int
    at: tuple[int, ...]
    series: dict[str, tuple[float, ...]]
    sizes: dict[str, tuple[float, ...]] = field(default_factory=dict)
    precision: str = "fp32"
    made_with: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The method in words."""
        return self.method.label

    def judged(self, kind: type[Task]) -> float:
        """Return what the task judges the run by; NaN where it diverged."""
        values = self.series[kind.metric]
        if self.diverged(kind):
            return math.nan
        if not kind.judged_over:
            return values[-1]
        late = [
            value
            for step, value in zip(self.at, values, strict=True)
            if step > (1 - kind.judged_over) * self.steps and not math.isnan(value)
        ]
        return statistics.fmean(late)

    def diverged(self, kind: type[Task]) -> bool:
        """Return whether a loss was not finite, or the last is far above the first."""
        name = "test.loss" if "test.loss" in self.series else "train.loss"
        losses = self.series[name]
        known = losses if name == "test.loss" else losses[1:]  # nothing is trained at step 0
        return any(math.isnan(loss) for loss in known) or known[-1] > kind.worse * known[0]

    def steps_to_target(self, kind: type[Task]) -> int | None:
        """Return the first step at which the task's target is reached."""
        measured = zip(self.at, self.series[kind.metric], strict=True)
        return next((step for step, value in measured if _reached(value, kind)), None)

    def lost(self, kind: type[Task]) -> bool:
        """Return whether the run had arrived and ends clearly short of the target."""
        if self.steps_to_target(kind) is None:
            return False
        last = self.series[kind.metric][-1]
        if kind.more_is_better:
            return not last >= kind.target - 0.05
        return not last <= 1.1 * kind.target


def _reached(value: float, kind: type[Task]) -> bool:
    return value >= kind.target if kind.more_is_better else value <= kind.target


def read(folder: Path) -> Iterator[Result]:
    """Yield the runs of all logs that are complete.

    Parameters
    ----------
    folder : Path
    """
    for path in sorted(folder.glob("*.jsonl")):
        if finished(path):
            head, *entries, _ = (json.loads(line) for line in path.read_text().splitlines())
            yield from _runs(head, entries)


def archive(
    folder: Path, task: str, path: Path, unlike: Callable[[Path, str], str | None]
) -> list[str]:
    """Add the complete logs of a task to a tar.xz file, in place of those of the same name.

    Returns a sentence on each that is left out.

    Parameters
    ----------
    folder : Path
        Of logs.
    task : str
    path : Path
        Left as it is, or not made, where there is nothing to add.
    unlike : callable
        As `benchmarks.protocol.unlike`.
    """
    logs, left_out = {}, []
    for log in sorted(folder.glob(f"{task}-*.jsonl")):
        if not finished(log):
            continue
        why = unlike(log, task)
        if why is None:
            logs[log.name] = log.read_bytes()
        else:
            left_out.append(f"{log.name} is not archived: {why}.")
    if not logs:
        return left_out
    if path.is_file():
        with tarfile.open(path) as older:
            kept = {member.name: older.extractfile(member) for member in older}
            logs = {name: file.read() for name, file in kept.items() if file} | logs
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as file:
        for name in sorted(logs):
            member = tarfile.TarInfo(name)
            member.size = len(logs[name])
            file.addfile(member, io.BytesIO(logs[name]))
    replace_file(path, packed.getvalue())
    return left_out


def _runs(head: dict[str, Any], entries: list[dict[str, Any]]) -> Iterator[Result]:
    job = head["job"]
    method = method_of(job["method"])
    at = tuple(entry["step"] for entry in entries)
    made_with = tuple(head.get("made_with", ()))
    if "commit" in head:  # an older log
        made_with = (f"commit {head['commit']}",)
    pairs = [(start, seed) for start in job["starts"] for seed in job["seeds"]]
    for index, (start, seed) in enumerate(pairs):
        series = {
            f"{part}.{name}": tuple(
                _number(entry.get(part, {}).get(name), index) for entry in entries
            )
            for part in ("train", "test")
            for name in entries[-1].get(part, {})
        }
        sizes = {
            name: tuple(_number(entry["step_sizes"].get(name), index) for entry in entries)
            for name in entries[-1]["step_sizes"]
        }
        yield Result(
            job["task"],
            method,
            start,
            seed,
            head["steps"],
            at,
            series,
            sizes,
            job.get("precision", "fp32"),
            made_with,
        )


def method_of(given: Mapping[str, Any]) -> Method | Peer:
    """Return the method that JSON speaks of."""
    if "name" in given:
        return Peer(**given)
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    return Method(**options)


def _number(values: Sequence[float | None] | None, index: int) -> float:
    value = None if values is None else values[index]
    return math.nan if value is None else value
