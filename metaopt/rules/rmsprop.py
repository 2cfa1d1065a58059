"""RMSprop."""

from dataclasses import dataclass
from typing import ClassVar

from metaopt.arrays import ArrayT
from metaopt.numerics import divide, one_minus_power, reciprocal, sqrt, where
from metaopt.rules.rule import Slots, decay_rate, not_negative, refuse_delayed, settle

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
    eps : float, default 1e-8
        Added outside the square root.
    weight_decay : float, default 0.0
        Decoupled weight decay :math:`\kappa`.
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

    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: bool = True
    delayed: bool = False

    scope: ClassVar[str] = "weight"
    slots: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def __post_init__(self) -> None:
        settle(
            self,
            beta2=decay_rate("beta2", self.beta2),
            eps=not_negative("eps", self.eps),
            weight_decay=not_negative("weight_decay", self.weight_decay),
        )

    def direction(
        self, grad: ArrayT, slots: Slots[ArrayT], count: ArrayT
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Return :math:`u_t` and the next slots, all of the shape and dtype of `grad`."""
        exp_avg_sq = self.beta2 * slots["exp_avg_sq"] + (1.0 - self.beta2) * (grad * grad)
        if self.delayed:
            used, steps = slots["exp_avg_sq"], count - 1.0
        else:
            used, steps = exp_avg_sq, count
        mean_sq = used
        if self.bias_correction:
            mean_sq = used * reciprocal(one_minus_power(self.beta2, steps))
        direction = divide(grad, sqrt(mean_sq), self.eps)
        if self.delayed:
            direction = where(used, direction, 0.0)
        return direction, {"exp_avg_sq": exp_avg_sq}

    def without_momentum(self) -> "RMSprop":
        """Return this rule; it has no momentum."""
        refuse_delayed(self)
        return self
