"""What a check comes to, beside its worst error as a share of what is allowed."""

from typing import Any

import numpy as np

__all__ = ["Failure", "Skip", "finite_alike", "judged"]


class Failure(AssertionError):  # noqa: N818
    """What the library did that it should not."""


class Skip(Exception):  # noqa: N818
    """Why a check does not apply."""


def judged(worst: float, error: float, allowed: float, where: str) -> float:
    """Return the larger of two shares, or raise where the error is more than is allowed, or NaN."""
    if not error <= allowed:
        msg = f"{where}: error {error:.1e}, allowed {allowed:.1e}"
        raise Failure(msg)
    return max(worst, error / allowed)


def finite_alike(got: Any, want: Any, where: str) -> tuple[Any, Any]:
    """Return the finite entries of both, or raise unless these are the same entries.

    Which of inf and NaN an entry is depends on the order of operations.
    """
    got, want = np.asarray(got), np.asarray(want)
    finite = np.isfinite(want)
    if not np.array_equal(np.isfinite(got), finite):
        msg = f"{where}: other entries are finite than should be"
        raise Failure(msg)
    return got[finite], want[finite]
