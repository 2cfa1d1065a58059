"""Traced formulas: what is written is what the formula computes, and all else is refused."""

import ctypes
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metaopt_conformance import tolerances

import metaopt as mo
from metaopt import numerics
from metaopt.arrays import namespace
from metaopt.jets import Jet
from metaopt.leaf import Leaf, one_pass
from metaopt.tracer import PYTHON, C, Program, Scalar, UntraceableError

VALUES = (-2.5, -1.0, -0.0, 0.0, 1e-30, 0.3, 1.0, 2.5, math.inf, -math.inf, math.nan)


def traced(function: Callable[..., Any], *dtypes: str) -> tuple[Program, Any]:
    program = Program()
    names = "xyz"[: len(dtypes)]
    arguments = [
        program.variable(name, dtype, varies=True)
        for name, dtype in zip(names, dtypes, strict=True)
    ]
    return program, function(*arguments)


def evaluated(function: Callable[..., Any], *values: float) -> Any:
    """Trace a function in float64 and run the Python that is written."""
    program, result = traced(function, *["float64"] * len(values))
    names: dict[str, Any] = {"np": np, "math": math}
    names |= dict(zip("xyz", map(np.float64, values), strict=False))
    for line in PYTHON.lines(program.once + program.each):
        exec(line, names)
    return eval(PYTHON.written(result), names)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sign": numerics.sign,
    "reciprocal": numerics.reciprocal,
    "root": lambda x: numerics.sqrt(abs(x)),
    "quotient": lambda x: numerics.divide(x, abs(x), 1e-8),
    "guarded quotient": lambda x: numerics.divide(x, abs(x)),
    "where positive": lambda x: numerics.where(x, x + 1.0, 0.0),
    "larger": lambda x: numerics.maximum(0.4 * x - 0.1, numerics.maximum(x, -1.5)),
    "smaller": lambda x: numerics.minimum(numerics.minimum(0.7, x), 0.4 * x - 0.1),
    "absolute": lambda x: numerics.abs(x) + numerics.where(x > 1.0, x, 2.0),
    "exponentials": lambda x: numerics.exp(-numerics.abs(x)) + numerics.log(numerics.abs(x) + 1.0),
    "powers": lambda x: numerics.power(numerics.abs(x), 2) + numerics.power(0.9, numerics.abs(x)),
    "operators": lambda x: (2.0 - x) / (3.0 + 2.0 * x) - 1.0 / (x * x + 0.5) + -x / 7.0,
    "comparisons": lambda x: namespace(x).where((x < 0.5) & ~(x <= -1.0) | (x >= 2.0), x, 1.0 - x),
    "clip": lambda x: namespace(x).clip(x, min=-1.5, max=0.7),
    "maximum": lambda x: namespace(x).maximum(x, 0.4 * x - 0.1),
    "minimum": lambda x: namespace(x).minimum(x, 0.4 * x - 0.1),
    "finite": lambda x: namespace(x).where(namespace(x).isfinite(x), x, 3.0),
    "nan": lambda x: namespace(x).where(namespace(x).isnan(x), 3.0, x),
    "power": lambda x: abs(x) ** 1.5,
    "signs of zeros": lambda x: 1.0 / (abs(x) * 0.0) + 1.0 / (abs(x) * -0.0),
    "zero turned": lambda x: 1.0 / (x - -0.0) + 1.0 / -namespace(x).zeros_like(x),
    "condition": lambda x: namespace(x).where((x > 0.0) == (x < 1.0), x, -x),
    "constant condition": lambda x: namespace(x).where((x > 0.0) & True, x, -x),
    "condition as number": lambda x: x * namespace(x).astype(x > 0.5, x.dtype),
    "narrowed": lambda x: namespace(x).astype(
        namespace(x).astype(x, namespace(x).float32) * 0.1, x.dtype
    ),
    "infinite": lambda x: namespace(x).where(x < math.inf, x, -math.inf),
    "nan in it": lambda x: namespace(x).where(x < 1.0, x, math.nan),
    "functions": lambda x: (
        namespace(x).exp(-abs(x))
        + namespace(x).tanh(x)
        + namespace(x).expm1(-abs(x))
        + namespace(x).square(x)
    ),
    "logarithms": lambda x: namespace(x).log(abs(x) + 1.0) - namespace(x).log1p(abs(x)),
    "zeros and ones": lambda x: namespace(x).zeros_like(x) + namespace(x).ones_like(x) * 2.0 * x,
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_written_is_what_is_computed(name: str, value: float) -> None:
    with np.errstate(all="ignore"):
        want = FUNCTIONS[name](np.asarray(value))
        got = evaluated(FUNCTIONS[name], value)
    np.testing.assert_array_equal(np.float64(got), np.float64(want))


def assert_computed(name: str, function: Callable[[Any], Any]) -> None:
    """Compare what a compiler made of a function with what arrays make of it."""
    values = np.array(VALUES)
    with np.errstate(all="ignore"):
        want = [float(FUNCTIONS[name](value)) for value in values]
    got = [function(float(value)) for value in values]
    np.testing.assert_allclose(got, want, rtol=tolerances.rounding("float64", operations=10))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numba_computes_what_is_written(name: str) -> None:
    numba = pytest.importorskip("numba")
    program, result = traced(FUNCTIONS[name], "float64")
    lines = PYTHON.lines(program.once + program.each)
    names: dict[str, Any] = {"np": np, "math": math}
    exec("\n    ".join(["def f(x):", *lines, f"return {PYTHON.written(result)}"]), names)
    assert_computed(name, numba.njit("float64(float64)", error_model="numpy")(names["f"]))


@pytest.fixture(scope="module")
def of_c(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a library of all functions, compiled as C++."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler is found")
    text = ["#include <cmath>"]
    for index, function in enumerate(FUNCTIONS.values()):
        program, result = traced(function, "float64")
        lines = " ".join(C.lines(program.once + program.each))
        text.append(
            f'extern "C" double f{index}(double x) {{ {lines} return {C.written(result)}; }}'
        )
    path: Path = tmp_path_factory.mktemp("c")
    (path / "f.cpp").write_text("\n".join(text))
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror"]
    subprocess.run([compiler, *flags, "-o", path / "f.so", path / "f.cpp"], check=True)
    return ctypes.CDLL(f"{path}/f.so")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_c_compiler_computes_what_is_written(name: str, of_c: Any) -> None:
    function = of_c[f"f{list(FUNCTIONS).index(name)}"]
    function.argtypes, function.restype = [ctypes.c_double], ctypes.c_double
    assert_computed(name, function)


@pytest.mark.parametrize("count", [1.0, 2.0, 1000.0])
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_bias_corrections(beta: float, count: float) -> None:
    want = numerics.one_minus_power(beta, np.asarray(count))
    got = evaluated(lambda x: numerics.one_minus_power(beta, x), count)
    assert got == pytest.approx(float(want), rel=1e-15)


def lines(program: Program, language: Any) -> tuple[list[str], list[str]]:
    return language.lines(program.once), language.lines(program.each)


def test_what_entries_share_is_computed_once() -> None:
    program = Program()
    x = program.variable("x", "float32", varies=True)
    a = program.variable("a", "float32", varies=False)
    result = (1.0 - 0.9) * a * x + (1.0 - 0.9) * a
    once, each = lines(program, C)
    assert once == ["const float t0 = 0.10000000149011612f * a;"]
    assert each == ["const float t1 = t0 * x;", "const float t2 = t1 + t0;"]
    assert result.name == "t2"
    assert lines(program, PYTHON)[0] == ["t0 = np.float32(0.09999999999999998) * a"]


def test_numbers_are_rounded_once() -> None:
    """As the standard has it for a Python number that meets a float32 array."""
    program, _ = traced(lambda x: (1.0 - 0.999) * x + 1e60, "float32")
    first, second = C.lines(program.each)
    literal = first.split("= ")[1].split("f *")[0]
    assert float(literal) == float(np.float32(1.0 - 0.999))
    assert "1.0f / 0.0f" in second


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda n: n + 0.5, "combines int32 with 0.5"),
        (lambda n: n + 2**31, "combines int32 with 2147483648"),
        (lambda n: n + True, "combines int32 with True"),
        (lambda n: n / 2, "takes / of int32"),
        (lambda n: n * 2, r"takes \* of int32"),
        (lambda n: n**2, "takes pow of int32"),
        (lambda n: abs(n), "takes abs of int32"),
        (lambda n: -n, "takes neg of int32"),
        (lambda n: n < 2.0, "combines int32 with 2.0"),
    ],
)
def test_counts_are_only_counted(function: Callable[[Any], Any], why: str) -> None:
    """Languages differ in what integers come to: 7 / 2, the size that overflows, abs."""
    with pytest.raises(UntraceableError, match=why):
        traced(function, "int32")


def test_integers_stay_integers_until_they_are_cast() -> None:
    program, result = traced(lambda x: namespace(x).astype(x + 1, "float32") - 1.0, "int32")
    assert C.lines(program.each) == [
        "const int t0 = x + 1;",
        "const float t1 = (float)(t0);",
        "const float t2 = t1 - 1.0f;",
    ]
    assert result.dtype == "float32"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x if x > 0.0 else -x, "branches on a value"),
        (lambda x: max(x, 0.0), "branches on a value"),
        (lambda x: namespace(x).sum(x), "calls sum"),
        (lambda x: namespace(x).linalg.norm(x), "calls linalg"),
        (lambda x: x + np.ones(3), "combines float64 with numpy.ndarray"),
        (lambda x: x * "a", "combines float64 with builtins.str"),
        (lambda x: x + namespace(x).astype(x, "float32"), "combines dtypes: float32, float64"),
        (lambda x: namespace(x).where(x > 0.0, 1.0, 0.0), "combines dtypes: numbers alone"),
        (lambda x: namespace(x).astype(x, "int32"), "casts float64 to int32"),
        (lambda x: namespace(x).astype(x, np.float64), "compares a dtype with <class"),
        (lambda x: namespace(x).astype(x > 0.0, "float16"), "casts bool to float16"),
        (lambda x: -namespace(x).astype(x, "float16"), "takes neg of float16"),
        (
            lambda x: namespace(x).where(x > 0.0, namespace(x).astype(x, "float16"), 0.0),
            "takes where of float16",
        ),
        (lambda x: (x > 0.0) * 2.0, r"takes \* of bool"),
        (lambda x: (x > 0.0) + (x > 1.0), r"takes \+ of bool"),
        (lambda x: (x > 0.0) < 0.5, "takes < of bool"),
        (lambda x: (x > 0.0) == 2.0, "combines bool with 2.0"),
        (lambda x: (x > 0.0) * x, "combines dtypes: bool, float64"),
        (lambda x: x & (x > 0.0), "combines dtypes: bool, float64"),
        (lambda x: x | 1, r"takes \| of float64"),
        (lambda x: ~x, "takes not of float64"),
        (lambda x: x * True, "combines float64 with True"),
        (lambda x: x + np.int64(2), "combines float64 with np.int64"),
        (lambda x: namespace(x).astype(x, "float32") * np.float64(0.5), "combines float32 with"),
        (lambda x: namespace(x).where(x, x, 0.0), "chooses by what is no boolean"),
        (lambda x: namespace(x).exp(x > 0.0), "takes exp of bool"),
        (lambda x: namespace(x).zeros_like(x, dtype="bool"), "combines bool with 0"),
        (lambda x: x * 2.0 if x.ndim else x, "asks an array for its ndim"),
        (lambda x: x / math.sqrt(math.prod(x.shape)), "asks an array for its shape"),
        (lambda x: x / x.size, "asks an array for its size"),
        (lambda x: x * (2.0 if hasattr(x, "device") else 3.0), "asks an array for its device"),
        (lambda x: x * len(x), "asks an array for its length"),
        (lambda x: x * x.T, "asks an array for its T"),
        (lambda x: x * 2.0 if x.dtype == np.float64 else x, "compares a dtype with <class"),
        (lambda x: x * 2.0 if np.float64 != x.dtype else x, "compares a dtype with <class"),
    ],
)
def test_what_is_no_formula_is_refused(function: Callable[[Any], Any], why: str) -> None:
    with pytest.raises(UntraceableError, match=why):
        traced(function, "float64")


def test_numbers_of_numpy_are_numbers() -> None:
    program, result = traced(lambda x: np.float64(2.0) * x + np.float32(1.0), "float64")
    assert isinstance(result, Scalar)
    assert C.lines(program.each) == ["const double t0 = 2.0 * x;", "const double t1 = t0 + 1.0;"]


def test_the_step_of_a_rule_reads_like_the_formula() -> None:
    """The Hessian-free algorithm of section 10 for SGD, as it comes out of the core's own code."""
    program = Program()

    def array(name: str) -> Scalar:
        return program.variable(name, "float32", varies=True)

    def number(name: str, dtype: str = "float32") -> Scalar:
        return program.variable(name, dtype, varies=False)

    leaf = Leaf.of(array("w"), {}, number("count", "int32"), average=array("a"))
    product, _, leaf = one_pass(
        mo.SGD(weight_decay=0.5),
        leaf,
        array("g"),
        Jet(number("value"), number("rate")),
        lr=number("lr"),
        mask=number("goes_on", "bool"),
        discount=number("gamma"),
    )
    lines = C.lines(program.each)
    results = [result.name for result in (leaf.param.value, product, leaf.average)]
    # the scalars' numbers count what was traced and not written too
    order = dict.fromkeys(re.findall(r"\bt\d+\b", "\n".join(lines)))
    names = {name: f"x{place}" for place, name in enumerate(order)}
    renamed = [re.sub(r"\bt\d+\b", lambda found: names[found[0]], line) for line in lines]
    assert renamed == [
        "const float x0 = x1 ? a : w;",
        "const float x2 = w - x0;",
        "const float x3 = 0.5f * w;",
        "const float x4 = g + x3;",
        "const float x5 = x6 * x4;",
        "const float x7 = w - x5;",
        "const float x8 = x9 * x2;",
        "const float x10 = x0 + x8;",
        "const float x11 = x2 * g;",
        "const float x12 = x13 ? x11 : 0.0f;",
    ]
    assert [names[name] for name in results] == ["x7", "x12", "x10"]
