"""Weights that are projected by `project`, which takes their traces through its derivative.

docs/mathematics.md section 10, *Projections*. What is right comes from runs written out in plain
NumPy, and from derivatives written by hand.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import metaopt as mo
from metaopt import numerics
from metaopt.projection import elementwise
from tests.test_edits import (
    PROBLEMS,
    STEPS,
    CompiledTorch,
    Core,
    Edited,
    Jax,
    Kernels,
    Torch,
    Vector,
    compiled,
    pushed_run,
)

#: Of step sizes, relative, over 1000 steps: a trace that is a difference of weights has few digits
#: when they have hardly moved.
CLOSE = 1e-6


def _max_norm(w: Vector) -> Vector:
    rows = w.reshape(4, 3)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norm > 1.0, rows / norm, rows).reshape(-1)


def _push_max_norm(w: Vector, h: Vector) -> Vector:
    rows, along = w.reshape(4, 3), h.reshape(4, 3)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / norm
    turned = (along - unit * np.sum(unit * along, axis=1, keepdims=True)) / norm
    return np.where(norm > 1.0, turned, along).reshape(-1)


def _held() -> dict[str, Edited]:
    rng = np.random.default_rng(11)
    drift = np.array([1.0, -1.0, 0.5, -2.0])
    inside = np.array([0.02, -0.03])
    rows, begin = 2.0 * rng.normal(size=12), 0.3 * rng.normal(size=12)
    rows[:3] *= 0.1
    return {
        "clipped critic": Edited(
            np.zeros(6),
            lambda w, rng: np.concatenate([drift, w[4:] - inside]) + 0.1 * rng.normal(size=6),
            lambda w: np.clip(w, -0.05, 0.05),
            lambda w, h: h * (np.abs(w) <= 0.05),
        ),
        "max-norm rows": Edited(
            begin,
            lambda w, rng: w - rows + 0.1 * rng.normal(size=12),
            _max_norm,
            _push_max_norm,
        ),
        "late mask": Edited(
            np.array([0.0, 1.0, 0.0, 0.5, 0.0, -2.0]),
            PROBLEMS["pruning mask"].grad,
            PROBLEMS["pruning mask"].edit,
            PROBLEMS["pruning mask"].push,
            since=400,
        ),
    }


HELD = _held()
PROJECTED = HELD | {name: PROBLEMS[name] for name in ("smallest", "NNLS", "unit-norm rows")}


def written(name: str, xp: Any) -> Callable[[Any], Any]:
    """Return the projection of a problem as a user of a framework writes it."""

    def rows(w: Any) -> Any:
        return w.reshape(4, 3)

    def norm(w: Any) -> Any:
        return (rows(w) ** 2).sum(axis=1, keepdims=True) ** 0.5

    return {
        "clipped critic": lambda w: xp.clip(w, -0.05, 0.05),
        "max-norm rows": lambda w: xp.where(norm(w) > 1.0, rows(w) / norm(w), rows(w)).reshape(-1),
        "late mask": lambda w: w * xp.asarray([1.0, 0.0] * 3, dtype=w.dtype),
        "smallest": lambda w: xp.where(xp.asarray([True, False]), xp.clip(w, 0.0, float("inf")), w),
        "NNLS": lambda w: xp.clip(w, 0.0, float("inf")),
        "unit-norm rows": lambda w: (rows(w) / norm(w)).reshape(-1),
    }[name]


def project(ours: Any, name: str) -> Vector:
    """Project the weights of a run of whatever adapter, and return them."""
    problem = PROJECTED[name]

    def jvp(weights: Any, tangents: Any) -> Any:
        w, h = weights["w"], tangents["w"]
        return {"w": problem.edit(w)}, {"w": problem.push(w, h)}

    if isinstance(ours, Core):
        ours.params, ours.state = ours.opt.project(ours.params, ours.state, jvp)
        return ours.params["w"]
    if isinstance(ours, Kernels):
        ours.opt.project(jvp)
        return ours.params["w"].copy()
    if isinstance(ours, Torch):
        function = written(name, ours.torch)
        ours.opt.project(lambda params: {key: function(w) for key, w in params.items()})
        return ours.param.detach().numpy().copy()
    import jax

    function = written(name, jax.numpy)
    if not hasattr(ours, "projected"):
        ours.projected = jax.jit(
            lambda params, state: ours.tx.project(
                lambda params: {"w": function(params["w"])}, params, state
            )
        )
    ours.params, ours.state = ours.projected(ours.params, ours.state)
    return np.array(ours.params["w"])


def run(kind: Any, name: str, discount: float, steps: int) -> tuple[Vector, Vector]:
    """Return the last weights and all step sizes."""
    problem = PROJECTED[name]
    rng, w, sizes = np.random.default_rng(0), problem.start, []
    ours = kind(w, discount)
    for t in range(steps):
        w = ours.step(problem.grad(w, rng))
        if t >= problem.since:
            w = project(ours, name)
        sizes.append(ours.size())
    return w, np.array(sizes)


@pytest.mark.parametrize("discount", [1.0, 0.99])
@pytest.mark.parametrize("name", PROJECTED)
def test_step_sizes_equal_those_of_a_trace_pushed_by_hand(name: str, discount: float) -> None:
    want_w, want = pushed_run(PROJECTED[name], discount, STEPS)
    w, sizes = run(Core, name, discount, STEPS)
    np.testing.assert_allclose(sizes, want, rtol=CLOSE)
    np.testing.assert_allclose(w, want_w, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("name", HELD)
def test_weights_held_at_a_bound_need_it(name: str) -> None:
    """Left out, the way to the bound stays in the trace: what `project` is for."""
    problem = PROJECTED[name]
    rng, w, ours = np.random.default_rng(0), problem.start, Core(problem.start, 1.0)
    for t in range(STEPS):
        w = ours.step(problem.grad(w, rng))
        if t >= problem.since:
            w = problem.edit(w)
            ours.put(w)
    _, sizes = run(Core, name, 1.0, STEPS)
    assert ours.size() > 5.0 * sizes[-1]


@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize("kind", [Torch, Jax, Kernels])
def test_adapters_project_as_the_core(kind: Any, name: str) -> None:
    steps = PROJECTED[name].since + 200
    want_w, want = run(Core, name, 0.99, steps)
    w, sizes = run(kind, name, 0.99, steps)
    np.testing.assert_allclose(sizes, want, rtol=CLOSE)
    np.testing.assert_allclose(w, want_w, rtol=CLOSE, atol=CLOSE)


@compiled
def test_compiled_passes_go_on_from_a_projection() -> None:
    want_w, want = run(Core, "clipped critic", 0.99, 200)
    w, sizes = run(CompiledTorch, "clipped critic", 0.99, 200)
    np.testing.assert_allclose(sizes, want, rtol=CLOSE)
    np.testing.assert_allclose(w, want_w, rtol=CLOSE, atol=CLOSE)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"blocks": "weight"},
    {"sigma": "softplus"},
    {"curvature": "diagonal"},
    {"curvature": "exact", "blocks": "tensor"},
    {"curvature": "exact", "blocks": "tensor", "approximation": "2x2"},
]


def started(**options: Any) -> tuple[mo.MetaOptimize, Any, mo.State, Any]:
    """Return a run of two leaves after five steps, and the traces that it has."""
    opt = mo.MetaOptimize(
        base=mo.AdamW(), meta=mo.AdamW(), step_size=0.1, meta_lr=0.1, discount=0.9, **options
    )
    rng = np.random.default_rng(3)
    params: Any = {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)}
    state = opt.init(params)
    curvature = options.get("curvature")
    given: Any = {}
    if curvature == "diagonal":
        given["hessian_diagonal"] = {name: np.ones_like(w) for name, w in params.items()}
    if curvature == "exact":
        given["hvp"] = lambda tangents: tangents
    for _ in range(5):
        params, state = opt.step(params, params, state, **given)
    traces = {
        name: params[name] - state.average[name] if name in state.average else state.trace[name]
        for name in params
    }
    return opt, params, state, traces


def half_clip(params: Any) -> Any:
    return {"a": numerics.minimum(params["a"], 0.2)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_trace_goes_through_the_derivative(options: Any) -> None:
    """And nothing else of the state, nor a leaf that is left out."""
    opt, params, state, traces = started(**options)
    new, after = opt.project(params, state, elementwise(half_clip))
    np.testing.assert_array_equal(new["a"], np.minimum(params["a"], 0.2))
    assert new["b"] is params["b"]
    want = np.where(params["a"] <= 0.2, traces["a"], 0.0)
    assert np.any(want != traces["a"])
    if "a" in state.average:
        np.testing.assert_allclose(new["a"] - after.average["a"], want, rtol=1e-15, atol=1e-15)
    else:
        np.testing.assert_array_equal(after.trace["a"], want)
    for field, part in vars(state).items():
        changed = getattr(after, field)
        if field in ("average", "trace"):
            assert list(part) == list(changed)
            assert "b" not in part or changed["b"] is part["b"]
        else:
            assert changed is part


def test_leaves_that_have_made_no_step_keep_no_trace() -> None:
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), discount=1.0)
    start = {"a": np.ones(3)}
    loaded: Any = {"a": np.full(3, 5.0)}
    params, state = opt.project(loaded, opt.init(start), elementwise(half_clip))
    np.testing.assert_array_equal(state.average["a"], params["a"])


def test_projections_that_couple_leaves() -> None:
    """One norm over all weights: of several leaves at once, by a derivative of one's own."""
    opt, params, state, traces = started()
    norm = np.sqrt(sum(np.sum(w**2) for w in params.values()))

    def jvp(weights: Any, tangents: Any) -> Any:
        along = sum(np.sum(weights[name] * tangents[name]) for name in weights) / norm**2
        return (
            {name: w / norm for name, w in weights.items()},
            {name: (tangents[name] - w * along) / norm for name, w in weights.items()},
        )

    new, after = opt.project(params, state, jvp)
    step = 1e-6
    for name, w in new.items():
        moved = [
            {key: params[key] + sign * step * traces[key] for key in params} for sign in (1.0, -1.0)
        ]
        norms = [np.sqrt(sum(np.sum(v**2) for v in some.values())) for some in moved]
        slope = (moved[0][name] / norms[0] - moved[1][name] / norms[1]) / (2.0 * step)
        np.testing.assert_allclose(w - after.average[name], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("jvp", "message"),
    [
        (lambda w, _: w, "pair of mappings"),
        (lambda w, h: ({"c": w["a"]}, {"c": h["a"]}), "same leaves"),
        (lambda w, _: ({"a": w["a"]}, {}), "same leaves"),
        (lambda w, h: ({"a": w["a"][0]}, {"a": h["a"]}), "shape"),
        (elementwise(lambda _: None), "mapping of leaf name"),  # type: ignore[arg-type, return-value]
    ],
)
def test_what_a_projection_returns_is_checked(jvp: Any, message: str) -> None:
    opt, params, state, _ = started()
    with pytest.raises((TypeError, ValueError), match=message):
        opt.project(params, state, jvp)


def test_a_third_trace_is_refused() -> None:
    opt = mo.MetaOptimize(
        base=mo.AdamW(), meta=mo.AdamW(), curvature="exact", approximation="full", discount=1.0
    )
    params = {"a": np.ones(2)}
    with pytest.raises(ValueError, match="second derivatives"):
        opt.project(params, opt.init(params), elementwise(half_clip))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_torch_projects_narrow_parameters_with_their_traces(rounding: str) -> None:
    torch = pytest.importorskip("torch")
    from metaopt_torch import MetaOptimizer

    torch.manual_seed(0)
    params = [torch.randn(40, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    opt = MetaOptimizer(
        params,
        base=mo.AdamW(),
        meta=mo.AdamW(),
        rounding=rounding,
        step_size=0.01,
        compile=False,
        discount=1.0,
    )
    for _ in range(5):
        for param in params:
            param.grad = param.detach().clone()
        opt.step()
    before = [opt.state[param]["trace"].clone() for param in params]
    inside = [param.detach() < 0.1 for param in params]
    opt.project(lambda weights: {name: w.clamp(max=0.1) for name, w in weights.items()})
    for param, trace, kept in zip(params, before, inside, strict=True):
        assert param.dtype == torch.bfloat16
        assert float(param.detach().max()) <= 0.1 + 2.0**-11
        after = opt.state[param]["trace"]
        assert torch.equal(after[kept], trace[kept])
        assert not torch.any(after[~kept])


@pytest.mark.parametrize("options", [{}, {"blocks": "weight"}, {"blocks": "node"}], ids=str)
def test_torch_projects_small_and_large_parameters(options: Any) -> None:
    """Packed ones among them, and one that has no gradient."""
    torch = pytest.importorskip("torch")
    from metaopt_torch import MetaOptimizer

    torch.manual_seed(0)
    shapes = {"a": (7, 5), "b": (300, 300), "c": (3,), "d": (4,)}
    params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name, param in params.items():
        param.requires_grad_(name != "d")
    opt = MetaOptimizer(
        params.items(),
        base=mo.AdamW(),
        meta=mo.AdamW(),
        step_size=0.1,
        compile=False,
        **options,
        discount=1.0,
    )
    arrays: Any = {name: param.detach().numpy().copy() for name, param in params.items()}
    core = mo.MetaOptimize(base=mo.AdamW(), meta=mo.AdamW(), step_size=0.1, **options, discount=1.0)
    state = core.init(arrays)

    def grads() -> Any:
        return {name: None if name == "d" else w.copy() for name, w in arrays.items()}

    clip = elementwise(
        lambda w: {key: numerics.maximum(numerics.minimum(x, 0.2), -0.2) for key, x in w.items()}
    )
    for _ in range(4):
        for name, grad in grads().items():
            params[name].grad = None if grad is None else torch.tensor(grad)
        opt.step()
        opt.project(lambda weights: {name: w.clamp(-0.2, 0.2) for name, w in weights.items()})
        arrays, state = core.step(arrays, grads(), state)
        arrays, state = core.project(arrays, state, clip)
    for name, param in params.items():
        np.testing.assert_allclose(param.detach().numpy(), arrays[name], rtol=1e-12, atol=1e-14)
        if name != "d":
            np.testing.assert_allclose(
                opt.state[param]["average"].numpy(), state.average[name], rtol=1e-12, atol=1e-14
            )


def test_torch_refuses_a_projection_in_place_that_returns_nothing() -> None:
    torch = pytest.importorskip("torch")
    from metaopt_torch import MetaOptimizer

    param = torch.nn.Parameter(torch.tensor([0.5, -1.0]))
    opt = MetaOptimizer([param], base=mo.SGD(), meta=mo.SGD(), compile=False, discount=1.0)

    def in_place(weights: Any) -> Any:
        for w in weights.values():
            w.clamp_(min=0.0)

    with pytest.raises((TypeError, RuntimeError)):
        opt.project(in_place)
    assert param.tolist() == [0.5, -1.0]


def test_jax_projects_within_a_chain() -> None:
    jax = pytest.importorskip("jax")
    import metaopt_jax
    import optax

    tx = metaopt_jax.metaoptimize(base=mo.AdamW(), meta=mo.AdamW(), step_size=0.1, discount=1.0)
    chain = optax.chain(optax.clip_by_global_norm(1.0), tx)
    params = {"w": jax.numpy.asarray([0.5, -0.05], dtype="bfloat16"), "b": jax.numpy.ones(3)}
    state = chain.init(params)
    updates, state = chain.update(params, state, params)
    params = optax.apply_updates(params, updates)
    clip = lambda params: jax.tree.map(lambda w: jax.numpy.clip(w, -0.2, 0.2), params)  # noqa: E731
    new, after = tx.project(clip, params, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(lambda leaf: leaf.dtype, (new, after)) == jax.tree.map(
        lambda leaf: leaf.dtype, (params, state)
    )
    assert float(abs(new["b"]).max()) <= 0.2
    kept = after[1].trace_or_average
    np.testing.assert_array_equal(kept["b"], new["b"])  # all were clipped
    assert kept["w"][0] == 0.0  # a trace
    assert kept["w"][1] == state[1].trace_or_average["w"][1] != 0.0
