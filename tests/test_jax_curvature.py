"""metaopt_jax with curvature: derivatives of the loss given, forward over reverse."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.translate import values_of

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import metaopt_jax  # noqa: E402
from metaopt_conformance.tolerances import relative_error, rounding  # noqa: E402

import metaopt as mo  # noqa: E402
from tests.jax_problem import by_name, close, options_of, start, update  # noqa: E402

jnp = jax.numpy

STEPS = 5
RNG = np.random.default_rng(0)
MATRIX, OTHER = (RNG.normal(size=(4, 3)).astype("float32") for _ in range(2))
#: The start of a layer whose weights and biases act on each other.
LAYER = {
    "kernel": np.asarray([0.3, -0.2, 0.5], "float32"),
    "bias": np.asarray([0.1, 0.4, -0.3], "float32"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "l": {"approximation": "l"},
    "2x2": {"approximation": "2x2"},
    "full": {"approximation": "full"},
    "one block": {"approximation": "2x2", "blocks": "scalar"},
    "per weight": {"approximation": "l", "blocks": "weight", "meta": mo.SGD(), "meta_lr": 0.05},
    "discount": {"approximation": "2x2", "discount": 0.9, "meta_first": True},
}


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    """Float32 whatever other tests have asked of JAX."""
    with jax.enable_x64(False):
        yield


def quartic(params: Any) -> Any:
    """Return a loss whose Hessian is full and whose third derivatives are not zero."""
    output = MATRIX @ params["kernel"] + OTHER @ params["bias"]
    return jnp.sum(output**2 * (1.0 + 0.5 * output) + 0.1 * output**4)


def layer() -> dict[str, Any]:
    return {name: jnp.asarray(param) for name, param in LAYER.items()}


def tx_of(name: str) -> Any:
    usual: dict[str, Any] = {
        "base": mo.AdamW(weight_decay=0.1),
        "meta": mo.AdamW(),
        "step_size": 1e-2,
        "meta_lr": 1e-2,
        "curvature": "exact",
        "blocks": "tensor",
        "discount": 1.0,
    }
    return metaopt_jax.metaoptimize(**(usual | OPTIONS[name]))


def train(tx: Any, given: Callable[[Any], Any]) -> Any:
    """Return parameters and state after a compiled run with these arguments of `update`."""

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(quartic)(params), state, params, **given(params))
        return optax.apply_updates(params, updates), state

    compiled, params = jax.jit(step), layer()
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = compiled(params, state)
    return params, state


def by_hand() -> tuple[Any, Any, Any]:
    """Return gradient, `hvp` and `third` of the loss at parameters, in NumPy and written out."""
    rows = {"kernel": MATRIX, "bias": OTHER}

    def output(params: Any) -> Any:
        return sum(rows[name] @ params[name] for name in rows)

    def grad(params: Any) -> Any:
        o = output(params)
        slope = 2.0 * o + 1.5 * o**2 + 0.4 * o**3
        return {name: slope @ rows[name] for name in params}

    def hvp(params: Any) -> Any:
        bend = 2.0 + 3.0 * output(params) + 1.2 * output(params) ** 2
        return lambda v: {
            name: (bend * sum(v[other] @ rows[other].T for other in v)) @ rows[name] for name in v
        }

    def third(params: Any) -> Any:
        twist = 3.0 + 2.4 * output(params)

        def along(u: Any, v: Any) -> Any:
            one, other = (sum(t[name] @ rows[name].T for name in t) for t in (u, v))
            return {name: (twist * one[:, None, :] * other[None]) @ rows[name] for name in u}

        return along

    return grad, hvp, third


@pytest.mark.parametrize("name", OPTIONS)
def test_derivatives_are_those_of_the_loss(name: str) -> None:
    """The run is that of the core with derivatives written by hand."""
    tx = tx_of(name)
    params, state = train(tx, lambda _: {"value_fn": quartic})
    grad, hvp, third = by_hand()
    leaves = {name: LAYER[name] for name in ("bias", "kernel")}
    core = tx.opt.init(leaves)
    for _ in range(STEPS):
        leaves, core = tx.opt.step(leaves, grad(leaves), core, hvp=hvp(leaves), third=third(leaves))
    close(by_name(params), by_name(leaves), STEPS)
    close(values_of(tx.core_state(state, params)), values_of(core), STEPS)


@pytest.mark.parametrize("name", ["2x2", "full"])
def test_products_may_be_given_in_place_of_the_loss(name: str) -> None:
    def product(params: Any) -> Callable[[Any], Any]:
        return lambda v: jax.jvp(jax.grad(quartic), (params,), (v,))[1]

    def given(params: Any) -> Any:
        def third(u: Any, v: Any) -> Any:
            return jax.jvp(lambda at: product(at)(u), (params,), (v,))[1]

        return {"hvp": product(params)} | ({"third": third} if name == "full" else {})

    tx = tx_of(name)
    got, state = train(tx, given)
    want, other = train(tx, lambda _: {"value_fn": quartic})
    close(got, want, STEPS)
    close(state, other, STEPS)


def test_columns_are_batched() -> None:
    """The loss is traced once and not once for each block, however many they are."""
    traces = []

    def counted(params: Any) -> Any:
        traces.append(1)
        return quartic(params)

    tx, params = tx_of("per weight"), layer()
    state = tx.init(params)
    jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=counted))(params, state, params)
    assert len(traces) == 1


def test_products_are_taken_in_the_precision_of_the_traces() -> None:
    """Wider than half-precise parameters are."""
    seen: set[str] = set()

    def noted(params: Any) -> Any:
        seen.update(str(param.dtype) for param in params.values())
        return quartic(params)

    tx, params = tx_of("l"), jax.tree.map(lambda leaf: leaf.astype("bfloat16"), layer())
    grads, before = jax.grad(quartic)(params), tx.init(params)
    _, state = jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=noted))(grads, before, params)
    assert seen == {"float32"}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trace_or_average)} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("exact", "value_fn", '`value_fn` is needed by `curvature="exact"`'),
        ("full", "value_fn", '`value_fn` is needed by `curvature="exact"`'),
        ("diagonal", "hessian_diagonal", '`hessian_diagonal` is needed by `curvature="diagonal"`'),
    ],
)
def test_what_curvature_needs_is_asked_for(name: str, missing: str, message: str) -> None:
    tx, params = metaopt_jax.metaoptimize(**options_of(name)), start()
    with pytest.raises(ValueError, match=message):
        update(tx, params, tx.init(params), **{missing: None})


def test_full_needs_third_derivatives_beside_products() -> None:
    tx, params = metaopt_jax.metaoptimize(**options_of("full")), start()
    with pytest.raises(ValueError, match='`value_fn` is needed by `approximation="full"`'):
        update(tx, params, tx.init(params), value_fn=None, hvp=lambda tangent: tangent)


def test_the_nonlinear_extension_of_idbd_is_its_literature_form() -> None:
    """H <- H - alpha Hess H - alpha g, with step sizes per weight that move first."""
    target = np.asarray([1.0, -2.0], "float32")
    hessian = np.asarray([[2.0, 0.3], [0.3, 0.5]], "float32")

    def loss(params: Any) -> Any:
        error = params["w"] - target
        return 0.5 * error @ hessian @ error

    tx = metaopt_jax.from_config(mo.presets.idbd_nonlinear(step_size=0.05, meta_lr=0.02))
    params = {"w": jnp.zeros(2)}
    state = tx.init(params)

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step)
    w, beta, columns = np.zeros(2), np.full(2, np.log(0.05)), np.zeros((2, 2))
    for _ in range(20):
        params, state = compiled(params, state)
        grad = hessian @ (w - target)
        beta = beta - 0.02 * (columns.T @ grad)
        alpha = np.exp(beta)
        w = w - alpha * grad
        columns = columns - alpha[:, None] * (hessian @ columns) - np.diag(alpha * grad)
    allowed = rounding("float32", operations=20, steps=20)
    assert relative_error(params["w"], w) < allowed
    assert relative_error(state.beta["w"], beta) < allowed
