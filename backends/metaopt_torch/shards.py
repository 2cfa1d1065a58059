"""What one device holds of a parameter, and sums over all devices.

A plain tensor is its own only part, or one of as many as a group has processes. A DTensor is
distributed over a mesh of devices: sharded along some dimensions of the mesh, replicated along the
others.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = [
    "Part",
    "devices",
    "gathered",
    "local",
    "part_of",
    "placed",
    "summed",
    "summed_along",
    "window",
]


def local(tensor: Tensor) -> Tensor:
    """Return what this device holds of a tensor, the very memory."""
    return _arrived(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def _arrived(tensor: Tensor) -> Tensor:
    """Wait for an AsyncCollectiveTensor, as kernels need its memory; others are returned as is."""
    return tensor.wait() if isinstance(tensor, collectives.AsyncCollectiveTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """Return a copy of the whole of a tensor, wherever its parts are; of a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def placed(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient distributed as its parameter is."""
    if not isinstance(grad, DTensor) or not isinstance(param, DTensor):
        return grad
    same = grad.placements == param.placements
    return grad if same else grad.redistribute(placements=param.placements)


@dataclass(frozen=True)
class Part:
    """Where this device's part of a parameter lies.

    Parameters
    ----------
    shape : tuple of int
        Of the part.
    offset : tuple of int
        Of its first entry in the whole.
    mesh : DeviceMesh or None
        None for a plain tensor.
    placements : tuple of Placement
    group : ProcessGroup or None
        Those that hold the other parts of a plain tensor; None where it is the whole.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()
    group: Any = None

    @property
    def over(self) -> Any:
        """What sums of parts are taken over: a mesh, a process group; None for a whole."""
        return self.group if self.mesh is None else self.mesh

    @property
    def axes(self) -> tuple[int, ...]:
        """The dimensions of the mesh along which devices hold different parts."""
        return tuple(i for i, placed in enumerate(self.placements) if isinstance(placed, Shard))

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
    def counts(self) -> bool:
        """Whether this device's sums count: of a part that several hold those of one alone do."""
        if self.mesh is None:
            return True
        coordinates = self.mesh.get_coordinate() or ()
        return all(
            at == 0 or isinstance(placement, Shard)
            for at, placement in zip(coordinates, self.placements, strict=True)
        )

    def wrap(self, tensor: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
        """Return a tensor of the part as one of the whole; leading axes are those of columns."""
        if self.mesh is None:
            return tensor
        lead = len(shape) - len(self.shape)
        return DTensor.from_local(
            _alone(tensor),
            self.mesh,
            [Shard(p.dim + lead) if isinstance(p, Shard) else p for p in self.placements],
            run_check=False,
            shape=torch.Size(shape),
            stride=tuple(stride),
        )


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


def part_of(tensor: Tensor, group: Any = None) -> Part:
    """Return where this device's part of a tensor lies; of a plain one, in a group or as a whole.

    Parameters
    ----------
    tensor : tensor
    group : ProcessGroup, optional
        Those that hold the other parts of a plain tensor.
    """
    if not isinstance(tensor, DTensor):
        return Part(tuple(tensor.shape), (0,) * tensor.dim(), group=group)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Part(tuple(shape), tuple(offset), tensor.device_mesh, tuple(tensor.placements))


def window(values: Any, part: Part) -> Any:
    """Return what belongs to a part, of values that along its axes have all entries or one.

    Of a tensor or a NumPy array with the axes of the parameter as its last ones, a view. What is
    distributed as the parameter is has its part on this device already.
    """
    if isinstance(values, DTensor):
        return values.to_local()
    lead = values.ndim - len(part.shape)
    cut = [
        slice(None) if values.shape[lead + axis] == 1 else slice(start, start + length)
        for axis, (start, length) in enumerate(zip(part.offset, part.shape, strict=True))
    ]
    return values[(..., *cut)]


def summed(tensor: Tensor, over: Any) -> Tensor:
    """Return the sum of a tensor over all devices of a mesh or group, by one collective."""
    return _arrived(collectives.all_reduce(tensor, "sum", _group(over)))


def _group(mesh: Any) -> Any:
    """Return the process group of all devices of a mesh, made at its first use."""
    if not isinstance(mesh, DeviceMesh):
        return mesh
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if mesh not in _groups:
        ranks = sorted(mesh.mesh.flatten().tolist())
        _groups[mesh] = dist.new_group(ranks, use_local_synchronization=True)
    return _groups[mesh]


_groups: dict[DeviceMesh, Any] = {}


def devices(mesh: Any, axes: Collection[int]) -> int:
    """Return how many devices a sum along these dimensions of a mesh, or over a group, is of."""
    if not isinstance(mesh, DeviceMesh):
        return dist.get_world_size(mesh)
    return math.prod(mesh.size(axis) for axis in axes)


def summed_along(tensor: Tensor, mesh: Any, axes: Sequence[int]) -> Tensor:
    """Return the sum of a tensor over a group, or the devices along some dimensions of a mesh."""
    if not isinstance(mesh, DeviceMesh) or len(axes) == mesh.ndim:
        return summed(tensor, mesh)
    for axis in axes:
        tensor = _arrived(collectives.all_reduce(tensor, "sum", (mesh, axis)))
    return tensor
