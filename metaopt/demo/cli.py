"""The command line of the demonstration."""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaopt.demo.study import PAIRS, Study, execute

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_parser", "run"]

SUMMARY = "train a small network from step sizes that are far too small"
DESCRIPTION = """\
Training a network needs a step size (also called learning rate). Too small and
nothing happens, too large and training falls apart; usually it is found by trial
and error. MetaOptimize starts anywhere and tunes the step size while it trains.

This demonstration trains a network of two hidden layers on scikit-learn's
handwritten digits, with NumPy alone, from several initial step sizes: most are
far too small. It compares

  MetaOptimize   from each of these initial step sizes,
  fixed          the same optimizer held at that very step size, and
  best fixed     the same optimizer at the best of 1e-5, 1e-4, 1e-3, 1e-2, 1e-1:
                 the one with the least training loss at the end.

It prints a table and writes a picture, demo.png, and all numbers, results.json.
The defaults take less than a minute on two cores.
"""
PAIR_HELP = f"""\
optimizer of the weights + optimizer of the step size: one of {", ".join(PAIRS)}, or all;
may be given several times (default: adamw+adam sgdm+adam)"""
MISSING = """\
metaopt demo: error: {name} is missing. The demonstration needs scikit-learn, matplotlib and rich:

    pip install '.[demo]'        in a checkout of the project
"""

DEFAULT_PAIRS = ("adamw+adam", "sgdm+adam")
DEFAULT_STEP_SIZES = (1e-6, 1e-5, 1e-4, 1e-3)
DEFAULT_STEPS = 1500
DEFAULT_META_LR = 1e-2
BLOCKS = {"scalar": ("scalar",), "tensor": ("tensor",), "both": ("scalar", "tensor")}


def add_parser(commands: Any) -> None:
    """Add the command `demo` to the subparsers of a command line.

    Parameters
    ----------
    commands : what `argparse.ArgumentParser.add_subparsers` returns
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help=SUMMARY,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument(
        "--pair", action="append", choices=(*PAIRS, "all"), metavar="BASE+META", help=PAIR_HELP
    )
    parser.add_argument(
        "--blocks",
        choices=tuple(BLOCKS),
        default="both",
        help="scalar: one step size for all weights; tensor: one for the weights and one for the "
        "biases of every layer; both: first the one, then the other (default: %(default)s)",
    )
    parser.add_argument(
        "--step-size",
        action="append",
        type=_positive_number,
        metavar="SIZE",
        help="initial step size; may be given several times (default: 1e-6 1e-5 1e-4 1e-3)",
    )
    parser.add_argument(
        "--meta-lr",
        type=_positive_number,
        default=DEFAULT_META_LR,
        metavar="SIZE",
        help="how fast step sizes change: 0.01 is by about 1%% a step (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=_positive_integer,
        default=DEFAULT_STEPS,
        metavar="N",
        help="updates of the weights in every run (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_natural_number,
        default=0,
        metavar="N",
        help="of the initial weights and the batches; the same seed gives the same results "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=_positive_integer,
        default=_processors(),
        metavar="N",
        help="runs at a time, without influence on the results (default: one per processor, "
        "here %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=_writable_folder,
        default="metaopt-demo",
        metavar="FOLDER",
        help="where to write demo.png and results.json; made if it is not there "
        "(default: ./%(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the demonstration and return the exit status.

    Parameters
    ----------
    options : argparse.Namespace
        What the parser of `add_parser` made.
    """
    try:
        import matplotlib.figure  # noqa: F401
        import rich.console
        import sklearn.datasets  # noqa: F401
    except ModuleNotFoundError as error:
        name = (error.name or "a package").partition(".")[0]
        sys.stderr.write(MISSING.format(name=name.replace("sklearn", "scikit-learn")))
        return 2
    pairs = options.pair or DEFAULT_PAIRS
    study = Study(
        pairs=PAIRS if "all" in pairs else tuple(dict.fromkeys(pairs)),
        blocks=BLOCKS[options.blocks],
        step_sizes=tuple(sorted(set(options.step_size or DEFAULT_STEP_SIZES))),
        meta_lr=options.meta_lr,
        steps=options.steps,
        seed=options.seed,
    )
    _show(study, options.jobs, options.output, rich.console.Console(highlight=False))
    return 0


def _show(study: Study, jobs: int, output: Path, console: "Console") -> None:
    from rich import progress
    from rich.table import Table

    from metaopt.demo import plot, report
    from metaopt.demo.data import load_digits

    used = Table.grid(padding=(0, 2))
    for name, text in report.settings(study):
        used.add_row(name, text)
    console.print(used)
    columns = (
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("runs"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(study.runs))
        results = execute(study, load_digits(), jobs, lambda _: bar.advance(task))
    for pair in study.pairs:
        console.print(report.table(results, pair))
    picture, numbers = output / "demo.png", output / "results.json"
    plot.save(results, picture)
    numbers.write_text(report.as_json(results), encoding="utf-8")
    console.print(f"picture: {picture}\nnumbers: {numbers}", soft_wrap=True, markup=False)


def _positive_number(text: str) -> float:
    value = _parse(float, text, "a number")
    if not 0 < value < math.inf:
        msg = f"must be a finite number above 0; got {text}"
        raise argparse.ArgumentTypeError(msg)
    return value


def _positive_integer(text: str) -> int:
    value = _parse(int, text, "a whole number")
    if value < 1:
        msg = f"must be at least 1; got {text}"
        raise argparse.ArgumentTypeError(msg)
    return value


def _natural_number(text: str) -> int:
    value = _parse(int, text, "a whole number")
    if value < 0:
        msg = f"must not be negative; got {text}"
        raise argparse.ArgumentTypeError(msg)
    return value


def _parse(kind: Any, text: str, expected: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        msg = f"must be {expected}; got {text!r}"
        raise argparse.ArgumentTypeError(msg) from None


def _writable_folder(text: str) -> Path:
    """Return the folder, made and tried: an hour of training is not to end in an error."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        msg = f"cannot write to {text!r}: {error.strerror}"
        raise argparse.ArgumentTypeError(msg) from None
    return folder


def _processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
