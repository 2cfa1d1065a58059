"""metaopt_jax as the suite sees an adapter: with parameters and a state of its own."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from metaopt_jax import from_config, wrap

import metaopt as mo
from metaopt.arrays import per_leaf
from metaopt.plan import rules_by_leaf
from metaopt_conformance.table import counterpart
from metaopt_conformance.verdicts import Skip
from metaopt_conformance.wrapping import options_of, slots_of

__all__ = ["Optimizer", "Wrapped"]

#: Moments of optax's transformations by the slots of the rules that they are.
MOMENTS = {"exp_avg": ("mu", "ema"), "exp_avg_sq": ("nu",)}


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
        self.transformation = from_config(opt)
        self.own: Any = OrderedDict(params)  # JAX would sort a dict, and the blocks with it
        self.kept: Any = self.transformation.init(self.own)
        self.plan = opt.plan(self.own)

        def update(
            grads: Any, state: Any, params: Any, lr: Any, curvature: Any, meta_grads: Any
        ) -> Any:
            given = _as_functions(params, **curvature)
            updates, state = from_config(opt, lr=lr).update(
                grads, state, params, meta_grads=meta_grads, **given
            )
            return optax.apply_updates(params, updates), state

        self.update = jax.jit(update) if compiled else update

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
        curvature: dict[str, Any] = {}
        if self.plan.curvature == "exact":
            curvature["hvp"] = _as_array(hvp, self.own, axes=1)
        if self.plan.third:
            curvature["third"] = _as_array(third, self.own, axes=2)
        if self.plan.curvature == "diagonal":
            curvature["hessian_diagonal"] = OrderedDict(hessian_diagonal)
        grads = OrderedDict((name, grads[name]) for name in self.own)
        if meta_grads is not None:
            meta_grads = OrderedDict((name, meta_grads[name]) for name in self.own)
        self.own, self.kept = self.update(grads, self.kept, self.own, lr, curvature, meta_grads)

    def params(self) -> dict[str, Any]:
        """Return the parameters."""
        return dict(self.own)

    def state(self) -> mo.State:
        """Return the state as the core has it."""
        return self.transformation.core_state(self.kept, self.own)


class Wrapped:
    """A transformation of optax's that is wrapped, and what it transforms.

    Parameters
    ----------
    opt : metaopt.MetaOptimize
    params : mapping of name to array

    Raises
    ------
    Skip
        If optax has no such transformation, or something is asked that needs a formula.
    """

    def __init__(self, opt: mo.MetaOptimize, params: Mapping[str, Any]) -> None:
        if opt.curvature != "none":
            msg = "what is wrapped has no curvature"
            raise Skip(msg)
        if any(jnp.finfo(param.dtype).bits < 32 for param in params.values()):
            msg = "what is wrapped has moments as narrow as its parameters"
            raise Skip(msg)
        self.own: Any = OrderedDict(params)
        self.rules = rules_by_leaf(opt.base, per_leaf(params.items()))
        # by leaf, for leaves have names and may have rules of their own
        inner = optax.partition(
            {name: _made(rule) for name, rule in self.rules.items()},
            OrderedDict((name, name) for name in params),
        )
        options = options_of(opt, wrap)
        options["weight_decay"] = {name: rule.weight_decay for name, rule in self.rules.items()}
        self.transformation = wrap(inner, **options)
        self.kept: Any = self.transformation.init(self.own)

        def update(grads: Any, state: Any, params: Any, lr: Any, meta_grads: Any) -> Any:
            updates, state = wrap(inner, lr=lr, **options).update(
                grads, state, params, meta_grads=meta_grads
            )
            return optax.apply_updates(params, updates), state

        self.update = jax.jit(update)

    def step(self, grads: Any, lr: Any, hvp: Any, meta_grads: Any = None) -> None:  # noqa: ARG002
        """Take what `metaopt.MetaOptimize.step` takes, for the parameters and state at hand."""
        if any(grad is None for grad in grads.values()):
            msg = "what is wrapped takes no missing gradients"
            raise Skip(msg)
        grads, meta_grads = (
            None if tree is None else OrderedDict((name, tree[name]) for name in self.own)
            for tree in (grads, meta_grads)
        )
        self.own, self.kept = self.update(grads, self.kept, self.own, lr, meta_grads)

    def params(self) -> dict[str, Any]:
        """Return the parameters."""
        return dict(self.own)

    def state(self) -> mo.State:
        """Return the state as the core has it, with the moments of what is wrapped."""

        def moment(name: str, slot: str) -> Any:
            own = self.kept.inner.inner_states[name]
            found = (optax.tree.get(own, key, None) for key in MOMENTS[slot])
            return next(tree for tree in found if tree is not None)[name]

        kept = self.transformation.core_state(self.kept, self.own)
        return replace(kept, slots=slots_of(self.rules, moment))


def _made(rule: Any) -> Any:
    """Return optax's transformation that is a rule, put together where it has none, at lr 1."""
    found = counterpart("optax", rule)
    if found is not None:
        return getattr(optax, found[0])(1.0, **found[1])
    of_another_form = getattr(rule, "delayed", False) or rule.decay_step_size is not None
    if of_another_form or not isinstance(rule, mo.SGD | mo.RMSprop):
        msg = f"the library has no {type(rule).__name__} of this form"
        raise Skip(msg)
    if isinstance(rule, mo.SGD):
        direction = optax.ema(rule.momentum, debias=False) if rule.momentum else optax.identity()
    else:
        direction = optax.scale_by_rms(
            rule.beta2, rule.eps, eps_in_sqrt=False, bias_correction=rule.bias_correction
        )
    return optax.chain(direction, optax.add_decayed_weights(rule.weight_decay), optax.scale(-1.0))


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
