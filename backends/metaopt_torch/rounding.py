"""How parameters narrower than the state are rounded."""

import torch
from torch import Tensor

__all__ = ["CHOICES", "lost", "rounded"]

CHOICES = ("nearest", "stochastic", "kahan")


def rounded(value: Tensor, dtype: torch.dtype, rounding: str) -> Tensor:
    """Return `value` in a narrower dtype.

    Parameters
    ----------
    value : float32 or float64 tensor
    dtype : dtype
    rounding : {"nearest", "stochastic", "kahan"}
        "stochastic" rounds up with the probability that makes the expectation right, for bfloat16;
        "kahan" to nearest, for the caller keeps what is lost.
    """
    if rounding != "stochastic" or dtype != torch.bfloat16:
        return value.to(dtype)
    # a bfloat16 is the upper half of a float32: add noise to the lower half, and cut it off
    bits = value.view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device)
    cut = torch.bitwise_and(bits + noise, -(2**16)).view(torch.float32)
    return torch.where(torch.isfinite(value), cut, value).to(dtype)


def lost(value: Tensor, narrow: Tensor) -> Tensor:
    """Return what rounding has taken from `value`, 0 where `narrow` has overflowed."""
    # By way of its bits, and of what looks like work on them: a compiler would take a number that
    # is made wide again for what it was before it was rounded, and then nothing is ever lost.
    bits = torch.bitwise_and(narrow.view(torch.int16), -1)
    narrow = bits.view(narrow.dtype)
    difference = value - narrow.to(value.dtype)
    return torch.where(torch.isfinite(difference), difference, 0.0)
