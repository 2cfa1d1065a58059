"""metaopt_mlx as the suite sees an adapter: with parameters and a state of its own."""

from collections.abc import Mapping
from typing import Any

from metaopt_mlx import from_config
from mlx.utils import tree_flatten, tree_unflatten

import metaopt as mo
from metaopt_conformance.verdicts import Skip

__all__ = ["Optimizer"]


class Optimizer:
    """An optimizer of MLX and its parameters, a nested tree.

    Parameters
    ----------
    opt : metaopt.MetaOptimize
    params : mapping of name to array
    """

    def __init__(self, opt: mo.MetaOptimize, params: Mapping[str, Any]) -> None:
        self.optimizer: Any = from_config(opt)
        self.own = dict(params)
        self.optimizer.init(_tree(self.own))

    def step(
        self,
        grads: Any,
        lr: Any,
        hvp: Any,
        third: Any = None,
        hessian_diagonal: Any = None,
        meta_grads: Any = None,
    ) -> None:
        """Take what `metaopt.MetaOptimize.step` takes, for the parameters and state at hand."""
        if isinstance(lr, Mapping):
            msg = "MLX has one learning rate for all parameters"
            raise Skip(msg)
        self.optimizer.learning_rate = lr
        given = {"hessian_diagonal": hessian_diagonal, "meta_grads": meta_grads}
        trees = {name: None if some is None else _tree(some) for name, some in given.items()}
        moved = self.optimizer.apply_gradients(
            _tree(grads), _tree(self.own), hvp=hvp, third=third, **trees
        )
        self.own |= dict(tree_flatten(moved))

    def params(self) -> Any:
        """Return the parameters by name."""
        return self.own

    def state(self) -> Any:
        """Return the state of the core."""
        return self.optimizer.core_state()


def _tree(arrays: Mapping[str, Any]) -> Any:
    """Return arrays by name as a tree; those that are None are left out."""
    return tree_unflatten([(name, array) for name, array in arrays.items() if array is not None])
