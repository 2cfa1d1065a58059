"""metaopt_jax: the transformation equals the core, and is what JAX's transformations ask for."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from metaopt_conformance.tolerances import relative_error, rounding

import metaopt as mo

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
metaopt_jax = pytest.importorskip("metaopt_jax")

STEPS = 6
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "scalar": {},
    "tensor": {"blocks": "tensor", "meta": mo.AdamW()},
    "node": {"blocks": mo.blocks.node(-1), "base": mo.RMSprop()},
    "weight": {"blocks": "weight", "bounds": (1e-5, 1e-1), "base": mo.SGD(momentum=0.9)},
    "named": {"blocks": {"head": "head.*", "rest": "*"}},
    "rules": {"base": {"head.*": mo.Lion(), "*": mo.AdamW()}},
    "bare": {"base": mo.SGD(), "meta": mo.SGD()},
    "identity": {"sigma": "identity", "step_size": 0.01},
    "meta first": {"meta_first": True, "discount": 0.9},
    "gradient": {"trace": "gradient"},
    "delayed": {"base": mo.AdamW(delayed=True)},
    "skip": {"skip_nonfinite": True},
    "exact": {"curvature": "exact", "approximation": "2x2", "blocks": "tensor", "meta": mo.AdamW()},
    "full": {"curvature": "exact", "approximation": "full", "meta": mo.AdamW()},
    "diagonal": {"curvature": "diagonal", "approximation": "2x2", "meta": mo.SGD()},
}


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    """Float32 whatever other tests have asked of JAX."""
    with jax.enable_x64(False):
        yield


def options_of(name: str) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "base": mo.AdamW(weight_decay=0.1),
        "meta": mo.Lion(),
        "step_size": 1e-2,
    }
    return usual | CONFIGURATIONS[name]


def start() -> Any:
    """Return nested parameters with an empty, a 0-d and a missing leaf."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), "float32")

    return {
        "head": {"kernel": array(4, 3), "bias": array(3)},
        "layers": [{"kernel": array(2, 1, 2)}, None, (array(0, 2),)],
        "scale": array(),
    }


NAMES = ["head.bias", "head.kernel", "layers.0.kernel", "layers.2.0", "scale"]


def loss(params: Any) -> Any:
    return sum(jnp.sum(jnp.cosh(leaf - 1.0)) for leaf in jax.tree.leaves(params))


def diagonal(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.cosh(leaf - 1.0), params)


def update(tx: Any, params: Any, state: Any, **extra: Any) -> Any:
    """Return parameters and state after one update, by the loss above."""
    given = {"value_fn": loss, "hessian_diagonal": diagonal(params)}
    updates, state = tx.update(jax.grad(loss)(params), state, params, **(given | extra))
    return optax.apply_updates(params, updates), state


def by_name(tree: Any) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return OrderedDict(
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths
    )


def close(got: Any, want: Any, steps: int = STEPS) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) < rounding("float32", operations=60, steps=steps)


# --- it is the core


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_takes_the_steps_of_the_core(name: str, compiled: bool) -> None:
    options = options_of(name)
    tx, opt = metaopt_jax.metaoptimize(**options), mo.MetaOptimize(**options)
    params, leaves = start(), by_name(start())
    assert list(leaves) == NAMES
    state, core = tx.init(params), opt.init(leaves)
    step = jax.jit(lambda params, state: update(tx, params, state))
    for _ in range(STEPS):
        curved = by_name(diagonal(params))
        leaves, core = opt.step(
            leaves,
            {leaf: jnp.sinh(param - 1.0) for leaf, param in leaves.items()},
            core,
            hvp=lambda v, curved=curved: {leaf: curved[leaf] * v[leaf] for leaf in v},
            third=lambda u, v, leaves=leaves: {
                leaf: jnp.sinh(leaves[leaf] - 1.0) * (u[leaf][:, None, ...] * v[leaf][None, ...])
                for leaf in u
            },
            hessian_diagonal=curved,
        )
        params, state = (step if compiled else lambda *a: update(tx, *a))(params, state)
    close(by_name(params), leaves)
    close(vars(tx.core_state(state)), vars(core))
    close(tx.step_sizes(state), opt.step_sizes(core))
    close(tx.diagnostics(state), opt.diagnostics(core))
    assert any(
        float(abs(jnp.log(size) - np.log(1e-2)).max()) > 1e-4 for size in sizes_of(tx, state)
    )


def sizes_of(tx: Any, state: Any) -> list[Any]:
    return [size for size in tx.step_sizes(state).values() if size.size]


def test_a_preset_is_wrapped_as_it_is() -> None:
    opt = mo.presets.idbd_nonlinear(step_size=0.01, meta_lr=0.01)
    tx = metaopt_jax.transformation(opt)
    assert tx.opt is opt
    params = {"w": jnp.ones(3)}
    params, state = update(tx, params, tx.init(params))
    assert set(tx.step_sizes(state)) == {"w"}


def test_updates_are_not_differences_of_parameters() -> None:
    """Of parameters so large that a step is lost in them, the step is still what it should be."""
    tx = metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), step_size=1e-3)
    params = {"w": jnp.asarray([1e8])}
    updates, _ = tx.update({"w": jnp.asarray([1.0])}, tx.init(params), params)
    assert relative_error(updates["w"], [-1e-3]) < rounding("float32", operations=2)


@pytest.mark.parametrize("lr", ["number", "array", "schedule", "by name", "schedule by name"])
def test_lr_multiplies_the_learned_step_sizes(lr: str) -> None:
    values = [0.5, 0.0, 0.25]
    table = jnp.asarray(values)
    each = {leaf: 0.1 * (index + 1) for index, leaf in enumerate(NAMES)}
    given: dict[str, tuple[Any, Any]] = {
        "number": (0.5, lambda t: 0.5),
        "array": (jnp.asarray(0.5, "float16"), lambda t: 0.5),
        "schedule": (lambda count: table[count], lambda t: values[t]),
        "by name": (each, lambda t: each),
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
    close(by_name(params), leaves)
    close(vars(tx.core_state(state)), vars(core))


# --- what transformations of functions ask for


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_is_traced_once_and_keeps_its_structure(name: str) -> None:
    tx, traces = metaopt_jax.metaoptimize(**options_of(name)), []

    def step(params: Any, state: Any) -> Any:
        traces.append(name)
        return update(tx, params, state, unheard_of=1)

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = start()
    first = state = jax.jit(tx.init)(params)
    types = jax.tree.map(jax.typeof, (params, state))
    for _ in range(3):
        params, state = compiled(params, state)
        assert jax.tree.map(jax.typeof, (params, state)) == types
    assert len(traces) == 1
    assert compiled._cache_size() == 1
    # donated whole: nothing of a state lies in the memory of the parameters or of another part
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first) if leaf.size)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_memory_is_shared(name: str, compiled: bool) -> None:
    """An array donated twice would be an error, one donated with the parameters a wrong result."""
    tx, params = metaopt_jax.metaoptimize(**options_of(name)), start()
    state = (jax.jit(tx.init) if compiled else tx.init)(params)
    for _ in range(2):
        leaves = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.size]
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
        params, state = update(tx, params, state)


@pytest.mark.parametrize("name", CONFIGURATIONS)
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
    close(got, params)


@pytest.mark.parametrize("name", CONFIGURATIONS)
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
        close(jax.tree.map(lambda leaf, i=index: leaf[i], together), train(member))


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
    for index in range(2):
        want = train(float(sizes[index]), float(rates[index]))
        close(jax.tree.map(lambda leaf, i=index: leaf[i], swept), want)


def test_it_can_be_differentiated() -> None:
    """Through the ordered form too: how the loss after training depends on the first step size."""

    def after(step_size: Any) -> Any:
        options = options_of("scalar") | {"step_size": step_size}
        tx, params = metaopt_jax.metaoptimize(**options), {"w": jnp.ones(3) * 2.0}
        state = tx.init(params)
        for _ in range(3):
            params, state = update(tx, params, state)
        return loss(params)

    size, h = jnp.asarray(1e-2), 1e-4
    slope = (after(size + h) - after(size - h)) / (2 * h)
    assert relative_error(jax.jit(jax.grad(after))(size), slope) < 1e-2


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
    tx = metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), blocks="tensor")
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    assert list(tx.step_sizes(state)) == names
    updates, _ = tx.update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_numpy_arrays_are_parameters_too() -> None:
    tx = metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD())
    params = {"w": np.ones(3, "float32")}
    updates, state = tx.update(params, tx.init(params), params)
    assert isinstance(updates["w"], jax.Array)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", CONFIGURATIONS)
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
        assert tree["scale"] is None or tree["scale"] == state.slots[slot]["scale"]


@pytest.mark.parametrize("name", ["scalar", "weight", "exact", "rules"])
def test_parameters_without_a_leaf(name: str) -> None:
    options = options_of(name)
    tx = metaopt_jax.metaoptimize(**options)
    params: Any = {"a": None, "b": ()}
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert updates == params
    assert int(after.count) == 1
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert tx.step_sizes(after) == tx.diagnostics(after) == {}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_shapes_and_dtypes_are_enough_for_init(name: str) -> None:
    tx, params = metaopt_jax.metaoptimize(**options_of(name)), start()
    abstract = jax.eval_shape(lambda: params)
    close(tx.init(abstract), tx.init(params))
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(tx.init(params))


# --- errors


def test_bad_calls_are_refused() -> None:
    tx = metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), blocks="tensor")
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    with pytest.raises(ValueError, match="`params` must be passed to `update`.*got None"):
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
    with pytest.raises(ValueError, match="`lr` must be a finite number and at least 0; got -1"):
        metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), lr=-1.0).update(
            params, state, params
        )


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


def test_the_configuration_is_the_cores() -> None:
    with pytest.raises(ValueError, match="`meta_lr` must be a finite number"):
        metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), meta_lr=-1.0)
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), meta_lr=0.5)
    tx = metaopt_jax.metaoptimize(base=mo.SGD(), meta=mo.SGD(), meta_lr=0.5)
    assert tx.opt == opt != replace(opt, meta_lr=0.1)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx
    assert (init, update) == (tx.init, tx.update)
    assert isinstance(tx.opt.base, mo.rules.Rule) or isinstance(tx.opt.base, Mapping)
