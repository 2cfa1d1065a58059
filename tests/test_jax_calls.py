"""What may be passed to metaopt_jax, and what is said of the rest."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

from metaopt_jax import from_config, metaoptimize, wrap  # noqa: E402

import metaopt as mo  # noqa: E402

jnp = jax.numpy
PARAMS = {"a": np.ones((4, 2), "float32"), "b": np.ones(2, "float32")}


def params() -> Any:
    return jax.tree.map(jnp.asarray, PARAMS)


def loss(p: Any) -> Any:
    """Return a loss that needs both leaves together."""
    return jnp.mean((p["a"] @ p["b"] - 1.0) ** 2)


def plain(**options: Any) -> Any:
    return metaoptimize(base=mo.SGD(), meta=mo.SGD(), step_size=0.1, **options)


@pytest.mark.parametrize("discount", [0.0, "schedule", 1])
def test_an_injected_discount_is_no_part_of_the_structure(discount: Any) -> None:
    """Also where it is 0 at first, with which a trace needs no columns."""
    given = (lambda count: jnp.minimum(0.1 * count, 0.9)) if discount == "schedule" else discount
    tx = optax.inject_hyperparams(metaoptimize)(
        base=mo.AdamW(), meta=mo.AdamW(), curvature="exact", discount=given
    )
    state, now = tx.init(params()), params()
    step = jax.jit(lambda state, p: tx.update(jax.grad(loss)(p), state, p, value_fn=loss))
    for _ in range(3):
        updates, state = step(state, now)
        now = optax.apply_updates(now, updates)
    assert jax.tree.all(jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), now))


def test_a_discount_that_is_an_array_is_kept_in_files(tmp_path: Path) -> None:
    tx = plain(discount=jnp.float32(0.5))
    mo.save(tmp_path / "x", tx.opt, tx.core_state(tx.init(params()), params()))
    opt, _ = mo.load(tmp_path / "x", tx.named(params()))
    assert opt.discount == 0.5


def test_each_leaf_may_have_a_schedule() -> None:
    tx = plain(lr={"a": optax.constant_schedule(0.5), "b": 1.0})
    grads = jax.grad(loss)(params())
    updates, _ = tx.update(grads, tx.init(params()), params())
    np.testing.assert_allclose(updates["a"], -0.05 * grads["a"], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.1 * grads["b"], rtol=1e-6)


def test_a_diagonal_may_be_of_numpy() -> None:
    tx = plain(curvature="diagonal")
    grads = jax.grad(loss)(params())
    found = [
        tx.update(grads, tx.init(params()), params(), hessian_diagonal=diagonal)[0]
        for diagonal in (PARAMS, params())
    ]
    assert jax.tree.all(jax.tree.map(lambda x, y: jnp.array_equal(x, y), *found))


def test_a_group_sees_the_weights_of_others_where_they_are_put_back() -> None:
    """As docs/jax.md says, with a loss that needs those."""

    def other(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def of_mine(mine: Any) -> Any:
        merge = lambda new, old: old if other(new) else new  # noqa: E731
        return loss(jax.tree.map(merge, mine, params(), is_leaf=other))

    alone = metaoptimize(base=mo.SGD(), meta=mo.SGD(), curvature="exact", discount=1.0)
    tx = optax.partition({"x": alone, "y": optax.sgd(0.1)}, {"a": "x", "b": "y"})
    grads = jax.grad(loss)(params())
    updates, _ = tx.update(grads, tx.init(params()), params(), value_fn=of_mine)
    assert jnp.all(jnp.isfinite(updates["a"]))


def test_a_state_of_another_transformation_is_refused() -> None:
    with pytest.raises(TypeError, match="`state` must be what `init` returned; got tuple"):
        plain().update(params(), (1,), params())


def test_a_state_of_other_blocks_is_named() -> None:
    state = plain().init(params())
    with pytest.raises(ValueError, match="`state` must be a pytree like `params`"):
        plain(blocks="weight").update(params(), state, params())


def ran(tx: Any, steps: int = 4) -> Any:
    """Return parameters and state after some compiled updates."""

    step = jax.jit(lambda state, now: tx.update(jax.grad(loss)(now), state, now))
    state, now = tx.init(params()), params()
    for _ in range(steps):
        updates, state = step(state, now)
        now = optax.apply_updates(now, updates)
    return now, state


def falling(count: Any) -> Any:
    return 0.5 / (1.0 + count)


def test_meta_lr_may_be_a_schedule() -> None:
    """As with `inject_hyperparams`, of which it needs none."""
    options: dict[str, Any] = {"base": "adamw", "meta": "adam", "step_size": 0.01}
    injected = optax.inject_hyperparams(metaoptimize)(**options, meta_lr=falling)
    want = jax.tree.leaves(ran(injected)[0])
    direct = metaoptimize(**options, meta_lr=falling)
    assert float(direct.opt.meta_lr) == 0.5
    for tx in (direct, from_config(mo.MetaOptimize(**options), meta_lr=falling)):
        for got, expected in zip(jax.tree.leaves(ran(tx)[0]), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5)
    held = jax.tree.leaves(ran(metaoptimize(**options, meta_lr=0.5))[0])
    assert not np.allclose(held[0], want[0], rtol=1e-4)


def test_a_wrapper_takes_a_schedule_of_meta_lr() -> None:
    options: dict[str, Any] = {"meta": "adam", "step_size": 0.01}
    falls, held = (
        jax.tree.leaves(ran(wrap(optax.adam(1.0), **options, meta_lr=meta_lr))[0])
        for meta_lr in (falling, 0.5)
    )
    assert not np.allclose(falls[0], held[0], rtol=1e-4)


@pytest.mark.parametrize("lr", [1e-3, {"a": 1e-3, "b": 1e-4}], ids=["one", "by leaf"])
@pytest.mark.parametrize(
    "made",
    [
        lambda lr: metaoptimize(lr=lr),
        lambda lr: from_config(mo.MetaOptimize(), lr=lr),
        lambda lr: wrap(optax.sgd(1.0), lr=lr),
    ],
    ids=["metaoptimize", "from_config", "wrap"],
)
def test_a_multiplier_that_looks_like_a_step_size_warns(made: Any, lr: Any) -> None:
    with pytest.warns(UserWarning, match="multiplies.*`step_size=0.001`") as found:
        made(lr)
    assert [Path(one.filename).name for one in found] == [Path(__file__).name]


def test_multipliers_of_schedules_and_of_some_leaves_may_be_small() -> None:
    metaoptimize(lr=optax.cosine_decay_schedule(1e-3, 10))
    metaoptimize(lr={"a": 1e-3, "b": 1.0})
    metaoptimize(lr=0.0)


def test_what_is_no_configuration_is_refused() -> None:
    with pytest.raises(TypeError, match="`config` must be a metaopt"):
        from_config({"base": "adamw"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`meta_lr` must be a schedule"):
        from_config(mo.MetaOptimize(), meta_lr=0.1)  # type: ignore[arg-type]
