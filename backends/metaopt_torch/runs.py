"""Which leaves a pass takes together, and the buffers it works on.

A leaf that is large enough is a run by itself: a pass works on its own memory. Small leaves of
equal rule, dtypes, device, options and count are packed: their state lies in common buffers, the
parameters and gradients are copied in, the parameters back. Where a run has one block its buffers
are flat, elsewhere they are matrices with a block for every row. A leaf whose rule has the scope
"leaf" is a run by itself, too, and keeps its shape.

Leaves of one run make the same steps. A run is split once some of its leaves rest while others
move, and stays so: runs are the coarsest that serve all steps there have been.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaopt.rules import Rule
from metaopt.rules.rule import scope_of, slot_shapes
from metaopt_torch.memory import PLAIN, address, check_memory, layout, stored
from metaopt_torch.shards import Part, local
from metaopt_torch.sharing import shared

__all__ = ["KEPT", "Leaf", "Order", "Run", "Runs", "order_of"]

#: Leaves of fewer numbers are packed, into runs of so many: on a CPU, and elsewhere.
SMALL, PACK = {"cpu": 2**16}, {"cpu": 2**18}
SMALL_ELSEWHERE, PACK_ELSEWHERE = 2**20, 2**23
#: What a leaf keeps one of: its trace, or the average that it is the distance to.
KEPT = ("trace", "average")
#: Row of a pack of leaves with a block each; they are padded to whole rows.
ROW = 64


@dataclass(frozen=True)
class Order:
    """In which order a part's numbers lie in a buffer: the axes of its blocks first.

    Parameters
    ----------
    axes : tuple of int
        A permutation.
    rows, length : int
        Numbers of the leading axes, which have a block for each index, and of the others.
    """

    axes: tuple[int, ...]
    rows: int
    length: int

    @cached_property
    def straight(self) -> bool:
        """Whether the axes come in the parameter's own order."""
        return self.axes == (*range(len(self.axes)),)

    def ordered(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the part's shape with its axes in this order, a view."""
        return tensor if self.straight else tensor.permute(self.axes)

    def flat(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the part's shape as (rows, length), a view where that is possible."""
        return self.ordered(tensor).reshape(self.rows, self.length)

    def shaped(self, buffer: Tensor, shape: Sequence[int]) -> Tensor:
        """Return (rows, length) numbers as a view of the part's shape: the inverse of `flat`."""
        inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return buffer.reshape([shape[axis] for axis in self.axes]).permute(inverse)


def order_of(tensor: Tensor, view: Sequence[int]) -> Order:
    """Return the order for a part whose blocks lie along it as `view` (section 9)."""
    shape, stride = tensor.shape, tensor.stride()
    padded = (1,) * (tensor.dim() - len(view)) + tuple(view)
    blocked = [axis for axis in range(tensor.dim()) if padded[axis] != 1]
    others = sorted(
        (axis for axis in range(tensor.dim()) if axis not in blocked),
        key=lambda axis: -stride[axis],
    )
    axes = (*blocked, *others)
    return Order(
        axes,
        math.prod(shape[axis] for axis in blocked),
        math.prod(shape[axis] for axis in others),
    )


@dataclass(eq=False)
class Leaf:
    """One parameter and what belongs to it.

    Parameters
    ----------
    name : str
    param : tensor
    group : dict
        Its parameter group.
    rule : Rule
        With its own weight decay, not that of the group.
    dtype : dtype
        Compute dtype.
    part : Part
        What this device holds.
    view : tuple of int
        Shape in which its blocks lie along it, see `metaopt.blocks.Partition.assign`.
    order : Order
    blocks : integer array (rows,)
        Block of each row.
    state : dict
        The optimizer's for this parameter.
    history : int
        Host-side fingerprint of the steps taken; only leaves with equal ones may share a pack, as
        they share a count. It is the count, unless steps may be refused: then a hash of the steps
        that the leaf took part in.
    grad_dtype : dtype
        Of its gradients.
    """

    name: str
    param: Tensor
    group: dict[str, Any]
    rule: Rule
    dtype: torch.dtype
    part: Part
    view: tuple[int, ...]
    order: Order
    blocks: Any
    state: dict[str, Any]
    history: int = 0
    grad_dtype: Any = None

    def __post_init__(self) -> None:
        self.param_dtype, self.param_shape = self.param.dtype, self.param.shape
        self.device = local(self.param).device
        #: Of the parameter and the gradient that were checked last.
        self.layouts: Any = None

    def check(self, grad: Tensor) -> None:
        """Raise ValueError or TypeError where a pass cannot take this gradient or the parameter.

        A pass works on memory, as far as the state reaches; `data` can be replaced at any time.
        """
        param = self.param
        if type(param) not in PLAIN or type(grad) not in PLAIN:
            param, grad = local(param), local(grad)
        layouts = layout(param), layout(grad)
        if layouts == self.layouts:
            return
        own = f"`params[{self.name!r}]`"
        for what, array in ((own, param), (f"The gradient of {own}", grad)):
            if tuple(array.shape) != self.part.shape:
                msg = f"{what} must have the shape {self.part.shape}; got {tuple(array.shape)}."
                raise ValueError(msg)
            if array.device != self.device:
                msg = f"{what} must be on {self.device}, as its state is; got {array.device}."
                raise ValueError(msg)
            if not array.is_floating_point():
                msg = f"{what} must be dense, real and floating; got {array.dtype}."
                raise TypeError(msg)
            if not stored(array):
                msg = f"{what} must lie in its storage, which has been resized to less memory."
                raise ValueError(msg)
        check_memory(self.name, param)
        self.layouts = layouts

    @property
    def whole(self) -> bool:
        """Whether its rule has to see it whole, in its own shape."""
        return scope_of(self.rule) == "leaf"

    def shape_of(self, slot: str) -> tuple[int, ...]:
        """Return the shape that this device's part of a slot has."""
        shape = tuple(self.param.shape)
        found = slot_shapes(self.rule, shape)[slot]
        return self.part.shape if found == shape else found

    def own_shape(self, key: str) -> bool:
        """Say whether what its state has under this key is a slot of a shape of its own."""
        return key in self.rule.slots and self.shape_of(key) != self.part.shape

    def changed(self) -> bool:
        """Say whether its parameter has another dtype or shape than what was made for it."""
        return self.param.dtype != self.param_dtype or self.param.shape != self.param_shape

    def mismatch(self, state: Mapping[str, Any]) -> str | None:
        """Return what in a state that was saved does not fit, None if everything does."""
        for key in (*self.rule.slots, *KEPT) if not self.state else ():
            shape = tuple(getattr(state.get(key), "shape", self.param.shape))
            if shape[-self.param.dim() or len(shape) :] != tuple(self.param.shape):
                return f"{key!r} of {self.name!r} has shape {shape}; expected {self.param.shape}"
        for key, value in state.items() if self.state else ():
            if key == "compensation" and key not in self.state:
                continue  # of a run with another rounding
            if key in KEPT and key not in self.state:
                key = KEPT[1 - KEPT.index(key)]  # of parameters of another dtype
            if key not in self.state:
                return f"{self.name!r} has {key!r}, which is not of {type(self.rule).__name__}"
            shape = () if isinstance(value, int | float) else tuple(getattr(value, "shape", (-1,)))
            if shape != tuple(self.state[key].shape):
                return (
                    f"{key!r} of {self.name!r} has shape {shape}; "
                    f"expected {tuple(self.state[key].shape)}"
                )
        return None

    @property
    def shared(self) -> bool:
        """Whether other processes have its state too, which then has to stay where it is."""
        return shared(local(self.state[self.buffered[0]]))

    @property
    def buffered(self) -> tuple[str, ...]:
        """Keys of what a pass reads and writes of the state, of the part's shape."""
        kept = [key for key in (*KEPT, "compensation") if key in self.state]
        return (*self.rule.slots, *kept)


class Run:
    """Leaves that one pass takes together.

    Parameters
    ----------
    leaves : sequence of Leaf
        With all but `param` in common that a pass looks at.

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
        self.device = local(first.param).device
        self.whole = first.whole
        lengths = [leaf.order.rows * leaf.order.length for leaf in leaves]
        blocks = np.concatenate([leaf.blocks for leaf in leaves])
        single = len(blocks) == len(leaves)
        self.flat = single and bool(np.all(blocks == blocks[0]))
        self.padded = single and not self.flat
        if self.flat:
            self.index: Any = int(blocks[0])
            self.shape: tuple[int, ...] = (sum(lengths),)
        elif self.padded:
            rows = [_rows(length) for length in lengths]
            blocks = np.repeat(blocks, rows)
            self.shape = (sum(rows), ROW)
        else:
            self.shape = (len(blocks), first.order.length)
        if self.whole:
            self.shape = first.part.shape
        self.blocks = torch.tensor(blocks[:1] if self.flat else blocks, device=self.device)
        if not self.flat:
            self.index = self.blocks
        self._lengths = lengths
        self._packed = len(leaves) > 1 or self.padded
        self._copied = self._packed
        self._scratch: list[tuple[Tensor, list[Tensor]]] = []
        self._lent: Any = None
        self.state = {key: self._adopted(key) for key in first.buffered}
        self.kernels: dict[Any, Any] = {}
        self.ready: Any = None

    @property
    def over(self) -> Any:
        """What the leaves are distributed over; None where each is whole."""
        return self.leaves[0].part.over

    @property
    def summed(self) -> tuple[int, ...] | None:
        """The axes of the buffers over which a block reaches; None where all is one block."""
        if self.flat:
            return None
        return tuple(i for i, n in enumerate(self.leaves[0].view) if n == 1) if self.whole else (1,)

    @property
    def counts(self) -> bool:
        """Whether this device's sums count, see `metaopt_torch.shards.Part`."""
        return self.leaves[0].part.counts

    def pick(self, values: Tensor) -> Tensor:
        """Return values per block in a shape that goes with the buffers."""
        if self.flat:
            return values.select(0, self.index)
        rows = values.index_select(0, self.index)
        return rows.view(self.leaves[0].view) if self.whole else rows.unsqueeze(1)

    def buffers(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the parameters and gradients as buffers, which are laid out alike in all steps."""
        if self.whole:
            param, grad = local(self.leaves[0].param), local(grads[0]).resolve_neg()
            self._copied = not param.is_contiguous()
            return param.contiguous(), grad.contiguous()
        if not self._packed:
            order = self.leaves[0].order
            param = order.ordered(local(self.leaves[0].param))
            grad = order.ordered(local(grads[0]).resolve_neg())  # kernels read the memory itself
            # its memory may have another layout than in the step before
            self._copied = not param.is_contiguous()
            param, grad = param.ravel(), grad.ravel()
            return (param, grad) if self.flat else (param.view(self.shape), grad.view(self.shape))
        params = [local(leaf.param) for leaf in self.leaves]
        for (buffer, views), tensors in zip(
            self._scratch, (params, [local(grad) for grad in grads]), strict=True
        ):
            if self.padded:
                buffer.zero_()
            torch._foreach_copy_(views, tensors)
        return self._scratch[0][0], self._scratch[1][0]

    def written(self, param: Tensor) -> None:
        """Copy the buffer of the parameters back to them, where it is not their own memory."""
        if self._packed:
            torch._foreach_copy_([local(leaf.param) for leaf in self.leaves], self._scratch[0][1])
        elif self._copied:
            leaf = self.leaves[0]
            shaped = param if self.whole else leaf.order.shaped(param, leaf.part.shape)
            local(leaf.param).copy_(shaped)

    def lend(self, scratch: "Scratch") -> None:
        """Take buffers that parameters and gradients are copied to from what others use too."""
        first, size = self.leaves[0], math.prod(self.shape)
        if not self._packed or self._lent == first.grad_dtype:
            return
        self._scratch = [
            (buffer.view(self.shape), self._views(buffer))
            for buffer in (
                scratch.buffer("param", size, first.param.dtype, self.device),
                scratch.buffer("grad", size, first.grad_dtype, self.device),
            )
        ]
        self._lent = first.grad_dtype

    def _adopted(self, key: str) -> Tensor:
        """Return the leaves' tensors of the state as one buffer, of which they become views."""
        tensors = [local(leaf.state[key]) for leaf in self.leaves]
        if self.whole:
            return tensors[0]
        order = self.leaves[0].order
        held = tensors[0].untyped_storage().nbytes()  # a whole pack's, after a split
        alone = not self._packed and (held == tensors[0].nbytes or shared(tensors[0]))
        if alone and tensors[0].permute(order.axes).is_contiguous():
            return order.flat(tensors[0]).view(self.shape)
        if shared(tensors[0]):
            leaf = self.leaves[0]
            msg = (
                f"`state[...][{key!r}]` of {leaf.name!r} is in shared memory, and laid out in "
                "another way than the parameter: with the same strides it can stay there."
            )
            raise ValueError(msg)
        buffer = torch.zeros(self.shape, dtype=tensors[0].dtype, device=self.device)
        for leaf, tensor, view in zip(self.leaves, tensors, self._views(buffer), strict=True):
            view.copy_(tensor)
            whole = leaf.state[key]
            leaf.state[key] = leaf.part.wrap(view, whole.shape, whole.stride())
        return buffer

    def _views(self, buffer: Tensor) -> list[Tensor]:
        """Return the leaves' places in a buffer, in the shape of each."""
        sizes = [_rows(length) * ROW if self.padded else length for length in self._lengths]
        return [
            leaf.order.shaped(piece[:length], leaf.part.shape)
            for leaf, piece, length in zip(
                self.leaves, buffer.view(-1).split(sizes), self._lengths, strict=True
            )
        ]


class Scratch:
    """Buffers that packs use one after the other."""

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def buffer(self, use: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer of this size for one of the uses of a pack."""
        key = (use, dtype, device)
        if key not in self._kept or len(self._kept[key]) < size:
            self._kept[key] = torch.zeros(size, dtype=dtype, device=device)
        return self._kept[key][:size]


def _rows(length: int) -> int:
    """Return how many rows of a padded pack a leaf takes."""
    return -(-length // ROW)


class Runs:
    """The runs of an optimizer, which outlive the steps in which their leaves rest."""

    def __init__(self) -> None:
        self._run_of: dict[Leaf, Run] = {}
        self._scratch = Scratch()

    def of(self, leaves: Sequence[Leaf]) -> list[Run]:
        """Return runs of these leaves and no others, made or split where there are none yet.

        Where that fails halfway, leaves are without a run until they are asked for again.
        """
        moving = set(leaves)
        for run in dict.fromkeys(self._run_of[leaf] for leaf in leaves if leaf in self._run_of):
            parts: dict[Any, list[Leaf]] = {}
            for leaf in run.leaves:
                parts.setdefault((leaf in moving, leaf.grad_dtype), []).append(leaf)
            if len(parts) > 1:
                for leaf in run.leaves:  # whose state is about to lie elsewhere
                    del self._run_of[leaf]
                for members in parts.values():
                    self._add(members)
        for members in _grouped(leaf for leaf in leaves if leaf not in self._run_of):
            self._add(members)
        runs = list(dict.fromkeys(self._run_of[leaf] for leaf in leaves if leaf in self._run_of))
        for run in sorted(runs, key=lambda run: -math.prod(run.shape)):
            run.lend(self._scratch)  # the largest first, so that all have the same
        return runs

    def _add(self, leaves: Sequence[Leaf]) -> None:
        if len(leaves) > 1 and leaves[0].shared:
            for leaf in leaves:
                self._add([leaf])
        else:
            self._run_of |= dict.fromkeys(leaves, Run(leaves))


def _grouped(leaves: Iterable[Leaf]) -> Iterable[list[Leaf]]:
    """Return which leaves are to be runs; those of no numbers in none."""
    groups: dict[Any, list[Leaf]] = {}
    packs: dict[Any, int] = {}
    tied: Counter[int] = Counter()
    for leaf in leaves:
        numbers = leaf.order.rows * leaf.order.length
        if numbers == 0:
            continue
        # of leaves with one memory a pack would take each as it was before the others' steps
        place = address(local(leaf.param))
        tied[place] += 1
        kind = local(leaf.param).device.type
        small = SMALL.get(kind, SMALL_ELSEWHERE)
        key: Any = (id(leaf),)
        if numbers < small and not leaf.whole and not leaf.shared:
            key = (
                *(id(leaf.rule), id(leaf.group), leaf.history, leaf.part.over, leaf.part.counts),
                *(leaf.dtype, leaf.param.dtype, leaf.grad_dtype, local(leaf.param).device),
                *(0 if leaf.order.rows == 1 else leaf.order.length, tied[place]),
            )
            filled = packs.get(key, 0) + _rows(numbers) * ROW
            packs[key] = filled
            key = (*key, filled // PACK.get(kind, PACK_ELSEWHERE))
        groups.setdefault(key, []).append(leaf)
    return groups.values()
