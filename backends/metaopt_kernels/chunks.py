"""How the weights of a leaf are cut into chunks, each stepped by one call of a kernel."""

import math
from typing import Any

import numpy as np

from metaopt.arrays import Shape

__all__ = ["cut", "lies_per_weight"]


def lies_per_weight(shape: Shape, view: Shape) -> bool:
    """Say whether neighbouring weights rather have step sizes of their own than one in common.

    Parameters
    ----------
    shape : tuple of int
        Of a leaf.
    view : tuple of int
        In which its blocks lie along it, see `metaopt.blocks.Partition.assign`.
    """
    return _run(shape, view, per_weight=True)[1] > _run(shape, view, per_weight=False)[1]


def cut(shape: Shape, view: Shape, size: int, *, per_weight: bool) -> np.ndarray[Any, Any]:
    """Return a row of start, stop and block for each chunk of at most `size` weights.

    The weights from start to stop have that block in common, or are per weight: then it is the
    block of the first, and the others follow it.
    """
    if math.prod(shape) == 0:
        return np.zeros((0, 3), dtype=np.int64)
    axes, run = _run(shape, view, per_weight=per_weight)
    view = view or (1,) * len(shape)
    numbers = np.arange(math.prod(view)).reshape(view)
    ahead = numbers.reshape(*view[:axes], -1)[..., 0]
    blocks = np.broadcast_to(ahead, shape[:axes]).reshape(-1)
    starts = np.arange(0, run, size)
    begin = (np.arange(len(blocks))[:, None] * run + starts).reshape(-1)
    offset = np.broadcast_to(starts, (len(blocks), len(starts)))
    end = begin + np.minimum(size, run - offset).reshape(-1)
    first = blocks[:, None] + (offset if per_weight else np.zeros_like(offset))
    return np.stack([begin, end, first.reshape(-1)], axis=1).astype(np.int64)


def _run(shape: Shape, view: Shape, *, per_weight: bool) -> tuple[int, int]:
    """Return how many leading axes are left of the longest run of weights, and its length."""
    view = view or (1,) * len(shape)
    axes = len(shape)
    while axes and view[axes - 1] == (shape[axes - 1] if per_weight else 1):
        axes -= 1
    return axes, math.prod(shape[axes:])
