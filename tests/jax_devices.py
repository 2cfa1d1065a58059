"""What eight emulated devices do, for test_jax_sharding.py.

    python tests/jax_devices.py FILE FOLDER SCENARIO[,configuration] ...

Scenarios run one after the other; what went wrong in each is written to FILE. Every scenario trains
parameters of which the devices hold parts and, on one device, the same parameters whole, and
compares all that comes out.
"""

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from metaopt_jax import metaoptimize

import metaopt as mo
from tests.jax_problem import by_name, close, options_of
from tests.test_scope import Factored, Normalized

STEPS = 4
SPECS: dict[str, Any] = {
    "kernel": P("x", "y"),
    "bias": P("y"),
    "stack": [P(None, ("x", "y"))],
    "scale": P(),
}


def start() -> Any:
    """Return the parameters, whole."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (16, 8), "bias": (8,), "stack": [(3, 8, 2)], "scale": ()}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), "float32"),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def whole(leaf: Any) -> Any:
    """Return the sum of a leaf that is whole, or of which XLA knows the parts."""
    return jnp.sum(leaf)


def of_parts(leaf: Any) -> Any:
    """Return the sum of a leaf over the devices that have parts of it."""
    kind = jax.typeof(leaf)
    varying = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
    return jax.lax.psum(jnp.sum(leaf), tuple(sorted(varying))) if varying else jnp.sum(leaf)


def loss(params: Any, total: Callable[[Any], Any] = whole) -> Any:
    """Return a loss in which all weights act on each other."""
    leaves = jax.tree.leaves(params)
    mean = sum(map(total, leaves)) / 100.0
    return sum(total(jnp.cosh(leaf - 1.0)) for leaf in leaves) + mean**2


def update(tx: Any, params: Any, state: Any, total: Callable[[Any], Any] = whole) -> Any:
    """Return parameters and state after one update."""
    given = {
        "value_fn": lambda at: loss(at, total),
        "hessian_diagonal": jax.tree.map(lambda leaf: jnp.cosh(leaf - 1.0), params),
    }
    grads = jax.grad(loss)(params, total)
    updates, state = tx.update(grads, state, params, **given)
    return optax.apply_updates(params, updates), state


def mesh_of(kind: str, shape: tuple[int, int] = (4, 2)) -> Any:
    """Return a mesh of the devices, of the axes x and y; of a mixed one x is explicit."""
    explicit, auto = AxisType.Explicit, AxisType.Auto
    types = {"auto": (auto, auto), "explicit": (explicit, explicit), "mixed": (explicit, auto)}
    return jax.make_mesh(shape, ("x", "y"), axis_types=types[kind])


def placed(params: Any, mesh: Any) -> Any:
    """Return parameters with their parts on the devices of a mesh.

    Their shardings are spelled as what `jax.jit` returns has them, which is up to the user.
    """
    put = jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS))
    return jax.jit(lambda params: jax.tree.map(jnp.copy, params), donate_argnums=0)(put)


def compiled(tx: Any) -> Any:
    """Return an update that is compiled, and takes over what it is given."""
    return jax.jit(lambda params, state: update(tx, params, state), donate_argnums=(0, 1))


def shardings(tree: Any) -> Any:
    """Return where the leaves of a pytree lie."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def lies_like(tree: Any, params: Any) -> bool:
    """Say whether the leaves of a pytree lie as the parameters do, columns aside.

    Of several discounts there are several pytrees.
    """
    if isinstance(tree, tuple):
        return all(lies_like(each, params) for each in tree)

    def axes(leaf: Any) -> Any:
        return [*leaf.sharding.spec, *(None,) * (leaf.ndim - len(leaf.sharding.spec))]

    return all(
        axes(part)[part.ndim - param.ndim :] == axes(param)
        for part, param in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True)
    )


COMPILED: list[str] = []  # what has been
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if "backend_compile" in event else None
)


def train(step: Any, params: Any, state: Any, steps: int = STEPS) -> Any:
    """Return parameters and state after a run, in which but the first step is compiled."""
    params, state = step(params, state)
    known = len(COMPILED)
    assert known
    for _ in range(steps - 1):
        params, state = step(params, state)
    assert len(COMPILED) == known
    return params, state


def unsharded(tx: Any, steps: int = STEPS) -> Any:
    """Return parameters and state after a run on one device."""
    return train(compiled(tx), start(), tx.init(start()), steps)


@functools.cache
def whole_run(configuration: str) -> Any:
    """Return parameters and state after a run of a configuration on one device."""
    return unsharded(metaoptimize(**options_of(configuration)))


def equal_everywhere(values: Any) -> None:
    """Assert that the devices have the same bits of what each has whole."""
    for value in jax.tree.leaves(values):
        shards = [np.asarray(shard.data) for shard in value.addressable_shards]
        assert len(shards) == 8
        assert all(shard.tobytes() == shards[0].tobytes() for shard in shards)


def jit(kind: str, configuration: str) -> None:
    """Train under jit with parts of the parameters on the devices."""
    tx, params = metaoptimize(**options_of(configuration)), placed(start(), mesh_of(kind))
    # blocks per unit are as many as a leaf's columns: XLA would spread them over the devices
    known = kind != "auto" or configuration == "node"
    with jax.set_mesh(mesh_of(kind)) if known else contextlib.nullcontext():
        state = tx.init(params)
        assert lies_like(state.trace_or_average, params)
        assert all(lies_like(tree, params) for tree in state.slots.values())
        if kind == "explicit":
            inside = jax.jit(tx.init)(params)
            assert jax.tree.map(jax.typeof, inside) == jax.tree.map(jax.typeof, state)
        before, step = shardings((params, state)), compiled(tx)
        params, state = train(step, params, state)
        assert step._cache_size() == 1
        assert shardings((params, state)) == before
        if "weight" in configuration:
            assert lies_like(state.beta, params)
        else:
            equal_everywhere(state.beta)
        sizes = tx.step_sizes(state)
        averaged = tx.averaged_params(state, params) if configuration == "discounts" else params
        assert lies_like(averaged, params)
    want, other = whole_run(configuration)
    close(jax.device_get((params, state, sizes)), (want, other, tx.step_sizes(other)), STEPS)
    if configuration == "discounts":
        close(jax.device_get(averaged), tx.averaged_params(other, want), STEPS)


def auto(configuration: str) -> None:
    """Train on a mesh whose axes the compiler handles."""
    jit("auto", configuration)


def explicit(configuration: str) -> None:
    """Train on a mesh whose shardings are part of the types."""
    jit("explicit", configuration)


def mixed(configuration: str) -> None:
    """Train on a mesh of which the shardings over one axis are part of the types."""
    jit("mixed", configuration)


def injected(kind: str) -> None:
    """Train with hyperparameters that are arrays of the state."""
    options = options_of("tensor") | {"meta_lr": 0.01, "discount": 0.9}
    tx = optax.inject_hyperparams(metaoptimize)(**options, lr=lambda count: 1.0 / (1 + count))
    params = placed(start(), mesh_of(kind))
    with jax.set_mesh(mesh_of(kind)):
        params, state = train(compiled(tx), params, tx.init(params))
    want, other = unsharded(tx)
    close(jax.device_get((params, state.inner_state)), (want, other.inner_state), STEPS)


def shard_map(configuration: str) -> None:
    """Train within shard_map, each device its parts."""
    options, mesh = options_of(configuration), mesh_of("auto")
    tx, params = metaoptimize(**options, axis_name=("x", "y")), placed(start(), mesh)
    plain = metaoptimize(**options)
    state = plain.init(params)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)

    def local(params: Any, state: Any) -> Any:
        return update(tx, params, state, of_parts)

    step = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(SPECS, specs), out_specs=(SPECS, specs))
    )
    params, state = train(step, params, state)
    equal_everywhere(state.beta)
    close(jax.device_get((params, state)), whole_run(configuration), STEPS)

    # its own init, within
    inside = jax.shard_map(tx.init, mesh=mesh, in_specs=(SPECS,), out_specs=specs)(params)
    close(jax.device_get(inside), plain.init(start()), STEPS)


def axis_names() -> None:
    """Refuse names of axes that no parameter is sharded over, and step sizes per weight."""
    mesh, params = mesh_of("auto"), {"w": jnp.ones(8)}
    tx = metaoptimize(**options_of("bare"), axis_name=("x", "y"))
    state = tx.init(params)

    def local(params: Any, state: Any) -> Any:
        return tx.update(params, state, params)[0]

    with pytest.raises(ValueError, match="`axis_name` has 'y', over which no parameter is sharded"):
        jax.shard_map(local, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))(params, state)
    divided = metaoptimize(**options_of("bare") | {"blocks": mo.blocks.node(0)}, axis_name="x")
    square = {"w": jnp.ones((8, 8))}
    state = divided.init({"w": jnp.ones((2, 8))})

    def parts(params: Any, state: Any) -> Any:
        return divided.update(params, state, params)[0]

    with pytest.raises(ValueError, match="`blocks` divides 'w', of which devices have parts"):
        jax.shard_map(parts, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))(square, state)
    with pytest.raises(ValueError, match='`axis_name` does not go with `blocks="weight"`'):
        metaoptimize(**options_of("weight"), axis_name="x")


def leaf(kind: str) -> None:
    """Train with rules that see whole leaves: of parts, XLA makes them whole."""
    options = options_of("bare") | {"base": {"scale": Normalized(), "*": Factored()}}
    tx, params = metaoptimize(**options), placed(start(), mesh_of(kind))
    with jax.set_mesh(mesh_of(kind)):
        params, state = train(compiled(tx), params, tx.init(params))
    close(jax.device_get((params, state)), unsharded(tx), STEPS)


def leaf_in_shard_map() -> None:
    """Refuse rules that see whole leaves of which a device has a part, and no others."""
    mesh = mesh_of("auto")
    specs = {"kernel": P("x", "y"), "bias": P(), "stack": [P()], "scale": P()}
    put = jax.device_put(start(), jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    for pattern, other in (("kernel", mo.SGD()), ("bias", Normalized())):
        options = options_of("bare") | {"base": {pattern: other, "*": Factored()}}
        plain = metaoptimize(**options)
        tx, state = metaoptimize(**options, axis_name=("x", "y")), plain.init(start())

        def local(params: Any, state: Any, tx: Any = tx) -> Any:
            return update(tx, params, state, of_parts)

        of_state = jax.tree.map(lambda _: P(), state)
        of_state = of_state._replace(trace_or_average=specs)
        step = jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=(specs, of_state), out_specs=(specs, of_state))
        )
        if pattern == "bias":
            with pytest.raises(ValueError, match=r"'kernel' is sharded within .*, but Factored"):
                step(put, state)
            continue
        params = put
        for _ in range(STEPS):
            params, state = step(params, state)
        close(jax.device_get((params, state)), unsharded(plain), STEPS)


def orbax(configuration: str, folder: Path) -> None:
    """Save on one mesh, go on on another: to the bit what was saved, and the run of one device."""
    tx = metaoptimize(**options_of(configuration))
    params = placed(start(), mesh_of("auto"))
    params, state = train(compiled(tx), params, tx.init(params))
    saved = jax.device_get((params, state))
    path = folder / configuration
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, (params, state))

    params = placed(start(), mesh_of("auto", (2, 4)))
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        (params, tx.init(params)),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        params, state = checkpointer.restore(path, target)
    assert type(state) is type(saved[1])
    assert lies_like(state.trace_or_average, params)
    for name, got in by_name((params, state)).items():
        assert np.asarray(got).tobytes() == by_name(saved)[name].tobytes(), name
    params, state = train(compiled(tx), params, state)
    close(jax.device_get((params, state)), unsharded(tx, 2 * STEPS), 2 * STEPS)


def orbax_without_leaves(folder: Path) -> None:
    """Save and restore the state of a group that has no parameter."""
    params = start()
    groups = {"ours": metaoptimize(**options_of("scalar")), "others": optax.sgd(0.1)}
    tx = optax.partition(groups, jax.tree.map(lambda _: "others", params))
    _, state = update(tx, params, tx.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "none", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / "none", tx.init(params))
    close(restored, state, 1)


def algoperf() -> None:
    """AlgoPerf's submission, each batch spread over the devices, equals a loop on one of them."""
    from tests.algoperf_harness import TRAIN, JaxDigits, Run, submission

    workload = JaxDigits(normalized=True)
    run, tx = Run(submission("jax"), workload), metaoptimize()
    params, stats = workload.init_model_fn(None)
    state, queue = tx.init(params), workload.batches(seed=1)

    @jax.jit
    def step(params: Any, state: Any, stats: Any, batch: Any) -> Any:
        def mean_loss(params: Any) -> Any:
            logits, new = workload.model_fn(params, batch, stats, TRAIN, None, True)
            loss = workload.loss_fn(batch["targets"], logits, batch["weights"])
            return loss["summed"] / loss["n_valid_examples"], new

        grads, stats = jax.grad(mean_loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, stats

    for _ in range(STEPS):
        batch = next(queue)
        assert len(batch["inputs"].sharding.device_set) == 8
        run.train(iter([batch]), 1)
        params, state, stats = step(params, state, stats, jax.device_get(batch))
    got = (run.params, run.optimizer_state[0]["optimizer"], run.model_state)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(got)} == {8}
    equal_everywhere(got)
    close(jax.device_get(got), (params, state, stats), STEPS)
    run.evaluate()
    close(jax.device_get(run.params), tx.averaged_params(state, params), STEPS)


SCENARIOS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        *(auto, explicit, mixed, injected, shard_map, axis_names),
        *(leaf, leaf_in_shard_map, algoperf),
        *(orbax, orbax_without_leaves),
    )
}


def main(file: str, folder: str, *scenarios: str) -> None:
    """Run scenarios."""
    failures = {}
    for scenario in scenarios:
        name, *arguments = scenario.split(",")
        more = {"folder": Path(folder)} if name.startswith("orbax") else {}
        try:
            SCENARIOS[name](*arguments, **more)
        except Exception:
            failures[scenario] = traceback.format_exc()
    Path(file).write_text(json.dumps(failures))


if __name__ == "__main__":
    main(*sys.argv[1:])
