"""How tensors lie in memory: passes read and write it without a look at the tensors themselves."""

from collections.abc import Hashable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["PLAIN", "address", "check_memory", "layout", "stored"]

#: Types of tensors with memory of their own, for which nothing slower need be asked.
PLAIN = (Tensor, torch.nn.Parameter)


def address(tensor: Tensor) -> int:
    """Return where a tensor's numbers begin; 0 for a fake one, which has none."""
    return 0 if is_fake(tensor) else tensor.data_ptr()


def layout(tensor: Tensor) -> Hashable:
    """Return all that says how a tensor's numbers lie in memory, but not where it begins."""
    if type(tensor) not in PLAIN and is_traceable_wrapper_subclass(tensor):
        return type(tensor), tensor.shape, tensor.dtype, tensor.device
    return (
        type(tensor),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.storage_offset(),
        tensor.untyped_storage().nbytes(),
        tensor.is_neg(),
    )


def stored(tensor: Tensor) -> bool:
    """Say whether a tensor's storage reaches to its last number."""
    if is_traceable_wrapper_subclass(tensor) or tensor.numel() == 0:
        return True
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((length - 1) * step for length, step in pairs)
    return (last + 1) * tensor.itemsize <= tensor.untyped_storage().nbytes()


def check_memory(name: str, param: Tensor) -> None:
    """Raise ValueError where a parameter's memory cannot be written to entry by entry."""
    if param.layout != torch.strided:
        return
    if any(n > 1 and step == 0 for n, step in zip(param.shape, param.stride(), strict=True)):
        msg = f"`params[{name!r}]` is expanded, one number for many; copy it by `.clone()`."
        raise ValueError(msg)
    if param.is_neg():
        msg = f"`params[{name!r}]` is negated by a bit alone; copy it by `.resolve_neg()`."
        raise ValueError(msg)
