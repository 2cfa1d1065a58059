"""The step along a direction, shared by all rules and both roles."""

from typing import Any, NamedTuple

import numpy as np

from metaopt.arrays import Array, namespace
from metaopt.jets import crossed, scaled, total

__all__ = ["Move", "averaged", "chosen", "hat", "move", "move_second"]


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
    decays = not isinstance(weight_decay, int | float) or weight_decay != 0.0
    step = direction + weight_decay * param if decays else direction
    delta = lr * step

    if retain is None:
        retain = 1.0 - weight_decay * lr if decays else 1.0
    change = None
    if lr_trace is not None and followed is not None:
        change = lr_trace * followed
    elif lr_trace is not None:
        change = delta if lr_trace is lr else lr_trace * step
    if direction_trace is not None:
        turn = lr * direction_trace
        change = turn if change is None else change + turn
    factor = discount * retain
    if trace is None or (isinstance(factor, float) and factor == 0.0):
        return Move(delta, None if change is None else -change)
    if change is None:
        return Move(delta, hat(trace, factor, keep))
    return Move(delta, hat(trace, factor, keep) - change)


def move_second(
    param: Array,
    direction: Array,
    lr: Any,
    weight_decay: float,
    *,
    trace: Any,
    direction_trace: Any,
    lr_trace: Any,
    third_trace: Any,
    direction_second: Any,
    lr_second: Any,
) -> Any:
    r"""Return the second-order part of w' = w - lr (u + weight_decay w).

    docs/mathematics.md section 3, *Z*:

    .. math::
        Z_{jk}' = (1 - \kappa \alpha) \ddot w_{jk} - \alpha \ddot u_{jk}
            - \dot\alpha_k (\dot u_j + \kappa \hat h_j) - \dot\alpha_j (\dot u_k + \kappa \hat h_k)
            - (u + \kappa w) \ddot\alpha_{jk}

    Parameters
    ----------
    param, direction, lr, weight_decay
        As in `move`.
    trace, lr_trace : arrays with one leading axis
        First-order parts, discounted.
    direction_trace : array like these, or None
    third_trace, lr_second : arrays with two leading axes
        Second-order parts of `param` and `lr`.
    direction_second : array like these, or None
    """
    turn = total(direction_trace, scaled(trace, weight_decay))
    change = total(scaled(direction_second, lr), crossed(turn, lr_trace))
    change = total(change, lr_second * (direction + weight_decay * param))
    return (1.0 - weight_decay * lr) * third_trace - change


def averaged(average: Any, trace: Any, lr: Any, weight_decay: Any, discount: Any) -> Any:
    r"""Return the next average of the weights, of which the trace is their distance.

    docs/mathematics.md section 10. What `move` does to the trace :math:`h = w - a`, where
    :math:`\dot\alpha = \alpha` and nothing else depends on the past, is

    .. math:: a' = a + (1 - \gamma (1 - \kappa \alpha))\, h .

    The step itself has no part in it. At a discount of 1 without weight decay, a stays as it is.

    Parameters
    ----------
    average, trace : arrays of one shape and dtype
    lr : array broadcastable to them, or float
    weight_decay, discount : float or array, shape ()
    """
    share = 1.0 - discount
    if not isinstance(weight_decay, int | float) or weight_decay != 0.0:
        share = share + discount * (weight_decay * lr)
    if isinstance(share, float) and share == 0.0:
        return average
    return average + share * trace


def hat(trace: Any, factor: Any, keep: Any) -> Any:
    """Return `factor` times `trace` where `keep`, and 0 elsewhere.

    Sections 3 and 11: the discount on a trace, and its restart after a meta-gradient that is not
    finite. A selection and not a product, for what is not kept may hold NaN.

    Parameters
    ----------
    trace : array
    factor : float or array broadcastable to `trace`
    keep : boolean array broadcastable to `trace`, or None for everywhere
    """
    if isinstance(factor, float) and factor == 1.0:
        return chosen(keep, trace, 0.0)
    # one expression, here and where the result is used: NumPy then computes in the temporary
    return chosen(keep, trace, 0.0) * factor


def chosen(keep: Any, value: Any, otherwise: Any) -> Any:
    """Return `value` where `keep`, which may be None for everywhere, and `otherwise` elsewhere."""
    if isinstance(keep, np.bool_):  # a value at hand and no array: NumPy makes scalars of 0-d
        keep = None if keep else np.asarray(keep)
    return value if keep is None else namespace(value).where(keep, value, otherwise)
