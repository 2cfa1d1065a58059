"""What an optimizer's step costs, in turns in one process, as ratios.

    python -m benchmarks.step_cost numpy [--problem flat] [--rounds 20] [--output FOLDER]

Every round makes, for each contender in turn, one step that is not timed and one that is. Reported
are medians, the ratio of medians to the row marked 1 above, and the quartiles of the ratios taken
round by round. Gradients are given, all is float32.
"""

import argparse
import importlib
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import metaopt as mo
from benchmarks.contenders import Contender
from benchmarks.contenders.shapes import LARGE, PROBLEMS

LIBRARIES = ("numpy", "torch", "wrapped", "jax", "cupy")
#: Rounds that are not counted: compilation, page faults.
WARM_UP = 2


def times(contenders: Sequence[Contender], rounds: int) -> list[list[float]]:
    """Return the seconds of each one's step by round, taken in turns."""
    found: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds + WARM_UP):
        for contender, seconds in zip(contenders, found, strict=True):
            contender.step()
            start = time.perf_counter()
            contender.step()
            seconds.append(time.perf_counter() - start)
    return [seconds[WARM_UP:] for seconds in found]


def rows(contenders: Sequence[Contender], found: list[list[float]]) -> list[str]:
    """Return a line of a Markdown table for each contender."""
    lines, over = [], found[0]
    for (name, _, reference), seconds in zip(contenders, found, strict=True):
        milliseconds = f"{1e3 * statistics.median(seconds):.1f}"
        if reference:
            over = seconds
            lines.append(f"| {name} | {milliseconds} | 1 |")
            continue
        ratios = [mine / theirs for mine, theirs in zip(seconds, over, strict=True)]
        first, _, third = statistics.quantiles(ratios, n=4)
        ratio = statistics.median(seconds) / statistics.median(over)
        lines.append(f"| {name} | {milliseconds} | {ratio:.2f} ({first:.2f} to {third:.2f}) |")
    return lines


def main() -> None:
    """Measure the contenders of a library on the problems; print, and with `--output` write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--problem", action="append", choices=tuple(LARGE))
    parser.add_argument("--rounds", type=int, default=20, help="steps timed of each (default 20)")
    parser.add_argument("--output", type=Path, help="folder for step_cost_LIBRARY.md")
    options = parser.parse_args()
    module = importlib.import_module(f"benchmarks.contenders.{options.library}_steps")
    packages = ", ".join(f"{name} {version(name)}" for name in module.PACKAGES)
    lines = [
        f"# Cost of a step, {options.library}",
        "",
        f"Made by `python -m benchmarks.step_cost {options.library}`: times of one step in "
        f"{options.rounds} rounds in turns in one process, their median, and the ratio of medians "
        "(in brackets the quartiles of the ratios round by round) to the row marked 1 above: "
        f"{module.NOTE}. {platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}, {packages}, metaopt {mo.__version__}.",
    ]
    for problem in options.problem or getattr(module, "PROBLEMS", PROBLEMS):
        shapes = LARGE[problem]
        weights = sum(math.prod(shape) for shape in shapes.values())
        contenders = list(module.steps(shapes))
        lines += [
            "",
            f"| {problem}: {len(shapes)} arrays, {weights:,} weights | ms | ratio |",
            "| --- | --- | --- |",
            *rows(contenders, times(contenders, options.rounds)),
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"step_cost_{options.library}.md"
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
