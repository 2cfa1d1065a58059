"""The core's state as a tree of MLX, of dicts and lists of arrays, and back."""

from collections.abc import Mapping
from typing import Any

from mlx.utils import tree_flatten, tree_unflatten

import metaopt as mo
from metaopt.state import arrays_of, each_array

__all__ = ["from_tree", "named", "to_tree", "tree_like"]


def named(tree: Any) -> dict[str, Any]:
    """Return the arrays of a tree, or of a module, by their paths joined by "."."""
    return dict(tree_flatten(tree))


def tree_like(tree: Any, arrays: Mapping[str, Any]) -> Any:
    """Return `tree` with the arrays of these names in it; others stay."""
    return tree_unflatten([(name, arrays.get(name, array)) for name, array in tree_flatten(tree)])


def to_tree(state: mo.State) -> Any:
    """Return a state as a tree, in which each array has the path of its names."""
    return tree_unflatten([(".".join(path), array) for path, array in arrays_of(state).items()])


def from_tree(tree: Any, like: mo.State) -> mo.State:
    """Return the state that a tree holds, with the fields and names of `like`.

    Raises
    ------
    ValueError
        If an array is missing, or has another shape or dtype.
    """
    found = named(tree)

    def array(path: tuple[str, ...], other: Any) -> Any:
        value = found.get(".".join(path))
        if value is None or value.shape != other.shape or value.dtype != other.dtype:
            has = "none" if value is None else f"{value.dtype} of shape {value.shape}"
            msg = (
                f"`state` must have {'.'.join(path)!r}, {other.dtype} of shape {other.shape}; got "
                f"{has}. It belongs to other parameters or to another configuration."
            )
            raise ValueError(msg)
        return value

    return each_array(array, like)
