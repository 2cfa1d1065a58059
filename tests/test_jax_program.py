"""The program that XLA makes of an update on a CPU: what it copies, and what it needs beside."""

import re
from dataclasses import dataclass
from typing import Any

import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from jax.experimental import io_callback  # noqa: E402
from metaopt_conformance.table import BASES, signs  # noqa: E402
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


#: Those that do not read what they replace.
RULES = {name: rule for name, rule in BASES.items() if not signs(rule)}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "Adam": {"base": mo.AdamW()},
    "tensor": {"blocks": "tensor"},
    "node": {"blocks": "node"},
    "named": {"blocks": {"one": "a", "rest": "*"}},
    "schedule": {"lr": optax.linear_schedule(0.0, 1.0, 100)},
    "lr by name": {"lr": {"a": 1.0, "b": 0.5, "c": 0.0}},
    "discount": {"discount": 0.9},
    "meta Adam": {"meta": mo.AdamW()},
    "meta first": {"meta_first": True},
    "softplus": {"sigma": "softplus"},
    "bounds": {"bounds": (1e-6, 1e-1)},
}
#: The number of copies and temporaries for two large parameters, without the option and with it.
COPYING: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, int]]] = {
    "weight": ({"blocks": "weight"}, (8, 8), (4, 6)),
    "skip_nonfinite": ({"skip_nonfinite": True}, (8, 6), (0, 2)),
    "delayed": ({"base": mo.AdamW(delayed=True)}, (4, 4), (0, 0)),
    "no discount": ({"discount": 0.0}, (4, 2), (0, 1)),
    "Lion": ({"base": mo.Lion(weight_decay=0.1)}, (2, 2), (0, 0)),
    "Lion for one": ({"base": {"a": mo.Lion(), "*": mo.AdamW()}}, (1, 1), (0, 0)),
}


def ours(**options: Any) -> Any:
    usual = {"base": RULES["AdamW"], "meta": mo.Lion()}
    return metaoptimize(**(usual | options))


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_is_copied(name: str) -> None:
    program = compiled(ours(**OPTIONS[name]))
    assert (copies(program), temporaries(program)) == (0, 0)


@pytest.mark.parametrize("base", RULES)
def test_nothing_is_copied_whatever_the_rule(base: str) -> None:
    options = {"discount": 0.9, "blocks": "tensor", "meta": mo.AdamW()}
    program = compiled(ours(base=RULES[base], **options))
    assert (copies(program), temporaries(program)) == (0, 0)


@pytest.mark.parametrize("name", COPYING)
def test_what_copies_copies_no_more_than_this(name: str) -> None:
    """Where a step reads what a new array could replace; the option undoes it."""
    options, without, with_option = COPYING[name]
    for given, most in ((None, without), (OPTION, with_option)):
        program = compiled(ours(**options), given)
        assert copies(program) <= most[0]
        assert temporaries(program) <= most[1]


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


def test_effects_of_a_rule_are_had_once_a_step() -> None:
    """Those that nothing comes of as well."""
    had: list[str] = []

    def passed(value: Any) -> Any:
        had.append("passed")
        return value

    @dataclass(frozen=True)
    class Telling:
        weight_decay: float = 0.0
        slots: tuple[str, ...] = ("moment",)

        def direction(self, grad: Any, slots: Any, count: Any) -> Any:
            if isinstance(grad, jax.Array):
                jax.debug.callback(lambda _: had.append("printed"), count)
                like = jax.ShapeDtypeStruct(grad.shape, grad.dtype)
                grad = io_callback(passed, like, grad)
            moment = 0.9 * slots["moment"] + 0.1 * grad
            return moment + grad, {"moment": moment}

    params = {"w": jnp.ones(4)}
    tx = metaoptimize(base=Telling(), meta=mo.SGD(), step_size=0.1)
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(params, state, params)
    jax.block_until_ready(updates)
    jax.effects_barrier()
    assert sorted(had) == ["passed", "printed"]
