"""The oracle on a case: what is wanted of the library."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np

from metaopt_conformance import finite_differences, oracle
from metaopt_conformance.cases import Case
from metaopt_conformance.translate import config_of, expected, slices

__all__ = ["by_weight", "config", "differences", "oracle_run", "oracle_step", "wanted"]


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
    hessian = case.hessian(t, before.w)
    if case.curvature in ("diagonal", "rectified"):
        hessian = np.diag(rounded(case.hessian_diagonal(t, before.w)))
    present = {name: name not in case.absent(t) for name in case.subject.shapes}
    return oracle.step(
        config(case),
        before,
        rounded(case.grad(t, before.w)),
        hessian,
        by_weight(case, case.multiplier(t)),
        by_weight(case, present),
        partial(case.subject.third, t, before.w),
    )


@cache
def oracle_run(case: Case) -> tuple[oracle.State, ...]:
    """Return the oracle's states before each step and after the last."""
    run = [oracle.init(config(case), case.subject.start())]
    for t in range(case.steps):
        run.append(oracle_step(case, t, run[-1]))
    return tuple(run)


@cache
def differences(case: Case) -> dict[str, Any]:
    """Return the traces at the end of the oracle's run by finite differences."""
    return finite_differences.traces(config(case), case.subject, oracle_run(case))


def wanted(case: Case, state: oracle.State, key: str) -> Any:
    """Return the oracle's value of what `Under.translated` calls `key`."""
    return expected(state, key, case.subject.shapes)
