"""RMSprop."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from metaopt.arrays import ArrayT
from metaopt.numerics import divide, one_minus_power, where
from metaopt.rules.learned import Number
from metaopt.rules.rule import (
    Slots,
    decay_rate,
    not_negative,
    optional,
    settle,
)
from metaopt.rules.second_moment import EPS, Squares, acting

__all__ = ["RMSprop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSprop:
    r"""RMSprop with decoupled weight decay; docs/mathematics.md section 5.

    .. math::
        v_{t+1} &= \lambda\, v_t + (1 - \lambda)\, g_t^2 \\
        u_t &= \frac{g_t}{\sqrt{v_{t+1} / (1 - \lambda^{t+1})} + \epsilon}

    Parameters
    ----------
    beta2 : float, default 0.999
        Decay :math:`\lambda` of the second moment, in [0, 1).
    eps : float, optional
        Added outside the square root; by default 1e-8, as `meta` 0 (section 6).
    weight_decay : float, default 0.0
        Decoupled weight decay :math:`\kappa`.
    decay_step_size : float, optional
        Step size of weight decay, in place of the learned one: see `metaopt.AdamW`.
    bias_correction : bool, default True
        Divide the second moment by :math:`1 - \lambda^{t+1}`. `torch.optim.RMSprop` does not.
    delayed : bool, default False
        Use the second moment from before this step; the direction is 0 where that is 0.

    Raises
    ------
    ValueError
        If an argument lies outside its range.
    TypeError
        If it is no number.
    """

    beta2: Number = 0.999
    eps: Number | None = None
    weight_decay: Number = 0.0
    decay_step_size: float | None = None
    bias_correction: bool = True
    delayed: bool = False

    scope: ClassVar[str] = "weight"
    learnable: ClassVar[dict[str, str]] = {"beta2": "decay", "eps": "exp", "weight_decay": "exp"}

    _moment: Any = field(default=Squares, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        settle(
            self,
            beta2=decay_rate("beta2", self.beta2),
            eps=optional("eps", self.eps),
            weight_decay=not_negative("weight_decay", self.weight_decay),
            decay_step_size=optional("decay_step_size", self.decay_step_size),
        )

    @property
    def slots(self) -> tuple[str, ...]:
        """The second moment."""
        return (self._moment.slot,)

    def direction(
        self, grad: ArrayT, slots: Slots[ArrayT], count: ArrayT
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Return :math:`u_t` and the next slots, all of the shape and dtype of `grad`."""
        moment, before = self._moment, slots[self._moment.slot]
        after = moment.following(before, grad, self.beta2)
        used, steps = (before, count - 1.0) if self.delayed else (after, count)
        correction = one_minus_power(self.beta2, steps) if self.bias_correction else None
        root = moment.root(used, correction)
        direction = divide(grad, root, EPS["base"] if self.eps is None else self.eps)
        if self.delayed:
            direction = where(used, direction, 0.0)
        return direction, {moment.slot: after}

    def in_role(self, role: str) -> "RMSprop":
        """Return the rule as it acts on weights ("base") or on beta ("meta"); section 6."""
        return acting(self, role)
