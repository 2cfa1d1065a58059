"""The CUDA of metaopt_kernels: compiled as C++ and run on the host, by nvcc, and on a GPU.

On the host a block's threads are threads, its barrier a barrier and its shared memory static: the
very text that a GPU gets runs, tables, reductions and all, and is compared with the core.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metaopt_conformance import table, tolerances
from metaopt_conformance.backends import UnavailableError, find
from metaopt_conformance.cases import Case
from metaopt_conformance.suite import run
from metaopt_conformance.translate import contents, values_of
from metaopt_kernels import MetaOptimizer, gpu
from metaopt_kernels.pool import Pool
from metaopt_kernels.programs import Spec, trace

import metaopt as mo
from metaopt.arrays import map_leaves
from metaopt.inputs import multipliers
from tests.on_demand import slow_but

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is found")

#: What CUDA has and C++ has not. Blocks run one after the other, a thread for each of theirs.
SHIM = """
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>
#define __global__
#define __device__ static
#define __shared__ static
struct Index { int x; };
static thread_local Index threadIdx, blockIdx;
static std::barrier<>* meeting;
static void __syncthreads() { meeting->arrive_and_wait(); }
template <class Kernel> void on_host(int blocks, int threads, Kernel kernel)
{
    std::barrier<> all(threads);
    meeting = &all;
    std::vector<std::thread> crew;
    for (int thread = 0; thread < threads; ++thread)
        crew.emplace_back([=] {
            threadIdx.x = thread;
            for (int block = 0; block < blocks; ++block) {
                blockIdx.x = block;
                kernel();
                __syncthreads();
            }
        });
    for (auto& thread : crew) thread.join();
}
"""

#: In place of CUDA's header: float16 as the processor converts it.
HALF = """
#include <immintrin.h>
struct half
{
    unsigned short bits;
    half() = default;
    half(float value) : bits(_cvtss_sh(value, 0)) {}
    operator float() const { return _cvtsh_ss(bits); }
};
"""

SIGNATURE = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')


class HostModule:
    """A `cupy.RawModule` whose kernels run on the host."""

    def __init__(self, code: str, options: tuple[str, ...]) -> None:
        standard = [option for option in options if option.startswith("--std")]
        launchers = [self._launcher(*found.groups()) for found in SIGNATURE.finditer(code)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            (path / "cuda_fp16.h").write_text(HALF)
            (path / "kernel.cpp").write_text(SHIM + code + "\n".join(launchers))
            assert standard == ["--std=c++17"]  # the shim's barrier is of C++20
            flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-Wall", "-Werror"]
            flags += ["-Wl,-Bsymbolic"]  # the C library has a `step` too
            flags += ["-mf16c"] if "cuda_fp16" in code else []
            done = subprocess.run(
                [
                    str(COMPILER),
                    *flags,
                    f"-I{path}",
                    "-o",
                    f"{path}/kernel.so",
                    f"{path}/kernel.cpp",
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            self._library = ctypes.CDLL(f"{path}/kernel.so")

    def _launcher(self, name: str, parameters: str) -> str:
        names = [parameter.split()[-1].lstrip("*") for parameter in parameters.split(",")]
        return (
            f'\nextern "C" void launch_{name}(int blocks, int threads, {parameters})\n'
            f"{{ on_host(blocks, threads, [=] {{ {name}({', '.join(names)}); }}); }}\n"
        )

    def get_function(self, name: str) -> Any:
        launch = self._library[f"launch_{name}"]

        def call(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            launch(grid[0], block[0], *map(_argument, arguments))

        return call


def _argument(value: Any) -> Any:
    """Return an argument as CuPy passes it: arrays by address, but the host's of one entry."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "V":
        numbers = value.view(np.int64)
        kind: Any = type(
            "Rows", (ctypes.Structure,), {"_fields_": [("at", ctypes.c_int64 * numbers.size)]}
        )
        return kind.from_buffer_copy(numbers.tobytes())
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.__array_interface__["data"][0])
    return np.ctypeslib.as_ctypes_type(value.dtype)(value.item())


class HostCupy:
    """NumPy in the part of CuPy."""

    RawModule = HostModule

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


HOST = gpu.Gpu(HostCupy())  # modules are compiled once


class OnHost:
    """An adapter for the suite: the pool of `metaopt_kernels` with a GPU that is the host."""

    def __init__(self, opt: mo.MetaOptimize, params: Any, engine: Any = HOST) -> None:
        self._params = map_leaves(np.array, params)
        self.plan = opt.plan(self._params)
        self._pool = Pool(opt, self.plan, self._params, opt.init(self._params), engine)
        assert not self._pool.unfused

    def step(self, grads: Any, lr: Any = 1.0, **_: Any) -> None:
        self._pool.step(grads, multipliers(lr, self.plan.shapes))

    def params(self) -> Any:
        return self._params

    def state(self) -> mo.State:
        return self._pool.state


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host has few cores for the threads of a block."""
    monkeypatch.setattr(gpu, "THREADS", 8)


RULES: dict[str, Any] = {
    **table.BASES,
    "eps=0": mo.AdamW(betas=(0.8, 0.0), eps=0.0),
    **{
        f"{name}, delayed": replace(rule, delayed=True)
        for name, rule in table.BASES.items()
        if table.has(rule, "delayed")
    },
}
SHAPES: dict[str, tuple[int, ...]] = {"conv": (4, 3, 2, 2), "bias": (5,), "gain": (), "no": (0, 2)}
STEPS = 5


def start(dtype: str, shapes: Any = SHAPES) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def gradient(t: int, params: Any, dtype: Any = None) -> dict[str, Any]:
    return {
        name: np.asarray(np.sin(param + 0.3 * t) + 0.1 * param, dtype or param.dtype)
        for name, param in params.items()
    }


def compare(opt: mo.MetaOptimize, dtype: str, *, engine: Any = HOST, grad: Any = None) -> None:
    """Run kernels on the host beside the core, on every kind of leaf and step."""
    params = start(dtype)
    ours, state = OnHost(opt, params, engine), opt.init(params)
    for t in range(STEPS):
        # both from the kernels' parameters: those of float16 may be rounded to either side
        params = map_leaves(np.array, ours.params())
        grads: dict[str, Any] = gradient(t, params, grad)
        if t == 2:
            grads["bias"] = None
        lr: Any = {"conv": 1.0, "bias": 0.0, "gain": np.asarray(0.5), "no": 0.1} if t == 3 else 0.5
        ours.step(grads, lr)
        params, state = opt.step(params, grads, state, lr=lr)
    wide = "float64" if dtype == "float64" else "float32"

    def close(got: Any, want: Any) -> None:
        assert got.dtype == want.dtype
        own = tolerances.rounding(got.dtype.name, 1) if got.dtype.kind == "f" else 0.0
        allowed = max(own, tolerances.rounding(wide, operations=60, steps=STEPS))
        assert tolerances.relative_error(got, want) <= allowed

    map_leaves(close, ours.params(), params)
    found = values_of(ours.state())
    for name, value in values_of(state).items():
        map_leaves(close, found[name], value)


@needs_compiler
@pytest.mark.parametrize("blocks", ["tensor", "weight"])
@pytest.mark.parametrize("rule", slow_but(["AdamW", "SGDm, delayed", "Lion"], RULES))
def test_every_rule_on_the_host_equals_the_core(rule: str, blocks: str) -> None:
    opt = mo.MetaOptimize(
        base=RULES[rule], meta=mo.AdamW(), step_size=0.05, blocks=blocks, discount=1.0
    )
    compare(opt, "float32")


@needs_compiler
@pytest.mark.parametrize("grad", slow_but(["float32"], [None, "float32", "float64"]))
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_every_dtype_on_the_host_equals_the_core(dtype: str, grad: Any) -> None:
    compare(
        mo.MetaOptimize(base=RULES["AdamW"], meta=mo.Lion(), step_size=0.05, discount=1.0),
        dtype,
        grad=grad,
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "discounts": {"discount": (0.9, 1.0)},
    "discounts by node": {"discount": (0.8, 0.9, 1.0), "blocks": "node"},
    "discounts by weight": {"discount": (0.9, 1.0), "blocks": "weight"},
    "node": {"blocks": "node"},
    "last axis": {"blocks": mo.blocks.node(-1)},
    "groups": {"blocks": {"biases": "bias", "rest": "*"}, "discount": 0.9},
    "hypergradient": {"discount": 0.0},
    "sigmoid": {"sigma": mo.Sigmoid(1e-3, 0.5)},
    "rules": {"base": {"conv": mo.Lion(), "*": RULES["AdamW"]}, "bounds": (0.04, 0.06)},
}


@needs_compiler
@pytest.mark.parametrize("name", OPTIONS)
def test_options_on_the_host_equal_the_core(name: str) -> None:
    options: dict[str, Any] = {
        "base": RULES["AdamW"],
        "meta": mo.AdamW(),
        "step_size": 0.05,
        "discount": 1.0,
    }
    compare(mo.MetaOptimize(**(options | OPTIONS[name])), "float32")


@needs_compiler
@pytest.mark.parametrize("blocks", slow_but(["node"], ["scalar", "node"]))
def test_many_leaves_and_chunks(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More leaves than a launch takes, more chunks than threads, leaves without any."""
    monkeypatch.setattr(gpu.Gpu, "chunk", 16)
    shapes: dict[str, tuple[int, ...]] = {f"leaf{i}": (i % 4, 3) for i in range(2 * gpu.ROWS + 3)}
    shapes["long"] = (1000,)
    opt = mo.MetaOptimize(
        base=RULES["SGDm"], meta=mo.SGD(), step_size=0.05, blocks=blocks, discount=1.0
    )
    params = start("float64", shapes)
    ours, state = OnHost(opt, params), opt.init(params)
    for t in range(3):
        grads: dict[str, Any] = gradient(t, params)
        grads["leaf70"] = None
        ours.step(grads)
        params, state = opt.step(params, grads, state)
    allowed = tolerances.rounding("float64", operations=60, steps=3)
    for name, param in params.items():
        assert tolerances.relative_error(ours.params()[name], param) <= allowed
        assert ours.state().count[name] == state.count[name]
    assert tolerances.relative_error(ours.state().beta, state.beta) <= allowed


@needs_compiler
def test_a_block_of_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert gpu.THREADS == 256
    compare(mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), step_size=0.05, discount=1.0), "float32")


@needs_compiler
def test_the_suite_passes_on_the_host() -> None:
    cases = [
        Case(base="AdamW", meta="Adam", blocks="node", lr="by name", missing=True, discount=0.9),
        Case(base="Lion", meta="Lion", blocks="weight", lr="schedule", bounds="one", start="fast"),
        Case(base="RMSprop", meta="RMSprop", blocks="groups", sigma="softplus", mixed=True),
        Case(base="SGDm", meta="SGD", blocks="tensor", delayed=True, problem="network"),
        Case(base="AdamW", meta="Lion", blocks="node", discount=(0.8, 0.9, 1.0), lr="schedule"),
    ]
    backend = replace(find("numpy"), optimizer=OnHost)
    outcomes = list(run(backend, families=["trajectory"], cases=cases))
    assert [o.detail for o in outcomes if o.status != "passed"] == []
    assert sum(o.family == "adapter" for o in outcomes) == len(cases)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("per_weight", [False, True])
def test_nvcc_takes_the_source(dtype: str, per_weight: bool, tmp_path: Path) -> None:
    spec = Spec(RULES["AdamW"], dtype, dtype, "float32", "float64", per_weight, "trace")
    text = gpu.source(trace(spec), "float32", per_weight=per_weight)
    gather = gpu.GATHER.format(beta="double", threads=gpu.THREADS)
    (tmp_path / "kernel.cu").write_text(text + gather)
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-Werror", "all-warnings", "-ptx", "-o", "kernel.ptx", "kernel.cu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- on a GPU


@pytest.fixture
def cupy() -> Any:
    """Return CuPy; skip with the reason where there is none, or no GPU."""
    try:
        find("cupy")
    except UnavailableError as error:
        pytest.skip(str(error))
    sys.modules.pop("cupy", None)
    return pytest.importorskip("cupy")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("blocks", ["scalar", "node", "weight"])
def test_kernels_on_the_gpu_equal_the_core_on_the_host(
    cupy: Any, blocks: str, dtype: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "base": RULES["AdamW"],
        "meta": mo.AdamW(),
        "step_size": 0.05,
        "discount": 1.0,
    }
    core, params = mo.MetaOptimize(**options, blocks=blocks), start(dtype)
    state = core.init(params)
    opt = MetaOptimizer(
        {name: cupy.asarray(param) for name, param in params.items()},
        **options,
        blocks=blocks,
        fused=True,
    )
    for t in range(STEPS):
        grads = gradient(t, params)
        opt.step({name: cupy.asarray(grad) for name, grad in grads.items()}, lr=cupy.asarray(0.5))
        params, state = core.step(params, grads, state, lr=0.5)
        own = tolerances.rounding(dtype, operations=2 * (t + 1))
        allowed = max(own, tolerances.rounding("float32", operations=60, steps=STEPS))
        for name, param in params.items():
            assert tolerances.relative_error(opt.params[name].get(), param) <= allowed
    opt.save(tmp_path / "run")  # to be read where there is no GPU
    _, read = mo.load(tmp_path / "run", params)
    assert contents(read) == contents(opt.state)


@pytest.mark.parametrize("blocks", ["scalar", "tensor"])
def test_a_step_on_the_gpu_is_captured_from_the_current_stream(cupy: Any, blocks: str) -> None:
    """A step that waited, copied from the host or ran on another stream could not be."""
    stream = cupy.cuda.Stream(non_blocking=True)
    params = {"w": cupy.ones(1000, dtype="float32"), "b": cupy.ones(3, dtype="float16")}
    options: dict[str, Any] = {"step_size": 0.1, "blocks": blocks, "fused": True}
    opt = MetaOptimizer(params, base=mo.AdamW(), meta=mo.Lion(), **options)
    grads = {name: cupy.ones_like(param) for name, param in params.items()}
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        for _ in range(3):  # memory for the pool of this stream
            opt.step(grads)
        stream.begin_capture()
        opt.step(grads)
        graph = stream.end_capture()
        stream.synchronize()
        before = {name: param.get() for name, param in params.items()}
        assert int(opt.state.count["w"]) == 3  # captured, not run
        graph.launch(stream)
        stream.synchronize()
    assert int(opt.state.count["w"]) == 4
    assert all((params[name].get() != start).all() for name, start in before.items())


@pytest.mark.parametrize("library", ["numpy", "cupy", "torch"])
@pytest.mark.parametrize("fused", [True, False])
def test_multipliers_on_the_gpu_may_be_arrays(cupy: Any, library: str, fused: bool) -> None:
    kinds: dict[str, Any] = {"numpy": np.asarray, "cupy": cupy.asarray}
    if library == "torch":
        torch = pytest.importorskip("torch")
        kinds["torch"] = torch.tensor
    for lr in (0.5, 0.0, 1e-60):
        found = []
        for multiplier in (lr, kinds[library](lr)):
            params = {"w": cupy.ones(3, dtype="float32")}
            opt = MetaOptimizer(
                params, base=mo.SGD(), meta=mo.SGD(), step_size=0.5, fused=fused, discount=1.0
            )
            for _ in range(3):
                opt.step({"w": cupy.ones(3, dtype="float32")}, lr=multiplier)
            found.append((contents(opt.params), contents(opt.state)))
        assert found[0] == found[1]


def test_gradients_of_torch_on_the_gpu_are_shared(cupy: Any) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    opt = MetaOptimizer(
        {"w": cupy.ones(3, dtype="float32")},
        base=mo.SGD(),
        meta=mo.SGD(),
        step_size=0.5,
        fused=True,
        discount=1.0,
    )
    opt.step({"w": torch.ones(3, device="cuda")})
    assert opt.params["w"].tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="is on cpu, but its parameter on cuda:0"):
        opt.step({"w": torch.ones(3)})
