"""Weights that others edit after a step: the trace follows, and step sizes stay where they belong.

docs/mathematics.md section 10, *The trace as an average*. What is right comes from runs written out
in plain NumPy, whose trace is pushed through the derivative of each edit.
"""

import importlib
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metaopt_conformance.table import RULES
from metaopt_conformance.tolerances import distance

import metaopt as mo

STEPS = 1000
#: A start that ends where it is, as in the runs written out.
SETTINGS: dict[str, Any] = {
    "base": mo.AdamW(),
    "meta": mo.FastStart(mo.AdamW(), retreat=0.0),
    "step_size": 1e-6,
    "meta_lr": 1e-2,
}
#: How far from the run whose trace is pushed through the edit a step size may be.
FACTOR = 3.0

Vector = Any

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@dataclass(frozen=True)
class Edited:
    """A loss and an edit of its weights.

    Parameters
    ----------
    start : array (n,)
    grad : callable
        From the weights and a generator to a noisy gradient.
    edit : callable
        From the weights after a step to what they are made.
    push : callable
        From these weights before the edit and a trace to the edit's derivative along it.
    since : int
        How many steps go without it.
    """

    start: Vector
    grad: Callable[[Vector, Any], Vector]
    edit: Callable[[Vector], Vector]
    push: Callable[[Vector, Vector], Vector]
    since: int = 0


def _unit_rows(w: Vector) -> Vector:
    rows = w.reshape(4, 3)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).reshape(-1)


def _push_unit_rows(w: Vector, h: Vector) -> Vector:
    rows, along = w.reshape(4, 3), h.reshape(4, 3)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / norm
    return ((along - unit * np.sum(unit * along, axis=1, keepdims=True)) / norm).reshape(-1)


def _problems() -> dict[str, Edited]:
    rng = np.random.default_rng(7)
    inputs = rng.normal(size=(40, 6))
    target = inputs @ np.array([1.0, -1.0, 0.5, -0.5, 0.0, 2.0])
    rows = _unit_rows(rng.normal(size=12))
    begin = _unit_rows(rng.normal(size=12))
    mask = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    restored = np.arange(12) < 9
    kept = rng.normal(size=12)

    def regression(w: Vector, rng: Any) -> Vector:
        batch = rng.integers(0, 40, 8)
        return inputs[batch].T @ (inputs[batch] @ w - target[batch]) / 8

    return {
        "smallest": Edited(
            np.zeros(2),
            lambda w, rng: np.array([1.0, w[1] - 1.0 + 0.1 * rng.normal()]),
            lambda w: np.array([max(w[0], 0.0), w[1]]),
            lambda w, h: np.array([h[0] * (w[0] > 0.0), h[1]]),
        ),
        "NNLS": Edited(
            np.zeros(6), regression, lambda w: np.maximum(w, 0.0), lambda w, h: h * (w > 0.0)
        ),
        "pruning mask": Edited(0.1 * mask, regression, lambda w: mask * w, lambda _, h: mask * h),
        "unit-norm rows": Edited(
            begin, lambda w, rng: w - rows + 0.1 * rng.normal(size=12), _unit_rows, _push_unit_rows
        ),
        "restored rows": Edited(
            kept,
            lambda w, rng: w - rows + 0.1 * rng.normal(size=12),
            lambda w: np.where(restored, kept, w),
            lambda _, h: np.where(restored, 0.0, h),
        ),
    }


PROBLEMS = _problems()


def pushed_run(problem: Edited, discount: float, steps: int) -> tuple[Vector, Vector]:
    """Return the last weights and all step sizes of a run written out, its trace pushed through.

    Adam at both levels and the fast start, docs/mathematics.md sections 5, 6 and 10.
    """
    rng, w, h = np.random.default_rng(0), problem.start, np.zeros_like(problem.start)
    m, v, beta, zm, zv, against = np.zeros_like(w), np.zeros_like(w), np.log(1e-6), 0.0, 0.0, 0.0
    meta_t = 0
    sizes = []
    for t in range(1, steps + 1):
        g, alpha = problem.grad(w, rng), np.exp(beta)
        z = float(h @ g)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w, h = w - alpha * u, discount * h - alpha * u
        if t > problem.since:
            w, h = problem.edit(w), problem.push(w, h)
        if z != 0.0 or t == 1:
            meta_t += 1
            zm, zv = 0.9 * zm + 0.1 * z, 0.999 * zv + 0.001 * z * z
            root = np.sqrt(zv / (1 - 0.999**meta_t))
            direction = zm / (1 - 0.9**meta_t) / max(root, 1e-300)
            if against < 5.0:
                against = max(0.0, against + (z > 0.0) - 0.5 * (z < 0.0))
            beta -= 1e-2 * (10.0 if against < 5.0 else 1.0) * direction
        sizes.append(np.exp(beta))
    return w, np.array(sizes)


class Core:
    """The core's steps on NumPy arrays."""

    def __init__(self, start: Vector, discount: float) -> None:
        self.opt = mo.MetaOptimize(**SETTINGS, discount=discount)
        self.params: Any = {"w": start}
        self.state = self.opt.init(self.params)

    def step(self, grad: Vector) -> Vector:
        self.params, self.state = self.opt.step(self.params, {"w": grad}, self.state)
        return self.params["w"]

    def put(self, w: Vector) -> None:
        self.params = {"w": w}

    def size(self) -> float:
        return float(self.opt.step_sizes(self.state)["all"])


class Torch:
    """`metaopt_torch`, eager."""

    compile = False

    def __init__(self, start: Vector, discount: float) -> None:
        self.torch = pytest.importorskip("torch")
        from metaopt_torch import MetaOptimizer

        self.param = self.torch.tensor(start, requires_grad=True)
        self.opt = MetaOptimizer([self.param], **SETTINGS, discount=discount, compile=self.compile)

    def step(self, grad: Vector) -> Vector:
        self.param.grad = self.torch.tensor(grad)
        self.opt.step()
        return self.param.detach().numpy().copy()

    def put(self, w: Vector) -> None:
        with self.torch.no_grad():
            self.param.copy_(self.torch.tensor(w))

    def size(self) -> float:
        return float(self.opt.step_sizes()["all"])


class CompiledTorch(Torch):
    """`metaopt_torch`, compiled."""

    compile = True

    def __init__(self, start: Vector, discount: float) -> None:
        super().__init__(start, discount)
        with warnings.catch_warnings():  # of what torch itself imports
            warnings.simplefilter("ignore")
            importlib.import_module("torch._inductor.compile_fx")


class Jax:
    """`metaopt_jax`, compiled."""

    def __init__(self, start: Vector, discount: float) -> None:
        jax = pytest.importorskip("jax")
        jax.config.update("jax_enable_x64", True)
        import metaopt_jax
        import optax

        self.tx = metaopt_jax.metaoptimize(**SETTINGS, discount=discount)
        self.params: Any = {"w": jax.numpy.asarray(start)}
        self.state = self.tx.init(self.params)

        def update(grads: Any, state: Any, params: Any) -> Any:
            updates, state = self.tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.update = jax.jit(update)

    def step(self, grad: Vector) -> Vector:
        self.params, self.state = self.update({"w": grad}, self.state, self.params)
        return np.array(self.params["w"])

    def put(self, w: Vector) -> None:
        self.params = {"w": w}

    def size(self) -> float:
        return float(self.tx.step_sizes(self.state)["all"])


class Kernels:
    """`metaopt_kernels` on NumPy arrays."""

    def __init__(self, start: Vector, discount: float) -> None:
        pytest.importorskip("numba")
        from metaopt_kernels import MetaOptimizer

        self.params = {"w": start.copy()}
        self.opt = MetaOptimizer(self.params, fused=True, **SETTINGS, discount=discount)

    def step(self, grad: Vector) -> Vector:
        self.opt.step({"w": grad})
        return self.params["w"].copy()

    def put(self, w: Vector) -> None:
        self.params["w"][...] = w

    def size(self) -> float:
        return float(self.opt.step_sizes()["all"])


def run(kind: Any, problem: Edited, discount: float, steps: int) -> tuple[Vector, Vector]:
    """Return the last weights and all step sizes of a run whose weights are edited."""
    rng, w, sizes = np.random.default_rng(0), problem.start, []
    ours = kind(w, discount)
    for _ in range(steps):
        w = problem.edit(ours.step(problem.grad(w, rng)))
        ours.put(w)
        sizes.append(ours.size())
    return w, np.array(sizes)


def assert_follows(sizes: Vector, want: Vector) -> None:
    """Assert that step sizes are those wanted, to a factor, over the last tenth of a run."""
    ours, theirs = (np.log(found[-len(found) // 10 :]).mean() for found in (sizes, want))
    assert abs(ours - theirs) < np.log(FACTOR)


@pytest.mark.parametrize("discount", [1.0, 0.99])
@pytest.mark.parametrize("name", PROBLEMS)
def test_step_sizes_are_those_of_a_trace_pushed_through_the_edit(
    name: str, discount: float
) -> None:
    problem = PROBLEMS[name]
    _, want = pushed_run(problem, discount, STEPS)
    _, sizes = run(Core, problem, discount, STEPS)
    assert_follows(sizes, want)


@pytest.mark.parametrize("discount", [1.0, 0.99])
@pytest.mark.parametrize(
    "kind", [Core, Torch, pytest.param(CompiledTorch, marks=compiled), Jax, Kernels]
)
def test_the_smallest_edit_in_every_adapter(kind: Any, discount: float) -> None:
    """With a trace that believes in undone steps it is 2.5e4 at step 1000, and w 1e4."""
    w, sizes = run(kind, PROBLEMS["smallest"], discount, STEPS)
    assert abs(w[1] - 1.0) < 0.2
    assert max(sizes) < 1.0
    _, want = pushed_run(PROBLEMS["smallest"], discount, STEPS)
    assert_follows(sizes, want)


@pytest.mark.parametrize("discount", [1.0, 0.99])
def test_a_swap_of_the_weights_and_back_is_no_step(discount: float) -> None:
    """As for an evaluation at averaged weights."""
    problem = PROBLEMS["NNLS"]
    rngs = [np.random.default_rng(0) for _ in range(2)]
    runs = [Core(problem.start, discount) for _ in range(2)]
    weights, average = [problem.start] * 2, problem.start
    for _ in range(100):
        for index, ours in enumerate(runs):
            weights[index] = ours.step(problem.grad(weights[index], rngs[index]))
        average = 0.9 * average + 0.1 * weights[1]
        runs[1].put(average)
        runs[1].put(weights[1])
    np.testing.assert_array_equal(weights[0], weights[1])
    assert runs[0].size() == runs[1].size()


@pytest.mark.parametrize("kind", [Core, Torch, Jax, Kernels])
def test_weights_that_are_loaded_before_the_first_step_are_no_step(kind: Any) -> None:
    start, loaded = np.zeros(3), np.array([5.0, -3.0, 1.0])
    late, early = kind(start, 1.0), kind(loaded, 1.0)
    late.put(loaded)
    for t in range(3):
        grad = np.array([1.0, -0.5, 0.25]) + t
        np.testing.assert_array_equal(late.step(grad), early.step(grad))
    assert late.size() == early.size()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    discount=st.sampled_from([1.0, 0.9, 0.5, 0.0]),
    decay=st.sampled_from([0.0, 0.1]),
    base=st.sampled_from([row.kind for row in RULES]),
    blocks=st.sampled_from(["scalar", "tensor", "weight"]),
    lrs=st.lists(st.sampled_from([1.0, 0.0, 0.3]), min_size=6, max_size=6),
    missing=st.sets(st.integers(0, 5)),
    lost=st.sets(st.integers(1, 5), max_size=2),
)
def test_the_average_is_an_ema_of_the_weights(
    seed: int,
    discount: float,
    decay: float,
    base: Any,
    blocks: str,
    lrs: list[float],
    missing: set[int],
    lost: set[int],
) -> None:
    """Kept beside the run: (1 - q) w + q a, q = gamma (1 - kappa alpha); w where it restarts."""
    rng = np.random.default_rng(seed)
    opt = mo.MetaOptimize(
        base=base(weight_decay=decay),
        meta=mo.SGD(),
        step_size=0.05,
        meta_lr=0.1,
        discount=discount,
        blocks=blocks,
    )
    params: Any = {"a": rng.normal(size=3), "b": rng.normal(size=2)}
    state, means = opt.init(params), {name: array.copy() for name, array in params.items()}
    largest = 2.0**511
    for t, lr in enumerate(lrs):
        grads: Any = {name: rng.normal(size=array.shape) for name, array in params.items()}
        if t in lost:  # its products are not finite; the weights are
            grads["a"] = np.full(3, 1e300)
        if t in missing:
            grads["b"] = None
        sizes = opt.step_sizes(state)
        before, old = params, state
        with np.errstate(over="ignore", invalid="ignore"):
            params, state = opt.step(params, grads, state, lr={"a": lr, "b": 1.0})
        if t in lost:  # undone, as no later step could be seen beside it
            params = params | {"a": before["a"]}
        for name, multiplier in (("a", lr), ("b", 1.0)):
            if grads[name] is None:
                continue
            z = state.meta_grad
            z = z[name] if blocks == "weight" else z[0 if blocks == "scalar" or name == "a" else 1]
            alpha = multiplier * sizes["all" if blocks == "scalar" else name]
            q = (discount if multiplier else 1.0) * (1.0 - decay * alpha)
            ema = (1.0 - q) * before[name] + q * means[name]
            goes_on = (np.abs(z) < largest) & (old.count[name] > 0)
            means[name] = np.where(goes_on, ema, before[name])
            slack = 20 * distance("float64", before[name], means[name])
            assert np.all(np.abs(state.average[name] - means[name]) <= slack)


@pytest.mark.parametrize("array", [False, True])
def test_at_discount_1_without_decay_the_average_is_the_first_weights(array: bool) -> None:
    discount: Any = np.asarray(1.0) if array else 1.0
    opt = mo.MetaOptimize(base=mo.AdamW(), meta=mo.AdamW(), step_size=0.1, discount=discount)
    start = {"w": np.array([0.1, -0.7, 1e-3])}
    params, state = start, opt.init(start)
    for _ in range(20):
        params, state = opt.step(params, params, state)
    np.testing.assert_array_equal(state.average["w"], start["w"])


@pytest.mark.parametrize(
    "options",
    [
        {"sigma": "softplus"},
        {"curvature": "diagonal"},
    ],
    ids=str,
)
def test_where_the_trace_is_no_distance_it_is_kept_itself(options: Any) -> None:
    opt = mo.MetaOptimize(base=mo.AdamW(), meta=mo.AdamW(), **options)
    state = opt.init({"w": np.ones(2)})
    assert list(state.trace) == ["w"]
    assert not state.average


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_narrow_weights_keep_their_trace(dtype: str) -> None:
    opt = mo.MetaOptimize(base=mo.AdamW(), meta=mo.AdamW())
    state = opt.init({"w": np.ones(2, dtype)})
    assert bool(state.trace) == (dtype == "float16")
    assert bool(state.average) == (dtype != "float16")
