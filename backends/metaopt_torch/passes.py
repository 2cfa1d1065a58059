"""The passes over memory: those of the core on buffers, in place.

A run of leaves is handed in as flat buffers, as rows that have a step size each, or as one whole
leaf. What is
computed is in `metaopt.leaf`; here are the sums and the writes in place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metaopt.jets import Jet
from metaopt.leaf import Leaf, advance, has_average
from metaopt.leaf import fused as fused_step
from metaopt.rules import Rule
from metaopt_torch.hyperparameters import with_arrays
from metaopt_torch.rounding import lost, rounded

__all__ = ["Arrays", "Kind", "Pass", "fused", "moved", "products"]

#: Buffers and step sizes, by name: "param", "grad", the rule's slots, "average" or else "trace",
#: and so on.
Arrays: TypeAlias = Mapping[str, Tensor]
#: From a rule and arrays to sums; writes into the buffers among them.
Pass: TypeAlias = Callable[[Rule, Arrays], Any]


@dataclass(frozen=True)
class Kind:
    """What a pass does, beside its rule; fixed when it is compiled.

    Parameters
    ----------
    maximize : bool
        Step along the gradient and not against it.
    rounding : {"nearest", "stochastic", "kahan"}
        Of parameters narrower than the state.
    axes : tuple of int or None
        Axes of the buffers over which a block reaches, None for all.
    whole : bool
        Whether they are one leaf in its own shape, and not to be cut.
    """

    maximize: bool
    rounding: str
    axes: tuple[int, ...] | None
    whole: bool = False


def fused(kind: Kind) -> Pass:
    """Return the pass that moves the parameters and sums h * g by block.

    It takes "param", "grad", the slots, "average" or "trace", "count", "alpha", "mask" and
    "discount"; "alpha_trace" where it is another than `alpha`, and hyperparameters that are others
    than the rule's (`with_arrays`); "compensation" for Kahan's rounding.
    """

    def run(rule: Rule, arrays: Arrays) -> Tensor:
        product, _, leaf = fused_step(*_given(kind, rule, arrays), **_options(arrays))
        # as_strided makes Inductor fuse this sum into the loop that overwrites the average or the
        # trace; without it the sum is a second loop over memory
        product = product.as_strided(product.shape, product.stride())
        _write(kind, arrays, leaf)
        return _by_block(kind, product)

    return run


def products(kind: Kind) -> Pass:
    """Return the pass that sums h * g and says whether a gradient is not finite.

    It takes "grad" and "trace", or "param", "average" and "count".
    """

    def run(rule: Rule, arrays: Arrays) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        if "average" in arrays:
            trace = arrays["param"] - arrays["average"]
            trace = torch.where(has_average(arrays["count"]), trace, 0.0)
        else:
            trace = arrays["trace"]
        grad = _gradient(kind, arrays)
        product = trace * grad
        refused = torch.any(torch.logical_not(torch.isfinite(grad)))
        return _by_block(kind, product), refused

    return run


def moved(kind: Kind) -> Pass:
    """Return the pass that moves the parameters when the meta-gradient is known.

    It takes what `fused` takes, and "accepted" where steps can be refused.
    """

    def run(rule: Rule, arrays: Arrays) -> None:
        rule, leaf, grad, alpha = _given(kind, rule, arrays)
        options = _options(arrays)
        if leaf.average is not None:
            options["mask"] = options["mask"] & has_average(leaf.count)
            param = leaf.param.value
            leaf = leaf._replace(param=Jet(param, param - leaf.average))
        _, leaf = advance(rule, leaf, Jet(grad), alpha, **options)
        _write(kind, arrays, leaf)

    return run


def _by_block(kind: Kind, product: Tensor) -> Tensor:
    """Return the sums over blocks, a vector, or of the one block, of shape ()."""
    if kind.axes is None:
        return product.sum()
    return (product.sum(kind.axes) if kind.axes else product).reshape(-1)


def _gradient(kind: Kind, arrays: Arrays) -> Tensor:
    grad = arrays["grad"].to(_kept(arrays).dtype)
    return -grad if kind.maximize else grad


def _kept(arrays: Arrays) -> Tensor:
    """Return the average or the trace, in the compute dtype."""
    return arrays["average"] if "average" in arrays else arrays["trace"]


def _given(kind: Kind, rule: Rule, arrays: Arrays) -> tuple[Rule, Leaf, Tensor, Jet[Any]]:
    """Return what the core's passes take: rule, row, gradient and step size."""
    wide = arrays["param"].to(_kept(arrays).dtype)
    if "compensation" in arrays:
        wide = wide + arrays["compensation"]
    rule = with_arrays(rule, arrays)
    slots = {slot: arrays[slot] for slot in rule.slots}
    leaf = Leaf.of(
        wide, slots, arrays["count"], trace=arrays.get("trace"), average=arrays.get("average")
    )
    alpha = Jet(arrays["alpha"], arrays.get("alpha_trace", arrays["alpha"]))
    return rule, leaf, _gradient(kind, arrays), alpha


def _options(arrays: Arrays) -> dict[str, Any]:
    return {"mask": arrays["mask"], "discount": arrays["discount"]}


def _write(kind: Kind, arrays: Arrays, leaf: Leaf) -> None:
    """Write the next row into the buffers; of a step not accepted they keep what they hold."""
    param, accepted = arrays["param"], arrays.get("accepted")
    new = leaf.param.value
    narrow = rounded(new, param.dtype, kind.rounding)
    kept: Any = leaf.param.first if leaf.average is None else leaf.average
    pairs = [(param, narrow), (_kept(arrays), kept)]
    pairs += [(arrays[slot], jet.value) for slot, jet in leaf.slots.items()]
    if "compensation" in arrays:
        pairs.append((arrays["compensation"], lost(new, narrow)))
    for old, value in pairs:
        old.copy_(value if accepted is None else torch.where(accepted, value, old))
