r"""Step-size maps: from a meta-parameter :math:`\beta` to the step size :math:`\sigma(\beta)`.

docs/mathematics.md section 8. Every map is increasing and one formula on arrays or jets, from which
its derivatives follow; and its inverse. All is elementwise, in any floating dtype.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaopt.arrays import Array, ArrayT, is_number, namespace
from metaopt.jets import Jet, outer
from metaopt.numerics import exp, logistic, softplus

__all__ = ["Decay", "Exp", "Identity", "Sigmoid", "Softplus", "StepSizeMap"]

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
    def value(self, beta: ArrayT) -> ArrayT:
        """Return the step sizes.

        Parameters
        ----------
        beta : array or jet
            Use operators with Python numbers and the functions of `metaopt.numerics`.
        """

    @abstractmethod
    def inverse(self, step_size: Array) -> Array:
        """Return the beta of a step size inside `range`."""


@dataclass(frozen=True, slots=True)
class Exp(StepSizeMap):
    """The exponential: positive step sizes that change by factors. The default."""

    range = (0.0, math.inf)
    beta_range = (math.log(LEAST), -math.log(LEAST))

    def value(self, beta: ArrayT) -> ArrayT:  # noqa: D102
        return exp(beta)

    def inverse(self, step_size: Array) -> Array:  # noqa: D102
        return namespace(step_size).log(step_size)


@dataclass(frozen=True, slots=True)
class Identity(StepSizeMap):
    """The step size itself: it changes by differences and may turn negative."""

    range = (-math.inf, math.inf)
    beta_range = (-1.0 / LEAST, 1.0 / LEAST)

    def value(self, beta: ArrayT) -> ArrayT:  # noqa: D102
        return beta

    def inverse(self, step_size: Array) -> Array:  # noqa: D102
        return step_size


@dataclass(frozen=True, slots=True)
class Softplus(StepSizeMap):
    """log(1 + exp(beta)): positive; factors while small, differences once large."""

    range = (0.0, math.inf)
    beta_range = (math.log(LEAST), 1.0 / LEAST)

    def value(self, beta: ArrayT) -> ArrayT:  # noqa: D102
        return softplus(beta)

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
        if self.hi / self.lo == math.inf:
            msg = f"`hi` must be less than 1e308 times `lo`; got {self.lo} and {self.hi}."
            raise ValueError(msg)

    @property
    def range(self) -> tuple[float, float]:  # type: ignore[override]
        """The two bounds."""
        return (self.lo, self.hi)

    def value(self, beta: ArrayT) -> ArrayT:  # noqa: D102
        ratio = math.log(self.hi) - math.log(self.lo)
        return exp(logistic(beta) * ratio + math.log(self.lo))

    def inverse(self, step_size: Array) -> Array:  # noqa: D102
        xp = namespace(step_size)
        return xp.log(xp.log(step_size / self.lo)) - xp.log(-xp.log(step_size / self.hi))


@dataclass(frozen=True, slots=True)
class Decay(StepSizeMap):
    """1 - exp(-beta): decay rates, whose time scale 1 / (1 - value) changes by factors.

    For numbers of rules that are `metaopt.Learned`.
    """

    range = (0.0, 1.0)
    #: Beyond, a float32 cannot tell the value from 1; and where it is all but 0, beta is.
    beta_range = (2.0**-20, 15.5)

    def value(self, beta: ArrayT) -> ArrayT:  # noqa: D102
        return 1.0 - exp(-beta)

    def inverse(self, step_size: Array) -> Array:  # noqa: D102
        xp = namespace(step_size)
        return -xp.log1p(-step_size)


def is_exponential(sigma: StepSizeMap) -> bool:
    """Say whether a map is its own derivative: a change of beta then scales the step itself."""
    size = step_sizes(sigma, _inside(sigma))
    return size.first is size.value


def _inside(sigma: StepSizeMap) -> Any:
    """Return a beta whose step size lies well inside the range."""
    lo, hi = sigma.range
    size = (lo * hi) ** 0.5 if lo > 0.0 and hi < math.inf else 1e-3
    if not lo < size < hi:
        size = lo + 1e-3 if hi == math.inf else 0.5 * (max(lo, -1.0) + hi)
    return np.asarray(sigma.inverse(np.asarray(size)))


def check_map(sigma: StepSizeMap) -> None:
    """Raise unless a map of one's own has a range, and a formula that derivatives pass through."""
    span = getattr(sigma, "range", None)
    if not isinstance(span, tuple) or len(span) != 2 or not span[0] < span[1]:
        msg = f"`sigma` must have a `range`, a pair lo < hi; got {sigma!r} with {span!r}."
        raise ValueError(msg)
    try:
        beta = _inside(sigma)
        sizes = step_sizes(sigma, beta)
        fits = sizes.first is not None and sizes.value.shape == sizes.first.shape == beta.shape
    except Exception as error:  # whatever a formula does that jets cannot
        found = str(error)
    else:
        found = "" if fits else "it returns no step size with a derivative"
    if found:
        msg = (
            "`sigma` must have a `value` that is one formula of beta, an array or a jet: operators "
            f"with Python numbers and functions of metaopt.numerics; got {sigma!r}: {found}."
        )
        raise ValueError(msg)


def step_sizes(sigma: StepSizeMap, beta: Array, tangent: Any = None, *, order: int = 1) -> Jet[Any]:
    """Return the step sizes of beta with their derivatives, pushed through the map's formula.

    Parameters
    ----------
    sigma : StepSizeMap
    beta : array
    tangent : array, optional
        Derivative of beta, of its shape or with a leading axis; by default beta's along itself, 1.
        Where the map's derivative is its value, the result's is then the very array.
    order : {1, 2}
        2 for second derivatives, along a tangent with a leading axis.
    """
    variable: Any = Jet(beta, 1.0 if tangent is None else tangent, order=order)
    jet = sigma.value(variable)
    first, second = jet.first, jet.second
    if isinstance(first, int | float) and not isinstance(first, np.generic):  # beta's 1, scaled
        first = namespace(beta).zeros_like(beta) + first
    if order == 2 and second is None:
        second = namespace(beta).zeros_like(outer(first, first))
    return Jet(jet.value, first, second, order)


NAMED: dict[str, StepSizeMap] = {"exp": Exp(), "identity": Identity(), "softplus": Softplus()}


def step_size_map(sigma: Any) -> StepSizeMap:
    """Return the map that `sigma` names or is; raise ValueError for anything else."""
    if isinstance(sigma, StepSizeMap):
        if type(sigma).__module__ != __name__:
            check_map(sigma)
        return sigma
    if isinstance(sigma, str) and sigma in NAMED:
        return NAMED[sigma]
    msg = (
        f"`sigma` must be one of {', '.join(map(repr, NAMED))}, or a map such as "
        f"metaopt.Sigmoid(lo, hi); got {sigma!r}."
    )
    raise ValueError(msg)
