"""Averaged weights, beside the parameters or for a while in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from metaopt.averages import average_of
from metaopt.rules import Averaged
from metaopt_torch.build import Built
from metaopt_torch.containers import FSDP1, gather_anew
from metaopt_torch.core_state import going_on
from metaopt_torch.core_step import wide
from metaopt_torch.leaf import Leaf
from metaopt_torch.shards import local, sliced

__all__ = ["check_in_place", "copies_of_averages", "in_place"]


@torch.no_grad()
def copies_of_averages(built: Built) -> dict[str, Tensor]:
    """Return the averages by name, distributed as the parameters are."""
    found = {}
    for name, leaf in built.leaves.items():
        memory = torch.empty_like(local(leaf.param), requires_grad=False)
        memory.copy_(_average(built, leaf))
        found[name] = leaf.shard.wrap(memory, leaf.param.shape, leaf.param.stride())
    return found


def check_in_place(built: Built) -> None:
    """Raise ValueError where what is written to a parameter may not be what a model computes with.

    FSDP1 holds on to whole parameters after an evaluation, and they replace the parts meanwhile.
    """
    for name, leaf in built.leaves.items():
        if getattr(leaf.param, FSDP1, False):
            msg = (
                f"`averaged_params()` cannot put averages in the place of {name!r}, of which "
                "FullyShardedDataParallel holds a part: take `averaged_params(copy=True)`, the "
                "averages of the parts, to a second model, or use `fully_shard`."
            )
            raise ValueError(msg)


@contextmanager
def in_place(built: Built) -> Iterator[None]:
    """Have the averages in the parameters' memory, and in the end what was there before."""
    backups: list[tuple[Tensor, Tensor]] = []
    sharded = [leaf.param for leaf in built.leaves.values() if leaf.shard.mesh is not None]
    try:
        with torch.no_grad():
            for leaf in built.leaves.values():
                if leaf.state:
                    param, average = local(leaf.param), _average(built, leaf)
                    backups.append((param, param.clone()))
                    param.copy_(average)
        gather_anew(sharded)
        yield
    finally:
        with torch.no_grad():
            for param, backup in backups:
                param.copy_(backup)
        gather_anew(sharded)


def _average(built: Built, leaf: Leaf) -> Tensor:
    """Return the average of this device's part; the weights themselves where there is none."""
    if not leaf.state:
        return local(leaf.param)
    weights = wide(leaf)
    trace, average = (
        local(leaf.state[keys[0]]) if keys[0] in leaf.state else None
        for keys in (leaf.traces, leaf.averages)
    )
    rule, slots = leaf.rule, {slot: local(leaf.state[slot]) for slot in leaf.rule.slots}
    mean: Tensor = average_of(
        rule, weights, leaf.state["step"], slots, trace=trace, average=average
    )
    goes_on = None if isinstance(rule, Averaged) else going_on(built)
    if goes_on is None:
        return mean
    columns = built.plan.layout.columns(goes_on, leaf.name, leaf.param.dim()).to(mean.device)
    columns = sliced(columns, leaf.shard) if columns.ndim else columns
    return torch.where(columns, mean, weights)
