"""The text of a kernel for NumPy, run by Python itself: the core's numbers to the last bit."""

import ctypes
import math
from typing import Any

import numpy as np
import pytest
from metaopt_kernels.cpu import source
from metaopt_kernels.memory import address
from metaopt_kernels.programs import GIVEN, ROW, Spec, trace

import metaopt as mo
from metaopt.jets import Jet
from metaopt.leaf import Leaf, one_pass


def carray(at: int, length: int, dtype: Any) -> Any:
    """Return what lies at an address as numba's function of this name does."""
    size = np.dtype(dtype).itemsize * length
    return np.frombuffer((ctypes.c_char * size).from_address(at), dtype)


def test_several_discounts_compute_what_they_have_in_common_once() -> None:
    """Each adds its trace, product and next average; the rule and the step stand there once."""

    def each(horizons: int) -> int:
        rule = mo.AdamW(weight_decay=0.1)
        spec = Spec(rule, *("float32",) * 4, per_weight=False, kept="average", horizons=horizons)
        return len(trace(spec).program.each)

    assert each(3) - each(2) == each(2) - each(1) == 6


@pytest.mark.parametrize("horizons", [1, 3])
@pytest.mark.parametrize("per_weight", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kept", ["trace", "average"])
@pytest.mark.parametrize("rule", [mo.SGD(momentum=0.9, weight_decay=0.1), mo.Lion()], ids=str)
def test_the_text_says_what_the_core_does(
    rule: Any, kept: str, dtype: str, per_weight: bool, horizons: int
) -> None:
    spec = Spec(rule, dtype, dtype, dtype, dtype, per_weight, kept, horizons)
    traced = trace(spec)
    names = {"np": np, "math": math, "carray": carray, "pointer": int}
    exec(source(traced, dtype, per_weight=per_weight), names)
    rng = np.random.default_rng(0)
    n, start, stop, first = 12, 3, 10, 5  # the chunk of weights, and its first block

    def drawn(size: int) -> Any:
        return rng.normal(size=size).astype(dtype)

    arrays = {name: drawn(n) for name in traced.arrays if name not in GIVEN}
    grad, lr, discounts = drawn(n), 0.3, np.array([0.7, 0.9, 1.0][:horizons])
    of_blocks = {part: drawn(first + n) for part in ("value", "rate")}
    of_blocks["mask"] = drawn(first + n) > -0.5
    products, count = np.zeros((horizons, n), dtype), np.array([4, 6], "int32")

    at = slice(start, stop)
    blocks = slice(first, first + stop - start) if per_weight else slice(first, first + 1)
    slots = {slot: f"slot{index}" for index, slot in enumerate(rule.slots)}
    leaf = Leaf.of(
        arrays["param"][at].copy(),
        {slot: arrays[name][at].copy() for slot, name in slots.items()},
        np.asarray(count[1]),
        **{kept: np.stack([arrays[f"{kept}{horizon}"][at] for horizon in range(horizons)])},
    )
    expected, _, leaf = one_pass(
        rule,
        leaf,
        grad[at],
        Jet(*(of_blocks[part][blocks] for part in ("value", "rate"))),
        lr=np.asarray(lr, dtype),
        mask=of_blocks["mask"][blocks],
        discount=np.asarray(discounts, dtype)[:, None],
    )
    before = {name: array.copy() for name, array in arrays.items()}

    given = np.zeros(2, ROW)
    given["lr"] = (9.0, lr)
    told = {"grad": grad} | of_blocks
    for name, array in told.items():
        given[name][1] = address(array)
    fixed = np.array([[0, address(array)] for array in (*arrays.values(), *products)], np.int64)
    sums = np.full((3, horizons), 9.0)
    arguments = (fixed, given.view(np.recarray), count, discounts, sums, 2)
    names["block"](*arguments, 1, start, stop, first)  # type: ignore[operator]

    want = {"param": leaf.param.value}
    after: Any = leaf.param.first if leaf.average is None else leaf.average
    want |= {f"{kept}{horizon}": array for horizon, array in enumerate(after)}
    want |= {name: leaf.slots[slot].value for slot, name in slots.items()}
    for name, array in want.items():
        np.testing.assert_array_equal(arrays[name][at], array)
        for outside in (slice(0, start), slice(stop, n)):
            np.testing.assert_array_equal(arrays[name][outside], before[name][outside])
    if per_weight:
        np.testing.assert_array_equal(products[:, at], expected)
        assert not products[:, :start].any()
        assert not products[:, stop:].any()
    else:
        np.testing.assert_array_equal(sums[2], [sum(e[1:], e[0]) for e in expected])
    np.testing.assert_array_equal(sums[:2], 9.0)

    given["grad"][1] = 0  # it rests
    held = {name: array.copy() for name, array in arrays.items()}
    names["block"](*arguments, 1, start, stop, first)  # type: ignore[operator]
    np.testing.assert_array_equal(sums[2], 0.0)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, held[name])
