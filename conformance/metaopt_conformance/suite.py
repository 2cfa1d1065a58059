"""Runs the checks on a backend and finds the smallest case of a failure."""

import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from typing import Any

from metaopt_conformance.backends import Backend, find
from metaopt_conformance.cases import Case
from metaopt_conformance.families import FAMILIES, Family
from metaopt_conformance.report import Outcome
from metaopt_conformance.runs import Under
from metaopt_conformance.verdicts import Failure, Skip

__all__ = ["ADAPTED", "run"]

#: The families that check adapters too, and their columns in the report.
ADAPTED = {
    "adapter": {"trajectory": "adapter", "step": "adapter's step", "learned": "adapter's learned"},
    "wrapped": {"trajectory": "wrapped", "step": "wrapped's step"},
}


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A check to make: of the core, or of one of the backend's adapters."""

    family: str
    case: Case
    part: str
    subject: str = "core"

    @property
    def title(self) -> str:
        """The column of the report."""
        return ADAPTED.get(self.subject, {}).get(self.family, self.family)


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
        Cover pairs of rules together with the other options, a sixteenth of all cases.
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
    if jobs > 1 and not isinstance(backend, str):
        msg = f"`backend` must be a name where `jobs` is more than 1; got {backend!r}."
        raise TypeError(msg)
    found = find(backend) if isinstance(backend, str) else backend
    quick = quick or found.slow
    tasks = [
        task
        for name in families
        for subject in _subjects(found, name)
        for task in _tasks(found, name, cases, subject, quick=quick)
    ]
    name = backend if isinstance(backend, str) else backend.name
    outcomes: Iterator[Outcome] = (
        (_outcome(found, name, device, task) for task in tasks)
        if jobs == 1
        else _shared(found, name, device, tasks, jobs)
    )
    for outcome in outcomes:
        progress(outcome)
        yield outcome
        if stop and outcome.status == "failed":
            return


def _tasks(
    backend: Backend, name: str, cases: Sequence[Case] | None, subject: str, *, quick: bool
) -> Iterator[_Task]:
    """Yield the checks of a family on the cases given, or its own."""
    quick, family = quick or (subject != "core" and backend.slow_optimizer), FAMILIES[name]
    part = "quick" if quick else "whole"
    if cases is not None:
        part = "chosen"
    own = family.wrapped if subject == "wrapped" and family.wrapped is not None else family.cases
    for case in own(backend.dtypes, quick) if cases is None else cases:
        yield _Task(family=name, case=case, part=part, subject=subject)


def _subjects(backend: Backend, family: str) -> list[str]:
    """Return what of a backend a family checks: the core, and the adapters that it has."""
    made = {"adapter": backend.optimizer, "wrapped": backend.wrapped}
    found = [name for name, make in made.items() if make is not None and family in ADAPTED[name]]
    return ["core", *found]


def _shared(
    backend: Backend, name: str, device: str | None, tasks: Sequence[_Task], jobs: int
) -> Iterator[Outcome]:
    """Yield the outcomes in order, from processes that have the backend each for itself.

    Where one of them dies, the check at which the outcomes end has failed.
    """
    context = multiprocessing.get_context("spawn")  # a fork of JAX or CUDA may hang
    done = 0
    with ProcessPoolExecutor(jobs, context, _load, (name, device)) as pool:
        try:
            for outcome in pool.map(_work, tasks, chunksize=CHUNK):
                yield outcome
                done += 1
        except BrokenProcessPool:
            detail = f"a process died at this check, or one of the {jobs * CHUNK} after it"
            told = _telling(backend, name, device, tasks[done])
            yield told("failed", math.inf, detail, tasks[done].case)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


#: Checks handed to a process at a time.
CHUNK = 8

_loaded: dict[str, Any] = {}


def _load(name: str, device: str | None) -> None:
    _loaded.update(backend=find(name), name=name, device=device)


def _work(task: _Task) -> Outcome:
    return _outcome(**_loaded, task=task)


def _outcome(backend: Backend, name: str, device: str | None, task: _Task) -> Outcome:
    family, case = FAMILIES[task.family], task.case
    under = Under(backend, device, task.subject)
    told = _telling(backend, name, device, task)
    try:
        return told("passed", family.run(under, case), "", case)
    except Skip as skip:
        return told("skipped", 0.0, str(skip), case)
    except Exception as error:
        smallest, detail = _smallest(under, family, case, _described(error))
        return told("failed", math.inf, detail, smallest)


def _telling(
    backend: Backend, name: str, device: str | None, task: _Task
) -> Callable[[str, float, str, Case], Outcome]:
    """Return what makes the outcome of a task from status, share, detail and case."""
    command = f"python -m metaopt_conformance --backend {name}"
    if device:
        command += f" --device {device}"

    def told(status: str, share: float, detail: str, case: Case) -> Outcome:
        return Outcome(
            backend=backend.name,
            device=device or "default device",
            family=task.title,
            pair=task.case.pair,
            case=str(case),
            part=task.part,
            status=status,
            share=share,
            detail=detail,
            command=f'{command} --family {task.family} --case "{case}"',
        )

    return told


def _smallest(under: Under, family: Family, case: Case, detail: str) -> tuple[Case, str]:
    """Return the case with as many fields at their defaults, and as few steps, as still fails."""
    smaller = None
    while smaller != case:
        smaller = case
        for field in fields(Case):
            plainer: Any = range(1, case.steps) if field.name == "steps" else (field.default,)
            for value in plainer:
                if getattr(case, field.name) == value:
                    break
                trial = replace(case, **{field.name: value})
                failure = _failure(under, family, trial) if trial.possible() else None
                if failure is not None:
                    case, detail = trial, failure
                    break
    return case, detail


def _failure(under: Under, family: Family, case: Case) -> str | None:
    """Return how a case fails, None if it does not."""
    try:
        family.run(under, case)
    except Skip:
        return None
    except Exception as error:
        return _described(error)
    return None


def _described(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Failure) else f"{type(error).__name__}: {text}"
