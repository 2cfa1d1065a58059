"""The README keeps its word: its programs run and do what it says, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
        "backends/README.md",
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


def test_every_option_of_metaoptimize_that_it_names_exists() -> None:
    import metaopt as mo

    table = README.partition("## What to choose")[2].partition("\n\n`step")[0]
    named = {
        name
        for row in re.findall(r"^\| (.*?) \|", table, re.M)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert len(named) > 5
    assert named <= set(mo.MetaOptimize.__dataclass_fields__)


def test_the_table_of_checks_is_that_of_the_report() -> None:
    page = (ROOT / "benchmarks" / "results" / "conformance.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) > 9
    assert "\n".join(rows) in README
