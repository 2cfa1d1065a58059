"""How tensors lie in memory: passes read and write it without a look at the tensors themselves."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["PLAIN", "address", "check_memory", "joined", "layout", "shared", "stored"]

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
    """Return whether a tensor's storage reaches to its last number."""
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


def shared(tensor: object) -> bool:
    """Return whether other processes may have a tensor's memory, as Hogwild's do.

    Such state is stepped where it lies: a copy would be this process's own from then on.
    """
    return isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.is_shared()


def joined(parts: Sequence[tuple[Tensor, int]], like: Tensor) -> Tensor | None:
    """Return the memory of slices that lie side by side as one tensor; None where they do not.

    `parts` are slices of the whole along its last axis, and where each begins; the whole is to have
    the shape and dtype of `like`.
    """
    full = [(part, start) for part, start in parts if part.numel() > 0]
    if not full:
        return like
    part, start = full[0]
    offset, size = part.storage_offset() - start, like.numel() * like.element_size()
    room = part.untyped_storage().nbytes() - offset * part.element_size()
    if part.dtype != like.dtype or offset < 0 or room < size:
        return None
    whole = torch.as_strided(part, like.shape, like.stride(), offset)
    for part, start in full:
        piece = whole[..., start : start + part.shape[-1]] if like.dim() > 0 else whole
        if (part.data_ptr(), part.shape, part.stride()) != (
            piece.data_ptr(),
            piece.shape,
            piece.stride(),
        ):
            return None
    return whole
