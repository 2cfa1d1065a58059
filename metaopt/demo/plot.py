"""The picture: learning curves beside the step sizes found."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from metaopt.demo.report import label, number
from metaopt.demo.run import Result
from metaopt.demo.study import GRID, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["save"]

Colour: TypeAlias = tuple[float, float, float, float]

WIDTH, ROW_HEIGHT, FRAME, DPI = 10.0, 2.35, 1.35, 160  # inches, and pixels for each
INK, FAINT, GRID_LINES = "#1b1b1f", "#9a9aa5", "#e6e6ec"
STYLE: Any = {
    "font.size": 11,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID_LINES,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
TITLES = {"scalar": "step size, one for all weights", "tensor": "step sizes, one per tensor"}
MOST_LOSS = 10.0  # ln 10 is what guessing costs: losses far above it would dwarf the rest
BEST: dict[str, Any] = {"color": INK, "lw": 1.3}
FIXED: dict[str, Any] = {"ls": (0, (4, 2.5)), "lw": 1.1}
CROSS: dict[str, Any] = {"ls": "", "marker": "X", "ms": 9}
TUNED: dict[str, dict[str, Any]] = {"scalar": {"lw": 2.0}, "tensor": {"lw": 1.0}}


def save(results: Results, path: Path) -> None:
    """Write the picture as PNG.

    Parameters
    ----------
    results : Results
    path : Path
    """
    import matplotlib as mpl
    from PIL import Image

    drawn = BytesIO()
    with mpl.rc_context(STYLE):
        _draw(results).savefig(drawn, format="png")
    # a palette: a third of the size on disk, and no difference to see
    picture = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def _draw(results: Results) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    study = results.study
    rows = [(pair, blocks) for pair in study.pairs for blocks in study.blocks]
    size = (WIDTH, ROW_HEIGHT * len(rows) + FRAME)
    engine = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)
    figure = Figure(figsize=size, dpi=DPI, layout=engine)
    axes = figure.subplots(len(rows), 2, sharex=True, squeeze=False)
    for (pair, blocks), (left, right) in zip(rows, axes, strict=True):
        _losses(left, results, pair, blocks)
        _step_sizes(right, results, pair, blocks)
        names = label(pair)
        left.set_title(f"{names}: training loss", loc="left", fontsize=11, fontweight="bold")
        right.set_title(TITLES[blocks], loc="left", fontsize=11, fontweight="bold")
    for axis in axes.flat:
        axis.yaxis.set_major_formatter(lambda value, _: number(value))
        axis.minorticks_off()
        axis.set_xlim(0, study.steps)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    _legend(figure, results)
    return figure


def _losses(axis: "Axes", results: Results, pair: str, blocks: str) -> None:
    sizes, best = results.study.step_sizes, results.best_fixed(pair)
    axis.set_yscale("log")
    for size, colour in zip(sizes, _colours(len(sizes)), strict=True):
        fixed, tuned = results.fixed(pair, size), results.tuned(pair, blocks, size)
        axis.plot(fixed.steps, fixed.train_loss, color=colour, **FIXED)
        _cross(axis, fixed, fixed.train_loss, colour)
        axis.plot(tuned.steps, tuned.train_loss, color=colour, **TUNED["scalar"])
        _cross(axis, tuned, tuned.train_loss, colour)
    axis.plot(best.steps, best.train_loss, **BEST)
    axis.set_ylim(top=min(axis.get_ylim()[1], MOST_LOSS))


def _step_sizes(axis: "Axes", results: Results, pair: str, blocks: str) -> None:
    sizes, best = results.study.step_sizes, results.best_fixed(pair).run.step_size
    axis.set_yscale("log")
    for size, colour in zip(sizes, _colours(len(sizes)), strict=True):
        tuned = results.tuned(pair, blocks, size)
        axis.axhline(size, color=colour, **FIXED)
        for values in tuned.step_sizes.values():
            axis.plot(tuned.steps, values, color=colour, **TUNED[blocks])
            _cross(axis, tuned, values, colour)
    axis.axhline(best, **BEST)
    axis.annotate(
        f"best fixed {number(best)}" + (", the largest tried" if best == max(GRID) else ""),
        (1, best),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=9.5,
    )


def _cross(axis: "Axes", result: Result, values: Sequence[float], colour: Colour) -> None:
    """Mark where a run diverged."""
    if result.diverged_at is not None:
        axis.plot(result.steps[-1:], values[-1:], color=colour, clip_on=False, **CROSS)


def _legend(figure: "Figure", results: Results) -> None:
    from matplotlib.lines import Line2D

    sizes = results.study.step_sizes
    lines = [
        Line2D([], [], color=colour, label=f"MetaOptimize from {number(size)}", **TUNED["scalar"])
        for size, colour in zip(sizes, _colours(len(sizes)), strict=True)
    ]
    lines.append(Line2D([], [], color=FAINT, label="fixed at the same step size", **FIXED))
    lines.append(Line2D([], [], label="best fixed step size", **BEST))
    if any(result.diverged_at is not None for result in results.by_run.values()):
        lines.append(Line2D([], [], color=FAINT, label="diverged", **CROSS))
    figure.legend(handles=lines, loc="outside upper center", ncols=3)


def _colours(count: int) -> list[Colour]:
    """Return colours from dark to light, by increasing step size."""
    from matplotlib import colormaps

    return [colormaps["plasma"](0.05 + 0.73 * index / max(count - 1, 1)) for index in range(count)]
