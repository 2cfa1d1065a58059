"""metaopt_jax within what optax makes of transformations, in every dtype."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.translate import values_of

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import metaopt_jax  # noqa: E402
from metaopt_conformance.tolerances import relative_error, rounding  # noqa: E402

import metaopt as mo  # noqa: E402
from metaopt.step import sizes_of  # noqa: E402
from tests.jax_problem import (  # noqa: E402
    CONFIGURATIONS,
    close,
    loss,
    options_of,
    start,
    update,
)

jnp = jax.numpy

STEPS = 4


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    """Float32 whatever other tests have asked of JAX."""
    with jax.enable_x64(False):
        yield


def ours(name: str = "scalar", **more: Any) -> Any:
    return metaopt_jax.metaoptimize(**(options_of(name) | more))


def train(tx: Any, params: Any, steps: int = STEPS) -> Any:
    """Return parameters and state after a compiled run."""
    step = jax.jit(lambda params, state: update(tx, params, state), donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, params), tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    assert step._cache_size() == 1
    return params, state


def labels(params: Any) -> Any:
    return params | {
        key: jax.tree.map(lambda _, k=key: "head" if k == "head" else "rest", params[key])
        for key in params
    }


# --- chain, partition, masked


def test_after_clipping() -> None:
    """The trace takes the gradient that the rule takes."""
    params, tx = start(), ours()
    got, state = train(optax.chain(optax.clip_by_global_norm(0.5), tx), params)

    clip, inner = optax.clip_by_global_norm(0.5), tx.init(params)
    for _ in range(STEPS):
        grads, _ = clip.update(jax.grad(loss)(params), clip.init(params))
        updates, inner = tx.update(grads, inner, params)
        params = optax.apply_updates(params, updates)
    close(got, params, STEPS)
    close(tx.step_sizes(state), tx.step_sizes(inner), STEPS)


def test_the_state_is_found_within_others() -> None:
    tx = ours("tensor")
    wrapped = optax.chain(optax.clip_by_global_norm(1.0), optax.chain(tx, optax.identity()))
    params, state = train(wrapped, start())
    beta, sizes = (optax.tree.get(state, name) for name in ("beta", "learned_step_sizes"))
    assert beta.shape == sizes.shape == (5,)
    assert relative_error(sizes, np.exp(beta)) < rounding("float32", operations=4)
    found = tx.step_sizes(state)
    assert [float(size) for size in found.values()] == [float(size) for size in sizes]
    assert set(tx.diagnostics(state, params)) >= {"beta", "meta_grad", "trace_norm", "skipped"}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_step_sizes_are_found_by_name_in_every_configuration(name: str) -> None:
    tx, params = ours(name), start()
    wrapped = optax.chain(optax.clip_by_global_norm(1.0), tx)
    _, state = update(wrapped, params, wrapped.init(params))
    core = tx.core_state(state, params)
    for field, want in (
        ("learned_step_sizes", sizes_of(tx.opt.sigma_map, core.beta).value),
        ("beta", core.beta),
        ("meta_grad", core.meta_grad),
        ("trace_or_average", core.trace or core.average),
    ):
        found = optax.tree.get(state, field)
        if tx.opt.horizons and isinstance(found, tuple):  # a pytree for each
            found = jax.tree.map(lambda *each: jnp.stack(each), *found)
        close(jax.tree.leaves(found), jax.tree.leaves(want), 1)


@pytest.mark.parametrize("name", ["scalar", "tensor", "exact", "discounts"])
def test_a_group_of_a_partition_learns_by_itself(name: str) -> None:
    params, tx, rest = start(), ours(name), optax.sgd(0.1)
    make = optax.partition if hasattr(optax, "partition") else optax.multi_transform
    got, state = train(make({"head": tx, "rest": rest}, labels), params)
    head, alone = train(tx, {"head": params["head"]})
    others, _ = train(rest, {key: part for key, part in params.items() if key != "head"})
    close(got, head | others, STEPS)
    close(tx.step_sizes(state), tx.step_sizes(alone), STEPS)


def test_one_group_each_is_one_block_each() -> None:
    params, blocks = start(), {"head": "head.*", "rest": "*"}
    got, _ = train(optax.partition({"head": ours(), "rest": ours()}, labels), params)
    want, _ = train(ours(blocks=blocks), params)
    close(got, want, STEPS)


@pytest.mark.parametrize("name", ["tensor", "weight", "discounts by weight"])
def test_masked_parameters_are_not_its_own(name: str) -> None:
    params, tx = start(), ours(name)
    mask = jax.tree.map(lambda label: label == "head", labels(params))
    got, state = train(optax.masked(tx, mask), params)
    head, _ = train(tx, {"head": params["head"]})
    close(got["head"], head["head"], STEPS)
    assert set(tx.step_sizes(state)) == {"head.bias", "head.kernel"}


# --- accumulation, skipped steps


@pytest.mark.parametrize("name", ["scalar", "weight", "discounts"])
def test_accumulated_gradients_are_one_gradient(name: str) -> None:
    params, tx = start(), ours(name)
    steps = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    got, state = train(steps, params, 2 * STEPS)
    want, inner = train(tx, params)
    close(got, want, STEPS)
    close(tx.step_sizes(state), tx.step_sizes(inner), STEPS)


def test_what_is_not_finite_is_skipped_whole() -> None:
    params, tx = start(), ours()
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=3)
    update = jax.jit(guarded.update)
    state = guarded.init(params)
    grads = jax.grad(loss)(params)
    _, state = update(grads, state, params)
    before = tx.core_state(state, params)
    broken = grads | {"scale": jnp.asarray(jnp.nan)}
    updates, state = update(broken, state, params)
    assert all(float(jnp.abs(u).sum()) == 0.0 for u in jax.tree.leaves(updates))
    close(values_of(tx.core_state(state, params)), values_of(before), 1)
    assert int(state.total_notfinite) == 1


# --- hyperparameters


def test_injected_hyperparameters_are_the_options() -> None:
    params, options = start(), options_of("tensor") | {"meta_lr": 0.01, "discount": 0.9}
    plain = metaopt_jax.metaoptimize(**options, lr=0.5)
    injected = optax.inject_hyperparams(metaopt_jax.metaoptimize)(**options, lr=0.5)
    want, state = train(plain, params)
    got, wrapped = train(injected, params)
    close(got, want, STEPS)
    close(plain.step_sizes(wrapped), plain.step_sizes(state), STEPS)
    assert set(wrapped.hyperparams) == {"step_size", "meta_lr", "discount", "lr"}


def test_injected_hyperparameters_can_be_set_and_scheduled() -> None:
    """Without compiling again: they are arrays of the state."""
    params = {"w": jnp.ones(3)}
    make = optax.inject_hyperparams(metaopt_jax.metaoptimize)
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    tx = make(base=mo.SGD(), meta=mo.SGD(), step_size=0.1, meta_lr=0.0, lr=schedule)
    update, state = jax.jit(tx.update), tx.init(params)
    taken = []
    for meta_lr in (0.0, 0.0, 10.0):
        state.hyperparams["meta_lr"] = jnp.asarray(meta_lr, "float32")
        updates, state = update({"w": jnp.ones(3)}, state, params)
        params = optax.apply_updates(params, updates)
        taken.append(float(updates["w"][0]))
    assert update._cache_size() == 1
    assert taken == pytest.approx([-0.1, -0.05, -0.05], rel=rounding("float32", operations=4))
    assert float(optax.tree.get(state, "learned_step_sizes")[0]) > 0.11


def test_hyperparameters_in_half_precision_are_refused_or_wider() -> None:
    params = {"w": jnp.ones(3, "bfloat16")}
    options = {"base": mo.SGD(), "meta": mo.SGD(), "discount": 0.999}
    make = optax.inject_hyperparams(metaopt_jax.metaoptimize)
    with pytest.raises(TypeError, match="`discount` must be float32 or wider; got bfloat16"):
        make(**options).init(params)
    wide = optax.inject_hyperparams(metaopt_jax.metaoptimize, hyperparam_dtype=jnp.float32)
    state = wide(**options).init(params)
    assert state.hyperparams["discount"].dtype == "float32"
    updates, _ = wide(**options).update(params, state, params)
    assert updates["w"].dtype == "bfloat16"


def shapes_of_params(tx: Any, state: Any, params: Any) -> Any:
    """Return a state with shapes in the parts that are like the parameters, None elsewhere."""
    return optax.tree.map_params(
        tx,
        lambda _, leaf: leaf.shape,
        state,
        params,
        transform_non_params=lambda _: None,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),  # what a rule has no slot for
    )


@pytest.mark.parametrize("name", ["discounts", "discounts by weight", "exact discounts"])
def test_each_discount_has_parts_like_the_parameters(name: str) -> None:
    tx, params = ours(name), start()
    state = tx.init(params)
    marked = shapes_of_params(tx, state, params)
    shapes, several = jax.tree.map(jnp.shape, params), len(tx.opt.discount)
    assert marked.trace_or_average == (shapes,) * several
    own = (shapes,) * several if name == "discounts by weight" else None
    assert marked.meta_grad == marked.meta_slots["decided"] == own
    assert state.beta.shape if own is None else marked.beta == shapes


@pytest.mark.parametrize("name", ["scalar", "weight", "rules", "exact", "full", "diagonal"])
def test_parts_like_the_parameters_are_found(name: str) -> None:
    """By `optax.tree.map_params`, which is how partition specs of a state are made."""
    tx, params = ours(name), start()
    state = tx.init(params)
    marked = shapes_of_params(tx, state, params)
    shapes = jax.tree.map(jnp.shape, params)
    assert marked.trace_or_average == shapes
    assert marked.count is marked.restarts is None
    assert (marked.beta == shapes) == (name == "weight")


# --- averaged weights


WRAPPED: dict[str, Any] = {
    "itself": lambda tx, _: tx,
    "chain": lambda tx, _: optax.chain(optax.clip_by_global_norm(1e9), optax.chain(tx)),
    "masked": lambda tx, mask: optax.masked(tx, mask),
    "partition": lambda tx, _: optax.partition({"head": tx, "rest": optax.sgd(0.1)}, labels),
    "accumulated": lambda tx, _: optax.MultiSteps(tx, 1).gradient_transformation(),
    "guarded": lambda tx, _: optax.apply_if_finite(tx, 5),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_averages_are_found_within_others(wrapper: str) -> None:
    """They are those of the core, and weights that are not its own stay as they are."""
    params, tx = start(), ours("discounts")
    mask = jax.tree.map(lambda label: label == "head", labels(params))
    own = {"head": params["head"]} if wrapper in ("masked", "partition") else params
    params, state = train(WRAPPED[wrapper](tx, mask), params)
    own, alone = train(tx, own)
    want = tx.opt.averaged_params(tx.core_state(alone, own), tx.named(own))
    for averaged in (tx.averaged_params, jax.jit(tx.averaged_params)):
        found = averaged(state, params)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        got, last = tx.named(found), tx.named(params)
        close({name: got[name] for name in want}, dict(want), STEPS)
        assert relative_error(got["head.kernel"], last["head.kernel"]) > 1e-4
        for name in set(got) - set(want):
            np.testing.assert_array_equal(got[name], last[name])


def test_a_rule_may_keep_averages_of_its_own() -> None:
    """Also where there is no discount below 1; the updates are those of the rule within."""
    runs = []
    for base in (mo.AdamW(), mo.Averaged(mo.AdamW())):
        tx = metaopt_jax.metaoptimize(base=base, step_size=0.05, discount=1.0)
        runs.append(train(tx, start()))
    (params, _), (same, state) = runs
    for name, array in tx.named(params).items():
        np.testing.assert_array_equal(array, tx.named(same)[name])
    want = tx.opt.averaged_params(tx.core_state(state, same), tx.named(same))
    close(tx.named(jax.jit(tx.averaged_params)(state, same)), dict(want), STEPS)
    assert relative_error(want["head.kernel"], tx.named(same)["head.kernel"]) > 1e-4


def test_averages_of_half_precision_have_it() -> None:
    params = {"w": jnp.linspace(0.5, 2.0, 4, dtype="bfloat16")}
    tx = ours("discounts")
    _, state = tx.update(params, tx.init(params), params)
    assert tx.averaged_params(state, params)["w"].dtype == "bfloat16"


def test_averages_of_others_parameters_are_refused() -> None:
    tx, params = ours("discounts"), start()
    with pytest.raises(ValueError, match="must be a pytree like `params`"):
        tx.averaged_params(tx.init(params), params["layers"])
    with pytest.raises(ValueError, match="need a `discount` below 1"):
        ours().averaged_params(ours().init(params), params)


@pytest.mark.parametrize("discount", [jnp.float32(0.9), jnp.asarray(0.9, "bfloat16")])
def test_several_discounts_may_be_arrays(discount: Any) -> None:
    """As while JAX traces them, to take many at once."""
    params = start()
    if discount.dtype == "bfloat16":
        with pytest.raises(TypeError, match="`discount` must be float32 or wider; got bfloat16"):
            ours("discounts", discount=(discount, 1.0))
        return

    def trained(least: Any) -> Any:
        tx = ours("discounts", discount=(least, 1.0))
        found, state = params, tx.init(params)
        for _ in range(STEPS):
            found, state = update(tx, found, state)
        return found, tx.averaged_params(state, found)

    many = jax.jit(jax.vmap(trained))(jnp.asarray([0.5, 0.9]))
    close(jax.tree.map(lambda leaf: leaf[1], many), trained(0.9), STEPS)


# --- dtypes


@pytest.mark.parametrize("name", ["scalar", "weight", "exact"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_state_is_wider_than_the_parameters(name: str, dtype: str) -> None:
    tx, params = ours(name), start(dtype)
    state = tx.init(params)
    floating = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.dtype != "int32"}
    assert floating == {jnp.dtype("float32")}
    given = {"value_fn": loss}
    updates, after = jax.jit(lambda g, s, p: tx.update(g, s, p, **given))(
        jax.grad(loss)(params), state, params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_double_precision_is_kept() -> None:
    with jax.enable_x64(True):
        tx, params = ours("tensor"), start("float64")
        params, state = train(tx, params)
        kinds = {leaf.dtype for leaf in jax.tree.leaves((params, state))}
        assert kinds == {jnp.dtype("float64"), jnp.dtype("int32")}


def test_dtypes_may_differ_among_parameters() -> None:
    params = {"a": jnp.ones(3, "bfloat16"), "b": jnp.ones(2)}
    tx = ours()
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.map(lambda leaf: leaf.dtype, updates) == {
        "a": jnp.dtype("bfloat16"),
        "b": jnp.dtype("float32"),
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trace_or_average)} == {
        jnp.dtype("float32")
    }
