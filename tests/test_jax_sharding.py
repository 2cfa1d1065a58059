"""Parameters of which several devices hold parts train as whole ones do, with one beta for all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.on_demand import selected, slow_but

pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")

ROOT = Path(__file__).parents[1]

# one process of the tests runs what the fixture does
pytestmark = pytest.mark.xdist_group("devices")

#: Scenarios of jax_devices.py, in the order in which they run.
SCENARIOS = [
    *(f"auto,{name}" for name in ("scalar", "node", "weight", "exact")),
    *(f"explicit,{name}" for name in ("node", "weight", "exact", "diagonal")),
    *(f"mixed,{name}" for name in ("scalar", "weight", "exact", "full")),
    *("injected,auto", "injected,explicit"),
    *(f"shard_map,{name}" for name in ("scalar", "skip", "exact")),
    *("auto,discounts", "explicit,discounts", "explicit,discounts by weight"),
    *("mixed,exact discounts", "shard_map,discounts", "orbax,discounts"),
    "axis_names",
    *(f"leaf,{kind}" for kind in ("auto", "explicit")),
    "leaf_in_shard_map",
    "algoperf",
    "orbax,scalar",
    "orbax_without_leaves",
]

#: One of each kind of sharding with the defaults, and what has code of its own.
ALWAYS = [
    "auto,scalar",
    "explicit,weight",
    "explicit,diagonal",
    "mixed,exact",
    "injected,auto",
    "shard_map,skip",
    "auto,discounts",
    "orbax,discounts",
    "axis_names",
    "leaf,explicit",
    "algoperf",
    "orbax_without_leaves",
]


@pytest.fixture(scope="module")
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what went wrong, by scenario, in a process with eight devices."""
    asked = selected(request, "scenario")
    scenarios = [scenario for scenario in SCENARIOS if scenario in asked]
    folder = tmp_path_factory.mktemp("devices")
    paths = [ROOT, ROOT / "backends", ROOT / "conformance"]
    script, file = ROOT / "tests" / "jax_devices.py", folder / "failures.json"
    done = subprocess.run(
        [sys.executable, str(script), str(file), str(folder), *scenarios],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    if not file.exists():
        return dict.fromkeys(scenarios, f"the process died:\n{done.stderr[-3000:]}")
    return json.loads(file.read_text())


@pytest.mark.parametrize("scenario", slow_but(ALWAYS, SCENARIOS))
def test_a_sharded_run_equals_one_device(scenario: str, failures: dict[str, str]) -> None:
    assert scenario not in failures, failures[scenario]
