"""metaopt_jax with the gradients of a held-out loss: `meta_grads` of `update`.

The conformance suite compares it with its oracle; here is what is JAX's own.
"""

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from metaopt_conformance import tolerances  # noqa: E402
from metaopt_jax import metaoptimize, wrap  # noqa: E402

import metaopt as mo  # noqa: E402
from tests.on_demand import slow_but  # noqa: E402

OPTIONS: dict[str, Any] = {"step_size": 0.02, "meta_lr": 0.05}
STEPS = 6


def start() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "layer": {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)},
        "b": jnp.asarray(rng.normal(size=3), jnp.float32),
    }


def loss(params: Any, t: Any) -> Any:
    x = jnp.sin(jnp.arange(20.0).reshape(5, 4) * (t + 1.0))
    out = jnp.tanh(x @ params["layer"]["w"]) + params["b"]
    return jnp.mean(jnp.square(out - jnp.cos(t)))


def run(tx: Any, judge: Any, *, compiled: bool = True, **given: Any) -> Any:
    """Return params and state; `judge` is from params and step to `meta_grads`."""
    params = start()
    state = tx.init(params)

    def step(params: Any, state: Any, t: Any, meta_grads: Any) -> Any:
        grads = jax.grad(loss)(params, t)
        updates, state = tx.update(grads, state, params, meta_grads=meta_grads, **given)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if compiled else step
    for t in range(STEPS):
        params, state = step(params, state, t, judge(params, t))
    return params, state


def elsewhere(params: Any, t: int) -> Any:
    return jax.grad(loss)(params, t + 100.0)


def every_third(params: Any, t: int) -> Any:
    return elsewhere(params, t) if t % 3 == 2 else None


def close(one: Any, other: Any) -> None:
    allowed = tolerances.rounding("float32", operations=60, steps=STEPS)
    errors = jax.tree.map(tolerances.relative_error, one, other)
    assert max(jax.tree.leaves(errors)) < allowed


def by_name(tx: Any, tree: Any) -> dict[str, Any]:
    return {name: np.asarray(leaf) for name, leaf in tx.named(tree).items()}


def test_a_run_is_the_cores() -> None:
    tx = metaoptimize(held_out=True, **OPTIONS)
    params, state = run(tx, every_third)
    opt = mo.MetaOptimize(held_out=True, **OPTIONS)
    names = by_name(tx, start())
    own_state = opt.init(names)
    for t in range(STEPS):
        tree = {"layer": {"w": names["layer.w"]}, "b": names["b"]}
        grads, judge = jax.grad(loss)(tree, t), every_third(tree, t)
        names, own_state = opt.step(
            names,
            by_name(tx, grads),
            own_state,
            meta_grads=None if judge is None else by_name(tx, judge),
        )
    close(tx.named(params), names)
    close(tx.step_sizes(state), opt.step_sizes(own_state))
    assert float(tx.step_sizes(state)["all"]) != pytest.approx(0.02)


def test_zeros_are_rest_so_that_a_traced_condition_can_choose() -> None:
    tx = metaoptimize(held_out=True, **OPTIONS)

    def chosen(params: Any, t: int) -> Any:
        def choose(t: Any) -> Any:
            return jax.lax.cond(
                t % 3 == 2,
                lambda: jax.grad(loss)(params, t + 100.0),
                lambda: jax.tree.map(jnp.zeros_like, params),
            )

        return jax.jit(choose)(t)

    one, other = run(tx, chosen), run(tx, every_third)
    close(one[0], other[0])
    close(tx.step_sizes(one[1]), tx.step_sizes(other[1]))


@pytest.mark.parametrize("compiled", slow_but([True], [False, True]))
def test_a_leaf_that_is_none_adds_nothing(compiled: bool) -> None:
    tx = metaoptimize(held_out=True, blocks="tensor", **OPTIONS)

    def some(params: Any, t: int) -> Any:
        return elsewhere(params, t) | {"b": None}

    _, state = run(tx, some, compiled=compiled)
    sizes = tx.step_sizes(state)
    assert float(sizes["b"]) == pytest.approx(0.02)
    assert float(sizes["layer.w"]) != pytest.approx(0.02, rel=1e-2)


def test_within_a_chain() -> None:
    """Whose other parts see the gradients of training alone."""
    tx = optax.chain(optax.clip(1e-3), metaoptimize(held_out=True, **OPTIONS))
    _, state = run(tx, elsewhere)
    alone = metaoptimize(held_out=True, **OPTIONS)
    assert float(alone.step_sizes(state)["all"]) != pytest.approx(0.02)


@pytest.mark.parametrize("blocks", slow_but(["tensor"], ["scalar", "tensor"]))
def test_a_wrapped_transformation_takes_them(blocks: str) -> None:
    options = OPTIONS | {"discount": 1.0, "blocks": blocks, "held_out": True}
    wrapped = wrap(optax.adamw(1.0, weight_decay=0.0), **options)
    own = metaoptimize(base=mo.AdamW(), **options)
    one, other = run(wrapped, every_third), run(own, every_third)
    close(one[0], other[0])
    close(wrapped.step_sizes(one[1]), own.step_sizes(other[1]))


def test_what_was_not_asked_for_is_refused() -> None:
    with pytest.raises(ValueError, match="`meta_grads` must be left out without `held_out`"):
        run(metaoptimize(**OPTIONS), elsewhere)
    with pytest.raises(ValueError, match="`meta_grads`"):
        run(metaoptimize(held_out=True, **OPTIONS), lambda *_: {"b": jnp.zeros(3)})
