"""Arrays that are close to what the standard has: computed with rightly, or refused by name."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import metaopt as mo

PARAMS = {"w": np.array([[3.0, -2.0, 1.0 / 3.0]]), "b": np.array([0.1, 0.7])}


def run(opt: mo.MetaOptimize, params: Any, **options: Any) -> tuple[Any, mo.State]:
    state = opt.init(params)
    for _ in range(5):
        params, state = opt.step(params, {n: p / 7.0 for n, p in params.items()}, state, **options)
    return params, state


def swapped(array: Any) -> Any:
    """Return an array in the byte order that this machine has not."""
    return np.asarray(array).astype(np.asarray(array).dtype.newbyteorder())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("curvature", ["none", "diagonal", "exact"])
def test_the_byte_order_changes_no_number(dtype: str, curvature: str) -> None:
    opt = mo.MetaOptimize(
        base=mo.AdamW(weight_decay=0.1),
        meta=mo.AdamW(),
        step_size=0.05,
        meta_lr=0.05,
        curvature=curvature,
        discount=1.0,
    )
    native = {name: param.astype(dtype) for name, param in PARAMS.items()}

    def products(order: Any) -> dict[str, Any]:
        return {
            "lr": order(np.array(0.7)),
            "hvp": lambda tangents: {n: order(0.5 * t) for n, t in tangents.items()},
            "hessian_diagonal": {n: order(np.full_like(p, 0.5)) for n, p in native.items()},
        }

    want, state = run(opt, native, **products(lambda array: array))
    other = {name: swapped(param) for name, param in native.items()}
    got, found = run(opt, other, **products(swapped))
    for name, param in other.items():
        assert got[name].dtype == param.dtype
        np.testing.assert_array_equal(got[name], want[name])
        for kept, wanted in ((found.trace, state.trace), (found.average, state.average)):
            assert list(kept) == list(wanted)
            if name in kept:
                assert kept[name].dtype.isnative
                np.testing.assert_array_equal(kept[name], wanted[name])
    np.testing.assert_array_equal(found.beta, state.beta)


def test_the_byte_order_of_step_sizes_changes_no_number() -> None:
    def beta(order: Any) -> Any:
        sizes = {name: order(np.full(param.shape, 0.05)) for name, param in PARAMS.items()}
        opt = mo.MetaOptimize(
            base=mo.SGD(),
            meta=mo.SGD(),
            step_size=sizes,
            blocks="weight",
            meta_lr=order(np.array(0.01)),
            discount=1.0,
        )
        return run(opt, PARAMS)[1].beta

    want, got = beta(lambda array: array), beta(swapped)
    for name in PARAMS:
        np.testing.assert_array_equal(got[name], want[name])


def test_the_byte_order_changes_no_central_difference() -> None:
    def product(params: Any) -> Any:
        hvp = mo.curvature.central_difference(lambda at: {n: p**3 for n, p in at.items()}, params)
        return hvp({name: np.asarray(param[None], "float64") for name, param in params.items()})

    want = product(PARAMS)
    got = product({name: swapped(param) for name, param in PARAMS.items()})
    for name in PARAMS:
        np.testing.assert_array_equal(got[name], want[name])


def test_multipliers_of_another_byte_order_reach_every_library(backend: Any) -> None:
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), step_size=0.5, discount=1.0)
    params = backend.tree({"w": np.ones(3, "float32")})
    got, _ = opt.step(params, params, opt.init(params), lr=swapped(np.array(0.5)))
    np.testing.assert_array_equal(backend.to_numpy(got)["w"], np.full(3, 0.75, "float32"))


OTHERS: dict[str, Any] = {
    "matrix": np.matrix,
    "MaskedArray": lambda array: np.ma.array(array, mask=np.asarray(array) > 0.5),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("argument", ["init", "params", "grads", "hessian_diagonal", "hvp"])
def test_matrices_and_masked_arrays_are_refused(kind: str, argument: str) -> None:
    """Products of matrices are no entries' products, and masked sums leave entries out."""
    made, params = OTHERS[kind], {"w": PARAMS["w"]}
    theirs = {"w": made(params["w"])}
    opt = mo.MetaOptimize(
        base=mo.SGD(),
        meta=mo.SGD(),
        curvature="exact" if argument == "hvp" else "diagonal",
        discount=1.0,
    )
    arguments: dict[str, Any] = {"params": params, "grads": params, "state": opt.init(params)}
    arguments |= {"hessian_diagonal": params, "hvp": lambda tangents: tangents}
    calls: dict[str, Any] = {
        "init": lambda: opt.init(theirs),
        "hvp": lambda: opt.step(
            **(arguments | {"hvp": lambda _: {"w": masked_column(params["w"])}})
        ),
    }
    if argument == "hvp" and kind == "matrix":
        pytest.skip("no matrix has the three axes of a product")
    call = calls.get(argument, lambda: opt.step(**(arguments | {argument: theirs})))
    where = "params" if argument == "init" else argument
    with pytest.raises(TypeError, match=rf"`{where}.*'w'\]` must be an array .*; got {kind}\."):
        call()


def masked_column(array: Any) -> Any:
    """Return a masked product of one column."""
    return OTHERS["MaskedArray"](array[None])


@pytest.mark.parametrize("argument", ["step_size", "lr", "meta_lr", "discount"])
def test_masked_numbers_are_refused(argument: str) -> None:
    masked: Any = np.ma.array(0.5, mask=True)
    params = {"w": PARAMS["w"]}
    numbers: dict[str, Any] = {argument: {"all": masked} if argument == "step_size" else masked}

    def run() -> None:
        lr = {"lr": numbers.pop("lr")} if argument == "lr" else {}
        opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), **numbers)
        opt.step(params, params, opt.init(params), **lr)

    with pytest.raises(TypeError, match=rf"`{argument}.*` must be an array .*; got MaskedArray\."):
        run()


class Almost:
    """An array of a library that has a namespace, but not all that the standard puts in it."""

    dtype, shape, ndim = "float32", (3,), 1

    def __array_namespace__(self, *, api_version: Any = None) -> Any:
        return SimpleNamespace(
            __name__="almost",
            float32="float32",
            isdtype=lambda dtype, kind: True,  # noqa: ARG005
            finfo=lambda dtype: SimpleNamespace(bits=32),  # noqa: ARG005
            full=lambda shape, value, *, dtype: None,  # noqa: ARG005
            reshape=lambda array, shape: array,  # noqa: ARG005
        )


def test_a_library_that_lacks_something_is_named() -> None:
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), discount=1.0)
    almost: Any = Almost()
    with pytest.raises(TypeError, match=r"follows the array API standard; almost does not: .*'dev"):
        opt.init({"w": almost})


def test_dtypes_are_changed_by_the_function_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`asarray` of an array may be that array, whatever dtype is asked for."""
    xp = pytest.importorskip("array_api_strict")
    opt = mo.MetaOptimize(base=mo.AdamW(), meta=mo.AdamW(), step_size=0.1, discount=1.0)

    def stepped() -> Any:
        params = {"w": xp.asarray(np.ones(3, "float32"))}
        grads = {"w": xp.asarray(np.full(3, 0.1))}  # float64
        new, _ = opt.step(params, grads, opt.init(params), lr=xp.asarray(np.array(0.5)))
        return np.asarray(new["w"])

    want, original = stepped(), xp.asarray
    monkeypatch.setattr(
        xp, "asarray", lambda x, **more: x if type(x).__name__ == "Array" else original(x, **more)
    )
    np.testing.assert_array_equal(stepped(), want)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("fused", [None, False])
def test_matrices_and_masked_arrays_are_refused_in_place(kind: str, fused: bool | None) -> None:
    if fused is None:
        pytest.importorskip("numba")
    metaopt_kernels: Any = pytest.importorskip("metaopt_kernels")
    made = OTHERS[kind]
    params = {"w": PARAMS["w"].copy()}
    theirs = {"w": made(params["w"])}
    with pytest.raises(TypeError, match=rf"`params\['w'\]` must be an array .*; got {kind}\."):
        metaopt_kernels.MetaOptimizer(
            theirs, base=mo.SGD(), meta=mo.SGD(), fused=fused, discount=1.0
        )
    opt = metaopt_kernels.MetaOptimizer(
        params, base=mo.SGD(), meta=mo.SGD(), fused=fused, discount=1.0
    )
    with pytest.raises(TypeError, match=rf"`grads\['w'\]` must be an array .*; got {kind}\."):
        opt.step(theirs)
    with pytest.raises(TypeError, match=r"`lr` must be an array .*; got MaskedArray\."):
        opt.step(params, lr=np.ma.array(0.5, mask=True))
    np.testing.assert_array_equal(params["w"], PARAMS["w"])


@pytest.mark.filterwarnings("ignore:the core makes steps:UserWarning")
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_byte_order_changes_no_number_in_place(dtype: str) -> None:
    metaopt_kernels = pytest.importorskip("metaopt_kernels")

    def stepped(order: Any) -> Any:
        params = {name: order(param.astype(dtype)) for name, param in PARAMS.items()}
        opt = metaopt_kernels.MetaOptimizer(
            params,
            base=mo.AdamW(),
            meta=mo.AdamW(),
            step_size=0.05,
            meta_lr=0.05,
            fused=False,
            discount=1.0,
        )
        for _ in range(5):
            opt.step({n: order(p / 7.0) for n, p in params.items()}, lr=order(np.array(0.7)))
        return params, opt.state

    (want, state), (got, found) = stepped(lambda array: array), stepped(swapped)
    for name in PARAMS:
        np.testing.assert_array_equal(got[name], want[name])
        for kept, wanted in ((found.trace, state.trace), (found.average, state.average)):
            assert list(kept) == list(wanted)
            if name in kept:
                np.testing.assert_array_equal(kept[name], wanted[name])
    np.testing.assert_array_equal(found.beta, state.beta)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [*OTHERS, "swapped"])
def test_jax_is_handed_plain_native_arrays(kind: str) -> None:
    metaopt_jax = pytest.importorskip("metaopt_jax")
    params = {"w": PARAMS["w"].astype("float32")}
    theirs = {"w": (OTHERS | {"swapped": swapped})[kind](params["w"])}
    tx = metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD())
    reason = "in native byte order; got dtype" if kind == "swapped" else f"an array .*{kind}"
    with pytest.raises(TypeError, match=rf"`params\['w'\]` must be {reason}"):
        tx.init(theirs)
    with pytest.raises(TypeError, match=rf"`updates\['w'\]` must be {reason}"):
        tx.update(theirs, tx.init(params), params)


def test_jax_is_handed_narrow_arrays_of_numpy() -> None:
    metaopt_jax = pytest.importorskip("metaopt_jax")
    params = {"w": np.ones(3, pytest.importorskip("ml_dtypes").bfloat16)}
    tx = metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), step_size=0.5, discount=1.0)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == "bfloat16"
    np.testing.assert_array_equal(np.asarray(updates["w"], "float32"), -0.5)
