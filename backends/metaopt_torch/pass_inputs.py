"""What passes take beside buffers: step sizes, and numbers that schedules may change."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

import metaopt as mo
from metaopt.jets import Jet
from metaopt.leaf import discount_where, taken
from metaopt_torch.buckets import Bucket
from metaopt_torch.groups import multiplier_of
from metaopt_torch.hyperparameters import (
    DECAY_STEP_SIZE,
    PREFIX,
    Number,
    adjusted,
    arguments,
    as_numbers,
    hyperparameters,
)
from metaopt_torch.leaf import Group, Leaf
from metaopt_torch.state_keys import horizon_keys

__all__ = ["OfNumber", "PassInputs"]

#: Values of a learned number and their derivatives by block, where its traces go on, its discount.
OfNumber: TypeAlias = tuple[tuple[Tensor, Tensor], Tensor, float]


class PassInputs:
    """Reads the groups in every step, and makes tensors of what they say."""

    def __init__(self, config: mo.MetaOptimize, leaves: Iterable[Leaf]) -> None:
        names = horizon_keys("discount", config.horizons)
        self._discounts = dict(zip(names, config.discounts, strict=True))
        self._groups: dict[int, Group] = {}
        #: The rules and groups that go together, with the rules' own hyperparameters.
        self._pairs = {}
        for leaf in leaves:
            self._groups[id(leaf.group)] = leaf.group
            self._pairs[_pair(leaf)] = leaf.rule, leaf.group, hyperparameters(leaf.rule)
        self._lr: dict[int, float | Tensor] = {}
        self._handed: dict[tuple[int, int], dict[str, Number]] = {}
        self._constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def read_groups(self) -> Hashable:
        """See what the groups say now; return all of it that kernels are made for."""
        self._lr = {key: multiplier_of(group) for key, group in self._groups.items()}
        handed = {key: arguments(own, group) for key, (_, group, own) in self._pairs.items()}
        if handed != self._handed:
            for rule, group, _ in self._pairs.values():
                adjusted(rule, group, {})  # which raises where that cannot be
            self._handed = handed
        # kernels differ by whether leaves are frozen and by signs, but not by values: a schedule
        # must not compile anything anew
        options = [
            (None if isinstance(lr, Tensor) else lr == 0.0, bool(self._groups[key]["maximize"]))
            for key, lr in self._lr.items()
        ]
        return tuple(options), tuple(map(tuple, handed.values()))

    def active(self, bucket: Bucket) -> bool | Tensor:
        """Return whether a bucket's leaves move, a tensor where only the device knows."""
        return self._lr[id(bucket.leaves[0].group)] != 0.0

    def of_step(
        self,
        sizes: tuple[Tensor, Tensor],
        mask: Tensor,
        numbers: Mapping[str, OfNumber] | None = None,
    ) -> Callable[[Bucket], dict[str, Tensor]]:
        """Return what gives each bucket its inputs.

        `sizes` are the learned step sizes and their derivatives by block, `mask` is where traces go
        on; `numbers` are the like of numbers that are learned. Each is multiplied by a group's `lr`
        once, and picked once for each block of a group.
        """
        of_groups: dict[Hashable, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        of_blocks: dict[Hashable, dict[str, Tensor]] = {}

        def inputs(bucket: Bucket) -> dict[str, Tensor]:
            leaf = bucket.leaves[0]
            group = (*_pair(leaf), leaf.dtype, bucket.device, leaf.numbers)
            if bucket.flat and (group, bucket.index) in of_blocks:
                return of_blocks[group, bucket.index]
            if group not in of_groups:
                of_groups[group] = self._of_group(leaf, sizes, mask, numbers or {})
            by_block, single = of_groups[group]
            found = {name: bucket.pick(values) for name, values in by_block.items()} | single
            if bucket.flat:
                of_blocks[group, bucket.index] = found
            return found

        return inputs

    def _of_group(
        self,
        leaf: Leaf,
        sizes: tuple[Tensor, Tensor],
        mask: Tensor,
        numbers: Mapping[str, OfNumber],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the inputs that are values per block, and those that are single numbers."""
        lr, device, dtype = self._lr[id(leaf.group)], leaf.device, leaf.dtype
        active: bool | Tensor = lr != 0.0
        if isinstance(lr, Tensor):
            active, lr = (lr != 0.0).to(device), lr.to(device, dtype)
        size = sizes[0].to(device)
        alpha = taken(Jet(size, size if sizes[1] is sizes[0] else sizes[1].to(device)), lr, dtype)
        by_block = {"alpha": alpha.value}
        if alpha.first is not alpha.value:
            by_block["alpha_trace"] = alpha.first
        single = {}
        for name, number in self._discounts.items():
            single[name] = self._discount(leaf, active, number)
        for name, number in as_numbers(self._handed[_pair(leaf)]).items():
            single[name] = self._constant(number, dtype, device)
        own = PREFIX + DECAY_STEP_SIZE
        if own in single:
            single[own] = taken(Jet(single[own], single[own]), lr, dtype).value
        for learned, block in leaf.numbers:
            values, goes_on, discount = numbers[learned.name]
            for of, vector in zip(("value", "slope"), values, strict=True):
                single[learned.key(of)] = vector.select(-1, block).to(device, dtype)
            single[learned.key("mask")] = goes_on.select(-1, block).to(device)
            single[learned.key("discount")] = self._discount(leaf, active, discount)
        return by_block | {"mask": mask.to(device)}, single

    def _discount(self, leaf: Leaf, active: bool | Tensor, number: float) -> Tensor:
        """Return a discount of a leaf's traces, 1 where it is frozen."""
        device, dtype = leaf.device, leaf.dtype
        discount = discount_where(active, self._constant(number, dtype, device), dtype)
        return self._constant(discount, dtype, device) if isinstance(discount, float) else discount

    def _constant(self, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (value, dtype, device)
        if key not in self._constants:
            if len(self._constants) > 100:  # a schedule leaves one behind every step
                self._constants.clear()
            self._constants[key] = torch.full((), value, dtype=dtype, device=device)
        return self._constants[key]


def _pair(leaf: Leaf) -> tuple[int, int]:
    return id(leaf.rule), id(leaf.group)
