r"""The update rules by hand: direction, moments, and their partial derivatives.

docs/mathematics.md sections 5 and 6, in float64 and one formula after the other. The library gets
its derivatives by pushing jets through one formula; here each is a line of its own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Bends", "Partials", "Update", "Vector", "bends", "direction", "partials", "signed"]

Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Update:
    """An update rule; fields that a kind does not use are ignored.

    Parameters
    ----------
    kind : {"sgd", "rmsprop", "adamw", "nadamw", "lion"}
    rho : float
        Decay of the first moment; SGD has none at 0.
    interpolation : float
        Lion's weight of the moment inside the sign.
    decay_sq : float
        Decay of the second moment.
    eps, weight_decay : float
    decay_step_size : float or None
        Step size of weight decay; None for the learned one.
    bias_correction : bool
        Of RMSprop.
    delayed : bool
    factor : float
        By which a meta update is faster until a block's count of positive z is `patience`.
    patience : int
    retreat : float
        How many fast steps beta goes back when that is so for all horizons of a block.
    """

    kind: str
    rho: float = 0.0
    interpolation: float = 0.0
    decay_sq: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    decay_step_size: float | None = None
    bias_correction: bool = True
    delayed: bool = False
    factor: float = 1.0
    patience: int = 1
    retreat: float = 0.0

    @property
    def signs(self) -> bool:
        """Whether the direction is a sign, of which no derivative is taken."""
        return self.kind == "lion"

    @property
    def has_m(self) -> bool:
        """Whether there is a first moment."""
        return self.kind in ("adamw", "nadamw", "lion") or (
            self.kind == "sgd" and bool(np.any(np.asarray(self.rho) > 0.0))
        )

    @property
    def has_v(self) -> bool:
        """Whether there is a second moment, of which the direction divides by the root."""
        return self.kind in ("adamw", "nadamw", "rmsprop")


@dataclass(frozen=True)
class Partials:
    """Elementwise derivatives of (u, m', v') with respect to (g, m, v)."""

    u_g: Vector
    u_m: Vector
    u_v: Vector
    m_g: Vector
    m_m: Vector
    v_g: Vector
    v_v: Vector


@dataclass(frozen=True)
class Bends:
    """Elementwise second derivatives of u with respect to (g, m, v); u_mm is 0 for every rule."""

    u_gg: Vector
    u_gm: Vector
    u_gv: Vector
    u_mv: Vector
    u_vv: Vector


def direction(
    rule: Update, g: Vector, m: Vector, v: Vector, count: Vector
) -> tuple[Vector, Vector, Vector]:
    """Return u, m' and v' of the step number `count`, the first being 1; all shapes equal."""
    next_m, next_v = _next_moments(rule, g, m, v)
    if rule.kind == "sgd":
        if not rule.has_m:
            return g, next_m, next_v
        return (np.where(count > 1, m, 0.0) if rule.delayed else next_m), next_m, next_v
    if rule.signs:
        return np.sign(sum(signed(rule, g, m))), next_m, next_v
    q = _quotient(rule, g, m, v, count)
    return np.where(q.defined, q.numerator / q.divisor, 0.0), next_m, next_v


def signed(rule: Update, g: Vector, m: Vector) -> tuple[Vector, Vector]:
    """Return the two parts of what a rule that `signs` takes the sign of."""
    return rule.interpolation * m, (1.0 - rule.interpolation) * g


def partials(rule: Update, g: Vector, m: Vector, v: Vector, count: Vector) -> Partials:
    """Return the derivatives of `direction` at the same arguments."""
    zero, one = np.zeros_like(g), np.ones_like(g)
    m_g = (1.0 - rule.rho) * one if rule.has_m else zero
    m_m = rule.rho * one if rule.has_m else zero
    v_g = 2.0 * (1.0 - rule.decay_sq) * g if rule.has_v else zero
    v_v = rule.decay_sq * one if rule.has_v else zero

    u_g = u_m = u_v = zero
    if rule.kind == "sgd" and not rule.has_m:
        u_g = one
    elif rule.kind == "sgd" and rule.delayed:
        u_m = np.where(count > 1, 1.0, 0.0)
    elif rule.kind == "sgd":
        u_g, u_m = m_g, m_m
    elif rule.has_v:
        q = _quotient(rule, g, m, v, count)
        # the root has slope 1 / (2 cv s), taken as 0 where the root is 0
        root_v = np.where(q.root > 0.0, 1.0 / (2.0 * q.correction_sq * _positive(q.root)), 0.0)
        by_moment = np.where(q.defined, -q.numerator / q.divisor**2 * root_v, 0.0)
        u_g = np.where(q.defined, q.by_g / q.divisor, 0.0)
        u_m = np.where(q.defined, q.by_m / q.divisor, 0.0)
        u_v = by_moment
        if not rule.delayed:
            u_g, u_v = u_g + by_moment * v_g, by_moment * v_v
    return Partials(u_g, u_m, u_v, m_g, m_m, v_g, v_v)


def bends(rule: Update, g: Vector, m: Vector, v: Vector, count: Vector) -> Bends:
    """Return the second derivatives of the direction at the same arguments.

    With a the numerator, linear in g and m, and s the root, a function of g and v,
    u = a / (s + eps) has u_as = -1 / (s + eps)^2 and u_ss = 2 a / (s + eps)^3.
    """
    zero = np.zeros_like(g)
    if not rule.has_v:
        return Bends(zero, zero, zero, zero, zero)
    q = _quotient(rule, g, m, v, count)
    a_g, a_m = q.by_g, q.by_m
    # s = sqrt(v' / cv), by v' and then, with v' = decay v + (1 - decay) g^2, by g and v
    root = _positive(q.root)
    slope = np.where(q.root > 0.0, 1.0 / (2.0 * q.correction_sq * root), 0.0)
    by_g, by_gg, by_v = 2.0 * (1.0 - rule.decay_sq) * g, 2.0 * (1.0 - rule.decay_sq), rule.decay_sq
    if rule.delayed:  # s = sqrt(v / cv)
        by_g, by_gg, by_v = zero, 0.0, 1.0
    s_g, s_v = slope * by_g, slope * by_v
    # from the second derivative of the root, -slope^2 / root
    s_gg, s_gv, s_vv = slope * by_gg - s_g**2 / root, -s_g * s_v / root, -(s_v**2) / root
    u_s = -q.numerator / q.divisor**2
    u_as, u_ss = -1.0 / q.divisor**2, 2.0 * q.numerator / q.divisor**3

    def where_defined(x: Vector) -> Vector:
        return np.where(q.defined, x, 0.0)

    return Bends(
        u_gg=where_defined(2.0 * u_as * a_g * s_g + u_ss * s_g**2 + u_s * s_gg),
        u_gm=where_defined(u_as * a_m * s_g),
        u_gv=where_defined(u_as * a_g * s_v + u_ss * s_g * s_v + u_s * s_gv),
        u_mv=where_defined(u_as * a_m * s_v),
        u_vv=where_defined(u_ss * s_v**2 + u_s * s_vv),
    )


@dataclass(frozen=True)
class _Quotient:
    """The parts of u = numerator / (root + eps), and where it is defined (elsewhere 0).

    The numerator is linear: `by_g` g + `by_m` m.
    """

    by_g: Vector
    by_m: Vector
    numerator: Vector
    root: Vector
    divisor: Vector
    correction_sq: Vector
    defined: Any


def _next_moments(rule: Update, g: Vector, m: Vector, v: Vector) -> tuple[Vector, Vector]:
    next_m = rule.rho * m + (1.0 - rule.rho) * g if rule.has_m else m
    next_v = rule.decay_sq * v + (1.0 - rule.decay_sq) * g**2 if rule.has_v else v
    return next_m, next_v


def _quotient(rule: Update, g: Vector, m: Vector, v: Vector, count: Vector) -> _Quotient:
    rho = rule.rho
    next_m, next_v = _next_moments(rule, g, m, v)
    steps = count - 1.0 if rule.delayed else count
    used_v = v if rule.delayed else next_v
    # where nothing has been seen yet the corrections are 0, and so is the direction
    correction_sq = _positive(1.0 - rule.decay_sq**steps)
    if not rule.bias_correction:
        correction_sq = np.ones_like(g)
    root = np.sqrt(used_v / correction_sq)
    defined = (steps > 0) & ((used_v > 0.0) | (rule.eps > 0.0))
    correction = _positive(1.0 - rho**steps)
    if rule.kind == "rmsprop":
        numerator, by_g, by_m = g, np.ones_like(g), np.zeros_like(g)
        if rule.delayed:
            defined = defined & (used_v > 0.0)
    elif rule.kind == "nadamw":
        ahead = _positive(1.0 - rho ** (count + 1.0))  # of the step after this
        numerator = rho * next_m / ahead + (1.0 - rho) * g / correction
        by_g, by_m = (1.0 - rho) * (rho / ahead + 1.0 / correction), rho**2 / ahead
    elif rule.delayed:
        numerator, by_g, by_m = m / correction, np.zeros_like(g), 1.0 / correction
    else:
        numerator, by_g, by_m = next_m / correction, (1.0 - rho) / correction, rho / correction
    return _Quotient(
        by_g=by_g,
        by_m=by_m,
        numerator=numerator,
        root=root,
        divisor=_positive(root + rule.eps),
        correction_sq=correction_sq,
        defined=defined,
    )


def _positive(x: Vector) -> Vector:
    """Return x, and 1 where it is 0 and its reciprocal will not be used."""
    return np.where(x == 0.0, 1.0, x)
