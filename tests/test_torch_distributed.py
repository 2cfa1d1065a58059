"""Distributed training equals training in one process, with one sum over devices a step."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.on_demand import selected

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="torch is built without gloo",
    ),
    # one process of the tests runs what the fixture does
    pytest.mark.xdist_group("ranks"),
]

#: Scenarios of torch_ranks.py by number of processes, in the order in which they run.
SCENARIOS: dict[int, list[str]] = {
    2: [
        "ddp,blocks=tensor",
        "ddp,inner=True",
        "ddp,held_out=True,blocks=tensor",
        "ddp,held_out=True,view=True",
        "algoperf",
        "fsdp",
        "fsdp,compile=True",
        "fsdp,blocks=tensor",
        "fsdp,blocks=weight",
        "fsdp,several=True",
        "fsdp,several=True,skip_nonfinite=True,blocks=node",
        "fsdp,several=True,blocks=weight",
        "fsdp,held_out=True",
        "fsdp,held_out=True,blocks=weight",
        "fsdp,held_out=True,several=True,skip_nonfinite=True,blocks=node",
        "fsdp,inner=True,held_out=True,blocks=tensor",
        "empty_part,held_out=True",
        "scaled,held_out=True",
        "averages",
        "averages,blocks=node",
        "fsdp,inner=True,blocks=tensor",
        "fsdp,inner=True,blocks=weight",
        "fsdp,inner=True,skip_nonfinite=True,meta_first=True",
        "fsdp,skip_nonfinite=True,meta_first=True,blocks=node",
        "own_meshes,blocks=tensor",
        "empty_part",
        "empty_part,meta_first=True",
        "tensor_parallel,blocks=tensor",
        "tensor_parallel,blocks=weight",
        "curvature",
        "curvature,approximation=2x2,blocks=tensor",
        "curvature,several=True,blocks=tensor",
        "whole_leaves",
        "save,blocks=scalar",
        "save,inner=True,blocks=tensor",
        "save,several=True,blocks=tensor",
        "copies,blocks=node",
        "fsdp1",
        "fsdp1,blocks=tensor",
        "fsdp1,blocks=tensor,given=True",
        "fsdp1,blocks=tensor,late=True",
        "fsdp1,orig=False",
        "fsdp1,strategy=NO_SHARD,blocks=node",
        "fsdp1,strategy=SHARD_GRAD_OP,skip_nonfinite=True,meta_first=True,blocks=tensor",
        "fsdp1,blocks=weight",
        "fsdp1,learned=True,skip_nonfinite=True",
        "fsdp1_branches,blocks=tensor",
        "fsdp1_saved,blocks=tensor",
        "by_hand,blocks=tensor",
        "zero",
        "zero,direct=True",
        "zero_refused",
        "refused",
    ],
    4: [
        "load,blocks=scalar",
        "load,inner=True,blocks=tensor",
        "load,several=True,blocks=tensor",
        "ddp",
        "fsdp,blocks=tensor",
        "fsdp,blocks=node",
        "fsdp,blocks=weight",
        "hsdp,blocks=tensor",
        "hsdp,skip_nonfinite=True",
        "hsdp,held_out=True",
        "hsdp,learned=True,blocks=tensor",
        "tensor_parallel,blocks=node",
        "two_meshes",
        "two_meshes,blocks=node",
        "two_meshes,blocks=weight",
        "fsdp1,strategy=HYBRID_SHARD,blocks=tensor",
        "save,blocks=node",
        "save,blocks=weight",
    ],
    3: ["load,blocks=node", "load,blocks=weight"],
}

CASES = [(world, scenario) for world, scenarios in SCENARIOS.items() for scenario in scenarios]

#: What is near to another, on demand alone.
SLOW = [
    (2, "ddp,held_out=True,view=True"),
    (2, "fsdp"),
    (2, "fsdp,several=True"),
    (2, "fsdp,several=True,blocks=weight"),
    (2, "fsdp,held_out=True"),
    (2, "fsdp,held_out=True,blocks=weight"),
    (2, "scaled,held_out=True"),
    (2, "averages"),
    (2, "fsdp,inner=True,blocks=tensor"),
    (2, "fsdp,inner=True,blocks=weight"),
    (2, "fsdp,skip_nonfinite=True,meta_first=True,blocks=node"),
    (2, "tensor_parallel,blocks=weight"),
    (2, "curvature"),
    (2, "fsdp1"),
    (2, "fsdp1,strategy=NO_SHARD,blocks=node"),
    (2, "fsdp1,blocks=weight"),
    (2, "zero"),
    (4, "ddp"),
    (4, "fsdp,blocks=node"),
    (4, "fsdp,blocks=weight"),
    (4, "hsdp,held_out=True"),
    (4, "two_meshes"),
    (4, "two_meshes,blocks=weight"),
]


@pytest.fixture(scope="module")
def failures(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], str]:
    """Return what went wrong, by number of processes and scenario."""
    asked = selected(request, "world", "scenario")
    if any(scenario.startswith("load,") for _, scenario in asked):  # what others have saved
        asked |= {(world, name) for world, name in CASES if name.startswith("save,")}
    folder = tmp_path_factory.mktemp("ranks")
    found: dict[tuple[int, str], str] = {}
    for world, scenarios in SCENARIOS.items():
        wanted = [scenario for scenario in scenarios if (world, scenario) in asked]
        for scenario, text in launched(world, folder, wanted).items() if wanted else ():
            found[world, scenario] = text
    return found


def launched(world: int, folder: Path, scenarios: list[str]) -> dict[str, str]:
    """Run scenarios in so many processes."""
    paths = [ROOT, ROOT / "backends", ROOT / "conformance"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests" / "torch_ranks.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(folder), *scenarios],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    found: dict[str, str] = {}
    for rank, output in enumerate(outputs):
        path = folder / f"failures_{world}_{rank}.json"
        if not path.exists():
            return dict.fromkeys(scenarios, f"process {rank} died:\n{output[-3000:]}")
        found |= json.loads(path.read_text())
    if found:  # those after it did not run
        first = min(map(scenarios.index, found))
        found |= {name: f"after {scenarios[first]}" for name in scenarios[first + 1 :]}
    return found


@pytest.mark.parametrize(
    ("world", "scenario"),
    [pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES],
)
def test_a_distributed_run_equals_one_process(
    world: int, scenario: str, failures: dict[tuple[int, str], Any]
) -> None:
    assert (world, scenario) not in failures, failures[world, scenario]
