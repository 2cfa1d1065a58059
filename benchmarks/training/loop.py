"""The training loop: one log in JSON lines for each job, the same whether it was killed or not."""

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

import metaopt as mo
from benchmarks.training.defaults import digest_of_defaults
from benchmarks.training.methods import Method, Peer, Updater, updater
from benchmarks.training.tasks import TASKS, Measures, Task

__all__ = ["Job", "TakenError", "replace_file", "run"]

PRECISIONS = ("fp32", "tf32", "bf16")
#: Seconds between checkpoints.
CHECKPOINT_EVERY = 60.0


def _commit() -> str:
    """Return the commit of the code, with a + where files that it knows differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"metaopt {mo.__version__}"
    return f"commit {done.stdout.strip()}"


#: What runs are made with; looked at once, for the files may change under a process.
COMMIT = _commit()
MACHINE = (
    f"{platform.machine()} {platform.system()}, Python {platform.python_version()}, "
    f"torch {torch.__version__}"
)


class TakenError(RuntimeError):
    """Another process is running the job."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Runs of one method side by side on one task.

    Parameters
    ----------
    task : str
        A task's name.
    method : Method or Peer
    starts : tuple of float
        Step sizes, initial, peak or fixed.
    seeds : tuple of int
        Every start is run with every seed.
    steps : int, optional
        In place of the task's.
    precision : {"fp32", "tf32", "bf16"}
        Of matrix products and convolutions; parameters and optimizers are float32.
    smoke : bool
        A task of tiny size, to see whether it runs.
    """

    task: str
    method: Method | Peer
    starts: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int | None = None
    precision: str = "fp32"
    smoke: bool = False

    @property
    def runs(self) -> tuple[tuple[float, int], ...]:
        """Start and seed of each run."""
        return tuple((start, seed) for start in self.starts for seed in self.seeds)

    @property
    def settings(self) -> dict[str, Any]:
        """All that determines the runs and is not as usual."""
        settings: dict[str, Any] = json.loads(json.dumps(_unusual(self)))
        return settings

    @property
    def name(self) -> str:
        """File name of the log: words to read, and digits that tell settings apart."""
        words = "".join(c if c.isalnum() or c in ".-" else "_" for c in self.method.label)
        digest = sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.task}-{words}-{digest}"


def _unusual(value: Any) -> dict[str, Any]:
    """Return the fields that differ from their defaults; so new options leave old logs valid."""
    found = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if part != field.default:
            found[field.name] = _unusual(part) if is_dataclass(part) else part
    return found


def run(
    job: Job,
    folder: Path,
    *,
    data: Path | None = None,
    device: str = "cpu",
    tasks: dict[str, type[Task]] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,  # noqa: ARG005
    checkpoint_every: float = CHECKPOINT_EVERY,
) -> Path:
    """Train, or go on with what was begun, and return the log.

    Parameters
    ----------
    job : Job
    folder : Path
        Where logs are; what is finished there is not run again.
    data : Path, optional
        Folder with data sets.
    device : str
    tasks : dict of name to Task, optional
        In place of those of the comparison.
    progress : callable
        Called with steps done and steps in all.
    checkpoint_every : float
        Seconds. What a run goes on from after a kill; results do not depend on it.

    Raises
    ------
    TakenError
        If another process is at it: several may work on the jobs of one folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{job.name}.jsonl"
    if finished(path):
        return path
    taken = path.with_suffix(".lock")
    try:
        lock = FileLock(taken).acquire(blocking=False)
    except Timeout as error:
        msg = f"{path} is being written by another process."
        raise TakenError(msg) from error
    with lock:
        try:
            if not finished(path):  # by another process meanwhile
                _train(job, path, data, device, tasks, progress, checkpoint_every)
        finally:
            taken.unlink(missing_ok=True)
    return path


def _train(
    job: Job,
    path: Path,
    data: Path | None,
    device: str,
    tasks: dict[str, type[Task]] | None,
    progress: Callable[[int, int], object],
    checkpoint_every: float,
) -> None:
    kind = (TASKS if tasks is None else tasks)[job.task]
    steps = kind.steps if job.steps is None else job.steps
    starts, seeds = zip(*job.runs, strict=True)
    _prepare(job.precision, device)
    task = kind(seeds, data=data, smoke=job.smoke).to(device)  # type: ignore[call-arg]
    training = _Training(job, task, updater(job.method, task, starts, steps), steps, path)
    training.load()
    training.go(progress, checkpoint_every)


def _prepare(precision: str, device: str) -> None:
    """Let products and convolutions be as precise as asked, and the same every time."""
    if precision not in PRECISIONS:
        msg = f"`precision` must be one of {', '.join(map(repr, PRECISIONS))}; got {precision!r}."
        raise ValueError(msg)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # it takes time


def finished(path: Path) -> bool:
    """Return whether a log is complete."""
    if not path.is_file():
        return False
    lines = path.read_bytes().splitlines()
    try:
        return bool(lines) and "finished" in json.loads(lines[-1])
    except ValueError:  # killed in the middle of a line
        return False


class _Training:
    def __init__(self, job: Job, task: Task, optimizer: Updater, steps: int, path: Path) -> None:
        self._job, self._task, self._optimizer = job, task, optimizer
        self._steps, self._path = steps, path
        self._checkpoint = path.with_suffix(".checkpoint")
        self._done, self._seconds = 0, 0.0
        self._sums: Measures = {}
        self._lines: list[str] = []

    def load(self) -> None:
        """Go back to the last checkpoint, or to the start."""
        if self._checkpoint.is_file():
            state = torch.load(self._checkpoint, weights_only=True)
            self._task.load_state_dict(state["task"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._done, self._seconds = state["done"], state["seconds"]
            self._sums, self._lines = state["sums"], state["lines"]
        else:
            self._lines = [json.dumps({"job": self._job.settings, "steps": self._steps})]
        self._sign()
        replace_file(self._path, ("\n".join(self._lines) + "\n").encode())
        if self._done == 0 and len(self._lines) == 1:
            self._write({"step": 0, **self._judged()})

    def _sign(self) -> None:
        """Write into the head of the log with what the run is made, or goes on."""
        head = json.loads(self._lines[0])
        with_this = f"{COMMIT}, {MACHINE}, {torch.get_num_threads()} threads"
        for key, value in (("made_with", with_this), ("defaults", digest_of_defaults())):
            known = head.setdefault(key, [])
            if value not in known:
                known.append(value)
        self._lines[0] = json.dumps(head)

    def go(self, progress: Callable[[int, int], object], checkpoint_every: float) -> None:
        """Train to the end."""
        saved = started = time.perf_counter()
        before = self._seconds
        every, measured = self._task.every, 0
        while self._done < self._steps:
            measures = self._optimizer.step(self._done, self._forward)
            self._done += 1
            for name, values in measures.items():
                past = self._sums.get(name, 0.0)
                self._sums[name] = past + values.detach()
            measured = self._done % every or every
            now = time.perf_counter()
            self._seconds = before + now - started
            if self._done % every == 0 or self._done == self._steps:
                train = {name: _rounded(sums / measured) for name, sums in self._sums.items()}
                self._sums = {}
                self._write({"step": self._done, "train": train, **self._judged()})
                progress(self._done, self._steps)
            if now - saved > checkpoint_every:
                self._save()
                saved = now
        self._write({"finished": True})
        self._checkpoint.unlink(missing_ok=True)

    def _forward(self) -> Measures:
        with self._precision():
            measures: Measures = self._task(self._done)
        return measures

    def _precision(self) -> AbstractContextManager[Any]:
        kind = next(self._task.parameters()).device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self._job.precision == "bf16")

    def _judged(self) -> dict[str, Any]:
        averages = self._optimizer.averaged()
        with torch.no_grad(), _held(self._task, averages), self._precision():
            test = {name: _rounded(values) for name, values in self._task.evaluate().items()}
        sizes = {
            name: _rounded(_of_runs(size, len(self._task.seeds)))
            for name, size in self._optimizer.step_sizes().items()
        }
        return {"test": test, "step_sizes": sizes, "seconds": round(self._seconds, 3)}

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, allow_nan=False)
        self._lines.append(line)
        with self._path.open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def _save(self) -> None:
        state = self._optimizer.state_dict()
        if state is None:
            return
        whole = {
            "task": self._task.state_dict(),
            "optimizer": state,
            "done": self._done,
            "seconds": self._seconds,
            "sums": self._sums,
            "lines": self._lines,
        }
        part = self._checkpoint.with_suffix(".part")
        torch.save(whole, part)
        os.replace(part, self._checkpoint)


@contextmanager
def _held(task: Task, averages: Sequence[Tensor] | None) -> Iterator[None]:
    """Let a task's parameters be averages of them meanwhile."""
    if averages is None:
        yield
        return
    params = list(task.parameters())
    own = [param.clone() for param in params]
    try:
        for param, average in zip(params, averages, strict=True):
            param.copy_(average)
        yield
    finally:
        for param, value in zip(params, own, strict=True):
            param.copy_(value)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole: killed at any time, it leaves the old one or the new."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)


def _of_runs(size: Tensor, runs: int) -> Tensor:
    """Return the geometric mean of each run's step sizes of one name."""
    return size.detach().abs().reshape(runs, -1).log().mean(1).exp()


def _rounded(values: Tensor) -> list[float | None]:
    """Return numbers of six digits, None for what is not finite."""
    return [
        float(f"{value:.6g}") if math.isfinite(value) else None
        for value in values.detach().double().reshape(-1).tolist()
    ]
