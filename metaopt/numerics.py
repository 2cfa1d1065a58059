"""Elementwise functions for arrays and jets, careful where the literal formula is not.

Update rules call these and not the namespace's own, so that the same formula takes both.
"""

import builtins
import math
from typing import Any

from metaopt.arrays import Array, ArrayT, namespace
from metaopt.jets import Jet, chained, crossed, exponential, lift, logarithm, outer

#: The smallest normal number of float32; libraries that flush to zero know none below it.
SMALLEST = 2.0**-126

__all__ = [
    "abs",
    "divide",
    "exact_sum",
    "exp",
    "hypot",
    "log",
    "logistic",
    "maximum",
    "minimum",
    "one_minus_power",
    "positive",
    "power",
    "reciprocal",
    "sign",
    "softplus",
    "sqrt",
    "where",
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


def exact_sum(x: Any, y: Any) -> tuple[Any, Any]:
    """Return the sum as it is rounded, and what rounding took from it: Knuth's two-sum.

    Parameters
    ----------
    x, y : arrays
    """
    rounded = x + y
    part = rounded - x
    return rounded, (x - (rounded - part)) + (y - part)


def hypot(x: ArrayT, y: ArrayT) -> ArrayT:
    """Return the root of x*x + y*y, also where these squares leave the range of the dtype.

    Parameters
    ----------
    x, y : arrays or jets
    """
    one, other = lift(x).value, lift(y).value
    xp = namespace(one)
    size = xp.maximum(xp.abs(one), xp.abs(other))
    # it cancels out, and with it the derivative that it is not given
    size = xp.where(size < SMALLEST, xp.ones_like(size), size)
    if isinstance(x, Jet) or isinstance(y, Jet):
        size = Jet(size)
    part, rest = x / size, y / size
    return size * sqrt(part * part + rest * rest)


def sign(x: ArrayT) -> ArrayT:
    """Return the sign; its derivative is zero by structure.

    Parameters
    ----------
    x : array or jet
    """
    if isinstance(x, Jet):
        return _as(x, Jet(sign(x.value), order=x.order))
    xp = namespace(x)
    own = getattr(type(x), "sign", None)
    if own is not None:  # torch's; the wrapper of it assigns NaN by a mask, which no graph can
        # a comparison, where isnan would be called number by number in a loop over vectors
        return xp.where(x == x, own(x), x)
    return xp.sign(x)


def positive(x: ArrayT) -> ArrayT:
    """Return 1 where x is positive, else 0, in its dtype; its derivative is zero by structure.

    Parameters
    ----------
    x : array or jet
    """
    if isinstance(x, Jet):
        return _as(x, Jet(positive(x.value), order=x.order))
    return where(x, namespace(x).ones_like(x), 0.0)


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


def where(condition: Any, x: Any, y: Any) -> Any:
    """Return x where `condition` is positive, and y elsewhere; the derivative likewise.

    In place of a comparison: `where(a - b, x, y)` is x where a > b.

    Parameters
    ----------
    condition : array or jet
        Floating, or boolean for an array; no derivative passes through it.
    x, y : arrays, jets or numbers
        One of them no number.

    Raises
    ------
    TypeError
        If both are numbers, which have no dtype: multiply one by `positive(condition)`.
    """
    if not hasattr(lift(x).value, "dtype") and not hasattr(lift(y).value, "dtype"):
        msg = f"`x` or `y` must be an array; got {x!r} and {y!r}. See metaopt.numerics.positive."
        raise TypeError(msg)
    value = lift(condition).value
    xp = namespace(value)
    return _chosen(value if value.dtype == xp.bool else value > 0.0, x, y)


def maximum(x: Any, y: Any) -> Any:
    """Return the larger of x and y, with its derivative; that of x where they are equal.

    Parameters
    ----------
    x, y : arrays, jets or numbers
        One of them no number. NaN in either is NaN in the result.
    """
    one, other = lift(x).value, lift(y).value
    return _chosen((one >= other) | (one != one), x, y)


def minimum(x: Any, y: Any) -> Any:
    """Return the smaller of x and y; all else as `maximum` has it.

    Parameters
    ----------
    x, y : arrays, jets or numbers
    """
    one, other = lift(x).value, lift(y).value
    return _chosen((one <= other) | (one != one), x, y)


def _chosen(mask: Array, x: Any, y: Any) -> Any:
    """Return x where the mask is set, else y."""
    xp = namespace(mask)
    if not isinstance(x, Jet) and not isinstance(y, Jet):
        return xp.where(mask, x, y)
    one, other = lift(x), lift(y)

    value = xp.where(mask, one.value, other.value)

    def part(own: Any, others: Any) -> Any:
        if own is None and others is None:
            return None
        own, others = (0.0 if derivative is None else derivative for derivative in (own, others))
        if not hasattr(own, "dtype") and not hasattr(others, "dtype"):  # of beta along itself
            own = xp.zeros_like(value) + own
        return xp.where(mask, own, others)

    return Jet(
        value,
        part(one.first, other.first),
        part(one.second, other.second),
        max(one.order, other.order),
    )


def abs(x: ArrayT) -> ArrayT:
    """Return the absolute value; its derivative is the sign, 0 at 0.

    Parameters
    ----------
    x : array or jet
    """
    value: Any = x
    return builtins.abs(value)


def exp(x: ArrayT) -> ArrayT:
    """Return e to the power of x.

    Parameters
    ----------
    x : array or jet
    """
    return _as(x, exponential(x)) if isinstance(x, Jet) else namespace(x).exp(x)


def log(x: ArrayT) -> ArrayT:
    """Return the natural logarithm.

    Parameters
    ----------
    x : array or jet, positive
    """
    return _as(x, logarithm(x)) if isinstance(x, Jet) else namespace(x).log(x)


def softplus(x: ArrayT) -> ArrayT:
    """Return log(1 + exp(x)), accurate and without overflow at either end.

    Parameters
    ----------
    x : array or jet
    """
    if isinstance(x, Jet):
        slope, rest = logistic(x.value), logistic(-x.value)
        bend = lambda first: rest * outer(first, x.first)  # noqa: E731
        return _as(x, chained(x, softplus(x.value), slope, bend))
    xp = namespace(x)
    return xp.logaddexp(x, xp.zeros_like(x))


def logistic(x: ArrayT) -> ArrayT:
    """Return 1 / (1 + exp(-x)), accurate and without overflow at either end.

    Parameters
    ----------
    x : array or jet
    """
    return exp(-softplus(-x))


def power(x: Any, y: Any) -> Any:
    """Return x to the power of y, as `x ** y` does.

    Parameters
    ----------
    x, y : arrays, jets or numbers
        One of them no number. Where y is none, x is to be positive. For 1 - x**y see
        `one_minus_power`.
    """
    return x**y


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
