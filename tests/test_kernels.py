"""metaopt_kernels on NumPy: a step in one pass equals the core's; what is handed in is checked."""

import copy
import doctest
import functools
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from metaopt_conformance import table, tolerances
from metaopt_conformance.translate import contents, values_of
from metaopt_kernels import MetaOptimizer, cpu, from_config, memory
from metaopt_kernels.memory import address
from metaopt_kernels.sharing import shared

import metaopt as mo
from metaopt.arrays import map_leaves, namespace
from tests.on_demand import slow_but

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, tuple[int, ...]] = {
    "conv": (4, 3, 2, 2),
    "dense": (5, 7),
    "bias": (5,),
    "gain": (),
    "empty": (0, 3),
}
STEPS = 6

BASES: dict[str, Any] = {
    **table.BASES,
    "eps=0": mo.AdamW(betas=(0.8, 0.0), eps=0.0),
    **{
        f"{name}, delayed": replace(rule, delayed=True)
        for name, rule in table.BASES.items()
        if table.has(rule, "delayed")
    },
}


class Ends(mo.blocks.Partition):
    """Blocks along the first and the last axis of a leaf, which do not lie side by side."""

    def assign(self, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if len(shape) < 2:
            return name, shape
        return name, (shape[0], *(1 for _ in shape[1:-1]), shape[-1])


BLOCKS: dict[str, Any] = {
    "scalar": "scalar",
    "tensor": "tensor",
    "node": "node",
    "last axis": mo.blocks.node(-1),
    "weight": "weight",
    "groups": {"biases": ("bias", "gain"), "rest": "*"},
    "ends": Ends(),
}
needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None,
    reason="numba is not installed: NumPy arrays have no kernels",
)


def start(dtype: str = "float64", shapes: Any = SHAPES) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def gradient(t: int, params: Any) -> dict[str, Any]:
    return {
        name: np.asarray(np.sin(param + 0.3 * t) + 0.1 * param, param.dtype)
        for name, param in params.items()
    }


def inputs(t: int, params: Any) -> dict[str, Any]:
    """Return what a step is given: one leaf without gradient, schedules with zeros."""
    grads: dict[str, Any] = gradient(t, params)
    if t == 2:
        grads["dense"] = None
    lr: Any = (1.0, 0.5, 1.0, 0.0, 1.0, 0.25)[t % 6]
    if t == 4:
        lr = {name: 0.1 * index for index, name in enumerate(params)}
    return {"grads": grads, "lr": lr}


def run_core(opt: mo.MetaOptimize, params: Any, steps: int = STEPS) -> tuple[Any, mo.State]:
    state = opt.init(params)
    for t in range(steps):
        params, state = opt.step(params, state=state, **inputs(t, params))
    return params, state


def run_fused(opt: MetaOptimizer, steps: int = STEPS) -> tuple[Any, mo.State]:
    for t in range(steps):
        opt.step(**inputs(t, opt.params))
    return opt.params, opt.state


def assert_close(got: Any, want: Any, dtype: str, steps: int = STEPS) -> None:
    """Compare params and states; of one dtype, their rounding, else that of the wider."""
    allowed = tolerances.rounding(dtype, operations=60, steps=steps)

    def compare(got: Any, want: Any) -> None:
        assert got.dtype == want.dtype
        error = tolerances.relative_error(got, want)
        own = tolerances.rounding(got.dtype.name, 1) if got.dtype.kind == "f" else 0.0
        assert error <= max(allowed, own)

    map_leaves(compare, got[0], want[0])
    found = values_of(got[1])
    for name, value in values_of(want[1]).items():
        map_leaves(compare, found[name], value)


def configured(**options: Any) -> dict[str, Any]:
    return {
        "step_size": 0.05,
        "meta_lr": 0.05,
        "meta": mo.AdamW(eps=1e-2),
        "discount": 1.0,
    } | options


@needs_numba
@pytest.mark.parametrize("sigma", table.SIGMAS)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("base", BASES)
def test_a_step_in_one_pass_equals_the_core(base: str, blocks: str, sigma: str) -> None:
    options = configured(base=BASES[base], blocks=BLOCKS[blocks], sigma=table.SIGMAS[sigma])
    fused = run_fused(MetaOptimizer(start(), fused=True, **options))
    assert_close(fused, run_core(mo.MetaOptimize(**options), start()), "float64")


OPTIONS: dict[str, dict[str, Any]] = {
    "discount": {"discount": 0.9},
    "discounts": {"discount": (0.9, 1.0)},
    "discounts, one of them": {"discount": (0.9,)},
    "discounts by tensor": {"discount": (0.0, 0.9, 1.0), "blocks": "tensor"},
    "discounts by node": {"discount": (0.9, 1.0), "blocks": "node", "meta": mo.Lion()},
    "discounts by weight": {"discount": (0.9, 1.0), "blocks": "weight"},
    "discounts, softplus": {"discount": (0.9, 1.0), "sigma": "softplus"},
    "discounts, fast start": {"discount": (0.9, 1.0), "meta": mo.FastStart(mo.AdamW())},
    "hypergradient": {"discount": 0.0},
    "bounds": {"bounds": (0.049, 0.051)},
    "bounds by block": {"bounds": {"dense": (0.049, 0.051)}, "blocks": "tensor"},
    "bounds by weight": {"bounds": (0.04, 0.06), "blocks": "weight"},
    "sizes by block": {
        "step_size": {name: 0.01 * (2 + i) for i, name in enumerate(SHAPES)},
        "blocks": "tensor",
    },
    "meta SGD": {"meta": mo.SGD()},
    "meta Lion": {"meta": mo.Lion(), "blocks": "node"},
    "meta RMSprop": {"meta": mo.RMSprop(), "blocks": "weight"},
    "rules by leaf": {
        "base": {"bias": mo.SGD(), "dense": mo.Lion(), "*": BASES["AdamW"]},
        "blocks": "tensor",
    },
    "rules in a block": {"base": {"conv": mo.SGD(), "*": mo.SGD(momentum=0.5)}},
    "approximation": {"approximation": "2x2"},
    "decay apart": {"base": replace(BASES["AdamW"], decay_step_size=0.2)},
    "decay apart, traces": {
        "base": mo.SGD(weight_decay=0.1, decay_step_size=0.2),
        "sigma": "softplus",
        "discount": (0.9, 1.0),
    },
}


@needs_numba
@pytest.mark.parametrize("dtype", slow_but(["float32"], ["float64", "float32"]))
@pytest.mark.parametrize("name", OPTIONS)
def test_options_equal_the_core(name: str, dtype: str) -> None:
    options = configured(base=BASES["AdamW"]) | OPTIONS[name]
    fused = run_fused(MetaOptimizer(start(dtype), fused=True, **options))
    assert_close(fused, run_core(mo.MetaOptimize(**options), start(dtype)), dtype)


@needs_numba
@pytest.mark.parametrize("discount", [1.0, (0.9, 1.0)])
@pytest.mark.parametrize("blocks", ["scalar", "node", "weight"])
def test_leaves_of_several_dtypes(blocks: str, discount: Any) -> None:
    """Those of float16, in which numba does not compute, are stepped by the core's function."""
    options = configured(base=BASES["AdamW"], blocks=blocks, discount=discount)
    dtypes = dict(zip(SHAPES, ("float32", "float64", "float16", "float32", "float32"), strict=True))

    def params() -> Any:
        return {name: array.astype(dtypes[name]) for name, array in start().items()}

    with pytest.warns(UserWarning, match="no kernels for float16"):
        opt = MetaOptimizer(params(), **options)
    assert opt.unfused == {"bias": "no kernels for float16"}
    assert_close(run_fused(opt), run_core(mo.MetaOptimize(**options), params()), "float32")


PASSES: dict[str, dict[str, Any]] = {
    "meta_first": {"meta_first": True},
    "recover": {"recover": True, "discount": (0.9, 1.0)},
    "curvature of discounts": {"curvature": "exact", "discount": (0.9, 1.0)},
    "skip_nonfinite": {"skip_nonfinite": True},
    "held_out": {"held_out": True},
    "curvature": {"curvature": "exact"},
    "diagonal": {"curvature": "diagonal"},
}


@pytest.mark.parametrize("name", PASSES)
def test_what_takes_more_than_one_pass_is_the_cores_step(name: str) -> None:
    options = configured(base=BASES["AdamW"], **PASSES[name])
    opt, params = MetaOptimizer(start(), **options), start()
    assert set(opt.unfused) == set(SHAPES)
    assert all("more than one pass" in reason for reason in opt.unfused.values())
    core = mo.MetaOptimize(**options)
    state = core.init(params)
    for t in range(STEPS):
        more: dict[str, Any] = {
            "hvp": lambda tangents: tangents,
            "hessian_diagonal": {name: np.ones(shape) for name, shape in SHAPES.items()},
        }
        if name == "held_out" and t % 2:
            more["meta_grads"] = {"dense": np.ones(SHAPES["dense"]), "bias": None}
        opt.step(**inputs(t, opt.params), **more)
        params, state = core.step(params, state=state, **inputs(t, params), **more)
    assert contents(opt.params) == contents(params)
    assert contents(opt.state) == contents(state)


# --- rules that cannot be traced


@dataclass(frozen=True)
class Opaque:
    """A rule of somebody's own that looks at values before it does what another does."""

    rule: Any

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(self.rule.slots)

    @property
    def weight_decay(self) -> float:
        return float(self.rule.weight_decay)

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:
        assert count > 0
        return self.rule.direction(grad, slots, count)


@needs_numba
def test_warnings_point_at_the_call(tmp_path: Path) -> None:
    params = {"w": np.ones(3, "float16")}
    with pytest.warns(UserWarning, match="no kernels for float16") as made:
        opt = MetaOptimizer(params, base=mo.SGD(), meta=mo.SGD())
    opt.save(tmp_path / "run")
    with pytest.warns(UserWarning, match="no kernels for float16") as loaded:
        MetaOptimizer.load(tmp_path / "run", params)
    with pytest.warns(UserWarning, match="no kernels for float16") as given:
        from_config(opt.config, params)
    pickled = pickle.dumps(opt)
    with pytest.warns(UserWarning, match="no kernels for float16") as copied:
        pickle.loads(pickled)
    found = [w.filename for caught in (made, loaded, given, copied) for w in caught]
    assert found == [__file__] * 4


@needs_numba
@pytest.mark.parametrize("blocks", ["scalar", "weight"])
def test_a_rule_that_may_need_whole_leaves_says_so_and_equals_the_core(blocks: str) -> None:
    rule = BASES["AdamW"]
    options = configured(base={"dense": Opaque(rule), "*": rule}, blocks=blocks)
    with pytest.warns(UserWarning, match="Opaque.* says no `scope`, and sees whole leaves"):
        opt = MetaOptimizer(start(), **options)
    assert list(opt.unfused) == ["dense"]
    assert_close(run_fused(opt), run_core(mo.MetaOptimize(**options), start()), "float64")
    with pytest.raises(ValueError, match=r"no kernel for 'dense': .*says no `scope`"):
        MetaOptimizer(start(), fused=True, **options)


@dataclass(frozen=True)
class Narrow:
    """A rule that rounds to float16, which is no number of numba's."""

    scope = "weight"
    slots = ()
    weight_decay: float = 0.0

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
        xp = namespace(grad)
        return xp.astype(xp.astype(grad, xp.float16), grad.dtype), slots


@needs_numba
def test_a_rule_that_cannot_be_compiled_says_so_and_equals_the_core() -> None:
    options = configured(base={"dense": Narrow(), "*": BASES["AdamW"]})
    with pytest.warns(UserWarning, match=r"Narrow.* cannot be compiled: .*float16"):
        opt = MetaOptimizer(start(), **options)
    assert list(opt.unfused) == ["dense"]
    assert_close(run_fused(opt), run_core(mo.MetaOptimize(**options), start()), "float64")
    with pytest.raises(ValueError, match=r"no kernel for 'dense': .*cannot be compiled"):
        MetaOptimizer(start(), fused=True, **options)


@needs_numba
@pytest.mark.parametrize("discount", [1.0, (0.9, 1.0)])
@pytest.mark.parametrize("blocks", ["tensor", "node", "weight"])
def test_what_is_not_finite_never_reaches_the_step_sizes(blocks: str, discount: Any) -> None:
    """Kernels restart traces as the core's function on arrays does, the step after."""

    def run(rule: Any, **more: Any) -> Any:
        options = configured(base=rule, blocks=blocks, discount=discount)
        opt = MetaOptimizer(start(), **options, **more)
        for t in range(8):
            grads = gradient(t, opt.params)
            if t == 3:
                grads["dense"][1, 2] = np.inf
            opt.step(grads)
            if t == 3:  # what the infinity has spoiled is repaired by hand, but for the trace
                for array in (opt.params["dense"], *opt.state.slots["dense"].values()):
                    array[~np.isfinite(array)] = 0.0
        return opt

    opt = run(BASES["SGDm"], fused=True)
    assert np.sum(opt.state.restarts) == 1
    for array in (opt.state.average, opt.step_sizes(), opt.params):
        map_leaves(lambda a: np.testing.assert_array_equal(np.isfinite(a), True), array)
    with pytest.warns(UserWarning, match="says no `scope`"):
        slow = run(Opaque(BASES["SGDm"]))
    assert_close((opt.params, opt.state), (slow.params, slow.state), "float64", steps=8)


@needs_numba
@pytest.mark.parametrize("blocks", ["tensor", "weight"])
def test_all_traces_of_a_block_start_anew_where_one_product_is_not_finite(blocks: str) -> None:
    opt = MetaOptimizer(
        start(),
        fused=True,
        **configured(base=mo.SGD(), blocks=blocks, discount=(0.9, 1.0)),
    )
    run_fused(opt, 2)
    opt.state.average["bias"][1] = 1e308  # so far away that the product with it alone is not finite
    opt.step(map_leaves(lambda grad: 10.0 * np.ones_like(grad), opt.params))
    size = float(np.size(opt.state.meta_count["bias"] if blocks == "weight" else 1))
    assert opt.state.restarts.sum() == size
    weights = map_leaves(np.array, opt.params)
    opt.step(gradient(3, opt.params))
    for average in opt.state.average["bias"]:  # which begins at the weights of this step
        np.testing.assert_array_equal(average, weights["bias"])
    assert not np.array_equal(opt.state.average["dense"][1], weights["dense"])


# --- arrays of every kind


def laid_out(kind: str, array: Any) -> Any:
    """Return an array of these entries that lies in memory in another way."""
    if kind == "strided":
        wide = np.zeros((*array.shape, 3), array.dtype)
        wide[..., 1] = array
        return wide[..., 1]
    if kind == "reversed":
        return np.array(array[..., ::-1])[..., ::-1] if array.ndim else array
    if kind == "fortran":
        return np.array(array, order="F")
    return array.astype(array.dtype.newbyteorder())


@needs_numba
@pytest.mark.parametrize("discount", [1.0, (0.9, 1.0)])
@pytest.mark.parametrize("blocks", ["scalar", "node", "weight"])
@pytest.mark.parametrize("kind", ["strided", "reversed", "fortran", "swapped"])
def test_arrays_need_not_be_contiguous(kind: str, blocks: str, discount: Any) -> None:
    options = configured(base=BASES["AdamW"], blocks=blocks, discount=discount)
    plain = MetaOptimizer(start(), fused=True, **options)
    own = start() if kind == "swapped" else map_leaves(lambda a: laid_out(kind, a), start())
    arrays = dict(own)
    opt = MetaOptimizer(own, fused=True, **options)
    for t in range(STEPS):
        opt.step(map_leaves(lambda a: laid_out(kind, a), gradient(t, opt.params)))
        plain.step(gradient(t, plain.params))
    assert contents(opt.params) == contents(plain.params)
    assert all(arrays[name] is param for name, param in opt.params.items())


@needs_numba
def test_gradients_of_other_dtypes_are_cast() -> None:
    options = configured(base=BASES["AdamW"])
    opt, params = MetaOptimizer(start("float32"), fused=True, **options), start("float32")
    core = mo.MetaOptimize(**options)
    state = core.init(params)
    for dtype in ("float64", "float16", "float32"):
        grads = {name: np.asarray(grad, dtype) for name, grad in gradient(1, params).items()}
        opt.step(grads)
        params, state = core.step(params, grads, state)
    assert_close((opt.params, opt.state), (params, state), "float32", steps=3)


@needs_numba
def test_gradients_may_be_parameters_themselves() -> None:
    """Of the product of two leaves, say: a step must not read what it has written."""
    options = configured(base=BASES["SGDm"], blocks="tensor")
    n = 40000  # several chunks
    params = {"a": np.linspace(-1.0, 2.0, n), "b": np.linspace(3.0, 1.0, n), "c": np.arange(3.0)}
    core, pure = mo.MetaOptimize(**options), map_leaves(np.array, params)
    state = core.init(pure)
    opt = MetaOptimizer(params, fused=True, **options)
    for _ in range(3):
        opt.step({"a": params["b"], "b": params["a"], "c": params["c"]})
        pure, state = core.step(pure, {"a": pure["b"], "b": pure["a"], "c": pure["c"]}, state)
    assert_close((params, opt.state), (pure, state), "float64", steps=3)


@needs_numba
def test_parameters_may_lie_between_each_other() -> None:
    """And gradients between them: what a leaf writes is not read by the next."""
    whole = np.arange(40.0).reshape(10, 4) + 1.0
    params = {"a": whole[:, :2], "b": whole[0, 2:], "c": np.ones(2)}
    rules = {"[ab]": mo.SGD(), "c": mo.SGD(weight_decay=0.5)}
    options = configured(base=rules, blocks="tensor")
    core, pure = mo.MetaOptimize(**options), map_leaves(np.array, params)
    state = core.init(pure)
    opt = MetaOptimizer(params, fused=True, **options)
    for _ in range(3):
        opt.step({"a": np.ones((10, 2)), "b": np.ones(2), "c": whole[5, :2]})
        pure, state = core.step(
            pure, {"a": np.ones((10, 2)), "b": np.ones(2), "c": pure["a"][5]}, state
        )
    assert_close((params, opt.state), (pure, state), "float64", steps=3)


@needs_numba
def test_a_sequence_is_named_by_position() -> None:
    params = list(start().values())
    opt = MetaOptimizer(params, fused=True, **configured(base=mo.SGD(), blocks="tensor"))
    opt.step([np.ones_like(param) for param in params])
    assert list(opt.step_sizes()) == ["0", "1", "2", "3", "4"]
    assert opt.params["0"] is params[0]
    with pytest.raises(ValueError, match="`grads` lacks leaf '4'"):
        opt.step(params[:4])


@needs_numba
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_multipliers_may_be_arrays(library: str) -> None:
    """Those of the host are numbers, whatever the library."""
    kind: Any = np.asarray
    if library == "torch":
        torch = pytest.importorskip("torch")
        kind = functools.partial(torch.tensor, dtype=torch.float64)
    elif library == "jax":
        kind = pytest.importorskip("jax.numpy").asarray
    options = configured(base=BASES["AdamW"], blocks="tensor")
    ours, theirs = (MetaOptimizer(start(), fused=True, **options) for _ in range(2))
    for lr in (0.5, 0.0, 1.0, 1e-60):
        ours.step(gradient(0, ours.params), lr=kind(lr))
        theirs.step(gradient(0, theirs.params), lr=lr)
    assert contents(ours.params) == contents(theirs.params)
    assert contents(ours.state) == contents(theirs.state)
    with pytest.raises(ValueError, match=r"`lr.*` must be a finite number"):
        ours.step(gradient(0, ours.params), lr=kind(-1.0))
    with pytest.raises(TypeError, match="`lr` must be of real numbers"):
        ours.step(gradient(0, ours.params), lr=kind(1.0) > 0.0)


@needs_numba
def test_many_leaves_and_many_chunks() -> None:
    """More leaves, weights and rows than a kernel takes at a time."""
    rng = np.random.default_rng(0)
    shapes: dict[str, Any] = {
        f"leaf{i}": (int(rng.integers(1, 9)), int(rng.integers(1, 9))) for i in range(150)
    }
    shapes |= {"long": (3 * cpu.Cpu.chunk + 1,), "rows": (3, cpu.Cpu.chunk + 7)}
    for blocks in ("scalar", "node", "weight"):
        discount = {"discount": (0.9, 1.0)}
        options = configured(base=BASES["AdamW"], blocks=blocks, meta=mo.SGD()) | discount
        opt, params = (
            MetaOptimizer(start(shapes=shapes), fused=True, **options),
            start(shapes=shapes),
        )
        core = mo.MetaOptimize(**options)
        state = core.init(params)
        for t in range(3):
            opt.step(gradient(t, opt.params))
            params, state = core.step(params, gradient(t, params), state)
        assert_close((opt.params, opt.state), (params, state), "float64", steps=3)


@needs_numba
def test_optimizers_step_in_threads() -> None:
    options = configured(base=BASES["AdamW"])
    wide = {"w": (200_000,)}

    def run(_: int) -> Any:
        opt = MetaOptimizer(start(shapes=wide), fused=True, **options)
        for t in range(5):
            opt.step(gradient(t, opt.params))
        return contents(opt.params)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(8)))
    assert all(one == found[0] for one in found)


# --- what a user sees of it


@needs_numba
def test_kernels_are_compiled_once_a_formula() -> None:
    from metaopt_kernels import numba_tools

    options = configured(base=mo.AdamW(betas=(0.71, 0.72)))
    opt = MetaOptimizer(start(), fused=True, **options)
    run_fused(opt)
    known = numba_tools._compiled.cache_info()
    for blocks in ("tensor", "node"):  # the leaf () has no axis: its weight is a unit
        run_fused(MetaOptimizer(start(), fused=True, **(options | {"blocks": blocks})))
    assert numba_tools._compiled.cache_info().misses == known.misses
    assert known.maxsize is not None  # a search over hyperparameters compiles one after the other


FORKED = """
import os, signal, sys, threading
import numpy as np
import metaopt as mo
from metaopt_kernels import MetaOptimizer

def made(size):
    w = np.ones(size)
    return w, MetaOptimizer({"w": w}, base=mo.AdamW(), meta=mo.SGD(), step_size=0.1, fused=True)

few, small = made(3)
before = len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
small.step({"w": few})
if before:
    assert len(os.listdir("/proc/self/task")) == before, "a small step has started threads"
many, large = made(200_000)
if sys.argv[1] == "after threads":
    large.step({"w": many})
if sys.argv[1] == "in a step":
    large.step({"w": many})
    from metaopt_kernels import numba_tools
    numba_tools._running.acquire()  # as another thread holds it
    numba_tools._compiling.acquire()
child = os.fork()
if not child:
    signal.alarm(60)
    small.step({"w": few})
    large.step({"w": many})
    made(5)[1].step({"w": np.ones(5)})
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("when", ["before threads", "after threads", "in a step"])
def test_a_forked_process_steps(when: str) -> None:
    assert alone(FORKED, "torch", when) == "7\n"


@needs_numba
@pytest.mark.parametrize("discount", [1.0, (0.9, 1.0)])
@pytest.mark.parametrize("blocks", ["tensor", "weight"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_saved_run_goes_on_to_the_last_bit(
    blocks: str, broken: bool, discount: Any, tmp_path: Path
) -> None:
    options = configured(base=BASES["AdamW"], blocks=blocks, discount=discount)
    opt = MetaOptimizer(start(), fused=True, **options)
    run_fused(opt, 3)
    if broken:  # the trace is to restart in the step after
        grads = gradient(3, opt.params)
        grads["bias"][:] = np.nan
        opt.step(grads)
    opt.save(tmp_path / "run")
    again = MetaOptimizer.load(tmp_path / "run", map_leaves(np.array, opt.params), fused=True)
    assert again.config == opt.config
    config, state = mo.load(tmp_path / "run", opt.params)
    assert config == opt.config
    assert contents(state) == contents(opt.state)
    for one in (opt, again):
        run_fused(one, 4)
    assert contents(again.params) == contents(opt.params)
    assert contents(again.state) == contents(opt.state)


@needs_numba
@pytest.mark.parametrize("discount", [1.0, (0.9, 1.0)])
def test_a_run_of_the_core_goes_on_in_one_pass(discount: Any, tmp_path: Path) -> None:
    core = mo.MetaOptimize(**configured(base=BASES["AdamW"], blocks="node", discount=discount))
    params, state = run_core(core, start())
    mo.save(tmp_path / "run", core, state)
    opt = MetaOptimizer.load(tmp_path / "run", map_leaves(np.array, params), fused=True)
    for t in range(STEPS):
        params, state = core.step(params, state=state, **inputs(t, params))
    assert_close(run_fused(opt), (params, state), "float64", steps=2 * STEPS)


@needs_numba
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("fused", [True, False])
def test_copies_are_apart(duplicate: Any, fused: bool) -> None:
    opt = MetaOptimizer(start(), fused=fused, **configured(base=BASES["AdamW"]))
    run_fused(opt, 2)
    other = duplicate(opt)
    before = contents(other.params), contents(other.state)
    run_fused(opt, 2)
    assert (contents(other.params), contents(other.state)) == before
    run_fused(other, 2)
    assert contents(other.params) == contents(opt.params)
    assert contents(other.state) == contents(opt.state)


@needs_numba
@pytest.mark.parametrize("discount", [1.0, (0.9, 1.0)])
def test_the_state_is_the_cores(discount: Any) -> None:
    options = configured(base=BASES["AdamW"], blocks="tensor", discount=discount)
    opt = MetaOptimizer(start(), fused=True, **options)
    params, state = run_fused(opt)
    core = mo.MetaOptimize(**options)
    assert opt.config == core
    assert contents(opt.step_sizes()) == contents(core.step_sizes(state))
    assert contents(opt.diagnostics()) == contents(core.diagnostics(state, params))
    core.step(params, gradient(0, params), state)  # takes it as one of its own


@needs_numba
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("blocks", ["scalar", "weight"])
@pytest.mark.parametrize("base", [BASES["AdamW"], mo.Averaged(BASES["AdamW"])], ids=["", "own"])
def test_averages_equal_the_cores(base: Any, blocks: str, fused: bool) -> None:
    """Of narrow leaves, which keep traces, and through rest and schedules."""
    options = configured(base=base, blocks=blocks, discount=(0.8, 1.0))
    core, params = mo.MetaOptimize(**options), start("float32")
    state, opt = core.init(params), MetaOptimizer(start("float32"), fused=fused, **options)
    assert contents(opt.averaged_params()) == contents(params)
    for t in range(2 * STEPS):
        params, state = core.step(params, state=state, **inputs(t, params))
        opt.step(**inputs(t, opt.params))
    found, before = opt.averaged_params(), contents(opt.params)
    for name, average in core.averaged_params(state, params).items():
        allowed = tolerances.rounding("float32", operations=60, steps=2 * STEPS)
        assert found[name].dtype == average.dtype
        assert tolerances.relative_error(found[name], average) <= allowed
        found[name][...] = 0.0  # they are the caller's own
    assert contents(opt.params) == before


def test_there_are_no_averages_without_a_discount_below_1() -> None:
    opt = MetaOptimizer({"w": np.ones(3)}, base=mo.SGD(), meta=mo.SGD(), fused=False, discount=1.0)
    with pytest.raises(ValueError, match="need a `discount` below 1"):
        opt.averaged_params()


def test_examples_in_docstrings_run() -> None:
    found = doctest.testmod(importlib.import_module("metaopt_kernels.optimizer"))
    assert found.attempted > 0
    assert found.failed == 0


BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "missing": ({"grads": {"w": np.ones(3)}}, ValueError, "`grads` lacks leaf 'b'"),
    "unknown": (
        {"grads": {"w": np.ones(3), "b": np.ones(2), "c": np.ones(1)}},
        ValueError,
        "unknown leaf 'c'",
    ),
    "shape": (
        {"grads": {"w": np.ones(3), "b": np.ones(3)}},
        ValueError,
        r"`grads\['b'\]` has shape \(3,\); expected \(2,\)",
    ),
    "integers": (
        {"grads": {"w": np.ones(3), "b": np.ones(2, int)}},
        TypeError,
        r"`grads\['b'\]` must be real and floating; got dtype int64",
    ),
    "no array": (
        {"grads": {"w": np.ones(3), "b": 1.0}},
        TypeError,
        "`grads\\['b'\\]` must be an array",
    ),
    "no mapping": ({"grads": np.ones(3)}, TypeError, "`grads` must be a mapping"),
    "lr": ({"grads": {"w": np.ones(3), "b": np.ones(2)}, "lr": -1.0}, ValueError, "`lr` must be"),
    "lr by name": (
        {"grads": {"w": np.ones(3), "b": np.ones(2)}, "lr": {"w": 1.0}},
        ValueError,
        "`lr` lacks leaf 'b'",
    ),
}


@needs_numba
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named_and_changes_nothing(name: str, fused: bool) -> None:
    arguments, error, message = BAD[name]
    params = {"w": np.ones(3), "b": np.ones(2)}
    opt = MetaOptimizer(params, base=mo.AdamW(), meta=mo.AdamW(), fused=fused, discount=1.0)
    opt.step({"w": np.ones(3), "b": np.ones(2)})
    before = contents(params), contents(opt.state)
    with pytest.raises(error, match=message):
        opt.step(**arguments)
    assert (contents(params), contents(opt.state)) == before


def shaped(array: Any) -> None:
    array.shape = (2, 2)


def retyped(array: Any) -> None:
    array.dtype = np.float32


def locked(array: Any) -> None:
    array.flags.writeable = False


#: What is done to a parameter in place, and what of its layout it changes.
CHANGED: dict[str, tuple[Any, str]] = {
    "grown": (lambda array: array.resize(10_000, refcheck=False), "address|shape"),
    "shrunk": (lambda array: array.resize(1, refcheck=False), "address|shape"),
    "reshaped": (shaped, "shape"),
    "of another dtype": (retyped, "shape|dtype"),
    "read-only": (locked, "writable"),
}


@needs_numba
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", CHANGED)
def test_a_parameter_that_is_laid_out_otherwise_is_not_stepped(name: str, fused: bool) -> None:
    """A kernel would write past its memory; it is named, and nothing moves."""
    change, what = CHANGED[name]
    params = {"w": np.ones(3), "b": np.ones(4)}
    opt = MetaOptimizer(params, base=mo.AdamW(), meta=mo.AdamW(), fused=fused, discount=1.0)
    opt.step({"w": np.ones(3), "b": np.ones(4)})
    change(params["b"])
    before = contents(params), contents(opt.state)
    for grad in (np.ones(4), np.ones_like(params["b"], dtype=float)):
        with pytest.raises(ValueError, match=rf"`params\['b'\]` has another ({what})"):
            opt.step({"w": np.ones(3), "b": grad})
    assert (contents(params), contents(opt.state)) == before


def test_the_layout_of_an_array_on_a_device_has_its_address() -> None:
    """As of CuPy's arrays, which know of no read-only memory."""
    own = {"shape": (3,), "strides": (4,), "dtype": np.dtype("float32")}
    array = SimpleNamespace(data=SimpleNamespace(ptr=64), flags=SimpleNamespace(), **own)
    assert memory.layout(array) == (64, *own.values(), True)


@dataclass(frozen=True)
class Broken:
    """A meta rule that fails."""

    slots = ()
    weight_decay: float = 0.0

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
        msg = "no such luck"
        raise RuntimeError(msg)


@needs_numba
@pytest.mark.parametrize("blocks", ["tensor", "weight"])
def test_a_meta_rule_that_fails_does_so_before_any_step(blocks: str) -> None:
    with pytest.raises(RuntimeError, match="no such luck"):
        MetaOptimizer(
            start(), base=mo.SGD(), meta=Broken(), fused=True, blocks=blocks, discount=1.0
        )


def read_only() -> Any:
    array = np.ones(3)
    array.flags.writeable = False
    return array


WHOLE = np.ones(6)
SQUARE = np.ones((4, 4))
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "empty": ({}, ValueError, "`params` must hold at least one array"),
    "number": (
        {"w": 1.0},
        TypeError,
        r"`params\['w'\]` must be an array of CuPy or NumPy; got float",
    ),
    "one array": (np.ones(3), TypeError, "`params` must be a mapping of name to array, or a seq"),
    "integers": ({"w": np.ones(3, int)}, TypeError, "must be real and floating"),
    "read-only": ({"w": read_only()}, ValueError, r"`params\['w'\]` is read-only"),
    "twice": ({"a": WHOLE, "b": WHOLE}, ValueError, "'a' and 'b' share memory"),
    "part": ({"a": WHOLE, "b": WHOLE[4:]}, ValueError, "'a' and 'b' share memory"),
    "transposed": ({"a": SQUARE, "b": SQUARE.T}, ValueError, "'a' and 'b' share memory"),
    "every other": ({"a": WHOLE, "b": WHOLE[::2]}, ValueError, "'b' and 'a' share memory"),
    "columns": (
        {"a": SQUARE[:, :2], "x": np.ones(3), "b": SQUARE[:, 3], "c": SQUARE[2:, 1:3]},
        ValueError,
        "'a' and 'c' share memory",
    ),
    "itself": (
        {"a": np.lib.stride_tricks.as_strided(WHOLE, (3, 2), (8, 8))},
        ValueError,
        r"`params\['a'\]` shares memory among its own entries",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parameters_that_cannot_be_optimized_are_refused(name: str) -> None:
    params, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        MetaOptimizer(params, base=mo.SGD(), meta=mo.SGD(), fused=False, discount=1.0)


def test_options_are_those_of_the_core() -> None:
    with pytest.raises(TypeError, match="speed"):
        MetaOptimizer({"w": np.ones(3)}, base=mo.SGD(), meta=mo.SGD(), speed=3, discount=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="`discount` must be"):
        MetaOptimizer({"w": np.ones(3)}, base=mo.SGD(), meta=mo.SGD(), discount=2.0)
    with pytest.raises(
        ValueError, match=r"`fused` is True, but .*`meta_first` takes more than one"
    ):
        MetaOptimizer(
            {"w": np.ones(3)},
            base=mo.SGD(),
            meta=mo.SGD(),
            meta_first=True,
            fused=True,
            discount=1.0,
        )


# --- arrays of other libraries


class Elsewhere:
    """An array on a device that this machine need not have."""

    shape, dtype = (3,), np.dtype("float32")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 1

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError


def test_the_error_for_another_device_names_both() -> None:
    params = {"w": np.ones(3, "float32")}
    opt = MetaOptimizer(params, base=mo.SGD(), meta=mo.SGD(), fused=False, discount=1.0)
    with pytest.raises(ValueError, match=r"`grads\['w'\]` is on cuda:1, but its parameter on cpu"):
        opt.step({"w": Elsewhere()})
    with pytest.raises(ValueError, match=r"'a' is on cpu, but 'b' on cuda:1"):
        MetaOptimizer({"a": np.ones(3), "b": Elsewhere()}, base=mo.SGD(), meta=mo.SGD())


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_parameters_of_a_gpu_say_that_they_need_cupy() -> None:
    with pytest.raises(ImportError, match="parameters on cuda:1 need CuPy, which is not installed"):
        MetaOptimizer({"w": Elsewhere()}, base=mo.SGD(), meta=mo.SGD())


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_gradients_are_shared_without_a_copy(library: str) -> None:
    pytest.importorskip(library)
    if library == "torch":
        import torch

        arrays: list[Any] = [torch.arange(6.0).reshape(2, 3), torch.ones(3, 2).T, torch.ones(2, 3)]
        arrays[2].requires_grad_()
        where = [tensor.data_ptr() for tensor in arrays]
    else:
        import jax

        arrays = [jax.numpy.arange(6.0, dtype="float32").reshape(2, 3)]
        where = [array.unsafe_buffer_pointer() for array in arrays]
    like = np.ones((2, 3), "float32")
    for array, pointer in zip(arrays, where, strict=True):
        assert address(shared("grad", array, like, np)) == pointer
    fixed: dict[str, Any] = {"step_size": 0.5, "meta_lr": 0.0}
    opt = MetaOptimizer({"w": like.copy()}, base=mo.SGD(), meta=mo.SGD(), fused=False, **fixed)
    for array in arrays:
        opt.step({"w": array})
    want = 1.0 - 0.5 * sum(np.asarray(a.detach() if library == "torch" else a) for a in arrays)
    np.testing.assert_allclose(opt.params["w"], want, rtol=1e-5)


def test_bfloat16_is_nothing_numpy_can_read() -> None:
    torch = pytest.importorskip("torch")
    opt = MetaOptimizer(
        {"w": np.ones(3, "float32")}, base=mo.SGD(), meta=mo.SGD(), fused=False, discount=1.0
    )
    with pytest.raises(TypeError, match=r"`grads\['w'\]`, a torch.Tensor, cannot be shared"):
        opt.step({"w": torch.ones(3, dtype=torch.bfloat16)})


@needs_numba
def test_tensors_of_torch_are_stepped_where_they_lie() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    params = dict(model.named_parameters())
    start = {name: param.detach().clone().numpy() for name, param in params.items()}
    opt = MetaOptimizer(
        params, base=mo.AdamW(), meta=mo.AdamW(), step_size=0.1, fused=True, discount=1.0
    )
    core = mo.MetaOptimize(base=mo.AdamW(), meta=mo.AdamW(), step_size=0.1, discount=1.0)
    model(torch.ones(4, 3)).square().sum().backward()
    opt.step({name: param.grad for name, param in params.items()})
    grads = {name: param.grad.numpy() for name, param in params.items()}
    want, _ = core.step(start, grads, core.init(start))
    for name, param in params.items():
        error = tolerances.relative_error(param.detach().numpy(), want[name])
        assert error <= tolerances.rounding("float32", operations=60)


def of_torch(fused: bool) -> Any:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    params = dict(model.named_parameters())
    opt = MetaOptimizer(
        params, base=mo.SGD(), meta=mo.SGD(), step_size=0.5, fused=fused, discount=1.0
    )
    return torch, model, opt


def ones_like(model: Any) -> Any:
    return {name: np.ones(tuple(param.shape), "f4") for name, param in model.named_parameters()}


@needs_numba
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("fused", [True, False])
def test_copies_of_a_module_and_its_optimizer_belong_together(duplicate: Any, fused: bool) -> None:
    _, model, opt = of_torch(fused)
    before = model.weight.detach().clone()
    twin, other = duplicate((model, opt))
    other.step(ones_like(twin))
    np.testing.assert_array_equal(twin.weight.detach(), before - 0.5)
    np.testing.assert_array_equal(model.weight.detach(), before)


@needs_numba
@pytest.mark.parametrize("fused", [True, False])
def test_a_tensor_that_lies_elsewhere_by_now_is_not_stepped_where_it_lay(
    fused: bool, tmp_path: Path
) -> None:
    torch, model, opt = of_torch(fused)
    opt.step(ones_like(model))
    model.bias.data = torch.zeros(2)
    with pytest.raises(ValueError, match=r"`params\['bias'\]` lies elsewhere"):
        opt.step(ones_like(model))
    assert int(opt.state.step) == 1
    opt.save(tmp_path / "run")  # what the message says
    again = MetaOptimizer.load(tmp_path / "run", dict(model.named_parameters()), fused=fused)
    again.step(ones_like(model))
    assert model.bias.tolist() == [-0.5, -0.5]


@needs_numba
@pytest.mark.parametrize("fused", [True, False])
def test_autograd_is_told_what_a_step_has_written(fused: bool) -> None:
    _, model, opt = of_torch(fused)
    loss = (model.weight * model.weight).sum() + (model.bias * model.bias).sum()
    versions = model.weight._version, model.bias._version
    opt.step({"weight": np.ones((2, 3), "f4"), "bias": None})
    assert model.weight._version > versions[0]
    assert model.bias._version == versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_arrays_of_jax_cannot_be_written_to() -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(ValueError, match=r"`params\['w'\]` is read-only"):
        MetaOptimizer(
            {"w": jax.numpy.ones(3)}, base=mo.SGD(), meta=mo.SGD(), fused=False, discount=1.0
        )


def test_a_configuration_of_the_core_goes_in() -> None:
    config = mo.presets.hypergradient("sgd", multiplicative=True)
    opt = from_config(config, {"w": np.ones(3)}, fused=False)
    assert opt.config == config
    opt.step({"w": np.ones(3)})
    with pytest.raises(TypeError, match="`config` must be a metaopt"):
        from_config({"base": "sgd"}, {"w": np.ones(3)})  # type: ignore[arg-type]


# --- what is not installed


HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{}":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
"""


def alone(program: str, missing: str, *arguments: str) -> str:
    """Run a program in a process in which a package cannot be imported; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN.format(missing) + program, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PROGRAM = """
import warnings
import numpy as np
import metaopt as mo
from metaopt_kernels import MetaOptimizer

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    opt = MetaOptimizer({"w": np.ones(3)}, base=mo.SGD(), meta=mo.SGD(), step_size=0.5)
    quiet = len(caught)
    MetaOptimizer({"w": np.ones(3)}, base=mo.SGD(), meta=mo.SGD(), fused=False)
    assert len(caught) == quiet
opt.step({"w": np.ones(3)})
print(*[str(w.message) for w in caught], opt.unfused, opt.params["w"].tolist())
"""


def test_without_numba_numpy_runs_unfused_and_says_so() -> None:
    out = alone(PROGRAM, "numba")
    assert "in place of a kernel: numba is not installed" in out
    assert "{'w': 'numba is not installed'} [0.5, 0.5, 0.5]" in out


@needs_numba
def test_without_cupy_numpy_is_fused() -> None:
    assert alone(PROGRAM, "cupy").split() == ["{}", "[0.5,", "0.5,", "0.5]"]


def test_importing_it_imports_neither() -> None:
    program = "import metaopt_kernels; print('numba' in sys.modules, 'cupy' in sys.modules)"
    assert alone(program, "torch").split() == ["False", "False"]
