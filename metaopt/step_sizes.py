r"""Step-size maps: from a meta-parameter :math:`\beta` to the step size :math:`\sigma(\beta)`.

docs/mathematics.md section 8. Every map is increasing and gives its value, its first two
derivatives and its inverse, elementwise on arrays of any floating dtype.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from metaopt.arrays import Array, is_number, namespace

__all__ = ["Exp", "Identity", "Sigmoid", "Softplus", "StepSizeMap"]

#: The least step size, and the inverse of the largest: its products with float32 gradients down to
#: 1e-19 are normal numbers, and so are its square and the largest's.
LEAST = 2.0**-63


class StepSizeMap(ABC):
    """A differentiable, increasing map from meta-parameters to step sizes."""

    #: The step sizes that the map can reach, an open interval.
    range: tuple[float, float]
    #: Where beta is kept: inside, step sizes and their float32 products are normal numbers, and
    #: beta is never further from where it matters than it can come back.
    beta_range: tuple[float, float] = (-math.inf, math.inf)

    @abstractmethod
    def value(self, beta: Array) -> Array:
        """Return the step sizes."""

    @abstractmethod
    def first(self, beta: Array, value: Array) -> Array:
        """Return the first derivative at `beta`, where the map has `value`."""

    @abstractmethod
    def second(self, beta: Array, value: Array) -> Array:
        """Return the second derivative at `beta`, where the map has `value`."""

    @abstractmethod
    def inverse(self, step_size: Array) -> Array:
        """Return the beta of a step size inside `range`."""


@dataclass(frozen=True, slots=True)
class Exp(StepSizeMap):
    """The exponential: positive step sizes that change by factors. The default."""

    range = (0.0, math.inf)
    beta_range = (math.log(LEAST), -math.log(LEAST))

    def value(self, beta: Array) -> Array:  # noqa: D102
        return namespace(beta).exp(beta)

    def first(self, beta: Array, value: Array) -> Array:  # noqa: ARG002, D102
        return value  # the very array, so that what it multiplies is computed once

    def second(self, beta: Array, value: Array) -> Array:  # noqa: ARG002, D102
        return value

    def inverse(self, step_size: Array) -> Array:  # noqa: D102
        return namespace(step_size).log(step_size)


@dataclass(frozen=True, slots=True)
class Identity(StepSizeMap):
    """The step size itself: it changes by differences and may turn negative."""

    range = (-math.inf, math.inf)
    beta_range = (-1.0 / LEAST, 1.0 / LEAST)

    def value(self, beta: Array) -> Array:  # noqa: D102
        return beta

    def first(self, beta: Array, value: Array) -> Array:  # noqa: ARG002, D102
        return namespace(beta).ones_like(beta)

    def second(self, beta: Array, value: Array) -> Array:  # noqa: ARG002, D102
        return namespace(beta).zeros_like(beta)

    def inverse(self, step_size: Array) -> Array:  # noqa: D102
        return step_size


@dataclass(frozen=True, slots=True)
class Softplus(StepSizeMap):
    """log(1 + exp(beta)): positive; factors while small, differences once large."""

    range = (0.0, math.inf)
    beta_range = (math.log(LEAST), 1.0 / LEAST)

    def value(self, beta: Array) -> Array:  # noqa: D102
        xp = namespace(beta)
        return xp.logaddexp(beta, xp.zeros_like(beta))

    def first(self, beta: Array, value: Array) -> Array:  # noqa: ARG002, D102
        return _logistic(beta)

    def second(self, beta: Array, value: Array) -> Array:  # noqa: ARG002, D102
        return _logistic(beta) * _logistic(-beta)

    def inverse(self, step_size: Array) -> Array:  # noqa: D102
        xp = namespace(step_size)
        return step_size + xp.log(-xp.expm1(-step_size))


@dataclass(frozen=True, slots=True)
class Sigmoid(StepSizeMap):
    r"""A sigmoid between two bounds, in log space.

    .. math::
        \log\sigma(\beta) = \log \mathrm{lo}
            + \log(\mathrm{hi} / \mathrm{lo}) / (1 + e^{-\beta})

    Parameters
    ----------
    lo, hi : float
        Bounds, 0 < lo < hi; never reached.

    Raises
    ------
    ValueError
        If they are not so.
    TypeError
        If they are no numbers.
    """

    lo: float
    hi: float

    #: Beyond, a float32 cannot tell the step size from a bound.
    beta_range = (-16.0, 16.0)

    def __post_init__(self) -> None:
        for name in ("lo", "hi"):
            value = getattr(self, name)
            if not is_number(value):
                msg = f"`{name}` must be a number; got {value!r}."
                raise TypeError(msg)
            object.__setattr__(self, name, float(value))
        if not 0.0 < self.lo < self.hi < math.inf:
            msg = f"`lo` and `hi` must satisfy 0 < lo < hi < inf; got {self.lo} and {self.hi}."
            raise ValueError(msg)

    @property
    def range(self) -> tuple[float, float]:  # type: ignore[override]
        """The two bounds."""
        return (self.lo, self.hi)

    @property
    def _log_ratio(self) -> float:
        return math.log(self.hi) - math.log(self.lo)

    def value(self, beta: Array) -> Array:  # noqa: D102
        xp = namespace(beta)
        return xp.exp(_logistic(beta) * self._log_ratio + math.log(self.lo))

    def first(self, beta: Array, value: Array) -> Array:  # noqa: D102
        return value * self._slope(beta)

    def second(self, beta: Array, value: Array) -> Array:  # noqa: D102
        slope = self._slope(beta)
        return value * slope * (slope + _logistic(-beta) - _logistic(beta))

    def _slope(self, beta: Array) -> Array:
        """Return the first derivative of the logarithm."""
        return self._log_ratio * (_logistic(beta) * _logistic(-beta))

    def inverse(self, step_size: Array) -> Array:  # noqa: D102
        xp = namespace(step_size)
        return xp.log(xp.log(step_size / self.lo)) - xp.log(-xp.log(step_size / self.hi))


def _logistic(beta: Array) -> Array:
    """Return 1 / (1 + exp(-beta)), accurate and without overflow at either end."""
    xp = namespace(beta)
    return xp.exp(-xp.logaddexp(-beta, xp.zeros_like(beta)))


NAMED: dict[str, StepSizeMap] = {"exp": Exp(), "identity": Identity(), "softplus": Softplus()}


def step_size_map(sigma: Any) -> StepSizeMap:
    """Return the map that `sigma` names or is; raise ValueError for anything else."""
    if isinstance(sigma, StepSizeMap):
        return sigma
    if isinstance(sigma, str) and sigma in NAMED:
        return NAMED[sigma]
    msg = (
        f"`sigma` must be one of {', '.join(map(repr, NAMED))}, or a map such as "
        f"metaopt.Sigmoid(lo, hi); got {sigma!r}."
    )
    raise ValueError(msg)
