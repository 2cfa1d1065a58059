"""The maps from meta-parameters to step sizes, by hand: docs/mathematics.md section 8.

A kind is "exp", "identity", "softplus" or a pair (lo, hi) for the sigmoid between these.
"""

from typing import Any

import numpy as np

from metaopt_conformance.updates import Vector

__all__ = ["beta_range", "first", "inverse", "second", "sigma"]


def beta_range(kind: Any) -> tuple[float, float]:
    """Return where beta is kept (section 8)."""
    small, large = 2.0**-63, 2.0**63
    if kind == "exp":
        return np.log(small), np.log(large)
    if kind == "identity":
        return -large, large
    if kind == "softplus":
        return np.log(small), large
    return -16.0, 16.0


def sigma(kind: Any, beta: Vector) -> Vector:
    """Return the step sizes of meta-parameters (section 8)."""
    if kind == "exp":
        return np.exp(beta)
    if kind == "identity":
        return beta
    if kind == "softplus":
        return np.logaddexp(beta, 0.0)
    lo, hi = kind
    return np.asarray(lo * (hi / lo) ** (1.0 / (1.0 + np.exp(-beta))))


def first(kind: Any, beta: Vector) -> Vector:
    """Return the derivative of `sigma`."""
    if kind == "exp":
        return np.exp(beta)
    if kind == "identity":
        return np.ones_like(beta)
    logistic = 1.0 / (1.0 + np.exp(-beta))
    if kind == "softplus":
        return logistic
    lo, hi = kind
    return sigma(kind, beta) * np.log(hi / lo) * logistic * (1.0 - logistic)


def second(kind: Any, beta: Vector) -> Vector:
    """Return the second derivative of `sigma`."""
    if kind == "exp":
        return np.exp(beta)
    if kind == "identity":
        return np.zeros_like(beta)
    logistic = 1.0 / (1.0 + np.exp(-beta))
    if kind == "softplus":
        return logistic * (1.0 - logistic)
    lo, hi = kind
    slope = np.log(hi / lo) * logistic * (1.0 - logistic)  # of log sigma
    return sigma(kind, beta) * (slope**2 + slope * (1.0 - 2.0 * logistic))


def inverse(kind: Any, sizes: Vector) -> Vector:
    """Return the meta-parameters of step sizes."""
    if kind == "exp":
        return np.log(sizes)
    if kind == "identity":
        return sizes
    if kind == "softplus":
        return np.log(np.expm1(sizes))
    lo, hi = kind
    share = np.log(sizes / lo) / np.log(hi / lo)
    return np.log(share / (1.0 - share))
