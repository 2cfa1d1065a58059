"""The summary of many tasks: performance profiles of time to target, and the best of k tries."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.training.cells import Cell, best_of, shown, worst_of
from benchmarks.training.goals import NAMES, of_base
from benchmarks.training.methods import Method, Peer
from benchmarks.training.studies import CHOOSING, DEFAULT, JUDGING

__all__ = ["LAST", "contenders", "expected_best", "picture", "profile", "report", "score", "times"]

Tables = Mapping[str, Sequence[Cell]]

#: Profiles are drawn, and scored, up to this many times the quickest.
LAST = 4.0
TRIES = (1, 5, 25)
OURS = "metaopt, worst start"
FIXED, COSINE, UNTUNED = "AdamW, best fixed", "AdamW, best cosine", "AdamW, untuned"
#: The step size of AdamW where nobody chooses one: torch's default.
DEFAULT_STEP_SIZE = 1e-3
#: How these are drawn.
LOOKS: dict[str, dict[str, Any]] = {
    OURS: {"color": "tab:green", "lw": 2.4},
    FIXED: {"color": "0.35", "lw": 1.4},
    COSINE: {"color": "0.35", "lw": 1.4, "ls": "--"},
    UNTUNED: {"color": "0.35", "lw": 1.4, "ls": ":"},
}
#: Whose results a table is compared with.
SEARCH = "AdamW, fixed and cosine"


def contenders(table: Sequence[Cell]) -> dict[str, Cell]:
    """Return the cell by which each contender is judged on a task.

    Of what is tuned that with the best result of its search; of what is not, the worst of its
    starts.
    """
    found: dict[str, list[Cell]] = {OURS: [cell for cell in table if cell.method == DEFAULT]}
    judged = {OURS: worst_of, FIXED: best_of, COSINE: best_of}
    for name, schedule in ((FIXED, "constant"), (COSINE, "cosine")):
        found[name] = _searched(table, schedule)
    found[UNTUNED] = [cell for cell in found[FIXED] if cell.start == DEFAULT_STEP_SIZE]
    for cell in table:
        if isinstance(cell.method, Peer):
            found.setdefault(cell.method.label, []).append(cell)
    return {name: judged.get(name, worst_of)(some) for name, some in found.items() if some}


def _searched(table: Sequence[Cell], schedule: str, base: str = "AdamW") -> list[Cell]:
    """Return a search's tries, with the weight decay of the task."""
    return [
        cell
        for cell in of_base(table, base, schedule)
        if isinstance(cell.method, Method) and cell.method.weight_decay is None
    ]


def time_of(cell: Cell) -> float:
    """Return the median of steps to the target; infinite for a run that is not there at its end.

    One that is there before its first step counts as one of a step: times are divided.
    Which of the arrivals were those of runs that went away again is not known: they are taken to be
    the earliest.
    """
    gone = min(cell.lost + cell.diverged, len(cell.arrivals))
    arrived = [max(step, 1.0) for step in cell.arrivals[gone:]]
    return float(statistics.median_high([*arrived, *[math.inf] * (cell.seeds - len(arrived))]))


def times(tables: Tables) -> dict[str, dict[str, float]]:
    """Return for each contender its steps to the target by task; infinite where it was not run.

    Tasks on which ours or the search of the baseline was not run are left out.
    """
    found = {task: contenders(table) for task, table in tables.items()}
    complete = {task: some for task, some in found.items() if {OURS, FIXED, COSINE} <= set(some)}
    names = dict.fromkeys(name for some in complete.values() for name in some)
    return {
        name: {
            task: time_of(some[name]) if name in some else math.inf
            for task, some in complete.items()
        }
        for name in names
    }


def ratios(found: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """Return times in those of the quickest contender on each task."""
    tasks = list(next(iter(found.values()), {}))
    least = {task: min(own[task] for own in found.values()) for task in tasks}
    return {
        name: [own[task] / least[task] if math.isfinite(own[task]) else math.inf for task in tasks]
        for name, own in found.items()
    }


def profile(own: Sequence[float], tau: float) -> float:
    """Return the part of tasks on which a contender is at most `tau` times the quickest."""
    return sum(ratio <= tau for ratio in own) / len(own)


def score(own: Sequence[float]) -> float:
    """Return the mean of `profile` from 1 to `LAST`."""
    return sum(LAST - min(ratio, LAST) for ratio in own) / len(own) / (LAST - 1.0)


def expected_best(values: Sequence[float], tries: int) -> float:
    """Return the expected largest of `tries` of the values, drawn without replacement.

    Of all of them where there are fewer.
    """
    ordered, tries = sorted(values), min(tries, len(values))
    whole = math.comb(len(values), tries)
    return sum(value * math.comb(below, tries - 1) / whole for below, value in enumerate(ordered))


def families(table: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Return the tries of each contender: configurations, or starts of one."""
    searched = [cell for schedule in ("constant", "cosine") for cell in _searched(table, schedule)]
    bases = {
        cell.method.base
        for cell in table
        if isinstance(cell.method, Method) and cell.method.meta is None
    }
    any_base = [
        cell
        for base in sorted(bases)
        for schedule in ("constant", "cosine")
        for cell in _searched(table, schedule, base)
    ]
    found = {
        "metaopt, a start at random": [cell for cell in table if cell.method == DEFAULT],
        SEARCH: searched,
        "any base, fixed and cosine": any_base if len(bases) > 1 else [],
        "peers": [cell for cell in table if isinstance(cell.method, Peer)],
    }
    return {name: some for name, some in found.items() if some}


def best_of_tries(some: Sequence[Cell], tries: int) -> float:
    """Return the expected best result of so many tries.

    One that diverged counts as the worst of those that did not; where all did the result is
    infinite.
    """
    merits = [cell.merit for cell in some if not cell.diverged]
    if not merits:
        return some[0].mean
    merits += [min(merits)] * (len(some) - len(merits))
    best = expected_best(merits, tries)
    return best if some[0].kind.more_is_better else 0.0 - best  # a loss of 0 is none of -0


def error_of(value: float, table: Sequence[Cell]) -> float:
    """Return a loss, or what is missing to an accuracy of 1."""
    return 1.0 - value if table[0].kind.more_is_better else value


@dataclass(frozen=True)
class Row:
    """A contender on all tasks of a role.

    Parameters
    ----------
    ratios : list of float
        Times to the target, in those of the quickest.
    diverged, lost, runs : int
        Of the cells by which it is judged.
    tasks : int
        On which it was run.
    """

    ratios: list[float]
    diverged: int
    lost: int
    runs: int
    tasks: int


def rows(tables: Tables) -> dict[str, Row]:
    """Return a row for each contender, the best score first."""
    found = times(tables)
    tasks = list(next(iter(found.values()), {}))
    made: dict[str, Row] = {}
    for name, own in ratios(found).items():
        judged = [contenders(tables[task]).get(name) for task in tasks]
        cells = [cell for cell in judged if cell is not None]
        made[name] = Row(
            ratios=own,
            diverged=sum(cell.diverged for cell in cells),
            lost=sum(cell.lost for cell in cells),
            runs=sum(cell.seeds for cell in cells),
            tasks=len(cells),
        )
    return dict(sorted(made.items(), key=lambda item: -score(item[1].ratios)))


def report(tables: Tables) -> Iterator[str]:
    """Yield the lines of the page."""
    yield "# Profile"
    yield ""
    yield (
        "Made by `python -m benchmarks.learning report` from the results that are kept, by the "
        "[protocol](../protocol.md), which says what each number is. **They are older than the "
        "protocol:** the tasks that judge were run with three seeds, and before anything was "
        "frozen. No constant was chosen on them, but this is no test yet."
    )
    yield ""
    if not times(tables):
        yield "There is no task yet with results of ours and of the search of the baseline."
        return
    yield "![Performance profiles](profile.png)"
    for title, role in (("Tasks that judge", JUDGING), ("Tasks that choose", CHOOSING)):
        of_role = {task: table for task, table in tables.items() if task in role}
        known = next(iter(times(of_role).values()), {})
        if known:
            yield from _section(title, {task: of_role[task] for task in known}, role)


def _section(title: str, tables: Tables, role: Sequence[str]) -> Iterator[str]:
    missing = [NAMES[task] for task in role if task not in tables]
    yield ""
    yield f"## {title}"
    yield ""
    yield (
        f"{', '.join(NAMES[task] for task in tables)}."
        + (f" Without results of ours and of the search: {', '.join(missing)}." if missing else "")
    )
    yield ""
    heads = ("contender", "score", "within 1", "within 1.5", "within 2", "within 4")
    more = ("geometric mean of times", "tasks", "diverged", "lost")
    yield f"| {' | '.join((*heads, *more))} |"
    yield "|" + " --- |" * (len(heads) + len(more))
    for name, row in rows(tables).items():
        parts = (f"{100 * profile(row.ratios, tau):.0f}%" for tau in (1.0, 1.5, 2.0, LAST))
        mean = math.exp(statistics.fmean(math.log(min(ratio, LAST)) for ratio in row.ratios))
        yield (
            f"| {name} | {score(row.ratios):.2f} | {' | '.join(parts)} | {mean:.2f} | "
            f"{row.tasks} of {len(tables)} | {row.diverged} of {row.runs} | {row.lost} |"
        )
    yield ""
    yield "### The best of 1, 5 and 25 tries"
    yield ""
    yield f"| task | tries of | n |{''.join(f' best of {tries} |' for tries in TRIES)}"
    yield "|" + " --- |" * (3 + len(TRIES))
    logs: dict[str, list[list[float]]] = {}
    for task, table in tables.items():
        found = families(table)
        least = error_of(best_of_tries(found[SEARCH], len(found[SEARCH])), table)
        for name, some in found.items():
            best = [best_of_tries(some, tries) for tries in TRIES]
            errors = [error_of(value, table) for value in best]
            if all(0.0 < error < math.inf for error in (least, *errors)):  # else it has no mean
                logs.setdefault(name, []).append([math.log(error / least) for error in errors])
            cells = " | ".join(shown(value, some[0].kind) for value in best)
            yield f"| {NAMES[task]} | {name} | {len(some)} | {cells} |"
    for name, own in logs.items():
        means = (math.exp(statistics.fmean(column)) for column in zip(*own, strict=True))
        label = f"geometric mean of {len(own)}"
        yield f"| {label} | {name} | | {' | '.join(f'{mean:.2f}' for mean in means)} |"


def picture(tables: Tables, path: Path) -> None:
    """Draw the profiles of the tasks that judge, and of those that choose.

    Parameters
    ----------
    tables : mapping of task to sequence of Cell
    path : Path
        Where to write the picture.
    """
    from matplotlib.figure import Figure

    from benchmarks.training.figures import saved

    figure = Figure(figsize=(9.0, 3.8), dpi=110, layout="constrained")
    looks, handles = dict(LOOKS), dict[str, Any]()
    for axis, (title, role) in zip(
        figure.subplots(1, 2, sharey=True),
        (("tasks that judge", JUDGING), ("tasks that choose", CHOOSING)),
        strict=True,
    ):
        found = rows({task: table for task, table in tables.items() if task in role})
        for name, row in found.items():
            steps = [1.0, *sorted(ratio for ratio in row.ratios if 1.0 < ratio < LAST), LAST]
            heights = [profile(row.ratios, tau) for tau in steps]
            look = looks.setdefault(name, {"color": f"C{len(looks) % 10}", "lw": 1.0})
            (handles[name],) = axis.step(steps, heights, where="post", **look)
        count = len(next(iter(found.values())).ratios) if found else 0
        axis.set_title(f"{count} {title}", fontsize=9)
        axis.set_xlabel("steps to target, in those of the quickest", fontsize=8)
        axis.set_xlim(1.0, LAST)
        axis.set_ylim(-0.02, 1.02)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("part of the tasks", fontsize=8)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=7
    )
    saved(figure, path)
