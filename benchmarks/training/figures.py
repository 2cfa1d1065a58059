"""Pictures of results: what comes of each initial step size, and maps of robustness."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.training.cells import Cell, best_of
from benchmarks.training.methods import Method, Peer
from benchmarks.training.studies import ADVISED, DEFAULT, SCHEDULED, STREAMED
from benchmarks.training.tasks import Task
from metaopt.demo.report import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["drawn", "insensitive", "maps", "saved", "starts"]

#: Settings that a map of start by meta_lr holds still.
USUAL = Method(base="", meta="")
#: One factor at a time, with its values from the usual on.
FACTORS: dict[str, tuple[Any, ...]] = {
    "discount": (1.0, 0.9999, 0.999, 0.99),
    "blocks": ("scalar", "tensor", "node", "weight"),
    "curvature": ("none", "diagonal", "exact"),
}
FACTOR_META_LR = 1e-2
#: Options that no map is about.
HELD = ("bounds", "sigma", "meta_first", "schedule", "weight_decay", "averages")
#: What is drawn by initial step size, as it is called there.
LINES: dict[str, Method] = {
    "AdamW, held at this step size": Method(base="AdamW"),
    "AdamW, warm-up to it and cosine": Method(base="AdamW", schedule="cosine"),
    "learned from it, as in the paper": Method(base="AdamW", meta="Adam"),
    "learned from it, with the defaults": DEFAULT,
    "learned from it, fast start, a cosine on top": SCHEDULED,
    "learned from it, fast start, discount 0.999, blocks": STREAMED,
}
COLOURS = ("0.6", "0.8", "tab:orange", "tab:purple", "tab:blue", "tab:red")
#: What the level of the best peer is called.
BEST = "best peer"
#: Pictures of tasks in a row.
ABREAST = 3


def drawn(tables: Iterable[Sequence[Cell]]) -> bool:
    """Return whether `starts` finds anything to draw in these tables."""
    return any(_shown(table) for table in tables)


def _shown(table: Sequence[Cell]) -> bool:
    return any(cell.method in ADVISED for cell in table)


def starts(tables: Mapping[str, Sequence[Cell]], path: Path) -> None:
    """Draw for each task what comes of each initial step size, fixed and learned.

    Parameters
    ----------
    tables : mapping of title to sequence of Cell
        Tasks without a run of what is advised are left out.
    path : Path
        Where to write the picture.
    """
    from matplotlib.figure import Figure

    tables = {title: table for title, table in tables.items() if _shown(table)}
    if not tables:
        return
    columns = min(len(tables), ABREAST)
    rows = -(-len(tables) // columns)
    size = (max(6.4, 3.6 * columns), 0.8 + 2.6 * rows)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(tables) :]:
        axis.set_axis_off()
    handles: dict[str, Any] = {}
    for axis, (title, table) in zip(axes[: len(tables)], tables.items(), strict=True):
        kind = table[0].kind
        lines = {
            label: sorted((cell for cell in table if cell.method == method), key=_start)
            for label, method in LINES.items()
        }
        means = [cell.mean for line in lines.values() for cell in line if not cell.diverged]
        for (label, line), color in zip(lines.items(), COLOURS, strict=True):
            going = [cell for cell in line if not cell.diverged]
            if going:
                xs, ys = [cell.start for cell in going], [cell.mean for cell in going]
                (handles[label],) = axis.plot(xs, ys, marker="o", ms=3, color=color, label=label)
            for cell in line:
                if cell.diverged:
                    edge = 0.03 if kind.more_is_better else 0.97
                    at = axis.get_xaxis_transform()
                    axis.plot(cell.start, edge, "x", color=color, transform=at)
        axis.set_xscale("log")
        under = "step size"
        peers = [cell for cell in table if isinstance(cell.method, Peer)]
        if peers and not (best := best_of(peers)).diverged:
            handles[BEST] = axis.axhline(best.mean, color="tab:green", ls=":", label=BEST)
            under = f"step size ({BEST}: {best.method.label})"
        if means and not kind.more_is_better:
            axis.set_ylim(0.95 * min(means), min(1.05 * max(means), 2.0 * min(means)))
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(under, fontsize=8)
        axis.set_ylabel("\n".join(wrap(kind.judged_by, 32)), fontsize=8)
        axis.tick_params(labelsize=7)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=8
    )
    saved(figure, path)


def _start(cell: Cell) -> float:
    return cell.start


def insensitive(table: Sequence[Cell], path: Path) -> None:
    """Draw of one task AdamW, held at each step size, and the defaults, started from each.

    Parameters
    ----------
    table : sequence of Cell
        Of a task of which more is better; without runs of both nothing is drawn.
    path : Path
        Where to write the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), dpi=150, layout="constrained")
    axis = figure.subplots()
    for method, label, color in (
        (DEFAULT, "MetaOptimize, started there", "tab:purple"),
        (Method(base="AdamW"), "AdamW, held there", "0.5"),
    ):
        line = sorted((cell for cell in table if cell.method == method), key=_start)
        if not line:
            return
        xs, ys = [cell.start for cell in line], [100.0 * cell.mean for cell in line]
        axis.plot(xs, ys, marker="o", ms=5, lw=2, color=color, label=label)
    axis.set_xscale("log")
    axis.set_xlabel("step size")
    axis.set_ylabel("test accuracy (%)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower center")
    saved(figure, path)


def maps(title: str, found: Sequence[Cell], kind: type[Task], path: Path) -> None:
    """Draw the maps of a task: a row for each pair of rules; nothing where there are no runs.

    Parameters
    ----------
    title : str
        What the task is called.
    found : sequence of Cell
        Of the task.
    kind : type of Task
    path : Path
        Where to write the picture.
    """
    from matplotlib.figure import Figure

    lengths = {cell.steps for cell in found if _mapped_alone(cell)}
    if not lengths:
        return
    steps = min(lengths)
    table = [
        cell
        for cell in found
        if cell.steps == steps and isinstance(cell.method, Method) and cell.method.meta
    ]
    pairs = list(dict.fromkeys(_pair(cell) for cell in table))
    pairs = [pair for pair in pairs if len(_grid(table, pair, "meta_lr")[1]) > 2]
    if not pairs:
        return
    columns = ("meta_lr", *FACTORS)
    figure = Figure(figsize=(4.2 * len(columns), 2.9 * len(pairs)), dpi=80, layout="constrained")
    axes = figure.subplots(len(pairs), len(columns), squeeze=False)
    image: Any = None
    for row, pair in zip(axes, pairs, strict=True):
        for axis, factor in zip(row, columns, strict=True):
            drawn = _map(axis, table, pair, factor, kind)
            image = drawn or image
    figure.colorbar(image, ax=axes.ravel().tolist(), label=kind.judged_by, aspect=40)
    figure.suptitle(
        f"{title} by initial step size, {steps:,} steps, mean of "
        f"{table[0].seeds} seeds; x: a run diverged"
    )
    saved(figure, path)


def _mapped_alone(cell: Cell) -> bool:
    """Say whether a cell is of a map and of no comparison."""
    method = cell.method
    if not isinstance(method, Method) or method.meta is None:
        return False
    return cell.start in (1e-8, 0.1) and method.meta_lr not in (1e-2, 1e-3)


def _pair(cell: Cell) -> tuple[str, str]:
    assert isinstance(cell.method, Method)
    return cell.method.base, str(cell.method.meta)


def _grid(
    table: Sequence[Cell], pair: tuple[str, str], factor: str
) -> tuple[list[float], list[Any], dict[tuple[float, Any], Cell]]:
    """Return starts, values of a factor, and the cells, all other settings being the usual."""
    found: dict[tuple[float, Any], Cell] = {}
    for cell in table:
        method = cell.method
        assert isinstance(method, Method)
        if (method.base, method.meta) != pair:
            continue
        held = (*FACTORS, *HELD)
        others = [name for name in held if name != factor]
        if any(getattr(method, name) != getattr(USUAL, name) for name in others):
            continue
        if factor != "meta_lr" and method.meta_lr != FACTOR_META_LR:
            continue
        found[cell.start, getattr(method, factor)] = cell
    values = sorted({value for _, value in found}, key=lambda value: _order(factor, value))
    return sorted({start for start, _ in found}), values, found


def _order(factor: str, value: Any) -> Any:
    return FACTORS[factor].index(value) if factor in FACTORS else value


def _map(
    axis: "Axes", table: Sequence[Cell], pair: tuple[str, str], factor: str, kind: type[Task]
) -> Any:
    starts, values, found = _grid(table, pair, factor)
    axis.set_title(f"({pair[0]}, {pair[1]})" + ("" if factor == "meta_lr" else f", {factor}"))
    if len(values) < 2:
        axis.set_axis_off()
        return None
    shown = np.full((len(values), len(starts)), np.nan)
    for (start, value), cell in found.items():
        if not cell.diverged:
            shown[values.index(value), starts.index(start)] = cell.mean
        else:
            axis.plot(starts.index(start), values.index(value), "x", color="tab:red", ms=5)
    low, high = _range(table, kind)
    image = axis.imshow(
        np.ma.masked_invalid(shown),
        aspect="auto",
        origin="lower",
        cmap="viridis" if kind.more_is_better else "viridis_r",
        vmin=low,
        vmax=high,
    )
    axis.set_xticks(range(len(starts)), [number(start) for start in starts], fontsize=7)
    labels = [number(value) if factor == "meta_lr" else str(value) for value in values]
    axis.set_yticks(range(len(values)), labels, fontsize=7)
    axis.set_ylabel(factor, fontsize=8)
    return image


def _range(table: Sequence[Cell], kind: type[Task]) -> tuple[float, float]:
    """Return the range of colours: from the best to the median of what starts too low."""
    means = sorted(cell.mean for cell in table if not cell.diverged)
    if kind.more_is_better:
        return means[len(means) // 10], means[-1]
    return means[0], means[9 * len(means) // 10]


def saved(figure: Any, path: Path) -> None:
    """Write a figure as PNG with a palette: a third of the size, and no difference to see.

    Parameters
    ----------
    figure : matplotlib Figure
    path : Path
    """
    from io import BytesIO

    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
