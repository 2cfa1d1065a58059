"""One trace under jax.jit, one graph under torch.compile, and the numbers of an eager run."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.backends import find
from metaopt_conformance.tolerances import relative_error, rounding

import metaopt as mo
from tests.on_demand import slow_but

SHAPES = {"w": (4, 3), "b": (3,), "a": (2, 1, 2, 2)}
STEPS = 50

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "scalar": {},
    "tensor": {"blocks": "tensor", "meta": mo.AdamW()},
    "node": {"blocks": "node", "base": mo.RMSprop()},
    "weight": {"blocks": "weight", "bounds": (1e-5, 1e-1), "base": mo.SGD(momentum=0.9)},
    "named": {"blocks": {"head": "w", "rest": "*"}, "base": {"w": mo.Lion(), "*": mo.AdamW()}},
    "meta first": {"meta_first": True, "discount": 0.9},
    "skip": {"skip_nonfinite": True},
    "exact": {"curvature": "exact", "approximation": "2x2", "blocks": "tensor", "meta": mo.AdamW()},
    "full": {
        "curvature": "exact",
        "approximation": "full",
        "blocks": "tensor",
        "meta": mo.AdamW(),
    },
    "diagonal": {"curvature": "diagonal", "approximation": "2x2", "meta": mo.SGD()},
}


def configured(name: str) -> mo.MetaOptimize:
    options: dict[str, Any] = {
        "base": mo.AdamW(weight_decay=0.1),
        "meta": mo.Lion(),
        "step_size": 1e-2,
        "discount": 1.0,
    }
    return mo.MetaOptimize(**(options | CONFIGURATIONS[name]))


def start() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype("float32") for name, shape in SHAPES.items()}


def one_step(opt: mo.MetaOptimize, params: Any, state: Any, lr: Any) -> Any:
    """Make a step on half the squared norm, whose Hessian is the identity."""
    return opt.step(
        params,
        params,
        state,
        lr=lr,
        hvp=lambda tangents: tangents,
        third=lambda us, vs: {
            name: 0.0 * (us[name][:, None, ...] * vs[name][None, ...]) for name in us
        },
        hessian_diagonal={name: 0.0 * param + 1.0 for name, param in params.items()},
    )


def same(name: str, got: Any, want: Any) -> None:
    for leaf, value in want.items():
        error = relative_error(np.asarray(got[leaf]), np.asarray(value))
        assert error < rounding("float32", operations=25, steps=STEPS), (name, leaf)


def jax_with_states() -> Any:
    """Return JAX, to which states are known as trees: only once a process, so by the suite."""
    jax = pytest.importorskip("jax")
    find("jax")
    return jax


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_jit_traces_once(name: str) -> None:
    jax = jax_with_states()
    opt, traces = configured(name), []

    def step(params: Any, state: Any, lr: Any) -> Any:
        traces.append(name)
        return one_step(opt, params, state, lr)

    compiled = jax.jit(step)
    params = {leaf: jax.numpy.asarray(value) for leaf, value in start().items()}
    state = opt.init(params)
    structure, own = jax.tree.structure(state), start()
    own_state = opt.init(own)
    for t in range(STEPS):
        lr = np.asarray(0.0 if t % 7 == 3 else 1.0, "float32")
        params, state = compiled(params, state, jax.numpy.asarray(lr))
        own, own_state = one_step(opt, own, own_state, lr)
    assert len(traces) == 1
    same(name, params, own)
    assert jax.tree.structure(state) == structure
    # jit sorts the keys of a plain dict; the state's leaves and so its blocks keep their order
    assert list(state.count) == list(SHAPES)
    assert list(state.average or state.trace) == list(SHAPES)
    same(name, opt.step_sizes(state), opt.step_sizes(own_state))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_scan_keeps_the_structure_of_the_state(name: str) -> None:
    jax = jax_with_states()
    opt = configured(name)
    params = {leaf: jax.numpy.asarray(value) for leaf, value in start().items()}

    def body(carry: Any, lr: Any) -> Any:
        params, state = carry
        return one_step(opt, params, state, lr), None

    (last, _), _ = jax.lax.scan(body, (params, opt.init(params)), jax.numpy.ones(5, "float32"))
    own = start()
    state = opt.init(own)
    for _ in range(5):
        own, state = one_step(opt, own, state, 1.0)
    same(name, last, own)


@pytest.mark.parametrize("name", ["scalar", "tensor", "weight", "exact", "full", "diagonal"])
def test_hyperparameters_may_be_traced(name: str) -> None:
    jax = jax_with_states()
    params = {leaf: jax.numpy.asarray(value) for leaf, value in start().items()}

    def run(numbers: dict[str, Any], params: Any) -> Any:
        opt = dataclasses.replace(configured(name), **numbers)
        last, state = params, opt.init(params)
        for _ in range(3):
            last, state = one_step(opt, last, state, 1.0)
        return last, opt.step_sizes(state), state

    numbers = {"step_size": 2e-2, "meta_lr": 0.1, "discount": 0.875}
    got, got_sizes, got_state = jax.jit(run)(jax.tree.map(jax.numpy.asarray, numbers), params)
    want, want_sizes, state = run(numbers, start())
    same(name, got, want)
    same(name, got_sizes, want_sizes)
    for one, other in zip(jax.tree.leaves(got_state), jax.tree.leaves(state), strict=True):
        assert one.dtype == other.dtype  # of the traced numbers, float64 here, nothing is left


@pytest.mark.parametrize("name", slow_but(["scalar", "skip", "exact"], CONFIGURATIONS))
def test_torch_compiles_one_graph(name: str) -> None:
    torch = pytest.importorskip("torch")
    dynamo = pytest.importorskip("torch._dynamo")
    opt = configured(name)
    dynamo.reset()
    dynamo.utils.counters.clear()
    # the graph is what is looked at; running it needs no C++ compiler
    compiled = torch.compile(
        lambda params, state, lr: one_step(opt, params, state, lr), fullgraph=True, backend="eager"
    )
    params = {leaf: torch.asarray(value) for leaf, value in start().items()}
    state = opt.init(params)
    eager_params, eager_state = params, state
    for t in range(STEPS):
        lr = torch.asarray(0.0 if t % 7 == 3 else 1.0)
        params, state = compiled(params, state, lr)
        eager_params, eager_state = one_step(opt, eager_params, eager_state, lr)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    same(name, params, eager_params)
    same(name, opt.step_sizes(state), opt.step_sizes(eager_state))


def test_torch_compiles_without_tracing_the_plan() -> None:
    """What depends on names and shapes alone is worked out once, outside of what is compiled."""
    torch = pytest.importorskip("torch")
    opt = configured("named")
    params = {leaf: torch.asarray(value) for leaf, value in start().items()}
    state = opt.init(params)
    plans = dict(opt._plans)
    opt.step(params, params, state)
    opt.step_sizes(state)
    assert opt._plans == plans
