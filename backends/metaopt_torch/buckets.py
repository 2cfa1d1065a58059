"""Buckets: which leaves a pass takes together, and the buffers it works on.

A leaf that is large enough is a bucket by itself: a pass works on its own memory. Small leaves of
equal rule, dtypes, device, options and count are packed: their state lies in common buffers, the
parameters and gradients are copied in, the parameters back. Where a bucket has one block its
buffers are flat, elsewhere they are matrices with a block for every row. A leaf whose rule has the
scope "leaf" is a bucket by itself, too, and keeps its shape.

Leaves of one bucket make the same steps. A bucket is split once some of its leaves are frozen while
others are active, and stays so: buckets are the coarsest that serve all steps there have been.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from metaopt.rules.rule import is_opaque
from metaopt_torch.leaf import Leaf
from metaopt_torch.memory import address, shared
from metaopt_torch.shards import local

__all__ = ["Bucket", "Buckets"]

#: Leaves of fewer numbers are packed, into buckets of so many: on a CPU, and elsewhere.
SMALL, PACK = {"cpu": 2**16}, {"cpu": 2**18}
SMALL_ELSEWHERE, PACK_ELSEWHERE = 2**20, 2**23
#: Length of a row where leaves with a block each are packed; they are padded to whole rows.
ROW = 64

#: Buffers for parameters and gradients that buckets use one after the other.
Scratch: TypeAlias = dict[tuple[str, torch.dtype, torch.device], Tensor]


class Bucket:
    """Leaves that one pass takes together, with all but `param` in common that it looks at.

    Attributes
    ----------
    index : int, or integer tensor (rows,)
        The one block, where buffers are flat; the block of each row.
    blocks : integer tensor (rows,)
        The same, one row where buffers are flat.
    state : mapping of key to tensor
        The leaves' state as buffers, of which `Leaf.state` has views.
    kernels, ready : dict, object
        What runs the passes, and what these are made for; for whoever makes them to find it again.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self.leaves = leaves
        first = leaves[0]
        self.device, self.shard, self.whole = first.device, first.shard, first.whole
        self.numbers = first.numbers
        self._lengths = [leaf.size for leaf in leaves]
        blocks = np.concatenate([leaf.blocks.reshape(-1) for leaf in leaves])
        one_each = len(blocks) == len(leaves)
        self.flat = one_each and bool(np.all(blocks == blocks[0]))
        self._padded = one_each and not self.flat
        if self._padded:
            rows = [_rows(length) for length in self._lengths]
            blocks = np.repeat(blocks, rows)
            self.shape: tuple[int, ...] = (sum(rows), ROW)
        else:
            self.shape = (sum(self._lengths),) if self.flat else (len(blocks), first.length)
        if self.whole:
            self.shape = first.shard.shape
        self.blocks = torch.tensor(blocks[:1] if self.flat else blocks, device=self.device)
        self.index: int | Tensor = int(blocks[0]) if self.flat else self.blocks
        self._packed = len(leaves) > 1 or self._padded
        self._copied = self._packed
        self._scratch: list[tuple[Tensor, list[Tensor]]] = []
        self._scratch_dtype: torch.dtype | None = None
        self.state = {key: self._adopted(key) for key in first.buffered}
        self.kernels: dict[Any, Callable[..., Any]] = {}
        self.ready: Any = None

    @property
    def summed_axes(self) -> tuple[int, ...] | None:
        """The axes of the buffers over which a block reaches; None where all is one block."""
        if self.flat:
            return None
        blocks = self.leaves[0].blocks
        return tuple(i for i, n in enumerate(blocks.shape) if n == 1) if self.whole else (1,)

    def pick(self, values: Tensor) -> Tensor:
        """Return values per block in a shape that goes with the buffers."""
        if isinstance(self.index, int):
            return values.select(0, self.index)
        rows = values.index_select(0, self.index)
        return rows.view(self.leaves[0].blocks.shape) if self.whole else rows.unsqueeze(1)

    def buffers(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the parameters and gradients as buffers, which are laid out alike in all steps."""
        if self._packed:
            params = [local(leaf.param) for leaf in self.leaves]
            for (buffer, views), tensors in zip(
                self._scratch, (params, [local(grad) for grad in grads]), strict=True
            ):
                if self._padded:  # what lies between leaves is summed with them
                    buffer.zero_()
                torch._foreach_copy_(views, tensors)
            return self._scratch[0][0], self._scratch[1][0]
        # kernels read the memory itself, which holds what a negated view does not say
        param, grad = local(self.leaves[0].param), local(grads[0]).resolve_neg()
        if not self.whole:
            param, grad = self.leaves[0].ordered(param), self.leaves[0].ordered(grad)
        # its memory may have another layout than in the step before
        self._copied = not param.is_contiguous()
        return param.contiguous().view(self.shape), grad.contiguous().view(self.shape)

    def written(self, param: Tensor) -> None:
        """Copy the buffer of the parameters back to them, where it is not their own memory."""
        if is_opaque(self.leaves[0].rule):  # whose parameters others move
            return
        if self._packed:
            torch._foreach_copy_([local(leaf.param) for leaf in self.leaves], self._scratch[0][1])
        elif self._copied:
            leaf = self.leaves[0]
            local(leaf.param).copy_(param if self.whole else leaf.shaped(param))

    def lend(self, scratch: Scratch) -> None:
        """Take buffers that parameters and gradients are copied to from what others use too."""
        grad_dtype = self.leaves[0].grad_dtype
        if not self._packed or self._scratch_dtype == grad_dtype:
            return
        assert grad_dtype is not None  # `HessianFree` has seen a gradient
        size, self._scratch = math.prod(self.shape), []
        for use, dtype in (("param", self.leaves[0].param.dtype), ("grad", grad_dtype)):
            key = (use, dtype, self.device)
            if key not in scratch or len(scratch[key]) < size:
                scratch[key] = torch.zeros(size, dtype=dtype, device=self.device)
            buffer = scratch[key][:size]
            self._scratch.append((buffer.view(self.shape), self._views(buffer)))
        self._scratch_dtype = grad_dtype

    def _adopted(self, key: str) -> Tensor:
        """Return the leaves' tensors of the state as one buffer, of which they become views."""
        tensors = [local(leaf.state[key]) for leaf in self.leaves]
        first = tensors[0]
        if self.whole:
            return first
        ordered = self.leaves[0].ordered(first)
        held = first.untyped_storage().nbytes()  # a whole bucket's, after a split
        alone = not self._packed and (held == first.nbytes or shared(first))
        if alone and ordered.is_contiguous():
            return ordered.view(self.shape)
        if shared(first):
            msg = (
                f"`state[...][{key!r}]` of {self.leaves[0].name!r} is in shared memory, and laid "
                "out in another way than the parameter: with the same strides it can stay there."
            )
            raise ValueError(msg)
        buffer = torch.zeros(self.shape, dtype=first.dtype, device=self.device)
        for leaf, tensor, view in zip(self.leaves, tensors, self._views(buffer), strict=True):
            view.copy_(tensor)
            whole = leaf.state[key]
            leaf.state[key] = leaf.shard.wrap(view, whole.shape, whole.stride())
        return buffer

    def _views(self, buffer: Tensor) -> list[Tensor]:
        """Return the leaves' slices of a buffer, in the shape of each."""
        sizes = [_rows(length) * ROW if self._padded else length for length in self._lengths]
        return [
            leaf.shaped(piece[: leaf.size])
            for leaf, piece in zip(self.leaves, buffer.view(-1).split(sizes), strict=True)
        ]


def _rows(length: int) -> int:
    """Return how many rows of a padded bucket a leaf takes."""
    return -(-length // ROW)


class Buckets:
    """The buckets of an optimizer, which outlive the steps in which their leaves are frozen."""

    def __init__(self) -> None:
        self._bucket_of: dict[Leaf, Bucket] = {}
        self._scratch: Scratch = {}

    def of(self, leaves: Sequence[Leaf]) -> list[Bucket]:
        """Return buckets of these leaves and no others, made or split where there are none yet.

        Where that fails halfway, leaves are without a bucket until they are asked for again.
        """
        active = set(leaves)
        for bucket in self._known(leaves):
            parts: dict[Any, list[Leaf]] = {}
            for leaf in bucket.leaves:
                parts.setdefault((leaf in active, leaf.grad_dtype), []).append(leaf)
            if len(parts) > 1:  # all leaves of a bucket share one count
                for leaf in bucket.leaves:  # whose state is about to lie elsewhere
                    del self._bucket_of[leaf]
                for members in parts.values():
                    self._add(members)
        for members in _grouped(leaf for leaf in leaves if leaf not in self._bucket_of):
            self._add(members)
        buckets = self._known(leaves)
        # they run one after the other, so scratch of the size of the largest serves all
        for bucket in sorted(buckets, key=lambda bucket: -math.prod(bucket.shape)):
            bucket.lend(self._scratch)
        return buckets

    def _known(self, leaves: Sequence[Leaf]) -> list[Bucket]:
        known = (self._bucket_of[leaf] for leaf in leaves if leaf in self._bucket_of)
        return list(dict.fromkeys(known))

    def _add(self, leaves: Sequence[Leaf]) -> None:
        for members in [[leaf] for leaf in leaves] if leaves[0].shared else [leaves]:
            self._bucket_of |= dict.fromkeys(members, Bucket(members))


def _grouped(leaves: Iterable[Leaf]) -> Iterable[list[Leaf]]:
    """Return which leaves are to be buckets; those of no numbers in none."""
    groups: dict[Any, list[Leaf]] = {}
    filled: Counter[Any] = Counter()
    tied: Counter[int] = Counter()
    for leaf in leaves:
        if leaf.size == 0:
            continue
        # with tied weights in one bucket, each would be stepped from before the others' steps
        place = address(local(leaf.param))
        tied[place] += 1
        device = leaf.device.type
        key: Any = (id(leaf),)
        if leaf.size < SMALL.get(device, SMALL_ELSEWHERE) and not leaf.whole and not leaf.shared:
            key = (
                *(id(leaf.rule), id(leaf.group), leaf.history, leaf.shard.over, leaf.shard.primary),
                *(leaf.dtype, leaf.param.dtype, leaf.grad_dtype, leaf.device),
                *(0 if leaf.blocks.size == 1 else leaf.length, tied[place], leaf.numbers),
            )
            filled[key] += _rows(leaf.size) * ROW
            key = (*key, filled[key] // PACK.get(device, PACK_ELSEWHERE))
        groups.setdefault(key, []).append(leaf)
    return groups.values()
