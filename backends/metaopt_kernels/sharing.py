"""Arrays of other libraries by DLPack, without a copy."""

from typing import Any

__all__ = ["device_of", "shared"]

#: Where DLPack's kinds of devices are; those of the host are one.
_KINDS = {1: "cpu", 2: "cuda", 3: "cpu", 10: "rocm", 11: "cpu", 13: "cuda", 14: "oneapi"}


def device_of(array: Any) -> str:
    """Return the device of an array that DLPack can export, such as "cpu" or "cuda:0"."""
    kind, index = (int(number) for number in array.__dlpack_device__())
    name = _KINDS.get(kind, f"dlpack device {kind}")
    return name if name == "cpu" else f"{name}:{index}"


def shared(name: str, array: Any, like: Any, xp: Any) -> Any:
    """Return an array of another library as one of `xp`, in the same memory.

    Parameters
    ----------
    name : str
        For errors.
    array : object
        One of `xp` is returned as it is; what DLPack does not know, too, for others to judge.
    like : array
        Of `xp`, on the device to be on.
    xp : namespace

    Raises
    ------
    ValueError
        If it is on another device.
    TypeError
        If `xp` cannot read it.
    """
    if isinstance(array, xp.ndarray) or not hasattr(array, "__dlpack__"):
        return array
    here, there = device_of(like), device_of(array)
    if here != there:
        msg = (
            f"`{name}` is on {there}, but its parameter on {here}. Move it there first: arrays are "
            "shared between libraries, never copied between devices."
        )
        raise ValueError(msg)
    try:
        return xp.from_dlpack(array.detach() if hasattr(array, "detach") else array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        msg = (
            f"`{name}`, a {type(array).__module__}.{type(array).__name__}, cannot be shared with "
            f"{xp.__name__}: {error}"
        )
        raise TypeError(msg) from error
