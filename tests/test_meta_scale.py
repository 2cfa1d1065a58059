"""The meta update in float32 as in float64: any scale of the loss, small steps, exact zeros."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.table import SCALE_FREE
from metaopt_conformance.tolerances import relative_error, rounding

import metaopt as mo

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

METAS: dict[str, Any] = {
    **{name: type(rule)() for name, rule in SCALE_FREE.items()},
    "fast start": mo.FastStart(mo.AdamW()),
}
STEPS = 60


def gradients(params: Any, step: int) -> Any:
    """Return those of a parabola, with noise."""
    noise = np.random.default_rng(step).normal(size=4)
    return np.array([1.0, 0.5, 0.2, 0.1]) * (params - 1.0) + 0.1 * noise


def in_numpy(opt: mo.MetaOptimize, scale: float, dtype: str) -> tuple[Any, Any]:
    params = {"w": np.zeros(4, dtype)}
    state = opt.init(params)
    for t in range(STEPS):
        grad = (scale * gradients(params["w"], t)).astype(dtype)
        params, state = opt.step(params, {"w": grad}, state)
    return params["w"], state.beta


def in_torch(opt: mo.MetaOptimize, scale: float, dtype: str) -> tuple[Any, Any]:
    torch = pytest.importorskip("torch")
    adapter = pytest.importorskip("metaopt_torch")
    param = torch.nn.Parameter(torch.zeros(4, dtype=getattr(torch, dtype)))
    options = {name: getattr(opt, name) for name in ("base", "meta", "step_size", "meta_lr")}
    optimizer = adapter.MetaOptimizer([("w", param)], **options, compile=False)
    for t in range(STEPS):
        grad = (scale * gradients(param.detach().numpy(), t)).astype(dtype)
        param.grad = torch.from_numpy(grad)
        optimizer.step()
    return param.detach().numpy(), optimizer.core_state().beta.numpy()


def in_jax(opt: mo.MetaOptimize, scale: float, dtype: str) -> tuple[Any, Any]:
    jax = pytest.importorskip("jax")
    adapter = pytest.importorskip("metaopt_jax")
    options = {name: getattr(opt, name) for name in ("base", "meta", "step_size", "meta_lr")}
    tx = adapter.metaoptimize(**options)
    params = {"w": jax.numpy.zeros(4, dtype)}
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(STEPS):
        grad = (scale * gradients(np.asarray(params["w"]), t)).astype(dtype)
        updates, state = update({"w": jax.numpy.asarray(grad)}, state, params)
        params = {"w": params["w"] + updates["w"]}
    return np.asarray(params["w"]), np.asarray(state.beta)


@pytest.mark.parametrize("meta", METAS)
@pytest.mark.parametrize("base", SCALE_FREE)
@pytest.mark.parametrize("run", [in_numpy, in_torch, in_jax])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_run_is_the_same_whatever_the_scale_of_the_loss(
    run: Any, base: str, meta: str, dtype: str
) -> None:
    if run is in_jax and dtype == "float64":
        pytest.skip("the tests of JAX run without x64")
    if run is not in_numpy and base != "AdamW":
        pytest.skip("one base is enough for an adapter")
    opt = mo.MetaOptimize(
        base=SCALE_FREE[base], meta=METAS[meta], step_size=1e-3, meta_lr=1e-2, discount=1.0
    )
    want = run(opt, 1.0, dtype)
    # powers of two, with which nothing but the range of a dtype can make a difference
    for scale in (2.0**-40, 2.0**40):
        for got, wanted in zip(run(opt, scale, dtype), want, strict=True):
            assert relative_error(got, wanted) < rounding(dtype, operations=1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_learned_step_size_grows_whatever_the_scale_of_the_loss(dtype: str) -> None:
    opt = mo.MetaOptimize(
        base=mo.AdamW(eps=0.0), meta=mo.AdamW(), step_size=1e-6, meta_lr=1e-2, discount=0.99
    )
    sizes = [np.exp(in_numpy(opt, scale, dtype)[1]) for scale in (1e-12, 1e-6, 1.0, 1e6, 1e12)]
    assert min(sizes) > 1.5e-6
    assert relative_error(sizes, [sizes[2]] * 5) < rounding(dtype, operations=100, steps=STEPS)
    with_eps = replace(opt, meta=mo.AdamW(eps=1e-8))  # which is too large for a loss that small
    assert np.exp(in_numpy(with_eps, 1e-6, dtype)[1]) < 1.01e-6


def test_eps_is_that_of_the_role() -> None:
    opt: Any = mo.MetaOptimize(base=mo.AdamW(), meta=mo.FastStart(mo.AdamW()), discount=1.0)
    assert opt.meta.rule.eps == 0.0
    assert opt.base.eps == 1e-8
    given: Any = mo.MetaOptimize(base=mo.AdamW(), meta=mo.RMSprop(eps=1e-3), discount=1.0)
    assert given.meta.eps == 1e-3
    assert mo.MetaOptimize(base=mo.AdamW(), meta=opt.meta, discount=1.0).meta is opt.meta
    slots = {"exp_avg": np.zeros(1), "exp_avg_sq": np.zeros(1)}
    direction, _ = mo.AdamW().direction(np.full(1, 1e-8), slots, np.asarray(1.0))
    assert relative_error(direction, [0.5]) < rounding("float64", 10)


@pytest.mark.parametrize("run", [in_numpy, in_torch, in_jax])
@pytest.mark.parametrize("meta_lr", [5e-7, 1e-7, 1e-9])
def test_small_meta_updates_add_up_in_float32(run: Any, meta_lr: float) -> None:
    # beta is -7, where the next float32 is 5e-7 away, and every z has one sign
    opt = mo.MetaOptimize(
        base=mo.SGD(), meta=mo.Lion(), step_size=float(np.exp(-7.0)), meta_lr=meta_lr, discount=1.0
    )
    state = final_state(opt, run)
    moved = float(state["beta"]) + 7.0 + float(state["compensation"])
    assert relative_error(moved, meta_lr * (STEPS - 1)) < 1e-3


def final_state(opt: mo.MetaOptimize, run: Any) -> dict[str, Any]:
    """Return beta and its compensation after a run towards a far minimum."""
    options = {name: getattr(opt, name) for name in ("base", "meta", "step_size", "meta_lr")}
    grad = np.full(4, -1.0, "float32")
    if run is in_torch:
        torch = pytest.importorskip("torch")
        param = torch.nn.Parameter(torch.zeros(4))
        adapter = pytest.importorskip("metaopt_torch")
        optimizer = adapter.MetaOptimizer([("w", param)], **options, compile=False)
        for _ in range(STEPS):
            param.grad = torch.from_numpy(grad.copy())
            optimizer.step()
        state = optimizer.core_state()
    elif run is in_jax:
        jax = pytest.importorskip("jax")
        tx = pytest.importorskip("metaopt_jax").metaoptimize(**options)
        params = {"w": jax.numpy.zeros(4, "float32")}
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(STEPS):
            updates, state = update({"w": jax.numpy.asarray(grad)}, state, params)
            params = {"w": params["w"] + updates["w"]}
    else:
        params = {"w": np.zeros(4, "float32")}
        state = opt.init(params)
        for _ in range(STEPS):
            params, state = opt.step(params, {"w": grad}, state)
    assert str(state.beta.dtype).endswith("float32")
    return {"beta": state.beta[0], "compensation": state.meta_slots["compensation"][0]}


@pytest.mark.parametrize("meta", METAS)
@pytest.mark.parametrize("blocks", ["node", "weight", "tensor"])
def test_rows_that_are_seen_no_more_keep_their_step_sizes(meta: str, blocks: str) -> None:
    opt = mo.MetaOptimize(
        base=mo.AdamW(), meta=METAS[meta], step_size=1e-3, blocks=blocks, discount=1.0
    )
    params = {"rows": np.ones((3, 2)), "others": np.ones(2)}
    state = opt.init(params)
    rng = np.random.default_rng(0)
    for t in range(400):
        seen = np.array([[t < 10], [True], [False]])
        grads = {
            "rows": np.where(seen, params["rows"] + rng.normal(size=(3, 2)), 0.0),
            "others": params["others"] if t < 10 else np.zeros(2),
        }
        params, state = opt.step(params, grads, state)
        if t == 10:
            then = opt.step_sizes(state)
    sizes, asleep = opt.step_sizes(state), opt.diagnostics(state, params)["asleep"]
    assert np.array_equal(sizes["others"], then["others"])
    assert np.all(asleep["others"])
    if blocks != "tensor":
        assert np.array_equal(sizes["rows"][0], then["rows"][0])
        assert np.all(sizes["rows"][2] == np.exp(np.log(1e-3)))
        assert np.all(sizes["rows"][1] != then["rows"][1])
        told = asleep["rows"] if blocks == "node" else np.all(asleep["rows"], axis=1)
        assert told.tolist() == [True, False, True]


@pytest.mark.parametrize("meta", METAS)
def test_a_block_seen_late_learns_as_if_it_were_the_first(meta: str) -> None:
    def run(start: int) -> Any:
        opt = mo.MetaOptimize(
            base=mo.SGD(), meta=METAS[meta], step_size=1e-3, blocks="node", discount=1.0
        )
        params = {"rows": np.ones((2, 2))}
        state = opt.init(params)
        for t in range(start + 20):
            seen = np.array([[True], [t >= start]])
            params, state = opt.step(params, {"rows": np.where(seen, params["rows"], 0.0)}, state)
        return opt.step_sizes(state)["rows"][1]

    assert relative_error(run(500), run(0)) < rounding("float64", operations=10, steps=20)
