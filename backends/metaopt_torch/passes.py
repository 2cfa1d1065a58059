"""The passes over memory: those of the core on buffers, in place.

A run of leaves is handed in as flat buffers, as rows that have a step size each, or as one whole
leaf. What is
computed is in `metaopt.leaf`; here are the sums and the writes in place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metaopt.jets import Jet
from metaopt.leaf import Leaf, advance, discounted, follow, has_average
from metaopt.leaf import fused as fused_step
from metaopt.rules import Rule
from metaopt.rules.learned import bound
from metaopt_torch.hyperparameters import with_arrays
from metaopt_torch.leaf import Followed
from metaopt_torch.rounding import lost, rounded
from metaopt_torch.state_keys import horizon_keys

__all__ = ["Arrays", "Kind", "Pass", "fused", "moved", "products", "stepped"]

#: Buffers and step sizes, by name: "param", "grad", the rule's slots, "average" or else "trace" (of
#: several discounts "average_0", "discount_0" and so on), and so on.
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
    horizons : tuple of int
        As `Plan.horizons`.
    numbers : tuple of Followed
        Those of the rule that are learned; with any, z is known first.
    """

    maximize: bool
    rounding: str
    axes: tuple[int, ...] | None
    whole: bool = False
    horizons: tuple[int, ...] = ()
    numbers: tuple[Followed, ...] = ()


def fused(kind: Kind) -> Pass:
    """Return the pass that moves the parameters and returns the sums of h * g by block.

    It takes "param", "grad", the slots, "average" or "trace", "count", "alpha", "mask" and
    "discount"; "alpha_trace" where it is another than `alpha`, and hyperparameters that are others
    than the rule's (`with_arrays`); "compensation" for Kahan's rounding.
    """

    def run(rule: Rule, arrays: Arrays) -> tuple[Tensor, ...]:
        rule, rows, grad, alpha = _given(kind, rule, arrays)
        traces, after = [], []
        for row, discount in zip(rows, _discounts(kind, arrays), strict=True):
            trace, delta, leaf = fused_step(
                rule, row, grad, alpha, mask=arrays["mask"], discount=discount
            )
            # as_strided makes Inductor fuse the sum into the loop that overwrites the average or
            # the trace; without it the sum is a second loop over memory. Several sums become one
            # loop, and then part of that one, as they all read the gradient
            traces.append(trace.as_strided(trace.shape, trace.stride()))
            after.append(leaf)
        _write(kind, arrays, delta, after)
        return tuple(_by_block(kind, trace * grad) for trace in traces)

    return run


def products(kind: Kind) -> Pass:
    """Return the pass that sums h * g by block and last says whether a gradient is not finite.

    It takes "grad" and "trace", or "average", "param" and "count". After the sums by block come
    those of learned numbers, of which a bucket has one block each.
    """

    def run(rule: Rule, arrays: Arrays) -> tuple[Tensor, ...]:  # noqa: ARG001
        grad = _gradient(kind, arrays, arrays[_kept(kind, arrays)[0]].dtype)
        sums = []
        for key in _kept(kind, arrays):
            trace = arrays[key]
            if "param" in arrays:
                trace = torch.where(has_average(arrays["count"]), arrays["param"] - trace, 0.0)
            sums.append(_by_block(kind, trace * grad))
        sums += [(arrays[number.key("trace")] * grad).sum() for number in kind.numbers]
        refused = torch.any(torch.logical_not(torch.isfinite(grad)))
        return *sums, refused

    return run


def moved(kind: Kind) -> Pass:
    """Return the pass that moves the parameters when the meta-gradient is known.

    It takes what `fused` takes, and "accepted" where steps can be refused; of each learned number
    its traces, "value" and its derivative "slope", "mask" and "discount".
    """

    def run(rule: Rule, arrays: Arrays) -> None:
        rule, rows, grad, alpha = _given(kind, rule, arrays)
        numbers = _numbers(kind, arrays)
        at_values = bound(rule, {place: jet.value for place, jet in numbers.items()})
        after = []
        for row, discount in zip(rows, _discounts(kind, arrays), strict=True):
            leaf, mask = row, arrays["mask"]
            if leaf.average is not None:
                mask = mask & has_average(leaf.count)
                param = leaf.param.value
                leaf = leaf._replace(param=Jet(param, param - leaf.average))
            delta, leaf = advance(at_values, leaf, Jet(grad), alpha, mask=mask, discount=discount)
            after.append(leaf)
        followed = []
        for number in kind.numbers:
            jets = {place: Jet(jet.value) for place, jet in numbers.items()}
            jets[number.place] = numbers[number.place]
            traces = {slot: arrays[key] for slot, key in number.traces.items()}
            row = _row_of(
                rows[0], traces, arrays[number.key("discount")], arrays[number.key("mask")]
            )
            own = bound(rule, jets)
            row = follow(own, row, Jet(grad), alpha.value, in_direction=number.in_direction)
            followed.append(row)
        _write(kind, arrays, delta, after, followed)

    return run


def stepped(kind: Kind) -> Pass:
    """Return the pass that moves the parameters and their slots, and nothing else.

    That of an optimizer that learns no more. It takes "param", "grad", the slots, "count" and
    "alpha", the latter broadcastable to the parameter; "compensation", "accepted" and
    hyperparameters as `moved` does, of learned numbers their "value" and "slope"; and "unit_step"
    where others make the steps.
    """

    def run(rule: Rule, arrays: Arrays) -> None:
        dtype = arrays["alpha"].dtype
        values = {place: jet.value for place, jet in _numbers(kind, arrays).items()}
        rule = bound(with_arrays(rule, arrays), values)
        slots = {slot: Jet(arrays[slot]) for slot in rule.slots}
        row = Leaf(Jet(_weights(arrays, dtype)), slots, arrays["count"])
        grad = Jet(_gradient(kind, arrays, dtype))
        unit_step = arrays.get("unit_step")
        delta, row = advance(rule, row, grad, Jet(arrays["alpha"]), unit_step=unit_step)
        _put(arrays, _of_step(kind, arrays, delta, row))

    return run


def _by_block(kind: Kind, product: Tensor) -> Tensor:
    """Return the sums over blocks, a vector, or of the one block, of shape ()."""
    if kind.axes is None:
        return product.sum()
    return (product.sum(kind.axes) if kind.axes else product).reshape(-1)


def _gradient(kind: Kind, arrays: Arrays, dtype: torch.dtype) -> Tensor:
    grad = arrays["grad"].to(dtype)
    return -grad if kind.maximize else grad


def _weights(arrays: Arrays, dtype: torch.dtype) -> Tensor:
    """Return the parameters in the compute dtype, with what rounding has kept from them."""
    wide = arrays["param"].to(dtype)
    return wide + arrays["compensation"] if "compensation" in arrays else wide


def _kept(kind: Kind, arrays: Arrays) -> tuple[str, ...]:
    """Return the names of the averages or else the traces, which are in the compute dtype."""
    averages = horizon_keys("average", kind.horizons)
    return averages if averages[0] in arrays else horizon_keys("trace", kind.horizons)


def _discounts(kind: Kind, arrays: Arrays) -> list[Tensor]:
    return [arrays[key] for key in horizon_keys("discount", kind.horizons)]


def _given(kind: Kind, rule: Rule, arrays: Arrays) -> tuple[Rule, list[Leaf], Tensor, Jet[Any]]:
    """Return what the core's passes take: rule, a row for each discount, gradient and step size."""
    keys = _kept(kind, arrays)
    dtype = arrays[keys[0]].dtype
    wide = _weights(arrays, dtype)
    rule = with_arrays(rule, arrays)
    slots = {slot: arrays[slot] for slot in rule.slots}
    kind_of = "average" if keys == horizon_keys("average", kind.horizons) else "trace"
    rows = [Leaf.of(wide, slots, arrays["count"], **{kind_of: arrays[key]}) for key in keys]
    alpha = Jet(arrays["alpha"], arrays.get("alpha_trace", arrays["alpha"]))
    return rule, rows, _gradient(kind, arrays, dtype), alpha


def _numbers(kind: Kind, arrays: Arrays) -> dict[str, Jet[Any]]:
    """Return the learned numbers by their places, with their derivatives along what is learned."""
    found = {}
    for number in kind.numbers:
        value: Any = arrays[number.key("value")] if number.fixed is None else number.fixed
        found[number.place] = Jet(value, arrays[number.key("slope")])
    return found


def _row_of(leaf: Leaf, traces: Mapping[str, Tensor], discount: Tensor, mask: Tensor) -> Leaf:
    """Return a row with the traces of a learned number, discounted."""
    slots = {slot: Jet(jet.value, traces.get(slot)) for slot, jet in leaf.slots.items()}
    row = Leaf(Jet(leaf.param.value, traces[""]), slots, leaf.count)
    return discounted(row, discount, mask)


def _write(
    kind: Kind,
    arrays: Arrays,
    delta: Tensor | None,
    rows: Sequence[Leaf],
    followed: Sequence[Leaf] = (),
) -> None:
    """Write the next rows into the buffers; of a step not accepted they keep what they hold.

    Where the step `delta` is None, others move the parameters. `followed` are those of learned
    numbers.
    """
    pairs: list[tuple[Tensor, Any]] = []
    for key, row in zip(_kept(kind, arrays), rows, strict=True):
        pairs.append((arrays[key], row.param.first if row.average is None else row.average))
    pairs += _of_step(kind, arrays, delta, rows[0])  # they have the step in common
    for number, row in zip(kind.numbers, followed, strict=True):
        for slot, key in number.traces.items():
            trace = row.param.first if slot == "" else row.slots[slot].first
            # that of a slot that nothing reaches in this step is 0
            pairs.append((arrays[key], torch.zeros_like(arrays[key]) if trace is None else trace))
    _put(arrays, pairs)


def _of_step(
    kind: Kind, arrays: Arrays, delta: Tensor | None, leaf: Leaf
) -> list[tuple[Tensor, Any]]:
    """Return what a step writes of slots and parameters, with the buffers for it."""
    pairs = [(arrays[slot], jet.value) for slot, jet in leaf.slots.items()]
    if delta is not None:
        param, new = arrays["param"], leaf.param.value
        pairs.append((param, rounded(new, param.dtype, kind.rounding)))
        if "compensation" in arrays:
            pairs.append((arrays["compensation"], lost(new, param.dtype)))
    return pairs


def _put(arrays: Arrays, pairs: Sequence[tuple[Tensor, Any]]) -> None:
    """Write values into buffers, where the step is accepted."""
    accepted = arrays.get("accepted")
    for old, value in pairs:
        old.copy_(value if accepted is None else torch.where(accepted, value, old))
