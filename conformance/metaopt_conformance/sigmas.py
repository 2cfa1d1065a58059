"""The maps from meta-parameters to step sizes, by hand: docs/mathematics.md section 8."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from metaopt_conformance.updates import Vector

__all__ = ["Decay", "Exp", "Identity", "Sigma", "Sigmoid", "Softplus"]

SMALL, LARGE = 2.0**-63, 2.0**63


class Sigma(Protocol):
    """A map: its value, its first two derivatives, and its inverse."""

    @property
    def beta_range(self) -> tuple[float, float]:
        """Where beta is kept."""
        ...

    def value(self, beta: Vector) -> Vector:
        """Return the step sizes of meta-parameters."""
        ...

    def first(self, beta: Vector) -> Vector:
        """Return the derivative of `value`."""
        ...

    def second(self, beta: Vector) -> Vector:
        """Return the second derivative of `value`."""
        ...

    def inverse(self, sizes: Vector) -> Vector:
        """Return the meta-parameters of step sizes."""
        ...


@dataclass(frozen=True)
class Exp:
    """The exponential."""

    beta_range: ClassVar[tuple[float, float]] = (np.log(SMALL), np.log(LARGE))

    def value(self, beta: Vector) -> Vector:  # noqa: D102
        return np.exp(beta)

    def first(self, beta: Vector) -> Vector:  # noqa: D102
        return np.exp(beta)

    def second(self, beta: Vector) -> Vector:  # noqa: D102
        return np.exp(beta)

    def inverse(self, sizes: Vector) -> Vector:  # noqa: D102
        return np.log(sizes)


@dataclass(frozen=True)
class Decay:
    """1 less the exponential of -beta."""

    beta_range: ClassVar[tuple[float, float]] = (2.0**-20, 15.5)

    def value(self, beta: Vector) -> Vector:  # noqa: D102
        return 1.0 - np.exp(-beta)

    def first(self, beta: Vector) -> Vector:  # noqa: D102
        return np.exp(-beta)

    def second(self, beta: Vector) -> Vector:  # noqa: D102
        return -np.exp(-beta)

    def inverse(self, sizes: Vector) -> Vector:  # noqa: D102
        return -np.log(1.0 - sizes)


@dataclass(frozen=True)
class Identity:
    """The step size itself."""

    beta_range: ClassVar[tuple[float, float]] = (-LARGE, LARGE)

    def value(self, beta: Vector) -> Vector:  # noqa: D102
        return beta

    def first(self, beta: Vector) -> Vector:  # noqa: D102
        return np.ones_like(beta)

    def second(self, beta: Vector) -> Vector:  # noqa: D102
        return np.zeros_like(beta)

    def inverse(self, sizes: Vector) -> Vector:  # noqa: D102
        return sizes


@dataclass(frozen=True)
class Softplus:
    """The logarithm of 1 + exp(beta)."""

    beta_range: ClassVar[tuple[float, float]] = (np.log(SMALL), LARGE)

    def value(self, beta: Vector) -> Vector:  # noqa: D102
        return np.logaddexp(beta, 0.0)

    def first(self, beta: Vector) -> Vector:  # noqa: D102
        return _logistic(beta)

    def second(self, beta: Vector) -> Vector:  # noqa: D102
        return _logistic(beta) * _logistic(-beta)

    def inverse(self, sizes: Vector) -> Vector:  # noqa: D102
        return np.log(np.expm1(sizes))


@dataclass(frozen=True)
class Sigmoid:
    """From lo to hi, a logistic function in the logarithm."""

    lo: float
    hi: float
    beta_range: ClassVar[tuple[float, float]] = (-16.0, 16.0)

    def value(self, beta: Vector) -> Vector:  # noqa: D102
        return np.asarray(self.lo * (self.hi / self.lo) ** _logistic(beta))

    def first(self, beta: Vector) -> Vector:  # noqa: D102
        return self.value(beta) * self._slope(beta)

    def second(self, beta: Vector) -> Vector:  # noqa: D102
        slope = self._slope(beta)
        return self.value(beta) * (slope**2 + slope * (1.0 - 2.0 * _logistic(beta)))

    def inverse(self, sizes: Vector) -> Vector:  # noqa: D102
        share = np.log(sizes / self.lo) / np.log(self.hi / self.lo)
        return np.log(share / (1.0 - share))

    def _slope(self, beta: Vector) -> Vector:
        """Return the derivative of the logarithm."""
        return np.log(self.hi / self.lo) * _logistic(beta) * _logistic(-beta)


def _logistic(beta: Vector) -> Vector:
    """Return the logistic function; 1 less it is that of the negative, which keeps its digits."""
    return 1.0 / (1.0 + np.exp(-beta))
