"""metaopt_jax: the transformation equals the core, and is what JAX's transformations ask for."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from metaopt_conformance.translate import values_of

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import metaopt_jax  # noqa: E402
from metaopt_conformance.table import BASES, METAS, signs  # noqa: E402
from metaopt_conformance.tolerances import relative_error, rounding  # noqa: E402

import metaopt as mo  # noqa: E402
from tests.jax_problem import (  # noqa: E402
    CONFIGURATIONS,
    NAMES,
    by_name,
    close,
    diagonal,
    loss,
    options_of,
    start,
    update,
)

jnp = jax.numpy

STEPS = 6
#: Of which the others are variants as far as JAX's transformations are concerned.
KINDS = ["scalar", "weight", "skip", "exact", "discounts"]


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    """Float32 whatever other tests have asked of JAX."""
    with jax.enable_x64(False):
        yield


# --- it is the core


def equals_the_core(tx: Any, params: Any, state: Any) -> None:
    """Assert that a run of `STEPS` updates has come where one of the core on NumPy arrays does."""
    leaves = OrderedDict((name, np.asarray(leaf)) for name, leaf in by_name(start()).items())
    assert list(leaves) == NAMES
    core = tx.opt.init(leaves)
    for _ in range(STEPS):
        curved = {name: np.cosh(leaf - 1.0) for name, leaf in leaves.items()}
        slopes = {name: np.sinh(leaf - 1.0) for name, leaf in leaves.items()}
        leaves, core = tx.opt.step(
            leaves,
            slopes,
            core,
            hvp=lambda v, curved=curved: {name: curved[name] * v[name] for name in v},
            third=lambda u, v, slopes=slopes: {
                name: slopes[name] * (u[name][:, None, ...] * v[name][None, ...]) for name in u
            },
            hessian_diagonal=curved,
        )
    close(by_name(params), leaves, STEPS)
    close(values_of(tx.core_state(state, params)), values_of(core), STEPS)
    close(tx.step_sizes(state), tx.opt.step_sizes(core), STEPS)
    close(tx.diagnostics(state, params), tx.opt.diagnostics(core, leaves), STEPS)
    sizes = [size for size in tx.opt.step_sizes(core).values() if size.size]
    assert max(float(abs(np.log(size) - np.log(1e-2)).max()) for size in sizes) > 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_one_operation_at_a_time_it_takes_the_steps_of_the_core(name: str) -> None:
    tx, params = metaopt_jax.metaoptimize(**options_of(name)), start()
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = update(tx, params, state)
    equals_the_core(tx, params, state)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_compiled_it_takes_the_steps_of_the_core(name: str) -> None:
    """In one program, in the memory of what goes in, whose structure and types stay."""
    tx, traces = metaopt_jax.metaoptimize(**options_of(name)), []

    def step(params: Any, state: Any) -> Any:
        traces.append(name)
        return update(tx, params, state, unheard_of=1)

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = start()
    first = state = jax.jit(tx.init)(params)
    types = jax.tree.map(jax.typeof, (params, state))
    for _ in range(STEPS):
        params, state = compiled(params, state)
        assert jax.tree.map(jax.typeof, (params, state)) == types
    assert len(traces) == 1
    assert compiled._cache_size() == 1
    # given up whole, but for what no update reads
    read = first._replace(learned_step_sizes=None, meta_grad=None)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(read) if leaf.size)
    equals_the_core(tx, params, state)


def test_a_preset_is_wrapped_as_it_is() -> None:
    opt = mo.presets.idbd_nonlinear(step_size=0.01, meta_lr=0.01)
    tx = metaopt_jax.from_config(opt)
    assert tx.opt is opt
    params = {"w": jnp.ones(3)}
    params, state = update(tx, params, tx.init(params))
    assert set(tx.step_sizes(state)) == {"w"}


def test_updates_are_not_differences_of_parameters() -> None:
    """Of parameters so large that a step is lost in them, the step is still what it should be."""
    tx = metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), step_size=1e-3, discount=1.0)
    params = {"w": jnp.asarray([1e8])}
    updates, _ = tx.update({"w": jnp.asarray([1.0])}, tx.init(params), params)
    assert relative_error(updates["w"], [-1e-3]) < rounding("float32", operations=2)


@pytest.mark.parametrize("lr", ["array", "schedule", "by name", "schedule by name"])
def test_lr_multiplies_the_learned_step_sizes(lr: str) -> None:
    values = [0.5, 0.0, 0.25]
    table = jnp.asarray(values)
    each = {leaf: 0.1 * (index + 1) for index, leaf in enumerate(NAMES)}
    given: dict[str, tuple[Any, Any]] = {
        "array": (jnp.asarray(0.5, "float16"), lambda _: 0.5),
        "schedule": (lambda count: table[count], lambda t: values[t]),
        "by name": (each, lambda _: each),
        "schedule by name": (
            lambda count: {leaf: table[count] * factor for leaf, factor in each.items()},
            lambda t: {leaf: values[t] * factor for leaf, factor in each.items()},
        ),
    }
    ours, expected = given[lr]
    options = options_of("tensor")
    tx, opt = metaopt_jax.metaoptimize(**options, lr=ours), mo.MetaOptimize(**options)
    params, leaves = start(), by_name(start())
    state, core = tx.init(params), opt.init(leaves)
    step = jax.jit(lambda params, state: update(tx, params, state))
    for t in range(3):
        grads = by_name(jax.grad(loss)(params))
        leaves, core = opt.step(leaves, grads, core, lr=expected(t))
        params, state = step(params, state)
    close(by_name(params), leaves, STEPS)
    close(values_of(tx.core_state(state, params)), values_of(core), STEPS)


# --- what transformations of functions ask for


@pytest.mark.parametrize("name", [*KINDS, "identity"])
def test_no_memory_is_shared(name: str) -> None:
    """An array donated twice would be an error, one donated with the parameters a wrong result."""
    tx, params = metaopt_jax.metaoptimize(**options_of(name)), start()
    first = tx.init(params)
    for run in ((params, first), (params, jax.jit(tx.init)(params)), update(tx, params, first)):
        leaves = [leaf for leaf in jax.tree.leaves(run) if leaf.size]
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize("name", KINDS)
def test_scan_and_cond(name: str) -> None:
    tx, params = metaopt_jax.metaoptimize(**options_of(name)), start()

    def body(carry: Any, take: Any) -> Any:
        params, state = carry
        return jax.lax.cond(take, lambda: update(tx, params, state), lambda: carry), None

    takes = jnp.asarray([True, False, True, True])
    (got, _), _ = jax.lax.scan(body, (params, tx.init(params)), takes)
    state = tx.init(params)
    for _ in range(3):
        params, state = update(tx, params, state)
    close(got, params, STEPS)


@pytest.mark.parametrize("name", KINDS)
def test_vmap_trains_each_member_by_itself(name: str) -> None:
    tx = metaopt_jax.metaoptimize(**options_of(name))
    members = [jax.tree.map(lambda leaf, f=factor: f * leaf, start()) for factor in (1.0, -0.5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    def train(params: Any) -> Any:
        state = tx.init(params)
        for _ in range(3):
            params, state = update(tx, params, state)
        return params, state

    together = jax.jit(jax.vmap(train))(stacked)
    for index, member in enumerate(members):
        close(jax.tree.map(lambda leaf, i=index: leaf[i], together), train(member), STEPS)


def test_hyperparameters_are_swept_by_vmap() -> None:
    def train(step_size: Any, meta_lr: Any) -> Any:
        options = options_of("scalar") | {"step_size": step_size, "meta_lr": meta_lr}
        tx, params = metaopt_jax.metaoptimize(**options), start()
        state = tx.init(params)
        for _ in range(3):
            params, state = update(tx, params, state)
        return params

    sizes, rates = jnp.asarray([1e-3, 1e-2]), jnp.asarray([0.1, 1e-2])
    swept = jax.jit(jax.vmap(train))(sizes, rates)
    for index in (0, 1):
        want = train(float(sizes[index]), float(rates[index]))
        close(jax.tree.map(lambda leaf, i=index: leaf[i], swept), want, STEPS)


BY = ("step_size", "start")


@pytest.mark.parametrize(
    ("base", "meta", "by"),
    [
        *((base, "Adam", by) for base, rule in BASES.items() if not signs(rule) for by in BY),
        *(("SGDm", meta, by) for meta in METAS if meta != "Adam" for by in BY),
    ],
)
def test_it_can_be_differentiated(base: str, meta: str, by: str) -> None:
    """Through the ordered form too: how the loss after training depends on where it began."""

    def after(given: Any) -> Any:
        size, first = (given, 2.0) if by == "step_size" else (1e-2, given)
        tx = metaopt_jax.metaoptimize(
            base=BASES[base], meta=METAS[meta], step_size=size, meta_lr=1e-2, discount=1.0
        )
        params = {"w": jnp.ones(3) * first}
        state = tx.init(params)
        for _ in range(3):
            params, state = update(tx, params, state)
        return loss(params)

    at, h = (jnp.asarray(1e-2), 1e-3) if by == "step_size" else (jnp.asarray(2.0), 1e-2)
    slope = (after(at + h) - after(at - h)) / (2 * h)
    assert relative_error(jax.jit(jax.grad(after))(at), slope) < 1e-2


# --- files of the core


@pytest.mark.parametrize("name", ["named", "weight", "rules", "exact"])
def test_a_run_goes_on_from_a_file_of_the_core(name: str, tmp_path: Path) -> None:
    tx, params = metaopt_jax.metaoptimize(**options_of(name)), start()
    step = jax.jit(lambda params, state: update(tx, params, state))
    params, state = step(params, tx.init(params))
    mo.save(tmp_path / "run.safetensors", tx.opt, tx.core_state(state, params))
    opt, core = mo.load(tmp_path / "run.safetensors", tx.named(params))
    again = metaopt_jax.from_config(opt).from_core_state(core, params)
    assert jax.tree.map(jax.typeof, again) == jax.tree.map(jax.typeof, state)
    pairs = zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True)
    assert all(np.asarray(one).tobytes() == np.asarray(other).tobytes() for one, other in pairs)


# --- pytrees


class Layer(NamedTuple):
    """Parameters under attributes."""

    weight: Any
    bias: Any = None


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (1.0, [""]),
        ([1.0, (2.0,)], ["0", "1.0"]),
        ({"b": 1.0, "a": {1: 2.0}}, ["a.1", "b"]),
        (OrderedDict(b=1.0, a=2.0), ["b", "a"]),
        ({"layer": Layer(1.0)}, ["layer.weight"]),
    ],
)
def test_names_are_key_paths(params: Any, names: list[str]) -> None:
    tx = metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), blocks="tensor", discount=1.0)
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    assert list(tx.step_sizes(state)) == names
    updates, _ = tx.update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("name", [*KINDS, "full", "diagonal"])
def test_one_array_is_a_pytree(name: str) -> None:
    tx, params = metaopt_jax.metaoptimize(**options_of(name)), jnp.ones((2, 3))
    state = tx.init(params)
    new, after = update(tx, *update(tx, params, state))
    assert new.shape == (2, 3)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_numpy_arrays_are_parameters_too() -> None:
    tx = metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), discount=1.0)
    params = {"w": np.ones(3, "float32")}
    updates, state = tx.update(params, tx.init(params), params)
    assert isinstance(updates["w"], jax.Array)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", [*KINDS, "rules"])
def test_a_leaf_without_gradient_rests(name: str) -> None:
    tx, params = metaopt_jax.metaoptimize(**options_of(name)), start()
    _, state = update(tx, params, tx.init(params))
    grads = jax.grad(loss)(params) | {"scale": None}
    given = {"value_fn": loss, "hessian_diagonal": diagonal(params)}
    updates, after = tx.update(grads, state, params, **given)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert float(updates["scale"]) == 0.0
    assert float(jnp.abs(updates["head"]["kernel"]).max()) > 0.0
    assert after.leaf_counts.tolist() == [2, 2, 2, 2, 1]
    for slot, tree in after.slots.items():
        assert tree["scale"] == state.slots[slot]["scale"]


@pytest.mark.parametrize("name", ["scalar", "weight", "exact", "rules"])
def test_parameters_without_a_leaf(name: str) -> None:
    options = options_of(name)
    tx = metaopt_jax.metaoptimize(**options)
    params: Any = {"a": None, "b": ()}
    state = tx.init(params)
    updates, after = jax.jit(tx.update, donate_argnums=1)(params, state, params)
    assert updates == params
    assert int(after.count) == 1
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert tx.step_sizes(after) == tx.diagnostics(after, params) == {}
    assert all(leaf.size for leaf in jax.tree.leaves(after))  # else orbax does not save it


@pytest.mark.parametrize("name", [*KINDS, "rules"])
def test_shapes_and_dtypes_are_enough_for_init(name: str) -> None:
    tx, params = metaopt_jax.metaoptimize(**options_of(name)), start()
    abstract = jax.eval_shape(lambda: params)
    close(tx.init(abstract), tx.init(params), STEPS)
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(tx.init(params))


# --- errors


def test_bad_calls_are_refused() -> None:
    tx = metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), blocks="tensor", discount=1.0)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"`params` must be passed to `update`.*got None"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="`updates` must be a pytree like `params`"):
        tx.update({"v": params["w"]}, state, params)
    with pytest.raises(ValueError, match="`state` must be a pytree like `params`"):
        tx.update({"v": params["w"]}, state, {"v": params["w"]})
    with pytest.raises(ValueError, match=r"`grads\['w'\]` has shape \(2,\); expected \(3,\)"):
        tx.update({"w": jnp.ones(2)}, state, params)
    with pytest.raises(TypeError, match=r"`params\['w'\]` must be real and floating"):
        tx.init({"w": jnp.arange(3)})
    with pytest.raises(ValueError, match=r"2 leaves of the name 'a.b'"):
        tx.init({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
    with pytest.raises(ValueError, match="must hold one state of MetaOptimize; found 0"):
        tx.step_sizes((optax.EmptyState(),))
    with pytest.raises(ValueError, match="must hold one state of MetaOptimize; found 2"):
        tx.step_sizes((state, state))


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (-1.0, "`lr` must be a finite number and at least 0; got -1"),
        (np.nan, "`lr` must be a finite number and at least 0; got nan"),
        ("fast", r"`lr` must be a number or an array of shape \(\); got 'fast'"),
        ({"a": optax.constant_schedule(1.0), "b": -1.0}, r"`lr\['b'\]` must be a finite number"),
    ],
)
def test_a_bad_multiplier_is_told_at_once(lr: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), lr=lr, discount=1.0)


def test_the_configuration_is_the_cores() -> None:
    with pytest.raises(ValueError, match="`meta_lr` must be a finite number"):
        metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), meta_lr=-1.0, discount=1.0)
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), meta_lr=0.5, discount=1.0)
    tx = metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), meta_lr=0.5, discount=1.0)
    assert tx.opt == opt != replace(opt, meta_lr=0.1)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx
    assert (init, update) == (tx.init, tx.update)


@pytest.mark.parametrize(
    ("lr", "blocks"),
    [
        (0.5, "node"),
        (optax.linear_schedule(0.25, 1.0, 6), {"w": "w", "b": "b"}),
        ({"w": 0.5, "b": optax.linear_schedule(0.25, 1.0, 6)}, "node"),
        (lambda count: {"w": 1.0 / (2.0 + count), "b": 0.5}, "scalar"),
    ],
    ids=["number", "schedule", "mapping", "schedule of mappings"],
)
def test_the_effective_lr_is_what_the_next_update_takes(lr: Any, blocks: Any) -> None:
    """SGD steps by it times the gradient."""
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    tx = metaopt_jax.metaoptimize(
        base=mo.SGD(), blocks=blocks, lr=lr, step_size=1e-2, meta_lr=0.1, discount=1.0
    )
    chained = optax.chain(optax.identity(), tx)
    state = chained.init(params)
    grads = jax.tree.map(lambda w: jnp.arange(1.0, 1.0 + w.size).reshape(w.shape), params)
    for _ in range(2):
        found = tx.effective_lr(state)
        steps, state = chained.update(grads, state, params)
        params = optax.apply_updates(params, steps)
    for name, step in steps.items():  # against what was found before the last one
        size = found[name]  # of units or of the whole leaf
        size = size.reshape(size.shape + (1,) * (step.ndim - size.ndim))
        np.testing.assert_allclose(step, -size * grads[name], rtol=2e-6)


def test_the_effective_lr_of_no_leaf_and_of_a_wrapper() -> None:
    tx = metaopt_jax.metaoptimize(lr={})
    assert tx.effective_lr(tx.init({})) == {}
    wrapped = metaopt_jax.wrap(optax.sgd(1.0), lr=0.5, step_size=0.5)
    found = wrapped.effective_lr(wrapped.init({"w": jnp.ones(2)}))
    assert {name: float(lr) for name, lr in found.items()} == {"all": 0.25}
    descending = metaopt_jax.metaoptimize(lr=lambda count: 0.5 - 0.6 * count, step_size=0.5)
    params = {"w": jnp.ones(2)}
    _, state = descending.update(params, descending.init(params), params)
    assert float(descending.effective_lr(state)["all"]) == 0.0  # as in a step
