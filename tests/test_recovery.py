"""Blocks that diverge go back to the average of their weights, with a smaller step size.

docs/mathematics.md section 11, *Recovery*.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import metaopt as mo
from metaopt import numerics
from metaopt.projection import elementwise

#: With a start that ends where it is, too far out: these runs are to diverge.
README: dict[str, Any] = {
    "base": mo.SGD(),
    "meta": mo.FastStart(mo.AdamW(), retreat=0.0),
    "step_size": 1e-6,
    "meta_lr": 1e-2,
}
START = np.array([-1.2, 1.0])


def rosenbrock(w: Any) -> Any:
    return 100.0 * (w[1] - w[0] ** 2) ** 2 + (1.0 - w[0]) ** 2


def gradient(w: Any) -> Any:
    with np.errstate(all="ignore"):
        slope = w[1] - w[0] ** 2
        return np.stack([-400.0 * w[0] * slope - 2.0 * (1.0 - w[0]), 200.0 * slope])


def run(opt: mo.MetaOptimize, steps: int = 2000, start: Any = START) -> tuple[Any, mo.State]:
    params: Any = {"w": start}
    state = opt.init(params)
    with np.errstate(all="ignore"):
        for _ in range(steps):
            params, state = opt.step(params, {"w": gradient(params["w"])}, state)
            if opt.recover:
                assert np.all(np.isfinite(params["w"]))
                assert np.all(np.isfinite(state.average["w"]))
    return params, state


@pytest.mark.parametrize("discount", [1.0, 0.999, 0.99])
@pytest.mark.parametrize("meta_lr", [1e-2, 1e-1])
def test_a_run_that_diverges_goes_on(discount: float, meta_lr: float) -> None:
    options = README | {"meta_lr": meta_lr, "discount": discount}
    params, state = run(mo.MetaOptimize(**options))
    assert np.all(np.isnan(params["w"]))
    assert state.restarts[0] > 1000
    opt = mo.MetaOptimize(**options, recover=True)
    params, state = run(opt)
    recoveries = opt.diagnostics(state, params)["recoveries"]["all"]
    assert 1 <= recoveries < 100
    assert rosenbrock(params["w"]) < rosenbrock(START)
    assert np.all(np.abs(params["w"]) < 5.0)


@pytest.mark.parametrize("blocks", ["scalar", "weight"])
@pytest.mark.parametrize("base", [mo.SGD(), mo.SGD(momentum=0.9), mo.AdamW(), mo.Lion()], ids=repr)
def test_a_run_that_does_not_is_as_without(base: Any, blocks: str) -> None:
    results = []
    for recover in (False, True):
        opt = mo.MetaOptimize(
            base=base, meta=mo.AdamW(), step_size=1e-4, blocks=blocks, recover=recover, discount=1.0
        )
        results.append(run(opt, 100))
    (params, state), (same, kept) = results
    np.testing.assert_array_equal(params["w"], same["w"])
    for field in ("average", "slots", "beta", "meta_count", "restarts"):
        np.testing.assert_equal(getattr(kept, field), getattr(state, field))


def test_what_goes_back_and_what_stays() -> None:
    """Of two blocks one: weights, moments, trace, step size; the other makes its step."""
    opt = mo.MetaOptimize(
        base=mo.AdamW(), meta=mo.AdamW(), step_size=0.1, discount=0.9, blocks="tensor", recover=True
    )
    start: Any = {"a": np.array([1.0, -2.0]), "b": np.array([0.5])}
    params, state = start, opt.init(start)
    for _ in range(5):
        params, state = opt.step(params, params, state)
    plain = mo.MetaOptimize(
        base=mo.AdamW(), meta=mo.AdamW(), step_size=0.1, discount=0.9, blocks="tensor"
    )
    unhurt, as_without = plain.step(params, params, _without_extra(state))
    grads = params | {"a": np.array([np.nan, 1.0])}
    new, after = opt.step(params, grads, state)
    np.testing.assert_array_equal(new["a"], state.average["a"])
    np.testing.assert_array_equal(after.average["a"], state.average["a"])
    for slot in after.slots["a"].values():
        np.testing.assert_array_equal(slot, 0.0)
    np.testing.assert_array_equal(new["b"], unhurt["b"])
    np.testing.assert_equal(after.slots["b"], as_without.slots["b"])
    np.testing.assert_allclose(after.beta[0], state.beta[0] - np.log(3.0), rtol=1e-15)
    assert after.beta[1] == as_without.beta[1]
    np.testing.assert_array_equal(after.meta_count, [0, 6])
    found = opt.diagnostics(after, new)
    assert {name: int(n) for name, n in found["recoveries"].items()} == {"a": 1, "b": 0}
    assert {name: int(n) for name, n in found["restarts"].items()} == {"a": 1, "b": 0}


def _without_extra(state: mo.State) -> mo.State:
    own = {slot: x for slot, x in state.meta_slots.items() if slot not in ("scale", "recoveries")}
    return replace(state, meta_slots=type(state.meta_slots)(own))


def test_step_sizes_stay_within_their_bounds() -> None:
    opt = mo.MetaOptimize(
        base=mo.SGD(), meta=mo.SGD(), step_size=0.1, bounds=(0.05, 1.0), recover=True, discount=1.0
    )
    params: Any = {"w": START}
    state = opt.init(params)
    params, state = opt.step(params, params, state)
    for _ in range(4):
        params, state = opt.step(params, {"w": np.full(2, np.nan)}, state)
        params, state = opt.step(params, params, state)
    np.testing.assert_allclose(opt.step_sizes(state)["all"], 0.05)


def test_leaves_at_rest_stay() -> None:
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), step_size=0.1, recover=True, discount=1.0)
    params: Any = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}
    state = opt.init(params)
    params, state = opt.step(params, params, state)
    grads = params | {"a": np.full(2, np.inf), "b": None}
    with np.errstate(invalid="ignore"):
        new, after = opt.step(params, grads, state, lr={"a": 1.0, "b": 1.0, "c": 0.0})
    np.testing.assert_array_equal(new["a"], 1.0)
    np.testing.assert_array_equal(new["b"], params["b"])
    np.testing.assert_array_equal(new["c"], params["c"])
    assert after.count["b"] == state.count["b"]


def test_a_first_gradient_that_is_not_finite_leaves_no_mark_in_moments() -> None:
    opt = mo.MetaOptimize(
        base=mo.AdamW(), meta=mo.AdamW(), step_size=0.1, recover=True, discount=1.0
    )
    params: Any = {"w": START}
    state = opt.init(params)
    for t in range(20):
        grad = np.array([np.nan, 1.0]) if t == 0 else params["w"]
        params, state = opt.step(params, {"w": grad}, state)
    assert np.all(np.abs(params["w"]) < np.abs(START))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "diagonal"}, "curvature"),
        ({"sigma": "softplus"}, "sigma"),
        ({"skip_nonfinite": True}, "skip_nonfinite"),
    ],
    ids=str,
)
def test_what_keeps_no_average_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"`recover` needs `{message}`"):
        mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), recover=True, **options)


def test_narrow_parameters_are_refused() -> None:
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), recover=True, discount=1.0)
    with pytest.raises(ValueError, match="float32 or wider"):
        opt.init({"w": np.ones(2, np.float16)})


def test_differences_are_refused() -> None:
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), recover=True, discount=1.0)
    params: Any = {"w": START}
    with pytest.raises(ValueError, match="Call `step`"):
        opt.update(params, params, opt.init(params))


def test_saved_and_loaded(tmp_path: Any) -> None:
    opt = mo.MetaOptimize(**README, recover=True)
    params, state = run(opt, 500)
    mo.save(tmp_path / "run", opt, state)
    same, loaded = mo.load(tmp_path / "run", params)
    assert same == opt
    np.testing.assert_equal(vars(loaded), vars(state))


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("blocks", ["scalar", "tensor", "node", "weight"])
def test_other_libraries_recover_and_project(library: str, dtype: str, blocks: str) -> None:
    xp = pytest.importorskip(library)
    opt = mo.MetaOptimize(
        base=mo.AdamW(),
        meta=mo.FastStart(mo.AdamW()),
        step_size=0.1,
        discount=0.9,
        blocks=blocks,
        recover=True,
    )
    kind = getattr(xp, dtype)
    params: Any = {
        "a": xp.ones((2, 3), dtype=kind),
        "b": xp.full((), 2.0, dtype=kind),
        "c": xp.ones((0, 2), dtype=kind),
    }
    clip = elementwise(lambda w: {name: numerics.minimum(x, 1.5) for name, x in w.items()})
    state = opt.init(params)
    for t in range(6):
        grads = params | ({"a": params["a"] * float("inf")} if t == 3 else {})
        lr = {"a": 1.0, "b": xp.asarray(0.5 if t < 4 else 0.0), "c": 1.0}
        with np.errstate(invalid="ignore"):
            params, state = opt.step(params, grads, state, lr=lr)
        params, state = opt.project(params, state, clip)
    recoveries = opt.diagnostics(state, params)["recoveries"]
    assert bool(xp.all(recoveries["all" if blocks == "scalar" else "a"] == 1.0))
    for param in params.values():
        assert param.dtype == kind
        assert bool(xp.all(xp.isfinite(param)))
    assert float(params["b"]) <= 1.5


def test_torch_recovers_by_the_core() -> None:
    torch = pytest.importorskip("torch")
    from metaopt_torch import MetaOptimizer

    param = torch.nn.Parameter(torch.tensor(START))
    opt = MetaOptimizer([param], **README, discount=0.99, recover=True)
    for _ in range(2000):
        param.grad = torch.tensor(gradient(param.detach().numpy()))
        opt.step()
    assert int(opt.diagnostics()["recoveries"]["all"]) >= 1
    assert bool(torch.all(torch.isfinite(param)))
    assert rosenbrock(param.detach().numpy()) < rosenbrock(START)
    saved = opt.state_dict()
    other = MetaOptimizer([param], **README, discount=0.99, recover=True)
    other.load_state_dict(saved)
    assert other.diagnostics()["recoveries"] == opt.diagnostics()["recoveries"]


def test_kernels_leave_it_to_the_core() -> None:
    pytest.importorskip("numba")
    from metaopt_kernels import MetaOptimizer

    params = {"w": START.copy()}
    opt = MetaOptimizer(params, **README, recover=True)
    with np.errstate(all="ignore"):
        for _ in range(2000):
            opt.step({"w": gradient(params["w"])})
    want, state = run(mo.MetaOptimize(**README, recover=True))
    np.testing.assert_array_equal(params["w"], want["w"])
    assert opt.state.meta_slots["recoveries"] == state.meta_slots["recoveries"]


def test_jax_refuses_it() -> None:
    pytest.importorskip("jax")
    import metaopt_jax

    with pytest.raises(ValueError, match="does not go with optax"):
        metaopt_jax.from_config(mo.MetaOptimize(**README, recover=True))


def test_the_core_recovers_under_jit() -> None:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    opt = mo.MetaOptimize(**README, discount=0.99, recover=True)
    params: Any = {"w": jax.numpy.asarray(START)}
    state = opt.init(params)
    grad = jax.grad(lambda params: rosenbrock(params["w"]))

    def step(params: Any, fields: Any) -> Any:
        params, state = opt.step(params, grad(params), mo.State(**fields))
        return params, vars(state)

    step_once = jax.jit(step)
    fields = vars(state)
    for _ in range(2000):
        params, fields = step_once(params, fields)
    assert fields["meta_slots"]["recoveries"][0] >= 1
    assert rosenbrock(params["w"]) < rosenbrock(START)


def test_nothing_that_is_not_finite_is_written_at_a_multiplier_of_0() -> None:
    opt = mo.MetaOptimize(
        base=mo.SGD(momentum=0.9),
        meta=mo.SGD(),
        step_size=1e-3,
        meta_lr=1e-3,
        recover=True,
        discount=1.0,
    )
    params = {"w": np.ones(2)}
    state = opt.init(params)
    params, state = opt.step(params, {"w": np.ones(2)}, state)
    before = params["w"].copy()
    params, state = opt.step(params, {"w": np.array([np.nan, 1.0])}, state, lr=0.0)
    np.testing.assert_array_equal(params["w"], before)
    assert np.all(np.isfinite(state.slots["w"]["exp_avg"]))


def test_parameters_keep_their_byte_order() -> None:
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), recover=True, discount=1.0)
    params = {"w": np.ones(2, ">f4")}
    state = opt.init(params)
    params, _ = opt.step(params, {"w": np.ones(2, ">f4")}, state)
    assert params["w"].dtype == np.dtype(">f4")
