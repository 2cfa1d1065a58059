"""metaopt_jax as the suite sees an adapter: with parameters and a state of its own."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from metaopt_jax import transformation

import metaopt as mo

__all__ = ["Optimizer"]


class Optimizer:
    """An optax transformation and what it transforms.

    Parameters
    ----------
    opt : metaopt.MetaOptimize
    params : mapping of name to array
    compiled : bool, default True
        Whether updates are compiled by `jax.jit`.
    """

    def __init__(
        self, opt: mo.MetaOptimize, params: Mapping[str, Any], *, compiled: bool = True
    ) -> None:
        self.transformation = transformation(opt)
        self.own: Any = OrderedDict(params)  # JAX would sort a dict, and the blocks with it
        self.kept: Any = self.transformation.init(self.own)
        self.plan = opt.plan(self.own)

        def update(grads: Any, state: Any, params: Any, lr: Any, curvature: Any) -> Any:
            updates, state = transformation(opt, lr=lr).update(
                grads, state, params, **_as_functions(params, **curvature)
            )
            return optax.apply_updates(params, updates), state

        self.update = jax.jit(update) if compiled else update

    def step(
        self, grads: Any, lr: Any, hvp: Any, third: Any = None, hessian_diagonal: Any = None
    ) -> None:
        """Take what `metaopt.MetaOptimize.step` takes, for the parameters and state at hand."""
        curvature: dict[str, Any] = {}
        if self.plan.curvature == "exact":
            curvature["hvp"] = _as_array(hvp, self.own, axes=1)
        if self.plan.third:
            curvature["third"] = _as_array(third, self.own, axes=2)
        if self.plan.curvature == "diagonal":
            curvature["hessian_diagonal"] = OrderedDict(hessian_diagonal)
        grads = OrderedDict((name, grads[name]) for name in self.own)
        self.own, self.kept = self.update(grads, self.kept, self.own, lr, curvature)

    def params(self) -> dict[str, Any]:
        """Return the parameters."""
        return dict(self.own)

    def state(self) -> mo.State:
        """Return the state as the core has it."""
        return self.transformation.core_state(self.kept, self.own)


def _as_array(function: Callable[..., Any], params: Any, axes: int) -> Any:
    """Return a linear function of one or two sets of tangents as an array, (..., all weights).

    What is compiled once can be given another array in every step, but not another function.
    """
    vector, unravel = ravel_pytree(params)
    basis = jax.vmap(unravel)(jnp.eye(vector.size, dtype=vector.dtype))
    found = function(*(basis,) * axes)
    lead = (vector.size,) * axes
    return jnp.concatenate(
        [
            jnp.zeros((*lead, param.size), vector.dtype)
            if found[name] is None
            else found[name].reshape(*lead, -1)
            for name, param in params.items()
        ],
        axis=-1,
    )


def _as_functions(params: Any, **arrays: Any) -> dict[str, Any]:
    """Return what `update` takes: functions of tangents like `params` from their arrays."""
    stops = np.cumsum([param.size for param in params.values()])

    def contraction(array: Any) -> Callable[..., Any]:
        def contracted(*tangents: Any) -> Any:
            product = array
            for tangent in tangents:
                product = jnp.tensordot(ravel_pytree(tangent)[0], product, axes=1)
            # not unraveled, which would round to the dtypes of the parameters
            parts = zip(params.items(), jnp.split(product, stops[:-1]), strict=True)
            return OrderedDict((name, part.reshape(param.shape)) for (name, param), part in parts)

        return contracted

    return {
        name: array if name == "hessian_diagonal" else contraction(array)
        for name, array in arrays.items()
    }
