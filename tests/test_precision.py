"""Precision: narrow parameters, wide state, and dtypes that stay what they are; section 10."""

import math
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.table import BASES, has, signs
from metaopt_conformance.tolerances import relative_error, rounding

import metaopt as mo

NARROW = [(library, dtype) for library in ("torch", "jax") for dtype in ("float16", "bfloat16")]
narrow = pytest.mark.parametrize(("backend", "dtype"), NARROW, indirect=["backend"])
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "scalar": {},
    "tensor": {"blocks": "tensor", "base": mo.RMSprop(weight_decay=0.1)},
    "node": {
        "blocks": "node",
        "base": mo.Lion(weight_decay=0.1),
        "meta": mo.Lion(),
        "discount": 1.0,
    },
    "weight": {"blocks": "weight", "base": mo.SGD(momentum=0.9), "bounds": (1e-3, 1.0)},
    "meta first": {"meta_first": True, "skip_nonfinite": True},
    "diagonal": {"curvature": "diagonal", "approximation": "2x2"},
    "exact": {"curvature": "exact", "approximation": "2x2", "blocks": "tensor"},
}


def dtype_of(backend: Any, name: str) -> Any:
    if backend.name == "torch":
        return getattr(pytest.importorskip("torch"), name)
    return getattr(pytest.importorskip("jax").numpy, name)


def made(backend: Any, array: Any, dtype: str) -> Any:
    """Return an array of a dtype that NumPy may not have."""
    whole = backend.asarray(np.asarray(array, dtype=np.float64))
    wanted = dtype_of(backend, dtype)
    return whole.to(wanted) if backend.name == "torch" else whole.astype(wanted)


def wide(backend: Any, array: Any) -> Any:
    """Return an array as float64 in NumPy, whatever its dtype."""
    if backend.name == "torch":
        return array.detach().double().numpy()
    return np.asarray(array, dtype=np.float64)


def dtype_name(array: Any) -> str:
    return str(array.dtype).rpartition(".")[2]


def configured(name: str = "scalar", **options: Any) -> mo.MetaOptimize:
    defaults: dict[str, Any] = {
        "base": mo.AdamW(weight_decay=0.1),
        "meta": mo.AdamW(),
        "step_size": 0.05,
        "meta_lr": 0.05,
        "discount": 1.0,
    }
    return mo.MetaOptimize(**(defaults | CONFIGURATIONS[name] | options))


def arrays_of(tree: Any) -> list[Any]:
    if isinstance(tree, mo.State):
        return [array for value in vars(tree).values() for array in arrays_of(value)]
    if hasattr(tree, "items"):
        return [array for value in tree.values() for array in arrays_of(value)]
    return [tree]


def floating(tree: Any) -> set[str]:
    return {name for array in arrays_of(tree) if "float" in (name := dtype_name(array))}


def start(backend: Any, dtypes: dict[str, str]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 2), "b": (3,)}
    return {name: made(backend, rng.normal(size=shapes[name]), d) for name, d in dtypes.items()}


def curvature_of(params: Any) -> dict[str, Any]:
    return {"hvp": lambda t: t, "hessian_diagonal": {n: 0.0 * p + 1.0 for n, p in params.items()}}


@pytest.mark.parametrize(
    ("backend", "dtype", "name"),
    [
        *(("torch", dtype, name) for dtype in ("float16", "bfloat16") for name in CONFIGURATIONS),
        *(("jax", "bfloat16", name) for name in ("node", "weight", "exact")),
        ("jax", "float16", "diagonal"),
    ],
    indirect=["backend"],
)
def test_narrow_parameters_have_wide_state(backend: Any, dtype: str, name: str) -> None:
    opt = configured(name)
    params = start(backend, {"a": dtype, "b": dtype})
    state = opt.init(params)
    kinds = {key: dtype_name(array) for key, array in flat(state).items()}
    for _ in range(2):
        params, state = opt.step(params, params, state, **curvature_of(params))
        assert {dtype_name(p) for p in params.values()} == {dtype}
        assert floating(state) == {"float32"}
        assert {dtype_name(size) for size in opt.step_sizes(state).values()} == {"float32"}
        assert {key: dtype_name(array) for key, array in flat(state).items()} == kinds
    assert all(np.all(np.isfinite(wide(backend, array))) for array in arrays_of(state))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return every array of a state under its path."""
    items = vars(tree) if isinstance(tree, mo.State) else tree
    if not hasattr(items, "items"):
        return {prefix: tree}
    return {
        path: array
        for key, value in items.items()
        for path, array in flat(value, f"{prefix}.{key}").items()
    }


@pytest.mark.parametrize("backend", ["numpy", "strict", "torch", "dask"], indirect=True)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_dtypes_and_shapes_of_the_state_never_change(backend: Any, name: str) -> None:
    for dtype in ("float32", "float64"):
        opt = configured(name)
        params = {
            "a": backend.asarray(np.ones((3, 2), dtype)),
            "b": backend.asarray(np.ones(3, dtype)),
        }
        state = opt.init(params)
        before = {key: (dtype_name(x), tuple(x.shape)) for key, x in flat(state).items()}
        new, after = opt.step(params, params, state, **curvature_of(params))
        assert {key: (dtype_name(x), tuple(x.shape)) for key, x in flat(after).items()} == before
        assert floating(after) == {dtype} == floating(new)


@pytest.mark.parametrize("backend", ["numpy", "strict", "torch", "jax", "dask"], indirect=True)
def test_one_double_leaf_makes_beta_double(backend: Any) -> None:
    opt = configured("tensor", meta=mo.AdamW())
    params = {
        "a": backend.asarray(np.ones((3, 2), "float32")),
        "b": backend.asarray(np.ones(3, "float64")),
    }
    state = opt.init(params)
    for _ in range(2):
        params, state = opt.step(params, params, state)
    assert {name: dtype_name(p) for name, p in params.items()} == {"a": "float32", "b": "float64"}
    assert floating(state.average["a"]) == floating(state.slots["a"]) == {"float32"}
    assert floating(state.average["b"]) == floating(state.slots["b"]) == {"float64"}
    for part in (state.beta, state.meta_slots, state.meta_grad):
        assert floating(part) == {"float64"}


@narrow
def test_leaves_of_mixed_dtypes_each_keep_their_own(backend: Any, dtype: str) -> None:
    for name in ("scalar", "node", "weight", "exact"):
        opt = configured(name)
        dtypes = {"a": dtype, "b": "float32"}
        params = start(backend, dtypes)
        state = opt.init(params)
        for _ in range(2):
            params, state = opt.step(params, params, state, **curvature_of(params))
        assert {key: dtype_name(p) for key, p in params.items()} == dtypes
        assert floating(state) == {"float32"}


@narrow
def test_gradients_of_another_floating_dtype_are_cast(backend: Any, dtype: str) -> None:
    """Cast on entry: a float32 run handed narrow gradients is one handed their float32 values."""
    for name in ("scalar", "exact"):
        opt = configured(name)
        params = start(backend, {"a": "float32", "b": "float32"})
        state, other = opt.init(params), opt.init(params)
        theirs = params
        for _ in range(2):
            grads = start(backend, {"a": dtype, "b": dtype})
            cast = {key: made(backend, wide(backend, g), "float32") for key, g in grads.items()}
            params, state = opt.step(params, grads, state, hvp=lambda t: t)
            theirs, other = opt.step(theirs, cast, other, hvp=lambda t: t)
        for ours, want in zip(arrays_of(state), arrays_of(other), strict=True):
            assert dtype_name(ours) == dtype_name(want)
            np.testing.assert_array_equal(wide(backend, ours), wide(backend, want))
    # and gradients wider than the parameters
    params = start(backend, {"a": dtype, "b": dtype})
    grads = start(backend, {"a": "float32", "b": "float64"})
    new, state = configured().step(params, grads, configured().init(params))
    assert floating(new) == {dtype}
    assert floating(state) == {"float32"}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_arrays_without_memory_go_through_init_and_step(name: str) -> None:
    """Torch's device "meta" has shapes and no values: nothing is read by the host, or moved."""
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16):
        params: Any = {
            "a": torch.empty((3, 2), device="meta", dtype=dtype),
            "b": torch.empty(3, device="meta", dtype=dtype),
        }
        opt = configured(name)
        state = opt.init(params)
        assert {array.device.type for array in arrays_of(state)} == {"meta"}
        before = {key: (x.dtype, x.shape) for key, x in flat(state).items()}
        lr = torch.empty((), device="meta")
        new, after = opt.step(params, params, state, lr=lr, **curvature_of(params))
        assert {array.device.type for array in arrays_of(after)} == {"meta"}
        assert {key: (x.dtype, x.shape) for key, x in flat(after).items()} == before
        assert {key: (p.device.type, p.dtype) for key, p in new.items()} == {
            key: ("meta", dtype) for key in params
        }
        told = opt.diagnostics(after, new) | {"sizes": opt.step_sizes(after)}
        assert {array.device.type for array in arrays_of(told)} == {"meta"}


# --- sums ---------------------------------------------------------------------------------------

MANY = 100_000


@narrow
@pytest.mark.parametrize("level", ["scalar", "tensor", "node"])
@pytest.mark.parametrize("size", [1.0, 2.0**-9], ids=["overflow", "stall"])
def test_large_sums_are_taken_in_float32(backend: Any, dtype: str, level: str, size: float) -> None:
    """1e5 products of 2: beyond float16's 65504, and beyond where a sum of 2**-17 would stall."""
    opt = mo.MetaOptimize(
        base=mo.SGD(), meta=mo.SGD(), step_size=0.5, meta_lr=1e-6, blocks=level, discount=1.0
    )
    params = {"w": made(backend, np.zeros((2, MANY // 2)), dtype)}
    grads = {"w": made(backend, np.full((2, MANY // 2), 2.0 * size), dtype)}
    state = opt.init(params)
    for _ in range(2):
        params, state = opt.step(params, grads, state)
    z = -0.5 * (2.0 * size) ** 2 * MANY
    want = np.array([z / 2, z / 2] if level == "node" else [z])
    # pairwise or not, a float32 sum of equal numbers is this good: each entry adds one rounding
    allowed = rounding("float32", operations=int(math.sqrt(MANY)))
    assert relative_error(wide(backend, state.meta_grad), want) < allowed
    assert np.all(wide(backend, state.restarts) == 0)


@pytest.mark.parametrize("curvature", ["diagonal", "exact"])
@narrow
def test_large_sums_of_curvature_are_taken_in_float32(
    backend: Any, dtype: str, curvature: str
) -> None:
    opt = mo.MetaOptimize(
        base=mo.SGD(),
        meta=mo.SGD(),
        step_size=0.5,
        meta_lr=1e-6,
        curvature=curvature,
        approximation="2x2",
        discount=1.0,
    )
    params = {"w": made(backend, np.zeros(MANY), dtype)}
    grads = {"w": made(backend, np.full(MANY, 2.0), dtype)}
    state = opt.init(params)
    for _ in range(2):
        params, state = opt.step(params, grads, state, **curvature_of(params))
    # Y' = 1 - eta h.v with h = -1 and v = h, at 1e5 weights
    want = np.full((1, 1) if curvature == "exact" else (1,), 1.0 - 1e-6 * MANY)
    allowed = rounding("float32", operations=int(math.sqrt(MANY)))
    assert relative_error(wide(backend, state.beta_trace["beta"]), want) < allowed


# --- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [299, 2999, 4097])
@narrow
def test_counts_are_exact_beyond_the_integers_of_narrow_dtypes(
    backend: Any, dtype: str, count: int
) -> None:
    """Bfloat16 counts to 256 and float16 to 2048; the corrections of both roles go on."""
    opt = mo.MetaOptimize(
        base=mo.AdamW(eps=0.0),
        meta=mo.AdamW(eps=0.0),
        step_size=0.5,
        meta_lr=1e-3,
        discount=1.0,
    )
    params = {"w": made(backend, np.array([1.0, -2.0]), dtype)}
    state = opt.init(params)
    ones = 0 * state.meta_count + 1
    state = replace(
        state,
        count=OrderedDict(w=state.count["w"] + count),
        meta_count=count * ones,
        trace=OrderedDict(w=0.0 * state.trace["w"] + 1.0),
    )
    # of sizes that differ, or z would be 0
    grads = {"w": made(backend, np.array([0.5, -0.25]), dtype)}
    _, after = opt.step(params, grads, state)
    rho, lam, t = 0.9, 0.999, count + 1
    u = (1 - rho) / (1 - rho**t) / math.sqrt((1 - lam) / (1 - lam**t))
    want = np.array([1.0, 1.0]) - 0.5 * u * np.array([1.0, -1.0])
    assert relative_error(wide(backend, after.trace["w"]), want) < rounding("float32", 20)
    moved = wide(backend, state.beta) - 1e-3 * u
    assert relative_error(wide(backend, after.beta), moved) < rounding("float32", 20)
    assert int(wide(backend, after.count["w"])) == t


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [mo.SGD(), mo.AdamW(eps=1e-2)], ids=["SGD", "Adam"])
@pytest.mark.parametrize(
    "base",
    [
        replace(rule, weight_decay=0.01, **({"eps": 1.0} if has(rule, "eps") else {}))
        for rule in BASES.values()
        if not signs(rule)
    ],
    ids=repr,
)
@pytest.mark.parametrize("level", ["scalar", "tensor", "weight"])
def test_a_deep_run_in_float32_is_that_in_float64(level: str, base: Any, meta: Any) -> None:
    """500 steps down a quadratic bowl, along which errors shrink rather than grow."""
    steps, ends = 500, {}
    rng = np.random.default_rng(2)
    data = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=5)}
    scale = {name: 0.5 + rng.random(value.shape) for name, value in data.items()}
    for dtype in ("float32", "float64"):
        opt = mo.MetaOptimize(
            base=base, meta=meta, step_size=0.02, meta_lr=1e-4, discount=0.99, blocks=level
        )
        params = {name: value.astype(dtype) for name, value in data.items()}
        bowl = {name: value.astype(dtype) for name, value in scale.items()}
        state = opt.init(params)
        for _ in range(steps):
            grads = {name: bowl[name] * (params[name] - np.float32(1)) for name in params}
            params, state = opt.step(params, grads, state)
        ends[dtype] = (params, opt.step_sizes(state))
    allowed = rounding("float32", operations=20, steps=steps)
    for narrow_part, wide_part in zip(ends["float32"], ends["float64"], strict=True):
        for name, value in wide_part.items():
            assert relative_error(narrow_part[name], value) < allowed
    for name, value in ends["float64"][0].items():
        assert not np.allclose(value, data[name])


@narrow
def test_a_narrow_run_follows_the_wide_one(backend: Any, dtype: str) -> None:
    """Only the parameters are rounded, once a step."""
    steps = 20
    ends = []
    for kind in (dtype, "float64"):
        opt = mo.MetaOptimize(
            base=mo.SGD(momentum=0.5),
            meta=mo.SGD(),
            step_size=0.1,
            meta_lr=1e-2,
            blocks="tensor",
            discount=1.0,
        )
        params = start(backend, {"a": kind, "b": kind})
        state = opt.init(params)
        for _ in range(steps):
            params, state = opt.step(params, params, state)
        ends.append({name: wide(backend, p) for name, p in params.items()})
    for name, value in ends[1].items():
        # half an eps per step, of the parameters at the start: they shrink on the way
        begin = np.max(np.abs(wide(backend, start(backend, {name: "float64"})[name])))
        error = np.max(np.abs(ends[0][name] - value)) / max(begin, np.max(np.abs(value)))
        assert error < rounding(dtype, operations=1, steps=steps)


def test_one_minus_power_keeps_its_digits() -> None:
    """The literal form is 7e-6 off in the first step with a beta of 0.999."""
    for beta in (0.9, 0.999, 0.99999):
        for count in (1.0, 2.0, 100.0):
            exact = -np.expm1(count * np.log(np.float64(beta)))
            got = mo.numerics.one_minus_power(beta, np.asarray(count, "float32"))
            assert relative_error(got, exact) < rounding("float32", operations=1)


def test_a_narrow_leaf_beside_a_wide_one_is_summed_in_the_wide_dtype() -> None:
    """A float32 sum of 2**25 quarters by halves stalls; beta is float64 here."""
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), step_size=0.5, discount=1.0)
    params = {"narrow": np.ones(3001, "float32"), "wide": np.ones(1)}
    state = opt.init(params)
    grads = {
        "narrow": np.linspace(0.1, 0.7, 3001, dtype="float32"),
        "wide": np.zeros(1),
    }
    params, state = opt.step(params, grads, state)
    _, state = opt.step(params, grads, state)
    first = params["narrow"] - np.float32(1)
    want = np.sum((first * grads["narrow"]).astype("float64"))
    assert first.dtype == np.float32
    assert relative_error(state.meta_grad, [want]) < rounding("float64", operations=10)


def test_a_narrow_parameter_is_stepped_in_the_wide_dtype() -> None:
    """Rounding the step before taking it from the parameter would round twice."""
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), step_size=0.3, meta_lr=0.0, discount=1.0)
    values = np.linspace(0.5, 2.0, 997).astype("float16")
    grads = np.linspace(0.1, 0.9, 997).astype("float16")
    params, _ = opt.step({"w": values}, {"w": grads}, opt.init({"w": values}))
    size = np.exp(np.log(np.float64(0.3)).astype("float32"))
    once = (values.astype("float32") - size * grads.astype("float32")).astype("float16")
    np.testing.assert_array_equal(params["w"], once)
