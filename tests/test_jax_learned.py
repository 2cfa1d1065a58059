"""Hyperparameters that are learned, in JAX: compiled, within optax's wrappers, and saved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from metaopt_conformance.tolerances import eps  # noqa: E402
from metaopt_jax import metaoptimize  # noqa: E402

import metaopt as mo  # noqa: E402

Learned = mo.Learned
#: Of moments without bias correction the first derivatives are no rounding alone.
BASE: dict[str, Any] = {
    "a": mo.SGD(momentum=Learned(0.8), weight_decay=Learned(0.1, blocks="tensor")),
    "*": mo.RMSprop(beta2=Learned(0.9), eps=Learned(1e-2), bias_correction=False),
}
SHAPES: dict[str, tuple[int, ...]] = {"a": (4, 3), "b": (3,)}
BLOCKS = ["scalar", "tensor", "node", "weight"]


def arrays(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def close(got: Any, want: Any) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=100 * eps("float32"), atol=1e-6)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_compiled_update_is_the_cores_step(blocks: str) -> None:
    options: dict[str, Any] = {"base": BASE, "step_size": 0.02, "blocks": blocks}
    tx, opt = metaoptimize(**options), mo.MetaOptimize(**options)
    params: Any = arrays(0)
    state, own = tx.init(params), jax.tree.map(np.asarray, params)
    kept, update = opt.init(own), jax.jit(tx.update)
    for t in range(4):
        grads = arrays(t + 1)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        own, kept = opt.step(own, jax.tree.map(np.asarray, grads), kept)
    close(params, own)
    found, want = tx.hyperparameters(state), opt.hyperparameters(kept)
    assert [*found] == [*want] == ["momentum", "weight_decay", "beta2", "eps"]
    for name in want:
        assert found[name].keys() == want[name].keys()
        close(found[name], want[name])
    told = tx.diagnostics(state, params)["learned"]
    close(
        told["momentum"]["trace_norm"],
        opt.diagnostics(kept, own)["learned"]["momentum"]["trace_norm"],
    )


def test_within_a_chain_and_over_a_part_of_the_parameters() -> None:
    inner = metaoptimize(base={"a": BASE["a"]}, step_size=0.02)
    tx = optax.chain(optax.clip_by_global_norm(10.0), optax.masked(inner, {"a": True, "b": False}))
    params: Any = arrays(0)
    state = tx.init(params)
    for t in range(3):
        updates, state = jax.jit(tx.update)(arrays(t + 1), state, params)
        params = optax.apply_updates(params, updates)
    assert float(inner.hyperparameters(state)["momentum"]["all"]) != np.float32(0.8)


def test_the_exact_hessian_reaches_it() -> None:
    options: dict[str, Any] = {"base": BASE, "step_size": 0.02, "curvature": "exact"}
    tx, opt = metaoptimize(**options), mo.MetaOptimize(**options)
    params: Any = arrays(0)
    state, own, kept = tx.init(params), params, opt.init(params)

    def loss(params: Any) -> Any:
        return sum(jnp.sum(leaf**2 / 2.0 + 0.3 * leaf) for leaf in params.values())

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step)
    for _ in range(3):
        params, state = compiled(params, state)
        own, kept = opt.step(own, jax.grad(loss)(own), kept, hvp=lambda tangents: dict(tangents))
    close(params, own)
    close(tx.hyperparameters(state), opt.hyperparameters(kept))


def test_saved_and_loaded_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    tx = metaoptimize(base=BASE, step_size=0.02)
    params = arrays(0)
    _, state = tx.update(arrays(1), tx.init(params), params)
    mo.save(tmp_path / "state", tx.opt, tx.core_state(state, params))
    _, core = mo.load(tmp_path / "state", tx.named(params))
    again = tx.from_core_state(core, params)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert np.array_equal(one, other)


def test_a_projection_takes_its_traces_along() -> None:
    tx = metaoptimize(base=BASE, step_size=0.02)
    params = arrays(0)
    updates, state = tx.update(arrays(1), tx.init(params), params)
    params = optax.apply_updates(params, updates)
    params, state = tx.project(
        lambda found: jax.tree.map(lambda leaf: jnp.maximum(leaf, 0.0), found), params, state
    )
    trace = state.learned["weight_decay"]["trace"]["a"]
    assert np.all(np.asarray(trace)[np.asarray(params["a"]) == 0.0] == 0.0)
    assert np.any(np.asarray(trace) != 0.0)


def test_without_any_the_state_has_no_array_more() -> None:
    state = metaoptimize(base=mo.AdamW()).init(arrays(0))
    assert jax.tree.leaves(state.learned) == []
