"""Several runs side by side: parameters with a leading axis, one entry for each run.

Updates are elementwise, so runs that differ in their seed and initial step size alone can share
every operation. What ties weights together are the blocks, and those are kept apart here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaopt import blocks as mo_blocks
from metaopt.blocks import Partition

__all__ = ["SideBySide", "side_by_side", "starts_of_blocks"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SideBySide(Partition):
    """A partition of each run by itself, all runs' blocks of one name in one family.

    Parameters
    ----------
    inner : Partition
        Of the parameters without their leading axis.
    """

    inner: Partition

    def assign(self, name: str, shape: Shape) -> tuple[str, Shape]:
        """Return the family and the blocks of a leaf; see `metaopt.blocks.Partition`."""
        family, view = self.inner.assign(name, shape[1:])
        return family, (shape[0], *(view or (1,) * (len(shape) - 1)))


def side_by_side(blocks: Any) -> Partition:
    """Return `blocks` for runs side by side; per weight it needs no change.

    Parameters
    ----------
    blocks : as `metaopt.MetaOptimize` takes it
        For one run.
    """
    inner = mo_blocks.partition(blocks)
    return inner if inner.per_leaf else SideBySide(inner)


def starts_of_blocks(
    partition: Partition, shapes: Mapping[str, Shape], starts: Sequence[float]
) -> dict[str, Any]:
    """Return initial step sizes by block.

    Parameters
    ----------
    partition : Partition
        Made by `side_by_side`.
    shapes : mapping of leaf name to shape
        With the leading axis.
    starts : sequence of float
        One for each run.
    """
    values = np.asarray(starts, dtype=np.float64)
    if partition.per_leaf:
        return {
            name: np.broadcast_to(values.reshape(-1, *(1,) * (len(shape) - 1)), shape).copy()
            for name, shape in shapes.items()
        }
    families = partition.bind(shapes).families
    return {key: np.repeat(values, family.size // len(values)) for key, family in families.items()}
