"""Hessian-vector products: from gradients, from probes and from the frameworks' derivatives."""

import itertools
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.tolerances import FORMULA, OPTIMIZER, relative_error, rounding

import metaopt as mo
from metaopt.arrays import namespace
from metaopt.curvature import Diagonal, central_difference, curvature, hutchinson

SHAPES = {"w": (3, 2), "b": (3,), "s": ()}
SIZE = 10


def tree(seed: int, lead: tuple[int, ...] = ()) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=(*lead, *shape))) for name, shape in SHAPES.items()}


def gradient(params: Any) -> dict[str, Any]:
    """Return that of sum(w**4) / 4 + sum(w)**2 / 2 over all leaves: the Hessian is full."""
    xp = namespace(next(iter(params.values())))
    total: Any = 0.0
    for param in params.values():
        total = total + xp.sum(param)
    return {name: param * param * param + total for name, param in params.items()}


def hessian_times(params: Any, tangents: Any) -> dict[str, Any]:
    """Return the analytic products, in NumPy."""
    total = sum(t.reshape(t.shape[0], -1).sum(axis=1) for t in tangents.values())
    return {
        name: 3.0 * param**2 * tangents[name] + total.reshape(-1, *(1,) * param.ndim)
        for name, param in params.items()
    }


def assert_products(got: Any, want: Any, allowed: float) -> None:
    assert list(got) == list(want)
    scale = max(float(np.max(np.abs(value))) for value in want.values())
    for name, value in want.items():
        assert got[name].shape == value.shape
        assert np.max(np.abs(got[name] - value)) < allowed * scale, name


# --- central differences ------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_central_differences_equal_the_hessian(backend: Any, scale: float, columns: int) -> None:
    """Whatever the length of the tangents, as they are stepped along by their direction."""
    params = tree(0)
    tangents = {name: scale * value for name, value in tree(1, (columns,)).items()}
    hvp = central_difference(gradient, backend.tree(params))
    got = backend.to_numpy(hvp(backend.tree(tangents)))
    assert_products(got, hessian_times(params, tangents), FORMULA)


def test_the_product_of_a_zero_tangent_is_zero(backend: Any) -> None:
    """To the bit, and next to a tangent that is not zero: the traces start at zero."""
    tangents = tree(1, (3,))
    for value in tangents.values():
        value[1] = 0.0
    hvp = central_difference(gradient, backend.tree(tree(0)))
    got = backend.to_numpy(hvp(backend.tree(tangents)))
    for name, value in got.items():
        np.testing.assert_array_equal(value[1], np.zeros(SHAPES[name]))
        assert np.all(value[0] != 0)
    nothing = backend.to_numpy(hvp(backend.tree({n: 0.0 * t for n, t in tangents.items()})))
    assert all(not np.any(value) for value in nothing.values())


def test_a_leaf_without_gradient_has_no_product(backend: Any) -> None:
    params = tree(0)

    def partly(at: Any) -> Any:
        return gradient(at) | {"b": None}

    hvp = central_difference(partly, backend.tree(params))
    tangents = tree(1, (2,))
    got = hvp(backend.tree(tangents))
    assert got["b"] is None
    want = hessian_times(params, tangents)
    for name in ("w", "s"):
        assert relative_error(backend.to_numpy(got[name]), want[name]) < FORMULA


@pytest.mark.parametrize("backend", ["numpy", "strict", "torch", "dask"], indirect=True)
def test_products_have_the_dtype_of_the_tangents(backend: Any) -> None:
    for param_dtype, dtype in (("float32", "float32"), ("float32", "float64")):
        params = {n: backend.asarray(v.astype(param_dtype)) for n, v in tree(0).items()}
        tangents = {n: backend.asarray(v.astype(dtype)) for n, v in tree(1, (2,)).items()}

        def grad_fn(at: Any, params: Any = params) -> Any:
            assert all(at[name].dtype == param.dtype for name, param in params.items())
            return at

        for name, product in central_difference(grad_fn, params)(tangents).items():
            assert product.dtype == tangents[name].dtype


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_central_differences_take_narrow_parameters(library: str) -> None:
    """Nothing fails, nothing is inf; the parameters given to the gradient keep their dtype."""
    module = pytest.importorskip(library)
    xp = module.numpy if library == "jax" else module
    for dtype in (xp.float16, xp.bfloat16):
        params = {"w": xp.ones(4, dtype=dtype), "b": xp.ones((), dtype=dtype)}
        tangents = {"w": xp.ones((2, 4), dtype=xp.float32), "b": xp.ones(2, dtype=xp.float32)}

        def identity(at: Any, dtype: Any = dtype) -> Any:
            assert all(array.dtype == dtype for array in at.values())
            return at

        for name, product in central_difference(identity, params)(tangents).items():
            assert product.dtype == xp.float32
            assert product.shape == tangents[name].shape
            assert bool(xp.all(xp.isfinite(product)))


# --- Hutchinson ---------------------------------------------------------------------------------


def signs(probes: int, seed: int = 0) -> dict[str, Any]:
    return {name: np.sign(value) for name, value in tree(seed, (probes,)).items()}


@pytest.mark.parametrize("probes", [1, 4])
def test_one_probe_of_signs_is_enough_for_a_diagonal_hessian(backend: Any, probes: int) -> None:
    diagonal = tree(7)
    there = backend.tree(diagonal)

    def hvp(tangents: Any) -> Any:
        return {name: there[name] * t for name, t in tangents.items()}

    got = backend.to_numpy(hutchinson(hvp, backend.tree(signs(probes))))
    for name, value in diagonal.items():
        assert got[name].shape == value.shape
        assert relative_error(got[name], value) < rounding("float64", probes)


def test_the_estimate_is_unbiased_for_a_full_hessian(backend: Any) -> None:
    """The mean over all 2**10 vectors of signs, which is the expectation, is the diagonal."""
    every = np.array(list(itertools.product((-1.0, 1.0), repeat=SIZE)))
    probes, start = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        probes[name] = every[:, start : start + size].reshape(-1, *shape)
        start += size
    params = tree(0)

    def hvp(tangents: Any) -> Any:
        return backend.tree(hessian_times(params, backend.to_numpy(tangents)))

    got = backend.to_numpy(hutchinson(hvp, backend.tree(probes)))
    for name, param in params.items():
        assert relative_error(got[name], 3.0 * param**2 + 1.0) < rounding("float64", len(every))
    few = hutchinson(hvp, backend.tree({name: probe[:3] for name, probe in probes.items()}))
    off = relative_error(backend.to_numpy(few)["w"], 3.0 * params["w"] ** 2 + 1.0)
    assert off > 1e-3  # of few probes it is an estimate


def test_an_estimate_without_a_leaf_goes_into_a_step() -> None:
    def hvp(tangents: Any) -> Any:
        return dict(tangents) | {"b": None}

    estimate = hutchinson(hvp, signs(2))
    assert [name for name, value in estimate.items() if value is None] == ["b"]
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), curvature="diagonal", discount=1.0)
    params = {name: np.ones(shape) for name, shape in SHAPES.items()}
    opt.step(params, params | {"b": None}, opt.init(params), hessian_diagonal=estimate)


def test_the_displacement_grows_with_the_params() -> None:
    """A unit displacement of weights of norm 1e6 would be lost in their rounding."""
    params = {"w": np.full(4, 1e6)}
    hvp = central_difference(lambda p: {"w": p["w"] ** 3 / 3e12}, params)
    got = hvp({"w": np.ones((1, 4))})["w"]
    assert relative_error(got, np.ones((1, 4))) < 1e2 * FORMULA


def test_the_displacement_is_that_of_the_coarsest_leaf() -> None:
    for order in (("a", "b"), ("b", "a")):
        dtypes = {"a": "float64", "b": "float32"}
        params = {name: np.ones(3, dtype=dtypes[name]) for name in order}
        hvp = central_difference(lambda p: {name: 3 * p[name] for name in p}, params)
        got = hvp({name: np.ones((1, 3), dtype=dtypes[name]) for name in order})["b"]
        assert relative_error(got, np.full((1, 3), 3.0)) < rounding("float32", operations=1) ** (
            2 / 3
        )


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex128"])
def test_probes_are_real_and_floating(dtype: str) -> None:
    probes = {name: np.ones((2, *shape), dtype=dtype) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match=r"`probes\['w'\]` must be real and floating"):
        hutchinson(lambda tangents: tangents, probes)


# --- in a run -----------------------------------------------------------------------------------


def analytic(params: Any) -> Any:
    return lambda tangents: hessian_times(params, tangents)


def run_with(hvp_at: Any, backend: Any, steps: int = 8) -> list[Any]:
    """Run on the quartic, `hvp_at(params)` giving the Hessian products; return it in NumPy."""
    opt = mo.MetaOptimize(
        base=mo.AdamW(betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1),
        meta=mo.AdamW(betas=(0.5, 0.9), eps=1e-2),
        step_size=0.02,
        meta_lr=0.02,
        discount=0.95,
        blocks="tensor",
        curvature="exact",
        approximation="2x2",
    )
    params, record = backend.tree(tree(0)), []
    state = opt.init(params)
    for _ in range(steps):
        params, state = opt.step(params, gradient(params), state, hvp=hvp_at(params))
        record.append(backend.to_numpy(params) | backend.to_numpy(opt.step_sizes(state)))
        record.append(backend.to_numpy(state.trace))
    return record


class PlainNumPy:
    name = "numpy"

    def tree(self, arrays: Any) -> Any:
        return {name: np.array(array) for name, array in arrays.items()}

    def to_numpy(self, arrays: Any) -> Any:
        return {name: np.asarray(array) for name, array in arrays.items()}


def assert_record(got: list[Any], want: list[Any], allowed: float) -> None:
    for ours, theirs in zip(got, want, strict=True):
        for name, value in theirs.items():
            assert relative_error(ours[name], value) < allowed, name


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_products_of_torch_func_give_the_analytic_run(backend: Any) -> None:
    torch = pytest.importorskip("torch")

    def loss(params: Any) -> Any:
        total = sum(param.sum() for param in params.values())
        return sum((param**4).sum() for param in params.values()) / 4 + total**2 / 2

    def hvp_at(params: Any) -> Any:
        _, pull = torch.func.vjp(torch.func.grad(loss), params)
        return lambda tangents: torch.func.vmap(lambda tangent: pull(tangent)[0])(dict(tangents))

    assert_record(run_with(hvp_at, backend), run_with(analytic, PlainNumPy()), OPTIMIZER)


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
def test_products_of_jax_give_the_analytic_run(backend: Any) -> None:
    jax = pytest.importorskip("jax")

    def loss(params: Any) -> Any:
        total = sum(param.sum() for param in params.values())
        return sum((param**4).sum() for param in params.values()) / 4 + total**2 / 2

    def products(params: Any, tangents: Any) -> Any:
        def product(tangent: Any) -> Any:
            return jax.jvp(jax.grad(loss), (params,), (tangent,))[1]

        return jax.vmap(product)(tangents)

    compiled = jax.jit(products)

    def hvp_at(params: Any) -> Any:
        return lambda tangents: compiled(params, dict(tangents))

    got = run_with(hvp_at, backend, steps=4)
    assert_record(got, run_with(analytic, PlainNumPy(), steps=4), OPTIMIZER)


@pytest.mark.parametrize("backend", ["numpy", "strict", "torch"], indirect=True)
def test_central_differences_give_the_analytic_run(backend: Any) -> None:
    def hvp_at(params: Any) -> Any:
        return central_difference(gradient, params)

    assert_record(run_with(hvp_at, backend), run_with(analytic, PlainNumPy()), FORMULA)


def elementwise(diagonal: Any) -> Any:
    return lambda tangents: {name: diagonal[name] * t for name, t in tangents.items()}


def test_hutchinson_feeds_diagonal_curvature() -> None:
    """Signs on a diagonal Hessian: the run is that of the diagonal itself."""
    records = []
    for estimated in (False, True):
        opt = mo.MetaOptimize(
            base=mo.SGD(momentum=0.5),
            meta=mo.SGD(),
            step_size=0.05,
            meta_lr=1e-3,
            curvature="diagonal",
            blocks="tensor",
            discount=1.0,
        )
        params = tree(0)
        state, record = opt.init(params), []
        for step in range(8):
            diagonal = {name: 3.0 * w * w for name, w in params.items()}
            if estimated:
                diagonal = hutchinson(elementwise(diagonal), signs(2, step))
            params, state = opt.step(
                params,
                {name: w**3 for name, w in params.items()},
                state,
                hessian_diagonal=diagonal,
            )
            record.append(params | opt.step_sizes(state))
        records.append(record)
    assert_record(records[1], records[0], OPTIMIZER)


# --- the option ---------------------------------------------------------------------------------


def test_names_of_curvature() -> None:
    assert curvature("diagonal") == Diagonal() == curvature(Diagonal())
    assert curvature(Diagonal(rectified=True)).kind == "diagonal"
    assert [curvature(name).kind for name in ("none", "exact")] == ["none", "exact"]
    wrongs: list[Any] = ["full", None, 1.0, {}]
    for wrong in wrongs:
        with pytest.raises((ValueError, TypeError), match="`curvature` must be one of 'none'"):
            curvature(wrong)


@pytest.mark.parametrize("base", [mo.SGD(momentum=0.9), mo.AdamW(), mo.Lion()], ids=repr)
def test_the_rectifier_is_for_plain_sgd(base: Any) -> None:
    with pytest.raises(ValueError, match="needs SGD without momentum as `base`"):
        mo.MetaOptimize(base=base, meta=mo.SGD(), curvature=Diagonal(rectified=True), discount=1.0)


def test_products_of_another_shape_are_refused() -> None:
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), curvature="exact", discount=1.0)
    params = tree(0)
    state = opt.init(params)
    wrongs: list[tuple[Any, str]] = [
        (lambda t: {name: value[0] for name, value in t.items()}, r"got shape \(3, 2\)"),
        (lambda t: {name: value for name, value in t.items() if name != "w"}, "got nothing"),
        (lambda t: dict(t) | {"w": None}, "got nothing"),
        (lambda t: list(t.values()), "got list"),
    ]
    for wrong, got in wrongs:
        with pytest.raises(ValueError, match=f"`hvp` must return for 'w' .*{got}"):
            opt.step(params, params, state, hvp=wrong)


def test_the_advice_for_torch_holds_for_its_own_losses() -> None:
    """Forward mode over `grad` does not: torch's mse_loss has no second forward derivative."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    params = {name: param.detach() for name, param in model.named_parameters()}
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)

    def loss(params: Any) -> Any:
        out = torch.func.functional_call(model, params, (x,))
        return torch.nn.functional.mse_loss(out, y)

    _, pull = torch.func.vjp(torch.func.grad(loss), params)
    opt = mo.MetaOptimize(
        base=mo.SGD(), meta=mo.SGD(), curvature="exact", blocks="tensor", discount=1.0
    )
    state = opt.init(params)
    for _ in range(2):
        params, state = opt.step(
            params,
            torch.func.grad(loss)(params),
            state,
            hvp=lambda tangents: torch.func.vmap(lambda tangent: pull(tangent)[0])(tangents),
        )
    products = pull({"weight": torch.ones(1, 3, dtype=torch.float64), "bias": torch.zeros(1)})[0]
    want = 2 * x.T @ x @ torch.ones(3, dtype=torch.float64) / 8
    assert relative_error(products["weight"].numpy()[0], want.numpy()) < OPTIMIZER
