"""MetaOptimizer, an optimizer of MLX whose step sizes tune themselves."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.optimizers

import metaopt as mo
from metaopt.configuration import BASE, META, META_LR, STEP_SIZE, RuleLike
from metaopt.inputs import check_formulas, multiplier, taken_for_step_size
from metaopt.metaoptimize import check_config
from metaopt.warning import warn
from metaopt_mlx.state import from_tree, named, to_tree, tree_like

__all__ = ["MetaOptimizer", "from_config"]


class MetaOptimizer(mlx.optimizers.Optimizer):
    r"""Wraps a base update and adapts its step sizes online with a meta update.

    docs/mathematics.md; `metaopt.MetaOptimize` describes the options that both have. It is used as
    every optimizer of MLX: `update(model, gradients)`, or `apply_gradients`; `state` is a tree of
    arrays, for `mx.compile`, `mx.eval` and `mx.save_safetensors`. Leaves are named by their paths,
    joined by ".", as "layers.0.weight".

    Parameters
    ----------
    base, meta, step_size, meta_lr, discount, blocks, sigma, bounds
        As for `metaopt.MetaOptimize`.
    approximation, curvature, held_out, meta_first, skip_nonfinite, recover
        As for `metaopt.MetaOptimize`.
    lr : float, array of shape () or schedule, default 1.0
        Multiplies the learned step sizes: a function of the number of steps made, such as
        `mlx.optimizers` has. What `learning_rate` returns and sets.

    Attributes
    ----------
    config : metaopt.MetaOptimize

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described, or two do not go together.

    Examples
    --------
    >>> import mlx.core as mx, mlx.nn as nn
    >>> model = nn.Linear(3, 1)
    >>> opt = MetaOptimizer(base="adamw", blocks="tensor")
    >>> loss = nn.value_and_grad(model, lambda x: model(x).square().mean())
    >>> value, grads = loss(mx.ones((4, 3)))
    >>> opt.update(model, grads)
    >>> sorted(opt.step_sizes())
    ['bias', 'weight']
    """

    def __init__(
        self,
        *,
        base: RuleLike = BASE,
        meta: RuleLike = META,
        step_size: float | Mapping[str, Any] = STEP_SIZE,
        meta_lr: float = META_LR,
        discount: float | tuple[float, ...] | None = None,
        blocks: Any = "scalar",
        sigma: Any = "exp",
        bounds: Any = None,
        approximation: str = "l",
        curvature: Any = "none",
        held_out: bool = False,
        meta_first: bool = False,
        skip_nonfinite: bool = False,
        recover: bool = False,
        lr: Any = 1.0,
    ) -> None:
        super().__init__()
        self.config = mo.MetaOptimize(
            base=base,
            meta=meta,
            step_size=step_size,
            meta_lr=meta_lr,
            discount=discount,
            blocks=blocks,
            sigma=sigma,
            bounds=bounds,
            approximation=approximation,
            curvature=curvature,
            held_out=held_out,
            meta_first=meta_first,
            skip_nonfinite=skip_nonfinite,
            recover=recover,
        )
        check_formulas(
            self.config.base,
            "hand the steps of an optimizer of your own to `metaopt.MetaOptimize.step` as "
            "`unit_steps`.",
        )
        if not callable(lr):
            lr = multiplier("lr", lr)
            advice = taken_for_step_size([lr])
            if advice is not None:
                warn(advice)
        #: A state of the parameters, of which names, shapes and dtypes count.
        self._like: mo.State | None = None
        self._maybe_schedule("learning_rate", lr)

    @property
    def learning_rate(self) -> Any:
        """The multiplier `lr`, an array of shape (); it may be set between steps.

        Raises
        ------
        ValueError
            If it is set to what `lr` cannot be: a number that is negative or not finite, or an
            array of another shape.
        """
        return self.state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, lr: Any) -> None:
        self.state["learning_rate"] = mx.array(multiplier("learning_rate", lr))

    def init(self, parameters: Any) -> None:
        """Make the state for these parameters, and keep what there is of it.

        Parameters
        ----------
        parameters : tree of arrays
            Those that are trained: `model.trainable_parameters()`. Left out, the first update does
            it for those that have gradients.

        Raises
        ------
        TypeError, ValueError
            As `metaopt.MetaOptimize.init`; if a state that was set is not one of these parameters.
        """
        like = self.config.init(named(parameters))
        if "metaopt" in self._state:  # loaded from a file
            from_tree(self._state["metaopt"], like)
        else:
            self._state["metaopt"] = to_tree(like)
        self._like, self._initialized = like, True

    def update(self, model: Any, gradients: Any, **given: Any) -> None:
        """Step the parameters of a module.

        Parameters
        ----------
        model : mlx.nn.Module
        gradients : tree of arrays
            As `mlx.nn.value_and_grad` returns them.
        **given
            As for `apply_gradients`.
        """
        model.update(self.apply_gradients(gradients, model, **given))

    def apply_gradients(
        self,
        gradients: Any,
        parameters: Any,
        *,
        hvp: Callable[..., Any] | None = None,
        third: Callable[..., Any] | None = None,
        hessian_diagonal: Any = None,
        meta_grads: Any = None,
    ) -> Any:
        """Return the parameters after a step.

        Parameters
        ----------
        gradients : tree of arrays
            What of `parameters` is left out rests.
        parameters : tree of arrays, or mlx.nn.Module
            Those of `init`; what else it holds is not looked at.
        hvp, third : optional
            As for `metaopt.MetaOptimize.step`, by names of leaves.
        hessian_diagonal, meta_grads : tree of arrays, optional
            As for `metaopt.MetaOptimize.step`.

        Returns
        -------
        tree like `gradients`

        Raises
        ------
        ValueError, TypeError
            As `metaopt.MetaOptimize.step`. Nothing is changed then.
        """
        grads, params = named(gradients), named(parameters)
        if not self._initialized:
            missing = [name for name in grads if name not in params]
            if missing:
                msg = f"`gradients` has {missing[0]!r}, which `parameters` has not."
                raise ValueError(msg)
            self.init(tree_like(gradients, params))
        state = self.core_state()
        for name in grads:
            if name not in state.count:
                msg = (
                    f"`gradients` has {name!r}, which has no state. Pass all parameters that will "
                    "be trained to `init` first."
                )
                raise ValueError(msg)
        lr = self._lr_now()
        new, new_state = self.config.step(
            {name: params[name] for name in state.count if name in params},
            {name: grads.get(name) for name in state.count},
            state,
            lr=lr,
            hvp=hvp,
            third=third,
            hessian_diagonal=None if hessian_diagonal is None else named(hessian_diagonal),
            meta_grads=None if meta_grads is None else named(meta_grads),
        )
        self.state["learning_rate"] = lr
        self.state["step"] = self.step + 1
        self.state["metaopt"] = to_tree(new_state)
        return tree_like(gradients, new)

    def core_state(self) -> mo.State:
        """Return the state in the core's form, for `metaopt.save` and other libraries.

        Raises
        ------
        ValueError
            Before `init` and the first update; if `state` was set to that of other parameters.
        """
        if self._like is None or "metaopt" not in self._state:
            msg = "There is no state yet: call `init` with the parameters, or make a step."
            raise ValueError(msg)
        return from_tree(self._state["metaopt"], self._like)

    def load_core_state(self, state: mo.State) -> None:
        """Take a state in the core's form, such as `metaopt.load` returns, after `init`.

        Parameters
        ----------
        state : metaopt.State

        Raises
        ------
        ValueError
            If it is the state of another configuration or of other parameters.
        """
        tree = to_tree(state)
        from_tree(tree, self._like if self._like is not None else self.core_state())
        self.state["metaopt"] = tree

    def step_sizes(self) -> dict[str, Any]:
        """Return the learned step sizes by block, as `metaopt.MetaOptimize.step_sizes`."""
        return self.config.step_sizes(self.core_state())

    def effective_lr(self) -> dict[str, Any]:
        """Return the learned step sizes times the multiplier of the next step, by block."""
        lr = self._lr_now()
        return {name: size * lr.astype(size.dtype) for name, size in self.step_sizes().items()}

    def _lr_now(self) -> Any:
        """Return the multiplier that the next step takes."""
        if "learning_rate" in self._schedulers:
            return mx.array(self._schedulers["learning_rate"](self.step))
        return self.state["learning_rate"]

    def hyperparameters(self) -> dict[str, dict[str, Any]]:
        """Return the numbers of rules that are learned, by name and block."""
        return self.config.hyperparameters(self.core_state())

    def diagnostics(self, params: Any) -> dict[str, Any]:
        """Return how the adaptation is doing, as `metaopt.MetaOptimize.diagnostics`.

        Parameters
        ----------
        params : tree of arrays, or mlx.nn.Module
            As they are now.
        """
        state = self.core_state()
        return self.config.diagnostics(state, _of(state, params))

    def averaged_params(self, params: Any) -> Any:
        """Return weights averaged over the latest steps, better to evaluate than the last ones.

        As `metaopt.MetaOptimize.averaged_params`. Training goes on from `params`.

        Parameters
        ----------
        params : tree of arrays
            `model.parameters()`; what is not trained is returned as it is.

        Returns
        -------
        tree like `params`, for `model.update` of a copy

        Raises
        ------
        ValueError
            If there is no `discount` below 1, or with curvature or another `sigma` than "exp".
        """
        state = self.core_state()
        return tree_like(params, self.config.averaged_params(state, _of(state, params)))


def _of(state: mo.State, params: Any) -> dict[str, Any]:
    """Return those of a tree's arrays that have a state, by name."""
    arrays = named(params)
    return {name: arrays[name] for name in state.count if name in arrays}


def from_config(config: mo.MetaOptimize, *, lr: Any = 1.0) -> MetaOptimizer:
    """Return an optimizer with a configuration of the core, such as one of `metaopt.presets`.

    Parameters
    ----------
    config : metaopt.MetaOptimize
    lr
        As `MetaOptimizer` takes it.

    Raises
    ------
    ValueError, TypeError
        As `MetaOptimizer` does.
    """
    check_config(config)
    options = {one.name: getattr(config, one.name) for one in fields(config) if one.init}
    return MetaOptimizer(**options, lr=lr)
