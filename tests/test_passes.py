"""What adapters build on: sums over devices, and the pass that fuses product and step."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.problems import PROBLEMS
from metaopt_conformance.tolerances import distance, relative_error, rounding
from metaopt_conformance.translate import contents, flat, tree

import metaopt as mo
from metaopt.jets import Jet
from metaopt.leaf import Leaf, advance, fused, usable

PROBLEM = PROBLEMS["logcosh"]
SHAPES = PROBLEM.shapes
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "tensor": {"blocks": "tensor"},
    "groups": {"blocks": {"biases": "bias", "rest": "*"}, "meta_first": True},
    "l": {"curvature": "exact"},
    "2x2": {"curvature": "exact", "approximation": "2x2", "blocks": "tensor", "discount": 0.9},
    "full": {"curvature": "exact", "approximation": "full", "blocks": "tensor"},
    "skip": {"skip_nonfinite": True, "curvature": "exact", "approximation": "2x2"},
    "weight": {"blocks": "weight", "skip_nonfinite": True},
}


class Devices:
    """Two devices, threads that meet to exchange what they have; each holds rows of every leaf."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.shared: list[Any] = [None, None]
        self.calls = [0, 0]

    def exchange(self, device: int, value: Any) -> list[Any]:
        """Return the values of both."""
        self.shared[device] = value
        self.barrier.wait()
        values = list(self.shared)
        self.barrier.wait()
        return values

    def reduce(self, device: int) -> Callable[[list[Any]], list[Any]]:
        def call(arrays: list[Any]) -> list[Any]:
            self.calls[device] += 1
            one, other = self.exchange(device, arrays)
            return [a + b for a, b in zip(one, other, strict=True)]

        return call

    def derivative(self, device: int, whole: Any, axes: int) -> Callable[..., Any]:
        """Return a function of whole tangents as one of this device's parts of them."""

        def call(*parts: Any) -> Any:
            both = self.exchange(device, parts)
            wholes = (joined(one, other, 1) for one, other in zip(*both, strict=True))
            return cut(whole(*wholes), axes)[device]

        return call

    def run(self, step: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(step, (0, 1)))


def cut(arrays: Any, axes: int = 0) -> list[Any]:
    """Cut every leaf, behind some leading axes, into first rows and the rest, which may be none."""
    lead = (slice(None),) * axes
    first = {"bias": 3, "weight": 1, "kernel": 1}
    return [
        {name: array[(*lead, slice(*cuts(first[name])))] for name, array in arrays.items()}
        for cuts in (_first, _rest)
    ]


def _first(rows: int) -> tuple[Any, Any]:
    return None, rows


def _rest(rows: int) -> tuple[Any, Any]:
    return rows, None


def joined(one: Any, other: Any, axis: int = 0) -> Any:
    return {name: np.concatenate([one[name], other[name]], axis=axis) for name in one}


def derivatives(t: int, w: Any) -> tuple[Any, Any]:
    """Return `hvp` and `third` of the problem."""
    hessian = PROBLEM.hessian(t, w)

    def third(us: Any, vs: Any) -> Any:
        columns = flat(us, SHAPES).T, flat(vs, SHAPES).T
        return tree(PROBLEM.third(t, w, *columns).transpose(1, 2, 0), SHAPES)

    return (lambda tangents: tree(flat(tangents, SHAPES) @ hessian, SHAPES)), third


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_parts_of_leaves_on_two_devices_equal_the_whole(name: str, broken: bool) -> None:
    options: dict[str, Any] = {
        "meta": mo.AdamW(eps=1e-3),
        "step_size": 0.05,
        "meta_lr": 0.1,
        "discount": 1.0,
    }
    options |= OPTIONS[name]
    opt = mo.MetaOptimize(base=mo.AdamW(eps=1e-2, weight_decay=0.1), **options)
    if broken and not opt.skip_nonfinite:
        pytest.skip("no flag is sent without skip_nonfinite")
    params = tree(PROBLEM.start(), SHAPES)
    state, parts = opt.init(params), cut(params)
    states = [opt.init(part) for part in parts]
    devices = Devices()
    for t in range(5):
        w = flat(params, SHAPES)
        grads = tree(PROBLEM.grad(t, w), SHAPES)
        if broken and t == 3:
            grads["weight"][1] = np.nan  # on the second device alone
        hvp, third = derivatives(t, w)

        def step(
            device: int,
            parts: Any = parts,
            grads: Any = grads,
            hvp: Any = hvp,
            third: Any = third,
        ) -> Any:
            return opt.step(
                parts[device],
                cut(grads)[device],
                states[device],
                hvp=devices.derivative(device, hvp, 1),
                third=devices.derivative(device, third, 2),
                reduce=devices.reduce(device),
            )

        (one, states[0]), (other, states[1]) = devices.run(step)
        parts = [one, other]
        params, state = opt.step(params, grads, state, hvp=hvp, third=third)
    allowed = rounding("float64", operations=60 * 12, steps=5)
    for leaf, value in joined(*parts).items():
        assert relative_error(value, params[leaf]) < allowed
    if name != "weight":
        assert contents(states[0].beta) == contents(states[1].beta)
        assert relative_error(states[0].beta, state.beta) < allowed
    counts = [one.meta_count for one in states]
    if name == "weight":
        assert contents(joined(*counts)) == contents(state.meta_count)
    else:
        assert contents(counts[0]) == contents(counts[1]) == contents(state.meta_count)
    for one in states:
        assert contents(one.restarts) == contents(state.restarts)
    assert int(states[0].skipped) == int(states[1].skipped) == int(state.skipped) == int(broken)
    twice = opt.approximation != "l" or (opt.skip_nonfinite and opt.curvature == "exact")
    each = 2 if twice or (opt.skip_nonfinite and name == "weight") else 1
    assert devices.calls == [5 * each] * 2


@pytest.mark.parametrize("name", ["none", "tensor", "groups", "skip", "weight"])
def test_a_leaf_that_two_devices_hold_whole_counts_once(name: str) -> None:
    options: dict[str, Any] = {
        "meta": mo.AdamW(eps=1e-3),
        "step_size": 0.05,
        "meta_lr": 0.1,
        "discount": 1.0,
    }
    options |= OPTIONS[name] | {"curvature": "none", "approximation": "l"}
    options["skip_nonfinite"] = name == "skip"
    opt = mo.MetaOptimize(base=mo.AdamW(eps=1e-2, weight_decay=0.1), **options)
    params = tree(PROBLEM.start(), SHAPES)

    def both(arrays: Any) -> list[Any]:
        return [part | {"bias": arrays["bias"]} for part in cut(arrays)]

    state, parts = opt.init(params), both(params)
    states = [opt.init(part) for part in parts]
    devices = Devices()
    for t in range(5):
        grads = tree(PROBLEM.grad(t, flat(params, SHAPES)), SHAPES)
        if name == "weight" and t == 3:
            state, states = lost(state, "bias"), [lost(some, "bias") for some in states]

        def step(device: int, parts: Any = parts, grads: Any = grads, states: Any = states) -> Any:
            return opt.step(
                parts[device],
                both(grads)[device],
                states[device],
                reduce=devices.reduce(device),
                copies={"bias": 2},
            )

        (one, first), (other, second) = devices.run(step)
        parts, states = [one, other], [first, second]
        params, state = opt.step(params, grads, state)
    allowed = rounding("float64", operations=60 * 12, steps=5)
    assert contents(one["bias"]) == contents(other["bias"])
    for leaf, value in (joined(one, other) | {"bias": one["bias"]}).items():
        assert relative_error(value, params[leaf]) < allowed
    assert contents(states[0].restarts) == contents(states[1].restarts) == contents(state.restarts)
    if name == "weight":
        restarts = dict(zip(SHAPES, state.restarts.tolist(), strict=True))
        assert restarts == dict.fromkeys(SHAPES, 0) | {"bias": math.prod(SHAPES["bias"])}
    else:
        assert contents(states[0].beta) == contents(states[1].beta)
        assert relative_error(states[0].beta, state.beta) < allowed


def lost(state: mo.State, leaf: str) -> mo.State:
    """Return the state with a trace that makes every meta-gradient of the leaf not finite."""
    spoilt = np.full_like(state.average[leaf], np.nan)
    return replace(state, average=state.average | {leaf: spoilt})


@pytest.mark.parametrize("keep", [None, True, False])
def test_a_fused_pass_is_a_step_of_the_restarted_trace(keep: Any) -> None:
    rng = np.random.default_rng(0)
    rule = mo.AdamW(weight_decay=0.1)
    slots = {slot: rng.random(5) for slot in rule.slots}
    trace = rng.normal(size=5) if keep is not False else np.full(5, np.nan)
    param, grad, count = rng.normal(size=5), rng.normal(size=5), np.asarray(3, "int32")
    alpha, flag = np.asarray(0.1), None if keep is None else np.asarray(keep)
    leaf = Leaf.of(param, slots, count, trace=trace)
    found = fused(rule, leaf, grad, Jet(alpha, alpha), mask=flag, discount=0.9)
    trace = trace if keep is not False else np.zeros(5)
    start = Leaf.of(param, slots, count, trace=trace)
    want = advance(rule, start, Jet(grad), Jet(alpha, alpha), discount=0.9)
    assert contents(list(found)) == contents([trace, *want])


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("keep", [None, True, False])
def test_a_fused_pass_takes_the_trace_from_the_average(keep: Any, count: int) -> None:
    """There is none before the first step, and none where it restarts."""
    rng = np.random.default_rng(0)
    rule = mo.AdamW(weight_decay=0.1)
    slots = {slot: rng.random(5) for slot in rule.slots}
    param, grad = rng.normal(size=5), rng.normal(size=5)
    goes_on = keep is not False and count > 0
    average = rng.normal(size=5) if goes_on else np.full(5, np.nan)
    steps = np.asarray(count, "int32")
    alpha, flag = np.asarray(0.1), None if keep is None else np.asarray(keep)
    leaf = Leaf.of(param, slots, steps, average=average)
    found_trace, delta, after = fused(rule, leaf, grad, Jet(alpha, alpha), mask=flag, discount=0.9)
    trace = param - average if goes_on else np.zeros(5)
    start = Leaf.of(param, slots, steps, trace=trace)
    step, want = advance(rule, start, Jet(grad), Jet(alpha, alpha), discount=0.9)
    assert contents(found_trace) == contents(trace)
    assert contents([delta, after.slots]) == contents([step, want.slots])
    allowed = rounding("float64", 10) + distance("float64", param, trace)
    found = after.param.value - after.average
    assert np.max(np.abs(found - want.param.first) / allowed) <= 1.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_usable_has_a_square(dtype: str) -> None:
    largest = np.sqrt(np.finfo(dtype).max)
    z = np.asarray([0.0, -1.0, 0.4 * largest, largest, np.inf, -np.inf, np.nan], dtype)
    flags = usable(z)
    assert flags.tolist() == [True, True, True, False, False, False, False]
    assert np.all(np.isfinite(z[flags] ** 2))


@pytest.mark.parametrize("broken", [False, True])
def test_an_update_is_what_a_step_takes(broken: bool) -> None:
    opt = mo.MetaOptimize(
        base=mo.AdamW(weight_decay=0.1), meta=mo.Lion(), skip_nonfinite=True, discount=1.0
    )
    params = {
        name: array.astype("float16") for name, array in tree(PROBLEM.start(), SHAPES).items()
    }
    state = opt.init(params)
    grads: dict[str, Any] = dict(tree(PROBLEM.grad(0, PROBLEM.start()), SHAPES))
    grads["bias"] = None
    if broken:
        grads["weight"][0] = np.nan
    deltas, updated = opt.update(params, grads, state)
    stepped, after = opt.step(params, grads, state)
    assert contents(updated) == contents(after)
    assert deltas["bias"] is None
    assert stepped["bias"] is params["bias"]
    weight, delta = params["weight"], deltas["weight"]
    assert delta.dtype == np.float32
    assert np.any(delta) == (not broken)
    assert contents(stepped["weight"]) == contents((weight - delta).astype("float16"))
