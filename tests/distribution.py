"""What `make release` asks of the files that it has built, in an environment with the wheel alone.

python tests/distribution.py dist
"""

import re
import runpy
import sys
import tarfile
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "metaopt",
    "metaopt_conformance",
    "metaopt_jax",
    "metaopt_keras",
    "metaopt_kernels",
    "metaopt_mlx",
    "metaopt_torch",
}


def check_wheel(path: Path) -> None:
    """Raise unless the wheel holds the packages, typed, and nothing else."""
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
    tops = {name.partition("/")[0] for name in names}
    metadata = {top for top in tops if top.endswith(".dist-info")}
    assert tops - metadata == PACKAGES, sorted(tops)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names, package
    assert any(name.endswith("licenses/LICENSE") for name in names)


def check_sdist(path: Path) -> None:
    """Raise unless the source distribution has what tests and pages need, and no built thing."""
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "docs/torch.md"):
        assert name in names, name
    assert any(name.startswith("tests/test_") for name in names)
    made = (".ci", ".venv", "docs/_build", "docs/_gallery", "dist/")
    odd = [name for name in names if name.startswith(made) or ".pyc" in name]
    assert not odd, odd


def run_readme() -> int:
    """Run the README's programs whose packages are installed, and return how many there were."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ran = 0
    for program in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        needed = re.findall(r"^(?:import|from) (\w+)", program, re.MULTILINE)
        if any(find_spec(name) is None for name in needed if name not in PACKAGES):
            continue
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "program.py"
            script.write_text(program, encoding="utf-8")
            runpy.run_path(str(script))
        ran += 1
    return ran


def main(folder: str) -> None:
    """Check both files of a folder, and that the package is not that of the checkout."""
    (wheel,) = Path(folder).glob("*.whl")
    (sdist,) = Path(folder).glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    spec = find_spec("metaopt")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).parent != ROOT / "metaopt", "the checkout was imported"
    ran = run_readme()
    assert ran > 0
    print(f"{wheel.name} and {sdist.name} are in order; {ran} programs of the README run")


if __name__ == "__main__":
    sys.path.pop(0)
    main(sys.argv[1])
