"""Runs the checks on a backend and finds the smallest case of a failure."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace

from metaopt_conformance.backends import Backend
from metaopt_conformance.cases import Case
from metaopt_conformance.checks import FAMILIES, Family
from metaopt_conformance.report import Outcome
from metaopt_conformance.runs import Failure, Skip, Under

__all__ = ["run"]


def run(
    backend: Backend,
    *,
    device: str | None = None,
    families: Sequence[str] = tuple(FAMILIES),
    cases: Sequence[Case] | None = None,
    quick: bool = False,
    stop: bool = False,
    progress: Callable[[Outcome], object] = id,
) -> Iterator[Outcome]:
    """Yield the outcome of every check.

    Parameters
    ----------
    backend : Backend
    device : str, optional
        One of the backend's.
    families : sequence of str, default all
    cases : sequence of Case, optional
        Those to check, in place of the families' own.
    quick : bool, default False
        Cover pairs of rules together with the other options, a twentieth of all cases.
    stop : bool, default False
        End with the first failure.
    progress : callable, optional
        Called with every outcome.
    """
    for name in families:
        family = FAMILIES[name]
        chosen = list(family.cases(backend.dtypes, quick) if cases is None else cases)
        for under, title in _subjects(backend, device, name):
            for case in chosen:
                outcome = _outcome(under, title, family, case)
                progress(outcome)
                yield outcome
                if stop and outcome.status == "failed":
                    return


def _subjects(backend: Backend, device: str | None, family: str) -> Iterator[tuple[Under, str]]:
    yield Under(backend, device), family
    if backend.optimizer is not None and family == "trajectory":
        yield Under(backend, device, adapter=True), "adapter"


def _outcome(under: Under, title: str, family: Family, case: Case) -> Outcome:
    where = under.device or "default device"

    def outcome(status: str, share: float, detail: str, case: Case) -> Outcome:
        command = f"python -m metaopt_conformance --backend {under.backend.name}"
        if under.device:
            command += f" --device {under.device}"
        return Outcome(
            backend=under.backend.name,
            device=where,
            family=title,
            pair=case.pair,
            case=str(case),
            status=status,
            share=share,
            detail=detail,
            command=f'{command} --family {family.name} --case "{case}"',
        )

    try:
        return outcome("passed", _checked(under, family, case), "", case)
    except Skip as skip:
        return outcome("skipped", 0.0, str(skip), case)
    except Exception as error:
        smallest, detail = _smallest(under, family, case, error)
        return outcome("failed", math.inf, detail, smallest)


def _checked(under: Under, family: Family, case: Case) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return family.check(under, case)


def _smallest(under: Under, family: Family, case: Case, error: Exception) -> tuple[Case, str]:
    """Return the case with as many fields at their defaults, and as few steps, as still fails."""
    detail = _described(error)
    for field in fields(Case):
        for value in (*(range(1, case.steps) if field.name == "steps" else ()), field.default):
            if getattr(case, field.name) == value:
                break
            trial = replace(case, **{field.name: value})
            if not trial.possible():
                continue
            try:
                _checked(under, family, trial)
            except Skip:
                continue
            except Exception as smaller:
                case, detail = trial, _described(smaller)
                break
    return case, detail


def _described(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Failure) else f"{type(error).__name__}: {text}"
