"""The leaf program: from a leaf's row and its gradient to its next row.

docs/mathematics.md sections 3, 5 and 10. The parameter and slots of a row are jets: values, and how
they follow the step sizes. `advance` is the whole of a leaf's step. Without curvature
`fused` is that and the trace that the meta-gradient is made of in one pass over the leaf, and
`one_pass` is that with all that it needs of the state.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from metaopt.arrays import cast, full, namespace
from metaopt.jets import Jet, lift, scaled, total
from metaopt.rules.learned import bound
from metaopt.rules.rule import Rule, decay_step_size, direction_of, is_opaque

__all__ = [
    "Leaf",
    "advance",
    "discount_where",
    "discounted",
    "follow",
    "fused",
    "has_average",
    "one_pass",
    "taken",
    "usable",
    "with_lr",
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
    unit_step: Any = None,
) -> tuple[Any, Leaf]:
    r"""Return what a step takes from the weights, and the next row.

    docs/mathematics.md sections 3, 5 and 10:

    .. math::
        \delta &= \alpha (u + \kappa w) \\
        h' &= (1 - \kappa \alpha)\, \hat h - \alpha\, \dot u - \dot\alpha\, (u + \kappa w)

    Where weight decay has a step size of its own, that stands beside :math:`\kappa` in place of
    :math:`\alpha`, and :math:`\kappa w` is in nothing that :math:`\dot\alpha` multiplies.

    The first order is written by hand, so that what step and trace have in common is computed once:
    without curvature and with :math:`\dot\alpha = \alpha` the trace takes two operations on top of
    the step. The second order, which few need, is left to jets.

    Parameters
    ----------
    rule : Rule
        As `with_lr` returns it.
    leaf : Leaf
    grad : Jet
        With curvature its derivative is the Hessian times the discounted trace, and the row is
        `discounted` before.
    alpha : Jet of arrays broadcastable to the leaf
        Step size taken. Let its derivative be the very object of its value where they are equal.
        Where the row keeps an average they are, and the derivative is not looked at.
    discount : float or array, shape (), or tuple of them, default 1.0
        Discount of the trace; of several, each is of one entry of the trace's leading axis.
    mask : boolean array broadcastable to the trace, or to its entries, optional
        Where False, the trace restarts (section 11).
    rectified : array like the leaf, optional
        Diagonal of the Hessian, capped as in IDBD (section 12); for SGD without momentum.
    unit_step : array like the weights, optional
        Of a rule that is `metaopt.Opaque`, :math:`u + \kappa w`. Without it the weights are moved
        by others, and the row has to keep an average.

    Returns
    -------
    delta : array like the weights, or None
        :math:`w - w'`, before it is rounded to the dtype of the parameter; None where it is not
        known.
    leaf : Leaf
        Its weights are those of before where `delta` is None.
    """
    param = leaf.param
    kappa, apart = _decay(rule)
    lost = apart if kappa is None else kappa * alpha.value
    if is_opaque(rule):
        direction, slots, step = Jet(unit_step), dict(leaf.slots), unit_step
    else:
        direction, slots = _direction(rule, leaf, grad)
        step = direction.value if kappa is None else direction.value + kappa * param.value
    moved = delta = None if step is None else alpha.value * step
    if apart is not None:
        delta = moved + apart * param.value
    value, count = param.value if delta is None else param.value - delta, leaf.count + 1
    if leaf.average is not None:

        def next_average(discount: Any, average: Any, trace: Any) -> Any:
            share = _share(discount, None if kappa is None else lost)
            average = average if share is None else average + share * trace
            average = masked(mask, average, param.value)
            return average if apart is None else average - apart * average

        average = _by_entry(next_average, discount, leaf.average, param.first)
        return delta, Leaf(Jet(value), slots, count, average)
    retain = 1.0 if lost is None else 1.0 - lost
    if rectified is not None:
        retain = namespace(step).clip(retain - alpha.value * rectified, min=0.0)
    change = moved if alpha.first is alpha.value else scaled(alpha.first, step)
    change = total(change, scaled(direction.first, alpha.value))

    def next_trace(discount: Any, trace: Any) -> Any:
        factor = discount * retain
        if trace is None or (isinstance(discount, float) and discount == 0.0):
            return scaled(change, -1.0)
        trace = _times(trace, factor, mask)
        return trace if change is None else trace - change

    first = _by_entry(next_trace, discount, param.first)
    second = param.second
    if second is not None:
        whole = direction if kappa is None else direction + kappa * param
        kept = second if apart is None else second - apart * second
        second = kept - (alpha * whole).second
    return delta, Leaf(Jet(value, first, second, param.order), slots, count)


def follow(rule: Rule, leaf: Leaf, grad: Jet[Any], alpha: Any, *, in_direction: bool) -> Leaf:
    r"""Return the traces of a number of the rule that is learned, after a step.

    docs/mathematics.md section 15:

    .. math::
        x' = (1 - \kappa \alpha)\, \hat x - \alpha\, (\dot u + \dot\kappa w)

    Where weight decay has a step size of its own, that stands beside both :math:`\kappa`, in place
    of :math:`\alpha`.

    Parameters
    ----------
    rule : Rule
        As `with_lr` returns it. The number stands in it as a jet, with its derivative along what is
        learned; if it is `in_direction` all others that are learned are jets, too.
    leaf : Leaf
        Its traces are those of the number, `discounted`.
    grad : Jet
        With curvature its derivative is the Hessian times the discounted trace.
    alpha : array broadcastable to the leaf
        Step size taken.
    in_direction : bool
        Whether a change of the number, or of weights by it, reaches the direction.
    """
    param, decay, size = leaf.param, lift(rule.weight_decay), decay_step_size(rule)
    size = alpha if size is None else size
    unit, slots = None, dict(leaf.slots)
    if in_direction:
        direction, slots = _direction(rule, leaf, grad, jets=True)
        unit = direction.first
    retain = 1.0 - decay.value * size
    change = total(scaled(unit, alpha), scaled(scaled(decay.first, param.value), size))
    trace = total(scaled(param.first, retain), scaled(change, -1.0))
    return leaf._replace(param=Jet(param.value, trace), slots=slots)


def _decay(rule: Rule) -> tuple[Any, Any]:
    r"""Return the two kinds of weight decay, of which a rule has one, or None for either.

    First :math:`\kappa`, which alpha multiplies; else the share of the weights that a step takes.
    """
    kappa, size = lift(rule.weight_decay).value, decay_step_size(rule)
    if isinstance(kappa, int | float) and kappa == 0.0:
        return None, None
    return (kappa, None) if size is None else (None, kappa * size)


def _by_entry(function: Callable[..., Any], discount: Any, *arrays: Any) -> Any:
    """Return a function of a discount and arrays; of several, of entries of the arrays' first axis.

    Entry by entry, as compilers then see that stacking and taking apart cancel.
    """
    if not isinstance(discount, tuple):
        return function(discount, *arrays)
    entries = [
        function(each, *(array[index, ...] for array in arrays))
        for index, each in enumerate(discount)
    ]
    return namespace(entries[0]).stack(entries)


def _direction(
    rule: Rule, leaf: Leaf, grad: Jet[Any], *, jets: bool = False
) -> tuple[Jet[Any], dict[str, Jet[Any]]]:
    """Return the direction and the next slots; the rule sees jets only where these are needed."""
    count = cast(leaf.count + 1, leaf.param.value.dtype)
    if not jets and grad.first is None and all(slot.first is None for slot in leaf.slots.values()):
        values = {slot: jet.value for slot, jet in leaf.slots.items()}
        unit, moved = direction_of(rule, grad.value, values, count, leaf.param.value)
        return Jet(unit), {slot: Jet(moved[slot]) for slot in leaf.slots}
    order = leaf.param.order
    # Hessian-free the direction does not depend on the weights
    param = Jet(leaf.param.value, order=order) if grad.first is None else leaf.param
    unit, moved = direction_of(rule, grad, leaf.slots, Jet(count, order=order), param)
    return unit, {slot: moved[slot] for slot in leaf.slots}


def _share(discount: Any, lost: Any) -> Any:
    r"""Return which share of the trace the average of the weights makes up for; None for nothing.

    docs/mathematics.md section 10: what `advance` does to :math:`h = w - a`, where
    :math:`\dot\alpha = \alpha` and nothing else depends on the past, is
    :math:`a' = a + (1 - \gamma (1 - \kappa \alpha))\, h`. The step itself has no part in it. `lost`
    is :math:`\kappa \alpha`; None without decay, and where that has a step size of its own.
    """
    share = 1.0 - discount
    if lost is not None:
        share = share + discount * lost
    return None if isinstance(share, float) and share == 0.0 else share


def fused(
    rule: Rule, leaf: Leaf, grad: Any, alpha: Jet[Any], *, mask: Any, discount: Any = 1.0
) -> tuple[Any, Any, Leaf]:
    """Return the trace h from before the step and what `advance` returns, in one pass; section 11.

    Without curvature alone. With h * g the meta-gradient is made, which is not known when the next
    trace is written; so a trace restarts in the step after, from 0 (an adapter's own state knows
    the last meta-gradient).

    Parameters
    ----------
    rule, leaf
        As in `advance`; where the row has an average, the trace is taken from it here.
    grad : array like the weights, compute dtype
    alpha
        As in `advance`.
    mask : boolean array broadcastable to the leaf, or None for everywhere
        Which traces go on, after the meta-gradient of the step before.
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
    return leaf.param.first, *advance(rule, leaf, Jet(grad), alpha, discount=discount)


def one_pass(
    rule: Rule,
    leaf: Leaf,
    grad: Any,
    size: Jet[Any],
    *,
    lr: Any,
    mask: Any,
    discount: Any,
) -> tuple[Any, Any, Leaf]:
    """Return the products h * g and what `advance` returns, from the present state alone.

    The whole of a leaf's step without curvature, sections 7, 10 and 11, for a kernel that is
    generated from it (`metaopt.tracer`). With `metaopt.meta.meta_step` it makes a step. Of several
    discounts it takes all traces at once, or, called for each by itself, one: what the weights and
    slots come to is the same.

    Parameters
    ----------
    rule, leaf
        As in `fused`.
    grad : array like the weights, of any floating dtype
    size : Jet of arrays broadcastable to the leaf, floating
        The leaf's learned step sizes and their derivatives, before the multiplier.
    lr : array, shape (), compute dtype
        The multiplier; where it is 0 the leaf rests, and its product is 0.
    mask : boolean array broadcastable to the leaf
        Which traces go on: `metaopt.meta.carried` of the meta-gradient of the step before.
    discount : array, shape (), compute dtype
        Discount of the trace; of several, broadcastable to their traces.
    """
    dtype, active = leaf.param.value.dtype, lr != 0.0
    grad = cast(grad, dtype)
    trace, delta, leaf = fused(
        with_lr(rule, lr),
        leaf,
        grad,
        taken(size, lr, dtype),
        mask=mask,
        discount=discount_where(active, discount, dtype),
    )
    return namespace(trace).where(active, trace * grad, 0.0), delta, leaf


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


def with_lr(rule: Rule, lr: Any) -> Rule:
    """Return a rule whose weight decay takes the multiplier, too; itself where alpha brings it.

    Parameters
    ----------
    rule : Rule
    lr : float or array, shape (), compute dtype
        The multiplier.
    """
    size = decay_step_size(rule)
    changed: Rule = rule if size is None else bound(rule, {"decay_step_size": lr * size})
    return changed


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
        discount = full(active, (), discount, dtype)
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
