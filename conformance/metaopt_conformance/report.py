"""What came out, as a table, as JSON and as Markdown."""

import json
import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["Outcome", "as_json", "as_markdown", "as_text", "overview"]

DISTRIBUTIONS = (
    "metaoptimize",
    "numpy",
    "array-api-compat",
    "array-api-strict",
    "torch",
    "jax",
    "optax",
    "cupy",
    "dask",
    "numba",
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One check on one case.

    Parameters
    ----------
    backend, device, family, pair, case : str
    part : {"quick", "whole", "chosen"}
        Of which cases it is one: the quick part's, all, or those that were asked for.
    status : {"passed", "failed", "skipped"}
    share : float
        Worst error over its tolerance; infinite where that is not known.
    detail : str
        Why it failed or was skipped.
    command : str
        What repeats it; of a failure the smallest case that still fails.
    """

    backend: str
    device: str
    family: str
    pair: str
    case: str
    part: str
    status: str
    share: float = 0.0
    detail: str = ""
    command: str = ""


def as_text(outcomes: Sequence[Outcome]) -> str:
    """Return a table of rule pairs by families: passed of all, and the worst share."""
    rows = _table(outcomes, lambda outcome: outcome.pair)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines += ["", *_reasons(outcomes)]
    return "\n".join(line.rstrip() for line in lines)


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """Return the same table in Markdown, with what was checked, hardware and versions."""
    subjects = dict.fromkeys((some.backend, some.device, some.part) for some in outcomes)
    return "\n".join(
        [
            *(f"# {backend}, {device}, {part} cases" for backend, device, part in subjects),
            "",
            *_markdown(_table(outcomes, lambda outcome: outcome.pair)),
            "",
            *_reasons(outcomes),
            "",
            _where(),
        ]
    )


def overview(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table of families by backends."""
    by_backend = _table(
        outcomes,
        lambda outcome: f"{outcome.backend} ({outcome.device}, {outcome.part})",
        "check",
    )
    rows = list(zip(*by_backend, strict=True))
    return "\n".join([*_markdown(rows), "", *_reasons(outcomes), "", _where()])


def as_json(outcomes: Sequence[Outcome]) -> str:
    """Return all outcomes with hardware and versions."""
    found = [asdict(outcome) for outcome in outcomes]
    for entry in found:
        entry["share"] = entry["share"] if entry["share"] < float("inf") else None
    return json.dumps({"versions": _versions(), "outcomes": found}, indent=1) + "\n"


def _table(outcomes: Sequence[Outcome], key: Any, head: str = "base + meta") -> list[list[str]]:
    families = list(dict.fromkeys(outcome.family for outcome in outcomes))
    cells: dict[str, dict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        cells[key(outcome)][outcome.family].append(outcome)
    return [
        [head, *families],
        *(
            [row, *(_cell(by_family[family]) for family in families)]
            for row, by_family in cells.items()
        ),
    ]


def _cell(outcomes: Sequence[Outcome]) -> str:
    """Return for example "31 of 31, 0.12": passed, of those not skipped, and the worst share."""
    run = [outcome for outcome in outcomes if outcome.status != "skipped"]
    if not run:
        return "skipped" if outcomes else "-"
    passed = sum(outcome.status == "passed" for outcome in run)
    worst = max(outcome.share for outcome in run)
    return f"{passed} of {len(run)}, {worst:.2g}"


def _reasons(outcomes: Sequence[Outcome]) -> list[str]:
    reasons: dict[tuple[str, str, str], int] = defaultdict(int)
    for outcome in outcomes:
        if outcome.status == "skipped":
            reasons[outcome.backend, outcome.family, outcome.detail] += 1
    lines = [
        f"{backend}: {count} of {family} skipped, {reason}."
        for (backend, family, reason), count in reasons.items()
    ]
    for outcome in outcomes:
        if outcome.status == "failed":
            lines += [
                f"FAILED {outcome.family} {outcome.case}: {outcome.detail}",
                f"    {outcome.command}",
            ]
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    passed = sum(outcome.status == "passed" for outcome in outcomes)
    return [*lines, f"{passed} passed, {failed} failed, {len(outcomes) - passed - failed} skipped."]


def _markdown(rows: Iterable[Sequence[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + " --- |" * (head.count("|") - 1), *body]


def _where() -> str:
    found = ", ".join(f"{name} {number}" for name, number in _versions().items())
    return f"Cells: passed of checked, largest error as a share of its tolerance. {found}."


def _versions() -> dict[str, str]:
    found = {
        "machine": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    }
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
