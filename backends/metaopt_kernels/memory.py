"""Where arrays lie in memory."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Layout",
    "Occupied",
    "address",
    "check_writable",
    "contiguous",
    "layout",
    "overlaps_itself",
    "span",
]


def address(array: Any) -> int:
    """Return where the first entry of an array of NumPy or CuPy lies."""
    if isinstance(array, np.ndarray):
        return int(array.__array_interface__["data"][0])
    return int(array.data.ptr)


def contiguous(array: Any) -> bool:
    """Say whether entries follow each other in memory, in the order of the axes."""
    return bool(array.flags.c_contiguous)


class Layout(NamedTuple):
    """Where an array lies and what a kernel takes for granted of it."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    writable: bool


def layout(array: Any) -> Layout:
    """Return where an array lies, and how."""
    writable = getattr(array.flags, "writeable", True)
    return Layout(address(array), array.shape, array.strides, array.dtype, writable)


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


def overlaps_itself(array: Any) -> bool:
    """Say whether entries of an array may share memory with each other.

    None do where each axis strides over all that the shorter strides reach.
    """
    axes = [(abs(step), n) for n, step in zip(array.shape, array.strides, strict=True) if n > 1]
    reach = array.dtype.itemsize
    for stride, length in sorted(axes):
        if stride < reach:
            return bool(array.size)
        reach += (length - 1) * stride
    return False


def check_writable(params: Mapping[str, Any], xp: Any) -> None:
    """Raise ValueError where parameters cannot be written to, each without the others."""
    spans = []
    for name, param in params.items():
        if not getattr(param.flags, "writeable", True):
            msg = f"`params[{name!r}]` is read-only, but steps write to it; pass a copy."
            raise ValueError(msg)
        if overlaps_itself(param):
            msg = f"`params[{name!r}]` shares memory among its own entries; pass a copy."
            raise ValueError(msg)
        if param.size:
            spans.append((*span(param), name))
    reaching: list[tuple[int, str]] = []  # into what comes next
    for start, stop, name in sorted(spans):
        reaching = [(end, other) for end, other in reaching if end > start]
        for _, other in reaching:
            if xp.shares_memory(params[name], params[other]):
                msg = f"`params` must lie apart; {other!r} and {name!r} share memory."
                raise ValueError(msg)
        reaching.append((stop, name))


class Occupied:
    """The memory of parameters, which gradients must not lie in: steps write to it."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        spans = sorted(span(param) for param in params.values())
        self._starts, stops = np.array(spans, dtype=np.int64).T
        self._reached = np.maximum.accumulate(stops)

    def holds(self, start: Any, stop: Any) -> Any:
        """Say whether any of it, or a gap within a parameter, lies between two addresses."""
        before = np.searchsorted(self._starts, stop) - 1
        return (before >= 0) & (self._reached[before] > start)
