"""Who has sharded a parameter behind a plain tensor, and over which processes.

A DTensor says where it lies. Others hold their shard in a plain tensor: what marks it, or who holds
it, is looked for here, so that none is taken for the whole.
"""

import gc
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from metaopt.blocks import Partition
from metaopt_torch.shards import is_dtensor

__all__ = [
    "FSDP1",
    "Containers",
    "check_agreement",
    "check_group",
    "check_shared",
    "gather_anew",
    "group_called",
    "zero_group",
]

#: Attributes that mark a parameter as a part of one, by what sets them.
FSDP1, DEEPSPEED, MEGATRON = "_fsdp_flattened", "ds_id", "tensor_model_parallel"


class Containers:
    """Knows over which processes plain tensors are distributed."""

    def __init__(self, given: dist.ProcessGroup | None) -> None:
        self._given = given  # that of all plain tensors which do not say it themselves
        self._handles: list[Any] | None = None

    def group_of(self, name: str, param: Tensor) -> Any:
        """Return the group that holds the other shards of a parameter; None if it is whole here.

        ValueError is raised where these cannot be found, TypeError where its memory cannot be read.
        """
        if is_dtensor(param):
            return None
        if is_traceable_wrapper_subclass(param):
            msg = (
                f"`params[{name!r}]` is a {type(param).__name__}, which keeps its numbers in other "
                "tensors; pass plain tensors or DTensors."
            )
            raise TypeError(msg)
        if hasattr(param, DEEPSPEED):
            msg = (
                f"`params[{name!r}]` is partitioned by DeepSpeed's ZeRO, which is not supported: "
                "every process would learn step sizes of its own. Use `fully_shard`."
            )
            raise ValueError(msg)
        if getattr(param, FSDP1, False):
            return self._of_fsdp1(name, param)
        several = dist.is_initialized() and dist.get_world_size() > 1
        if self._given is None and hasattr(param, MEGATRON) and several:
            msg = (
                f"`params[{name!r}]` is Megatron's and may be a part of one. Pass "
                "`process_group=`, the processes that each hold a part of the parameters."
            )
            raise ValueError(msg)
        if self._given is None and _caller("deepspeed.runtime.base_optimizer", "ZeROOptimizer"):
            msg = (
                "DeepSpeed's ZeRO has put parts in the place of this optimizer's parameters. Pass "
                "`process_group=`, the data-parallel processes, for its stages 1 and 2, with one "
                "step size or a `block` for each group; or use `fully_shard`."
            )
            raise ValueError(msg)
        return self._given

    def _of_fsdp1(self, name: str, param: Tensor) -> Any:
        if self._handles is None:
            wrapped = _living("torch.distributed.fsdp", "FullyShardedDataParallel")
            self._handles = [m._handle for m in wrapped if getattr(m, "_handle", None) is not None]
        for handle in self._handles:
            flat = handle.flat_param
            if any(param is other for other in (flat, *(flat._params or ()))):
                return handle.process_group if handle.uses_sharded_strategy else None
        if self._given is None:
            msg = (
                f"`params[{name!r}]` is a part that FullyShardedDataParallel holds, but its module "
                "is not to be found. Pass `process_group=`, the group that it is sharded over."
            )
            raise ValueError(msg)
        return self._given


def _caller(module: str, name: str) -> Any:
    """Return the object of a class one of whose methods has led here, or None."""
    kind = getattr(sys.modules.get(module), name, None)
    frame = sys._getframe()
    while kind is not None and frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _living(module: str, name: str) -> Iterator[Any]:
    """Yield the objects of a class, of a module that may never have been imported."""
    kind = getattr(sys.modules.get(module), name, None)
    if kind is not None:
        yield from (found for found in gc.get_objects() if issubclass(type(found), kind))


def gather_anew(params: Iterable[Tensor]) -> None:
    """Have FSDP2 gather its parameters among these anew, as they were written to.

    After an evaluation it still holds whole ones of its outermost module.
    """
    ours = {id(param) for param in params}
    for module in _living("torch.distributed.fsdp", "FSDPModule") if ours else ():
        group = module._get_fsdp_state()._fsdp_param_group
        if group is not None and any(id(p.sharded_param) in ours for p in group.fsdp_params):
            module.reshard()


def check_group(group: Any) -> None:
    """Raise unless this is a group of processes that this one belongs to, or None."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        msg = "`process_group` must be one that this process belongs to; got another's."
        raise ValueError(msg)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        msg = f"`process_group` must be a ProcessGroup; got {group!r}."
        raise TypeError(msg)


def zero_group() -> Any:
    """Return the processes of the ZeroRedundancyOptimizer that is making an optimizer, or None.

    It gives each process other parameters, whole ones, and says so to nobody.
    """
    module = "torch.distributed.optim.zero_redundancy_optimizer"
    return getattr(_caller(module, "ZeroRedundancyOptimizer"), "process_group", None)


def check_shared(partition: Partition) -> None:
    """Raise unless blocks are the same whichever parameters a process has."""
    if len({partition.assign(name, (2, 2))[0] for name in ("0", "1")}) > 1:
        msg = (
            "ZeroRedundancyOptimizer gives each process parameters of its own, without names, and "
            'saves one process\'s step sizes: `blocks` must be "scalar", or groups have a `block`. '
            "For other blocks use `fully_shard`."
        )
        raise ValueError(msg)


def check_agreement(group: Any, blocks: Any) -> None:
    """Raise on all processes of a group where their blocks differ; a collective call."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, blocks, group=group)
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            msg = (
                "Processes that share parameters must have equal blocks, by group; process 0 has "
                f"{found[0]}, process {rank} has {theirs}."
            )
            raise ValueError(msg)


def group_called(name: str) -> Any:
    """Return the process group of this name, which is the same in all of its processes."""
    try:
        return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (LookupError, RuntimeError, ValueError) as error:
        msg = f"This optimizer's parameters are parts over process group {name!r}, unknown here."
        raise ValueError(msg) from error
