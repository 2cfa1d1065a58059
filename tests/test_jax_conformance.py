"""The adapter of metaopt_jax passes the conformance suite without jit too.

With it, it has a column of the suite's own, test_conformance.py.
"""

from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("jax")
pytest.importorskip("optax")

from metaopt_conformance.backends import find
from metaopt_conformance.cases import Case
from metaopt_conformance.jax_adapter import Optimizer
from metaopt_conformance.suite import run

CASES = [
    "base=AdamW,meta=Adam,curvature=exact,approximation=2x2,blocks=tensor,steps=3",
    "base=RMSprop,meta=Adam,curvature=exact,approximation=full,steps=2",
    "base=Lion,meta=Lion,blocks=weight,lr=by name,steps=3",
    "base=SGDm,meta=RMSprop,sigma=softplus,discount=0.9,steps=3",
    "base=AdamW,meta=Adam,blocks=tensor,discount=0.9 and 1.0,steps=3",
]


def test_one_operation_at_a_time_it_passes() -> None:
    backend = replace(find("jax"), optimizer=partial(Optimizer, compiled=False))
    cases = [Case.parse(case) for case in CASES]
    outcomes = [
        outcome
        for outcome in run(backend, families=["trajectory"], cases=cases)
        if outcome.family == "adapter"
    ]
    assert len(outcomes) == len(CASES)
    assert [outcome for outcome in outcomes if outcome.status != "passed"] == []
