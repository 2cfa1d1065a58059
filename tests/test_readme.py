"""The README keeps its word: its programs run and do what it says, its links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def program(library: str) -> dict[str, Any]:
    """Run the program under a heading in bold and return its names."""
    pytest.importorskip(library.lower().replace("pytorch", "torch"))
    (source,) = re.findall(rf"\*\*{library}\*\*\n\n```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(source, f"README.md, {library}", "exec"), names)
    return names


def test_numpy() -> None:
    names = program("NumPy")
    np.testing.assert_allclose(names["params"]["weight"], [1.0, -2.0, 0.5], atol=1e-2)


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    names = program("PyTorch")
    np.testing.assert_allclose(names["model"].weight.detach().numpy(), np.ones((1, 3)), atol=0.1)
    assert set(names["opt"].step_sizes(names["state"])) == {"weight", "bias"}


def test_jax() -> None:
    names = program("JAX")
    np.testing.assert_allclose(names["params"]["weight"], np.ones(3), atol=0.1)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/mathematics.md", "docs/conformance.md", "backends/README.md"]
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
