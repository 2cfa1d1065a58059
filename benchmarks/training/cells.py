"""What several seeds have in common: a cell for each method and start, in memory and on disk."""

import json
import lzma
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.training.loop import replace_file
from benchmarks.training.methods import Method, Peer
from benchmarks.training.results import Result, method_of
from benchmarks.training.tasks import Task

__all__ = ["Cell", "best_of", "cells", "keep", "kept", "merged", "shown", "worst_of"]


@dataclass(frozen=True)
class Cell:
    """A method from one start, over seeds.

    Parameters
    ----------
    kind : type of Task
    method : Method or Peer
    start : float
        Where step sizes start, or what they are.
    steps : int
    precision : str
        Of products and convolutions.
    seeds : int
        How many.
    mean, spread : float
        Of what the runs are judged by, and its standard deviation; the mean is the worst that
        there is if a run diverged.
    diverged, lost : int
        Runs that diverged; that arrived at the target and went away again.
    arrivals : tuple of float
        Steps to the target of the runs that reached it, sorted; of runs without `made_with`, which
        were taken from tables, as many times their median.
    final_sizes : tuple of float or None
        Least and largest last step size over runs and blocks.
    made_with : tuple of str
        Commits, machines and versions; empty if that of a run is not known.
    results : tuple of Result
        The runs, where their logs are at hand.
    """

    kind: type[Task]
    method: Method | Peer
    start: float
    steps: int
    precision: str
    seeds: int
    mean: float
    spread: float
    diverged: int
    lost: int
    arrivals: tuple[float, ...]
    final_sizes: tuple[float, float] | None
    made_with: tuple[str, ...]
    results: tuple[Result, ...] = field(default=(), compare=False, repr=False)

    @property
    def merit(self) -> float:
        """The mean, or minus it: more is better."""
        return self.mean if self.kind.more_is_better else -self.mean

    def better_than(self, other: "Cell") -> bool:
        """Return whether its mean is the better one."""
        return self.merit > other.merit


def best_of(table: Sequence[Cell]) -> Cell:
    """Return the cell with the best mean, the first of equals."""
    return max(table, key=lambda cell: cell.merit)


def worst_of(table: Sequence[Cell]) -> Cell:
    """Return the cell with the worst mean, the first of equals."""
    return min(table, key=lambda cell: cell.merit)


def cells(results: Iterable[Result], kind: type[Task]) -> list[Cell]:
    """Return a task's results by method and start, in order of appearance.

    Of equal runs the first counts.
    """
    found: dict[Any, dict[int, Result]] = {}
    for result in results:
        key = (result.method, result.start, result.steps, result.precision)
        found.setdefault(key, {}).setdefault(result.seed, result)
    return [_cell(tuple(some.values()), kind) for some in found.values()]


def _cell(results: tuple[Result, ...], kind: type[Task]) -> Cell:
    first = results[0]
    judged = [result.judged(kind) for result in results]
    values = [value for value in judged if not math.isnan(value)]
    diverged = sum(result.diverged(kind) for result in results)
    arrivals = [result.steps_to_target(kind) for result in results]
    last = [sizes[-1] for result in results for sizes in result.sizes.values()]
    known = [size for size in last if not math.isnan(size)]
    told = all(result.made_with for result in results)
    return Cell(
        kind=kind,
        method=first.method,
        start=first.start,
        steps=first.steps,
        precision=first.precision,
        seeds=len(results),
        mean=_worst(kind) if diverged else statistics.fmean(values),
        spread=statistics.stdev(values) if len(values) > 1 else 0.0,
        diverged=diverged,
        lost=sum(result.lost(kind) for result in results),
        arrivals=tuple(sorted(step for step in arrivals if step is not None)),
        final_sizes=(min(known), max(known)) if known else None,
        made_with=tuple(sorted({one for run in results for one in run.made_with})) if told else (),
        results=results,
    )


def _worst(kind: type[Task]) -> float:
    return -math.inf if kind.more_is_better else math.inf


def merged(older: Sequence[Cell], newer: Sequence[Cell]) -> list[Cell]:
    """Return the cells of both; of two for the same that of more seeds, else the newer."""
    found = {_key(cell): cell for cell in older}
    for cell in newer:
        if _key(cell) not in found or cell.seeds >= found[_key(cell)].seeds:
            found[_key(cell)] = cell
    return list(found.values())


def _key(cell: Cell) -> Any:
    return cell.kind, cell.method, cell.start, cell.steps, cell.precision


def shown(value: float, kind: type[Task]) -> str:
    """Return what a task judges by as text, "diverged" where it is infinite."""
    if math.isinf(value):
        return "diverged"
    return f"{100 * value:.1f}%" if kind.more_is_better else f"{value:.4g}"


def keep(tables: Mapping[str, Sequence[Cell]], path: Path) -> None:
    """Write the cells of all tasks, a line of JSON each, compressed.

    Parameters
    ----------
    tables : mapping of task to sequence of Cell
    path : Path
    """
    lines = [json.dumps({"task": task} | _line(cell)) for task in tables for cell in tables[task]]
    replace_file(path, lzma.compress("".join(f"{line}\n" for line in lines).encode()))


def _line(cell: Cell) -> dict[str, Any]:
    plain = asdict(Method(base=""))
    method = {
        name: value
        for name, value in asdict(cell.method).items()
        if name not in plain or value != plain[name]
    }
    values = {name: getattr(cell, name) for name in _KEPT}
    return {"method": method} | values | {"mean": None if cell.diverged else cell.mean}


_KEPT = (
    *("start", "steps", "precision", "seeds", "mean", "spread", "diverged", "lost"),
    *("arrivals", "final_sizes", "made_with"),
)


def kept(path: Path, tasks: Mapping[str, type[Task]]) -> Iterator[Cell]:
    """Yield the cells of tasks that `keep` wrote; none if there is no such file.

    Parameters
    ----------
    path : Path
    tasks : mapping of name to type of Task
    """
    if not path.is_file():
        return
    for line in lzma.decompress(path.read_bytes()).decode().splitlines():
        given = json.loads(line)
        kind = tasks[given.pop("task")]
        for name in ("arrivals", "made_with", "final_sizes"):
            given[name] = None if given[name] is None else tuple(given[name])
        given["mean"] = _worst(kind) if given["mean"] is None else given["mean"]
        given["method"] = method_of(given["method"])
        yield Cell(kind=kind, **given)
