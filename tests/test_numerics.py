"""Functions for formulas: values as the namespace's, derivatives as central differences."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.tolerances import FORMULA, STEP, relative_error

from metaopt import numerics
from metaopt.jets import Jet

AT = np.array([0.3, 0.8, 1.7, 2.5])
#: Two directions, and how the argument curves along them.
FIRST = np.array([[1.0, -0.5, 0.7, 2.0], [0.4, 1.1, -0.3, 0.6]])
SECOND = np.array([[[0.2, 0.1, -0.4, 0.3], [0.5, -0.2, 0.1, 0.0]]] * 2)
SECOND = SECOND + SECOND.swapaxes(0, 1)

#: Of one argument, with the value that NumPy gives.
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "abs": (lambda x: numerics.abs(1.0 - x), lambda x: np.abs(1.0 - x)),
    "exp": (numerics.exp, np.exp),
    "log": (numerics.log, np.log),
    "maximum": (
        lambda x: numerics.maximum(x * x, numerics.maximum(2.0, 3.0 * x)),
        lambda x: np.maximum(x * x, np.maximum(2.0, 3.0 * x)),
    ),
    "minimum": (
        lambda x: numerics.minimum(numerics.minimum(x * x, 2.0), 3.0 * x),
        lambda x: np.minimum(np.minimum(x * x, 2.0), 3.0 * x),
    ),
    "where": (
        lambda x: numerics.where(x - 1.0, x * x, numerics.where(x - 0.5, 1.0, 3.0 * x)),
        lambda x: np.where(x > 1.0, x * x, np.where(x > 0.5, 1.0, 3.0 * x)),
    ),
    "whole power": (lambda x: numerics.power(x - 1.0, 3), lambda x: (x - 1.0) ** 3),
    "square": (lambda x: (x - 1.0) ** 2, lambda x: (x - 1.0) ** 2),
    "first power": (lambda x: x**1 + x**0, lambda x: x + 1.0),
    "root": (lambda x: x**0.5, np.sqrt),
    "number to it": (lambda x: 0.9**x, lambda x: 0.9**x),
    "to itself": (lambda x: x**x, lambda x: x**x),
    "to a count": (
        lambda x: x ** (Jet(np.asarray(3.0), order=2) if isinstance(x, Jet) else 3.0),
        lambda x: x**3.0,
    ),
    "1 over": (lambda x: 1.0 / numerics.power(x, 2), lambda x: 1.0 / x**2),
}


def along(function: Callable[[Any], Any], t: float, k: int) -> Any:
    """Return the function's jet a little further along direction k, as the argument curves."""
    value = AT + t * FIRST[k] + 0.5 * t * t * SECOND[k, k]
    return function(Jet(value, FIRST + t * SECOND[k], SECOND, order=2))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_equal_central_differences(name: str) -> None:
    function, plain = FUNCTIONS[name]
    got = along(function, 0.0, 0)
    np.testing.assert_allclose(got.value, plain(AT), rtol=1e-15)
    np.testing.assert_allclose(function(AT), plain(AT), rtol=1e-15)
    for k in range(2):
        ahead, behind = along(function, STEP, k), along(function, -STEP, k)
        assert relative_error(got.first[k], (ahead.value - behind.value) / (2 * STEP)) < FORMULA
        slope = (ahead.first - behind.first) / (2 * STEP)
        assert relative_error(got.second[:, k], slope) < FORMULA


def test_values_at_the_edges() -> None:
    values = np.array([np.nan, 1.0, -2.0, 0.0])
    np.testing.assert_array_equal(numerics.maximum(values, 0.0), [np.nan, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(numerics.minimum(0.0, values), [np.nan, 0.0, -2.0, 0.0])
    ties = numerics.maximum(Jet(np.zeros(1), np.ones(1)), Jet(np.zeros(1), 2.0 * np.ones(1)))
    assert ties.first == 1.0
    assert numerics.abs(Jet(np.zeros(1), np.ones(1))).first == 0.0
    zero = Jet(np.zeros(1), np.ones((1, 1)), order=2)
    square: Any = zero**2
    assert square.first == 0.0
    assert square.second == 2.0
    assert (zero**1).first == 1.0
    assert (zero**0).first is None
    with pytest.raises(TypeError, match=r"`x` or `y` must be an array; got 1\.0 and 0\.0"):
        numerics.where(values, 1.0, 0.0)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
def test_a_sign_is_that_of_numpy(library: str) -> None:
    xp = pytest.importorskip(library)
    values = [np.nan, np.inf, 2.0**-126, 0.0, -0.0, -(2.0**-126), -2.0, -np.inf]
    got = np.asarray(numerics.sign(xp.asarray(values, dtype=xp.float32)))
    np.testing.assert_array_equal(got, np.sign(np.asarray(values)))


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (lambda jet: jet == 1.0, "a jet cannot be compared.*metaopt.numerics.where"),
        (lambda jet: jet != 1.0, "a jet cannot be compared"),
        (lambda jet: jet < 1.0, "a jet cannot be compared"),
        (lambda jet: jet >= 1.0, "a jet cannot be compared"),
        (lambda jet: max(jet, 0.0), "a jet cannot be compared"),
        (lambda jet: 1.0 if jet else 2.0, "neither true nor false.*metaopt.numerics.where"),
        (lambda jet: not jet, "neither true nor false"),
    ],
)
def test_a_jet_is_not_compared(branch: Callable[[Any], Any], message: str) -> None:
    """It would be False, whatever it is, and the run go on with other weights."""
    with pytest.raises(TypeError, match=message):
        branch(Jet(np.asarray(1.0)))
