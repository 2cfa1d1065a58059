"""A faster start for the step sizes."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from metaopt.arrays import ArrayT
from metaopt.numerics import positive
from metaopt.rules.adamw import AdamW
from metaopt.rules.learned import Number, learned_in
from metaopt.rules.rule import (
    Rule,
    Slots,
    as_number,
    check_rule,
    direction_of,
    in_role,
    is_opaque,
    scope_of,
    settle,
)

__all__ = ["FastStart"]

#: Positive meta-gradients less half of the negative ones, never below 0, until it ends the start.
AGAINST = "against"


@dataclass(frozen=True, slots=True)
class FastStart:
    r"""A meta update that is faster as long as little has spoken against a larger step size.

    docs/mathematics.md section 6. A positive meta-gradient asks for a smaller step size and counts
    one; a negative one asks for a larger and takes half a count back, down to 0. Until a block has
    a count of `patience`, its direction is that of `rule` times `factor`; from then on it is that
    of `rule`, for good; but in the step in which the start ends, of several discounts that of the
    last, the step size goes back by as much as `retreat` fast steps raised it:

    .. math::
        d_{t+1} &= \begin{cases}
            \max(0,\, d_t + [z_t > 0] - \tfrac12 [z_t < 0]) & d_t < \text{patience} \\
            d_t & \text{else} \end{cases} \\
        u_t &= \begin{cases}
            \text{factor} \cdot \bar u_t & d_{t+1} < \text{patience} \\
            \text{retreat} \cdot \text{factor} & d_t < \text{patience} \le d_{t+1} \\
            \bar u_t & \text{else} \end{cases}

    So step sizes that start far too small arrive up to `factor` times sooner, and `meta_lr` can be
    what suits the rest of the run. Half a count back makes the start the longer, the more
    meta-gradients ask for larger step sizes, and ends it soon where they are noise around zero, as
    with a single example a step or a step size for each weight; there little is gained or lost.

    Parameters
    ----------
    rule : Rule, default AdamW()
        The meta update.
    factor : float, default 10.0
        At least 1.
    patience : int, default 5
        At least 1, with which a single meta-gradient ends the start: it may be noise. More of it
        lets the step size grow further where it is too large.
    retreat : float, optional
        In steps of direction 1 times `factor`; at least 0, for no retreat. The start ends after a
        step size that is too large, for the moments of `rule` and of `base` lag by some ten
        steps. By default 10 around rules whose direction keeps its size whatever that of z, such as
        AdamW, RMSprop and Lion, and 0 around others, such as SGD.

    Raises
    ------
    ValueError
        If `factor` is less than 1 or not finite, `patience` less than 1, `retreat` negative or not
        finite, or `rule` has no formula or a slot "against" already.
    TypeError
        If `factor` or `retreat` is no number, `patience` no whole one, or `rule` no rule.

    Examples
    --------
    >>> import metaopt as mo
    >>> opt = mo.MetaOptimize(base=mo.AdamW(), meta=mo.FastStart(mo.AdamW()), step_size=1e-6)
    """

    #: Slots that stay as they are where a block starts anew: the start has ended for good.
    lasting: ClassVar[tuple[str, ...]] = (AGAINST,)

    rule: Rule = AdamW()  # noqa: RUF009
    factor: float = field(default=10.0, kw_only=True)
    patience: int = field(default=5, kw_only=True)
    retreat: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_rule("rule", self.rule)
        if is_opaque(self.rule):
            msg = f"`rule` must have a formula for its direction; got {self.rule!r}."
            raise ValueError(msg)
        if learned_in(self.rule):
            msg = f"`rule` must have numbers, and none that is learned; got {self.rule!r}."
            raise ValueError(msg)
        if AGAINST in self.rule.slots:
            msg = f"`rule` must have no slot {AGAINST!r}, as a FastStart has; got {self.rule!r}."
            raise ValueError(msg)
        factor = as_number("factor", self.factor)
        if isinstance(factor, float) and not 1.0 <= factor < math.inf:
            msg = f"`factor` must be finite and at least 1; got {self.factor}."
            raise ValueError(msg)
        if not isinstance(self.patience, int | np.integer) or isinstance(self.patience, bool):
            msg = f"`patience` must be a whole number; got {self.patience!r}."
            raise TypeError(msg)
        if self.patience < 1:
            msg = f"`patience` must be at least 1; got {self.patience}."
            raise ValueError(msg)
        usual = 10.0 if _keeps_size(self.rule) else 0.0
        retreat = as_number("retreat", usual if self.retreat is None else self.retreat)
        if isinstance(retreat, float) and not 0.0 <= retreat < math.inf:
            msg = f"`retreat` must be finite and at least 0; got {self.retreat}."
            raise ValueError(msg)
        settle(self, factor=factor, patience=int(self.patience), retreat=retreat)

    @property
    def slots(self) -> tuple[str, ...]:
        """Those of `rule`, and how near the end of the start is."""
        return (*self.rule.slots, AGAINST)

    @property
    def scope(self) -> str:
        """That of `rule`."""
        return scope_of(self.rule)

    @property
    def weight_decay(self) -> Number:
        """That of `rule`."""
        return self.rule.weight_decay

    def direction(
        self, grad: ArrayT, slots: Slots[ArrayT], count: ArrayT
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Return :math:`u_t`, without the retreat, and the next slots, all like `grad`."""
        own = {slot: slots[slot] for slot in self.rule.slots}
        direction, new = self.rule.direction(grad, own, count)
        before = slots[AGAINST]  # a number of halves, as which no derivative passes
        asked = positive(grad) - 0.5 * positive(-grad)
        against = before + asked * positive(self.patience - before)
        against = against * positive(against)
        faster = (self.factor - 1.0) * positive(self.patience - against)
        return direction * (1.0 + faster), {**new, AGAINST: against}

    def over(self, slots: Slots[Any]) -> Any:
        """Say where the start has ended."""
        return slots[AGAINST] >= self.patience

    def in_role(self, role: str) -> "FastStart":
        """Return this with its rule as that acts in the role."""
        rule = in_role(self.rule, role)
        return self if rule is self.rule else replace(self, rule=rule)


def _keeps_size(rule: Rule) -> bool:
    """Say whether the first direction of a rule is the same for a gradient of any size."""
    one = np.ones(())
    slots = {slot: np.zeros(()) for slot in rule.slots}
    try:
        small, large = (direction_of(rule, one * size, slots, one)[0] for size in (1.0, 1e3))
    except Exception:  # of a rule that is refused when an optimizer is made, with the reason
        return False
    return bool(np.all(np.abs(large) <= 2.0 * np.abs(small)))
