"""A faster start for the step sizes."""

import math
from dataclasses import dataclass, field
from typing import Never

from metaopt.arrays import ArrayT
from metaopt.numerics import positive
from metaopt.rules.rule import Rule, Slots, as_number, check_rule, settle

__all__ = ["FastStart"]

#: 0 until the meta-gradient has been positive, then 1.
TURNED = "turned"


@dataclass(frozen=True, slots=True)
class FastStart:
    r"""A meta update that is faster as long as nothing has spoken against a larger step size.

    docs/mathematics.md section 6. Until the meta-gradient of a block is positive for the first
    time, which asks for a smaller step size, its direction is that of `rule` times `factor`; from
    then on it is that of `rule`:

    .. math::
        d_{t+1} &= \max(d_t, [z_t > 0]) \\
        u_t &= (1 + (\text{factor} - 1)(1 - d_{t+1}))\, \bar u_t

    So step sizes that start far too small arrive up to `factor` times sooner, and `meta_lr` can be
    what suits the rest of the run. One positive meta-gradient ends the start. Where they are mostly
    noise, as with a single example a step or a step size for each weight, it soon is over, and
    nothing is gained or lost.

    Parameters
    ----------
    rule : Rule
        The meta update.
    factor : float, default 10.0
        At least 1. The start ends after a step size that is too large, the larger the higher
        `meta_lr` times `factor`. AdamW and RMSprop as `base` recover where this is 0.1; SGD and
        Lion may not.

    Raises
    ------
    ValueError
        If `factor` is less than 1 or not finite, or `rule` has a slot "turned" already.
    TypeError
        If `factor` is no number or `rule` no rule.

    Examples
    --------
    >>> import metaopt as mo
    >>> opt = mo.MetaOptimize(base=mo.AdamW(), meta=mo.FastStart(mo.AdamW()), step_size=1e-6)
    """

    rule: Rule
    factor: float = field(default=10.0, kw_only=True)

    def __post_init__(self) -> None:
        check_rule("rule", self.rule)
        if TURNED in self.rule.slots:
            msg = f"`rule` must have no slot {TURNED!r}, as a FastStart has; got {self.rule!r}."
            raise ValueError(msg)
        factor = as_number("factor", self.factor)
        if isinstance(factor, float) and not 1.0 <= factor < math.inf:
            msg = f"`factor` must be finite and at least 1; got {self.factor}."
            raise ValueError(msg)
        settle(self, factor=factor)

    @property
    def slots(self) -> tuple[str, ...]:
        """Those of `rule`, and whether the start is over."""
        return (*self.rule.slots, TURNED)

    @property
    def weight_decay(self) -> float:
        """That of `rule`."""
        return self.rule.weight_decay

    def direction(
        self, grad: ArrayT, slots: Slots[ArrayT], count: ArrayT
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Return :math:`u_t` and the next slots, all of the shape and dtype of `grad`."""
        own = {slot: slots[slot] for slot in self.rule.slots}
        direction, new = self.rule.direction(grad, own, count)
        before = positive(slots[TURNED])  # no derivative passes: it is 0 or 1
        turned = before + (1.0 - before) * positive(grad)
        return direction * (1.0 + (self.factor - 1.0) * (1.0 - turned)), {**new, TURNED: turned}

    def without_momentum(self) -> Never:
        """Raise: it is no base update."""
        msg = "`FastStart` is a meta update; it has no form without momentum."
        raise ValueError(msg)
