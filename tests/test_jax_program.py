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
from metaopt_conformance.tolerances import relative_error, rounding  # noqa: E402
from metaopt_jax import from_config, metaoptimize  # noqa: E402

import metaopt as mo  # noqa: E402
from tests.on_demand import slow_but  # noqa: E402

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the order of loops is chosen for CPUs"
)

OPTION = {"xla_cpu_copy_insertion_use_region_analysis": True}  # in docs/jax.md
SIZE = 4 * 50_000
SHAPES = {"a": (50_000,), "b": (250, 200), "c": (10,)}


def compiled(tx: Any, options: Any = None, shapes: Any = None) -> Any:
    """Return the program of an update and `apply_updates` with donated buffers."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.enable_x64(False):
        params = {
            name: jax.ShapeDtypeStruct(shape, "float32")
            for name, shape in (shapes or SHAPES).items()
        }
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
    "discounts": {"discount": (0.9, 1.0)},
    "discounts by node": {"discount": (0.9, 0.99, 1.0), "blocks": "node", "meta": mo.AdamW()},
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
    usual = {"base": RULES["AdamW"], "meta": mo.Lion(), "discount": 1.0}
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
    ours, theirs = metaoptimize(base=mo.Lion(weight_decay=0.1), meta=mo.Lion()), optax.lion(1e-4)
    assert copies(compiled(ours)) == copies(compiled(theirs)) == 2
    program = compiled(ours, OPTION)
    assert (copies(program), temporaries(program)) == (0, 0)


def test_without_the_order_traces_and_parameters_are_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("metaopt_jax.transform.helps", lambda _: False)
    opt = mo.MetaOptimize(base=mo.AdamW(weight_decay=0.1), meta=mo.Lion(), discount=1.0)
    program = compiled(from_config(opt))
    assert copies(program) >= 2
    assert temporaries(program) >= 2


def loops(program: Any) -> tuple[int, int]:
    """Return how many loops a program has, and how many of them differ: XLA compiles these."""
    bodies = {}
    for name, body in re.findall(r"^%(\S+) \(.*?{\n(.*?)^}", program.as_text(), re.M | re.S):
        bodies[name] = re.sub(r"(%[a-z]+)[\w.-]*|, metadata={.*?}", r"\1", body)
    calls = re.findall(r"fusion\(.*calls=%([^\s,]+)", program.as_text().split("\nENTRY")[1])
    return len(calls), len({bodies[name] for name in calls})


@pytest.mark.parametrize("blocks", slow_but(["tensor"], ["scalar", "tensor"]))
def test_more_leaves_of_a_shape_take_few_loops_and_almost_none_of_their_own(blocks: str) -> None:
    """A leaf has its five arrays' loops, of the sum, moments, trace and step; one more cuts out
    its numbers, and one ties its step to its trace. With a step size each there are four more.
    """
    found = []
    for count in (16, 48):
        shapes = {f"w{i:02}": (32, 16) for i in range(count)}
        found.append(loops(compiled(ours(blocks=blocks), shapes=shapes)))
    (loops_of_16, kinds_of_16), (loops_of_48, kinds_of_48) = found
    assert (loops_of_48 - loops_of_16) / 32 < {"scalar": 7.5, "tensor": 11.5}[blocks]
    assert kinds_of_48 - kinds_of_16 < 20


@pytest.mark.parametrize(
    "blocks", slow_but(["tensor"], ["scalar", "tensor", {"one": "w0*", "rest": "*"}])
)
def test_leaves_in_one_vector_make_the_steps_of_each_by_itself(
    blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some start late, so that their counts and bias corrections differ."""
    rule = mo.AdamW(weight_decay=0.1)
    tx = metaoptimize(base=rule, meta=mo.AdamW(), blocks=blocks, discount=0.9)
    start = {f"w{i:02}": jnp.arange(1.0, 5.0) + i for i in range(18)}

    def run() -> Any:
        params, state = start, tx.init(start)
        for late in (True, True, False, False):
            grads: Any = {name: None if late and name > "w11" else w for name, w in params.items()}
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    ours = run()
    monkeypatch.setattr("metaopt_jax.transform.helps", lambda _: False)
    for found, expected in zip(*map(jax.tree.leaves, (ours, run())), strict=True):
        assert relative_error(found, expected) < rounding("float32", operations=40, steps=4)
    assert ours[1].leaf_counts.tolist() == [4] * 12 + [2] * 6


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
    tx = metaoptimize(base=Telling(), meta=mo.SGD(), step_size=0.1, discount=1.0)
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(params, state, params)
    jax.block_until_ready(updates)
    jax.effects_barrier()
    assert sorted(had) == ["passed", "printed"]
