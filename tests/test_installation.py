"""What is not installed, or in the way, is named in one line that says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metaopt import installation

ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT), str(ROOT / "backends"), str(ROOT / "conformance")]

WITHOUT = """
import importlib.machinery, runpy, sys

find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name in {missing!r} else find(name, *rest)
)
sys.argv = [{module!r}, "--list"]
{how}
"""


def run(program: str, *first: str) -> "subprocess.CompletedProcess[str]":
    """Run a program with the packages of this checkout, and others before them."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*first, *PATHS])}
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        cwd=ROOT / "docs",
    )


@pytest.mark.parametrize(
    ("module", "missing", "message"),
    [
        ("metaopt_torch", ["torch"], "metaopt_torch needs PyTorch: pip install torch"),
        ("metaopt_jax", ["jax"], "metaopt_jax needs JAX and optax: pip install jax optax"),
        ("metaopt_jax", ["optax"], "metaopt_jax needs JAX and optax: pip install jax optax"),
        ("metaopt_mlx", ["mlx"], "metaopt_mlx needs MLX: pip install mlx, or mlx[cpu] on Linux"),
        ("metaopt_keras", ["keras"], "metaopt_keras needs Keras 3: pip install keras"),
        (
            "metaopt_conformance",
            ["hypothesis"],
            "metaopt_conformance needs hypothesis: pip install hypothesis array-api-strict",
        ),
    ],
)
def test_a_missing_package_is_named(module: str, missing: list[str], message: str) -> None:
    how = f"import {module}"
    if module == "metaopt_conformance":
        how = f"runpy.run_module({module!r}, run_name='__main__')"
    done = run(WITHOUT.format(missing=missing, module=module, how=how))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].removeprefix("ModuleNotFoundError: ") == message


@pytest.mark.parametrize("module", ["metaopt_torch", "metaopt_jax", "metaopt_kernels"])
def test_another_metaopt_is_told_from_ours(module: str, tmp_path: Path) -> None:
    for needed in {"metaopt_torch": ["torch"], "metaopt_jax": ["optax"]}.get(module, []):
        pytest.importorskip(needed)
    (tmp_path / "metaopt").mkdir()
    (tmp_path / "metaopt" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    done = run(f"import {module}", str(tmp_path))
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("ImportError: ")
    assert "pip uninstall metaopt," in line


def test_a_folder_with_files_of_both_is_noticed(tmp_path: Path) -> None:
    installation.check_folder(tmp_path)
    (tmp_path / "core").mkdir()
    with pytest.warns(UserWarning, match="pip uninstall metaopt metaoptimize"):
        installation.check_folder(tmp_path)
