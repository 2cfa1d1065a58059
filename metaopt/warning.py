"""Warnings that point at the user's line."""

import sys
import warnings

__all__ = ["warn"]

#: Packages whose frames lie between the user's call and a warning; torch's own decorate it.
OURS = {"metaopt", "metaopt_jax", "metaopt_kernels", "metaopt_torch", "torch"}


def warn(message: str) -> None:
    """Warn as if the nearest caller outside of our packages and torch had.

    For adapters, in which several functions lead to a warning, from different depths.

    Parameters
    ----------
    message : str
    """
    depth = 1
    while sys._getframe(depth).f_globals.get("__name__", "").partition(".")[0] in OURS:
        depth += 1
    warnings.warn(message, stacklevel=depth + 1)
