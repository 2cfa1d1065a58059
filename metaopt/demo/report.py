"""The results as tables and as JSON."""

import json
import math
import platform
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import numpy as np

import metaopt
from metaopt.configuration import HORIZONS
from metaopt.demo.run import BASES, BATCH, METAS, Result
from metaopt.demo.study import GRID, Results, Study
from metaopt.rules import FastStart

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["TARGET", "as_json", "label", "number", "settings", "table"]

TARGET = 0.95
NAMES = {"adamw": "AdamW", "lion": "Lion", "rmsprop": "RMSprop", "sgdm": "SGDm", "adam": "Adam"}
BLOCKS = {"scalar": "one step size", "tensor": "one per tensor"}


def label(pair: str) -> str:
    """Return "AdamW + Adam" for "adamw+adam"."""
    return " + ".join(NAMES[name] for name in pair.split("+"))


def number(value: float) -> str:
    """Return a number in short: 1e-6, 3.2e-3, 1.8."""
    if not math.isfinite(value):
        return str(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return mantissa.removesuffix(".0") + (f"e{int(exponent)}" if int(exponent) else "")


def settings(study: Study) -> list[tuple[str, str]]:
    """Return all that the runs were made with, as pairs of a name and a text."""
    metas = dict.fromkeys(pair.split("+")[1] for pair in study.pairs)
    return [
        ("network", "64-128-128-10, ReLU, float32, He initialization"),
        ("data", f"1437 digits to train on, 360 to test on; batches of {BATCH}"),
        ("runs", f"{len(study.runs)} of {study.steps} steps each, seed {study.seed}"),
        *(("base " + NAMES[base], _describe(BASES[base])) for base in _bases(study)),
        *(("meta " + NAMES[meta], _describe(METAS[meta])) for meta in metas),
        ("meta_lr", f"{study.meta_lr:g} for all pairs"),
        ("discount", f"{HORIZONS}: MetaOptimize is judged at its averaged weights"),
        ("starts", ", ".join(map(number, study.step_sizes))),
        ("step sizes", " and ".join(BLOCKS[blocks] for blocks in study.blocks)),
        ("best fixed", f"least final training loss of {', '.join(map(number, GRID))}"),
    ]


def table(results: Results, pair: str) -> "Table":
    """Return the table of one pair."""
    from rich import box
    from rich.table import Table

    study, best = results.study, results.best_fixed(pair)
    head = ("", "start", "train\nloss", "test\nacc.", f"steps to\n{TARGET:.0%}", "final\nstep size")
    shown = Table(title=label(pair), title_justify="left", title_style="bold", box=box.SIMPLE)
    for index, name in enumerate(head):
        shown.add_column(name, justify="right" if index else "left", no_wrap=True)
    for size in study.step_sizes:
        shown.add_row("fixed", *_row(results.fixed(pair, size)), style="dim")
    shown.add_row("best fixed", *_row(best), style="bold", end_section=True)
    for blocks in study.blocks:
        tuned = [results.tuned(pair, blocks, size) for size in study.step_sizes]
        for index, result in enumerate(tuned):
            shown.add_row(BLOCKS[blocks], *_row(result), end_section=index == len(tuned) - 1)
    shown.caption = _caption(results, pair)
    shown.caption_justify = "left"
    return shown


def as_json(results: Results) -> str:
    """Return settings, best fixed step sizes and all curves; null stands for not finite."""
    study = results.study
    document = {
        "settings": {
            **asdict(study),
            "grid": GRID,
            "batch": BATCH,
            "base": {base: _settings(BASES[base]) for base in _bases(study)},
            "metaopt": metaopt.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "best_fixed": {pair: results.best_fixed(pair).run.step_size for pair in study.pairs},
        "runs": [_run_as_dict(result) for result in results.by_run.values()],
    }
    return json.dumps(_finite(document), allow_nan=False) + "\n"


def _settings(rule: Any) -> dict[str, Any]:
    return {field.name: getattr(rule, field.name) for field in fields(rule) if field.init}


def _bases(study: Study) -> list[str]:
    return list(dict.fromkeys(pair.split("+")[0] for pair in study.pairs))


def _describe(rule: Any) -> str:
    """Return "betas (0.9, 0.999), weight decay 0.1", from the settings that matter."""
    if isinstance(rule, FastStart):
        return f"{_describe(rule.rule)}; {rule.factor:g} times faster at the start"
    values = asdict(rule)
    names = ("momentum", "betas", "beta2", "weight_decay")
    return ", ".join(f"{name} {values[name]}" for name in names if name in values)


def _row(result: Result) -> tuple[str, ...]:
    low, high = result.final_step_sizes
    reached = result.steps_to(TARGET)
    diverged = result.diverged_at is not None
    return (
        number(result.run.step_size),
        "diverged" if diverged else number(result.final_loss),
        "-" if diverged else f"{result.final_accuracy:.1%}",
        "never" if reached is None else str(reached),
        number(low) if low == high else f"{number(low)} to {number(high)}",
    )


def _caption(results: Results, pair: str) -> str:
    """Return the ranges of the test accuracy, and a warning where the grid ended too early."""
    study, best = results.study, results.best_fixed(pair)
    kinds = {"fixed": [results.fixed(pair, size) for size in study.step_sizes]}
    for blocks in study.blocks:
        kinds[BLOCKS[blocks]] = [results.tuned(pair, blocks, size) for size in study.step_sizes]
    text = "Test accuracy from all starts: "
    text += "; ".join(f"{name} {_range(some)}" for name, some in kinds.items()) + "."
    for end, side, more in ((GRID[0], "smallest", "smaller"), (GRID[-1], "largest", "larger")):
        if best.run.step_size == end:
            text += f"\nBest fixed is the {side} of those tried: a {more} one may do better."
    return text


def _range(some: list[Result]) -> str:
    """Return for example "12.5% to 97.5%, 1 diverged"."""
    values = [result.final_accuracy for result in some if result.diverged_at is None]
    parts = []
    if values:
        parts.append(" to ".join(dict.fromkeys((f"{min(values):.1%}", f"{max(values):.1%}"))))
    if len(values) < len(some):
        parts.append(f"{len(some) - len(values)} diverged")
    return ", ".join(parts)


def _run_as_dict(result: Result) -> dict[str, Any]:
    return {
        **asdict(result),
        "final_train_loss": result.final_loss,
        "final_test_accuracy": result.final_accuracy,
        "steps_to_95": result.steps_to(TARGET),
    }


def _finite(value: Any) -> Any:
    """Return a tree with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
