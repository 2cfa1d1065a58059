"""What a step of training costs with each method: in turns in one process, one run at a time."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.methods import Method, Peer, updater
from benchmarks.training.peers import PEERS, Torch
from benchmarks.training.studies import CURED, PAIRS
from benchmarks.training.tasks import TASKS

__all__ = ["milliseconds", "read_times", "time_methods", "write_times"]

#: Steps that are not counted, and that are.
WARM_UP, ROUNDS = 3, 40
STEPS = 10**6  # of schedules


def time_methods(task: str, data: Path | None, logs: Path, *, rounds: int = ROUNDS) -> Path:
    """Measure forward pass, backward pass and step of each method; write milliseconds by label.

    Fixed and scheduled step sizes are timed with `torch.optim.AdamW(fused=True)`, MetaOptimize
    compiled, as it is by default.

    Parameters
    ----------
    task : str
    data : Path, optional
        Folder with data sets.
    logs : Path
        Folder.
    rounds : int

    Returns
    -------
    Path
        A file of JSON.
    """
    kind = type("Timed", (TASKS[task],), {"compiled": True})
    steps: dict[str, Callable[[int], object]] = {}
    methods: list[Method | Peer] = [Method(base=base, meta=meta) for base, meta in (*PAIRS, *CURED)]
    methods += [Peer(name=name) for name in PEERS]
    for method in methods:
        network: Any = kind((0,), data=data)
        try:
            stepping = updater(method, network, (1e-4,), STEPS)
        except ImportError:
            continue
        steps[_key(method)] = _stepped(stepping, network)
    network = kind((0,), data=data)
    plain = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    steps["AdamW"] = _stepped(Torch(plain), network)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in range(WARM_UP + rounds):
        for name, made in steps.items():
            start = time.perf_counter()
            made(step)
            if step >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    found = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    logs.mkdir(parents=True, exist_ok=True)
    return write_times(logs, task, found)


def _stepped(stepping: Any, network: Any) -> Callable[[int], object]:
    return lambda step: stepping.step(step, lambda: network(step))


def _key(method: Method | Peer) -> str:
    """Return what methods of equal cost have in common."""
    if isinstance(method, Peer):
        return method.name
    return method.base if method.meta is None else f"({method.base}, {method.meta})"


def write_times(folder: Path, task: str, times: Mapping[str, float]) -> Path:
    """Write milliseconds of a step by label where `read_times` finds them."""
    path = folder / f"time-{task}.json"
    path.write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")
    return path


def read_times(folder: Path | None, task: str) -> dict[str, float]:
    """Return milliseconds of a step by label, empty where they were not measured."""
    path = None if folder is None else folder / f"time-{task}.json"
    found: dict[str, float] = json.loads(path.read_text()) if path and path.is_file() else {}
    return found


def milliseconds(times: Mapping[str, float], method: Method | Peer) -> float | None:
    """Return the milliseconds of a step of a method, None where they were not measured."""
    usual = isinstance(method, Peer) or (
        method.curvature == "none"
        and method.blocks in ("scalar", "tensor")
        and not isinstance(method.discount, tuple)
    )
    return times.get(_key(method)) if usual else None
