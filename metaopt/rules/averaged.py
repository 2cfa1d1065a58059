"""An average of the weights whose window grows with the run."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from metaopt.arrays import ArrayT, cast
from metaopt.rules.learned import Number
from metaopt.rules.rule import (
    Rule,
    Slots,
    check_rule,
    decay_step_size,
    in_role,
    is_opaque,
    scope_of,
    settle,
    uses_param,
)

__all__ = ["MEAN", "Averaged"]

#: The average of the weights before each step so far.
MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Averaged:
    r"""A base update that keeps an average of its weights, for `averaged_params`.

    docs/mathematics.md section 10. The weights move as by `rule`. Averages that come with the
    traces are of the steps that the shortest discount remembers; this one is of the last part of
    the whole run, at the price of an array like the weights. It needs no discount below 1 and goes
    with any curvature and `sigma`. With :math:`w_t` the weights after :math:`t` steps, :math:`p`
    the power and :math:`\bar w_0 = w_0`:

    .. math::
        \bar w_t = \bar w_{t-1} + \frac{p + 1}{t + 1 + p}\, (w_t - \bar w_{t-1})

    Parameters
    ----------
    rule : Rule
        The base update.
    power : int, default 8
        The weights after step s count as s to this power, about: at least 0, for the mean of all.
        With 8, nine tenths of the average are of the last quarter of the run.

    Raises
    ------
    ValueError
        If `power` is negative, or `rule` has no formula or a slot "mean" already.
    TypeError
        If `power` is no whole number, or `rule` no rule.

    Examples
    --------
    >>> import metaopt as mo
    >>> opt = mo.MetaOptimize(base=mo.Averaged(mo.AdamW()))
    """

    rule: Rule
    power: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        check_rule("rule", self.rule)
        if is_opaque(self.rule):
            msg = f"`rule` must have a formula for its direction; got {self.rule!r}."
            raise ValueError(msg)
        if MEAN in self.rule.slots:
            msg = f"`rule` must have no slot {MEAN!r}, as an Averaged has; got {self.rule!r}."
            raise ValueError(msg)
        if not isinstance(self.power, int | np.integer) or isinstance(self.power, bool):
            msg = f"`power` must be a whole number; got {self.power!r}."
            raise TypeError(msg)
        if self.power < 0:
            msg = f"`power` must be at least 0; got {self.power}."
            raise ValueError(msg)
        settle(self, power=int(self.power))

    def __getattr__(self, name: str) -> Any:
        """Return what only some rules have: shapes of slots."""
        if name == "slot_shapes":
            return self.rule.slot_shapes  # type: ignore[attr-defined]
        msg = f"{type(self).__name__!r} has no attribute {name!r}."
        raise AttributeError(msg)

    @property
    def slots(self) -> tuple[str, ...]:
        """Those of `rule`, and the average."""
        return (*self.rule.slots, MEAN)

    @property
    def scope(self) -> str:
        """That of `rule`."""
        return scope_of(self.rule)

    @property
    def uses_param(self) -> bool:
        """Always: the average is of the weights."""
        return True

    @property
    def weight_decay(self) -> Number:
        """That of `rule`."""
        return self.rule.weight_decay

    @property
    def decay_step_size(self) -> Any:
        """That of `rule`."""
        return decay_step_size(self.rule)

    def direction(
        self, grad: ArrayT, slots: Slots[ArrayT], count: ArrayT, param: Any = None
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Return the direction of `rule` and the next slots.

        The average takes in the weights that the step before has made; `average` takes in the last.
        """
        own = {slot: slots[slot] for slot in self.rule.slots}
        more = (param,) if uses_param(self.rule) else ()
        direction, new = self.rule.direction(grad, own, count, *more)
        return direction, {**new, MEAN: self._mean(slots[MEAN], count, param)}

    def average(self, mean: Any, count: Any, param: Any) -> Any:
        """Return the average of all weights after `count` steps, the present ones among them.

        Parameters
        ----------
        mean, param : arrays of one shape, compute dtype
            The slot and the weights.
        count : array, shape (), int32
            At 0 the average is the weights.
        """
        return self._mean(mean, cast(count + 1, param.dtype), param)

    def _mean(self, mean: Any, count: Any, param: Any) -> Any:
        return mean + (self.power + 1.0) / (count + self.power) * (param - mean)

    def in_role(self, role: str) -> "Averaged":
        """Return this with its rule as that acts in the role."""
        rule = in_role(self.rule, role)
        return self if rule is self.rule else replace(self, rule=rule)
