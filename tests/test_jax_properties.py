"""What optax asks of every optimizer that is contributed to it, asked of metaopt_jax.

The problems and thresholds are those of optax's own tests of `optax.contrib`; what they ask about
shardings is asked in test_jax_sharding.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

from metaopt_conformance.table import RULES  # noqa: E402
from metaopt_jax import metaoptimize  # noqa: E402

import metaopt as mo  # noqa: E402
from tests.on_demand import slow_but  # noqa: E402

jnp = jax.numpy

BASES: dict[str, Any] = {
    "SGD momentum": mo.SGD(momentum=0.9),
    **{row.kind.__name__: row.kind() for row in RULES if row.kind is not mo.SGD},
}
#: Meta rules, and the meta step size of each.
METAS: dict[str, tuple[Any, float]] = {
    "FastStart": (mo.FastStart(mo.AdamW()), 1e-2),
    "Adam": (mo.AdamW(), 1e-2),
    "Lion": (mo.Lion(), 1e-3),
}
STEPS, ALLOWED = 30_000, 3e-2


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    """Float32 whatever other tests have asked of JAX."""
    with jax.enable_x64(False):
        yield


def distance(params: Any, target: Any) -> Any:
    """Return the sum of squares between two pytrees."""
    parts = jax.tree.map(lambda one, other: jnp.sum((one - other) ** 2), params, target)
    return sum(jax.tree.leaves(parts))


def rosenbrock(params: Any, _: Any) -> Any:
    x, y = params
    return (1.0 - x) ** 2 + 100.0 * (y - x**2) ** 2


#: Loss, start and solution, as nested lists of which the innermost are arrays.
PROBLEMS: dict[str, tuple[Any, Any, Any]] = {
    "parabola": (distance, {"w": [-1.0, 10.0, 1.0]}, {"w": [1.0, -1.0, 1.0]}),
    "matrix": (distance, {"w": [[1.0, 1.0], [1.0, 1.0]]}, {"w": [[1.0, 0.0], [0.0, 1.0]]}),
    "mixed": (
        distance,
        {"a": [0.0, 0.0], "b": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], "c": 0.0},
        {"a": [1.0, -1.0], "b": [[1.0, 0.0, 2.0], [3.0, -1.0, 0.5]], "c": -1.0},
    ),
    "rosenbrock": (
        lambda params, target: rosenbrock(params["w"], target),
        {"w": [0.0, 0.0]},
        {"w": [1.0, 1.0]},
    ),
}


def arrays(values: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.asarray(value) for name, value in values.items()}


def nested(dtype: str = "float32") -> Any:
    return [-jnp.ones((2, 3), dtype), {"w": jnp.ones((2, 5, 2), dtype)}]


@pytest.mark.parametrize("problem", slow_but(["mixed", "rosenbrock"], PROBLEMS))
@pytest.mark.parametrize("meta", METAS)
@pytest.mark.parametrize("base", BASES)
def test_it_solves_it(base: str, meta: str, problem: str) -> None:
    """From step sizes of 1e-3."""
    if (base, meta, problem) == ("SGD momentum", "FastStart", "rosenbrock"):
        pytest.skip("a step size tried too large ends it: gradients grow with the weights' cube")
    loss, start, solution = PROBLEMS[problem]
    rule, meta_lr = METAS[meta]
    tx = metaoptimize(base=BASES[base], meta=rule, meta_lr=meta_lr, step_size=1e-3, discount=1.0)
    params, target = arrays(start), arrays(solution)

    def body(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, target), state, params)
        return (optax.apply_updates(params, updates), state), None

    # a no-op, for which the state has to be one that optax can map over
    state = optax.tree.map_params(tx, lambda leaf: leaf, tx.init(params))
    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=STEPS)[0])
    params, _ = run((params, state))
    for name, want in target.items():
        assert bool(jnp.allclose(params[name], want, rtol=ALLOWED, atol=ALLOWED)), name


@pytest.mark.parametrize("base", BASES)
def test_hyperparameters_can_be_injected(base: str) -> None:
    options = {"base": BASES[base], "meta": mo.AdamW(), "step_size": 1e-3, "discount": 1.0}
    plain, injected = metaoptimize(**options), optax.inject_hyperparams(metaoptimize)(**options)
    params = nested()
    grads = jax.tree.map(jnp.negative, params)
    want, state = jax.jit(plain.update)(grads, plain.init(params), params)
    got, wrapped = jax.jit(injected.update)(grads, injected.init(params), params)
    pairs = zip(
        jax.tree.leaves((got, wrapped.inner_state)), jax.tree.leaves((want, state)), strict=True
    )
    assert all(bool(jnp.allclose(one, other, rtol=1e-4)) for one, other in pairs)


@pytest.mark.parametrize("base", BASES)
def test_updates_have_the_dtype_of_the_parameters(base: str) -> None:
    """Also where gradients are accumulated, which is a `cond` of branches that must agree."""
    tx = metaoptimize(base=BASES[base], meta=mo.AdamW())
    params = nested("bfloat16")
    accumulated = optax.MultiSteps(tx, every_k_schedule=4)
    for transformation in (tx, accumulated):
        state = transformation.init(params)
        updates, after = jax.jit(transformation.update)(params, state, params)
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("blocks", ["scalar", "weight"])
def test_a_state_goes_through_cond(blocks: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        tx, params = (
            metaoptimize(base=mo.AdamW(), meta=mo.Lion(), blocks=blocks, discount=1.0),
            nested(dtype),
        )
        state = tx.init(params)

        def maybe(take: Any, state: Any) -> Any:
            return jax.lax.cond(take, lambda: tx.update(params, state, params)[1], lambda: state)

        for take in (True, False):
            after = jax.jit(maybe)(take, state)
            assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
            assert int(after.count) == take


def test_a_schedule_is_a_multiplier() -> None:
    params = {"w": jnp.ones(3)}
    schedule = optax.exponential_decay(1.0, transition_steps=1, decay_rate=0.5)
    tx = metaoptimize(
        base=mo.SGD(), meta=mo.SGD(), step_size=0.1, meta_lr=0.0, lr=schedule, discount=1.0
    )
    update, state = jax.jit(tx.update), tx.init(params)
    for count in range(3):
        updates, state = update(params, state, params)
        assert bool(jnp.allclose(updates["w"], -0.1 * 0.5**count, rtol=1e-6))
