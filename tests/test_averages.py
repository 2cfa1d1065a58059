"""Averaged weights for evaluation: those that the trace is the distance to.

docs/mathematics.md section 10, *The trace as an average*. What is right is an average kept beside
the run.
"""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metaopt_conformance.table import BASES

import metaopt as mo
from metaopt.arrays import map_leaves

NAMES = ("a", "b")


def _made(**options: Any) -> mo.MetaOptimize:
    settings: dict[str, Any] = {
        "discount": (0.8, 1.0),
        "base": mo.AdamW(weight_decay=0.3),
        "step_size": 0.05,
    }
    return mo.MetaOptimize(meta=mo.AdamW(), meta_lr=0.05, **(settings | options))


steps = st.lists(
    st.tuples(
        st.sampled_from([1.0, 0.5, 0.0]),
        st.sets(st.sampled_from(NAMES), min_size=1),
        st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["scalar", "tensor", "weight"]), steps, st.integers(0, 2**16))
def test_they_equal_an_average_kept_beside_the_run(
    base: Any, blocks: str, steps: Any, seed: int
) -> None:
    """Through schedules, rest, missing gradients and blocks that start anew."""
    opt = _made(base=replace(base, weight_decay=0.3), blocks=blocks)
    rng = np.random.default_rng(seed)
    params = {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)}
    state, average, moved = opt.init(params), dict(params), dict.fromkeys(NAMES, False)
    begins: set[str] = set()
    for lr, present, anew in steps:
        if anew:  # as after a collapse
            state = replace(state, meta_count=map_leaves(np.zeros_like, state.meta_count))
            begins = set(NAMES)
        sizes = opt.step_sizes(state)
        for name in present:
            size = sizes["all" if blocks == "scalar" else name]
            decay = 0.8 * (1.0 - 0.3 * lr * size) if lr else 1.0
            kept = moved[name] and name not in begins
            mixed = (1.0 - decay) * params[name] + decay * average[name]
            average[name] = mixed if kept else params[name]
            moved[name] = True
        # blocks of leaves without gradient wait; those of a block that others begin keep theirs
        begins = set() if blocks == "scalar" else begins - present
        grads = {name: rng.normal(size=p.shape) for name, p in params.items()}
        given = {name: grads[name] if name in present else None for name in NAMES}
        params, state = opt.step(params, given, state, lr=lr)
    found = opt.averaged_params(state, params)
    for name in NAMES:
        expected = average[name] if moved[name] else params[name]
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-12)


def test_with_decay_apart_they_are_refused_but_of_an_averaged_rule() -> None:
    """What the traces are distances to is smaller than the weights then."""
    base = mo.AdamW(weight_decay=0.3, decay_step_size=0.2)
    params = {"a": np.ones((2, 3))}
    opt = _made(base=base)
    with pytest.raises(ValueError, match="need a weight decay that the step size multiplies"):
        opt.averaged_params(opt.init(params), params)
    averaged = _made(base=mo.Averaged(base))
    np.testing.assert_array_equal(
        averaged.averaged_params(averaged.init(params), params)["a"], params["a"]
    )
    without = _made(base=mo.AdamW(decay_step_size=0.2))
    assert without.averaged_params(without.init(params), params).keys() == {"a"}


def test_before_the_first_step_they_are_the_weights() -> None:
    opt, params = _made(), {"a": np.ones(3)}
    found = opt.averaged_params(opt.init(params), params)
    np.testing.assert_array_equal(found["a"], params["a"])


def test_narrow_weights_have_them_too() -> None:
    opt, params = _made(), {"a": np.linspace(0.5, 2.0, 4).astype(np.float16)}
    state, average = opt.init(params), params["a"].astype(np.float64)
    for _ in range(20):
        size = float(opt.step_sizes(state)["all"])
        decay = 0.8 * (1.0 - 0.3 * size)
        average = (1.0 - decay) * params["a"] + decay * average
        params, state = opt.step(params, params, state)
    found = opt.averaged_params(state, params)["a"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, average, atol=4e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discount": 1.0}, "need a `discount` below 1"),
        ({"discount": (1.0,)}, "need a `discount` below 1"),
        ({"sigma": "softplus"}, '`sigma` "exp"'),
        ({"curvature": "diagonal"}, '`curvature` "none"'),
    ],
)
def test_where_there_are_none(options: dict[str, Any], message: str) -> None:
    opt, params = _made(**options), {"a": np.ones(3)}
    with pytest.raises(ValueError, match=message):
        opt.averaged_params(opt.init(params), params)


# --- an average of its own


def _mean(weights: list[Any], power: int) -> Any:
    """Return the average of `Averaged`, each step's weight in closed form."""
    shares = np.ones(len(weights))
    for t in range(1, len(weights)):
        part = (power + 1) / (t + 1 + power)
        shares[:t] *= 1.0 - part
        shares[t] = part
    return sum(share * array for share, array in zip(shares, weights, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"discount": 1.0, "sigma": "softplus"},
        {"blocks": "weight", "discount": 0.9},
        {"curvature": "exact", "discount": 0.9},
        {"curvature": "exact", "discount": 1.0, "approximation": "full"},
    ],
    ids=["discounts", "softplus", "weight", "exact", "full"],
)
@pytest.mark.parametrize("power", [0, 8])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_an_average_of_its_own_is_of_all_weights_so_far(
    base: Any, power: int, options: dict[str, Any]
) -> None:
    """And the weights are what they are without."""
    opts = [_made(base=rule, **options) for rule in (base, mo.Averaged(base, power=power))]
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)}
    runs = [(start, opt.init(start)) for opt in opts]
    visited = {name: [array] for name, array in start.items()}
    hvp = (lambda v: v) if "curvature" in options else None  # of half the squared norm
    for t in range(12):
        given: dict[str, Any] = {"hvp": hvp} if hvp else {}
        if options.get("approximation") == "full":
            given["third"] = lambda v, _: map_leaves(lambda a: np.zeros((a.shape[0], *a.shape)), v)
        noise = {name: rng.normal(size=array.shape) for name, array in start.items()}
        for index, opt in enumerate(opts):
            params, state = runs[index]
            grads: dict[str, Any] = {
                name: array + 0.1 * noise[name] for name, array in params.items()
            }
            if t % 5 == 3:
                grads["b"] = None
            runs[index] = opt.step(params, grads, state, lr=(1.0, 0.5)[t % 2], **given)
        for name, array in runs[1][0].items():
            np.testing.assert_array_equal(array, runs[0][0][name])
            if t % 5 != 3 or name != "b":
                visited[name].append(array)
    found = opts[1].averaged_params(runs[1][1], runs[1][0])
    for name, weights in visited.items():
        np.testing.assert_allclose(found[name], _mean(weights, power), rtol=1e-12, atol=1e-13)


def test_an_average_of_its_own_starts_anew_where_a_run_recovers() -> None:
    opt = _made(base=mo.Averaged(mo.AdamW()), recover=True)
    params = {"a": np.ones(3)}
    params, state = opt.step(params, params, opt.init(params))
    for _ in range(4):
        params, state = opt.step(params, params, state)
    with np.errstate(invalid="ignore"):
        params, state = opt.step(params, {"a": np.full(3, np.inf)}, state)
    found = opt.averaged_params(state, params)
    np.testing.assert_array_equal(found["a"], params["a"])


def test_an_average_of_its_own_is_found_in_a_file(tmp_path: Any) -> None:
    opt, params = _made(base=mo.Averaged(mo.AdamW(), power=2)), {"a": np.linspace(1.0, 2.0, 3)}
    state = opt.init(params)
    for _ in range(3):
        params, state = opt.step(params, params, state)
    mo.save(tmp_path / "run", opt, state)
    loaded, restored = mo.load(tmp_path / "run", params)
    assert loaded == opt
    want = opt.averaged_params(state, params)["a"]
    np.testing.assert_array_equal(loaded.averaged_params(restored, params)["a"], want)


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: mo.Averaged(mo.AdamW(), power=-1), ValueError, "at least 0; got -1"),
        (
            lambda: mo.Averaged(mo.AdamW(), power=cast("int", 1.5)),
            TypeError,
            "a whole number; got 1.5",
        ),
        (lambda: mo.Averaged(mo.Opaque()), ValueError, "a formula"),
        (lambda: mo.Averaged(mo.Averaged(mo.SGD())), ValueError, "no slot 'mean'"),
        (lambda: mo.Averaged(cast("Any", 0.1)), TypeError, "`rule` must be a rule"),
        (lambda: mo.MetaOptimize(meta=mo.Averaged(mo.AdamW())), ValueError, "uses_param"),
        (
            lambda: mo.MetaOptimize(meta=mo.FastStart(mo.Averaged(mo.AdamW()))),
            ValueError,
            "uses_param",
        ),
        (
            lambda: mo.MetaOptimize(base=mo.Averaged(mo.FastStart(mo.AdamW()))),
            ValueError,
            "an update of weights",
        ),
    ],
)
def test_what_cannot_be_averaged(made: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        made()
