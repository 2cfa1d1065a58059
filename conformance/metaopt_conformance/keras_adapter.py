"""metaopt_keras as the suite sees an adapter: with variables and a state of its own."""

import warnings
from collections.abc import Mapping
from typing import Any

import keras
from metaopt_keras import from_config

import metaopt as mo
from metaopt_conformance.verdicts import Skip

__all__ = ["Optimizer"]


class Optimizer:
    """An optimizer of Keras and its variables.

    Parameters
    ----------
    opt : metaopt.MetaOptimize
    params : mapping of name to array
    """

    def __init__(self, opt: mo.MetaOptimize, params: Mapping[str, Any]) -> None:
        self.lr: Any = 1.0
        # a function, as a number would be kept in float32
        self.optimizer: Any = from_config(opt, lr=lambda: self.lr)
        self.variables = [
            keras.Variable(keras.ops.copy(param), dtype=_name(param), name=name)
            for name, param in params.items()
        ]
        self.optimizer.build(self.variables)

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
            msg = "Keras has one learning rate for all variables"
            raise Skip(msg)
        if all(grad is None for grad in grads.values()):
            msg = "Keras makes no step without a gradient"
            raise Skip(msg)
        self.lr = lr
        given = {"hessian_diagonal": hessian_diagonal, "meta_grads": meta_grads}
        lists = {name: None if some is None else self._list(some) for name, some in given.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras's, of variables without a gradient
            self.optimizer.apply(self._list(grads), hvp=hvp, third=third, **lists)

    def params(self) -> Any:
        """Return the parameters by name."""
        return self.optimizer.named()

    def state(self) -> Any:
        """Return the state of the core."""
        return self.optimizer.core_state()

    def _list(self, arrays: Mapping[str, Any]) -> list[Any]:
        return [arrays.get(variable.path) for variable in self.variables]


def _name(array: Any) -> str:
    return str(keras.backend.standardize_dtype(array.dtype))
