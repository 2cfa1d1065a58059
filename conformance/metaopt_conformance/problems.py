"""Losses with known derivatives, drifting from step to step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaopt_conformance.oracle import Matrix
from metaopt_conformance.updates import Vector

__all__ = ["SHAPES", "LogCosh"]

#: Leaves of 1, 2 and 4 axes: a bias, a matrix and a convolution's kernel; 17 weights.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "bias": (3,),
    "weight": (2, 3),
    "kernel": (2, 1, 2, 2),
}


@dataclass(frozen=True)
class LogCosh:
    r"""Linear regression under :math:`\log\cosh`, on new data at every step.

    Smooth and not quadratic; its three derivatives are
    :math:`\tanh`, :math:`1/\cosh^2` and :math:`-2\tanh/\cosh^2`.

    Parameters
    ----------
    size : int
        Number of weights.
    seed : int, default 0
    samples : int, default 12
        Data points a step.
    """

    size: int
    seed: int = 0
    samples: int = 12

    def start(self) -> Vector:
        """Return the weights to start from, shape (size,)."""
        return np.random.default_rng(self.seed).normal(size=self.size)

    def data(self, t: int) -> tuple[Matrix, Vector]:
        """Return inputs (samples, size) and targets (samples,) of step t."""
        rng = np.random.default_rng([self.seed, t + 1])
        return rng.normal(size=(self.samples, self.size)), rng.normal(size=self.samples)

    def loss(self, t: int, w: Vector) -> float:
        """Return the mean of log cosh over the residuals."""
        inputs, targets = self.data(t)
        return float(np.mean(np.log(np.cosh(inputs @ w - targets))))

    def grad(self, t: int, w: Vector) -> Vector:
        """Return the gradient, shape (size,)."""
        inputs, targets = self.data(t)
        return inputs.T @ np.tanh(inputs @ w - targets) / self.samples

    def hessian(self, t: int, w: Vector) -> Matrix:
        """Return the Hessian, shape (size, size)."""
        inputs, targets = self.data(t)
        weights = np.cosh(inputs @ w - targets) ** -2.0
        return (inputs.T * weights) @ inputs / self.samples

    def third(self, t: int, w: Vector, u: Matrix, v: Matrix) -> Any:
        """Return the third derivative along columns of u and v, shape (size, columns, columns)."""
        inputs, targets = self.data(t)
        residuals = inputs @ w - targets
        weights = -2.0 * np.tanh(residuals) / np.cosh(residuals) ** 2.0 / self.samples
        return np.einsum("k,ki,kj,kl->ijl", weights, inputs, inputs @ u, inputs @ v)
