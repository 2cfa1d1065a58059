"""Cases of a test of which some always run and the others where slow tests are asked for."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

__all__ = ["selected", "slow_but"]


def slow_but(always: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return cases for `parametrize`, those that are not in `always` marked slow."""
    cases = list(cases)
    missing = [case for case in always if case not in cases]
    if missing:
        msg = f"`always` must be some of the cases; got {missing}."
        raise ValueError(msg)
    return [
        case if case in always else pytest.param(case, marks=pytest.mark.slow) for case in cases
    ]


def selected(request: pytest.FixtureRequest, *names: str) -> set[Any]:
    """Return which values of parameters the tests of a module's fixture will run with."""
    found = set()
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path:
            values = tuple(item.callspec.params[name] for name in names)
            found.add(values if len(names) > 1 else values[0])
    return found
