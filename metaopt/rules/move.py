"""The step along a direction, shared by all rules and both roles."""

from typing import Any, NamedTuple

from metaopt.arrays import Array, namespace

__all__ = ["Move", "hat", "move"]


class Move(NamedTuple):
    """What a step takes from a parameter, and how the stepped parameter depends on the past."""

    delta: Any
    trace: Any


def move(
    param: Array,
    direction: Array,
    lr: Any,
    weight_decay: float,
    *,
    trace: Any = None,
    direction_trace: Any = None,
    lr_trace: Any = None,
    followed: Any = None,
    retain: Any = None,
    discount: Any = 1.0,
    keep: Any = None,
) -> Move:
    r"""Return the step of w' = w - lr (u + weight_decay w) and the first-order part of w'.

    docs/mathematics.md sections 3 and 5:

    .. math::
        \delta &= \alpha (u + \kappa w) \\
        h' &= (1 - \kappa \alpha)\, \hat h - \alpha\, \dot u - \dot\alpha\, (u + \kappa w)

    Written by hand rather than with jets, so that what the value and the trace have in common is
    computed once: without curvature and with :math:`\dot\alpha = \alpha` the trace takes two
    operations on top of the step.

    Parameters
    ----------
    param, direction : arrays of one shape and dtype
    lr : array broadcastable to `param`, or float
    weight_decay : float
    trace : array or None
        Derivative of `param`, of its shape or with a leading axis. None is zero.
    direction_trace : array or None
        Derivative of `direction`. None is zero.
    lr_trace : array or None
        Derivative of `lr`. None is zero; `lr` itself shares the product with the step.
    followed : array or None
        What stands in place of (u + weight_decay w) in the last term, section 10 ("gradient").
    retain : array or None
        What stands in place of (1 - weight_decay lr), section 12 (the rectifier).
    discount, keep
        Applied to `trace` first, see `hat`.

    Returns
    -------
    Move
        `delta`, with w' = w - delta, and `trace`, None where nothing contributes to it.
    """
    step = direction if weight_decay == 0.0 else direction + weight_decay * param
    delta = lr * step

    new = None
    if trace is not None:
        if retain is None:
            retain = 1.0 if weight_decay == 0.0 else 1.0 - weight_decay * lr
        new = hat(trace, discount * retain, keep)
    if direction_trace is not None:
        change = lr * direction_trace
        new = -change if new is None else new - change
    if lr_trace is not None:
        if followed is None:
            injected = delta if lr_trace is lr else lr_trace * step
        else:
            injected = lr_trace * followed
        new = -injected if new is None else new - injected
    return Move(delta, new)


def hat(trace: Any, factor: Any, keep: Any) -> Any:
    """Return `factor` times `trace` where `keep`, and 0 elsewhere; None where all is zero.

    Sections 3 and 11: the discount on a trace, and its restart after a meta-gradient that is not
    finite. A selection and not a product, for what is not kept may hold NaN.

    Parameters
    ----------
    trace : array or None
    factor : float or array broadcastable to `trace`
    keep : boolean array broadcastable to `trace`, or None for everywhere
    """
    if trace is None or (isinstance(factor, float) and factor == 0.0):
        return None
    if not (isinstance(factor, float) and factor == 1.0):
        trace = factor * trace
    if keep is None:
        return trace
    xp = namespace(trace)
    return xp.where(keep, trace, xp.astype(xp.zeros_like(keep), trace.dtype))
