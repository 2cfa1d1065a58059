"""The oracle on a case: what is wanted of the library."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np

from metaopt_conformance import finite_differences, learned, oracle
from metaopt_conformance.cases import Case
from metaopt_conformance.learned import Number
from metaopt_conformance.translate import config_of, expected, numbers_of, slices

__all__ = [
    "by_weight",
    "config",
    "differences",
    "learned_run",
    "numbers",
    "oracle_run",
    "oracle_step",
    "wanted",
]


@cache
def config(case: Case) -> oracle.Config:
    """Return the case's configuration in the oracle's terms."""
    largest = 2.0 ** (511 if "float64" in map(case.dtype_of, case.subject.shapes) else 63)
    return config_of(case.opt(), case.subject.shapes, largest)


def by_weight(case: Case, values: Any) -> Any:
    """Return values by leaf, or one value, as one per weight."""
    if not isinstance(values, Mapping):
        return np.full(case.subject.size, values)
    shapes = case.subject.shapes
    return np.concatenate(
        [np.full(at.stop - at.start, values[name]) for name, at in slices(shapes).items()]
    )


def oracle_step(
    case: Case, t: int, before: oracle.State, rounded: Callable[[Any], Any] = np.asarray
) -> oracle.State:
    """Return the oracle's state after step t of the case, from inputs rounded as the library's."""
    grad, hessian, lr, present, source, counts = _inputs(case, t, before.w, rounded)
    third = partial(case.subject.third, t, before.w)
    return oracle.step(config(case), before, grad, hessian, lr, present, third, source, counts)


@cache
def oracle_run(case: Case) -> tuple[oracle.State, ...]:
    """Return the oracle's states before each step and after the last."""
    run = [oracle.init(config(case), case.subject.start())]
    for t in range(case.steps):
        run.append(oracle_step(case, t, run[-1]))
    return tuple(run)


@cache
def numbers(case: Case) -> dict[str, Number]:
    """Return the numbers that are learned in the oracle's terms."""
    return numbers_of(case.opt(), case.subject.shapes, config(case).largest)


@cache
def learned_run(case: Case) -> tuple[learned.Run, ...]:
    """Return the oracle's states of a case in which numbers are learned, as `oracle_run` does."""
    run = [learned.init(config(case), numbers(case), case.subject.start())]
    for t in range(case.steps):
        inputs = _inputs(case, t, run[-1].own.w)
        run.append(learned.step(config(case), numbers(case), run[-1], *inputs))
    return tuple(run)


def _inputs(
    case: Case, t: int, w: Any, rounded: Callable[[Any], Any] = np.asarray
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Return what step t has at the weights w.

    The gradient, the Hessian, multipliers, where there is a gradient; what the meta-gradient is
    made with, and where there is any of it.
    """
    hessian = case.hessian(t, w)
    if case.curvature in ("diagonal", "rectified"):
        hessian = np.diag(rounded(case.hessian_diagonal(t, w)))
    present = {name: name not in case.absent(t) for name in case.subject.shapes}
    judged = {name: name in case.judged(t) for name in case.subject.shapes}
    return (
        rounded(case.grad(t, w)),
        hessian,
        by_weight(case, case.multiplier(t)),
        by_weight(case, present),
        rounded(case.source(t, w)),
        by_weight(case, judged),
    )


@cache
def differences(case: Case) -> dict[str, Any]:
    """Return the traces at the end of the oracle's run by finite differences."""
    return finite_differences.traces(config(case), case.subject, oracle_run(case))


def wanted(case: Case, state: oracle.State, key: str) -> Any:
    """Return the oracle's value of what `Under.translated` calls `key`."""
    return expected(state, key, case.subject.shapes)
