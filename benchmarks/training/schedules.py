"""Multipliers of step sizes by the step."""

import math

__all__ = ["cosine"]


def cosine(step: int, steps: int, part: float) -> float:
    """Return the multiplier of a step: up to 1 in a part of the steps, down to 0 by a cosine."""
    warm_up = max(1, round(part * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
