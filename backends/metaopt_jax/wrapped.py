"""Any optax transformation, with step sizes that tune themselves."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import metaopt as mo
from metaopt.arrays import per_leaf
from metaopt.configuration import META, META_LR, STEP_SIZE, RuleLike
from metaopt.plan import rules_by_leaf
from metaopt_jax.leaves import Structure, unboxed
from metaopt_jax.state import MetaOptimizeState
from metaopt_jax.transform import (
    MetaOptimizeTransformation,
    check_discount,
    from_config,
    holds_state,
)

__all__ = ["WrappedState", "wrap"]


class WrappedState(NamedTuple):
    """What a wrapped transformation carries from update to update.

    Parameters
    ----------
    inner : pytree
        State of the transformation that is wrapped.
    meta : MetaOptimizeState
        That of its step sizes.
    """

    inner: Any
    meta: MetaOptimizeState


def wrap(
    tx: optax.GradientTransformation,
    *,
    meta: RuleLike = META,
    step_size: Any = STEP_SIZE,
    meta_lr: Any = META_LR,
    discount: Any = None,
    lr: Any = 1.0,
    weight_decay: float | Mapping[str, float] = 0.0,
    blocks: str | Mapping[str, Any] | mo.blocks.Partition = "scalar",
    sigma: Any = "exp",
    bounds: Any = None,
    held_out: bool = False,
    meta_first: bool = False,
    skip_nonfinite: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> MetaOptimizeTransformation:
    """Return a transformation whose step sizes tune themselves.

    docs/wrap.md; docs/mathematics.md section 10. Any will do whose updates are proportional to its
    learning rate, and whose state does not depend on that.

    Parameters
    ----------
    tx : optax.GradientTransformation
        What makes the updates, with a learning rate of 1: `optax.adamw(1.0)`, or a chain that ends
        in `optax.scale(-1.0)`. It is handed all that `update` is, keywords too,
        but for `meta_grads`.
    meta : Rule, or name of one
        The update of the step sizes.
    step_size, meta_lr, discount, lr, blocks, sigma, bounds, held_out, meta_first, \
    skip_nonfinite, axis_name
        As `metaoptimize` takes them.
    weight_decay : float, or mapping of pattern to float, default 0.0
        The decoupled weight decay that `tx` has, which cannot be seen from outside: of all leaves,
        or by patterns of their names, of which the first that matches counts. With 0 a decay is a
        part of the step like any other.

    Returns
    -------
    MetaOptimizeTransformation
        Its state is a `WrappedState`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described, or two do not go together.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, metaopt as mo, optax
    >>> params = {"w": jnp.array([[3.0, -2.0]]), "b": jnp.array([1.0])}
    >>> muon = optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.muon(1.0))
    >>> tx = wrap(muon, meta=mo.FastStart(mo.AdamW()), step_size=1e-4, meta_lr=1e-2)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...     updates, state = tx.update(params, state, params)  # of half the squared norm
    ...     return optax.apply_updates(params, updates), state
    >>> for _ in range(300):
    ...     params, state = step(params, state)
    >>> bool(abs(params["w"]).max() < 0.1)
    True
    """
    if not isinstance(tx, tuple) or not all(map(callable, tx)) or len(tx) != 2:
        msg = f"`tx` must be an optax.GradientTransformation, such as optax.adamw(1.0); got {tx!r}."
        raise TypeError(msg)
    if isinstance(tx, MetaOptimizeTransformation):
        msg = "`tx` must have a learning rate of 1; this one learns its step sizes already."
        raise ValueError(msg)
    check_discount(discount)
    opt = mo.MetaOptimize(
        base=_rules(weight_decay),
        meta=meta,
        step_size=step_size,
        meta_lr=meta_lr(0) if callable(meta_lr) else meta_lr,
        discount=discount,
        blocks=blocks,
        sigma=sigma,
        bounds=bounds,
        held_out=held_out,
        meta_first=meta_first,
        skip_nonfinite=skip_nonfinite,
    )
    inner = optax.with_extra_args_support(tx)
    schedule = meta_lr if callable(meta_lr) else None
    outer = from_config(opt, lr=lr, meta_lr=schedule, axis_name=axis_name)

    def init(params: Any) -> WrappedState:
        rules_by_leaf(opt.base, per_leaf(found.named(params).items()), "weight_decay")
        state = WrappedState(inner.init(unboxed(params)), outer.init(params))
        if holds_state(state.inner):
            msg = "`tx` must have a learning rate of 1; a part of it learns its step sizes already."
            raise ValueError(msg)
        return state

    def update(
        updates: Any,
        state: WrappedState,
        params: Any = None,
        *,
        meta_grads: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, WrappedState]:
        if not isinstance(state, WrappedState):
            msg = f"`state` must be what `init` returned; got {type(state).__name__}."
            raise TypeError(msg)
        try:
            steps, new_inner = inner.update(updates, state.inner, params, **extra_args)
        except (AttributeError, TypeError, ValueError) as error:
            grads = {} if params is None else Structure.of(params).leaves(updates, "updates")
            missing = next((name for name, grad in grads.items() if grad is None), None)
            if missing is None:
                raise
            msg = (
                f"`updates` must have a gradient of {missing!r}, as what is wrapped takes no None. "
                "Leave parameters out by `optax.partition` or `optax.masked`, within or around."
            )
            raise ValueError(msg) from error
        unit_steps = jax.tree.map(jnp.negative, steps)
        new_updates, new = outer.update(
            updates, state.meta, params, unit_steps=unit_steps, meta_grads=meta_grads
        )
        if skip_nonfinite:
            skipped = new.skipped != state.meta.skipped
            new_inner = jax.tree.map(
                lambda after, before: jnp.where(skipped, before, after), new_inner, state.inner
            )
        return new_updates, WrappedState(new_inner, new)

    found = MetaOptimizeTransformation(init, update)
    found.opt, found.lr = opt, lr
    return found


def _rules(weight_decay: float | Mapping[str, float]) -> mo.Opaque | dict[str, mo.Opaque]:
    """Return what the core takes for a transformation with this decoupled weight decay."""
    if not isinstance(weight_decay, Mapping):
        return mo.Opaque(weight_decay=weight_decay)
    if not weight_decay or not all(isinstance(pattern, str) for pattern in weight_decay):
        msg = (
            "`weight_decay` must be a number or a mapping of pattern, a string, to number; "
            f"got {dict(weight_decay)!r}."
        )
        raise TypeError(msg)
    return {pattern: mo.Opaque(weight_decay=decay) for pattern, decay in weight_decay.items()}
