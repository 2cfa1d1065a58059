"""The meta-gradient z: the sum of h * g by block, over buckets and devices."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt_torch.buckets import Bucket
from metaopt_torch.build import Built
from metaopt_torch.leaf import Leaf
from metaopt_torch.shards import Devices, summed

__all__ = ["MetaGradient", "Partial"]


class Partial(NamedTuple):
    """What a bucket has for the sum."""

    bucket: Bucket
    product: Tensor  # its sums by block
    active: bool | Tensor  # those of frozen leaves do not count
    lost: Tensor | None = None  # whether a gradient is not finite


class MetaGradient:
    """Adds up what buckets have, and keeps the indices that this takes."""

    def __init__(self, built: Built) -> None:
        self._built = built
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._present: dict[frozenset[str], Tensor] = {}

    def repacked(self) -> None:
        """Forget indices of buckets, as there are new ones."""
        self._indices = {}

    def total(
        self, grads: Mapping[str, Tensor], partials: Sequence[Partial], *, count_lost: bool
    ) -> Tensor:
        """Return z; with `count_lost` one more entry, which is 0 where all gradients are finite.

        A sum over devices is a collective call. They have to agree on which meshes and groups there
        are and in which order, so these come from the leaves: a device may hold nothing of some,
        and no gradient of its shard of a group's.
        """
        by_devices: dict[Devices | None, list[Partial]] = {
            leaf.shard.over: [] for leaf in self._with_gradient(grads)
        }
        for partial in partials:
            by_devices[partial.bucket.shard.over].append(partial)
        totals = []
        for over, some in by_devices.items():
            vector = self._by_block(some)
            if count_lost:
                flags = [torch.zeros((), dtype=torch.bool, device=vector.device)]
                flags += [p.lost.to(vector.device) for p in some if p.lost is not None]
                lost = torch.stack(flags).any().to(vector.dtype)
                vector = torch.cat([vector, lost.reshape(1)])
            totals.append(vector if over is None else summed(vector, over))
        if not totals:
            beta = self._built.block_state["beta"]
            return torch.zeros(len(beta) + count_lost, dtype=beta.dtype, device=beta.device)
        return sum(totals[1:], start=totals[0])

    def present(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Return which blocks have a leaf with a gradient."""
        blocks = self._built.plan.blocks
        families = frozenset(blocks.family_of[leaf.name] for leaf in self._with_gradient(grads))
        if families not in self._present:
            if len(self._present) > 100:  # layers that are dropped at random
                self._present.clear()
            sizes = ((key in families, family.size) for key, family in blocks.families.items())
            flags = [flag for flag, size in sizes for _ in range(size)]
            device = self._built.block_state["beta"].device
            self._present[families] = torch.tensor(flags, device=device)
        return self._present[families]

    def _with_gradient(self, grads: Mapping[str, Tensor]) -> Iterator[Leaf]:
        """Yield the leaves with a gradient, which other devices may have if this one has none."""
        for name, leaf in self._built.leaves.items():
            if name in grads or leaf.shard.group is not None:
                yield leaf

    def _by_block(self, partials: Sequence[Partial]) -> Tensor:
        """Return this device's part of z."""
        beta, counted = self._built.block_state["beta"], []
        for bucket, product, active, _ in partials:
            if active is False or not bucket.shard.primary:
                continue
            part = product if active is True else torch.where(active, product, 0.0)
            counted.append((bucket, part.to(beta.device, beta.dtype)))
        if not counted:
            return torch.zeros_like(beta)
        if len(beta) == 1:  # faster than adding by index, and in one order on every device
            return torch.stack([part for _, part in counted]).sum().reshape(1)
        key = tuple(id(bucket) for bucket, _ in counted)
        if key not in self._indices:
            blocks = [bucket.blocks.to(beta.device) for bucket, _ in counted]
            self._indices[key] = torch.cat(blocks)
        parts = torch.cat([part.reshape(-1) for _, part in counted])
        return torch.zeros_like(beta).index_add_(0, self._indices[key], parts)
