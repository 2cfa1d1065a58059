"""What holds of the package as a whole: imports, documentation, version."""

import ast
import doctest
import importlib
import importlib.resources
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import metaopt as mo

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "metaopt"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CORE = [
    path for path in SOURCES if PACKAGE / "demo" not in path.parents and path.name != "__main__.py"
]
MODULES = ["metaopt", *(info.name for info in pkgutil.walk_packages([str(PACKAGE)], "metaopt."))]
HEAVY = ["torch", "jax", "cupy", "dask", "sklearn", "scipy", "matplotlib", "rich", "PIL"]
HEAVY += ["optax", "array_api_strict", "metaopt_conformance", "metaopt.demo"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# --- imports


def test_importing_metaopt_imports_no_array_library_but_numpy() -> None:
    program = (
        "import sys, metaopt\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])\n"
        "assert 'numpy' in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.split() == []


def test_importing_the_torch_adapter_imports_no_dtensors() -> None:
    """They take most of a second, and few use them."""
    pytest.importorskip("torch")
    program = (
        "import sys, torch\n"
        "before = 'torch.distributed.tensor' in sys.modules\n"
        "import metaopt_torch\n"
        "print(before, 'torch.distributed.tensor' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])},
    )
    assert done.stdout.split() in (["False", "False"], ["True", "True"])


def imported(path: Path) -> Iterator[str]:
    """Yield the top-level names that a source file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)} has a relative import"
            yield str(node.module).split(".")[0]


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_the_core_imports_its_declared_dependencies_alone(path: Path) -> None:
    declared = {
        re.split(r"[^\w-]", requirement)[0].replace("-", "_")
        for requirement in project()["dependencies"]
    }
    assert declared == {"numpy", "array_api_compat", "safetensors"}
    assert set(imported(path)) <= declared | set(sys.stdlib_module_names) | {"metaopt"}


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_the_core_does_not_import_the_demo(path: Path) -> None:
    modules = [
        node.module or ""
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    ]
    assert not [name for name in modules if name.startswith("metaopt.demo")]


def test_the_package_never_imports_what_it_is_checked_against() -> None:
    assert len(SOURCES) > 15
    for path in SOURCES:
        assert "metaopt_conformance" not in set(imported(path)), relative(path)


ADAPTERS = sorted((ROOT / "backends").glob("metaopt_*/*.py"))


@pytest.mark.parametrize("path", ADAPTERS, ids=relative)
def test_adapters_import_public_names_of_the_core(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "metaopt":
            exported = importlib.import_module(str(node.module)).__all__
            names = {alias.name for alias in node.names}
            modules = {name for name in names if f"{node.module}.{name}" in MODULES}
            assert names - modules <= set(exported), node.module


def lines_of_imports() -> dict[str, int]:
    """Return the line of each module of the core in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE)
    return {name: int(line) for line, names in rows for name in re.findall(r"`(.+?)`", names)}


def test_modules_import_from_the_lines_above_their_own() -> None:
    """As docs/architecture.md draws them; the package itself and the demo import all."""
    line = lines_of_imports()
    known = {name.removeprefix("metaopt.") for name in MODULES}
    own = {name for name in known if not name.startswith(("demo", "__main__"))} - {"metaopt"}
    assert own == set(line)
    for name in own:
        for found in imported_from_core(name):
            assert line[found] < line[name], f"{name} imports {found}"


def imported_from_core(name: str) -> set[str]:
    """Return the modules of the core that one of them imports, wherever in its file."""
    path = ROOT / "metaopt" / name.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "metaopt":
            module = str(node.module)
            inner = {f"{module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= inner if module == "metaopt" else {module} | inner
    return {module.removeprefix("metaopt.") for module in found}


# --- documentation


def docstrings(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds):
            yield ast.get_docstring(node) or ""


NUMBERS = re.compile(r"\bsections?\s+(\d+(?:(?:,\s+|\s+and\s+|\s+to\s+)\d+)*)", re.IGNORECASE)


def cited(text: str) -> set[int]:
    return {int(n) for found in NUMBERS.findall(text) for n in re.findall(r"\d+", found)}


def sections() -> set[int]:
    text = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
    return {int(number) for number in re.findall(r"^## (\d+)\. ", text, re.MULTILINE)}


def test_citations_are_read_in_every_form() -> None:
    assert cited("sections 2, 3, 7\nand 11; Section 4. See section\n  10 (x), sections 2 to 9") == {
        *(2, 3, 7, 11),
        *(4, 10, 9),
    }


def test_cited_sections_of_the_mathematics_exist() -> None:
    have = sections()
    assert have == set(range(1, len(have) + 1))
    found: set[int] = set()
    for path in SOURCES:
        numbers = set().union(*map(cited, docstrings(path)))
        assert numbers <= have, relative(path)
        found |= numbers
    assert len(found) > 5
    assert cited((ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")) <= have


def test_cited_files_exist() -> None:
    """Paths like those of the mathematics, wherever a docstring names one."""
    for path in SOURCES:
        for text in docstrings(path):
            for name in re.findall(r"\b(?:docs|tests|benchmarks|conformance)/[\w./-]+\w", text):
                assert (ROOT / name).exists(), (relative(path), name)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    assert doctest.testmod(importlib.import_module("metaopt.metaoptimize")).attempted > 0


def public() -> Iterator[tuple[str, Any]]:
    """Yield what a user reaches by name: of `metaopt` and of the modules it exports."""
    for name in mo.__all__:
        item = getattr(mo, name)
        if isinstance(item, ModuleType):
            for inner in item.__all__:
                yield f"{name}.{inner}", getattr(item, inner)
        else:
            yield name, item


PUBLIC = dict(public())


def documented(text: str) -> list[str]:
    """Return the names in the Parameters section of a docstring in the format of numpydoc."""
    found = re.search(r"^Parameters\n-{10}\n(.*?)(?=^\S[^\n]*\n-{3,}\n|\Z)", text, re.M | re.S)
    if found is None:
        return []
    heads = re.findall(r"^(\S[^:\n]*?)(?: : .*)?$", found[1], re.MULTILINE)
    return [name.strip("* ") for head in heads for name in head.split(",")]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_document_their_parameters(name: str) -> None:
    item = PUBLIC[name]
    if isinstance(item, str):  # the name of a slot
        return
    text = inspect.getdoc(item)
    assert text
    if inspect.isabstract(item) or getattr(item, "_is_protocol", False):
        return
    parameters = [p for p in inspect.signature(item).parameters if not p.startswith("_")]
    assert documented(text) == parameters


@pytest.mark.parametrize("name", ["init", "step", "project"])
def test_methods_document_their_parameters(name: str) -> None:
    method = getattr(mo.MetaOptimize, name)
    parameters = list(inspect.signature(method).parameters)[1:]
    assert documented(inspect.getdoc(method) or "") == parameters


@pytest.mark.parametrize("name", PUBLIC)
def test_public_methods_are_documented(name: str) -> None:
    item = PUBLIC[name]
    if inspect.isclass(item):
        for method, value in vars(item).items():
            if not method.startswith("_") and (
                inspect.isfunction(value) or isinstance(value, property)
            ):
                assert inspect.getdoc(getattr(item, method)), method


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_they_are_and_export_what_exists(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    exported = getattr(module, "__all__", [])
    assert [entry for entry in exported if not hasattr(module, entry)] == []
    assert len(exported) == len(set(exported))


# --- distribution


def test_the_package_says_that_it_is_typed() -> None:
    assert importlib.resources.files("metaopt").joinpath("py.typed").is_file()


def test_the_changelog_opens_with_this_version() -> None:
    """Under its number once released, under "Unreleased" before."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## (\S+)", text, re.MULTILINE)
    assert entries[0] == ("Unreleased" if ".dev" in mo.__version__ else mo.__version__)


def bounds(*extras: str) -> dict[str, str]:
    """Return the least versions of what the project needs, and of what these extras do."""
    optional = project()["optional-dependencies"]
    requirements = [*project()["dependencies"], *(one for name in extras for one in optional[name])]
    return dict(re.split(">=", requirement) for requirement in requirements)


def test_the_oldest_packages_are_those_that_the_bounds_say() -> None:
    """With which `make oldest` runs tests."""
    text = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+?)(?:\.\*|\.0)?$", text, re.MULTILINE))
    assert pinned == bounds("torch", "jax")


def test_the_recipe_for_conda_says_what_the_project_does() -> None:
    recipe = (ROOT / "recipe" / "recipe.yaml").read_text(encoding="utf-8")
    (version,) = re.findall(r"^  version: (\d.+)$", recipe, re.MULTILINE)
    assert version == mo.__version__
    needs = dict(re.findall(r"^    - ([\w-]+) >=([\d.]+)$", recipe, re.MULTILINE))
    needs["torch"] = needs.pop("pytorch")  # as conda calls it
    assert f">={needs.pop('python')}" == project()["requires-python"]
    assert needs == bounds("torch", "jax", "cupy", "mlx", "keras")
    assert project()["description"] in recipe


def test_files_that_the_project_names_exist() -> None:
    assert (ROOT / project()["readme"]).is_file()
    for name in project()["license-files"]:
        assert (ROOT / name).is_file()


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a checkout: which files are tracked is not known")
    words = [f"/{name}/".encode() for name in ("tmp", "work", "home", "root", "Users")]
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file():
            continue
        data = path.read_bytes()
        if b"\0" not in data:
            assert [word for word in words if word in data] == [], name
