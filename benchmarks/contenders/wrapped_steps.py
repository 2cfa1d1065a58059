"""PyTorch: optimizers of torch's by themselves, and wrapped by `metaopt_torch.wrap`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from metaopt_torch import wrap

from benchmarks.contenders import Contender, Shapes
from benchmarks.contenders.torch_steps import parameters, waiting

NOTE = "the same optimizer by itself"
PACKAGES = ("torch",)
#: How many discounts: each has an average of the weights, which is read and written.
DISCOUNTS: Mapping[str, Any] = {"one discount": 1.0, "two discounts": (0.99, 1.0)}


def adamw(params: Mapping[str, Any]) -> list[Any]:
    """Return AdamW, in one loop over memory."""
    return [torch.optim.AdamW(list(params.items()), lr=1.0, weight_decay=0.1, fused=True)]


def muon(params: Mapping[str, Any]) -> list[Any]:
    """Return Muon."""
    return [torch.optim.Muon(list(params.items()), lr=1.0, weight_decay=0.1)]


def matrices_of_a_layer(shapes: Shapes) -> Shapes:
    """Return the matrices of the first layer: those of all take Muon a minute on a CPU."""
    return {name: s for name, s in shapes.items() if name.startswith("layers.0.") and len(s) == 2}


def steps(shapes: Shapes) -> Iterator[Contender]:
    """Yield each optimizer with a fixed lr, and wrapped."""
    for name, make, some in (
        ("AdamW, fused", adamw, shapes),
        ("Muon of one layer's matrices", muon, matrices_of_a_layer(shapes)),
    ):
        if not some:
            continue
        plain = make(parameters(some))
        for group in plain[0].param_groups:
            group["lr"] = 1e-4
        yield Contender(name, waiting(plain[0].step), reference=True)
        for how, discount in DISCOUNTS.items():
            wrapped = wrap(make(parameters(some)), discount=discount, compile=True)
            yield Contender(f"wrapped, {how}", waiting(wrapped.step))
