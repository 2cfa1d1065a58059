"""Programs that pages of the documentation print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_section(page: str, title: str, module: str, check: str) -> None:
    """Run the first program of a section of a page, if its framework is there, and then a check."""
    pytest.importorskip(module)
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (source,) = re.findall(rf"^## {title}\n\n.*?```python\n(.*?)```", text, re.M | re.S)
    if module == "torch":
        source = f"import torch\ntorch.manual_seed(0)\n{source}"
    done = subprocess.run(
        [sys.executable, "-c", f"{source}\n{check}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
