"""The meta-gradient z: the sum of h * g by block, over buckets and devices."""

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt_torch.buckets import Bucket
from metaopt_torch.build import Built
from metaopt_torch.leaf import Leaf
from metaopt_torch.shards import Devices, summed
from metaopt_torch.state_keys import learned_key

__all__ = ["MetaGradient", "Partial"]


class Partial(NamedTuple):
    """What a bucket has for the sum."""

    bucket: Bucket
    sums: Sequence[Tensor]  # by block; of several discounts of each
    active: bool | Tensor  # those of frozen leaves do not count
    lost: Tensor | None = None  # whether a gradient is not finite


class MetaGradient:
    """Adds up what buckets have, and keeps the indices that this takes.

    Parameters
    ----------
    built : Built
    number : str, optional
        A learned number, whose z it is, and not that of step sizes.
    """

    def __init__(self, built: Built, number: str | None = None) -> None:
        self._built, self._number = built, number
        self._blocks = (built.plan if number is None else built.plan.learned[number]).blocks
        self._key = "meta_grad" if number is None else learned_key(number, "meta_grad")
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._present: dict[frozenset[str], Tensor] = {}

    def repacked(self) -> None:
        """Forget indices of buckets, as there are new ones."""
        self._indices = {}

    def total(
        self,
        grads: Container[str],
        partials: Sequence[Partial],
        others: "Sequence[tuple[MetaGradient, Sequence[Partial]]]" = (),
        *,
        count_lost: bool = False,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return z, then those of `others`, and with `count_lost` 0 where all gradients are finite.

        A sum over devices is a collective call, one for all of it. They have to agree on which
        meshes and groups there are and in which order, so these come from the leaves: a device may
        hold nothing of some, and no gradient of its shard of a group's.
        """
        totals = []
        for over in dict.fromkeys(leaf.shard.over for leaf in self._with_gradient(grads)):
            found = [
                (one, [partial for partial in some if partial.bucket.shard.over == over])
                for one, some in ((self, partials), *others)
            ]
            parts = [one._by_block(some) for one, some in found]
            if count_lost:
                flags = [torch.zeros((), dtype=torch.bool, device=parts[0].device)]
                flags += [p.lost.to(flags[0].device) for p in found[0][1] if p.lost is not None]
                parts.append(torch.stack(flags).any().to(parts[0].dtype))
            totals.append(parts if over is None else _summed(parts, over))
        if not totals:
            empty = [one._by_block([]) for one in (self, *(one for one, _ in others))]
            return empty, empty[0].new_zeros(()) if count_lost else None
        sums = [sum(parts[1:], start=parts[0]) for parts in zip(*totals, strict=True)]
        return (sums[:-1], sums[-1]) if count_lost else (sums, None)

    def present(self, grads: Container[str]) -> Tensor:
        """Return which blocks have a leaf with a gradient."""
        blocks = self._blocks
        families = frozenset(blocks.family_of[leaf.name] for leaf in self._with_gradient(grads))
        if families not in self._present:
            if len(self._present) > 100:  # layers that are dropped at random
                self._present.clear()
            sizes = ((key in families, family.size) for key, family in blocks.families.items())
            flags = [flag for flag, size in sizes for _ in range(size)]
            device = self._built.block_state["beta"].device
            self._present[families] = torch.tensor(flags, device=device)
        return self._present[families]

    def _with_gradient(self, grads: Container[str]) -> Iterator[Leaf]:
        """Yield the leaves with a gradient, which other devices may have if this one has none."""
        for name, leaf in self._built.leaves.items():
            has = name in grads or leaf.shard.group is not None
            if has and name in self._blocks.family_of:
                yield leaf

    def _of_bucket(self, bucket: Bucket) -> Tensor:
        if self._number is None:
            return bucket.blocks
        block = next(block for one, block in bucket.numbers if one.name == self._number)
        return torch.tensor([block], device=bucket.device)

    def _by_block(self, partials: Sequence[Partial]) -> Tensor:
        like, counted = self._built.block_state[self._key], []
        for bucket, sums, active, _ in partials:
            if active is False or not bucket.shard.primary:
                continue
            part = torch.stack(list(sums)) if like.dim() > 1 else sums[0]
            part = part if active is True else torch.where(active, part, 0.0)
            counted.append((bucket, part.to(like.device, like.dtype)))
        if not counted:
            return torch.zeros_like(like)
        if like.shape[-1] == 1:  # faster than adding by index, and in one order on every device
            return torch.stack([part for _, part in counted]).sum(dim=0).unsqueeze(-1)
        key = tuple(id(bucket) for bucket, _ in counted)
        if key not in self._indices:
            blocks = [self._of_bucket(bucket).to(like.device) for bucket, _ in counted]
            self._indices[key] = torch.cat(blocks)
        horizons = like.shape[:-1]
        parts = torch.cat([part.reshape(*horizons, -1) for _, part in counted], dim=-1)
        return torch.zeros_like(like).index_add_(-1, self._indices[key], parts)


def _summed(parts: Sequence[Tensor], over: Devices) -> list[Tensor]:
    """Return sums over devices, found in one call."""
    if len(parts) == 1:
        return [summed(parts[0], over)]
    total = summed(torch.cat([part.reshape(-1) for part in parts]), over)
    pieces = total.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
