"""Whole runs against the dense oracle and against differences of trajectories.

The checks are those of `metaopt_conformance`, on more cases than its users need: every pair of
rules with every approximation, discount, order and kind of moments, and options drawn at random.
"""

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metaopt_conformance.backends import UnavailableError, find
from metaopt_conformance.cases import OPTIONS, Case
from metaopt_conformance.families import FAMILIES
from metaopt_conformance.runs import Under
from metaopt_conformance.table import BASES, METAS

CASES = [
    case
    for case in (
        Case(
            base=base,
            meta=meta,
            curvature="exact",
            approximation=approximation,
            discount=discount,
            blocks=blocks,
            delayed=delayed,
            meta_first=meta_first,
        )
        for base, meta, approximation, discount, blocks, delayed, meta_first in itertools.product(
            BASES,
            METAS,
            ("l", "2x2", "full"),
            (0.0, 0.9, 1.0),
            ("scalar", "tensor"),
            (False, True),
            (False, True),
        )
    )
    if case.possible()
]
#: Where Y hardly moves: differences of it would show nothing.
STILL = {"base=SGDm,meta=NAdam,curvature=exact,approximation=full,discount=0.9"}
CASES = [case for case in CASES if str(case) not in STILL]


def under(name: str) -> Under:
    try:
        return Under(find(name))
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_traces_equal_differences_of_whole_runs(case: Case) -> None:
    """A `Skip` of the check, where Y moves too little to show anything, is a failure here."""
    FAMILIES["traces"].run(under("numpy"), case)
    FAMILIES["trajectory"].run(under("numpy"), case)


@pytest.mark.parametrize("name", ["strict", "torch", "jax"])
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.discount == 0.9 and case.blocks == "tensor"][::3],
    ids=str,
)
def test_other_arrays_take_the_same_steps(case: Case, name: str) -> None:
    FAMILIES["trajectory"].run(under(name), case)


def drawn() -> Any:
    """Return cases with every option drawn by itself."""
    options = {"base": tuple(BASES), "meta": tuple(METAS), **OPTIONS}
    values = {name: st.sampled_from(list(choices)) for name, choices in options.items()}
    return st.builds(Case, steps=st.just(8), **values).filter(Case.possible)


@given(case=drawn())
@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_options_drawn_together(case: Case) -> None:
    FAMILIES["trajectory"].run(under("numpy"), case)
