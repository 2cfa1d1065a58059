"""What competes in `step_cost.py`, a module for each library.

Each has `NOTE`, what its rows are compared with; `PACKAGES`, whose versions are reported; and
`steps(shapes)`, which yields contenders. All of a problem are made first, then timed in turns. Its
`PROBLEMS`, if it has any, are measured in place of the usual ones.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["Contender", "Shapes"]

Shapes = Mapping[str, tuple[int, ...]]


class Contender(NamedTuple):
    """What makes one step of given gradients, and whether those after it are compared with it."""

    name: str
    step: Callable[[], object]
    reference: bool = False
