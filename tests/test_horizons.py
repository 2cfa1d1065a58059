"""Several discounts at once: each has its own traces, and the most optimistic moves beta.

docs/mathematics.md section 10, *Several horizons*. What is right comes from runs written out in
plain NumPy. The conformance suite has the same against its oracle, for every rule and option.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.table import METAS

import metaopt as mo
from metaopt import numerics
from metaopt.projection import elementwise

DISCOUNTS = (0.9, 0.99, 1.0)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tensor": {"blocks": "tensor"},
    "weight": {"blocks": "weight"},
    "diagonal": {"blocks": "tensor", "curvature": "diagonal"},
    "exact": {"blocks": "tensor", "curvature": "exact"},
    "softplus": {"sigma": "softplus"},
    "recover": {"recover": True},
    "meta first": {"meta_first": True, "skip_nonfinite": True},
}


class Quadratic:
    """Noisy gradients of a quadratic over two leaves, and what curvature needs of it."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        factor = rng.normal(size=(6, 6))
        self.hessian = factor @ factor.T / 6
        self.start = {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=())}
        self._rng = rng

    def grads(self, params: Mapping[str, Any]) -> dict[str, Any]:
        a = self.hessian @ params["a"].ravel() + 0.1 * self._rng.normal(size=6)
        return {"a": a.reshape(2, 3), "b": 2.0 * params["b"]}

    def given(self, curvature: str) -> dict[str, Any]:
        if curvature == "diagonal":
            diagonal = {"a": np.diag(self.hessian).reshape(2, 3), "b": np.asarray(2.0)}
            return {"hessian_diagonal": diagonal}
        if curvature == "exact":
            return {"hvp": self._product}
        return {}

    def _product(self, tangents: Mapping[str, Any]) -> dict[str, Any]:
        rows = tangents["a"].reshape(len(tangents["a"]), 6) @ self.hessian
        return {"a": rows.reshape(-1, 2, 3), "b": 2.0 * tangents["b"]}


def trained(opt: mo.MetaOptimize, steps: int, **options: Any) -> Any:
    problem = Quadratic()
    params, state = problem.start, opt.init(problem.start)
    for _ in range(steps):
        given = problem.given(str(opt.curvature))
        params, state = opt.step(params, problem.grads(params), state, **given, **options)
    return params, state


def made(discount: Any, **options: Any) -> mo.MetaOptimize:
    return mo.MetaOptimize(
        base=mo.AdamW(weight_decay=0.1),
        meta=mo.FastStart(mo.AdamW()),
        step_size=1e-3,
        meta_lr=1e-2,
        discount=discount,
        **options,
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("discount", [0.9, 1.0])
def test_a_single_one_in_a_tuple_is_that_one(discount: float, options: dict[str, Any]) -> None:
    params, state = trained(made(discount, **options), 60)
    other, other_state = trained(made((discount,), **options), 60)
    for name, param in params.items():
        np.testing.assert_array_equal(other[name], param)
        np.testing.assert_array_equal(
            other_state.average[name][0] if state.average else other_state.trace[name][0],
            state.average[name] if state.average else state.trace[name],
        )


@pytest.mark.parametrize("meta", METAS.values(), ids=METAS)
def test_each_has_its_own_trace_and_moments_and_the_least_direction_is_taken(meta: Any) -> None:
    """Against a run by hand, of SGD with weight decay; directions come from the rule itself."""
    kappa, eta, steps = 0.2, 0.01, 40
    rule = meta
    opt = mo.MetaOptimize(
        base=mo.SGD(weight_decay=kappa),
        meta=rule,
        step_size=0.01,
        meta_lr=eta,
        discount=DISCOUNTS,
    )
    problem, by_hand = Quadratic(1), Quadratic(1)
    params, state = problem.start, opt.init(problem.start)
    w = np.concatenate([np.ravel(params["a"]), np.ravel(params["b"])])
    h = np.zeros((len(DISCOUNTS), 7))
    beta = np.log(0.01)
    slots = [{slot: np.zeros(()) for slot in rule.slots} for _ in DISCOUNTS]
    decided = np.zeros(len(DISCOUNTS))
    for count in range(steps):
        params, state = opt.step(params, problem.grads(params), state)
        grads = by_hand.grads({"a": w[:6].reshape(2, 3), "b": w[6]})
        g = np.concatenate([np.ravel(grads["a"]), np.ravel(grads["b"])])
        z = h @ g
        np.testing.assert_allclose(state.meta_grad[:, 0], z, rtol=1e-9, atol=1e-12)
        alpha = np.exp(beta)
        if count > 0:  # a trace starts in the first step
            directions = np.zeros(len(DISCOUNTS))
            for k, z_k in enumerate(z):
                directions[k], slots[k] = rule.direction(z_k, slots[k], np.asarray(count + 1.0))
            beta = beta - eta * directions.min()
            decided += directions == directions.min()
        step = alpha * (g + kappa * w)
        h = np.array(DISCOUNTS)[:, None] * (1 - kappa * alpha) * h - step
        w = w - step
        np.testing.assert_allclose(state.beta[0], beta, rtol=1e-9)
        np.testing.assert_array_equal(state.meta_slots["decided"][:, 0], decided)
    np.testing.assert_allclose(np.ravel(params["a"]), w[:6], rtol=1e-9)


def test_all_horizons_of_a_block_start_anew_together() -> None:
    opt = made((0.9, 1.0), blocks="tensor")
    problem = Quadratic()
    params, state = problem.start, opt.init(problem.start)
    for _ in range(5):
        params, state = opt.step(params, problem.grads(params), state)
    grads = problem.grads(params)
    # of an average so far away that the product with it alone is not finite
    far = state.average["a"].copy()
    far[1] = 1e308
    broken = mo.State(**(vars(state) | {"average": {**state.average, "a": far}}))
    params, after = opt.step(params, grads, broken)
    assert after.restarts.tolist() == [1, 0]
    np.testing.assert_array_equal(after.beta[0], state.beta[0])
    assert after.beta[1] != state.beta[1]
    traces = opt.diagnostics(after, params)["trace_norm"]["a"]
    np.testing.assert_allclose(traces[0], traces[1], rtol=1e-12)


def test_a_block_rests_where_all_of_its_horizons_do() -> None:
    """Of a horizon whose average is where the weights are, the meta-gradient is 0."""
    opt = made((0.9, 1.0), blocks="tensor")
    problem = Quadratic()
    params, state = problem.start, opt.init(problem.start)
    for _ in range(5):
        params, state = opt.step(params, problem.grads(params), state)
    averages = {
        "a": np.stack([params["a"], state.average["a"][1]]),
        "b": np.stack([params["b"], params["b"]]),
    }
    still = mo.State(**(vars(state) | {"average": averages}))
    _, after = opt.step(params, problem.grads(params), still)
    assert np.all((after.meta_grad == 0.0) == [[True, True], [False, True]])
    assert after.beta[0] != state.beta[0]
    assert after.beta[1] == state.beta[1]
    assert after.meta_count.tolist() == [state.meta_count[0] + 1, state.meta_count[1]]


def test_a_number_under_the_rectifier_keeps_the_trace_of_each() -> None:
    """Of a leaf of shape () NumPy makes a float of the share that is left, which may be 0."""
    opt = mo.MetaOptimize(
        base=mo.SGD(),
        meta=mo.SGD(),
        step_size=0.5,
        discount=(0.9, 1.0),
        curvature=mo.curvature.Diagonal(rectified=True),
    )
    params = {"w": np.asarray(2.0)}
    state = opt.init(params)
    for _ in range(2):
        diagonal = {"w": np.asarray(4.0)}
        grads = {"w": np.asarray(1.0)}
        params, state = opt.step(params, grads, state, hessian_diagonal=diagonal)
        assert state.trace["w"].tolist() == [-0.5, -0.5]


def test_what_is_said_about_horizons() -> None:
    opt = made((0.9, 1.0), blocks="tensor")
    params, state = trained(opt, 50)
    told = opt.diagnostics(state, params)
    assert told["decided"]["a"].shape == told["meta_grad"]["a"].shape == (2,)
    assert told["decided"]["a"].sum() >= state.meta_count[0] - 1
    assert np.all(told["trace_norm"]["a"] > 0.0)
    assert told["asleep"]["a"].shape == ()


def test_projection_and_files_know_of_them(tmp_path: Any) -> None:
    opt = made((0.9, 1.0))
    params, state = trained(opt, 20)
    clip = elementwise(lambda w: {"a": numerics.minimum(w["a"], 0.1)})
    clipped, pushed = opt.project(params, state, clip)
    held = params["a"] > 0.1
    assert np.any(held)
    trace = clipped["a"] - pushed.average["a"]
    assert np.all(trace[:, held] == 0.0)
    np.testing.assert_allclose(
        trace[:, ~held], (params["a"] - state.average["a"])[:, ~held], rtol=1e-12
    )
    mo.save(tmp_path / "run.safetensors", opt, pushed)
    again, loaded = mo.load(tmp_path / "run.safetensors", clipped)
    assert again == opt
    grads = Quadratic(3).grads(clipped)
    for one, other in zip(
        opt.step(clipped, grads, pushed)[0].values(),
        again.step(clipped, grads, loaded)[0].values(),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("discount", "message"),
    [
        ((), "from the least to the largest"),
        ((1.0, 0.9), "from the least to the largest"),
        ((0.9, 0.9), "from the least to the largest"),
        ((0.9, 1.1), r"`discount\[1\]`"),
        (("0.9",), r"`discount\[0\]`"),
    ],
)
def test_wrong_discounts(discount: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        made(discount)


@pytest.mark.parametrize("approximation", ["2x2", "full"])
def test_derivatives_of_the_meta_update_need_one(approximation: str) -> None:
    with pytest.raises(ValueError, match="needs one `discount`"):
        made((0.9, 1.0), approximation=approximation, curvature="exact")
