"""A value together with its derivatives along given directions.

An update rule is one elementwise formula. Fed with jets in place of arrays, the same formula
yields how its result changes along every direction that its arguments carry: the traces of
docs/mathematics.md section 3 are such derivatives, carried along a run.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Never

from metaopt.arrays import ArrayT, namespace

__all__ = ["Jet"]


@dataclass(frozen=True, slots=True, eq=False)
class Jet(Generic[ArrayT]):
    """A value and its first, and on demand second, derivatives along some directions.

    Parameters
    ----------
    value : array
    first : array, float or None, default None
        Derivative of `value`: of its shape, or with one leading axis more, an entry per direction.
        Of a variable along itself it is the number 1.0.
        None is a derivative that is zero by structure; it costs nothing and stays None through
        every operation that cannot make it anything else.
    second : array or None, default None
        Second derivatives, with two leading axes, an entry per pair of directions; `first` then has
        one. None is zero.
    order : {1, 2}, default 1
        Whether second derivatives are asked for. An operation on jets has the larger order.

    Notes
    -----
    The other operand of an operator may be a jet or a Python number, never a bare array: an array
    on the left would try to treat the jet as its own kind. Wrap it, `Jet(array)`.
    """

    value: ArrayT
    first: ArrayT | None = None
    second: ArrayT | None = None
    order: int = 1

    __array_ufunc__: ClassVar[None] = None  # else `numpy array * jet` makes an array of objects

    def __add__(self, other: Any) -> "Jet[ArrayT]":
        other = lift(other)
        return Jet(
            self.value + other.value,
            total(self.first, other.first),
            total(self.second, other.second),
            max(self.order, other.order),
        )

    def __sub__(self, other: Any) -> "Jet[ArrayT]":
        return self + (-other)

    def __mul__(self, other: Any) -> "Jet[ArrayT]":
        other = lift(other)
        order = max(self.order, other.order)
        second = total(scaled(self.second, other.value), scaled(other.second, self.value))
        return Jet(
            self.value * other.value,
            total(scaled(self.first, other.value), scaled(other.first, self.value)),
            total(second, crossed(self.first, other.first)) if order == 2 else None,
            order,
        )

    def __truediv__(self, other: Any) -> "Jet[ArrayT]":
        other = lift(other)
        order = max(self.order, other.order)
        value = self.value / other.value
        change = total(self.first, scaled(other.first, -value))
        first = None if change is None else change / other.value
        if order == 1:
            return Jet(value, first)
        bend = total(self.second, scaled(other.second, -value))
        bend = total(bend, scaled(crossed(first, other.first), -1.0))
        return Jet(value, first, None if bend is None else bend / other.value, order)

    def __neg__(self) -> "Jet[ArrayT]":
        return Jet(-self.value, scaled(self.first, -1.0), scaled(self.second, -1.0), self.order)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> "Jet[ArrayT]":
        return -self + other

    def __rtruediv__(self, other: Any) -> "Jet[ArrayT]":
        return lift(other) / self

    def __abs__(self) -> "Jet[ArrayT]":
        xp = namespace(self.value)
        return chained(self, xp.abs(self.value), xp.sign(self.value))

    def __pow__(self, other: Any) -> "Jet[ArrayT]":
        base, power = self.value, lift(other).value
        if isinstance(other, Jet) and other.first is not None:
            return exponential(other * logarithm(self))
        fixed = isinstance(power, int | float)
        if fixed and power == 0:  # else 0 times an infinite slope, at 0
            return Jet(base**power, order=self.order)
        slope, turn = power * base ** (power - 1), power * (power - 1)
        if fixed and turn == 0:
            return chained(self, base**power, slope)
        bend = lambda _: turn * base ** (power - 2) * outer(self.first, self.first)  # noqa: E731
        jet = chained(self, base**power, slope, bend)
        return Jet(jet.value, jet.first, jet.second, max(jet.order, lift(other).order))

    def __rpow__(self, other: Any) -> "Jet[ArrayT]":
        if self.first is None and self.second is None:
            return Jet(other**self.value, order=self.order)
        return exponential(self * math.log(other))

    def __bool__(self) -> Never:
        msg = (
            "a jet is neither true nor false: a branch has no derivative. In place of "
            "`x if condition else y` write metaopt.numerics.where(condition, x, y)."
        )
        raise TypeError(msg)

    def _compared(self, other: Any) -> Never:  # noqa: ARG002
        msg = (
            "a jet cannot be compared. In place of `x if a > b else y` write "
            "metaopt.numerics.where(a - b, x, y): x where a - b is positive, y elsewhere."
        )
        raise TypeError(msg)

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _compared
    __hash__ = object.__hash__


def lift(value: Any) -> Jet[Any]:
    """Return `value` as a jet; one that is not yet a jet has no derivative."""
    return value if isinstance(value, Jet) else Jet(value)


def chained(x: Jet[Any], value: Any, slope: Any, bend: Any = None) -> Jet[Any]:
    """Return the jet of a function of `x` with this value and this slope at `x.value`.

    `bend` returns from the first derivatives of the result what its second have beside the slope
    times those of `x`; a callable, for it is needed in order 2 alone. None is zero.
    """
    first, second = scaled(x.first, slope), None
    if x.order == 2:
        second = scaled(x.second, slope)
        if bend is not None and first is not None:
            second = total(second, bend(first))
    return Jet(value, first, second, x.order)


def exponential(x: Jet[Any]) -> Jet[Any]:
    """Return exp(x)."""
    value = namespace(x.value).exp(x.value)
    return chained(x, value, value, lambda first: outer(first, x.first))


def logarithm(x: Jet[Any]) -> Jet[Any]:
    """Return log(x), of what is positive."""
    value = namespace(x.value).log(x.value)
    return chained(x, value, 1.0 / x.value, lambda first: -outer(first, first))


def scaled(derivative: Any, factor: Any) -> Any:
    """Multiply a derivative, which may be None, by `factor`; 1.0 gives the very factor."""
    if type(derivative) is float and derivative == 1.0:  # no scalar of NumPy, an array here
        return factor
    return None if derivative is None else derivative * factor


def total(derivative: Any, other: Any) -> Any:
    """Add two derivatives, which may be None."""
    if derivative is None or other is None:
        return other if derivative is None else derivative
    return derivative + other


def outer(first: Any, other: Any) -> Any:
    """Return the products of all pairs of entries along the leading axes."""
    return first[:, None, ...] * other[None, ...]


def crossed(first: Any, other: Any) -> Any:
    """Return what two first derivatives, which may be None, add to the second of a product."""
    if first is None or other is None:
        return None
    return outer(first, other) + outer(other, first)
