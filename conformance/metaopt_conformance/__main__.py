"""The command line, `python -m metaopt_conformance`."""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("hypothesis") is None:
    sys.exit("metaopt_conformance needs hypothesis: pip install hypothesis array-api-strict")

from metaopt_conformance import report
from metaopt_conformance.backends import BACKENDS, UnavailableError, find, names
from metaopt_conformance.cases import Case
from metaopt_conformance.families import FAMILIES
from metaopt_conformance.suite import run

__all__ = ["main"]

DESCRIPTION = """\
Checks metaopt's optimizer on the arrays of a library against a dense float64 oracle, finite
differences of whole trajectories, and the library's own optimizers. The exit status is 0 if all
checks passed, 1 if one failed, 2 if none was made."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process by default.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        for family in FAMILIES.values():
            print(f"{family.name:12} {family.what}")
        return 0
    if options.all == (options.backend is not None):
        parser.error("give either --backend or --all")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {options.jobs}")
    if options.all and options.device:
        parser.error("--all checks every device; --device goes with --backend")
    subjects = _subjects(parser, options)
    if options.output:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output must be a folder, or a place for one: {error}")

    outcomes: list[report.Outcome] = []
    for name, device in subjects:
        found = list(
            run(
                name,
                device=device,
                families=options.family or tuple(FAMILIES),
                cases=options.case,
                quick=options.quick,
                stop=options.stop,
                jobs=options.jobs,
                progress=_tick,
            )
        )
        sys.stderr.write("\n" if sys.stderr.isatty() else "")
        print(f"\n{name}{f' on {device}' if device else ''}\n{report.as_text(found)}", flush=True)
        outcomes += found
        if options.output and outcomes:  # at once: the next library may take long, or break
            _write(options, outcomes)
        if options.stop and _have(outcomes, "failed"):
            break
    if _have(outcomes, "failed"):
        return 1
    if not _have(outcomes, "passed"):
        print("nothing was checked")
        return 2
    return 0


def _subjects(parser: argparse.ArgumentParser, options: Any) -> list[tuple[str, str | None]]:
    """Return the backends to check by name, each with a device, or exit where there is none."""
    subjects: list[tuple[str, str | None]] = []
    for name in names() if options.all else [options.backend]:
        try:
            devices = find(name).devices()
        except (UnavailableError, LookupError) as error:
            if not options.all:
                parser.error(str(error.args[0]))
            print(f"{name}: not checked, {error.args[0]}")
            continue
        if options.device and options.device not in devices:
            known = ", ".join(devices) or "none but the default one"
            parser.error(f"--device must be one of {known}; got {options.device!r}")
        chosen = (devices or (None,)) if options.all else (options.device,)
        subjects += [(name, device) for device in chosen]
    return subjects


def _have(outcomes: Sequence[report.Outcome], status: str) -> bool:
    return any(outcome.status == status for outcome in outcomes)


def _write(options: Any, outcomes: Sequence[report.Outcome]) -> None:
    """Write the report under the name of what was checked."""
    what = [] if options.all else [outcomes[0].backend, options.device]
    name = "_".join(["conformance", *filter(None, what)])
    name = re.sub(r"[^\w.-]", "_", name)
    page = report.overview(outcomes) if options.all else report.as_markdown(outcomes)
    (options.output / f"{name}.md").write_text(page + "\n", encoding="utf-8")
    (options.output / f"{name}.json").write_text(report.as_json(outcomes), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m metaopt_conformance", description=DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help=f"one of {', '.join(BACKENDS)}, an entry point's name, or module:attribute",
    )
    parser.add_argument("--all", action="store_true", help="every backend that is installed")
    parser.add_argument("--device", help="one of the backend's devices, such as cuda")
    parser.add_argument("--quick", action="store_true", help="about a sixteenth of all cases")
    parser.add_argument(
        "--family", action="append", choices=tuple(FAMILIES), help="these alone; see --list"
    )
    parser.add_argument("--case", action="append", type=_case, help="this alone: name=value,...")
    parser.add_argument("--stop", action="store_true", help="end with the first failure")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes to share the checks among"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write JSON and Markdown")
    parser.add_argument("--list", action="store_true", help="say what is checked and exit")
    return parser


def _case(text: str) -> Case:
    try:
        return Case.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _tick(outcome: report.Outcome) -> None:
    if sys.stderr.isatty():
        sys.stderr.write({"passed": ".", "failed": "F", "skipped": "s"}[outcome.status])
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
