"""The passes over memory: those of the core on buffers, in place.

A run of leaves is handed in as flat buffers, or as rows that have a step size each. What is
computed is in `metaopt.passes`; here are the sums and the writes in place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metaopt.passes import Leaf, fused_pass, leaf_pass, leaf_product
from metaopt.rules import Rule
from metaopt_torch.rounding import rounded

__all__ = ["Kind", "Pass", "fused", "moved", "products"]

#: From buffers and step sizes to sums; writes into the buffers.
Pass: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """What a pass does, beside its rule; fixed when it is compiled.

    Parameters
    ----------
    inject : {"update", "gradient"}
    maximize : bool
        Step along the gradient and not against it.
    rounding : {"nearest", "stochastic", "kahan"}
        Of parameters narrower than the state.
    rows : bool
        Whether buffers are matrices whose rows have a step size each.
    """

    inject: str
    maximize: bool
    rounding: str
    rows: bool


def fused(kind: Kind) -> Pass:
    """Return the pass that moves the parameters and sums h * g by row, or over all."""

    def run(
        rule: Rule,
        param: Tensor,
        grad: Tensor,
        slots: Mapping[str, Tensor],
        trace: Tensor,
        compensation: Tensor | None,
        count: Tensor,
        lr: Tensor,
        lr_trace: Tensor | None,
        keep: Tensor,
        discount: Tensor,
    ) -> Tensor:
        leaf = _leaf(kind, param, grad, slots, trace, compensation, count)
        product, step = fused_pass(
            rule,
            leaf,
            lr,
            lr if lr_trace is None else lr_trace,
            keep=keep,
            discount=discount,
            inject=kind.inject,
        )
        # In memory of its own, in name: the compiler then sums it in the loop that overwrites the
        # trace, and never stores it. Without this the sum is a second loop over memory.
        product = product.as_strided(product.shape, product.stride())
        _write(kind, leaf, step, param, slots, trace, compensation, None)
        return product.sum(1) if kind.rows else product.sum()

    return run


def products(kind: Kind) -> Pass:
    """Return the pass that sums h * g and says whether a gradient is not finite."""

    def run(
        rule: Rule,  # noqa: ARG001
        grad: Tensor,
        trace: Tensor,
    ) -> tuple[Tensor, Tensor]:
        product = leaf_product(trace, _gradient(kind, grad, trace.dtype))
        lost = torch.any(torch.logical_not(torch.isfinite(grad)))
        return product.sum(1) if kind.rows else product.sum(), lost

    return run


def moved(kind: Kind) -> Pass:
    """Return the pass that moves the parameters when the meta-gradient is known."""

    def run(
        rule: Rule,
        param: Tensor,
        grad: Tensor,
        slots: Mapping[str, Tensor],
        trace: Tensor,
        compensation: Tensor | None,
        count: Tensor,
        lr: Tensor,
        lr_trace: Tensor | None,
        keep: Tensor,
        discount: Tensor,
        accepted: Tensor | None,
    ) -> None:
        leaf = _leaf(kind, param, grad, slots, trace, compensation, count)
        step = leaf_pass(
            rule,
            leaf,
            lr,
            lr if lr_trace is None else lr_trace,
            keep=keep,
            discount=discount,
            inject=kind.inject,
        )
        _write(kind, leaf, step, param, slots, trace, compensation, accepted)

    return run


def _gradient(kind: Kind, grad: Tensor, dtype: torch.dtype) -> Tensor:
    grad = grad.to(dtype)
    return -grad if kind.maximize else grad


def _leaf(
    kind: Kind,
    param: Tensor,
    grad: Tensor,
    slots: Mapping[str, Tensor],
    trace: Tensor,
    compensation: Tensor | None,
    count: Tensor,
) -> Leaf:
    wide = param.to(trace.dtype)
    if compensation is not None:
        wide = wide + compensation
    return Leaf(wide, _gradient(kind, grad, trace.dtype), slots, count, trace)


def _write(
    kind: Kind,
    leaf: Leaf,
    step: Any,
    param: Tensor,
    slots: Mapping[str, Tensor],
    trace: Tensor,
    compensation: Tensor | None,
    accepted: Tensor | None,
) -> None:
    """Write a step into the buffers; where it is not `accepted` they keep what they hold."""
    new = leaf.param - step.delta
    narrow = rounded(new, param.dtype, kind.rounding)
    pairs = [(param, narrow), (trace, step.trace)]
    pairs += [(old, step.slots[slot]) for slot, old in slots.items()]
    if compensation is not None:
        pairs.append((compensation, new - narrow.to(new.dtype)))
    for old, value in pairs:
        old.copy_(value if accepted is None else torch.where(accepted, value, old))
