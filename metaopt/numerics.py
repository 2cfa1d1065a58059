"""Elementwise functions for arrays and jets, careful where the literal formula is not.

Update rules call these and not the namespace's own, so that the same formula takes both.
"""

import math
from typing import Any

from metaopt.arrays import ArrayT, namespace
from metaopt.jets import Jet, chained, crossed, lift, outer

#: The smallest normal number of float32; libraries that flush to zero know none below it.
SMALLEST = 2.0**-126

__all__ = [
    "divide",
    "one_minus_power",
    "only_where_positive",
    "positive",
    "reciprocal",
    "sign",
    "sqrt",
]


def sqrt(x: ArrayT) -> ArrayT:
    """Return the square root; its derivative is taken as 0 where the root is 0.

    Parameters
    ----------
    x : array or jet, nowhere negative
    """
    if isinstance(x, Jet):
        root = sqrt(x.value)
        inverse = reciprocal(root)
        # by root_j, not by the cube of 1 / root, which small roots put out of a float32's range
        bend = lambda first: -inverse * outer(first, first)  # noqa: E731
        return _as(x, chained(x, root, 0.5 * inverse, bend))
    return namespace(x).sqrt(x)


def sign(x: ArrayT) -> ArrayT:
    """Return the sign; its derivative is zero by structure.

    Parameters
    ----------
    x : array or jet
    """
    if isinstance(x, Jet):
        return _as(x, Jet(sign(x.value), order=x.order))
    return namespace(x).sign(x)


def positive(x: ArrayT) -> ArrayT:
    """Return 1 where x is positive, else 0, in its dtype; its derivative is zero by structure.

    Parameters
    ----------
    x : array or jet
    """
    if isinstance(x, Jet):
        return _as(x, Jet(positive(x.value), order=x.order))
    return only_where_positive(x, namespace(x).ones_like(x))


def reciprocal(x: ArrayT) -> ArrayT:
    """Return 1/x, and 0 where x is 0; the derivative likewise.

    Parameters
    ----------
    x : array or jet
    """
    if isinstance(x, Jet):
        inverse = reciprocal(x.value)
        bend = lambda first: -inverse * crossed(x.first, first)  # noqa: E731
        return _as(x, chained(x, inverse, -(inverse * inverse), bend))
    xp = namespace(x)
    zero = x == 0.0
    return xp.where(zero, 0.0, 1.0 / xp.where(zero, 1.0, x))


def divide(numerator: ArrayT, denominator: ArrayT, eps: Any = 0.0) -> ArrayT:
    """Return numerator / (denominator + eps), value and derivative 0 where the divisor is 0.

    Parameters
    ----------
    numerator : array or jet
    denominator : array or jet, nowhere negative
    eps : float, not negative, default 0.0
        Only 0 needs the guard, and only then is it paid for. Below the least normal float32 it
        counts as 0: there it would be rounded, or flushed, to almost nothing.
    """
    if isinstance(eps, int | float) and eps < SMALLEST:
        return numerator * reciprocal(denominator)
    return numerator / (denominator + eps)


def only_where_positive(condition: ArrayT, x: ArrayT) -> ArrayT:
    """Return x where `condition` is positive, and 0 elsewhere; the derivative likewise.

    Parameters
    ----------
    condition : array or jet
        A jet's value is what counts.
    x : array or jet, of the same shape
    """
    if isinstance(x, Jet):
        value, first, second = (
            None if part is None else only_where_positive(condition, part)
            for part in (x.value, x.first, x.second)
        )
        return _as(x, Jet(value, first, second, x.order))
    xp = namespace(x)
    return xp.where(lift(condition).value > 0.0, x, 0.0)


def one_minus_power(beta: Any, count: ArrayT) -> ArrayT:
    """Return 1 - beta**count for 0 <= beta < 1, to the last digit also where beta is near 1.

    In float32 the literal `1 - 0.999**t` puts the first step 7e-6 off, this form 2e-7.

    Parameters
    ----------
    beta : float or jet
    count : array or jet, floating dtype
    """
    if isinstance(beta, Jet) or isinstance(count, Jet):
        base, power = lift(beta), lift(count)
        value = one_minus_power(base.value, power.value)
        if base.first is None:
            return _as(count, Jet(value, order=max(base.order, power.order)))
        t = power.value
        slope = -t * base.value ** (t - 1.0)
        # at t = 1 the factor is 0, whatever the power; abs keeps it finite for a beta of 0
        twist = -t * (t - 1.0) * base.value ** abs(t - 2.0)
        bend = lambda _: twist * outer(base.first, base.first)  # noqa: E731
        return _as(count, chained(base, value, slope, bend))
    xp = namespace(count)
    if isinstance(beta, int | float):
        if beta == 0.0:  # it has no logarithm; 0**0 is 1
            return xp.where(count == 0.0, xp.zeros_like(count), xp.ones_like(count))
        return -xp.expm1(count * math.log(beta))
    return -xp.expm1(count * xp.log(beta))


def _as(like: ArrayT, jet: Any) -> ArrayT:  # noqa: ARG001
    """Return `jet`; where the argument is a jet, so is the result, which a checker cannot see."""
    return jet
