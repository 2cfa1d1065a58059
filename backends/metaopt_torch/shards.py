"""What one device holds of a parameter, and sums over all devices.

A plain tensor is whole, or one of as many shards as a process group has members. A DTensor is
sharded along some dimensions of a mesh of devices and replicated along the others.
"""

import importlib
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from metaopt_torch.memory import PLAIN

if TYPE_CHECKING:  # it takes longer to import than all else, and few need it
    from torch.distributed.tensor import DTensor, Placement, Shard

__all__ = [
    "Devices",
    "LocalShard",
    "device_count",
    "gathered",
    "is_dtensor",
    "local",
    "redistributed",
    "shard_of",
    "sliced",
    "summed",
]

#: A mesh, or the process group that holds the shards of plain tensors.
Devices: TypeAlias = Any
Values = TypeVar("Values", Tensor, np.ndarray[Any, Any])

#: Groups of meshes of several dimensions: making one is a collective call.
_groups: dict[DeviceMesh, Any] = {}


def is_dtensor(tensor: object) -> TypeGuard["DTensor"]:
    """Say whether this is a DTensor: there is none before their module has been imported."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """Return what this device holds of a tensor, the very memory."""
    if type(tensor) in PLAIN:  # nearly all are, and every step asks for each several times
        return tensor
    return _arrived(tensor.to_local() if is_dtensor(tensor) else tensor)


def _arrived(tensor: Tensor) -> Tensor:
    """Wait for an AsyncCollectiveTensor, as kernels need its memory; others are returned as is."""
    return tensor.wait() if isinstance(tensor, collectives.AsyncCollectiveTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """Return a copy of the whole of a DTensor, or of a plain tensor."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor.clone()


def redistributed(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient distributed as its parameter is."""
    if not is_dtensor(grad) or not is_dtensor(param):
        return grad
    same = grad.placements == param.placements
    return grad if same else grad.redistribute(placements=param.placements)


@dataclass(frozen=True)
class LocalShard:
    """Which slice of a parameter lies on this device."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]  # of its first entry in the whole
    mesh: DeviceMesh | None = None  # None for a plain tensor
    placements: tuple["Placement", ...] = ()
    group: Any = None  # holds the other shards of a plain tensor; None where that is whole

    @property
    def over(self) -> Devices | None:
        """The devices that sums over the whole are taken over; None where no other is needed."""
        return self.group if self.mesh is None else self.mesh

    @property
    def axes(self) -> tuple[int, ...]:
        """The dimensions of the mesh along which devices hold different shards."""
        return tuple(i for i, kind in enumerate(self.placements) if _cuts(kind))

    @property
    def whole(self) -> bool:
        """Whether every device holds all of the parameter."""
        if self.mesh is None:
            return self.group is None
        return all(
            placement.is_replicate() or self.mesh.size(axis) == 1
            for axis, placement in enumerate(self.placements)
        )

    @property
    def primary(self) -> bool:
        """Whether this device's sums count: of replicas those of the first alone do."""
        if self.mesh is None:
            return True
        coordinates = self.mesh.get_coordinate() or ()
        return all(
            at == 0 or _cuts(placement)
            for at, placement in zip(coordinates, self.placements, strict=True)
        )

    def wrap(self, tensor: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
        """Return a tensor of the shard as one of the whole; leading axes are those of columns."""
        if self.mesh is None:
            return tensor
        lead = len(shape) - len(self.shape)
        tensors = importlib.import_module("torch.distributed.tensor")
        return tensors.DTensor.from_local(
            _alone(tensor),
            self.mesh,
            [tensors.Shard(p.dim + lead) if _cuts(p) else p for p in self.placements],
            run_check=False,
            shape=torch.Size(shape),
            stride=tuple(stride),
        )


def _cuts(placement: "Placement") -> TypeGuard["Shard"]:
    """Say whether devices hold different parts of a tensor that is placed so."""
    return isinstance(placement, importlib.import_module("torch.distributed.tensor").Shard)


def _alone(view: Tensor) -> Tensor:
    """Return the very memory of a tensor as one whose storage holds nothing else.

    A DTensor around a tensor with a storage offset can be neither pickled nor copied.
    """
    size = 0
    if view.numel() > 0:
        size = 1 + sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True))
    width, storage = view.element_size(), view.untyped_storage()
    if storage.nbytes() == size * width:
        return view
    begin = view.storage_offset() * width
    part = storage[begin : begin + size * width]
    return view.new_empty(0).set_(part, 0, view.shape, view.stride())


def shard_of(tensor: Tensor, group: Any = None) -> LocalShard:
    """Return what this device holds of a tensor; `group` holds the other shards of a plain one."""
    if not is_dtensor(tensor):
        return LocalShard(tuple(tensor.shape), (0,) * tensor.dim(), group=group)
    layouts = importlib.import_module("torch.distributed.tensor._utils")
    shape, offset = layouts.compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return LocalShard(tuple(shape), tuple(offset), tensor.device_mesh, tuple(tensor.placements))


def sliced(values: Values, shard: LocalShard) -> Values:
    """Return the shard's slice of values that have all entries along the parameter's axes, or one.

    These axes are the last ones. What is distributed as the parameter is lies here already.
    """
    if isinstance(values, Tensor) and is_dtensor(values):
        part: Tensor = values.to_local()
        return part
    lead = values.ndim - len(shard.shape)
    cut: list[Any] = [
        slice(None) if values.shape[lead + axis] == 1 else slice(start, start + length)
        for axis, (start, length) in enumerate(zip(shard.offset, shard.shape, strict=True))
    ]
    return values[(..., *cut)]


def summed(tensor: Tensor, over: Devices, axes: Collection[int] | None = None) -> Tensor:
    """Return the sum of a tensor over a group, or a mesh or some of its dimensions."""
    if isinstance(over, DeviceMesh) and axes is not None and len(axes) < over.ndim:
        for axis in sorted(axes):
            tensor = _arrived(collectives.all_reduce(tensor, "sum", (over, axis)))
        return tensor
    return _arrived(collectives.all_reduce(tensor, "sum", _group(over)))


def _group(over: Devices) -> Any:
    """Return the process group of all devices of a mesh, made at its first use."""
    if not isinstance(over, DeviceMesh):
        return over
    if over.ndim == 1:
        return over.get_group()
    if over.size() == dist.get_world_size():
        return dist.group.WORLD
    if over not in _groups:
        ranks = sorted(over.mesh.flatten().tolist())
        _groups[over] = dist.new_group(ranks, use_local_synchronization=True)
    return _groups[over]


def device_count(over: Devices, axes: Collection[int]) -> int:
    """Return how many devices `summed` adds up."""
    if not isinstance(over, DeviceMesh):
        return dist.get_world_size(over)
    return math.prod(over.size(axis) for axis in axes)
