"""The layouts of the traces: condensed, one array per leaf, and dense, one per block and leaf.

docs/mathematics.md section 4. Where no Hessian mixes the weights, a weight depends on the
meta-parameter of its own block alone: of the m columns of H one entry per row can differ from
zero, and the traces are held as one array of the leaf's shape. Otherwise they have a leading axis
of m columns. The recursions are the same; here is what differs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metaopt.arrays import Array, Shape, cast, home, map_leaves, namespace
from metaopt.blocks import Blocks

__all__ = ["Condensed", "Dense", "Layout"]

#: Numbers in all dense traces together that `init` will allocate.
LARGEST_DENSE = 2**27


@dataclass(frozen=True, slots=True)
class Layout(ABC):
    """How derivatives with respect to the blocks' meta-parameters are stored."""

    blocks: Blocks

    @property
    @abstractmethod
    def leading(self) -> Shape:
        """The axes that a trace has before those of what it is the derivative of."""

    def shape(self, leaf_shape: Shape) -> Shape:
        """Return the shape of a leaf's trace."""
        return self.leading + leaf_shape

    @abstractmethod
    def start(self, beta: Any) -> Any:
        """Return E, the derivative of the meta-parameters with respect to themselves."""

    @abstractmethod
    def partial(self, trace: Array, array: Array, name: str, dtype: Any) -> Array:
        """Return a leaf's part of a product with the trace, summed in `dtype`.

        `array` is the gradient, for the meta-gradient and, of the third trace, for term B of
        section 3, or a derivative of it in the layout of the trace, for term A.
        """

    @abstractmethod
    def square(self, trace: Array, name: str, dtype: Any) -> Array:
        """Return a leaf's part of the sum of squares of each block's trace."""

    @abstractmethod
    def gather(self, partials: Mapping[str, Array]) -> Any:
        """Return values per block, with a leading axis of columns for terms A and B where dense."""

    @abstractmethod
    def columns(self, per_block: Any, name: str, ndim: int) -> Any:
        """Return a value per column in a shape broadcastable to the trace of a leaf of `ndim`."""

    @abstractmethod
    def beta_columns(self, per_block: Any) -> Any:
        """Return a value per column in shapes broadcastable to those of `start`."""


@dataclass(frozen=True, slots=True)
class Condensed(Layout):
    """Every weight depends on its own block alone."""

    leading = ()

    def start(self, beta: Any) -> Any:  # noqa: D102
        return map_leaves(lambda piece: namespace(piece).ones_like(piece), beta)

    def partial(self, trace: Array, array: Array, name: str, dtype: Any) -> Array:  # noqa: D102
        return self.blocks.partial(trace * array, name, dtype)

    def square(self, trace: Array, name: str, dtype: Any) -> Array:  # noqa: D102
        return self.blocks.partial(trace * trace, name, dtype)

    def gather(self, partials: Mapping[str, Array]) -> Any:  # noqa: D102
        return self.blocks.gather(partials)

    def columns(self, per_block: Any, name: str, ndim: int) -> Any:  # noqa: D102
        return self.blocks.expand_leaf(per_block, name, ndim)

    def beta_columns(self, per_block: Any) -> Any:  # noqa: D102
        return per_block


@dataclass(frozen=True, slots=True)
class Dense(Layout):
    """Every weight may depend on every block."""

    @property
    def leading(self) -> Shape:
        """One axis of columns."""
        return (self.blocks.size,)

    def start(self, beta: Any) -> Any:  # noqa: D102
        like = next(iter(beta.values())) if isinstance(beta, Mapping) else beta
        xp = namespace(like)
        return self.blocks.split(xp.eye(self.blocks.size, dtype=like.dtype, device=home(like)))

    def partial(self, trace: Array, array: Array, name: str, dtype: Any) -> Array:  # noqa: ARG002, D102
        if array.ndim < trace.ndim:
            return self._summed(trace * array, array.ndim, dtype)
        xp, flat = namespace(trace), (self.blocks.size, math.prod(trace.shape[1:]))
        rows = xp.reshape(cast(array, dtype), flat)
        return rows @ xp.matrix_transpose(xp.reshape(cast(trace, dtype), flat))

    def square(self, trace: Array, name: str, dtype: Any) -> Array:  # noqa: ARG002, D102
        return self._summed(trace * trace, trace.ndim - 1, dtype)

    def _summed(self, product: Array, ndim: int, dtype: Any) -> Array:
        """Return the sums over the last `ndim` axes, those of a leaf."""
        xp, lead = namespace(product), product.ndim - ndim
        flat = (*product.shape[:lead], math.prod(product.shape[lead:]))
        return xp.sum(xp.reshape(product, flat), axis=-1, dtype=dtype)

    def gather(self, partials: Mapping[str, Array]) -> Any:  # noqa: D102
        parts = iter(partials.values())
        total = next(parts)
        for part in parts:
            total = total + part
        return self.blocks.split(total)

    def columns(self, per_block: Any, name: str, ndim: int) -> Any:  # noqa: ARG002, D102
        vector = self.blocks.join(per_block)
        return namespace(vector).reshape(vector, (-1,) + (1,) * ndim)

    def beta_columns(self, per_block: Any) -> Any:  # noqa: D102
        vector = self.blocks.join(per_block)
        return map_leaves(
            lambda piece: namespace(vector).reshape(vector, (-1,) + (1,) * piece.ndim), per_block
        )


def choose_layout(
    blocks: Blocks, shapes: Mapping[str, Shape], *, dense: bool, third: bool
) -> Layout:
    """Return the layout, or raise ValueError where dense traces would be too large."""
    if not dense:
        return Condensed(blocks)
    layout = Dense(blocks)
    numbers = sum(math.prod(layout.shape(shape)) for shape in shapes.values())
    numbers *= 1 + blocks.size * third
    if numbers > LARGEST_DENSE:
        full = ' with `approximation` "full"' if third else ""
        msg = (
            f'`curvature` "exact"{full} needs traces of {numbers} numbers for '
            f"{blocks.size} blocks, more than {LARGEST_DENSE}. Use fewer `blocks`, or "
            '`curvature` "none" or "diagonal".'
        )
        raise ValueError(msg)
    return layout
