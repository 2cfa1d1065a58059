"""What an iteration of training costs with each optimizer, in turns in one process, as ratios.

    python -m benchmarks.iterations [--model resnet18] [--device cuda] [--output FOLDER]

Forward pass, backward pass and step, on one batch of random data: ResNet-18 with 100 images of 32
by 32 pixels, the language model of 15 million parameters with 8 texts of 256 tokens.
"""

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from metaopt_torch import MetaOptimizer
from torch.nn.functional import cross_entropy

import metaopt as mo
from benchmarks.contenders import Contender
from benchmarks.contenders.torch_steps import authors
from benchmarks.paper.llama import Llama
from benchmarks.paper.resnet import ResNet18
from benchmarks.step_cost import rows, times

MODELS = ("resnet18", "llama15m")


def made(model: str, device: str, *, smoke: bool) -> tuple[Any, Callable[[Any], Any]]:
    """Return a model, and what gives its loss on the one batch; small ones to `smoke`."""
    torch.manual_seed(0)
    if model == "resnet18":
        count, width = (4, 4) if smoke else (100, 64)
        network = ResNet18(10, large=False, width=width)
        x = torch.randn(count, 3, 32, 32, device=device)
        y = torch.randint(10, (count,), device=device)
        return network.to(device), lambda net: cross_entropy(net(x), y)
    words = 50 if smoke else 32_000
    sizes: Any = {"width": 24, "layers": 1, "heads": 2, "hidden": 32} if smoke else {}
    tokens = torch.randint(words, (8, 17 if smoke else 257), device=device)
    return Llama(words, **sizes).to(device), lambda net: cross_entropy(
        net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    )


#: Optimizers of named parameters; the first is what the others are compared with.
OPTIMIZERS: dict[str, Callable[[list[tuple[str, Any]]], Any]] = {
    "AdamW, fused": lambda named: torch.optim.AdamW([p for _, p in named], fused=True),
    "MetaOptimizer, as it is": lambda named: MetaOptimizer(named, base=mo.AdamW(weight_decay=0.1)),
    "MetaOptimizer, one discount": lambda named: MetaOptimizer(
        named, base=mo.AdamW(weight_decay=0.1), discount=1.0
    ),
    "of the paper's authors": lambda named: authors([p for _, p in named]),
}


def contenders(model: str, device: str, *, smoke: bool = False) -> Iterator[Contender]:
    """Yield the iterations of each optimizer, each with a model of its own."""
    for index, (name, make) in enumerate(OPTIMIZERS.items()):
        network, loss_of = made(model, device, smoke=smoke)
        try:
            opt = make(list(network.named_parameters()))
        except ModuleNotFoundError:
            continue
        yield Contender(name, _iteration(network, loss_of, opt, device), reference=index == 0)


def _iteration(network: Any, loss_of: Any, opt: Any, device: str) -> Callable[[], None]:
    def run() -> None:
        opt.zero_grad()
        loss_of(network).backward()
        opt.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    """Measure; print, and with `--output` write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20, help="iterations timed of each")
    parser.add_argument("--smoke", action="store_true", help="tiny models: does it run?")
    parser.add_argument("--output", type=Path, help="folder for iterations.md")
    options = parser.parse_args()
    where = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    )
    lines = [
        "# Cost of an iteration, torch",
        "",
        "Made by `python -m benchmarks.iterations`: forward pass, backward pass and step on one "
        f"batch, {options.rounds} rounds in turns in one process, float32; medians, the ratio of "
        "medians to the first row, and in brackets the quartiles of the ratios round by round. "
        f"{where}, {platform.machine()}, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, metaopt {mo.__version__}.",
    ]
    for model in options.model or MODELS:
        made_ones = list(contenders(model, options.device, smoke=options.smoke))
        lines += ["", f"| {model} | ms | ratio |", "| --- | --- | --- |"]
        lines += rows(made_ones, times(made_ones, options.rounds))
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "iterations.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
