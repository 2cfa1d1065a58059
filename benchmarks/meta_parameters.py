"""What it brings to learn weight decay and decay rates, and to learn from held-out gradients.

    python -m benchmarks.meta_parameters [--task NAME] [--jobs 4] [--data FOLDER] \
        [--output benchmarks/results]

A page in the folder keeps the parts of the tasks that are not run again.

Each row is AdamW with the defaults for what is not said; what is measured takes no part in
anything. A row that learns from held-out gradients trains on what is left; all others train on
all. "Best of" is the best mean of a grid, by the very measure that is shown, which flatters it.
"""

import argparse
import importlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

import metaopt as mo
from benchmarks.training.data import shakespeare
from metaopt.demo import network
from metaopt.demo.data import load_digits

__all__ = ["main"]

SEEDS = range(5)
DECAY, BETAS = 0.1, (0.9, 0.999)
DECAYS, FIRST, SECOND = (0.0, 0.01, 0.1, 1.0), (0.0, 0.5, 0.9, 0.99), (0.9, 0.99, 0.999, 0.9999)
META_LR = 1e-2
#: Characters that the next one is told from.
CONTEXT = 5
HEAD = f"""# Learned weight decay and betas

Made by `python -m benchmarks.meta_parameters`. AdamW with the defaults and a weight decay of \
{DECAY:g}; a learned number starts from there, or from what AdamW has by default, with a `meta_lr` \
of {META_LR:g} unless another is said. Means over {len(SEEDS)} seeds and, in brackets, least and \
largest; what was learned at the end by geometric means. *Held out*: learns from gradients of \
what is held out, and trains on the rest; other rows train on all. *Best*: of a grid by the very \
measure that is shown, which flatters it. gdtuo learns Adam's step size and betas, from the same, \
without weight decay.
"""
TIMES = "Times"
#: What is shown of the end of a run.
LAST = ("step size", "weight_decay", "betas[0]", "betas[1]")

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Task:
    """What is learned, on one seed.

    Parameters
    ----------
    params : mapping of name to array
    grads : callable
        From parameters and a batch to gradients.
    draw : callable
        From a generator, a step and "train", "held out" or "all" to a batch.
    measure : callable
        From parameters and the next batch to the measures, by name; the first counts.
    over : float
        Part of the run, from its end, that measures are means over; 0 for the end alone.
    steps : int
    step_size : float
    module : callable
        Returns the model as a torch module that starts from `params`, and its loss.
    """

    params: dict[str, Any]
    grads: Callable[[Any, Any, Any], dict[str, Any]]
    draw: Callable[[np.random.Generator, int, str], Batch]
    measure: Callable[[Any, Batch], dict[str, float]]
    over: float
    steps: int
    step_size: float
    module: Callable[[], tuple[Any, Any]]


def digits(seed: int, noise: float = 0.0) -> Task:
    """Return the digits network, a quarter of its images held out, 2,000 steps of 64."""
    found, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(found.train_labels))
    images, labels = found.train_images[order], found.train_labels[order].copy()
    noisy = rng.random(len(labels)) < noise
    labels[noisy] = rng.integers(0, 10, int(np.sum(noisy)))
    tests = found.test_images, found.test_labels
    return _of_network(network.init(rng), images, labels, tests, 1150, 2000)


def noisy(seed: int) -> Task:
    """Return the same, with 40% of the labels of training and of what is held out drawn anew."""
    return digits(seed, 0.4)


def finetuning(seed: int) -> Task:
    """Return the network of 0 to 4 tuned on 5 to 9, 90 images, 30 held out, 1,000 steps of 30."""
    found, rng = load_digits(), np.random.default_rng(300 + seed)
    chosen = rng.choice(np.flatnonzero(found.train_labels >= 5), 120, replace=False)
    images, labels = found.train_images[chosen], found.train_labels[chosen]
    others = found.test_labels >= 5
    tests = found.test_images[others], found.test_labels[others]
    return _of_network(_trained_on_0_to_4(seed), images, labels, tests, 90, 1000, size=30)


@cache
def _trained_on_0_to_4(seed: int) -> network.Params:
    found, rng = load_digits(), np.random.default_rng(seed)
    first = found.train_labels < 5
    images, labels = found.train_images[first], found.train_labels[first]
    opt, params = mo.MetaOptimize(step_size=1e-3), network.init(rng)
    state = opt.init(params)
    for _ in range(500):
        chosen = rng.choice(len(labels), 64, replace=False)
        _, grads = network.loss_and_grads(params, images[chosen], labels[chosen])
        params, state = opt.step(params, grads, state)
    return params


def characters(data: Path, seed: int) -> Task:
    """Return the next of 3,000 characters of Tiny Shakespeare, 750 held out, 2,000 steps of 64."""
    train, tests, kinds = shakespeare(data)
    begin = int(np.random.default_rng(400 + seed).integers(len(train) - 3000))
    coded, one_hot = train[begin : begin + 3000], np.eye(kinds, dtype=np.float32)

    def examples(coded: Any) -> Batch:
        seen = np.lib.stride_tricks.sliding_window_view(coded[:-1], CONTEXT)
        return one_hot[seen].reshape(len(seen), -1), coded[CONTEXT:]

    rng = np.random.default_rng(seed)
    params = network.init(rng, widths=(CONTEXT * kinds, 64, 64, kinds))
    return _of_network(params, *examples(coded), examples(tests[:20_000]), 2245, 2000)


def _of_network(
    params: dict[str, Any],
    inputs: Any,
    labels: Any,
    tests: Batch,
    train: int,
    steps: int,
    size: int = 64,
) -> Task:
    def module() -> tuple[Any, Any]:
        torch = importlib.import_module("torch")
        nn = torch.nn
        layers = []
        for index in (1, 2, 3):
            weight, bias = (params[f"layer{index}.{name}"] for name in ("weight", "bias"))
            layer = nn.Linear(*weight.shape[::-1])
            with torch.no_grad():
                layer.weight.copy_(torch.tensor(weight))
                layer.bias.copy_(torch.tensor(bias))
            layers.append(layer)
        net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        return net, nn.functional.cross_entropy

    return Task(
        params=params,
        grads=lambda params, x, y: network.loss_and_grads(params, x, y)[1],
        draw=_examples(inputs, labels, train, size),
        measure=lambda params, _: {
            "test loss": network.loss(params, *tests),
            "test accuracy": network.accuracy(params, *tests),
        },
        over=0.0,
        steps=steps,
        step_size=1e-4,
        module=module,
    )


def regression(seed: int) -> Task:
    """Return a noisy regression: 60 inputs, 70 examples and 30 held out, 3,000 steps of 10."""
    rng = np.random.default_rng(100 + seed)
    weights = rng.normal(size=60) / 60**0.5
    inputs = rng.normal(size=(100, 60))
    targets = inputs @ weights + 2.0 * rng.normal(size=100)
    test = rng.normal(size=(2000, 60))

    def measure(params: Any, _: Batch) -> dict[str, float]:
        return {"test loss": float(np.mean((test @ (params["weight"] - weights)) ** 2)) / 2.0}

    draw = _examples(inputs, targets, 70, 10)
    return Task({"weight": np.zeros(60)}, _squares, draw, measure, 0.0, 3000, 1e-3, _linear(60))


def drift(seed: int) -> Task:
    """Return Sutton's tracking task, 3,000 steps, by the error over the second half."""
    rng = np.random.default_rng(200 + seed)
    flips = np.cumsum(np.eye(5, dtype=int)[rng.integers(5, size=3000 // 20 + 1)], axis=0)
    signs = 1.0 - 2.0 * (flips % 2)

    def draw(rng: np.random.Generator, step: int, _: str) -> Batch:
        x = rng.standard_normal((1, 20))
        return x, x[:, :5] @ signs[step // 20]

    def measure(params: Any, batch: Batch) -> dict[str, float]:
        x, y = batch
        return {"error": 0.5 * float(np.mean((x @ params["weight"] - y) ** 2))}

    return Task({"weight": np.zeros(20)}, _squares, draw, measure, 0.5, 3000, 1e-3, _linear(20))


def _examples(inputs: Any, targets: Any, train: int, size: int) -> Any:
    parts = {"train": slice(0, train), "held out": slice(train, None), "all": slice(None)}
    at = {part: np.arange(len(targets))[where] for part, where in parts.items()}

    def draw(rng: np.random.Generator, step: int, part: str) -> Batch:  # noqa: ARG001
        chosen = rng.choice(at[part], size, replace=False)
        return inputs[chosen], targets[chosen]

    return draw


def _squares(params: Any, x: Any, y: Any) -> dict[str, Any]:
    return {"weight": x.T @ (x @ params["weight"] - y) / len(y)}


def _linear(inputs: int) -> Callable[[], tuple[Any, Any]]:
    def module() -> tuple[Any, Any]:
        torch = importlib.import_module("torch")
        layer = torch.nn.Linear(inputs, 1, bias=False, dtype=torch.float64)
        torch.nn.init.zeros_(layer.weight)
        return layer, lambda found, y: 0.5 * (found[:, 0] - y).square().mean()

    return module


TASKS: dict[str, Callable[[int], Task]] = {
    "digits": digits,
    "noisy": noisy,
    "finetuning": finetuning,
    "regression": regression,
    "drift": drift,
}


@dataclass(frozen=True)
class Setting:
    """What a row learns, and from what.

    Parameters
    ----------
    decay, betas
        Of AdamW.
    every : int
        In every how many steps there is a held-out gradient; 0 for none.
    """

    decay: Any = DECAY
    betas: Any = BETAS
    every: int = 0


def settings() -> dict[str, list[tuple[str, Setting]]]:
    """Return the rows: what each of a grid is called, and what it is; of one, just that."""
    rows: dict[str, list[tuple[str, Setting]]] = {}
    for source, every in (("", 0), (", held out", 1)):
        rows[f"step size{source}"] = [("", Setting(every=every))]
        rows[f"step size{source}; best weight decay"] = [
            (f"{decay:g}", Setting(decay, every=every)) for decay in DECAYS
        ]
        if every:
            rows["step size, held out in every fourth step"] = [("", Setting(every=4))]
        else:
            first = [(f"{beta:g}", Setting(betas=(beta, BETAS[1]))) for beta in FIRST]
            second = [(f"{beta:g}", Setting(betas=(BETAS[0], beta))) for beta in SECOND]
            rows |= {"step size; best beta1": first, "step size; best beta2": second}
        for words, setting in (
            ("weight decay", Setting(_learned(DECAY), every=every)),
            ("betas", Setting(betas=_both(META_LR), every=every)),
            ("weight decay and betas", Setting(_learned(DECAY), _both(META_LR), every)),
        ):
            rows[f"and {words}{source}"] = [("", setting)]
        slow = Setting(mo.Learned(DECAY), _both(None), every)
        rows[f"and weight decay and betas{source}, `meta_lr` as by default"] = [("", slow)]
    return rows


def _learned(start: float) -> mo.Learned:
    return mo.Learned(start, meta_lr=META_LR)


def _both(meta_lr: float | None) -> tuple[mo.Learned, mo.Learned]:
    first, second = BETAS
    return mo.Learned(first, meta_lr=meta_lr), mo.Learned(second, meta_lr=meta_lr)


def run(task: Task, setting: Setting, seed: int) -> dict[str, float]:
    """Return the measures of a run, and what was learned in the end."""
    base = mo.AdamW(betas=setting.betas, weight_decay=setting.decay)
    opt = mo.MetaOptimize(base=base, step_size=task.step_size, held_out=setting.every > 0)
    rng = np.random.default_rng(1000 + seed)
    params: Any = task.params
    state = opt.init(params)
    found = []
    for step in range(task.steps):
        batch = task.draw(rng, step, "train" if setting.every else "all")
        if step >= task.steps * (1.0 - task.over):
            found.append(task.measure(params, batch))
        judge = None
        if setting.every and step % setting.every == 0:
            judge = task.grads(params, *task.draw(rng, step, "held out"))
        params, state = opt.step(params, task.grads(params, *batch), state, meta_grads=judge)
    found = found or [task.measure(params, batch)]
    numbers = opt.hyperparameters(state)
    last = {name: float(values["all"]) for name, values in numbers.items()}
    last["step size"] = float(opt.step_sizes(state)["all"])
    return {name: fmean(one[name] for one in found) for name in found[0]} | last


def _gdtuo(module: Any, step_size: float) -> tuple[Any, Any]:
    """Return the wrapper of a module in gdtuo's Adam, which learns its three numbers by Adam."""
    gdtuo = importlib.import_module("gradient_descent_the_ultimate_optimizer.gdtuo")
    adam = gdtuo.Adam(alpha=step_size, optimizer=gdtuo.Adam())
    wrapper = gdtuo.ModuleWrapper(module, optimizer=adam)
    wrapper.initialize()
    return wrapper, adam


def run_gdtuo(task: Task, seed: int) -> dict[str, float]:
    """Return the measures of a run of gdtuo, and what it has learned in the end."""
    torch = importlib.import_module("torch")
    module, loss = task.module()
    wrapper, adam = _gdtuo(module, task.step_size)
    rng = np.random.default_rng(1000 + seed)
    names = list(task.params)

    def params() -> dict[str, Any]:
        arrays = [param.detach().numpy() for param in module.parameters()]
        return {
            name: array.reshape(task.params[name].shape)
            for name, array in zip(names, arrays, strict=True)
        }

    found = []
    for step in range(task.steps):
        batch = task.draw(rng, step, "all")
        if step >= task.steps * (1.0 - task.over):
            found.append(task.measure(params(), batch))
        x, y = map(torch.from_numpy, batch)
        wrapper.begin()
        value = loss(module(x), y)
        wrapper.zero_grad()
        value.backward(create_graph=True)
        wrapper.step()
    found = found or [task.measure(params(), batch)]
    clamped = {
        f"betas[{i}]": float((adam.parameters[f"beta{i + 1}"].tanh() + 1) / 2) for i in (0, 1)
    }
    last = {"step size": float(adam.parameters["alpha"]), **clamped}
    return {name: fmean(one[name] for one in found) for name in found[0]} | last


def times() -> Iterator[str]:
    """Yield the lines on what an iteration of the digits network costs in torch, in turns."""
    torch = importlib.import_module("torch")
    metaopt_torch = importlib.import_module("metaopt_torch")
    torch.set_num_threads(1)
    task = digits(0)
    x, y = map(torch.from_numpy, task.draw(np.random.default_rng(0), 0, "all"))
    module, loss = task.module()

    def of(make: Callable[[Any], Any]) -> Callable[[], None]:
        net, _ = task.module()
        opt = make(net.named_parameters())

        def iteration() -> None:
            opt.zero_grad()
            loss(net(x), y).backward()
            opt.step()

        return iteration

    both = mo.AdamW(weight_decay=mo.Learned(DECAY), betas=_both(None))
    wrapper, _ = _gdtuo(module, 1e-4)

    def gdtuo() -> None:
        wrapper.begin()
        value = loss(module(x), y)
        wrapper.zero_grad()
        value.backward(create_graph=True)
        wrapper.step()

    contenders = {
        "torch.optim.AdamW": of(lambda named: torch.optim.AdamW(p for _, p in named)),
        "the defaults": of(metaopt_torch.MetaOptimizer),
        "and weight decay and betas": of(
            lambda named: metaopt_torch.MetaOptimizer(named, base=both)
        ),
        "gdtuo": gdtuo,
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(60):
        for name, iteration in contenders.items():
            began = time.perf_counter()
            for _ in range(5):
                iteration()
            if turn >= 10:
                taken[name].append(time.perf_counter() - began)
    plain = median(taken["torch.optim.AdamW"])
    yield "| a training iteration of the digits network, torch | times that with AdamW |"
    yield "| --- | --- |"
    for name, seconds in taken.items():
        yield f"| {name} | {median(seconds) / plain:.2f} |"


def section(name: str, make: Callable[[int], Task]) -> list[str]:
    """Return the lines of a task."""
    lines = [f"## {name.capitalize()}", "", f"{_sentence(make)} {_machine()}.", ""]
    columns: list[str] = []
    for row, grid in settings().items():
        results = [(value, [run(make(s), one, s) for s in SEEDS]) for value, one in grid]
        if not columns:
            columns = list(results[0][1][0])[:-1]
            lines.append(f"| learned | {' | '.join((*columns, *LAST))} |")
            lines.append("|" + " --- |" * (1 + len(columns) + len(LAST)))
        value, best = min(results, key=lambda one: fmean(r[columns[0]] for r in one[1]))
        words = f"{row} of {', '.join(v for v, _ in grid)}: {value}" if value else row
        lines.append(_row(words, columns, best))
    try:
        lines.append(_row("gdtuo", columns, [run_gdtuo(make(s), s) for s in SEEDS]))
    except ImportError as error:
        lines.append(f"| gdtuo: not run, {error} |")
    return lines


def report(
    tasks: Mapping[str, Callable[[int], Task]], jobs: int, kept: Mapping[str, str]
) -> Iterator[str]:
    """Yield the page after each part is made; other parts are `kept`, by their titles."""
    parts = dict(kept)

    def page() -> str:
        order = [*map(str.capitalize, (*TASKS, "characters")), TIMES]
        return "\n".join([HEAD, *(f"\n{parts[title]}" for title in order if title in parts)])

    with ProcessPoolExecutor(jobs) as pool:
        for name, lines in zip(tasks, pool.map(section, tasks, tasks.values()), strict=True):
            parts[name.capitalize()] = "\n".join(lines) + "\n"
            yield page()
    try:
        lines = [f"## {TIMES}", "", f"{_machine()}.", "", *times()]
    except ImportError as error:
        lines = [f"## {TIMES}", "", f"Not taken: {error}."]
    parts[TIMES] = "\n".join(lines) + "\n"
    yield page()


def _parts(page: Path) -> dict[str, str]:
    """Return the parts of a page by their titles; none where there is no page."""
    if not page.exists():
        return {}
    _, *parts = page.read_text(encoding="utf-8").split("\n## ")
    return {part.partition("\n")[0]: f"## {part.strip()}\n" for part in parts}


def _machine() -> str:
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}, numpy {np.__version__}, metaopt {mo.__version__}"
    )


def _sentence(make: Any) -> str:
    """Return what a function's docstring says is returned, as a sentence."""
    doc = (make.func if isinstance(make, partial) else make).__doc__ or ""
    words = doc.removeprefix("Return ")
    return words[:1].upper() + words[1:]


def _row(words: str, columns: list[str], runs: list[dict[str, float]]) -> str:
    cells = []
    for column in columns:
        values = [one[column] for one in runs]
        cells.append(f"{fmean(values):.3f} ({min(values):.3f}, {max(values):.3f})")
    for name in LAST:
        values = [one[name] for one in runs if name in one]
        cells.append(_geometric(values, decay=name.startswith("betas")) if values else "")
    return f"| {words} | {' | '.join(cells)} |"


def _geometric(values: list[float], *, decay: bool) -> str:
    """Return the geometric mean; of decay rates, that of their distances to 1 from 1."""
    if min(values) <= 0.0 or (decay and max(values) >= 1.0):
        return "not positive"
    logs = [np.log(1.0 - value if decay else value) for value in values]
    mean = float(np.exp(np.mean(logs)))
    return f"{1.0 - mean:.4g}" if decay else f"{mean:.2g}"


def main(arguments: list[str] | None = None) -> None:
    """Run, print the tables, and write them where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = (*TASKS, "characters")
    parser.add_argument("--task", action="append", choices=names, help="(default all)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--data", type=Path, help="folder of Tiny Shakespeare, for characters")
    parser.add_argument("--output", type=Path, help="folder for the tables")
    options = parser.parse_args(arguments)
    tasks = dict(TASKS)
    if options.data is not None:
        tasks["characters"] = partial(characters, options.data)
    elif "characters" in (options.task or ()):
        parser.error("characters needs `--data`, a folder with tinyshakespeare.txt.")
    chosen = {name: tasks[name] for name in options.task or tasks}
    path = None if options.output is None else options.output / "meta_parameters.md"
    for page in report(chosen, options.jobs, {} if path is None else _parts(path)):
        if path is not None:
            part = path.with_name(f"{path.name}.part")
            part.write_text(page, encoding="utf-8")
            part.replace(path)
    print(page)


if __name__ == "__main__":
    main()
