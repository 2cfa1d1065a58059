"""Pytrees as the core sees them: arrays by name."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from metaopt.arrays import Leaves, per_leaf

__all__ = ["Structure", "unboxed"]


def unboxed(tree: Any) -> Any:
    """Return `tree` with arrays in place of the variables that flax.nnx puts them in.

    `nnx.Optimizer` hands variables to `init` and holds its state in them, but hands arrays to
    `update`.
    """

    def boxes(node: Any) -> bool:
        return hasattr(node, "get_value") and hasattr(node, "get_metadata")

    return jax.tree.map(lambda node: node.get_value() if boxes(node) else node, tree, is_leaf=boxes)


@dataclass(frozen=True)
class Structure:
    """The structure of a pytree of parameters, and its leaves' names: key paths joined by "."."""

    tree: Any
    names: tuple[str, ...]

    @staticmethod
    def of(params: Any) -> "Structure":
        """Return the structure of `params`; None is no leaf.

        Raises
        ------
        ValueError
            If two leaves have the same name.
        """
        paths, _ = jax.tree_util.tree_flatten_with_path(unboxed(params))
        names = tuple(jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths)
        for name, number in Counter(names).items():
            if number > 1:
                msg = (
                    f"`params` has {number} leaves of the name {name!r}: their key paths, joined "
                    'by ".", must differ.'
                )
                raise ValueError(msg)
        return Structure(jax.tree.structure(params), names)

    def leaves(self, tree: Any, what: str) -> Leaves[Any]:
        """Return what `tree`, a pytree of this structure, has in place of each leaf, by name.

        Raises
        ------
        ValueError
            If it has another structure; `what` is its name in the message.
        """
        try:
            return per_leaf(zip(self.names, self.tree.flatten_up_to(tree), strict=True))
        except (ValueError, TypeError) as error:
            msg = f"`{what}` must be a pytree like `params`: {str(error).rstrip('.')}."
            raise ValueError(msg) from error

    def pytree(self, leaves: Mapping[str, Any]) -> Any:
        """Return the pytree of values by name."""
        return self.tree.unflatten([leaves[name] for name in self.names])

    def by_key(self, leaves: Mapping[str, Mapping[str, Any]], keys: Iterable[str]) -> Any:
        """Return by key a pytree from values by name and key, `MaskedNode()` for none."""
        return {
            key: self.tree.unflatten(
                [leaves.get(name, {}).get(key, optax.MaskedNode()) for name in self.names]
            )
            for key in keys
        }

    def some(self, leaves: Mapping[str, Any]) -> Any:
        """Return the pytree of values by name of some leaves, `MaskedNode()` for the others."""
        return self.tree.unflatten([leaves.get(name, optax.MaskedNode()) for name in self.names])

    def those_of(self, tree: Any) -> Leaves[Any]:
        """Return the values by name of some leaves: the inverse of `some`."""
        found = self.leaves(tree, "state")
        return per_leaf(
            (name, value)
            for name, value in found.items()
            if not isinstance(value, optax.MaskedNode)
        )

    def by_leaf(self, trees: Mapping[str, Any]) -> Leaves[Leaves[Any]]:
        """Return values by name and key from pytrees by key: the inverse of `by_key`."""
        columns = {key: self.leaves(tree, "state") for key, tree in trees.items()}
        rows = (
            (
                (key, column[name])
                for key, column in columns.items()
                if not isinstance(column[name], optax.MaskedNode)
            )
            for name in self.names
        )
        return per_leaf(zip(self.names, map(per_leaf, rows), strict=True))
