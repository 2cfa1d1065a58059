"""Optimizers of others that tune their step size, by their authors' packages, untuned."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["OPTIMIZERS"]


def _of(module: str, name: str, **options: Any) -> Callable[[Sequence[Any]], Any]:
    """Return what makes an optimizer of parameters; without its package it raises ImportError."""
    return lambda params: getattr(importlib.import_module(module), name)(params, **options)


def _schedule_free(params: Sequence[Any]) -> Any:
    optimizer = _of("schedulefree", "AdamWScheduleFree")(params)
    optimizer.train()
    return optimizer


def _mechanic(params: Sequence[Any]) -> Any:
    mechanize = importlib.import_module("mechanic_pytorch").mechanize
    return mechanize(torch.optim.AdamW)(params, lr=1.0)


#: From parameters, those that are a `torch.optim.Optimizer`.
OPTIMIZERS: dict[str, Callable[[Sequence[Any]], Any]] = {
    "Prodigy": _of("prodigyopt", "Prodigy"),
    "schedule-free AdamW": _schedule_free,
    "D-Adaptation Adam": _of("dadaptation", "DAdaptAdam"),
    "DoG": _of("dog", "DoG"),
    "mechanic AdamW": _mechanic,
}
