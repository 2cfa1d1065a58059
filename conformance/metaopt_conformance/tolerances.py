"""What counts as equal: every allowance of the tests, each with its reason.

Errors are relative to the largest expected entry of the array compared, as an update that is the
difference of larger numbers keeps their absolute rounding.
"""

from typing import Any

import numpy as np

#: 50 float64 steps against the framework's own optimizer, which orders its operations otherwise:
#: 50 steps of some 20 operations at 1.1e-16 each are 1e-13; one digit more for cancellation.
OPTIMIZER = 1e-12

#: Whole runs of float64 against a literature form written out: the same operations in another
#: order; 1e-13 by count, as above.
LITERATURE = 1e-12

#: One or a dozen float64 steps against the dense oracle, which sums in another order and over
#: structural zeros: 12 steps of 50 operations at 1.1e-16 are 7e-14, times the growth of an error
#: along such a run, 1e2 on the problem used.
ORACLE = 1e-11

#: Traces against central differences of whole runs in float64: the step h = eps**(1/3) balances
#: truncation h**2 and rounding eps / h at 4e-11, times the third derivative of the run; 2e-9 was
#: seen at worst.
FINITE_DIFFERENCES = 1e-6

#: The third trace against differences of whole runs in which the trace itself is rerun: an order
#: more of derivatives stands in the truncation; 2e-6 was seen at worst.
THIRD_DIFFERENCES = 1e-5

#: First derivatives of one formula against its central differences, as above but a single step.
FORMULA = 1e-7


#: How far Y has to move from E in a case that is to show how it moves.
SHOWN = 1e-3

#: Step of central differences: the cube root of eps balances truncation and rounding.
STEP = float(np.finfo(np.float64).eps) ** (1.0 / 3.0)


def optimizer(dtype: str, steps: int) -> float:
    """Return the allowance for a run against the framework's own optimizer: see `OPTIMIZER`."""
    return OPTIMIZER * (steps / 50.0) * eps(dtype) / eps("float64")


def trajectory(steps: int) -> float:
    """Return the allowance for a float64 run against the oracle.

    A step of some 60 operations rounds by 60 * 1.1e-16; `ORACLE` holds for a dozen steps, and
    errors were seen to grow no faster than the number of steps on these problems.
    """
    return ORACLE * max(1.0, steps / 12.0)


def single_step(*, wide: bool) -> float:
    """Return the allowance for one step from a given state, in float64 if `wide`, else in float32.

    Some 60 roundings of half an eps each, if all go the same way; half of that was seen. In float64
    the oracle rounds too, in the literal 1 - 0.999**t by 1e3 eps. Everything is computed in one of
    these; what narrower parameters lose beyond it is `spacing`.
    """
    return 1e3 * eps("float64") if wide else 60 * 0.5 * eps("float32")


def sign_margin(*, wide: bool) -> float:
    """Return the share of its terms below which rounding may have made the sign of a sum."""
    return 64.0 * eps("float64" if wide else "float32")


def eps(dtype: str) -> float:
    """Return the distance from 1 to the next number."""
    return {"bfloat16": 2.0**-7}.get(dtype) or float(np.finfo(dtype).eps)


def spacing(dtype: str, values: Any) -> Any:
    """Return the distance from each value to the next of a dtype; a rounding is half of that."""
    least = {"float16": 2.0**-14, "float64": 2.0**-1022}.get(dtype, 2.0**-126)
    _, exponents = np.frexp(np.maximum(np.abs(values), least))
    return np.ldexp(eps(dtype), exponents - 1)


def distance(dtype: str, weights: Any, trace: Any) -> Any:
    """Return what rounding may do to a trace that is the distance from weights to their average.

    Half a spacing each of the weights and of the average, whatever the size of the trace; the
    average is at most their sum.
    """
    return spacing(dtype, np.abs(weights) + np.abs(trace))


def without(slack: Any, got: Any, want: Any) -> Any:
    """Return what was got, moved towards what was wanted by as much as each entry's slack."""
    error = got - want
    return np.where(np.abs(error) <= slack, want, got - np.sign(error) * slack)


def worst(*errors: float) -> float:
    """Return the largest of errors, NaN if one is: Python's `max` would drop it."""
    return float(np.max(errors))


def rounding(dtype: str, operations: int, steps: int = 1) -> float:
    """Return the allowance for rounding alone: 4 eps for each operation of each step.

    A rounding is half an eps; errors of a chain add up, and 4 leaves room for a division or a
    square root that passes twice an error on.
    """
    return 4.0 * eps(dtype) * operations * steps


def relative_error(got: object, want: object, scale: float = 0.0) -> float:
    """Return the largest absolute error over the largest expected entry, or over 1e-300.

    `scale` is what the entries are known to be made of where that is more: a meta-gradient, say, is
    a sum in which almost all may cancel, and keeps the rounding of its terms.
    """
    wanted, gotten = np.asarray(want, dtype=np.float64), np.asarray(got, dtype=np.float64)
    if gotten.shape != wanted.shape:
        msg = f"shapes differ: got {gotten.shape}, want {wanted.shape}"
        raise AssertionError(msg)
    if wanted.size == 0:
        return 0.0
    return float(np.max(np.abs(gotten - wanted)) / max(np.max(np.abs(wanted)), scale, 1e-300))
