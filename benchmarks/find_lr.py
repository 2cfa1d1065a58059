"""Learning rates that `metaopt_torch.find_lr` finds, and those of Lightning's range test.

    python -m benchmarks.find_lr --logs runs --output benchmarks/results

Six tasks of the comparison with five seeds. What is found is then trained with, at a constant
learning rate and the task's whole length, beside a grid of seven: AdamW without weight decay, the
last weights. Takes half an hour of one core. What is finished is not run again.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from metaopt_torch import find_lr
from torch import Tensor

from benchmarks.training.loop import COMMIT, MACHINE
from benchmarks.training.methods import Method, updater
from benchmarks.training.tasks import TASKS, Task
from metaopt.demo.report import number

__all__ = ["main"]

NAMES = ("digits", "logistic", "autoencoder", "adding", "drift", "shifts")
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = (0, 1, 2, 3, 4)
FIXED = Method(base="AdamW", weight_decay=0.0)
#: Steps over which losses of training are averaged, before it and at its end.
WINDOW = 200


def _loss(task: Any, step: Any) -> Tensor:
    value: Tensor = task(int(step))["loss"].sum()
    return value


def found(name: str, seed: int) -> tuple[float, int]:
    """Return what `find_lr` finds, and after how many steps of both runs."""
    torch.manual_seed(seed)
    result = find_lr(TASKS[name]([seed]), _loss, range(TASKS[name].steps))
    return result.lr, 2 * result.steps


def suggested(name: str, seed: int) -> float | None:
    """Return what Lightning's tuner suggests by its range test, as it is by default."""
    import lightning.pytorch as pl
    from lightning.pytorch.tuner.tuning import Tuner

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.lr, self.task = 1e-3, TASKS[name]([seed])

        def training_step(self, batch: Any) -> Tensor:
            return _loss(self.task, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)

    steps: Any = range(TASKS[name].steps)
    loader = torch.utils.data.DataLoader(steps, batch_size=None)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        with contextlib.redirect_stderr(io.StringIO()):
            finder = Tuner(trainer).lr_find(Module(), train_dataloaders=loader)
    return None if finder is None else finder.suggestion()


def trained(
    name: str, lrs: Sequence[float], seeds: Sequence[int]
) -> tuple[list[float], list[bool]]:
    """Train side by side; return what each run is judged by, and whether it is lost."""
    task: Task = TASKS[name](seeds)
    with torch.no_grad():
        start = sum(task(step)["loss"] for step in range(WINDOW)) / WINDOW
    made = updater(FIXED, task, tuple(lrs), task.steps)
    part, measure = task.metric.split(".")
    judged, last = [], []
    for step in range(task.steps):
        measures = made.step(step, partial(task, step))
        if part == "train" and step >= task.steps * (1.0 - task.judged_over):
            judged.append(measures[measure].detach())
        if step >= task.steps - WINDOW:
            last.append(measures["loss"].detach())
    if part == "train":
        values = torch.stack(judged).mean(0)
    else:
        with torch.no_grad():
            values = task.evaluate()[measure]
    end = torch.stack(last).mean(0)
    lost = torch.logical_not(end <= task.worse * start)
    return values.double().tolist(), lost.tolist()


def run(name: str, who: str) -> dict[str, Any]:
    """Return what is known of the runs of a task: of the "grid", "find_lr" or "lightning"."""
    made: dict[str, Any] = {"made_with": f"{COMMIT}, {MACHINE}"}
    seeds, lrs = list(SEEDS), list[float]()
    if who == "grid":
        seeds, lrs = list(SEEDS) * len(GRID), [lr for lr in GRID for _ in SEEDS]
    elif who == "find_lr":
        pairs = [found(name, seed) for seed in SEEDS]
        lrs, made["steps"] = [lr for lr, _ in pairs], [steps for _, steps in pairs]
    else:
        suggestions = {seed: suggested(name, seed) for seed in SEEDS}
        some = {seed: lr for seed, lr in suggestions.items() if lr is not None}
        seeds, lrs, made["none"] = list(some), list(some.values()), len(SEEDS) - len(some)
    values, lost = trained(name, lrs, seeds) if lrs else ([], [])
    return made | {"lrs": lrs, "values": values, "lost": lost}


def _shown(task: type[Task], value: float) -> str:
    return f"{100.0 * value:.1f}%" if task.more_is_better else f"{value:.3g}"


def _good(task: type[Task], value: float, best: float) -> bool:
    """Say whether a value is within a point, or 1%, of the best."""
    return value >= best - 0.01 if task.more_is_better else value <= 1.01 * best


HEAD = (
    *("task", "judged by", "best of the grid", "who", "learning rates", "spread", "ends at"),
    *("within", "lost", "steps"),
)


def _best(name: str, result: dict[str, Any]) -> tuple[float, float]:
    """Return the best mean of the grid, and the learning rate that has it."""
    values, size = result["grid"]["values"], len(SEEDS)
    means = [statistics.fmean(values[at : at + size]) for at in range(0, len(values), size)]
    pick = max if TASKS[name].more_is_better else min
    best = pick(mean for mean in means if math.isfinite(mean))
    return best, GRID[means.index(best)]


def _rows(name: str, result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    task, (best, at) = TASKS[name], _best(name, result)
    head = (name, task.judged_by, f"{_shown(task, best)} at {number(at)}")
    for who, steps in (("find_lr", result["find_lr"]["steps"]), ("lightning", [100])):
        own = result[who]
        if not own["lrs"]:
            yield *head, "Lightning", *["none"] * 4, f"{own['none']} of {len(SEEDS)}", ""
            continue
        mean, lrs = statistics.fmean(own["values"]), sorted(own["lrs"])
        yield (
            *(head if who == "find_lr" else ("", "", "")),
            "`find_lr`" if who == "find_lr" else "Lightning",
            ", ".join(f"{lr:.2g}" for lr in lrs),
            f"{lrs[-1] / lrs[0]:.1f}",
            _shown(task, mean),
            "yes" if _good(task, mean, best) else "no",
            f"{sum(own['lost']) + own.get('none', 0)} of {len(SEEDS)}",
            f"{min(steps)}" if len(set(steps)) == 1 else f"{min(steps)} to {max(steps)}",
        )


def report(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the page; of results by task and by who ran."""
    made_with = {part["made_with"] for result in results.values() for part in result.values()}
    yield "# A fixed learning rate, found"
    yield ""
    yield (
        "Made by `python -m benchmarks.find_lr`: what `metaopt_torch.find_lr` finds with its "
        "defaults, and what Lightning's tuner suggests with its own, then a whole run of AdamW at "
        "that constant learning rate, without weight decay, judged at the last weights. Values "
        f"are means of {len(SEEDS)} seeds. *Spread* is the largest over the least of the learning "
        "rates; *within* says whether the mean is within a point of accuracy, or 1% of the loss, "
        f"of the best of {', '.join(map(number, GRID))}; *lost* are runs whose loss ends at more "
        "than the task's multiple of its start, or not finite, and those for which nothing was "
        "suggested. Made with "
        f"{'; '.join(sorted(made_with))}."
    )
    yield ""
    yield "| " + " | ".join(HEAD) + " |"
    yield "|" + " --- |" * len(HEAD)
    for name, result in results.items():
        for row in _rows(name, result):
            yield "| " + " | ".join(row) + " |"


def main(arguments: list[str] | None = None) -> int:
    """Run what is not there yet, print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder (default runs)")
    parser.add_argument("--output", type=Path, help="folder for the table")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=list(NAMES))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.logs.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {name: {} for name in options.tasks}
    for name, result in results.items():
        for who in ("grid", "find_lr", "lightning"):
            log = options.logs / f"find_lr-{name}-{who}.json"
            if not log.exists():
                log.write_text(json.dumps(run(name, who)), encoding="utf-8")
            result[who] = json.loads(log.read_text(encoding="utf-8"))
    text = "\n".join(report(results)) + "\n"
    print(text)
    if options.output is not None:
        (options.output / "find_lr.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
