"""The paper's results beside ours: pages, and their figures made from logs."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.paper.settings import EXPERIMENTS, PAPER_TASKS, runs
from benchmarks.training.cells import Cell, cells, shown
from benchmarks.training.figures import saved
from benchmarks.training.loop import finished
from benchmarks.training.methods import Method
from benchmarks.training.report import made_with
from benchmarks.training.results import read
from benchmarks.training.tasks import Task
from metaopt.demo.report import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["report"]

#: What the paper shows, read off its figures by eye; by experiment, base and blocks.
PAPER: dict[tuple[str, str, str | None], str] = {
    ("continual-cifar100", "AdamW", "scalar"): "~38.5%",
    ("continual-cifar100", "AdamW", "groups"): "~39.5%",
    ("continual-cifar100", "AdamW", None): "~37.5% at 1e-4, the best",
}
#: Steps of a task of continual CIFAR-100, and how many before and after a switch are compared.
TASK, WINDOW = 5000, 1000


def report(logs: Path, output: Path | None) -> None:
    """Write a page and a picture for each experiment that was run, and paper.md, which lists them.

    Pages of experiments that the logs say nothing of stay as they are.

    Parameters
    ----------
    logs : Path
        Folder of logs.
    output : Path, optional
        Folder; without it the pages are printed alone.
    """
    lines = [
        "# The paper's experiments",
        "",
        "Made by `python -m benchmarks.reproduce report`. Settings of the MetaOptimize paper as "
        "printed, and as its authors' released code acts (`benchmarks/paper/settings.py`).",
        "",
        "| experiment | as printed | as the released code acts |",
        "| --- | --- | --- |",
    ]
    for name in EXPERIMENTS:
        pages = []
        for released in (False, True):
            page = f"paper_{name}{'_released' if released else ''}"
            found = _cells(name, released, logs)
            if found:
                text = "\n".join([*_page(name, released, found), "", f"![{name}]({page}.png)"])
                print(f"{text}\n")
                if output is not None:
                    output.mkdir(parents=True, exist_ok=True)
                    (output / f"{page}.md").write_text(f"{text}\n", encoding="utf-8")
                    of_paper = [cell for cell in found if cell.method not in _beyond(name)]
                    _draw(of_paper, output / f"{page}.png")
            run = bool(found) or (output is not None and (output / f"{page}.md").is_file())
            pages.append(f"[results]({page}.md)" if run else "not run")
        lines.append(f"| {name} | {' | '.join(pages)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "paper.md").write_text(text, encoding="utf-8")


def _cells(name: str, released: bool, logs: Path) -> list[Cell]:
    """Return what was run of an experiment."""
    jobs = list(runs(name, released=released))
    done = {job.name for job in jobs if finished(logs / f"{job.name}.jsonl")}
    kind = PAPER_TASKS[jobs[0].task]
    wanted = {(job.method, start) for job in jobs if job.name in done for start in job.starts}
    results = [run for run in read(logs) if run.task == jobs[0].task and run.steps == kind.steps]
    return [cell for cell in cells(results, kind) if (cell.method, cell.start) in wanted]


def _beyond(name: str) -> list[Method]:
    """Return the methods of an experiment that the paper does not have."""
    return [method for method, _ in EXPERIMENTS[name].beyond]


def _page(name: str, released: bool, found: Sequence[Cell]) -> Iterator[str]:
    yield f"# {name}, {'as the released code acts' if released else 'as printed'}"
    yield ""
    yield (
        "Made by `python -m benchmarks.reproduce report`; see [paper.md](paper.md). Mean and "
        "standard deviation over seeds. *Not run* is what it says. " + made_with(found)
    )
    yield ""
    yield "| method | start | seeds | result | sd | the paper's |"
    yield "| --- | --- | --- | --- | --- | --- |"
    by_key = {(cell.method, cell.start): cell for cell in found}
    listed = dict.fromkeys(
        (job.method, start) for job in runs(name, released=released) for start in job.starts
    )
    for method, start in listed:
        cell = by_key.get((method, start))
        result = "not run | "
        seeds = ""
        if cell is not None:
            factor = 100 if cell.kind.more_is_better else 1
            result = f"{shown(cell.mean, cell.kind)} | {factor * cell.spread:.2g}"
            seeds = str(cell.seeds)
        known = ""
        if isinstance(method, Method):
            base = method.base.removesuffix(" as released")
            if method not in _beyond(name):
                known = PAPER.get((name, base, method.blocks if method.meta else None), "")
        yield f"| {method.label} | {number(start)} | {seeds} | {result} | {known} |"
    if name == "continual-cifar100":
        yield from _switches(found)


def _switches(found: Sequence[Cell]) -> Iterator[str]:
    """Yield how step sizes change when a task ends and the next begins."""
    for cell in found:
        if not (isinstance(cell.method, Method) and cell.method.meta):
            continue
        for block in cell.results[0].sizes:
            ratios = []
            for result in cell.results:
                at, sizes = np.array(result.at), np.array(result.sizes[block])
                for switch in range(TASK, result.steps, TASK):
                    before = sizes[(at > switch - WINDOW) & (at <= switch)]
                    after = sizes[(at > switch) & (at <= switch + WINDOW)]
                    ratios.append(float(after.mean() / before.mean()))
            if not ratios:
                continue
            rises = sum(ratio > 1 for ratio in ratios)
            yield ""
            yield (
                f"{cell.method.label} from {number(cell.start)}, step size of {block!r}: higher "
                f"in the {WINDOW} steps after a switch than in those before it in {rises} of "
                f"{len(ratios)} switches, "
                f"{statistics.geometric_mean(ratios):.2f} times on average."
            )


def _draw(found: Sequence[Cell], path: Path) -> None:
    from matplotlib.figure import Figure

    kind = found[0].kind
    figure = Figure(figsize=(11, 4.6), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, cell in enumerate(found):
        colour = f"C{index % 10}"
        label = f"{cell.method.label} from {number(cell.start)}"
        _curve(left, cell, kind, colour, label)
        if isinstance(cell.method, Method) and cell.method.meta:
            _sizes(right, cell, colour)
    left.set_title(f"{kind.metric.split('.')[1]}{' so far' if kind.judged_over else ''}")
    right.set_title("step sizes, a line for each block; mean of seeds")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if kind.__name__.startswith("Continual"):
        for axis in (left, right):
            for switch in range(TASK, kind.steps, TASK):
                axis.axvline(switch, color="0.85", lw=0.8, zorder=0)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
    saved(figure, path)


def _curve(axis: "Axes", cell: Cell, kind: type[Task], colour: str, label: str) -> None:
    """Draw a measure over steps, its mean so far where the whole run counts; band: over seeds."""
    at = np.array(cell.results[0].at)
    values = np.array([result.series[kind.metric] for result in cell.results])
    if kind.judged_over == 1.0:
        at, values = at[1:], values[:, 1:]
        values = np.cumsum(values, axis=1) / np.arange(1, values.shape[1] + 1)
    mean, spread = values.mean(0), values.std(0)
    axis.plot(at, mean, color=colour, label=label, lw=1.3)
    axis.fill_between(at, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)


def _sizes(axis: "Axes", cell: Cell, colour: str) -> None:
    styles: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (1, 1)), (0, (5, 1)))
    for style, block in zip(styles, cell.results[0].sizes, strict=False):
        values = np.array([result.sizes[block] for result in cell.results])
        axis.plot(cell.results[0].at, values.mean(0), color=colour, ls=style, lw=1.2)
