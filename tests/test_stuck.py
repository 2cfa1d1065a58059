"""A step size never collapses for good: thirty small tasks, and the rules that see to it."""

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.table import SIGMAS
from metaopt_conformance.tolerances import relative_error

import metaopt as mo
from benchmarks import small_tasks
from benchmarks import stuck as benchmark
from benchmarks.small_tasks import SmallTasks, stuck

TASKS = SmallTasks()
METAS: dict[str, Any] = {"Adam": mo.AdamW(), "fast start": mo.FastStart(mo.AdamW())}
#: Of (AdamW, meta update), at the `meta_lr` at which most were stuck before blocks started anew.
STEPS = 2000


@pytest.mark.parametrize("meta", METAS)
def test_no_run_ends_with_a_step_size_that_is_far_too_small(meta: str) -> None:
    opt = mo.MetaOptimize(
        base=mo.AdamW(), meta=METAS[meta], step_size=1e-3, meta_lr=0.1, blocks="node", discount=1.0
    )
    params, sizes = TASKS.run(opt, TASKS.start, STEPS, seed=1)
    found = stuck(TASKS, mo.AdamW(), params, sizes, seed=1)
    assert [task.name for task, is_so in zip(TASKS.tasks, found, strict=True) if is_so] == []


def test_the_count_of_stuck_runs_has_the_rule_off_and_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"META_LRS": (0.3,), "COLLAPSES": (0.0, 1e-2), "STEPS": 150}.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(small_tasks, "TRIAL", 10)
    found = benchmark.counted(TASKS, seeds=1)
    for meta in benchmark.METAS:
        assert found[0.0, meta, 0.3] != found[1e-2, meta, 0.3]
    assert mo.meta.COLLAPSE == 1e-2
    assert len(list(benchmark.report(found, 1))) == 4 + 3 + 2


@pytest.mark.parametrize("bounds", [None, (1e-8, 10.0)])
def test_a_noisy_parabola_is_left_neither_frozen_nor_pinned(bounds: Any) -> None:
    opt = mo.MetaOptimize(
        base=mo.AdamW(), meta=mo.AdamW(), step_size=1e-3, meta_lr=0.1, bounds=bounds, discount=1.0
    )
    rng, params = np.random.default_rng(0), {"w": np.ones(8)}
    state, sizes = opt.init(params), []
    for _ in range(3000):
        grads = {"w": np.logspace(0, -2, 8) * params["w"] + 0.1 * rng.normal(size=8)}
        params, state = opt.step(params, grads, state)
        sizes.append(float(opt.step_sizes(state)["all"]))
    assert min(sizes) > 1e-8
    for part in np.split(np.array(sizes), 6):  # of every 500 steps, some are taken
        assert np.max(part) > 1e-4


def opposed(opt: mo.MetaOptimize, steps: int) -> tuple[list[mo.State], list[Any]]:
    """Return states and traces of a run whose gradients all ask for smaller step sizes."""
    params = {"w": np.ones(2)}
    states, traces = [opt.init(params)], [np.zeros(2)]
    for _ in range(steps):
        # along the trace, so that z is positive; the first gradient makes one
        starts = states[-1].meta_count[0] == 0
        grad = np.ones(2) if starts else 0.1 * np.sign(traces[-1])
        params, state = opt.step(params, {"w": grad}, states[-1])
        states.append(state)
        traces.append(params["w"] - state.average["w"])
    return states, traces


def test_a_block_whose_step_size_collapses_starts_anew() -> None:
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.AdamW(), step_size=1e-1, meta_lr=0.5, discount=1.0)
    states, traces = opposed(opt, 40)
    sizes = [float(opt.step_sizes(state)["all"]) for state in states]
    first = next(t for t, state in enumerate(states) if int(state.restarts[0]))
    # it fell below a hundredth of its peak in that step and not before
    assert sizes[first] < 1e-2 * max(sizes[:first]) <= sizes[first - 1]
    assert states[first].meta_count.tolist() == [0]
    assert all(not np.any(states[first].meta_slots[slot]) for slot in opt.meta.slots)
    # the next step takes none of the old trace, but its own, and counts
    after = states[first + 1]
    assert after.meta_grad.tolist() == [0.0]
    assert after.meta_count.tolist() == [1]
    assert sizes[first + 1] == sizes[first]
    assert relative_error(traces[first + 1], np.full(2, -sizes[first])) < 1e-10


def test_a_block_without_gradients_starts_anew_when_it_has_one() -> None:
    """Not in the step in between: its trace is not written there."""
    opt = mo.MetaOptimize(
        base=mo.SGD(), meta=mo.AdamW(), step_size=0.1, meta_lr=0.5, blocks="tensor", discount=1.0
    )
    params = {"a": np.ones(2), "b": np.ones(2)}
    state, grad = opt.init(params), np.ones(2)
    while not state.restarts[1]:
        params, state = opt.step(params, {"a": np.ones(2), "b": grad}, state)
        grad = 0.1 * np.sign(params["b"] - state.average["b"])
    for _ in range(2):
        params, state = opt.step(params, {"a": np.ones(2), "b": None}, state)
        assert state.meta_count[1] == 0
    params, state = opt.step(params, {"a": np.ones(2), "b": np.ones(2)}, state)
    assert state.meta_count[1] == 1
    assert state.meta_grad[1] == 0.0
    size = opt.step_sizes(state)["b"]
    assert relative_error(params["b"] - state.average["b"], np.full(2, -size)) < 1e-10


def dropped(steps: int) -> Any:
    """Yield gradients of two leaves, of which the second has none in every other step."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        noise = {name: rng.normal(size=8) for name in "ab"}
        yield (
            lambda name, w, step=step, noise=noise: (
                None
                if name == "b" and step % 2
                else np.logspace(0, -2, 8) * np.asarray(w) + 0.1 * noise[name]
            )
        )


LAYERS: dict[str, Any] = {
    "base": mo.AdamW(),
    "meta": mo.AdamW(),
    "step_size": 1e-3,
    "meta_lr": 0.1,
    "blocks": "tensor",
    "discount": 1.0,
}


def test_a_layer_that_is_dropped_every_other_step_is_not_left_frozen() -> None:
    """Step sizes of 1e-19 at step 2000, for ever, where the restarts are lost."""
    opt, params = mo.MetaOptimize(**LAYERS), {name: np.ones(8) for name in "ab"}
    state, sizes = opt.init(params), []
    for grad in dropped(3000):
        grads = {name: grad(name, w) for name, w in params.items()}
        params, state = opt.step(params, grads, state)
        sizes.append(float(opt.step_sizes(state)["b"]))
    assert state.restarts[1] > 1
    assert min(np.max(part) for part in np.split(np.array(sizes), 6)) > 1e-4


@pytest.mark.parametrize("adapter", ["metaopt_torch", "metaopt_kernels"])
def test_adapters_start_a_block_anew_as_the_core_does(adapter: str) -> None:
    pytest.importorskip("torch" if adapter == "metaopt_torch" else "numba")
    module = importlib.import_module(adapter)
    core, params = mo.MetaOptimize(**LAYERS), {name: np.ones(8) for name in "ab"}
    state = core.init(params)
    ours: Any = {name: np.ones(8) for name in "ab"}
    if adapter == "metaopt_torch":
        import torch

        ours = {name: torch.ones(8, dtype=torch.float64, requires_grad=True) for name in "ab"}
        opt = module.MetaOptimizer(ours.items(), compile=False, **LAYERS)
    else:
        opt = module.MetaOptimizer(ours, fused=True, **LAYERS)
    for grad in dropped(300):
        grads = {name: grad(name, w) for name, w in params.items()}
        params, state = core.step(params, grads, state)
        if adapter == "metaopt_torch":
            for name, w in ours.items():
                w.grad = None if grads[name] is None else torch.tensor(grads[name])
            opt.step()
        else:
            opt.step(grads)
    assert state.restarts[1] > 0
    for name, size in core.step_sizes(state).items():
        assert relative_error(np.array(float(opt.step_sizes()[name])), size) < 1e-6


def test_a_block_that_comes_to_a_bound_starts_anew_once() -> None:
    opt = mo.MetaOptimize(
        base=mo.SGD(), meta=mo.SGD(), step_size=0.1, meta_lr=20.0, bounds=(0.05, 1.0), discount=1.0
    )
    states, _ = opposed(opt, 30)
    pinned = [bool(opt.diagnostics(state, {"w": np.ones(2)})["pinned"]["all"]) for state in states]
    first = pinned.index(True)
    assert all(pinned[first:])
    assert [int(state.restarts[0]) for state in states] == [0] * first + [1] * (31 - first)
    assert states[first].meta_count.tolist() == [0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sigma", SIGMAS.values(), ids=str)
def test_beta_stays_where_step_sizes_are_normal_numbers(sigma: Any, dtype: str) -> None:
    opt = mo.MetaOptimize(
        base=mo.Lion(), meta=mo.Lion(), step_size=1e-3, meta_lr=50.0, sigma=sigma, discount=1.0
    )
    least, most = (-(2.0**63) if sigma == "identity" else 2.0**-64), 2.0**63
    rng, params = np.random.default_rng(0), {"w": np.ones(2, dtype)}
    state = opt.init(params)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(40):
            grads = {"w": rng.normal(size=2).astype(dtype)}
            params, state = opt.step(params, grads, state)
            assert least <= float(opt.step_sizes(state)["all"]) <= 1.0001 * most


def test_diagnostics_name_what_is_amiss() -> None:
    opt = mo.MetaOptimize(
        base=mo.SGD(),
        meta=mo.AdamW(),
        step_size=0.1,
        meta_lr=0.5,
        blocks="tensor",
        bounds={"bounded": (0.08, 1.0)},
        discount=1.0,
    )
    params = {name: np.ones(2) for name in ("falling", "bounded", "unused", "fine")}
    state = opt.init(params)
    for t in range(4):
        grads = {
            name: np.sign(param - state.average[name]) / 2.0**t if t else np.ones(2)
            for name, param in params.items()
        }
        grads |= {"unused": np.zeros(2), "fine": np.ones(2)}
        params, state = opt.step(params, grads, state)
    peaks = opt.plan(params).blocks.from_names(opt.step_sizes(state)) * [20.0, 1.0, 1.0, 5.0]
    state = replace(state, meta_slots=state.meta_slots | {"peak": peaks})
    told = opt.diagnostics(state, params)
    found = {
        what: [n for n, on in told[what].items() if on]
        for what in ("pinned", "collapsed", "asleep")
    }
    assert found == {"pinned": ["bounded"], "collapsed": ["falling"], "asleep": ["unused"]}
