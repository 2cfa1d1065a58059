"""The README keeps its word: its programs run and do what it says, its links lead somewhere."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import metaopt as mo
from metaopt.rules import SHIPPED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SEEDED = """
import sys
import numpy as np

if "torch" in sys.argv:
    import torch

    torch.manual_seed(0)
"""


def run(library: str, module: str, check: str) -> None:
    """Run the program under a heading in bold, and then a check, in a process of its own."""
    pytest.importorskip(module)
    (source,) = re.findall(rf"\*\*{library}\*\*\n\n```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", f"{SEEDED}\n{source}\n{check}", module],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_numpy() -> None:
    want = "[1.0, -2.0, 0.5]"
    run("NumPy", "numpy", f"np.testing.assert_allclose(params['weight'], {want}, atol=1e-2)")


def test_torch() -> None:
    check = """
np.testing.assert_allclose(model.weight.detach().numpy(), np.ones((1, 3)), atol=0.1)
assert float(opt.step_sizes()["all"]) > 1e-3
"""
    run("PyTorch", "torch", check)


def test_jax() -> None:
    run("JAX", "jax", "np.testing.assert_allclose(params['weight'], np.ones(3), atol=0.1)")


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "docs/mathematics.md", "docs/conformance.md", "docs/kernels.md"),
        *("docs/torch.md", "docs/jax.md", "docs/contributing.md", "docs/architecture.md"),
        *(
            "docs/meta_parameters.md",
            "docs/wrap.md",
            "docs/options.md",
            "docs/how_to_choose.md",
            "docs/your_own_rule.md",
        ),
        *("docs/compatibility.md", "backends/README.md", "CONTRIBUTING.md"),
    ],
)
def test_links_and_pictures_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, _ = target.partition("#")
            assert ((ROOT / page).parent / path).exists(), target


@pytest.mark.parametrize("page", ["README.md", "docs/mathematics.md"])
def test_formulas_survive_markdown(page: str) -> None:
    """Backslashes before punctuation are Markdown's, and $$ lets it make lists of lines."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "$$" not in text
    for formula in re.findall(r"(?<!`)\$([^$`\n]+)\$", text):
        assert not re.search(r"\\[,;{}!]", formula), formula


def test_the_page_of_options_has_them_all() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    table = page.partition("# Options")[2].partition("## Rules")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert named == {option.name for option in fields(mo.MetaOptimize) if option.init}


def test_every_rule_has_its_name_on_the_page_of_options() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    for cls in SHIPPED:
        if cls is not mo.Opaque:
            assert f"`mo.{cls.__name__}" in page


def test_the_page_of_options_runs_as_it_is_printed(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(README.splitlines()) <= 150
    first, second, third = re.findall(r"^\*\*(PyTorch|JAX|NumPy)\*\*$", README, re.MULTILINE)
    assert [first, second, third] == ["PyTorch", "JAX", "NumPy"]


def test_the_table_of_checks_is_that_of_the_report() -> None:
    page = (ROOT / "benchmarks" / "results" / "conformance.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) > 9
    assert "\n".join(rows) in (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
