"""LightBench's tasks on a CPU, each optimizer in one configuration that nobody has tuned.

    python -m benchmarks.lightbench --logs runs --minutes 40 --output benchmarks/results

LightBench searches for the settings of an optimizer, hundreds of runs for each task, and asks for
CUDA. Here a task is taken from it as it stands, model, data, loss and what counts as solved, and
every optimizer has one try with each seed. Tasks of the tiers trivial, easy and medium, as far as
`STEPS` steps of AdamW take less than a minute. Started again it goes on where it was.
"""

import argparse
import json
import lzma
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metaopt_torch import MetaOptimizer, wrap
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.peers import OPTIMIZERS
from benchmarks.training.loop import COMMIT, replace_file
from benchmarks.training.wrapped import INNER

__all__ = ["main"]

TIERS = ("trivial", "easy", "medium")
SEEDS = (0, 1, 2)
#: Of a run, and the seconds that this many of AdamW may take.
STEPS, SECONDS = 1000, 60.0
#: Steps by which that is judged.
PROBE = 10
#: A step size that ends below this, of 1e-4 at the start, and no solution: the run is stuck.
STUCK = 1e-8
#: Modules of LightBench that are no tasks, ask for a data set, or look at the memory of a GPU.
LEFT_OUT = ("CIFAR10_wide", "CIFAR100", "MNIST", "SVHN", "Tolstoi_RNN", "memory_constrained")


def _adamw(lr: float) -> Callable[[nn.Module], list[Any]]:
    return lambda model: [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)]


def _peer(name: str) -> Callable[[nn.Module], list[Any]]:
    return lambda model: [OPTIMIZERS[name](list(model.parameters()))]


def _muon(model: nn.Module) -> list[Any]:
    made = list(INNER["Muon"](list(model.named_parameters()), 0.0).values())
    for optimizer in made:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3  # the default of both
    return made


#: From a model to what makes its steps; weight decay is 0 throughout, as in LightBench.
METHODS: dict[str, Callable[[nn.Module], list[Any]]] = {
    "metaopt": lambda model: [MetaOptimizer(model.parameters(), compile=False)],
    "AdamW 1e-3": _adamw(1e-3),
    "AdamW 1e-2": _adamw(1e-2),
    "AdamW 1e-1": _adamw(1e-1),
    "schedule-free AdamW": _peer("schedule-free AdamW"),
    "Prodigy": _peer("Prodigy"),
    "DoG": _peer("DoG"),
    "D-Adaptation Adam": _peer("D-Adaptation Adam"),
    "mechanic AdamW": _peer("mechanic AdamW"),
    "Muon": _muon,
    "Muon, wrapped": lambda model: [
        wrap(INNER["Muon"](list(model.named_parameters()), 0.0), compile=False)
    ],
}


class _OnCpu(TorchFunctionMode):
    """Has what asks for CUDA come to lie on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        args = tuple("cpu" if isinstance(arg, str) and arg == "cuda" else arg for arg in args)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Problem:
    """What LightBench hands to its search.

    Parameters
    ----------
    model : nn.Module
    data : callable
        Returns inputs and targets of a step, None and None if the model has its own.
    loss_fn : callable, optional
        Of the model's output and the targets; without it the output is the loss.
    won : callable
        From the model and the loss of the last step to whether it is solved, and more.
    """

    model: nn.Module
    data: Callable[[], tuple[Any, Any]]
    loss_fn: Callable[[Any, Any], Tensor] | None
    won: Callable[[nn.Module, float], tuple[bool, Any]]

    def loss(self) -> Tensor:
        """Return the loss of a step."""
        with _OnCpu():
            inputs, targets = self.data()
            out: Tensor = self.model() if inputs is None else self.model(inputs)
            return out if self.loss_fn is None else self.loss_fn(out, targets)


def seeded(seed: int) -> None:
    """Have all that is drawn follow from a seed."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 # what LightBench draws from
    random.seed(seed)


@contextmanager
def _caught(module: Any) -> Iterator[list[Problem]]:
    """Have a module hand over its problem in place of searching."""
    found: list[Problem] = []

    def trial(model: Any, data: Any, loss_fn: Any, win_condition: Any, *_: Any, **more: Any) -> Any:
        dtype = more.get("dtype")
        dtype = dtype[0] if isinstance(dtype, Sequence) and not isinstance(dtype, str) else dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        found.append(
            Problem(model.to(dtype), data or (lambda: (None, None)), loss_fn, win_condition)
        )

    own, module.trial = module.trial, trial
    try:
        with _OnCpu():
            yield found
    finally:
        module.trial = own


def problem(name: str, tier: str, seed: int) -> Problem:
    """Return a task of LightBench, as its `main` makes it.

    Parameters
    ----------
    name : str
        Of its module.
    tier : str
        Of `TIERS`.
    seed : int
    """
    module = import_module(f"lightbench.{name}")
    ours = {"config": tier, "weight_decay": 0.0, "steps": 100_000}  # as its own runner has it
    options = {
        option: ours.get(option, getattr(parameter.default, "default", parameter.default))
        for option, parameter in signature(module.main).parameters.items()
    }
    seeded(seed)
    with _caught(module) as found:
        module.main(**options)
    seeded(seed)
    return found[0]


def tasks() -> list[tuple[str, str]]:
    """Return modules and tiers of LightBench that a CPU can run without a data set."""
    import lightbench

    found = []
    for name in lightbench.available():
        if name in LEFT_OUT:
            continue
        try:
            module = import_module(f"lightbench.{name}")
        except ImportError:  # a script that draws, without what it draws with
            continue
        if "config" in signature(getattr(module, "main", lambda: None)).parameters:
            tiers = getattr(module, "configs", TIERS[:1])
            found += [(name, tier) for tier in TIERS if tier in tiers]
    return found


def run(name: str, tier: str, method: str, seed: int, steps: int) -> dict[str, Any]:
    """Train until the task is solved, a loss is not finite, or the steps are spent.

    Returns
    -------
    dict
        "solved", the step after which it was, or None; "end", why it ended; "loss", the last;
        "alpha", the last learned step size, the least of several; "seconds".
    """
    task = problem(name, tier, seed)
    optimizers = METHODS[method](task.model)
    solved, end, value, began = None, "steps", math.nan, time.perf_counter()
    for step in range(1, steps + 1):
        for optimizer in optimizers:
            _mode(optimizer, "train")
            optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            _mode(optimizer, "eval")
        value = loss.item()
        if not math.isfinite(value):
            end = "not finite"
            break
        if task.won(task.model, value)[0]:
            solved, end = step, "solved"
            break
    learned = [
        float(size.double().log().mean().exp())
        for optimizer in optimizers
        if hasattr(optimizer, "step_sizes")
        for size in optimizer.step_sizes().values()
    ]
    alpha = min(learned) if learned else None
    return {
        "solved": solved,
        "end": end,
        "loss": value if math.isfinite(value) else None,
        "alpha": alpha,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _mode(optimizer: Any, name: str) -> None:
    """Have a schedule-free optimizer put its weights where they are trained, or judged."""
    if hasattr(optimizer, name):
        getattr(optimizer, name)()


def cost(name: str, tier: str) -> dict[str, Any]:
    """Return how long `STEPS` steps of AdamW take, and the seeds that a task is worth.

    A task in which nothing is drawn has one. Of one with which LightBench fails, the error.
    """
    try:
        if run(name, tier, "AdamW 1e-3", SEEDS[0], 1)["end"] == "not finite":
            return {"cost": None, "error": "the first loss is not finite"}
        one, other = (run(name, tier, "AdamW 1e-3", seed, PROBE) for seed in SEEDS[:2])
    except (AssertionError, TypeError, RuntimeError) as error:
        return {"cost": None, "error": f"{type(error).__name__}: {error}"}
    seeds = SEEDS[:1] if one["loss"] == other["loss"] else SEEDS
    return {"cost": one["seconds"] * STEPS / PROBE, "seeds": seeds}


def train(path: Path, minutes: float) -> None:
    """Add runs to a log of JSON lines, until all are there or time is up.

    All tasks are run with the first seed, the quickest first, then with the second and so on.

    Parameters
    ----------
    path : Path
    minutes : float
    """
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    costs = {line["task"]: line for line in known if "cost" in line}
    done = {(line["task"], line["method"], line["seed"]) for line in known if "seed" in line}
    until = time.monotonic() + 60.0 * minutes
    with path.open("a", encoding="utf-8") as log:

        def write(line: Mapping[str, Any]) -> None:
            log.write(json.dumps({**line, "made_with": COMMIT}) + "\n")
            log.flush()

        for name, tier in tasks():
            task = f"{name} {tier}"
            if task not in costs:
                costs[task] = {"task": task, **cost(name, tier)}
                write(costs[task])
        quick = _quick(costs.values())
        quick.sort(key=lambda line: line["cost"])
        for seed, line, method in product(SEEDS, quick, METHODS):
            key = {"task": line["task"], "method": method, "seed": seed}
            if seed not in line["seeds"] or tuple(key.values()) in done:
                continue
            if time.monotonic() > until:
                return
            name, tier = line["task"].split()
            try:
                found = run(name, tier, method, seed, STEPS)
            except Exception as error:  # of a package, where a parameter has no gradient, say
                found = {"solved": None, "end": "error", "alpha": None, "error": str(error)[:200]}
            write({**key, **found})


def _quick(costs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the tasks that are run; one that takes no time to speak of costs 0."""
    return [line for line in costs if line["cost"] is not None and line["cost"] < SECONDS]


Runs = Mapping[tuple[str, int, str], Mapping[str, Any]]
Pairs = Sequence[tuple[str, int]]


def report(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the page."""
    runs = {(line["task"], line["seed"], line["method"]): line for line in lines if "seed" in line}
    pairs = [
        pair
        for pair in dict.fromkeys((task, seed) for task, seed, _ in runs)
        if all((*pair, method) in runs for method in METHODS)
    ]
    yield "# LightBench, untuned, on a CPU"
    yield ""
    yield from _how(lines, pairs)
    if not pairs:
        return
    yield ""
    yield from _summary(runs, pairs)
    yield ""
    yield "## Steps by task"
    yield ""
    yield "The median of solved runs, where more than half of the seeds were solved."
    yield ""
    yield f"| task | seeds | {' | '.join(METHODS)} |"
    yield "|" + " --- |" * (2 + len(METHODS))
    for name in dict.fromkeys(task for task, _ in pairs):
        medians = [_median(runs, pairs, name, method) for method in METHODS]
        cells = ("" if median is None else f"{median:g}" for median in medians)
        yield f"| {name} | {sum(task == name for task, _ in pairs)} | {' | '.join(cells)} |"


def _how(lines: Sequence[dict[str, Any]], pairs: Pairs) -> Iterator[str]:
    """Yield what was run, with what, and what was not."""
    costs = {line["task"]: line for line in lines if "cost" in line}
    failed = [task for task, line in costs.items() if line["cost"] is None]
    slow = [task for task, line in costs.items() if line["cost"] and line["cost"] >= SECONDS]
    quick = _quick(costs.values())
    yield (
        f"Made by `python -m benchmarks.lightbench`: {len({task for task, _ in pairs})} of the "
        f"{len(quick)} tasks of LightBench's tiers {', '.join(TIERS)} that take less than a "
        f"minute, with {len(SEEDS)} seeds, or one where nothing is drawn; {len(pairs)} of "
        f"{sum(len(line['seeds']) for line in quick)} pairs of task and seed are run, all tasks "
        "with one seed first, the quickest before others. With each pair there is one run of "
        f"{STEPS:,} steps at most for each optimizer. Its configuration is the same for all tasks: "
        "metaopt without any option (steps are not compiled, which changes no formula), AdamW at "
        "the lr that is said, Muon, with AdamW for what is no matrix, at 1e-3, its default, and "
        "the others as their authors' packages have them; weight decay is 0. A task is solved when "
        "LightBench says so, by the loss of a step or by the weights, the last ones of all but "
        "schedule-free. LightBench itself has each optimizer search with a hundred runs and more "
        "for each task, so that its published counts are not to be compared with these. "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch "
        f"{torch.__version__}; {', '.join(sorted({line['made_with'] for line in lines}))}."
    )
    yield ""
    yield (
        f"Left out are those of which {STEPS:,} steps of AdamW take more than a minute "
        f"({', '.join(slow) or 'none'}), those with which LightBench itself fails "
        f"({', '.join(failed) or 'none'}), and what asks for a data set or a GPU "
        f"({', '.join(LEFT_OUT)})."
    )


def _summary(runs: Runs, pairs: Pairs) -> Iterator[str]:
    """Yield the table of all optimizers, and what its columns are."""
    names = list(dict.fromkeys(task for task, _ in pairs))
    errors = [f"{task} ({method})" for (task, _, method), line in runs.items() if "error" in line]
    yield (
        "*Runs solved*: pairs of task and seed; *tasks solved*: with more than half of their "
        "seeds; *steps*: the median of runs that were solved, which are the easier ones where they "
        "are few; *to the quickest*: the geometric mean of a run's steps by the least that any "
        f"optimizer needed, a run without a solution counted as {STEPS:,}; *lost*: a loss was not "
        f"finite, or a step raised an error ({', '.join(errors) or 'none'}); *stuck*: no solution, "
        f"and a learned step size below {STUCK:g} at the end."
    )
    yield ""
    heads = ("optimizer", "runs solved", "tasks solved", "steps", "to the quickest")
    yield f"| {' | '.join(heads)} | lost | stuck |"
    yield "|" + " --- |" * 7
    least = {
        pair: min(runs[*pair, method]["solved"] or STEPS for method in METHODS) for pair in pairs
    }
    for method in METHODS:
        own = {pair: runs[*pair, method] for pair in pairs}
        solved = [line["solved"] for line in own.values() if line["solved"]]
        whole = sum(_median(runs, pairs, name, method) is not None for name in names)
        ratios = [math.log((line["solved"] or STEPS) / least[pair]) for pair, line in own.items()]
        lost = sum(line["end"] in ("not finite", "error") for line in own.values())
        stuck = sum(_stuck(line) for line in own.values())
        learned = any(line["alpha"] is not None for line in own.values())
        yield (
            f"| {method} | {len(solved)} of {len(pairs)} | {whole} of {len(names)} | "
            f"{f'{statistics.median(solved):g}' if solved else '-'} | "
            f"{math.exp(statistics.fmean(ratios)):.2f} | {lost} | {stuck if learned else ''} |"
        )


def _median(runs: Runs, pairs: Pairs, name: str, method: str) -> float | None:
    """Return the median step of a task's solved runs; None where half of them or more were not."""
    own = [runs[*pair, method]["solved"] for pair in pairs if pair[0] == name]
    solved = [step for step in own if step]
    return statistics.median(solved) if 2 * len(solved) > len(own) else None


def _stuck(line: Mapping[str, Any]) -> bool:
    alpha = line["alpha"]
    return line["end"] == "steps" and alpha is not None and not alpha >= STUCK


def main(arguments: list[str] | None = None) -> int:
    """Run what is not done yet, print the tables, and write them where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder (default runs)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of this call (no limit)")
    parser.add_argument("--output", type=Path, help="folder for the tables and the log")
    parser.add_argument("--threads", type=int, default=1, help="of this process (default 1)")
    parser.add_argument("--report", action="store_true", help="of what is finished; train nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.logs.mkdir(parents=True, exist_ok=True)
    path = options.logs / "lightbench.jsonl"
    if not options.report:
        train(path, options.minutes)
    lines = path.read_text().splitlines() if path.is_file() else []
    if not lines:
        parser.error(f"there are no runs to report: no {path.name} in {options.logs}.")
    text = "\n".join(report([json.loads(line) for line in lines])) + "\n"
    print(text)
    if options.output is not None:
        (options.output / "lightbench.md").write_text(text, encoding="utf-8")
        replace_file(options.output / "lightbench.jsonl.xz", lzma.compress(path.read_bytes()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
