"""Where arrays lie, and how leaves are cut into chunks: what kernels are told of both."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from metaopt_kernels.chunks import cut, lies_per_weight
from metaopt_kernels.memory import (
    Occupied,
    address,
    check_writable,
    contiguous,
    overlaps_itself,
    span,
)
from metaopt_kernels.sharing import device_of

BUFFER = np.arange(24.0)
WINDOWS: dict[str, Any] = {
    "whole": BUFFER,
    "strided": BUFFER[1:20:3],
    "reversed": BUFFER[17:4:-2],
    "fortran": BUFFER.reshape(4, 6).T,
    "part of rows": BUFFER.reshape(4, 6)[1:3, 2:5],
    "reversed rows": BUFFER.reshape(4, 6)[::-1, 1:4],
    "one of many": BUFFER[5:6],
    "one row": BUFFER.reshape(4, 6)[2:3, ::5],
    "no axes": BUFFER[3:4].reshape(()),
    "empty": BUFFER[5:5],
    "empty rows": BUFFER.reshape(4, 6)[:, 3:3],
    "same entry": np.broadcast_to(BUFFER[7:8], (3,)),
    "overlapping": np.lib.stride_tricks.as_strided(BUFFER, (3, 4), (16, 8)),
    "touching": np.lib.stride_tricks.as_strided(BUFFER, (3, 4), (32, 8)),
    "interleaved": np.lib.stride_tricks.as_strided(BUFFER, (3, 4), (8, 24)),
    "one row, again and again": np.lib.stride_tricks.as_strided(BUFFER, (1, 4), (0, 8)),
    "no row, again and again": np.lib.stride_tricks.as_strided(BUFFER, (3, 0), (0, 8)),
}


def entries(array: Any) -> list[int]:
    """Return the address of every entry."""
    offsets = itertools.product(*map(range, array.shape))
    return [
        address(array) + sum(i * step for i, step in zip(index, array.strides, strict=True))
        for index in offsets
    ]


@pytest.mark.parametrize("window", WINDOWS)
def test_memory_is_what_the_entries_take(window: str) -> None:
    array = WINDOWS[window]
    found = entries(array)
    start, stop = span(array)
    if found:
        assert (start, stop) == (min(found), max(found) + array.dtype.itemsize)
    else:
        assert start == stop
    assert overlaps_itself(array) == (len(set(found)) < len(found))
    assert contiguous(array) == array.flags.c_contiguous


def test_gradients_within_parameters_are_found() -> None:
    """The last of the parameters starts first among those that reach so far."""
    at = address(BUFFER)
    params = {"b": BUFFER[12:14], "a": BUFFER[2:4], "far": BUFFER[6:11:4], "in": BUFFER[7:8]}
    occupied = Occupied(params)
    held = {2, 3, 6, 7, 8, 9, 10, 12, 13}  # the gap of "far" among them
    for start in range(24):
        for stop in range(start + 1, 25):
            want = not held.isdisjoint(range(start, stop))
            assert occupied.holds(at + 8 * start, at + 8 * stop) == want, (start, stop)


GOOD: dict[str, Any] = {
    "apart": {"a": BUFFER[:3], "b": BUFFER[3:6]},
    "between each other": {"a": BUFFER[0:9:2], "b": BUFFER[1:9:2]},
    "nothing within": {"a": BUFFER[:8], "b": BUFFER[3:3]},
}
BAD: dict[str, Any] = {
    "the same": {"a": BUFFER[:3], "b": BUFFER[:3]},
    "by one entry": {"a": BUFFER[:4], "b": BUFFER[3:6]},
    "past one that lies between": {"a": BUFFER[0:9:4], "c": BUFFER[1:3], "b": BUFFER[7:10]},
    "past one that ends": {"a": BUFFER[0:20:2], "c": BUFFER[1:2], "b": BUFFER[16:17]},
}


@pytest.mark.parametrize("case", GOOD)
def test_parameters_that_lie_apart_are_taken(case: str) -> None:
    check_writable(GOOD[case], np)


@pytest.mark.parametrize("case", BAD)
def test_parameters_that_share_memory_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"`params` must lie apart; '.' and '.' share memory"):
        check_writable(BAD[case], np)


VIEWS = [
    (shape, view)
    for shape in [(), (0,), (1,), (7,), (2, 3), (3, 2), (4, 0), (2, 3, 4)]
    for view in [(), *itertools.product(*((1, length) for length in shape))]
]


@pytest.mark.parametrize("per_weight", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(("shape", "view"), VIEWS)
def test_chunks_have_every_weight_once(
    shape: tuple[int, ...], view: tuple[int, ...], size: int, per_weight: bool
) -> None:
    full = view or (1,) * len(shape)
    blocks = np.broadcast_to(np.arange(math.prod(full)).reshape(full), shape).reshape(-1)
    found = np.full(blocks.shape, -1)
    for start, stop, first in cut(shape, view, size, per_weight=per_weight).tolist():
        assert 0 < stop - start <= size
        assert np.all(found[start:stop] == -1)
        found[start:stop] = first + (np.arange(stop - start) if per_weight else 0)
    np.testing.assert_array_equal(found, blocks)


@pytest.mark.parametrize(
    ("shape", "view", "want"),
    [
        ((3, 2), (), False),
        ((3, 2), (3, 1), False),
        ((2, 2), (1, 2), True),
        ((3, 2), (3, 2), True),
        ((5,), (5,), True),
        ((4, 2, 3), (1, 2, 1), False),
        ((2, 4, 3), (1, 4, 3), True),
    ],
)
def test_kernels_follow_the_longer_run(shape: Any, view: Any, want: bool) -> None:
    assert lies_per_weight(shape, view) is want


@pytest.mark.parametrize(
    ("kind", "name"),
    [(1, "cpu"), (2, "cuda:1"), (3, "cpu"), (10, "rocm:1"), (11, "cpu"), (13, "cuda:1")],
)
def test_memory_of_the_host_is_the_cpus_whoever_pinned_it(kind: int, name: str) -> None:
    class Exported:
        def __dlpack_device__(self) -> tuple[int, int]:
            return kind, 1

    assert device_of(Exported()) == name
