"""The program that XLA makes of an update on a CPU: what it copies, and what it needs beside."""

import re
from typing import Any

import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

from metaopt_jax import metaoptimize, transformation  # noqa: E402

import metaopt as mo  # noqa: E402

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the order of loops is chosen for CPUs"
)

OPTION = {"xla_cpu_copy_insertion_use_region_analysis": True}  # in docs/jax.md
SIZE = 4 * 50_000
SHAPES = {"a": (50_000,), "b": (250, 200), "c": (10,)}


def compiled(tx: Any, options: Any = None) -> Any:
    """Return the program of an update and `apply_updates` with donated buffers."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.enable_x64(False):
        params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in SHAPES.items()}
        state = jax.eval_shape(tx.init, params)
        run = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
        return run.lower(params, state, params).compile()


def copies(program: Any) -> int:
    """Return how often the program copies an array of the size of the large parameters."""
    return len(re.findall(r"= f32\[(?:50000|250,200)\]\S* copy\(", program.as_text()))


def temporaries(program: Any) -> int:
    """Return how many arrays of that size fit into what the program needs for a while."""
    return int(program.memory_analysis().temp_size_in_bytes // SIZE)


@pytest.mark.parametrize(
    ("blocks", "lr"), [("scalar", "number"), ("tensor", "schedule"), ("node", "number")]
)
def test_nothing_is_copied(blocks: str, lr: str) -> None:
    given = 1.0 if lr == "number" else optax.linear_schedule(0.0, 1.0, 100)
    program = compiled(metaoptimize(mo.AdamW(weight_decay=0.1), mo.Lion(), blocks=blocks, lr=given))
    assert (copies(program), temporaries(program)) == (0, 0)


@pytest.mark.parametrize(
    ("base", "meta"),
    [(mo.SGD(), mo.SGD()), (mo.SGD(momentum=0.9), mo.AdamW()), (mo.RMSprop(), mo.AdamW())],
    ids=["SGD", "SGD momentum", "RMSprop"],
)
def test_nothing_is_copied_for_other_rules(base: Any, meta: Any) -> None:
    program = compiled(metaoptimize(base, meta))
    assert (copies(program), temporaries(program)) == (0, 0)


def test_lion_copies_its_moment_as_optax_does_unless_told_otherwise() -> None:
    """Its step reads the old moment, so neither may come first for all that XLA knows."""
    ours, theirs = metaoptimize(mo.Lion(weight_decay=0.1), mo.Lion()), optax.lion(1e-4)
    assert copies(compiled(ours)) == copies(compiled(theirs)) == 2
    program = compiled(ours, OPTION)
    assert (copies(program), temporaries(program)) == (0, 0)


def test_without_the_order_traces_and_parameters_are_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("metaopt_jax.transform.helps", lambda _: False)
    opt = mo.MetaOptimize(base=mo.AdamW(weight_decay=0.1), meta=mo.Lion())
    program = compiled(transformation(opt))
    assert copies(program) >= 2
    assert temporaries(program) >= 2


def test_the_option_does_optax_no_harm() -> None:
    program = compiled(optax.adamw(1e-4), OPTION)
    assert (copies(program), temporaries(program)) == (0, 0)
