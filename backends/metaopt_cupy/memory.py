"""Where arrays lie in memory."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Occupied", "address", "check_writable", "contiguous", "span"]


def address(array: Any) -> int:
    """Return where the first entry of an array of NumPy or CuPy lies."""
    if isinstance(array, np.ndarray):
        return int(array.__array_interface__["data"][0])
    return int(array.data.ptr)


def contiguous(array: Any) -> bool:
    """Say whether entries follow each other in memory, in the order of the axes."""
    return bool(array.flags.c_contiguous)


def span(array: Any) -> tuple[int, int]:
    """Return the lowest address of an array and the one behind its highest."""
    start = stop = address(array)
    if array.size == 0:
        return start, start
    for length, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            start += (length - 1) * stride
        else:
            stop += (length - 1) * stride
    return start, stop + array.dtype.itemsize


def check_writable(params: Mapping[str, Any]) -> None:
    """Raise ValueError where parameters cannot be written to, each without the others."""
    spans = []
    for name, param in params.items():
        if not getattr(param.flags, "writeable", True):
            msg = f"`params[{name!r}]` is read-only, but steps write to it; pass a copy."
            raise ValueError(msg)
        if contiguous(param) and param.size:  # others can be interleaved
            spans.append((*span(param), name))
    for (_, stop, name), (start, _, other) in itertools.pairwise(sorted(spans)):
        if start < stop:
            msg = f"`params` must lie apart; {name!r} and {other!r} share memory."
            raise ValueError(msg)


class Occupied:
    """The memory of parameters, which gradients must not lie in: steps write to it."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        spans = sorted(span(param) for param in params.values())
        self._starts, self._stops = np.array(spans, dtype=np.int64).T

    def holds(self, start: Any, stop: Any) -> Any:
        """Say whether any of it lies between two addresses, elementwise."""
        before = np.searchsorted(self._starts, stop) - 1
        return (before >= 0) & (self._stops[before] > start)
