"""The whole step against a dense oracle, and its traces against differences of trajectories.

Both ways share nothing with the library: docs/mathematics.md sections 3 and 4.
"""

import itertools
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from metaopt_conformance import finite_differences, oracle
from metaopt_conformance.problems import PROBLEMS, SHAPES
from metaopt_conformance.tolerances import (
    FINITE_DIFFERENCES,
    ORACLE,
    THIRD_DIFFERENCES,
    relative_error,
)
from metaopt_conformance.translate import config_of, dense, expected, flat, tree

import metaopt as mo

STEPS = 12
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
PROBLEM = PROBLEMS["logcosh"]

BASES: dict[str, Any] = {
    "SGD": mo.SGD(weight_decay=0.1),
    "SGDm": mo.SGD(momentum=0.9, weight_decay=0.1),
    "RMSprop": mo.RMSprop(beta2=0.8, eps=1e-2, weight_decay=0.1),
    "AdamW": mo.AdamW(betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1),
    "Lion": mo.Lion(betas=(0.8, 0.9), weight_decay=0.1),
}
METAS: dict[str, Any] = {
    "SGD": mo.SGD(),
    "RMSprop": mo.RMSprop(beta2=0.8, eps=1e-2),
    "Adam": mo.AdamW(betas=(0.8, 0.9), eps=1e-2),
    "Lion": mo.Lion(betas=(0.8, 0.9)),
}
STEP_SIZES = {"SGD": 0.2, "SGDm": 0.3, "RMSprop": 0.05, "AdamW": 0.05, "Lion": 0.05}
META_LRS = {"SGD": 0.2, "RMSprop": 0.1, "Adam": 0.15, "Lion": 0.05}


@dataclass(frozen=True)
class Case:
    base: str
    meta: str
    approximation: str
    discount: float
    blocks: str
    delayed: bool = False
    meta_first: bool = False

    @property
    def opt(self) -> mo.MetaOptimize:
        base, meta = BASES[self.base], METAS[self.meta]
        if self.delayed:
            base, meta = delay(base), delay(meta)
        return mo.MetaOptimize(
            base=base,
            meta=meta,
            step_size=STEP_SIZES[self.base],
            meta_lr=META_LRS[self.meta],
            discount=self.discount,
            blocks=self.blocks,
            approximation=self.approximation,
            curvature="exact",
            meta_first=self.meta_first,
        )

    @property
    def moves_beta_trace(self) -> bool:
        return self.approximation != "l" and self.discount > 0 and self.meta != "Lion"

    def __str__(self) -> str:
        flags = ["delayed"] * self.delayed + ["meta first"] * self.meta_first
        parts = (self.base, self.meta, self.approximation, self.discount, self.blocks, *flags)
        return " ".join(map(str, parts))


def delay(rule: Any) -> Any:
    """Return the rule with delayed moments, itself where it has none to delay."""
    return replace(rule, delayed=True) if rule.slots and hasattr(rule, "delayed") else rule


FRESH = [
    Case(*options)
    for options in itertools.product(
        BASES, METAS, ("l", "2x2", "full"), (0.0, 0.9, 1.0), ("scalar", "tensor")
    )
]
DELAYED = [
    replace(case, delayed=True)
    for case in FRESH
    if (delay(BASES[case.base]), delay(METAS[case.meta])) != (BASES[case.base], METAS[case.meta])
]
META_FIRST = [
    replace(case, meta_first=True) for case in (*FRESH, *DELAYED) if case.approximation != "full"
]
CASES = [*FRESH, *DELAYED, *META_FIRST]
#: What the other array libraries run: every pair, the options in turn.
ELSEWHERE = [
    case
    for case in CASES
    if case.discount == 0.9
    and case.blocks == "tensor"
    and (
        (not case.delayed and not case.meta_first)
        or (case.approximation == "2x2" and case.base == "AdamW")
    )
]


@cache
def oracle_run(case: Case) -> list[oracle.State]:
    config = config_of(case.opt, SHAPES)
    run = [oracle.init(config, PROBLEM.start())]
    for t in range(STEPS):
        grad, hessian = PROBLEM.grad(t, run[-1].w), PROBLEM.hessian(t, run[-1].w)
        third = partial(PROBLEM.third, t, run[-1].w)
        run.append(oracle.step(config, run[-1], grad, hessian, third=third))
    return run


@cache
def differences(case: Case) -> dict[str, Any]:
    return finite_differences.traces(config_of(case.opt, SHAPES), PROBLEM, oracle_run(case))


def allowance(case: Case) -> float:
    return THIRD_DIFFERENCES if case.approximation == "full" else FINITE_DIFFERENCES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle_equals_finite_differences(case: Case) -> None:
    run, found = oracle_run(case), differences(case)
    for trace, want in found.items():
        got = getattr(run[-1], trace)
        if trace in ("V", "Bv", "M", "Bm") and not np.any(want):
            assert not np.any(got), trace
            continue
        assert relative_error(got, want) < allowance(case), trace
    if case.approximation != "l":
        moved = np.max(np.abs(run[-1].B - np.eye(len(run[-1].B))))
        assert moved > 1e-3 if case.moves_beta_trace else moved == 0.0, moved


def columns_of(tangents: Any, backend: Any) -> Any:
    """Return tangents by leaf, each with a leading axis, as columns of a matrix."""
    rows = [backend.to_numpy(tangents[name]) for name in SHAPES]
    return np.concatenate([row.reshape(len(row), -1) for row in rows], axis=1).T


def core_run(case: Case, backend: Any) -> list[dict[str, Any]]:
    """Return params and states of the library, in the oracle's form, from step to step."""
    opt, config = case.opt, config_of(case.opt, SHAPES)
    params = backend.tree(tree(PROBLEM.start(), SHAPES))
    state, run = opt.init(params), []
    for t in range(STEPS):
        w = flat(params, SHAPES)
        hessian = PROBLEM.hessian(t, w)

        def hvp(tangents: Any, hessian: Any = hessian) -> Any:
            return backend.tree(tree((hessian @ columns_of(tangents, backend)).T, SHAPES))

        def third(us: Any, vs: Any, t: int = t, w: Any = w) -> Any:
            products = PROBLEM.third(t, w, columns_of(us, backend), columns_of(vs, backend))
            return backend.tree(tree(products.transpose(1, 2, 0), SHAPES))

        grads = backend.tree(tree(PROBLEM.grad(t, w), SHAPES))
        params, state = backend.settled(opt.step(params, grads, state, hvp=hvp, third=third))
        run.append(dense(params, state, config, SHAPES))
    return run


def check_core(case: Case, backend: Any) -> None:
    run, seen = core_run(case, backend), dict[str, float]()
    for t, found in enumerate(run):
        for key, got in found.items():
            want = expected(oracle_run(case)[t + 1], key, SHAPES)
            seen[key] = max(seen.get(key, 0.0), float(np.max(np.abs(want))))
            assert relative_error(got, want, seen[key]) < ORACLE, (t, key)
    traces = [key for key in run[-1] if key.partition("/")[0] in differences(case)]
    assert "H" in traces
    assert ("B" in traces) == case.moves_beta_trace
    for key in traces:
        want = expected(SimpleNamespace(**differences(case)), key, SHAPES)
        assert relative_error(run[-1][key], want) < allowance(case), key


@pytest.mark.parametrize("backend", ["numpy"], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_core_equals_oracle_and_finite_differences(case: Case, backend: Any) -> None:
    check_core(case, backend)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        *itertools.product(["strict", "torch", "jax"], ELSEWHERE),
        *(("dask", case) for case in ELSEWHERE[::5]),  # seconds a case, for its graphs
    ],
    indirect=["backend"],
    ids=str,
)
def test_core_runs_unchanged_on_other_arrays(case: Case, backend: Any) -> None:
    check_core(case, backend)
