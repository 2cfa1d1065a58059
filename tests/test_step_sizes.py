"""Step-size maps: value, derivatives and inverse agree; bounds are a projection and no more."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metaopt_conformance.table import SIGMAS, sigma_of
from metaopt_conformance.tolerances import FORMULA, relative_error, rounding

import metaopt as mo
from metaopt import numerics
from metaopt.arrays import namespace
from metaopt.step_sizes import StepSizeMap, step_size_map, step_sizes

SETTINGS = settings(
    deadline=None,
    max_examples=20,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

MAPS: dict[str, StepSizeMap] = {
    **{name: step_size_map(sigma) for name, sigma in SIGMAS.items()},
    "sigmoid, narrow": mo.Sigmoid(0.9, 1.1),
}
every_map = pytest.mark.parametrize("name", MAPS)


def betas(lo: float = -25.0, hi: float = 25.0, size: int = 101) -> Any:
    return np.linspace(lo, hi, size)


def reachable(sigma: StepSizeMap) -> Any:
    """Return step sizes over the whole range of the map, and 100 orders of magnitude at most."""
    lo, hi = sigma.range
    if lo == -math.inf:
        positive = np.geomspace(1e-50, 1e50, 101)
        return np.concatenate([-positive[::-1], positive])
    if hi == math.inf:
        return np.geomspace(1e-100, 1e100, 201)
    return np.exp(np.linspace(math.log(lo), math.log(hi), 103)[1:-1])


def derivatives(sigma: StepSizeMap, beta: Any) -> tuple[Any, Any, Any]:
    """Return the step sizes and their first two derivatives along beta itself."""
    plain = step_sizes(sigma, beta)
    along = step_sizes(sigma, beta, namespace(beta).ones_like(beta)[None, ...], order=2)
    return plain.value, plain.first, along.second[0, 0, ...]  # type: ignore[index]


@every_map
def test_first_and_second_are_the_derivatives(backend: Any, name: str) -> None:
    sigma, beta, h = MAPS[name], betas(-8.0, 8.0), np.finfo(float).eps ** (1 / 3)

    def of(order: int, at: Any) -> Any:
        return backend.to_numpy(derivatives(sigma, backend.asarray(at))[order])

    for order in (0, 1):
        slope = (of(order, beta + h) - of(order, beta - h)) / (2 * h)
        scale = np.maximum(np.abs(slope), np.abs(of(order, beta)))
        assert np.all(np.abs(of(order + 1, beta) - slope) <= FORMULA * scale)


@every_map
def test_the_formulas_are_those_of_section_8(backend: Any, name: str) -> None:
    sigma, beta = MAPS[name], betas(-8.0, 8.0)
    by_hand = sigma_of(sigma)
    want = (by_hand.value(beta), by_hand.first(beta), by_hand.second(beta))
    there = backend.asarray(beta)
    for ours, theirs in zip(derivatives(sigma, there), want, strict=True):
        assert relative_error(backend.to_numpy(ours), theirs) < rounding("float64", 20)


@every_map
def test_inverse_undoes_value(backend: Any, name: str) -> None:
    """Up to the rounding of the step size, which moves beta by eps value / first."""
    sigma, beta = MAPS[name], betas(-25.0, 25.0)
    there = backend.asarray(beta)
    value = sigma.value(there)
    conditioning = np.abs(backend.to_numpy(value)) / np.maximum(
        backend.to_numpy(derivatives(sigma, there)[1]), 1e-300
    )
    if isinstance(sigma, mo.Sigmoid):
        # beyond, the step size is within some roundings of an end, where beta is anything
        beta = beta[steep := conditioning < 1e8]
        there, conditioning = backend.asarray(beta), conditioning[steep]
        value = sigma.value(there)
    got = backend.to_numpy(sigma.inverse(value))
    allowed = rounding("float64", 20) * (1.0 + np.abs(beta) + conditioning)
    assert np.all(np.abs(got - beta) <= allowed)


@every_map
def test_value_undoes_inverse(backend: Any, name: str) -> None:
    sigma = MAPS[name]
    sizes = reachable(sigma)
    beta = sigma.inverse(backend.asarray(sizes))
    got = backend.to_numpy(sigma.value(beta))
    # a rounding of beta is a relative error of |beta| roundings
    allowed = rounding("float64", 20) * np.maximum(1.0, np.abs(np.log(np.abs(sizes))))
    assert np.all(np.abs(got - sizes) <= allowed * np.abs(sizes))


@every_map
@SETTINGS
@given(pair=st.lists(st.floats(-30, 30), min_size=2, max_size=2, unique=True))
def test_every_map_increases(backend: Any, name: str, pair: list[float]) -> None:
    sigma = MAPS[name]
    lower, upper = sorted(pair)
    there = backend.asarray(np.array([lower, upper]))
    low, high = backend.to_numpy(sigma.value(there))
    assert low <= high * (1.0 + rounding("float64", 1)) if high > 0 else low <= high
    if upper - lower > 1e-3 and max(abs(lower), abs(upper)) < 10:
        assert low < high
    assert np.all(backend.to_numpy(derivatives(sigma, there)[1]) >= 0)


@every_map
@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
def test_dtype_and_shape_are_kept(backend: Any, name: str, shape: tuple[int, ...]) -> None:
    sigma = MAPS[name]
    beta = backend.asarray(np.full(shape, -0.3, dtype="float32"))
    for array in derivatives(sigma, beta):
        assert array.dtype == beta.dtype
        assert tuple(array.shape) == shape
    inside = backend.asarray(np.full(shape, 1.0 if "narrow" in name else 0.25, dtype="float32"))
    assert sigma.inverse(inside).dtype == inside.dtype
    assert tuple(sigma.inverse(inside).shape) == shape


@every_map
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_meta_parameters_give_no_nan_and_no_warning(
    backend: Any, name: str, dtype: str
) -> None:
    """Only where the step size itself exceeds the dtype may it be inf; warnings are errors."""
    sigma = MAPS[name]
    top = {"exp": 80.0}.get(name, 1e30)
    beta = backend.asarray(np.array([-1e30, -1e3, -100.0, 0.0, 60.0, top], dtype=dtype))
    numbers = [backend.to_numpy(x) for x in derivatives(sigma, beta)]
    for array in numbers:
        assert np.all(np.isfinite(array))
    lo, hi = sigma.range
    slack = 1.0 + rounding(dtype, 20)
    assert np.all(numbers[0] >= (lo / slack if lo > 0 else lo))
    assert np.all(numbers[0] <= hi * slack)
    assert np.all(numbers[1] >= 0)


@every_map
def test_the_smallest_and_largest_step_sizes_have_a_beta(name: str) -> None:
    lo, hi = MAPS[name].range
    small = lo * (1 + 1e-9) if lo > 0 else 1e-300
    large = hi * (1 - 1e-9) if hi < math.inf else 1e300
    for size in (small, large):
        beta: Any = MAPS[name].inverse(np.asarray(size))
        assert np.isfinite(beta)


@pytest.mark.parametrize("pair", [(0.0, 1.0), (-1.0, 1.0), (0.5, 0.5), (0.5, 0.1), (0.1, math.inf)])
def test_sigmoid_refuses_bounds_that_are_none(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must satisfy 0 < lo < hi < inf"):
        mo.Sigmoid(*pair)


def test_maps_have_names_and_values() -> None:
    assert step_size_map("exp") == mo.Exp()
    assert step_size_map("identity") == mo.Identity()
    assert step_size_map("softplus") == mo.Softplus()
    assert step_size_map(mo.Sigmoid(0.1, 0.2)) == mo.Sigmoid(0.1, 0.2)
    with pytest.raises(ValueError, match="`sigma` must be one of 'exp', 'identity', 'softplus'"):
        step_size_map("logistic")


# --- bounds -------------------------------------------------------------------------------------


def rosy(step: int, params: Any) -> dict[str, Any]:
    """Return gradients of one sign for some steps, and then of changing sign."""
    sign = 1.0 if step < 15 else (-1.0) ** step
    return {name: 0.0 * value + sign * 5.0 for name, value in params.items()}


def sizes_of(opt: mo.MetaOptimize, state: mo.State) -> Any:
    return np.asarray(opt.step_sizes(state)["all"])


@pytest.mark.parametrize(
    "meta",
    [mo.SGD(), mo.Lion(betas=(0.5, 0.5)), mo.AdamW(betas=(0.5, 0.9))],
    ids=lambda rule: type(rule).__name__,
)
@pytest.mark.parametrize("meta_first", [False, True])
@every_map
def test_bounds_clamp_the_step_size_at_both_ends(name: str, meta: Any, meta_first: bool) -> None:
    bounds = (0.98, 1.02) if "narrow" in name else (0.07, 0.16)
    opt = mo.MetaOptimize(
        base=mo.SGD(),
        meta=meta,
        step_size=1.0 if "narrow" in name else 0.1,
        meta_lr=0.5,
        discount=0.0,  # forgets at once that the steps were too short
        sigma=MAPS[name],
        bounds=bounds,
        meta_first=meta_first,
    )
    params = {"w": np.asarray([3.0, -1.0])}
    state, seen = opt.init(params), []
    for step in range(40):
        params, state = opt.step(params, rosy(step, params), state)
        seen.append(float(sizes_of(opt, state)))
    slack = rounding("float64", 20)
    assert min(seen) == pytest.approx(bounds[0], rel=slack)
    assert max(seen) == pytest.approx(bounds[1], rel=slack)
    assert np.all(np.array(seen) >= bounds[0] * (1 - slack))
    assert np.all(np.array(seen) <= bounds[1] * (1 + slack))


BY_BLOCK: dict[str, Any] = {
    "scalar": {"all": (0.07, 0.16)},
    "tensor": {"w": (0.07, 0.16)},
    "node": {"w": (0.07, 0.16)},
    "weight": {"w": (0.07, 0.16)},
}


@pytest.mark.parametrize("backend", ["numpy", "strict", "torch", "jax"], indirect=True)
@pytest.mark.parametrize("blocks", BY_BLOCK)
def test_bounds_by_block_hold_for_these_alone(backend: Any, blocks: str) -> None:
    common: dict[str, Any] = {
        "base": mo.SGD(),
        "meta": mo.Lion(),
        "step_size": 0.1,
        "discount": 1.0,
    }
    common |= {"meta_lr": 0.5, "blocks": blocks}
    opt = mo.MetaOptimize(**common, bounds=BY_BLOCK[blocks])
    free, bound = (mo.MetaOptimize(**common, bounds=pair) for pair in (None, (0.07, 0.16)))
    params = backend.tree({"w": np.ones((2, 3)), "b": np.asarray([-1.0])})
    runs = []
    for each in (opt, free, bound):
        state, at = each.init(params), params
        for step in range(6):
            at, state = each.step(at, rosy(step, at), state)
        runs.append(backend.to_numpy(each.step_sizes(state)))
    for name, value in runs[0].items():
        want = runs[2 if name in BY_BLOCK[blocks] else 1]
        np.testing.assert_array_equal(value, want[name])
    assert np.max(runs[1]["b" if blocks != "scalar" else "all"]) > 0.2


def test_bounds_are_before_the_multiplier() -> None:
    opt = mo.MetaOptimize(
        base=mo.SGD(), meta=mo.SGD(), step_size=0.1, meta_lr=0.0, bounds=(0.05, 0.2), discount=1.0
    )
    params = {"w": np.asarray([1.0])}
    moved, _ = opt.step(params, {"w": np.asarray([1.0])}, opt.init(params), lr=10.0)
    np.testing.assert_allclose(moved["w"], [0.0], atol=rounding("float64", 10))


@pytest.mark.parametrize("approximation", ["l", "2x2"])
def test_the_projection_is_not_differentiated(approximation: str) -> None:
    """Section 8: one step from the same state, with a bound that bites and without bounds.

    The step sizes differ after it; every trace, B included, is the same.
    """
    common: dict[str, Any] = {
        "base": mo.SGD(),
        "meta": mo.SGD(),
        "step_size": 0.1,
        "meta_lr": 0.3,
        "discount": 0.9,
        "curvature": "exact",
        "approximation": approximation,
        "blocks": "tensor",
    }
    free, bound = mo.MetaOptimize(**common), mo.MetaOptimize(**common, bounds=(0.0999, 0.1001))
    params = {"a": np.asarray([1.0, 2.0]), "b": np.asarray([-1.0])}

    def stepped(opt: mo.MetaOptimize, params: Any, state: Any) -> Any:
        grads = {"a": params["a"] + params["b"], "b": params["b"] + params["a"].sum()}

        def hvp(t: Any) -> Any:
            return {"a": t["a"] + t["b"], "b": t["b"] + t["a"].sum(axis=1, keepdims=True)}

        return opt.step(params, grads, state, hvp=hvp)

    state = free.init(params)
    params, state = stepped(free, params, state)
    _, after_free = stepped(free, params, state)
    _, after_bound = stepped(bound, params, state)
    assert np.all(after_free.beta != after_bound.beta)
    slack = 1 + rounding("float64", 10)
    for size in bound.step_sizes(after_bound).values():
        assert 0.0999 / slack <= size <= 0.1001 * slack
    assert bool(after_free.beta_trace) == (approximation == "2x2")
    for key, trace in after_free.beta_trace.items():
        np.testing.assert_array_equal(trace, after_bound.beta_trace[key])
    for leaf, trace in after_free.trace.items():
        np.testing.assert_array_equal(trace, after_bound.trace[leaf])


def test_a_bound_at_the_end_of_the_range_bounds_nothing() -> None:
    for sigma, bounds in (("exp", (0.0, math.inf)), ("identity", (-math.inf, math.inf))):
        common: dict[str, Any] = {
            "base": mo.SGD(),
            "meta": mo.SGD(),
            "sigma": sigma,
            "discount": 1.0,
        }
        free = mo.MetaOptimize(**common, step_size=0.1, meta_lr=0.1)
        bound = mo.MetaOptimize(**common, step_size=0.1, meta_lr=0.1, bounds=bounds)
        params = {"w": np.asarray([1.0, -2.0])}
        a = b = free.init(params)
        pa = pb = params
        for _ in range(5):
            pa, a = free.step(pa, pa, a)
            pb, b = bound.step(pb, pb, b)
        np.testing.assert_array_equal(a.beta, b.beta)


@pytest.mark.parametrize(
    ("backend", "blocks"),
    [
        *(
            (library, blocks)
            for library in ("numpy", "strict", "torch")
            for blocks in ("scalar", "tensor", "node", "weight", {"all of it": "*"})
        ),
        ("jax", "weight"),
        ("dask", "weight"),
    ],
    indirect=["backend"],
)
def test_bounds_hold_for_every_kind_of_block(backend: Any, blocks: Any) -> None:
    opt = mo.MetaOptimize(
        base=mo.SGD(),
        meta=mo.Lion(),
        step_size=0.1,
        meta_lr=0.5,
        blocks=blocks,
        bounds=(0.07, 0.16),
        discount=1.0,
    )
    params = backend.tree({"w": np.ones((2, 3)), "b": np.asarray([-1.0])})
    state = opt.init(params)
    for step in range(6):
        params, state = opt.step(params, rosy(step, params), state)
    for value in backend.to_numpy(opt.step_sizes(state)).values():
        assert relative_error(value, np.full(value.shape, 0.16)) < rounding("float64", 20)


class Own(StepSizeMap):
    """A map of one's own, of positive step sizes."""

    range = (0.0, math.inf)

    def __init__(self, value: Any, inverse: Any = lambda size: size) -> None:
        self._value, self._inverse = value, inverse

    def value(self, beta: Any) -> Any:
        return self._value(beta)

    def inverse(self, step_size: Any) -> Any:
        return self._inverse(step_size)


@pytest.mark.parametrize(
    ("value", "slope"),
    [
        (lambda b: 0.1 * b, 0.1),
        (lambda b: b / 10.0, 0.1),
        (lambda b: b + b, 2.0),
        (lambda b: 2 * b, 2.0),
        (lambda b: 1.0 - 3.0 * -b, 3.0),
        (lambda b: numerics.maximum(b, 1e-3), 1.0),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_map_that_is_linear_has_its_slope(
    backend: Any, value: Any, slope: float, dtype: str
) -> None:
    beta = backend.asarray(np.array([0.5, 2.0], dtype))
    first: Any = step_sizes(Own(value), beta).first
    assert first.dtype == beta.dtype
    np.testing.assert_allclose(backend.to_numpy(first), np.full(2, slope, dtype), rtol=1e-6)


def test_a_map_of_ones_own_learns_as_its_scaled_identity() -> None:
    """0.01 b with a meta step of 1 moves step sizes as b with 1e-4."""
    sizes = []
    for sigma, meta_lr in ((Own(lambda b: 0.01 * b, lambda s: s / 0.01), 1.0), ("identity", 1e-4)):
        opt = mo.MetaOptimize(
            base=mo.SGD(), meta=mo.SGD(), step_size=0.01, meta_lr=meta_lr, sigma=sigma, discount=1.0
        )
        params = {"w": np.array([1.0, -2.0])}
        state = opt.init(params)
        for _ in range(4):
            params, state = opt.step(params, {"w": params["w"]}, state)
        sizes.append(float(opt.step_sizes(state)["all"]))
    assert relative_error(sizes[0], sizes[1]) < 1e-10


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (Own(lambda b: np.exp(b)), "one formula of beta"),
        (Own(lambda b: b if b > 0 else 2 * b), "one formula of beta"),
        (Own(lambda b: 0.0 * b.value), "one formula of beta"),
    ],
)
def test_a_map_that_no_derivative_passes_is_refused(sigma: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), sigma=sigma, discount=1.0)


def test_a_map_without_a_range_is_refused() -> None:
    sigma = Own(lambda b: b)
    sigma.range = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="`sigma` must have a `range`"):
        mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), sigma=sigma, discount=1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"step_size": 1e-25, "meta_lr": 0.0},
        {"step_size": 1e22, "bounds": (1e20, 1e25)},
        {"step_size": 1e-27, "bounds": (1e-30, 1e-25), "sigma": "softplus"},
    ],
    ids=str,
)
def test_step_sizes_where_beta_is_not_kept_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must (lie|leave step sizes) between"):
        mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), **options)


def test_bounds_of_a_sigmoid_span_less_than_the_floats() -> None:
    with pytest.raises(ValueError, match="less than 1e308 times"):
        mo.Sigmoid(1e-308, 1e308)
