"""State in memory that several processes share, as Hogwild's do: it is stepped where it lies.

Moved elsewhere, to be packed, it would be one process's own from then on, in silence.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["joined", "shared"]


def shared(tensor: Any) -> bool:
    """Say whether a tensor lies in memory that other processes may have."""
    return isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.is_shared()


def joined(parts: Sequence[tuple[Tensor, int]], like: Tensor) -> Tensor | None:
    """Return the very memory of parts, which lie side by side, as one tensor.

    Parameters
    ----------
    parts : sequence of (tensor, int)
        Slices of the whole along its last axis, and where each begins.
    like : tensor
        Of the shape and dtype of the whole.

    Returns
    -------
    tensor, or None where they are not parts of such a whole
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
        lie = [(t.data_ptr(), t.shape, t.stride()) for t in (part, piece)]
        if lie[0] != lie[1]:
            return None
    return whole
