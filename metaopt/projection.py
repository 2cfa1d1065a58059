"""Projections of weights between steps, with the derivative that their traces are pushed through.

docs/mathematics.md section 10, *Projections*.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from metaopt.arrays import Leaves, cast, namespace, per_leaf
from metaopt.inputs import check_leaf
from metaopt.jets import Jet, lift
from metaopt.plan import Plan

__all__ = ["elementwise"]

#: From weights and a tangent by leaf name, of equal shapes, to the weights after the projection and
#: its derivative along the tangent. Leaves that stay as they are may be left out of both.
JVP: TypeAlias = Callable[
    [Mapping[str, Any], Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, Any]]
]


def elementwise(function: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> JVP:
    """Return an elementwise projection with its derivative, for `MetaOptimize.project`.

    Parameters
    ----------
    function : callable
        From weights by leaf name to projected ones; leaves that stay may be left out. Weights come
        as jets: write it with operators and the functions of `metaopt.numerics`, and an array on
        the right, `w * mask`.

    Returns
    -------
    callable
        From weights and tangents to projected weights and the derivative along the tangents.

    Examples
    --------
    >>> import numpy as np
    >>> from metaopt import numerics
    >>> clip = elementwise(lambda w: {"w": numerics.minimum(w["w"], 1.0)})
    >>> weights, tangents = clip({"w": np.array([0.5, 2.0])}, {"w": np.array([3.0, 3.0])})
    >>> weights["w"].tolist(), tangents["w"].tolist()
    ([0.5, 1.0], [3.0, 0.0])
    """

    def jvp(
        weights: Mapping[str, Any], tangents: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        given = per_leaf((name, Jet(weights[name], tangents[name])) for name in weights)
        found = {name: lift(jet) for name, jet in _mapping(function(given)).items()}
        return (
            {name: jet.value for name, jet in found.items()},
            {
                name: namespace(jet.value).zeros_like(jet.value) if jet.first is None else jet.first
                for name, jet in found.items()
            },
        )

    return jvp


def pushed(
    jvp: JVP, plan: Plan, weights: Leaves[Any], traces: Leaves[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the projected weights, and the traces pushed through, of the leaves that have both.

    In their compute dtypes. Traces with a leading axis are pushed column by column.

    Raises
    ------
    ValueError, TypeError
        If `jvp` returns something else than it should.
    """
    leading = plan.horizons + plan.layout.leading
    if not leading:
        return _checked(jvp(weights, traces), plan, weights)
    shapes, found = plan.shapes, []
    for column in itertools.product(*map(range, leading)):
        tangents = per_leaf((name, trace[(*column, ...)]) for name, trace in traces.items())
        found.append(_checked(jvp(weights, tangents), plan, weights))
    new = found[0][0]

    def together(name: str, weight: Any) -> Any:
        xp = namespace(weight)
        return xp.reshape(xp.stack([some[name] for _, some in found]), leading + shapes[name])

    return new, {name: together(name, weight) for name, weight in new.items()}


def _checked(found: Any, plan: Plan, weights: Leaves[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `jvp` returned, in the compute dtypes, or raise."""
    if not isinstance(found, tuple) or len(found) != 2:
        msg = f"`jvp` must return weights and tangents, a pair of mappings; got {found!r}."
        raise TypeError(msg)
    new, tangents = map(_mapping, found)
    if new.keys() != tangents.keys() or not new.keys() <= weights.keys():
        msg = (
            f"`jvp` must return weights and tangents of the same leaves, any of "
            f"{', '.join(weights)}; got {sorted(new)} and {sorted(tangents)}."
        )
        raise ValueError(msg)
    for part in (new, tangents):
        for name, array in part.items():
            check_leaf(f"jvp(...)[{name!r}]", array, weights[name], plan.shapes[name])
    dtypes = plan.dtypes
    return (
        {name: cast(array, dtypes[name]) for name, array in new.items()},
        {name: cast(array, dtypes[name]) for name, array in tangents.items()},
    )


def _mapping(found: Any) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        msg = (
            "a projection must return a mapping of leaf name to weights, new ones and not the old "
            f"ones changed in place; got {type(found).__name__}."
        )
        raise TypeError(msg)
    return found
