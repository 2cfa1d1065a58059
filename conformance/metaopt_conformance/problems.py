"""Losses with known derivatives up to the third.

Each is given twice: in float64 NumPy with every derivative written out, on the vector of all
weights; and as `loss_of`, in array code for any library's automatic differentiation.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaopt_conformance.oracle import Matrix
from metaopt_conformance.translate import tree
from metaopt_conformance.updates import Vector

__all__ = ["PROBLEMS", "SHAPES", "Linear", "Network", "Problem"]

#: Leaves of 1, 2 and 4 axes: a bias, a matrix and a convolution's kernel; 17 weights.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "bias": (3,),
    "weight": (2, 3),
    "kernel": (2, 1, 2, 2),
}


class Problem(ABC):
    """A loss on new data at every step."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the leaves."""

    @property
    def size(self) -> int:
        """Number n of weights."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    @abstractmethod
    def start(self) -> Vector:
        """Return the weights to start from, shape (n,)."""

    @abstractmethod
    def data(self, t: int) -> tuple[Matrix, Vector]:
        """Return inputs and targets of step t, one row and one entry per sample."""

    @abstractmethod
    def loss(self, t: int, w: Vector) -> float:
        """Return the loss of step t."""

    @abstractmethod
    def grad(self, t: int, w: Vector) -> Vector:
        """Return its gradient, shape (n,)."""

    @abstractmethod
    def hessian(self, t: int, w: Vector) -> Matrix:
        """Return its Hessian, shape (n, n)."""

    @abstractmethod
    def third(self, t: int, w: Vector, u: Matrix, v: Matrix) -> Any:
        """Return its third derivative along all columns of u and v, shape (n, columns, columns)."""

    @abstractmethod
    def loss_of(self, xp: Any, params: Mapping[str, Any], inputs: Any, targets: Any) -> Any:
        """Return the loss of params by leaf in the array library `xp`."""


@dataclass(frozen=True, kw_only=True)
class Linear(Problem):
    r"""The mean over samples of :math:`\phi(a^\top w, b)`, a linear model under some loss.

    Parameters
    ----------
    kind : {"square", "logcosh", "logistic"}
        Half the square of the residual; its log cosh; or the logistic loss with targets 0 and 1.
    seed : int, default 0
    samples : int, default 12
        Data points a step.
    drift : float, default 0.0
        How far the weights that make the targets move in a step.
    condition : float, default 1.0
        Ratio of the largest to the smallest eigenvalue of the inputs' covariance.
    dead : int, default 0
        How many of the last weights never get a gradient.
    """

    kind: str
    seed: int = 0
    samples: int = 12
    drift: float = 0.0
    condition: float = 1.0
    dead: int = 0

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:  # noqa: D102
        return SHAPES

    def start(self) -> Vector:  # noqa: D102
        return np.random.default_rng(self.seed).normal(size=self.size)

    def data(self, t: int) -> tuple[Matrix, Vector]:  # noqa: D102
        rng = np.random.default_rng([self.seed, t + 1])
        inputs = rng.normal(size=(self.samples, self.size))
        inputs *= self.condition ** (-0.5 * np.linspace(0.0, 1.0, self.size))
        if self.dead:
            inputs[:, -self.dead :] = 0.0
        targets = rng.normal(size=self.samples)
        if self.drift:
            walk = np.random.default_rng(self.seed + 1).normal(size=(t + 1, self.size))
            targets = 0.1 * targets + inputs @ (self.drift * walk.sum(axis=0))
        return inputs, np.where(targets > 0.0, 1.0, 0.0) if self.kind == "logistic" else targets

    def loss(self, t: int, w: Vector) -> float:  # noqa: D102
        return float(self.loss_of(np, tree(w, self.shapes), *self.data(t)))

    def grad(self, t: int, w: Vector) -> Vector:  # noqa: D102
        inputs, first, _, _ = self._derivatives(t, w)
        return inputs.T @ first / self.samples

    def hessian(self, t: int, w: Vector) -> Matrix:  # noqa: D102
        inputs, _, second, _ = self._derivatives(t, w)
        return (inputs.T * second) @ inputs / self.samples

    def third(self, t: int, w: Vector, u: Matrix, v: Matrix) -> Any:  # noqa: D102
        inputs, _, _, third = self._derivatives(t, w)
        return np.einsum("k,ki,kj,kl->ijl", third / self.samples, inputs, inputs @ u, inputs @ v)

    def _derivatives(self, t: int, w: Vector) -> tuple[Matrix, Vector, Vector, Vector]:
        inputs, targets = self.data(t)
        if self.kind == "logistic":
            p = 1.0 / (1.0 + np.exp(-(inputs @ w)))
            return inputs, p - targets, p * (1.0 - p), p * (1.0 - p) * (1.0 - 2.0 * p)
        r = inputs @ w - targets
        if self.kind == "square":
            return inputs, r, np.ones_like(r), np.zeros_like(r)
        tanh = np.tanh(r)
        return inputs, tanh, 1.0 - tanh**2, -2.0 * tanh * (1.0 - tanh**2)

    def loss_of(self, xp: Any, params: Mapping[str, Any], inputs: Any, targets: Any) -> Any:  # noqa: D102
        # by name: JAX hands on a plain dict in the order of its keys
        w = xp.concat([xp.reshape(params[name], (-1,)) for name in self.shapes])
        if self.kind == "logistic":
            s = inputs @ w
            return xp.mean(xp.logaddexp(s, xp.zeros_like(s)) - targets * s)
        r = inputs @ w - targets
        if self.kind == "square":
            return xp.mean(0.5 * r * r)
        # log cosh, in a form that does not overflow
        return xp.mean(xp.logaddexp(r, -r) - float(np.log(2.0)))


@dataclass(frozen=True, kw_only=True)
class Network(Problem):
    """Half the squared error of a network with one hidden layer of tanh units.

    The output is p = v . T(s) + c with s = W x + b: leaves of 2, 1, 1 and 0 axes.

    Parameters
    ----------
    seed : int, default 0
    samples : int, default 12
    """

    seed: int = 0
    samples: int = 12

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:  # noqa: D102
        return {"hidden.weight": (3, 4), "hidden.bias": (3,), "out.weight": (3,), "out.bias": ()}

    def start(self) -> Vector:  # noqa: D102
        return np.random.default_rng(self.seed).normal(size=self.size)

    def data(self, t: int) -> tuple[Matrix, Vector]:  # noqa: D102
        rng = np.random.default_rng([self.seed, t + 1])
        return rng.normal(size=(self.samples, 4)), rng.normal(size=self.samples)

    def loss(self, t: int, w: Vector) -> float:  # noqa: D102
        _, _, error, _ = self._forward(t, w)
        return float(np.mean(0.5 * error**2))

    def grad(self, t: int, w: Vector) -> Vector:  # noqa: D102
        _, slopes, error, _ = self._forward(t, w)
        return slopes.T @ error / self.samples

    def hessian(self, t: int, w: Vector) -> Matrix:  # noqa: D102
        inputs, slopes, error, state = self._forward(t, w)
        directions = np.eye(self.size)
        bends = self._bend(inputs, state, directions)
        return (slopes.T @ slopes + np.einsum("k,kin->in", error, bends)) / self.samples

    def third(self, t: int, w: Vector, u: Matrix, v: Matrix) -> Any:  # noqa: D102
        inputs, slopes, error, state = self._forward(t, w)
        along_u, along_v = slopes @ u, slopes @ v
        bend_u, bend_v = self._bend(inputs, state, u.T), self._bend(inputs, state, v.T)
        both = np.einsum("kin,nj->kij", bend_u, v)
        twist = self._twist(inputs, state, u.T, v.T)
        total = (
            np.einsum("kin,kj->nij", bend_u, along_v)
            + np.einsum("kjn,ki->nij", bend_v, along_u)
            + np.einsum("kn,kij->nij", slopes, both)
            + np.einsum("k,kijn->nij", error, twist)
        )
        return total / self.samples

    def _split(self, w: Matrix) -> tuple[Any, Any, Any, Any]:
        """Return W, b, v and c of vectors of weights along the last axis."""
        weight, bias, v, c = tree(w, self.shapes).values()
        return weight, bias, v, c

    def _forward(self, t: int, w: Vector) -> tuple[Matrix, Matrix, Vector, Any]:
        """Return inputs, gradients of the output, errors, and what derivatives need."""
        inputs, targets = self.data(t)
        weight, bias, v, c = self._split(w)
        tanh = np.tanh(inputs @ weight.T + bias)
        first = 1.0 - tanh**2
        second = -2.0 * tanh * first
        third = -2.0 * first**2 - 2.0 * tanh * second
        state = v, first, second, third
        return inputs, self._joined(inputs, first * v, tanh, 1.0), tanh @ v + c - targets, state

    def _joined(self, inputs: Matrix, by_s: Any, by_v: Any, by_c: float) -> Any:
        """Return a gradient from its parts by s, v and c, with samples as the first axis."""
        by_weight = by_s[..., :, None] * inputs.reshape(
            len(inputs), *(1,) * (by_s.ndim - 1), inputs.shape[1]
        )
        lead = by_s.shape[:-1]
        return np.concatenate(
            [by_weight.reshape(*lead, 12), by_s, by_v, np.full((*lead, 1), by_c)], axis=-1
        )

    def _change_of_s(self, inputs: Matrix, directions: Matrix) -> tuple[Any, Any]:
        weight, bias, v, _ = self._split(directions)
        return np.einsum("kx,jhx->kjh", inputs, weight) + bias, v

    def _bend(self, inputs: Matrix, state: Any, directions: Matrix) -> Any:
        """Return the Hessian of the output times directions: (samples, directions, n)."""
        v, first, second, _ = state
        ds, dv = self._change_of_s(inputs, directions)
        by_s = dv * first[:, None] + v * second[:, None] * ds
        return self._joined(inputs, by_s, first[:, None] * ds, 0.0)

    def _twist(self, inputs: Matrix, state: Any, one: Matrix, other: Matrix) -> Any:
        """Return the third derivative of the output: (samples, directions, directions, n)."""
        v, _, second, third = state
        ds, dv = self._change_of_s(inputs, one)
        es, ev = self._change_of_s(inputs, other)
        ds, es, dv, ev = ds[:, :, None], es[:, None, :], dv[:, None], ev[None, :]
        second, third = second[:, None, None], third[:, None, None]
        by_s = second * (dv * es + ev * ds) + v * third * ds * es
        return self._joined(inputs, by_s, second * ds * es, 0.0)

    def loss_of(self, xp: Any, params: Mapping[str, Any], inputs: Any, targets: Any) -> Any:  # noqa: D102
        weight, bias, v, c = (params[name] for name in self.shapes)
        hidden = xp.tanh(inputs @ xp.matrix_transpose(weight) + bias)
        error = hidden @ v + c - targets
        return xp.mean(0.5 * error * error)


PROBLEMS: dict[str, Problem] = {
    "logcosh": Linear(kind="logcosh", seed=3),
    "quadratic": Linear(kind="square", seed=1, samples=24),
    "logistic": Linear(kind="logistic", seed=2),
    "network": Network(seed=1),
    "drifting": Linear(kind="logcosh", seed=4, drift=0.05),
    "badly scaled": Linear(kind="logcosh", seed=5, condition=1e6),
    "dead": Linear(kind="logcosh", seed=6, dead=4),
}
