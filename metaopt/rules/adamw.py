"""AdamW; Adam is AdamW without weight decay."""

from dataclasses import dataclass
from typing import ClassVar

from metaopt.arrays import ArrayT
from metaopt.numerics import divide, one_minus_power, reciprocal, sqrt
from metaopt.rules.rmsprop import RMSprop
from metaopt.rules.rule import Slots, decay_rates, not_negative, refuse_delayed, settle

__all__ = ["AdamW"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    r"""Adam with decoupled weight decay; docs/mathematics.md section 5.

    Loshchilov and Hutter (2019):

    .. math::
        m_{t+1} &= \beta_1 m_t + (1 - \beta_1)\, g_t \\
        v_{t+1} &= \beta_2 v_t + (1 - \beta_2)\, g_t^2 \\
        u_t &= \frac{m_{t+1} / (1 - \beta_1^{t+1})}{\sqrt{v_{t+1} / (1 - \beta_2^{t+1})} + \epsilon}

    Parameters
    ----------
    betas : tuple of two floats, default (0.9, 0.999)
        Decays :math:`\beta_1, \beta_2` of the two moments, each in [0, 1).
    eps : float, default 1e-8
        Added outside the square root.
    weight_decay : float, default 0.0
        Decoupled weight decay :math:`\kappa`; with 0 this is Adam.
    delayed : bool, default False
        Use the moments from before this step; the first direction is 0.

    Raises
    ------
    ValueError
        If an argument lies outside its range.
    TypeError
        If it is no number.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    delayed: bool = False

    scope: ClassVar[str] = "weight"
    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __post_init__(self) -> None:
        settle(
            self,
            betas=decay_rates("betas", self.betas),
            eps=not_negative("eps", self.eps),
            weight_decay=not_negative("weight_decay", self.weight_decay),
        )

    def direction(
        self, grad: ArrayT, slots: Slots[ArrayT], count: ArrayT
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Return :math:`u_t` and the next slots, all of the shape and dtype of `grad`."""
        beta1, beta2 = self.betas
        moments = {
            "exp_avg": beta1 * slots["exp_avg"] + (1.0 - beta1) * grad,
            "exp_avg_sq": beta2 * slots["exp_avg_sq"] + (1.0 - beta2) * (grad * grad),
        }
        used, steps = (slots, count - 1.0) if self.delayed else (moments, count)
        mean = used["exp_avg"] * reciprocal(one_minus_power(beta1, steps))
        mean_sq = used["exp_avg_sq"] * reciprocal(one_minus_power(beta2, steps))
        return divide(mean, sqrt(mean_sq), self.eps), moments

    def without_momentum(self) -> RMSprop:
        """Return RMSprop with this rule's second moment."""
        refuse_delayed(self)
        return RMSprop(beta2=self.betas[1], eps=self.eps, weight_decay=self.weight_decay)
