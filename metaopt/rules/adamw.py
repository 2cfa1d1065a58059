"""AdamW; Adam is AdamW without weight decay."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from metaopt.arrays import ArrayT
from metaopt.numerics import divide, one_minus_power, reciprocal
from metaopt.rules.learned import Number
from metaopt.rules.rule import (
    Slots,
    decay_rates,
    not_negative,
    optional,
    settle,
)
from metaopt.rules.second_moment import EPS, Squares, acting

__all__ = ["AdamW", "TwoMoments"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoMoments:
    """What rules that divide one moment by the root of the other have in common."""

    betas: tuple[Number, Number] = (0.9, 0.999)
    eps: Number | None = None
    weight_decay: Number = 0.0
    decay_step_size: float | None = None

    scope: ClassVar[str] = "weight"
    learnable: ClassVar[dict[str, str]] = {"betas": "decay", "eps": "exp", "weight_decay": "exp"}

    _moment: Any = field(default=Squares, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        settle(
            self,
            betas=decay_rates("betas", self.betas),
            eps=optional("eps", self.eps),
            weight_decay=not_negative("weight_decay", self.weight_decay),
            decay_step_size=optional("decay_step_size", self.decay_step_size),
        )

    @property
    def slots(self) -> tuple[str, ...]:
        """The two moments."""
        return ("exp_avg", self._moment.slot)

    def in_role(self, role: str) -> Self:
        """Return the rule as it acts on weights ("base") or on beta ("meta"); section 6."""
        return acting(self, role)

    def _next_moments(self, grad: ArrayT, slots: Slots[ArrayT]) -> dict[str, ArrayT]:
        betas: Any = self.betas  # numbers, arrays or jets by now
        moment = self._moment
        return {
            "exp_avg": betas[0] * slots["exp_avg"] + (1.0 - betas[0]) * grad,
            moment.slot: moment.following(slots[moment.slot], grad, betas[1]),
        }

    def _over_root(self, mean: ArrayT, moments: Slots[ArrayT], steps: ArrayT) -> ArrayT:
        """Return a mean over the root of the second moment, which `steps` steps have made."""
        moment = self._moment
        root = moment.root(moments[moment.slot], one_minus_power(self.betas[1], steps))
        return divide(mean, root, EPS["base"] if self.eps is None else self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(TwoMoments):
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
    eps : float, optional
        Added outside the square root; by default 1e-8, as `meta` 0 (section 6).
    weight_decay : float, default 0.0
        Decoupled weight decay :math:`\kappa`; with 0 this is Adam.
    decay_step_size : float, optional
        Step size :math:`\alpha_\kappa` of weight decay. By default it is the learned one: weights
        lose :math:`\alpha \kappa w` in a step, so that decay is strong where step sizes are large,
        and has a say in how large they are. With a number they lose
        :math:`\mathrm{lr}\, \alpha_\kappa \kappa w`, whatever is learned: with 1e-3 and a
        `weight_decay` of 0.1 as much as by `torch.optim.AdamW` with these. With 1.0 `weight_decay`
        is the share itself that is lost, the independent weight decay of Wortsman et al. (2023).
    delayed : bool, default False
        Use the moments from before this step; the first direction is 0.

    Raises
    ------
    ValueError
        If an argument lies outside its range.
    TypeError
        If it is no number.
    """

    delayed: bool = False

    def direction(
        self, grad: ArrayT, slots: Slots[ArrayT], count: ArrayT
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Return :math:`u_t` and the next slots, all of the shape and dtype of `grad`."""
        moments = self._next_moments(grad, slots)
        used, steps = (slots, count - 1.0) if self.delayed else (moments, count)
        mean = used["exp_avg"] * reciprocal(one_minus_power(self.betas[0], steps))
        return self._over_root(mean, used, steps), moments
