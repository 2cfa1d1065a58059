"""What the core's curvature options need, by automatic differentiation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from metaopt.arrays import Leaves, cast
from metaopt.plan import Plan
from metaopt_jax.leaves import Structure
from metaopt_jax.sharded import by_types, in_types

__all__ = ["derivatives"]

Tangents = Mapping[str, Any]


def derivatives(
    plan: Plan,
    structure: Structure,
    params: Any,
    value_fn: Callable[[Any], Any] | None,
    hvp: Callable[[Any], Any] | None,
    third: Callable[[Any, Any], Any] | None,
) -> dict[str, Any]:
    """Return the core's `hvp` and `third` where it needs them.

    Parameters
    ----------
    plan : Plan
    structure : Structure
    params : pytree
    value_fn : callable or None
        From params to the loss.
    hvp, third : callable or None
        In place of `value_fn`: from a tangent like `params` to the Hessian times it, from two to
        the third derivative along both. Tangents have the dtypes of the state.

    Raises
    ------
    ValueError
        If what the curvature needs is not given.
    """
    found: dict[str, Any] = {}
    for name, needed in (
        ('curvature="exact"', plan.curvature == "exact" and hvp is None),
        ('approximation="full"', plan.third and third is None),
    ):
        if needed and value_fn is None:
            msg = (
                f"`value_fn` is needed by `{name}`; got None. Pass the loss of this step to "
                "`update`, as a function of params alone: "
                "update(grads, state, params, value_fn=lambda params: loss(params, batch))."
            )
            raise ValueError(msg)

    typed = in_types(jax.tree.leaves(params))

    def given(function: Callable[..., Any]) -> Callable[..., Any]:
        return by_types(function, params) if typed else function

    if plan.curvature == "exact":
        found["hvp"] = _by_columns(structure, given(hvp or _product(value_fn, params)))
    if plan.third:
        found["third"] = _by_pairs(structure, given(third or _third(value_fn, params)))
    return found


def _product(value_fn: Any, params: Any) -> Callable[[Any], Any]:
    """Return the Hessian times a tangent, forward over reverse."""
    return lambda tangent: _along(jax.grad(value_fn), params, tangent)


def _third(value_fn: Any, params: Any) -> Callable[[Any, Any], Any]:
    """Return the third derivative along two tangents."""
    return lambda one, other: _along(lambda at: _along(jax.grad(value_fn), at, one), params, other)


def _by_columns(
    structure: Structure, product: Callable[[Any], Any]
) -> Callable[[Tangents], Leaves[Any]]:
    """Return a function of one tangent as the core's of all columns at once, by name."""
    columns = jax.vmap(product)
    return lambda tangents: structure.leaves(columns(structure.pytree(tangents)), "hvp(...)")


def _by_pairs(
    structure: Structure, along: Callable[[Any, Any], Any]
) -> Callable[[Tangents, Tangents], Leaves[Any]]:
    """Return a function of two tangents as the core's of all pairs of columns at once, by name."""
    pairs = jax.vmap(jax.vmap(along, (None, 0)), (0, None))
    return lambda ones, others: structure.leaves(
        pairs(structure.pytree(ones), structure.pytree(others)), "third(...)"
    )


def _along(function: Callable[[Any], Any], params: Any, tangent: Any) -> Any:
    """Return a function's derivative at `params` along a tangent, in the tangent's dtypes."""
    at = jax.tree.map(lambda param, part: cast(param, part.dtype), params, tangent)
    return jax.jvp(function, (at,), (tangent,))[1]
