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
    noise = _uniform(bits.shape, bits.device)
    cut = torch.bitwise_and(bits + noise, -(2**16)).view(torch.float32)
    return torch.where(value == value, cut, value).to(dtype)


def _uniform(shape: torch.Size, device: torch.device) -> Tensor:
    """Return whole numbers from 0 to 2**16 - 1, int32, all equally likely.

    One number is drawn, and hashed with the place of each by Wellons' lowbias32: of that a compiler
    makes vectors, while it calls a generator number by number.
    """
    seed = torch.randint(-(2**31), 2**31, (), dtype=torch.int32, device=device)
    state = torch.arange(shape.numel(), dtype=torch.int32, device=device).reshape(shape) ^ seed
    state = (state ^ _upper(state, 16)) * 0x7FEB352D
    state = (state ^ _upper(state, 17)) * (0x846CA68B - 2**32)
    return _upper(state, 16)


def _upper(state: Tensor, bits: int) -> Tensor:
    """Return the upper bits of int32 as a number that is not negative."""
    return torch.bitwise_and(state >> (32 - bits), 2**bits - 1)


def lost(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what rounding to the nearest number of `dtype` takes from `value`, 0 if it overflows.

    By Veltkamp's splitting, of whose sums the last has no more digits than `dtype`: a compiler
    would take a number that is made wide again for what it was before it was rounded, and then
    nothing is ever lost.

    Parameters
    ----------
    value : float32 tensor
    dtype : dtype
        float16 or bfloat16.
    """
    wide, narrow = torch.finfo(value.dtype), torch.finfo(dtype)
    unit = narrow.eps / wide.eps
    size = value.abs()
    large = size > 1.0  # these are divided by `unit`, so that nothing overflows
    part = torch.where(large, value * (1.0 / unit), value)
    product = part * unit + part
    nearest = product + (part - product)
    nearest = torch.where(large, nearest * unit, nearest)
    # below the least normal number the last digit is the same for all, as it is beside `least`
    least = 1.5 * narrow.tiny * unit
    nearest = torch.where(size < narrow.tiny, (value + least) - least, nearest)
    return torch.where(nearest.abs() <= narrow.max, value - nearest, 0.0)
