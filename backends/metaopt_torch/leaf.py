"""One parameter with what belongs to it, and in which order its numbers lie in a buffer."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from metaopt.rules import Rule
from metaopt.rules.rule import scope_of, slot_shapes
from metaopt_torch.memory import PLAIN, check_memory, layout, shared, stored
from metaopt_torch.shards import LocalShard, local
from metaopt_torch.state_keys import horizon_keys, learned_key

__all__ = ["Followed", "Group", "Leaf"]

Group: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Followed:
    """A number of a leaf's rule that is learned, as passes know it.

    Parameters
    ----------
    name : str
    place : str
        Where it stands in the rule.
    slots : tuple of str
        Those whose traces are kept.
    in_direction : bool
        As `Plan.in_direction`.
    fixed : float, optional
        Its value, where that is known to stay.
    """

    name: str
    place: str
    slots: tuple[str, ...]
    in_direction: bool
    fixed: float | None = None

    def key(self, of: str) -> str:
        """Return the key of what a state or a pass has of it."""
        return learned_key(self.name, of)

    @property
    def traces(self) -> dict[str, str]:
        """The keys of its traces in a leaf's state: of the weights, "", and of slots."""
        return {"": self.key("trace")} | {slot: self.key(f"{slot}_trace") for slot in self.slots}


@dataclass(eq=False)
class Leaf:
    """One parameter and what belongs to it."""

    name: str
    param: Tensor
    group: Group
    rule: Rule  # with its own weight decay, not that of the group
    dtype: torch.dtype  # compute dtype
    shard: LocalShard
    #: Block of each row of its buffer, in the shape in which they lie along the shard: see
    #: `metaopt.blocks.Partition.assign`.
    blocks: "np.ndarray[Any, Any]"
    state: dict[str, Any]  # the optimizer's for this parameter
    horizons: tuple[int, ...] = ()  # as `Plan.horizons`
    #: The numbers of its rule that are learned, and its one block of each.
    numbers: tuple[tuple[Followed, int], ...] = ()
    #: Host-side fingerprint of the steps taken; only leaves with equal ones may share a bucket, as
    #: they share a count. It is the count, unless steps may be refused: then a hash of the steps
    #: that the leaf took part in.
    history: int = 0
    grad_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self._param_dtype, self._param_shape = self.param.dtype, self.param.shape
        self.device = local(self.param).device
        # a leaf keeps its traces, or the averages of the weights that these are the distances to
        self.traces = horizon_keys("trace", self.horizons)
        self.averages = horizon_keys("average", self.horizons)
        pairs = [*zip(self.traces, self.averages, strict=True)]
        #: The keys of both kinds, each with the one that may stand in its place.
        self.exchanged = {key: other for pair in pairs for key, other in (pair, pair[::-1])}
        #: Of the parameter and the gradient that were checked last.
        self.layouts: tuple[Hashable, Hashable] | None = None
        # in a buffer the axes of the blocks come first, and the others as they lie in memory
        shape, stride = self.shard.shape, local(self.param).stride()
        axes, lead = range(len(shape)), len(shape) - self.blocks.ndim
        rows = [axis for axis in axes if axis >= lead and self.blocks.shape[axis - lead] != 1]
        others = sorted(set(axes) - set(rows), key=lambda axis: (-stride[axis], axis))
        self._axes = (*rows, *others)
        self.length = math.prod(shape[axis] for axis in others)
        self.size = self.blocks.size * self.length

    def ordered(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the shard's shape with its axes in the order of a buffer, a view."""
        return tensor if self._axes == (*range(len(self._axes)),) else tensor.permute(self._axes)

    def shaped(self, buffer: Tensor) -> Tensor:
        """Return a buffer as a view of the shard's shape: the inverse of `ordered`."""
        inverse = sorted(range(len(self._axes)), key=self._axes.__getitem__)
        return buffer.reshape([self.shard.shape[axis] for axis in self._axes]).permute(inverse)

    @property
    def whole(self) -> bool:
        """Whether its rule has to see it whole, in its own shape."""
        return scope_of(self.rule) == "leaf"

    @property
    def buffered(self) -> tuple[str, ...]:
        """Keys of what a pass reads and writes of the state."""
        kept = [key for key in (*self.exchanged, "compensation") if key in self.state]
        traces = [key for number, _ in self.numbers for key in number.traces.values()]
        return (*self.rule.slots, *kept, *(key for key in traces if key in self.state))

    @property
    def shared(self) -> bool:
        """Whether other processes have its state too, which then has to stay where it is."""
        return shared(local(self.state[(*self.buffered, "step")[0]]))

    def changed(self) -> bool:
        """Return whether its parameter has another dtype or shape than what was made for it."""
        return self.param.dtype != self._param_dtype or self.param.shape != self._param_shape

    def shape_of(self, slot: str) -> tuple[int, ...]:
        """Return the shape that a slot has on this device."""
        shape = tuple(self.param.shape)
        found = slot_shapes(self.rule, shape)[slot]
        return self.shard.shape if found == shape else found

    def own_shape(self, key: str) -> bool:
        """Return whether a key of its state is a slot of a shape of its own."""
        return key in self.rule.slots and self.shape_of(key) != self.shard.shape

    def check(self, grad: Tensor) -> None:
        """Raise ValueError or TypeError where a pass cannot take this gradient or the parameter.

        A pass works on memory, as far as the state reaches; `data` can be replaced at any time.
        """
        param = self.param
        if type(param) not in PLAIN or type(grad) not in PLAIN:
            param, grad = local(param), local(grad)
        # nearly every step ends here: these tensors lie as those that were checked before
        layouts = layout(param), layout(grad)
        if layouts == self.layouts:
            return
        own = f"`params[{self.name!r}]`"
        for what, array in ((own, param), (f"The gradient of {own}", grad)):
            self._check_array(what, array)
        check_memory(self.name, param)
        self.layouts = layouts

    def check_held_out(self, grad: Tensor) -> None:
        """Raise ValueError or TypeError where a pass cannot take this held-out gradient."""
        self._check_array(f"The held-out gradient of `params[{self.name!r}]`", local(grad))

    def _check_array(self, what: str, array: Tensor) -> None:
        if tuple(array.shape) != self.shard.shape:
            msg = f"{what} must have the shape {self.shard.shape}; got {tuple(array.shape)}."
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

    def mismatch(
        self, state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> str | None:
        """Return what in a state that was saved does not fit, None if everything does.

        `shapes` are those of what it may have that is not here yet.
        """
        if not self.state:  # frozen here: what it may have is known from the rule alone
            for key in (*self.rule.slots, *self.exchanged):
                shape = tuple(getattr(state.get(key), "shape", self.param.shape))
                if shape[-self.param.dim() or len(shape) :] != tuple(self.param.shape):
                    return (
                        f"{key!r} of {self.name!r} has shape {shape}; expected {self.param.shape}"
                    )
            return None
        for key, value in state.items():
            if key == "compensation" and key not in self.state:
                continue  # of a run with another rounding
            if key not in self.state and key not in shapes:
                key = self.exchanged.get(key, key)  # of parameters of another dtype
            if key not in self.state and key not in shapes:
                return f"{self.name!r} has {key!r}, which is not of {type(self.rule).__name__}"
            shape = () if isinstance(value, int | float) else tuple(getattr(value, "shape", (-1,)))
            expected = tuple(self.state[key].shape) if key in self.state else shapes[key]
            if shape != expected:
                return f"{key!r} of {self.name!r} has shape {shape}; expected {expected}"
        return None
