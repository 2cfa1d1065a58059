"""Every example with JAX runs, and trains as a plain loop does."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

from metaopt_conformance.tolerances import relative_error, rounding  # noqa: E402
from metaopt_jax import metaoptimize  # noqa: E402

import metaopt as mo  # noqa: E402

jnp = jax.numpy

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "jax"
STEPS = 10
#: Float32 runs whose sums may be taken in another order.
ALLOWED = rounding("float32", operations=60, steps=STEPS)


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    """Float32 whatever other tests have asked of JAX."""
    with jax.enable_x64(False):
        yield


def example(name: str, *needs: str) -> Any:
    """Return an example as a module, or skip where it needs what is not installed."""
    for need in needs:
        pytest.importorskip(need)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_run(params: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Train a network of two layers, of kernels (inputs, outputs), on the examples' data."""

    def loss(params: Any, x: Any, y: Any) -> Any:
        inner, outer = params["inner"], params["outer"]
        hidden = jnp.tanh(x @ inner["kernel"] + inner["bias"])
        return jnp.mean((hidden @ outer["kernel"] + outer["bias"] - y) ** 2)

    tx = metaoptimize(step_size=1e-4, meta_lr=1e-2, **options)

    def train_step(params: Any, state: Any, x: Any, y: Any) -> Any:
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params, value_fn=lambda at: loss(at, x, y))
        return optax.apply_updates(params, updates), state

    compiled, state = jax.jit(train_step), tx.init(params)
    for key in jax.random.split(jax.random.key(1), STEPS):
        x = jax.random.normal(key, (64, 8))
        params, state = compiled(params, state, x, jnp.sin(x[:, :1]) + x[:, 1:2])
    return params, tx.step_sizes(state), state


def same(got: Any, want: Any) -> None:
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) < ALLOWED


def test_the_plain_loop_learns_from_step_sizes_that_are_too_small(capsys: Any) -> None:
    module = example("plain_pytree")
    params, meta, state = module.main()
    assert float(meta.step_sizes(state)["kernels"]) > 1e-3
    x, y = next(module.batches(1))
    assert float(module.loss(params, x, y)) < 0.1 * float(jnp.var(y))
    assert "step sizes: biases" in capsys.readouterr().out


def test_a_model_of_equinox_trains_as_a_plain_loop() -> None:
    module = example("equinox_model", "equinox")
    model, tx, state = module.main(STEPS)
    start, _, _ = module.main(0)
    params, sizes, _ = plain_run(
        {
            name: {"kernel": layer.weight.T, "bias": layer.bias}
            for name, layer in zip(("inner", "outer"), start.layers, strict=True)
        },
        base=mo.AdamW(),
        blocks="tensor",
    )
    same(
        [array for layer in model.layers for array in (layer.weight.T, layer.bias)],
        [params[name][part] for name in params for part in ("kernel", "bias")],
    )
    names = {
        f"{layer}.{part}": f"layers.{i}.{theirs}"
        for i, layer in enumerate(("inner", "outer"))
        for part, theirs in (("kernel", "weight"), ("bias", "bias"))
    }
    found = tx.step_sizes(state)
    assert set(found) == set(names.values())
    same([found[theirs] for theirs in names.values()], [sizes[name] for name in names])


@pytest.mark.parametrize("curvature", ["none", "exact"])
def test_a_model_of_flax_trains_as_a_plain_loop(curvature: str) -> None:
    module, nnx = example("flax_nnx", "flax"), pytest.importorskip("flax.nnx")
    model, tx, optimizer = module.main(STEPS, curvature)
    start, _, _ = module.main(0, curvature)

    def arrays(model: Any) -> Any:
        return {
            name: {part: getattr(layer, part)[...] for part in ("kernel", "bias")}
            for name, layer in (("inner", model.inner), ("outer", model.outer))
        }

    params, sizes, state = plain_run(
        arrays(start),
        base=mo.AdamW(),
        meta=mo.AdamW(),
        blocks={"inner": "inner.*", "outer": "outer.*"},
        curvature=curvature,
    )
    same(jax.tree.leaves(arrays(model)), jax.tree.leaves(params))
    found = tx.step_sizes(optimizer.opt_state)
    same(found.values(), sizes.values())
    assert list(found) == list(sizes) == ["inner", "outer"]
    told = tx.diagnostics(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert bool((told["trace_norm"]["inner"] > 0.0).all())
    assert int(state.count) == STEPS


def test_leaves_of_a_flax_model_have_the_names_of_their_paths() -> None:
    """Not those of what is within the variables that flax holds them in."""
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = metaoptimize(base=mo.AdamW(), meta=mo.AdamW(), blocks="tensor", discount=1.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: (model(jnp.ones((2, 3))) ** 2).mean())(model))
    assert set(tx.step_sizes(optimizer.opt_state)) == {"kernel", "bias"}


def test_the_page_runs_as_it_is_printed() -> None:
    """Block after block, in one process of its own, where warnings are errors."""
    pytest.importorskip("orbax.checkpoint")
    page = (ROOT / "docs" / "jax.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'backends'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'weight': " in done.stdout
