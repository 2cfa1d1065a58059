"""PyTorch: the adapter over `torch.optim.AdamW(fused=True)`, and what else there is.

What is not installed is left out; `pip install ".[peers]"` installs all but the optimizer of the
paper's authors, which `pip install git+https://github.com/sabersalehk/MetaOptimize.git` does.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from metaopt_torch import MetaOptimizer

import metaopt as mo
from benchmarks.contenders import Contender, Shapes
from benchmarks.peers import OPTIMIZERS

NOTE = "torch.optim.AdamW(fused=True)"
PACKAGES = ("torch",)

BLOCKS: dict[str, Any] = {
    "scalar": "scalar",
    "six blocks": {f"block {i}": [f"{i}.*"] for i in range(6)},
    "per tensor": "tensor",
}
PAIRS: dict[str, tuple[Any, Any]] = {
    "AdamW + Lion": (mo.AdamW(weight_decay=0.1), mo.Lion()),
    "Lion + Lion": (mo.Lion(weight_decay=0.1), mo.Lion()),
    "SGD momentum + Adam": (mo.SGD(momentum=0.9, weight_decay=0.1), mo.AdamW()),
}


def parameters(shapes: Shapes) -> dict[str, Any]:
    """Return parameters with gradients, named so that every sixth belongs to one of six blocks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    params = {}
    for index, (name, shape) in enumerate(shapes.items()):
        param = torch.zeros(shape, device=device, requires_grad=True)
        param.grad = torch.randn(shape, device=device, generator=generator)
        params[f"{index * 6 // len(shapes)}.{name}"] = param
    return params


def waiting(step: Callable[[], object]) -> Callable[[], object]:
    """Return a step that ends when the device has."""
    if not torch.cuda.is_available():
        return step

    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run


def steps(shapes: Shapes) -> Iterator[Contender]:
    """Yield torch's fused AdamW and all that is compared with it."""
    params = list(parameters(shapes).values())
    yield Contender(
        "AdamW, fused", waiting(torch.optim.AdamW(params, fused=True).step), reference=True
    )
    foreach = torch.optim.AdamW(list(parameters(shapes).values()), foreach=True)
    yield Contender("AdamW, foreach", waiting(foreach.step))
    for pair, (base, meta) in PAIRS.items():
        for name, blocks in BLOCKS.items() if pair == "AdamW + Lion" else [("scalar", "scalar")]:
            if name == "six blocks" and len(shapes) < 6:
                continue
            for compiled in (
                (True, False) if (pair, name) == ("AdamW + Lion", "scalar") else (True,)
            ):
                named = list(parameters(shapes).items())
                opt = MetaOptimizer(
                    named, base=base, meta=meta, blocks=blocks, compile=compiled, discount=1.0
                )
                how = "" if compiled else ", eager"
                yield Contender(f"{pair}, {name}{how}", waiting(opt.step))
    two = MetaOptimizer(
        list(parameters(shapes).items()),
        base=mo.AdamW(weight_decay=0.1),
        meta=mo.FastStart(mo.AdamW()),
        discount=(0.99, 1.0),
    )
    yield Contender("AdamW + AdamW, scalar, two discounts", waiting(two.step))
    others = {"AdamW + Lion, scalar, of the paper's authors": authors} | OPTIMIZERS
    for name, make in others.items():
        try:
            opt = make(list(parameters(shapes).values()))
        except ModuleNotFoundError:
            continue
        yield Contender(name, waiting(opt.step))


def authors(params: Sequence[Any]) -> Any:
    """Return the optimizer of the paper's authors."""
    module = importlib.import_module("meta_optimize.optimizer")
    return module.MetaOptimize_AdamW_Lion_hg(params, weight_decay=0.1)
