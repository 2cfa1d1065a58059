"""The leaf program: from a leaf's row and its gradient to its next row.

docs/mathematics.md sections 3, 5 and 10. The parameter and slots of a row are jets: values, and how
they follow the step sizes. `advance` is the whole of a leaf's step. Without curvature
`fused` is that and the products for the meta-gradient in one pass over the leaf, and `one_pass` is
`fused` with all that it needs of the state.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from metaopt.arrays import cast, filled, namespace
from metaopt.jets import Jet, scaled, total
from metaopt.rules.rule import Rule, direction_of

__all__ = [
    "Leaf",
    "advance",
    "discount_where",
    "fused",
    "has_average",
    "one_pass",
    "taken",
    "usable",
]


class Leaf(NamedTuple):
    """A row of the leaf table: one leaf before or after a step, in its compute dtype.

    Parameters
    ----------
    param : Jet
        The weights; their trace h, of their shape or with a leading axis of columns; and where the
        approximation is full its own derivative, with two. Where an average is kept, the trace is
        the distance to it, and None after a step.
    slots : mapping of slot to Jet
        Arrays like the weights, or of the shapes that the rule gives them, and the traces of those
        that feed back.
    count : array, shape (), int32
        Steps made.
    average : array like the weights, optional
        Average of the weights, kept in place of the trace (section 10).
    """

    param: Jet[Any]
    slots: Mapping[str, Jet[Any]]
    count: Any
    average: Any = None

    @classmethod
    def of(
        cls,
        param: Any,
        slots: Mapping[str, Any],
        count: Any,
        *,
        trace: Any = None,
        average: Any = None,
    ) -> "Leaf":
        """Return a row without curvature: of `trace` and `average`, one is kept."""
        dtype = (trace if average is None else average).dtype
        jets = {slot: Jet(value) for slot, value in slots.items()}
        return cls(Jet(cast(param, dtype), trace), jets, count, average)


def advance(
    rule: Rule,
    leaf: Leaf,
    grad: Jet[Any],
    alpha: Jet[Any],
    *,
    discount: Any = 1.0,
    mask: Any = None,
    rectified: Any = None,
) -> tuple[Any, Leaf]:
    r"""Return what a step takes from the weights, and the next row.

    docs/mathematics.md sections 3, 5 and 10:

    .. math::
        \delta &= \alpha (u + \kappa w) \\
        h' &= (1 - \kappa \alpha)\, \hat h - \alpha\, \dot u - \dot\alpha\, (u + \kappa w)

    The first order is written by hand, so that what step and trace have in common is computed once:
    without curvature and with :math:`\dot\alpha = \alpha` the trace takes two operations on top of
    the step. The second order, which few need, is left to jets.

    Parameters
    ----------
    rule : Rule
    leaf : Leaf
    grad : Jet
        With curvature its derivative is the Hessian times the discounted trace, and the row is
        `discounted` before.
    alpha : Jet of arrays broadcastable to the leaf
        Step size taken. Let its derivative be the very object of its value where they are equal.
        Where the row keeps an average they are, and the derivative is not looked at.
    discount : float or array, shape (), default 1.0
        Discount of the trace.
    mask : boolean array broadcastable to the trace, optional
        Where False, the trace restarts (section 11).
    rectified : array like the leaf, optional
        Diagonal of the Hessian, capped as in IDBD (section 12); for SGD without momentum.

    Returns
    -------
    delta : array like the weights
        :math:`w - w'`, before it is rounded to the dtype of the parameter.
    leaf : Leaf
    """
    param, decay = leaf.param, rule.weight_decay
    direction, slots = _direction(rule, leaf, grad)
    decays = not isinstance(decay, int | float) or decay != 0.0
    step = direction.value + decay * param.value if decays else direction.value
    delta = alpha.value * step
    value, count = param.value - delta, leaf.count + 1
    if leaf.average is not None:
        share = _share(alpha.value, decay if decays else 0.0, discount)
        average = leaf.average if share is None else leaf.average + share * param.first
        average = masked(mask, average, param.value)
        return delta, Leaf(Jet(value), slots, count, average)
    if rectified is not None:
        retain = namespace(step).clip(1.0 - alpha.value * (decay + rectified), min=0.0)
    else:
        retain = 1.0 - decay * alpha.value if decays else 1.0
    change = delta if alpha.first is alpha.value else scaled(alpha.first, step)
    change = total(change, scaled(direction.first, alpha.value))
    factor, first = discount * retain, param.first
    if first is None or (isinstance(factor, float) and factor == 0.0):
        first = scaled(change, -1.0)
    else:
        first = _times(first, factor, mask)
        first = first if change is None else first - change
    second = param.second
    if second is not None:
        second = second - (alpha * (direction + decay * param)).second
    return delta, Leaf(Jet(value, first, second, param.order), slots, count)


def _direction(rule: Rule, leaf: Leaf, grad: Jet[Any]) -> tuple[Jet[Any], dict[str, Jet[Any]]]:
    """Return the direction and the next slots; the rule sees jets only where these are needed."""
    count = cast(leaf.count + 1, leaf.param.value.dtype)
    if grad.first is None and all(slot.first is None for slot in leaf.slots.values()):
        values = {slot: jet.value for slot, jet in leaf.slots.items()}
        unit, moved = direction_of(rule, grad.value, values, count, leaf.param.value)
        return Jet(unit), {slot: Jet(moved[slot]) for slot in leaf.slots}
    order = leaf.param.order
    unit, moved = direction_of(rule, grad, leaf.slots, Jet(count, order=order), leaf.param)
    return unit, {slot: moved[slot] for slot in leaf.slots}


def _share(alpha: Any, decay: Any, discount: Any) -> Any:
    r"""Return which share of the trace the average of the weights makes up for; None for nothing.

    docs/mathematics.md section 10: what `advance` does to :math:`h = w - a`, where
    :math:`\dot\alpha = \alpha` and nothing else depends on the past, is
    :math:`a' = a + (1 - \gamma (1 - \kappa \alpha))\, h`. The step itself has no part in it.
    """
    share = 1.0 - discount
    if not isinstance(decay, int | float) or decay != 0.0:
        share = share + discount * (decay * alpha)
    return None if isinstance(share, float) and share == 0.0 else share


def fused(
    rule: Rule, leaf: Leaf, grad: Any, alpha: Jet[Any], *, mask: Any, discount: Any = 1.0
) -> tuple[Any, Any, Leaf]:
    """Return the products h * g and what `advance` returns, in one pass over the leaf; section 11.

    Without curvature alone. The meta-gradient is not known when the trace is written; so a trace
    restarts in the step after, from 0 (an adapter's own state knows the last meta-gradient).

    Parameters
    ----------
    rule, leaf
        As in `advance`; where the row has an average, the trace is taken from it here.
    grad : array like the weights, compute dtype
    alpha
        As in `advance`.
    mask : boolean array broadcastable to the leaf, or None for everywhere
        Where the meta-gradient of the step before was `usable`.
    discount
        As in `advance`.
    """
    param = leaf.param
    if leaf.average is None:
        leaf = leaf._replace(param=Jet(param.value, masked(mask, param.first, 0.0)))
    else:
        began = has_average(leaf.count)
        average = masked(began if mask is None else mask & began, leaf.average, param.value)
        leaf = leaf._replace(param=Jet(param.value, param.value - average), average=average)
    return leaf.param.first * grad, *advance(rule, leaf, Jet(grad), alpha, discount=discount)


def one_pass(
    rule: Rule,
    leaf: Leaf,
    grad: Any,
    size: Jet[Any],
    *,
    lr: Any,
    meta_grad: Any,
    discount: Any,
) -> tuple[Any, Any, Leaf]:
    """Return what `fused` returns, from the present state alone.

    The whole of a leaf's step without curvature, sections 7, 10 and 11, for a kernel that is
    generated from it (`metaopt.tracer`). With `metaopt.meta.meta_step` it makes a step.

    Parameters
    ----------
    rule, leaf
        As in `fused`.
    grad : array like the weights, of any floating dtype
    size : Jet of arrays broadcastable to the leaf, floating
        The leaf's learned step sizes and their derivatives, before the multiplier.
    lr : array, shape (), compute dtype
        The multiplier; where it is 0 the leaf rests, and its product is 0.
    meta_grad : array broadcastable to the leaf
        The meta-gradient of the step before.
    discount : array, shape (), compute dtype
        Discount of the trace.
    """
    dtype, active = leaf.param.value.dtype, lr != 0.0
    product, delta, leaf = fused(
        rule,
        leaf,
        cast(grad, dtype),
        taken(size, lr, dtype),
        mask=usable(meta_grad),
        discount=discount_where(active, discount, dtype),
    )
    return namespace(product).where(active, product, 0.0), delta, leaf


def taken(size: Jet[Any], lr: Any, dtype: Any) -> Jet[Any]:
    """Return the step size that is taken, `lr` times the learned one, with its derivatives.

    Parameters
    ----------
    size : Jet of arrays
        Learned step sizes, before the multiplier.
    lr : float or array, shape ()
        The multiplier; 1.0 leaves the very arrays, whose products are shared.
    dtype : dtype
        Compute dtype of the leaf.
    """

    def of(array: Any) -> Any:
        array = cast(array, dtype)
        return array if isinstance(lr, float) and lr == 1.0 else lr * array

    value = of(size.value)
    first = value if size.first is size.value else of(size.first)
    if size.second is None:
        return Jet(value, first)
    return Jet(value, first, of(size.second), order=2)


def discount_where(active: Any, discount: Any, dtype: Any) -> Any:
    """Return the discount of a leaf's traces: 1 where it is frozen (section 7).

    Parameters
    ----------
    active : bool or boolean array, shape ()
    discount : float or array, shape ()
    dtype : dtype
        Compute dtype of the leaf.
    """
    if active is False:
        return 1.0
    if active is True or (isinstance(discount, float) and discount == 1.0):
        return discount if isinstance(discount, float) else cast(discount, dtype)
    if isinstance(discount, float):
        discount = filled(active, (), discount, dtype)
    discount = cast(discount, dtype)
    return namespace(discount).where(active, discount, namespace(discount).ones_like(discount))


def discounted(leaf: Leaf, factor: Any, mask: Any) -> Leaf:
    """Return a row whose traces are discounted, and restarted outside the mask; sections 3 and 11.

    Parameters
    ----------
    leaf : Leaf
    factor : float or array, shape ()
    mask : boolean array broadcastable to the trace
        A pair of columns restarts with either of them.
    """

    def of(jet: Any) -> Any:
        first = None if jet.first is None else _times(jet.first, factor, mask)
        second = jet.second
        if second is not None:
            second = _times(_times(second, factor, mask), 1.0, mask[:, None, ...])
        return Jet(jet.value, first, second, jet.order)

    slots = {slot: of(jet) for slot, jet in leaf.slots.items()}
    return leaf._replace(param=of(leaf.param), slots=slots)


def _times(trace: Any, factor: Any, mask: Any) -> Any:
    """Return `factor` times `trace` inside the mask, and 0 elsewhere, where there may be NaN."""
    if isinstance(factor, float) and factor == 1.0:
        return masked(mask, trace, 0.0)
    # one expression, here and where the result is used: NumPy then computes in the temporary
    return masked(mask, trace, 0.0) * factor


def masked(mask: Any, value: Any, otherwise: Any) -> Any:
    """Return `value` inside the mask, None for everywhere, and `otherwise` outside."""
    if isinstance(mask, np.bool_):  # NumPy makes scalars of 0-d arrays
        mask = None if mask else np.asarray(mask)
    return value if mask is None else namespace(value).where(mask, value, otherwise)


def has_average(count: Any) -> Any:
    """Say whether the average of a leaf holds: from its first step on.

    Until then its trace is 0, whatever is done to the weights: most are loaded in that time.

    Parameters
    ----------
    count : array, shape (), int32
        Steps that the leaf has made.
    """
    return count > 0


def usable(z: Any) -> Any:
    """Say where a meta-gradient is finite, and its square as well (section 11).

    Parameters
    ----------
    z : array, values per block
    """
    xp = namespace(z)
    return xp.abs(z) < (2.0**511 if z.dtype == xp.float64 else 2.0**63)
