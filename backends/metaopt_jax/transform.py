"""MetaOptimize as an optax gradient transformation."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metaopt as mo
from metaopt.arrays import Leaves, cast, map_leaves, per_leaf
from metaopt.configuration import BASE, META, META_LR, STEP_SIZE, RuleLike
from metaopt.inputs import multipliers, namespace_of, taken_for_step_size
from metaopt.metaoptimize import check_config
from metaopt.warning import warn
from metaopt_jax.curvature import derivatives
from metaopt_jax.leaves import Structure, unboxed
from metaopt_jax.ordered import helps, in_order
from metaopt_jax.sharded import by_compiler, in_types, sums_over
from metaopt_jax.state import (
    MetaOptimizeState,
    each_horizon,
    from_core,
    learned_from_core,
    like_params,
    to_core,
    without_leaves,
)

__all__ = [
    "MetaOptimizeTransformation",
    "check_discount",
    "from_config",
    "holds_state",
    "metaoptimize",
]


class MetaOptimizeTransformation(optax.GradientTransformationExtraArgs):
    """A gradient transformation that can tell how its adaptation is doing.

    The `state` that its methods take is this transformation's own, or that of a chain or any other
    wrapper around it; they raise ValueError unless it holds exactly one state of MetaOptimize.

    Attributes
    ----------
    opt : metaopt.MetaOptimize
        The configuration.
    lr : float, array of shape (), schedule, or mapping of leaf name to these
        What multiplies the learned step sizes.
    """

    opt: mo.MetaOptimize
    lr: Any

    def step_sizes(self, state: Any) -> dict[str, Any]:
        """Return the learned step sizes by block, as `metaopt.MetaOptimize.step_sizes` does."""
        own = _own(state)
        structure = Structure.of(like_params(own, self.opt))
        return self.opt.step_sizes(to_core(own, self.opt, structure)) if structure.names else {}

    def effective_lr(self, state: Any) -> dict[str, Any]:
        """Return what the next update steps with: the learned step sizes times `lr`.

        Parameters
        ----------
        state : pytree
            This transformation's, or that of a wrapper around it.

        Returns
        -------
        dict of str to array
            By block, as `step_sizes`. Where `lr` is a mapping, by leaf, in shapes that broadcast to
            the leaf's.

        Examples
        --------
        >>> import jax.numpy as jnp, optax
        >>> tx = metaoptimize(step_size=0.5, lr=optax.linear_schedule(0.5, 1.0, 10))
        >>> state = tx.init({"w": jnp.ones(2)})
        >>> {name: float(lr) for name, lr in tx.effective_lr(state).items()}
        {'all': 0.25}
        """
        own = _own(state)
        lr = _at(self.lr, own.count)
        if not isinstance(lr, Mapping):
            lr = multipliers(lr, per_leaf([("lr", lr)]))["lr"]
            return {
                name: size * jnp.asarray(lr, size.dtype)
                for name, size in self.step_sizes(own).items()
            }
        structure = Structure.of(like_params(own, self.opt))
        if not structure.names:
            return {}
        core = to_core(own, self.opt, structure)
        values = map_leaves(self.opt.sigma_map.value, core.beta)
        sizes = self.opt.plan_of(core).blocks.expand(values)
        lrs = multipliers(lr, sizes)
        return {name: size * jnp.asarray(lrs[name], size.dtype) for name, size in sizes.items()}

    def hyperparameters(self, state: Any) -> dict[str, dict[str, Any]]:
        """Return the numbers of rules that are learned, by name and block.

        As `metaopt.MetaOptimize.hyperparameters` does.
        """
        own = _own(state)
        structure = Structure.of(like_params(own, self.opt))
        return (
            self.opt.hyperparameters(to_core(own, self.opt, structure)) if structure.names else {}
        )

    def diagnostics(self, state: Any, params: Any) -> dict[str, Any]:
        """Return how the adaptation is doing, as `metaopt.MetaOptimize.diagnostics` does.

        `params` are the parameters as they are now.
        """
        params = unboxed(params)
        named = self.named(params)
        return self.opt.diagnostics(self.core_state(state, params), named) if named else {}

    def averaged_params(self, state: Any, params: Any) -> Any:
        """Return weights averaged over the latest steps, better to evaluate than the last ones.

        As `metaopt.MetaOptimize.averaged_params`. Training goes on from `params`. Within `jax.jit`
        it takes no more memory than what it returns.

        Parameters
        ----------
        state : pytree
            This transformation's, or that of a wrapper around it.
        params : pytree
            The parameters after the updates have been applied, all of them: those that
            `optax.masked` or `optax.partition` have kept from this transformation are returned as
            they are, and so are those that have made no step.

        Returns
        -------
        params : pytree like `params`, in its dtypes

        Raises
        ------
        ValueError
            If there is no `discount` below 1, or with curvature or another `sigma` than "exp"; if
            `params` are not those of the state.

        Examples
        --------
        >>> import jax.numpy as jnp, optax, metaopt as mo
        >>> tx = metaoptimize(base=mo.SGD(), meta=mo.SGD(), step_size=0.5, discount=(0.5, 1.0))
        >>> params = {"w": jnp.array([1.0])}
        >>> state = tx.init(params)
        >>> for grad in (1.0, -1.0):
        ...     updates, state = tx.update({"w": jnp.array([grad])}, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params["w"].tolist(), tx.averaged_params(state, params)["w"].tolist()
        ([1.0], [0.75])
        """
        params = unboxed(params)
        structure = Structure.of(params)
        leaves = structure.leaves(params, "params")
        kept = structure.leaves(like_params(_own(state), self.opt), "state")
        others = {name for name, part in kept.items() if isinstance(part, optax.MaskedNode)}
        if len(others) == len(leaves):
            return params
        ours = structure.pytree(
            {name: optax.MaskedNode() if name in others else leaf for name, leaf in leaves.items()}
        )
        found = self.opt.averaged_params(self.core_state(state, ours), self.named(ours))
        return structure.pytree({**leaves, **found})

    def project(self, function: Callable[[Any], Any], params: Any, state: Any) -> tuple[Any, Any]:
        """Return projected parameters, and the state whose traces went through the projection.

        For weights that are held somewhere after a step: clipped to a box, within a norm, pruned
        (docs/mathematics.md section 10). Where they are projected by hand, the way to the bound
        that holds a weight stays in the trace, and step sizes may then rise without end.

        Parameters
        ----------
        function : callable
            From a pytree like `params`, of float32 or wider leaves, to the projected one, by
            `jax.jvp`.
        params : pytree
            The parameters after the updates have been applied.
        state : pytree
            This transformation's, or that of a wrapper around it.

        Returns
        -------
        params : pytree like `params`, in its dtypes
        state : pytree like `state`

        Raises
        ------
        ValueError, TypeError
            If `function` returns something else, or with `approximation="full"`.

        Examples
        --------
        >>> import jax.numpy as jnp, metaopt as mo
        >>> tx = metaoptimize(base=mo.SGD(), meta=mo.SGD())
        >>> params = {"w": jnp.array([0.5, -1.0])}
        >>> positive = lambda params: jax.tree.map(lambda w: jnp.maximum(w, 0.0), params)
        >>> params, state = tx.project(positive, params, tx.init(params))
        >>> params["w"].tolist()
        [0.5, 0.0]
        """
        structure = Structure.of(params)
        if not structure.names:
            return function(params), state

        def jvp(weights: Any, tangents: Any) -> tuple[Any, Any]:
            pair = (structure.pytree(weights),), (structure.pytree(tangents),)
            new, along = jax.jvp(function, *pair)
            return structure.leaves(new, "function(...)"), structure.leaves(along, "function(...)")

        own = _own(state)
        new_params, new = self.opt.project(
            _arrays(structure, params, "params"), self.core_state(state, params), jvp
        )
        traces = each_horizon(self.opt, structure.pytree, {**new.trace, **new.average})
        kept = own._replace(trace_or_average=traces, learned=learned_from_core(new, structure))
        return structure.pytree(new_params), jax.tree.map(
            lambda node: kept if _ours(node) else node, state, is_leaf=_ours
        )

    def core_state(self, state: Any, params: Any) -> mo.State:
        """Return the state, of at least one parameter, as the core has it: by names of leaves.

        Of `params` only names, shapes and dtypes are looked at.
        """
        params = unboxed(params)
        structure = Structure.of(params)
        plan = self.opt.plan(_arrays(structure, params, "params"))
        return to_core(_own(state), self.opt, structure, plan.averaged)

    def from_core_state(self, state: mo.State, params: Any) -> MetaOptimizeState:
        """Return a state of the core, of these parameters, as this transformation's."""
        structure = Structure.of(params)
        plan = self.opt.plan(_arrays(structure, params, "params"))
        return from_core(state, self.opt, structure, plan)

    def named(self, params: Any) -> dict[str, Any]:
        """Return the leaves of `params` by name, as `metaopt.load` takes them."""
        return dict(_arrays(Structure.of(params), params, "params"))


def _ours(node: Any) -> bool:
    return isinstance(node, MetaOptimizeState)


def _states(state: Any) -> list[MetaOptimizeState]:
    return [node for node in jax.tree.leaves(state, is_leaf=_ours) if _ours(node)]


def holds_state(state: Any) -> bool:
    """Say whether the state of a transformation has one of MetaOptimize within it."""
    return bool(_states(state))


def _own(state: Any) -> MetaOptimizeState:
    """Return the one state of MetaOptimize within `state`."""
    found = _states(state)
    if len(found) != 1:
        msg = (
            f"`state` must hold one state of MetaOptimize; found {len(found)}. Of several, "
            "pass the part that belongs to this transformation."
        )
        raise ValueError(msg)
    return unboxed(found[0])


def metaoptimize(
    *,
    base: RuleLike = BASE,
    meta: RuleLike = META,
    step_size: Any = STEP_SIZE,
    meta_lr: Any = META_LR,
    discount: Any = None,
    blocks: str | Mapping[str, Any] | mo.blocks.Partition = "scalar",
    sigma: Any = "exp",
    bounds: Any = None,
    approximation: str = "l",
    curvature: Any = "none",
    held_out: bool = False,
    meta_first: bool = False,
    skip_nonfinite: bool = False,
    lr: Any = 1.0,
    axis_name: str | tuple[str, ...] | None = None,
) -> MetaOptimizeTransformation:
    """Return MetaOptimize as an optax gradient transformation.

    `update` returns steps to add to the parameters, in their dtypes; its third argument, `params`,
    is needed. Leaves are named by their key paths, joined by "." ("layers.0.kernel"): what patterns
    match and `step_sizes` is keyed by. None is no leaf. docs/mathematics.md sections 2 to 11.

    It takes gradients, clipped or averaged perhaps, and not the updates of another optimizer: in
    `chain(optax.adamw(1e-3), metaoptimize(...))` steps go uphill, to NaN. The optimizer whose step
    size is to be learned is `base`, one of your own by docs/your_own_rule.md.

    Parameters
    ----------
    base, meta, step_size, discount, blocks, sigma, bounds, approximation, curvature, \
    held_out, meta_first, skip_nonfinite
        As `metaopt.MetaOptimize` takes them.
    meta_lr : float, array of shape () or schedule, default 1e-2
        As `metaopt.MetaOptimize` takes it; of a schedule, a function of the number of updates
        made, `opt` holds the first value.
    lr : float, array of shape (), schedule, or mapping of leaf name to these, default 1.0
        Multiplies the learned step sizes: schedules, warm-up. A schedule is a function of the
        number of updates made, and may return a mapping, too.
    axis_name : str or tuple of str, optional
        Within `jax.shard_map`, the mesh axes over which parameters are sharded. Not needed with
        `jax.jit`, whatever the shardings.

    Returns
    -------
    MetaOptimizeTransformation
        Its `update` takes, beside what optax knows, by keyword:

        value_fn : callable
            From params to the loss of this very step. With it, curvature "exact" takes
            Hessian-vector products forward over reverse, and approximation "full" third
            derivatives.
        hvp, third : callable
            In place of `value_fn`: from one tangent like `params` to the Hessian times it, from two
            to the third derivative along both. Both are called under `jax.vmap`.
        hessian_diagonal : pytree like `params`
            For curvature "diagonal".
        unit_steps : pytree like `params`
            For base `metaopt.Opaque`; `wrap` hands over those of another transformation.
        meta_grads : pytree like `params`
            For `held_out`: gradients of a held-out loss, with which the step sizes learn; of a leaf
            that is None there are none. Without it, and where all of it is 0, they rest.

        A gradient of None leaves the parameter and all its state as they are.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described, or two do not go together.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax, metaopt as mo
    >>> params = {"w": jnp.array([3.0, -2.0])}
    >>> tx = metaoptimize(base=mo.AdamW(), meta=mo.AdamW(), step_size=1e-3, meta_lr=0.1)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...     grads = params  # of half the squared norm
    ...     updates, state = tx.update(grads, state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> for _ in range(200):
    ...     params, state = step(params, state)
    >>> bool(abs(params["w"]).max() < 1e-2)
    True
    """
    check_discount(discount)
    opt = mo.MetaOptimize(
        base=base,
        meta=meta,
        step_size=step_size,
        meta_lr=_at(meta_lr, 0),
        discount=discount,
        blocks=blocks,
        sigma=sigma,
        bounds=bounds,
        approximation=approximation,
        curvature=curvature,
        held_out=held_out,
        meta_first=meta_first,
        skip_nonfinite=skip_nonfinite,
    )
    schedule = meta_lr if callable(meta_lr) else None
    return from_config(opt, lr=lr, meta_lr=schedule, axis_name=axis_name)


def from_config(
    config: mo.MetaOptimize,
    *,
    lr: Any = 1.0,
    meta_lr: Callable[[Any], Any] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> MetaOptimizeTransformation:
    """Return a transformation with a configuration of the core, such as one of `metaopt.presets`.

    Parameters
    ----------
    config : metaopt.MetaOptimize
    lr, axis_name
        As `metaoptimize` takes them.
    meta_lr : schedule, optional
        In place of the number that `config` has.

    Raises
    ------
    ValueError
        If a number in `lr` is negative or not finite, or `axis_name` is given and every weight has
        a step size of its own; or if `opt` has `recover`.
    """
    opt = config
    check_config(config)
    if meta_lr is not None and not callable(meta_lr):
        msg = f"`meta_lr` must be a schedule here, as `config` has the number; got {meta_lr!r}."
        raise TypeError(msg)
    if opt.recover:
        msg = (
            "`recover` does not go with optax, where updates are added: what is added to weights "
            "of 1e90 cannot bring them back to 1. Use `metaopt.MetaOptimize.step`."
        )
        raise ValueError(msg)
    _check_multiplier(lr)
    if axis_name is not None and mo.blocks.partition(opt.blocks).per_leaf:
        msg = '`axis_name` does not go with `blocks="weight"`; use jax.jit with shardings.'
        raise ValueError(msg)

    def init(params: Any) -> MetaOptimizeState:
        structure = Structure.of(params)
        if not structure.names:
            return without_leaves(opt, structure)
        leaves = _arrays(structure, params, "params")
        return from_core(opt.init(leaves), opt, structure, opt.plan(leaves))

    def update(
        updates: Any,
        state: MetaOptimizeState,
        params: Any = None,
        *,
        value_fn: Callable[[Any], Any] | None = None,
        hvp: Callable[[Any], Any] | None = None,
        third: Callable[[Any, Any], Any] | None = None,
        hessian_diagonal: Any = None,
        unit_steps: Any = None,
        meta_grads: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, MetaOptimizeState]:
        del extra_args  # those of other transformations
        if not isinstance(state, MetaOptimizeState):
            msg = f"`state` must be what `init` returned; got {type(state).__name__}."
            raise TypeError(msg)
        if params is None:
            msg = "`params` must be passed to `update`, as its third argument; got None."
            raise ValueError(msg)
        structure = Structure.of(params)
        if not structure.names:
            return updates, state._replace(count=state.count + 1)
        leaves = _arrays(structure, params, "params")
        plan = opt.plan(leaves)
        reduce, copies = sums_over(axis_name, leaves, plan)
        given = derivatives(plan, structure, structure.pytree(leaves), value_fn, hvp, third)
        options = {
            "lr": _at(lr, state.count),
            "hessian_diagonal": hessian_diagonal if plan.curvature == "diagonal" else None,
            "unit_steps": unit_steps,
            "meta_grads": meta_grads,
            "traced": {
                name: getattr(opt, name)
                for name in ("meta_lr", "discount")
                if not isinstance(getattr(opt, name), float)
            }
            | ({} if meta_lr is None else {"meta_lr": meta_lr(state.count)}),
        }

        def step(grads: Any, state: MetaOptimizeState, params: Any, options: Any) -> Any:
            leaves = _arrays(structure, params, "params")
            diagonal, traced = options["hessian_diagonal"], options["traced"]
            units, judges = options["unit_steps"], options["meta_grads"]
            deltas, new = (replace(opt, **traced) if traced else opt).update(
                leaves,
                _arrays(structure, grads, "updates"),
                to_core(state, opt, structure, plan.averaged),
                lr=options["lr"],
                hessian_diagonal=None
                if diagonal is None
                else _arrays(structure, diagonal, "hessian_diagonal"),
                unit_steps=None if units is None else _arrays(structure, units, "unit_steps"),
                meta_grads=None if judges is None else _arrays(structure, judges, "meta_grads"),
                reduce=reduce,
                copies=copies,
                **given,
            )
            steps = {
                name: jnp.zeros_like(leaf)
                if deltas[name] is None
                else cast(-deltas[name], leaf.dtype)
                for name, leaf in leaves.items()
            }
            return structure.pytree(steps), from_core(new, opt, structure, plan)

        if plan.curvature == "none" and helps(leaves.values()):
            run = partial(step, options=options)
            # of several discounts and hundreds of leaves XLA takes longer still on vectors
            return in_order(run, updates, state, params, vectors=not opt.horizons)
        if in_types(leaves.values()):
            return by_compiler(step, updates, state, params, options)
        return step(updates, state, params, options)

    found = MetaOptimizeTransformation(init, update)
    found.opt, found.lr = opt, lr
    return found


def check_discount(discount: Any) -> None:
    """Raise where a discount is an array so narrow that 0.999 is 1."""
    for each in discount if isinstance(discount, tuple | list) else (discount,):
        floating = hasattr(each, "dtype") and jnp.issubdtype(each.dtype, jnp.floating)
        if floating and jnp.finfo(each.dtype).bits < 32:
            msg = (
                f"`discount` must be float32 or wider; got {each.dtype}, in which 0.999 is 1. "
                "inject_hyperparams takes the parameters' dtype unless told otherwise: pass it "
                "hyperparam_dtype=jnp.float32."
            )
            raise TypeError(msg)


def _check_multiplier(lr: Any) -> None:
    """Raise where a multiplier is neither a schedule nor what the core takes."""
    if isinstance(lr, Mapping):
        numbers = per_leaf((name, value) for name, value in lr.items() if not callable(value))
        multipliers(numbers, numbers)
    elif not callable(lr):
        multipliers(lr, per_leaf(()))
    advice = taken_for_step_size(lr.values() if isinstance(lr, Mapping) else (lr,))
    if advice is not None:
        warn(advice)


def _at(lr: Any, count: Any) -> Any:
    """Return a multiplier, or those by leaf name, after so many updates."""
    if isinstance(lr, Mapping):
        return {name: _at(value, count) for name, value in lr.items()}
    return lr(count) if callable(lr) else lr


def _arrays(structure: Structure, tree: Any, what: str) -> Leaves[Any]:
    """Return the leaves of a pytree by name as JAX arrays; None stays None.

    One of shape and dtype alone is as good as an array for `init`, which looks at no more.

    Raises
    ------
    TypeError
        If a leaf is an array of NumPy that JAX does not take.
    """

    def array(name: str, leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        if isinstance(leaf, np.ndarray):
            namespace_of(f"{what}[{name!r}]", leaf)
            if not leaf.dtype.isnative:
                msg = f"`{what}[{name!r}]` must be in native byte order; got dtype {leaf.dtype}."
                raise TypeError(msg)
        return leaf if leaf is None else jnp.asarray(leaf)

    return per_leaf(
        (name, array(name, leaf)) for name, leaf in structure.leaves(tree, what).items()
    )
