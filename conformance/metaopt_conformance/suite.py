"""Runs the checks on a backend and finds the smallest case of a failure."""

import math
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

from metaopt_conformance.backends import Backend, find
from metaopt_conformance.cases import Case
from metaopt_conformance.checks import FAMILIES, Family
from metaopt_conformance.report import Outcome
from metaopt_conformance.runs import Failure, Skip, Under

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A check to make: of the core, or of the backend's own adapter."""

    family: str
    case: Case
    adapter: bool = False


def run(
    backend: Backend | str,
    *,
    device: str | None = None,
    families: Sequence[str] = tuple(FAMILIES),
    cases: Sequence[Case] | None = None,
    quick: bool = False,
    stop: bool = False,
    jobs: int = 1,
    progress: Callable[[Outcome], object] = id,
) -> Iterator[Outcome]:
    """Yield the outcome of every check.

    Parameters
    ----------
    backend : Backend or str
        What it is found by where there are several jobs.
    device : str, optional
        One of the backend's.
    families : sequence of str, default all
    cases : sequence of Case, optional
        Those to check, in place of the families' own.
    quick : bool, default False
        Cover pairs of rules together with the other options, a twentieth of all cases.
    stop : bool, default False
        End with the first failure.
    jobs : int, default 1
        Processes to share the checks among.
    progress : callable, optional
        Called with every outcome.

    Raises
    ------
    TypeError
        If several jobs are to find a backend that is no str.
    """
    found = find(backend) if isinstance(backend, str) else backend
    quick = quick or found.slow
    tasks = [
        _Task(family=name, case=case, adapter=adapter)
        for name in families
        for adapter in _subjects(found, name)
        for case in (FAMILIES[name].cases(found.dtypes, quick) if cases is None else cases)
    ]
    if jobs == 1:
        name = backend if isinstance(backend, str) else backend.name
        outcomes: Iterator[Outcome] = (_outcome(found, name, device, task) for task in tasks)
    elif not isinstance(backend, str):
        msg = f"`backend` must be a name where `jobs` is more than 1; got {backend!r}."
        raise TypeError(msg)
    else:
        outcomes = _shared(backend, device, tasks, jobs)
    for outcome in outcomes:
        progress(outcome)
        yield outcome
        if stop and outcome.status == "failed":
            return


def _subjects(backend: Backend, family: str) -> tuple[bool, ...]:
    """Say for the core, and the backend's adapter where it has one, whether it is the adapter."""
    return (False, True) if backend.optimizer is not None and family == "trajectory" else (False,)


def _shared(name: str, device: str | None, tasks: Sequence[_Task], jobs: int) -> Iterator[Outcome]:
    """Yield the outcomes in order, from processes that have the backend each for itself."""
    context = multiprocessing.get_context("spawn")  # a fork of JAX or CUDA may hang
    with ProcessPoolExecutor(jobs, context, _load, (name, device)) as pool:
        try:
            yield from pool.map(_work, tasks, chunksize=8)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_loaded: dict[str, Any] = {}


def _load(name: str, device: str | None) -> None:
    _loaded.update(backend=find(name), name=name, device=device)


def _work(task: _Task) -> Outcome:
    return _outcome(**_loaded, task=task)


def _outcome(backend: Backend, name: str, device: str | None, task: _Task) -> Outcome:
    family, case = FAMILIES[task.family], task.case
    under = Under(backend, device, adapter=task.adapter)
    title = "adapter" if task.adapter else task.family
    where = device or "default device"

    def outcome(status: str, share: float, detail: str, case: Case) -> Outcome:
        command = f"python -m metaopt_conformance --backend {name}"
        if device:
            command += f" --device {device}"
        return Outcome(
            backend=backend.name,
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
