"""The suite checks itself: faults planted in a copy of the core are caught by the public command.

No check of the suite exists for one of them alone.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import FAULTS, Fault, plant
from tests.on_demand import slow_but

ROOT = Path(__file__).parents[1]

#: A library as it is found by name, but for the adapter: that is another code than the core.
PLAIN = """
from dataclasses import replace
from metaopt_conformance.backends import find

backend = replace(find("{library}"), optimizer=None)
"""


def run(folder: Path, *options: str, library: str = "numpy") -> "subprocess.CompletedProcess[str]":
    """Run the quick part, up to its first failure, on the core in a folder."""
    (folder / "plain.py").write_text(PLAIN.format(library=library), encoding="utf-8")
    arguments = ["--backend", "plain:backend", "--quick", "--stop", *options]
    return subprocess.run(
        [sys.executable, "-m", "metaopt_conformance", *arguments],
        cwd=folder,
        env={"PYTHONPATH": f"{folder}:{ROOT / 'conformance'}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def copied(folder: Path) -> Path:
    shutil.copytree(ROOT / "metaopt", folder / "metaopt", ignore=shutil.ignore_patterns("__py*"))
    return folder / "metaopt"


def test_the_copy_without_a_fault_passes(tmp_path: Path) -> None:
    copied(tmp_path)
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_place(name: str, tmp_path: Path) -> None:
    plant(FAULTS[name], copied(tmp_path))


#: A run of the suite takes seconds: some always, all of them on demand.
@pytest.mark.parametrize("name", slow_but([*FAULTS][::5], FAULTS))
def test_a_planted_fault_is_caught(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    plant(fault, copied(tmp_path))
    options = [f"--family={family}" for family in fault.families]
    done = run(tmp_path, *options, library=fault.library)
    assert done.returncode == 1, done.stdout + done.stderr
    # it was the number that was wrong, and not the code that broke
    failure = next(line for line in done.stdout.splitlines() if line.startswith("FAILED"))
    assert fault.raises or "Error:" not in failure, failure


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("leaf.elsewhere", "delta", "0.0"), "is defined 0 times"),
        (Fault("nowhere.advance", "delta", "0.0"), "there is no `nowhere.advance`"),
        (Fault("leaf.advance", "delta + 1", "0.0"), "stands 0 times"),
        (Fault("leaf.advance", "delta", "0.0"), "stands [2-9] times"),
    ],
)
def test_a_fault_without_its_place_is_to_be_planted_anew(
    fault: Fault, message: str, tmp_path: Path
) -> None:
    with pytest.raises(LookupError, match=message):
        plant(fault, copied(tmp_path))
