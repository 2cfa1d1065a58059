"""The page and the example of metaopt_kernels run as they are printed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from metaopt_conformance import tolerances

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "examples" / "logistic_regression.py").read_text(encoding="utf-8")
NUMPY, CUPY = "import numpy as xp  # or: import cupy as xp", "import cupy as xp"


def gpu() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    try:
        return bool(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


needs_gpu = pytest.mark.skipif(not gpu(), reason="CuPy or a GPU is missing")
needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"
)


def run(program: str, folder: Path) -> str:
    """Run a program in a process of its own, where warnings are errors; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


@needs_numba
def test_the_page_runs_on_numpy(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = blocks(PAGE)
    assert len(found) == 4
    check = 'assert abs(params["weight"] - target).max() < 1e-2, params'
    run("\n".join([found[0], check, *found[1:]]), tmp_path)
    assert (tmp_path / "run.safetensors").exists()


@needs_gpu
def test_the_page_runs_on_cupy(tmp_path: Path) -> None:
    check = 'assert abs(params["weight"] - target).max() < 1e-2, params'
    first, second, *_ = blocks(PAGE)
    run("\n".join([first.replace(NUMPY, CUPY), check, second]), tmp_path)


def learns(program: str, folder: Path) -> None:
    printed = run(program, folder)
    right = [float(share) for share in re.findall(r"right on test ([\d.]+)%", printed)]
    assert len(right) == 6
    assert right[-1] > 97.0
    sizes = [float(size) for size in re.findall(r"'weight': '([^']+)'", printed)]
    assert sizes[-1] > 100 * 1e-4  # from where it started


@needs_numba
def test_the_example_learns_on_numpy(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    learns(EXAMPLE, tmp_path)


@needs_gpu
def test_the_example_learns_on_cupy(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    learns(EXAMPLE.replace(NUMPY, CUPY), tmp_path)


@pytest.mark.skipif(gpu(), reason="there is a GPU to measure")
def test_the_benchmark_says_that_there_is_nothing_to_measure() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step_cost", "cupy"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Nothing to measure: ")


PLAIN = """
import sys
import numpy as np
import metaopt as mo
from benchmarks.contenders.plain import PlainSteps
from metaopt_kernels.cpu import Cpu

grads = {"a": np.linspace(-1.0, 2.0, 40000, dtype="float32"), "b": np.ones((3, 5), "float32")}
for rule in (mo.AdamW(weight_decay=0.1), mo.Lion(), mo.SGD(momentum=0.9)):
    plain = PlainSteps(Cpu(), rule, grads)
    opt = mo.MetaOptimize(base=rule, meta=mo.SGD(), step_size=1e-4, meta_lr=0.0)
    params = {name: np.zeros_like(grad) for name, grad in grads.items()}
    state = opt.init(params)
    for _ in range(3):
        plain.step()
        params, state = opt.step(params, grads, state)
    for got, want in zip(plain.params(), params.values(), strict=True):
        print(np.max(np.abs(got - want)) / np.max(np.abs(want)))
"""


@needs_numba
def test_the_plain_kernel_of_the_benchmark_is_the_rule(tmp_path: Path) -> None:
    printed = run(PLAIN, tmp_path)
    errors = [float(error) for error in printed.split()]
    assert len(errors) == 6
    assert max(errors) <= tolerances.rounding("float32", operations=30, steps=3)
