"""Which combinations of options are checked."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from metaopt_conformance.cases import OPTIONS, Case

__all__ = ["covering"]

#: A value of an option.
Choice = tuple[str, Any]

#: Options whose values make those of others possible: chosen first.
ENABLING = ("base", "meta", "curvature", "blocks", "dtype")


def covering(plain: Case, options: Mapping[str, Sequence[Any]] = OPTIONS) -> list[Case]:
    """Return cases in which any two values of two options that go together meet at least once.

    Greedy: a case starts from a pair of values not yet met, and takes for every other option, in
    turn, the value by which most new pairs meet. Deterministic.

    Parameters
    ----------
    plain : Case
        What all cases have but for the options.
    options : mapping of field to its values
    """
    choices = [(name, value) for name, values in options.items() for value in values]
    unmet: dict[Choice, set[Choice]] = defaultdict(set)
    for one, other in itertools.permutations(choices, 2):
        if one[0] != other[0]:
            unmet[one].add(other)
    cases: list[Case] = []
    for one, other in itertools.combinations(choices, 2):
        if other not in unmet[one]:
            continue
        case = _completed(plain, dict([one, other]), options, unmet)
        if case is None:
            unmet[one].discard(other)
            unmet[other].discard(one)
            continue
        cases.append(case)
        met = {(name, getattr(case, name)) for name in options}
        for choice in met:
            unmet[choice] -= met
    return cases


def _completed(
    plain: Case,
    chosen: dict[str, Any],
    options: Mapping[str, Sequence[Any]],
    unmet: Mapping[Choice, set[Choice]],
) -> Case | None:
    """Return a possible case with the chosen values, or None if there is none."""
    if not _completable(plain, chosen, options):
        return None
    for name in sorted(options, key=lambda name: name not in ENABLING):
        if name in chosen:
            continue
        so_far = set(chosen.items())
        new = {value: len(unmet[name, value] & so_far) for value in options[name]}
        for value in sorted(new, key=new.__getitem__, reverse=True):
            if _completable(plain, chosen | {name: value}, options):
                chosen = chosen | {name: value}
                break
        else:
            return None
    return replace(plain, **chosen)


def _completable(
    plain: Case, chosen: Mapping[str, Any], options: Mapping[str, Sequence[Any]]
) -> bool:
    """Say whether a choice is possible, or will be by the values of options left."""
    left = [name for name in ENABLING if name in options and name not in chosen]
    return any(
        _possible(replace(plain, **chosen, **dict(zip(left, values, strict=True))))
        for values in itertools.product(*(options[name] for name in left))
    )


_possible = cache(Case.possible)
