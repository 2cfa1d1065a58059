"""Tables in Markdown: everything by task, and the summary."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.protocol import unlike
from benchmarks.training import figures, profile
from benchmarks.training.cells import Cell, best_of, cells, keep, kept, merged, shown, worst_of
from benchmarks.training.goals import NAMES, ROLES, advised, learned, misses, of_base
from benchmarks.training.loop import Job
from benchmarks.training.methods import Method, Peer
from benchmarks.training.results import archive, read
from benchmarks.training.studies import JUDGING, LONG_STEPS, comparison, maps
from benchmarks.training.tasks import TASKS
from benchmarks.training.timing import milliseconds, read_times, write_times
from metaopt.demo.report import number

__all__ = ["made_with", "report"]

SECONDS = (
    "Seconds are steps times the cost of a step (`learning.py time`): forward pass, backward pass "
    "and the optimizer, in turns in one process. "
)
#: What a report adds to.
KEPT = "learning.jsonl.xz"


def report(logs: Path, output: Path | None) -> None:
    """Write learning.md, a table for each task, the long runs and the maps; print the summary.

    Results are added to those that learning.jsonl.xz in `output` keeps.

    Parameters
    ----------
    logs : Path
        Folder of logs.
    output : Path, optional
        Folder; without it the summary is printed alone.
    """
    before = [] if output is None else list(kept(output / KEPT, TASKS))
    results = list(read(logs))
    everything = {
        name: merged(
            [cell for cell in before if cell.kind is kind],
            cells([run for run in results if run.task == name], kind),
        )
        for name, kind in TASKS.items()
    }
    tables = {}
    for name, found in everything.items():
        # what is in the maps alone is drawn; tables are of runs of full length
        drawn = _runs_of(maps(name)) - _runs_of(comparison(name))
        whole = [
            cell
            for cell in found
            if cell.steps == cell.kind.steps and (cell.method, cell.start) not in drawn
        ]
        if whole:
            tables[name] = whole
    times = {name: read_times(logs, name) or read_times(output, name) for name in tables}
    summary = "\n".join(_summary(tables, times)) + "\n"
    print(summary)
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    keep(everything, output / KEPT)
    for name in JUDGING:
        for left_out in archive(logs, name, output / f"scored_{name}.tar.xz", unlike):
            print(left_out)
    (output / "learning.md").write_text(summary, encoding="utf-8")
    for name, table in tables.items():
        text = "\n".join(_everything(name, table, times[name])) + "\n"
        (output / f"learning_{name}.md").write_text(text, encoding="utf-8")
        if times[name]:
            write_times(output, name, times[name])
    long = {
        name: [cell for cell in found if cell.steps == LONG_STEPS]
        for name, found in everything.items()
        if any(cell.steps == LONG_STEPS for cell in found)
    }
    if long:
        text = "\n".join(_long(long)) + "\n"
        (output / "learning_long.md").write_text(text, encoding="utf-8")
    titles = {NAMES[name]: table for name, table in tables.items()}
    figures.starts(titles, output / "learning_starts.png")
    if "digits" in tables:
        figures.insensitive(tables["digits"], output / "learning_digits.png")
    text = "\n".join(profile.report(tables)) + "\n"
    (output / "profile.md").write_text(text, encoding="utf-8")
    profile.picture(tables, output / "profile.png")
    for name, found in everything.items():
        figures.maps(NAMES[name], found, TASKS[name], output / f"map_{name}.png")


def _runs_of(jobs: Iterable[Job]) -> set[tuple[Method | Peer, float]]:
    return {(job.method, start) for job in jobs for start in job.starts}


def made_with(table: Sequence[Cell]) -> str:
    """Return with what the runs were made, a sentence or two."""
    known = sorted({one for cell in table for one in cell.made_with})
    said = [f"Runs were made with {'; '.join(known)}."] if known else []
    if not all(cell.made_with for cell in table):
        said.append("Of others the logs do not say it; they are older.")
    return " ".join(said)


def _spread(cell: Cell) -> str:
    if cell.diverged:
        return ""
    factor = 100 if cell.kind.more_is_better else 1
    return f"{factor * cell.spread:.2g}"


def _arrival(cell: Cell, times: Mapping[str, float]) -> str:
    """Return the median of steps and seconds to the target, and how many got there if not all."""
    if not cell.arrivals:
        return "-"
    median = statistics.median(cell.arrivals)
    each = milliseconds(times, cell.method)
    reached = f"{median:g}" if each is None else f"{median:g}, {number(1e-3 * each * median)} s"
    missing = cell.seeds - len(cell.arrivals)
    return f"{reached} ({len(cell.arrivals)} of {cell.seeds})" if missing else reached


def _sizes(cell: Cell) -> str:
    if cell.final_sizes is None or (isinstance(cell.method, Method) and cell.method.meta is None):
        return ""
    low, high = cell.final_sizes
    return number(low) if number(low) == number(high) else f"{number(low)} to {number(high)}"


def _everything(name: str, table: Sequence[Cell], times: dict[str, float]) -> Iterator[str]:
    """Yield the lines of a task's page."""
    kind = table[0].kind
    yield f"# {NAMES[name]}: all runs"
    yield ""
    yield (
        f"Made by `python -m benchmarks.learning report`; see [learning.md](learning.md). "
        f"{kind.steps:,} steps; judged by {kind.judged_by}; target {shown(kind.target, kind)}. "
        "Mean and standard deviation over seeds; *lost*: runs that reached the target and ended "
        "clearly short of it. A row with diverged runs has no mean."
    )
    yield ""
    yield (
        "| method | start | seeds | result | sd | diverged | lost | steps to target | "
        "last step sizes |"
    )
    yield "|" + " --- |" * 9
    for cell in sorted(table, key=lambda cell: (_rank(cell.method), cell.start)):
        start = number(cell.start) if _has_start(cell.method) else ""
        yield (
            f"| {cell.method.label} | {start} | {cell.seeds} | {shown(cell.mean, kind)} | "
            f"{_spread(cell)} | {cell.diverged} | {cell.lost} | {_arrival(cell, times)} | "
            f"{_sizes(cell)} |"
        )


def _has_start(method: Method | Peer) -> bool:
    return isinstance(method, Method) or method.name.startswith(("gdtuo", "hypergradient"))


def _rank(method: Method | Peer) -> tuple[int, str]:
    if isinstance(method, Peer):
        return 3, method.label
    if method.meta is not None:
        return 2, method.label
    return (0 if method.schedule == "constant" else 1), method.label


def _slowness(cell: Cell) -> tuple[int, float]:
    """Return what sorts by runs that did not arrive, then by steps."""
    missing = cell.seeds - len(cell.arrivals)
    return missing, statistics.median(cell.arrivals) if cell.arrivals else 0.0


def _summary(
    tables: Mapping[str, Sequence[Cell]], times: Mapping[str, dict[str, float]]
) -> Iterator[str]:
    yield "# Does it learn?"
    yield ""
    yield ROLES
    yield ""
    yield (
        "Made by `python -m benchmarks.learning compare`, `maps` and `report`; what is compared is "
        "in `benchmarks/training`. Seeds of weights and data are the same for all methods; means "
        "over seeds. Fixed step sizes and peaks of schedules are the best of a grid of nine, of "
        "eleven for AdamW and RMSprop on the linear tasks, of the six from 3e-5 to 1e-2 among the "
        "nine on continual CIFAR-100 (a seventh for fixed ones, 1e-5, is of the paper's grid), by "
        "the very measure that is shown, which flatters them. MetaOptimize starts from 1e-7, 1e-6, "
        "1e-5, 1e-4 and 1e-3, on characters and CIFAR from every other of these, on the tasks that "
        "judge from 1e-8, 1e-7, 1e-5, 1e-3 and 1e-2; shown are its worst and its best start. "
        "*default* as meta is `mo.FastStart(mo.AdamW())`; *fast Adam* the same and *fast Lion* "
        "`mo.FastStart(mo.Lion())`, both with `retreat=0`; with a 1, `patience=1`. *Averaged* is "
        "judged at the weights of `averaged_params`; several discounts start from 1e-8, 1e-7, "
        "1e-5, 1e-3 and 1e-2 everywhere. *Lost* are runs that had reached the target and ended "
        "clearly short of it. Peers are their authors' "
        "packages with the settings that these have: without a schedule on top, but for *Prodigy, "
        "cosine*, as its authors advise for runs of a known length, and without weight "
        "decay but for mechanic's 0.01 of AdamW. Weight decay of AdamW, Lion and RMSprop is "
        "0.1 for networks, 0 for the convex tasks; that of SGD is 0. What is missing was not "
        "run. "
        + SECONDS * any(times.values())
        + made_with([cell for table in tables.values() for cell in table])
    )
    if figures.drawn(tables.values()):
        yield ""
        yield "![Results by initial step size](learning_starts.png)"
    yield from advised(tables)
    for name, table in tables.items():
        yield from _section(name, table, times[name])
    yield from misses(tables)


def _section(name: str, table: Sequence[Cell], times: Mapping[str, float]) -> Iterator[str]:
    kind, seeds = table[0].kind, max(cell.seeds for cell in table)
    yield ""
    yield f"## {NAMES[name]}"
    yield ""
    yield (
        f"{kind.__doc__.splitlines()[0] if kind.__doc__ else ''} {kind.steps:,} steps; judged by "
        f"{kind.judged_by}, target {shown(kind.target, kind)}; {seeds} seeds. "
        f"[All runs](learning_{name}.md)."
    )
    yield from _rows(name, table, times)


def _long(tables: Mapping[str, Sequence[Cell]]) -> Iterator[str]:
    yield "# Long runs"
    yield ""
    yield (
        f"Made by `python -m benchmarks.learning long` and `report`: {LONG_STEPS:,} steps of tasks "
        "of [learning.md](learning.md), where the words are explained; judged by the same. The "
        "defaults have a `meta_lr` of 0.01, the paper 0.001. "
        + made_with([cell for table in tables.values() for cell in table])
    )
    for name, table in tables.items():
        yield ""
        yield f"## {NAMES[name]}"
        yield ""
        seeds = max(cell.seeds for cell in table)
        yield f"Judged by {table[0].kind.judged_by}; {seeds} seeds."
        yield from _rows(name, table, {})
    yield from misses(tables)


def _rows(name: str, table: Sequence[Cell], times: Mapping[str, float]) -> Iterator[str]:
    """Yield a task's table: the best of grids, the worst and best starts of what is learned."""
    kind = table[0].kind
    yield ""
    yield "| method | worst start | best start | diverged | lost | slowest start to target |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for schedule, words in (
        ("constant", "best fixed step size"),
        ("cosine", "best warm-up and cosine"),
    ):
        for base in dict.fromkeys(_bases(table, schedule)):
            best = best_of(of_base(table, base, schedule))
            yield (
                f"| {base}, {words}: {number(best.start)} | | {shown(best.mean, kind)} | "
                f"{best.diverged} | {best.lost} | {_arrival(best, times)} |"
            )
    for label, some in sorted(learned(name, table).items()):
        worst, found = worst_of(some), best_of(some)
        runs = sum(cell.seeds for cell in some)
        yield (
            f"| {label} | {shown(worst.mean, kind)} | {shown(found.mean, kind)} | "
            f"{sum(cell.diverged for cell in some)} of {runs} | "
            f"{sum(cell.lost for cell in some)} | {_arrival(max(some, key=_slowness), times)} |"
        )
    others = [cell for cell in table if _is_other(cell)]
    for cell in others:
        start = f" from {number(cell.start)}" if _has_start(cell.method) else ""
        yield (
            f"| {cell.method.label}{start} | | {shown(cell.mean, kind)} | {cell.diverged} of "
            f"{cell.seeds} | {cell.lost} | {_arrival(cell, times)} |"
        )


def _is_other(cell: Cell) -> bool:
    """Say whether a cell is of a peer, or of MetaOptimize from starts of its own."""
    if isinstance(cell.method, Peer):
        return True
    is_learned = cell.method.meta is not None
    return is_learned and (cell.method.base == "SGD" or cell.method.weight_decay is not None)


def _bases(table: Sequence[Cell], schedule: str) -> list[str]:
    return [
        cell.method.base
        for cell in table
        if isinstance(cell.method, Method)
        and cell.method.meta is None
        and cell.method.schedule == schedule
    ]
