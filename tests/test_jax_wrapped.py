"""Transformations of optax, wrapped: equal to the core's rules, or to the method written out."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

from metaopt_conformance.table import FORMS, counterpart  # noqa: E402
from metaopt_conformance.tolerances import relative_error  # noqa: E402
from metaopt_jax import metaoptimize, wrap  # noqa: E402

import metaopt as mo  # noqa: E402

jnp = jax.numpy

#: Of 200 steps in float64, whose errors training does not magnify on this problem.
ROUNDING = 2e-13
META: dict[str, Any] = {"meta": mo.AdamW(), "meta_lr": 1e-2, "step_size": 1e-3, "discount": 1.0}


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def start(dtype: str = "float64") -> Any:
    rng = np.random.default_rng(0)
    shapes = {"first": {"kernel": (4, 3), "bias": (3,)}, "last": {"kernel": (3, 2)}, "scale": ()}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def gradients(params: Any, t: Any) -> Any:
    """Return those of quadratics whose minima move."""
    return jax.tree.map(lambda w: 0.3 * w - jnp.sin(0.1 * t + w), params)


def trained(tx: Any, steps: int, **extra: Any) -> tuple[Any, Any]:
    params = start()
    state = tx.init(params)

    @jax.jit  # type: ignore[untyped-decorator]
    def step(params: Any, state: Any, t: Any) -> Any:
        updates, state = tx.update(gradients(params, t), state, params, **extra)
        return optax.apply_updates(params, updates), state

    for t in range(steps):
        params, state = step(params, state, float(t))
    return params, state


def error(one: Any, other: Any) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(relative_error(np.asarray(x), np.asarray(y)) for x, y in pairs)


# --- equal to the core's own rules

OWN = [
    (rule, found)
    for rule in (
        *FORMS,
        mo.AdamW(betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1),
        mo.NAdamW(betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1),
        mo.Lion(weight_decay=0.1),
    )
    if (found := counterpart("optax", rule)) is not None
]
ADAMW = mo.AdamW(eps=1e-3, weight_decay=0.1)


def adamw(lr: Any = 1.0) -> Any:
    return optax.adamw(lr, eps=1e-3, weight_decay=0.1)


def differ(rule: Any, tx: Any, steps: int = 200, **options: Any) -> float:
    """Return how far a wrapped transformation leads from the same rule of the core."""
    options = META | options
    decay = options.pop("weight_decay", rule.weight_decay)
    wrapped, own = wrap(tx, weight_decay=decay, **options), metaoptimize(base=rule, **options)
    params, state = trained(wrapped, steps)
    own_params, own_state = trained(own, steps)
    sizes, own_sizes = wrapped.step_sizes(state), own.step_sizes(own_state)
    assert sizes.keys() == own_sizes.keys()
    return max(error(params, own_params), error(dict(sizes), dict(own_sizes)))


@pytest.mark.parametrize(("rule", "found"), OWN, ids=lambda value: repr(value)[:70])
def test_a_wrapped_transformation_is_the_rule_of_the_core(rule: Any, found: Any) -> None:
    name, options = found
    assert differ(rule, getattr(optax, name)(1.0, **options)) < ROUNDING


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": "tensor"},
        {"blocks": mo.blocks.node(-1)},
        {"blocks": "weight"},
        {"blocks": {"kernels": "*kernel", "rest": "*"}},
        {"meta": mo.Lion()},
        {"meta": mo.RMSprop()},
        {"meta": mo.FastStart(mo.AdamW())},
        {"meta": mo.SGD(), "meta_lr": 1e-4},
        {"discount": 0.9},
        {"discount": (0.9, 1.0)},
        {"discount": (0.9, 0.99, 1.0), "blocks": "tensor"},
        {"discount": (0.9, 1.0), "blocks": mo.blocks.node(-1)},
        {"discount": (0.9, 1.0), "blocks": "weight"},
        {"discount": (0.9, 1.0), "meta_first": True},
        {"meta_first": True},
        {"skip_nonfinite": True},
        {"sigma": "softplus"},
        {"bounds": (5e-4, 2e-3)},
        {"lr": optax.cosine_decay_schedule(1.0, 60)},
        {"weight_decay": {"*kernel": 0.1, "*": 0.1}},
    ],
    ids=lambda value: str(value)[:60],
)
def test_it_is_with_every_option(options: Any) -> None:
    assert differ(ADAMW, adamw(), 60, **options) < ROUNDING


# --- others, against the method written out

OTHERS: dict[str, tuple[Callable[[], Any], float]] = {
    "muon": (lambda: optax.contrib.muon(1.0), 0.0),
    "muon with decay": (
        lambda: optax.contrib.muon(1.0, weight_decay=0.1, adam_weight_decay=0.1),
        0.1,
    ),
    "adafactor": (lambda: optax.adafactor(1.0), 0.0),
    "ademamix": (lambda: optax.contrib.ademamix(1.0), 0.0),
    "radam": (lambda: optax.radam(1.0), 0.0),
    "adan": (lambda: optax.adan(1.0), 0.0),
    "lamb": (lambda: optax.lamb(1.0, weight_decay=0.1), 0.0),
    "yogi": (lambda: optax.yogi(1.0), 0.0),
    "amsgrad": (lambda: optax.amsgrad(1.0), 0.0),
    "novograd": (lambda: optax.novograd(1.0), 0.0),
    "adabelief": (lambda: optax.adabelief(1.0), 0.0),
    "nesterov": (lambda: optax.sgd(1.0, momentum=0.9, nesterov=True), 0.0),
}


def written_out(tx: Any, steps: int, decay: float, discount: float) -> tuple[Any, float]:
    """Train by the method as docs/mathematics.md section 10 has it; return the step size too."""
    params = average = start()
    state, update = tx.init(params), jax.jit(tx.update)
    beta, m, v = np.log(1e-3), 0.0, 0.0
    for t in range(steps):
        grads, alpha = gradients(params, float(t)), float(np.exp(beta))
        trace = jax.tree.map(jnp.subtract, params, average)
        z = float(sum(jax.tree.leaves(jax.tree.map(lambda h, g: (h * g).sum(), trace, grads))))
        share = 1 - discount * (1 - decay * alpha)
        average = jax.tree.map(lambda a, h, s=share: a + s * h, average, trace)
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda w, u, a=alpha: w + a * u, params, updates)
        m, v = 0.9 * m + 0.1 * z, 0.999 * v + 0.001 * z * z
        if z != 0.0:
            beta -= 0.01 * (m / (1 - 0.9 ** (t + 1))) / np.sqrt(v / (1 - 0.999 ** (t + 1)))
    return params, float(np.exp(beta))


@pytest.mark.parametrize("discount", [1.0, 0.99])
@pytest.mark.parametrize("name", OTHERS)
def test_it_is_the_method_written_out(name: str, discount: float) -> None:
    make, decay = OTHERS[name]
    tx = wrap(make(), weight_decay=decay, **(META | {"discount": discount}))
    params, state = trained(tx, 60)
    other, size = written_out(make(), 60, decay, discount)
    assert relative_error(float(tx.step_sizes(state)["all"]), size) < 1e-11
    assert error(params, other) < 1e-11


# --- at home in optax


def test_it_goes_around_a_chain_and_into_one() -> None:
    clipped = optax.chain(optax.clip_by_global_norm(1e6), adamw())
    tx = optax.chain(optax.clip_by_global_norm(1e6), wrap(clipped, weight_decay=0.1, **META))
    params, _ = trained(tx, 20)
    assert error(params, trained(metaoptimize(base=ADAMW, **META), 20)[0]) < ROUNDING


def test_several_by_partition_share_a_step_size_or_have_their_own() -> None:
    labels = {"first": {"kernel": "muon", "bias": "adam"}, "last": {"kernel": "muon"}}
    pair = {"muon": optax.contrib.muon(1.0), "adam": optax.adam(1.0)}
    both = optax.partition(pair, labels | {"scale": "adam"})
    for blocks in ("scalar", {"matrices": "*kernel", "others": "*"}):
        tx = wrap(both, **(META | {"blocks": blocks, "meta": mo.FastStart(mo.AdamW())}))
        _, state = trained(tx, 100)
        assert all(float(size) > 2e-3 for size in tx.step_sizes(state).values())


def test_it_goes_into_masks_and_multi_steps() -> None:
    mask = {"first": {"kernel": True, "bias": False}, "last": {"kernel": True}, "scale": False}
    tx = optax.chain(
        optax.masked(wrap(adamw(), **META), mask),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda on: not on, mask)),
    )
    params, _ = trained(tx, 5)
    assert bool(jnp.all(params["first"]["bias"] == start()["first"]["bias"]))
    assert bool(jnp.any(params["first"]["kernel"] != start()["first"]["kernel"]))
    many = optax.MultiSteps(wrap(adamw(), **META), every_k_schedule=2).gradient_transformation()
    _, state = trained(many, 6)
    assert int(state.inner_opt_state.meta.count) == 3


def test_hyperparameters_that_are_injected_stay_the_users() -> None:
    injected = optax.inject_hyperparams(optax.adamw)(
        learning_rate=1.0, eps=1e-3, weight_decay=0.1, b1=0.9
    )
    tx = wrap(injected, weight_decay=0.1, **META)
    params, state = trained(tx, 10)
    assert error(params, trained(metaoptimize(base=ADAMW, **META), 10)[0]) < ROUNDING
    optax.tree.set(state, b1=jnp.asarray(0.5))
    assert float(optax.tree.get(state, "weight_decay")) == pytest.approx(0.1)


def test_keywords_pass_through() -> None:
    plateau = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    _, state = trained(wrap(plateau, **META), 8, value=1.0)
    assert float(state.inner[1].scale) < 1.0


def test_skip_nonfinite_leaves_the_wrapped_alone() -> None:
    tx = wrap(adamw(), skip_nonfinite=True, **META)
    params, state = trained(tx, 3)
    grads = gradients(params, 3.0) | {"scale": jnp.asarray(jnp.nan)}
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert all(not bool(jnp.any(update)) for update in jax.tree.leaves(updates))
    for one, other in zip(jax.tree.leaves(after.inner), jax.tree.leaves(state.inner), strict=True):
        assert bool(jnp.all(one == other))
    assert int(after.meta.skipped) == 1


def test_the_structure_of_the_state_never_changes_and_scan_takes_it() -> None:
    tx = wrap(optax.contrib.muon(1.0), **META)
    params = start("float32")
    state = tx.init(params)

    def step(carry: Any, t: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradients(params, t), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, after), _ = jax.lax.scan(step, (params, state), jnp.arange(5, dtype="float32"))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [
        leaf.dtype for leaf in jax.tree.leaves(state)
    ]


def test_narrow_weights_keep_their_average_in_float32() -> None:
    tx = wrap(optax.adam(1.0), **META)
    params = start("bfloat16")
    state = tx.init(params)
    assert state.meta.trace_or_average["scale"].dtype == jnp.float32
    updates, state = tx.update(params, state, params)
    assert updates["scale"].dtype == jnp.bfloat16


def test_what_the_transformation_says_of_its_state() -> None:
    tx = wrap(adamw(), blocks="tensor", **META)
    params, state = trained(tx, 5)
    assert list(tx.step_sizes(state)) == ["first.bias", "first.kernel", "last.kernel", "scale"]
    assert set(tx.diagnostics(state, params)["trace_norm"]) == set(tx.step_sizes(state))
    core = tx.core_state(state, params)
    assert tx.from_core_state(core, params).count == 5


def test_a_gradient_that_is_missing_is_named_where_the_wrapped_needs_it() -> None:
    grads = start() | {"scale": None}
    tx = wrap(adamw(), **META)
    with pytest.raises(ValueError, match="`updates` must have a gradient of 'scale'"):
        tx.update(grads, tx.init(start()), start())
    tx = wrap(optax.sgd(1.0), **META)
    updates, state = tx.update(grads, tx.init(start()), start())
    assert not bool(jnp.any(updates["scale"]))
    assert state.meta.leaf_counts.tolist() == [1, 1, 1, 0]


NO_PATTERN: Any = {0: 0.1}


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: wrap(optax.adam, **META), TypeError, "`tx` must be an optax.Gradient"),
        (lambda: wrap(adamw(), weight_decay=-1.0, **META), ValueError, "`weight_decay`"),
        (lambda: wrap(adamw(), weight_decay={}, **META), TypeError, "`weight_decay` must be a num"),
        (lambda: wrap(adamw(), weight_decay=NO_PATTERN), TypeError, "`weight_decay` must be a num"),
        (
            lambda: wrap(adamw(), weight_decay={"*kernel": 0.1}, **META).init(start()),
            ValueError,
            "`weight_decay` has no pattern that matches leaf 'first.bias'",
        ),
        (
            lambda: wrap(adamw(), weight_decay={"*": 0.1, "scale": 0.0}, **META).init(start()),
            ValueError,
            "`weight_decay` pattern 'scale' is the first match of no leaf",
        ),
        (
            lambda: wrap(adamw(), **META | {"discount": jnp.asarray(0.5, "bfloat16")}),
            TypeError,
            "`discount` must be float32 or wider",
        ),
        (
            lambda: wrap(wrap(adamw(), **META)),
            ValueError,
            "`tx` must have a learning rate of 1; this one learns its step sizes already",
        ),
        (
            lambda: wrap(optax.chain(metaoptimize(base=mo.SGD(), **META))).init(start()),
            ValueError,
            "a part of it learns its step sizes already",
        ),
        (
            lambda: wrap(adamw(), **META).update(start(), None, start()),
            TypeError,
            "`state` must be what `init` returned",
        ),
        (
            lambda: metaoptimize(base=mo.Opaque(), **META).update(
                start(), metaoptimize(base=mo.Opaque(), **META).init(start()), start()
            ),
            ValueError,
            "`unit_steps",
        ),
    ],
)
def test_bad_arguments_are_refused(make: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        make()
