"""JAX: the transformation over `optax.adamw`, and what else of optax.contrib finds step sizes."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from metaopt_jax import metaoptimize

import metaopt as mo
from benchmarks.contenders import Contender, Shapes

NOTE = "optax's own optimizer, jitted with donated buffers as all rows are"
PACKAGES = ("jax", "optax")
PROBLEMS = ("flat", "resnet18")

#: A compiler option for the CPU, described in docs/jax.md; the user's to give.
REGIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}
ADAMW = mo.AdamW(weight_decay=0.1)
LION = mo.Lion(weight_decay=0.1)
#: Of optax.contrib.
PEERS: dict[str, Callable[[], Any]] = {
    "Prodigy": lambda: optax.contrib.prodigy(weight_decay=0.1),
    "schedule-free AdamW": lambda: optax.contrib.schedule_free_adamw(1e-4, weight_decay=0.1),
    "D-Adaptation AdamW": lambda: optax.contrib.dadapt_adamw(weight_decay=0.1),
    "Mechanic of AdamW": lambda: optax.contrib.mechanize(optax.adamw(1e-4, weight_decay=0.1)),
}


def steps(shapes: Shapes) -> Iterator[Contender]:
    """Yield optax.adamw and all that is compared with it."""
    rng = np.random.default_rng(0)
    grads = {
        name: jax.device_put(rng.normal(size=shape).astype(np.float32))
        for name, shape in shapes.items()
    }
    on_cpu = jax.default_backend() == "cpu"
    adamw = optax.adamw(1e-4, weight_decay=0.1)
    yield Contender("AdamW, optax", step(adamw, grads), reference=True)
    if on_cpu:
        yield Contender("AdamW, optax, with the option", step(adamw, grads, REGIONS))
    for blocks in ("scalar", "tensor"):
        tx = metaoptimize(base=ADAMW, meta=mo.Lion(), blocks=blocks, discount=1.0)
        yield Contender(f"AdamW + Lion, {blocks}", step(tx, grads))
        if on_cpu:
            name = f"AdamW + Lion, {blocks}, with the option"
            yield Contender(name, step(tx, grads, REGIONS))
    for name, make in PEERS.items():
        yield Contender(name, step(make(), grads))
    yield Contender("Lion, optax", step(optax.lion(1e-4, weight_decay=0.1), grads), reference=True)
    tx = metaoptimize(base=LION, meta=mo.Lion(), discount=1.0)
    yield Contender("Lion + Lion, scalar", step(tx, grads))
    if on_cpu:
        yield Contender("Lion + Lion, scalar, with the option", step(tx, grads, REGIONS))


def program(tx: Any, options: dict[str, Any] | None = None) -> Any:
    """Return an update that is compiled, in the memory of what goes in."""

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(update, donate_argnums=(0, 1), compiler_options=options)


def step(
    tx: Any, grads: dict[str, Any], options: dict[str, Any] | None = None
) -> Callable[[], None]:
    """Return a function that makes one step from parameters of its own."""
    run = program(tx, options)
    params = jax.tree.map(jax.numpy.zeros_like, grads)
    state = jax.tree.map(jax.numpy.copy, tx.init(params))  # some share memory with the parameters

    def made() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(run(params, state, grads))

    return made
