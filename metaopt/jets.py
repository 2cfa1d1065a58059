"""A value together with its derivatives along given directions.

An update rule is one elementwise formula. Fed with jets in place of arrays, the same formula
yields how its result changes along every direction that its arguments carry: the traces of
docs/mathematics.md section 3 are such derivatives, carried along a run.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Generic

from metaopt.arrays import ArrayT

__all__ = ["Jet"]


@dataclass(frozen=True, slots=True)
class Jet(Generic[ArrayT]):
    """A value and its first derivative along some directions.

    Parameters
    ----------
    value : array
    first : array or None, default None
        Derivative of `value`: of its shape, or with one leading axis more, an entry per direction.
        None is a derivative that is zero by structure; it costs nothing and stays None through
        every operation that cannot make it anything else.

    Notes
    -----
    The other operand of an operator may be a jet or a Python number, never a bare array: an array
    on the left would try to treat the jet as its own kind. Wrap it, `Jet(array)`.
    """

    value: ArrayT
    first: ArrayT | None = None

    __array_ufunc__: ClassVar[None] = None  # else `numpy array * jet` makes an array of objects

    def __add__(self, other: Any) -> "Jet[ArrayT]":
        other = lift(other)
        return Jet(self.value + other.value, _sum(self.first, other.first))

    def __sub__(self, other: Any) -> "Jet[ArrayT]":
        return self + (-other)

    def __mul__(self, other: Any) -> "Jet[ArrayT]":
        other = lift(other)
        return Jet(
            self.value * other.value,
            _sum(scaled(self.first, other.value), scaled(other.first, self.value)),
        )

    def __truediv__(self, other: Any) -> "Jet[ArrayT]":
        other = lift(other)
        quotient = self.value / other.value
        change = _sum(self.first, scaled(other.first, -quotient))
        return Jet(quotient, None if change is None else change / other.value)

    def __neg__(self) -> "Jet[ArrayT]":
        return Jet(-self.value, None if self.first is None else -self.first)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> "Jet[ArrayT]":
        return -self + other

    def __rtruediv__(self, other: Any) -> "Jet[ArrayT]":
        return lift(other) / self


def lift(value: Any) -> Jet[Any]:
    """Return `value` as a jet; one that is not yet a jet has no derivative."""
    return value if isinstance(value, Jet) else Jet(value)


def scaled(first: Any, factor: Any) -> Any:
    """Multiply a derivative, which may be None, by `factor`."""
    return None if first is None else first * factor


def _sum(first: Any, other: Any) -> Any:
    if first is None or other is None:
        return other if first is None else first
    return first + other
