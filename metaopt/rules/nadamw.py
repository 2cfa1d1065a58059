"""NAdamW: AdamW with Nesterov momentum."""

from dataclasses import dataclass
from typing import Any

from metaopt.arrays import ArrayT
from metaopt.numerics import one_minus_power, reciprocal
from metaopt.rules.adamw import TwoMoments
from metaopt.rules.rule import Slots

__all__ = ["NAdamW"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NAdamW(TwoMoments):
    r"""Adam with Nesterov momentum and decoupled weight decay; docs/mathematics.md section 5.

    Dozat (2016), in the form of `optax.nadamw`:

    .. math::
        m_{t+1} &= \beta_1 m_t + (1 - \beta_1)\, g_t \\
        v_{t+1} &= \beta_2 v_t + (1 - \beta_2)\, g_t^2 \\
        n_t &= \beta_1 \frac{m_{t+1}}{1 - \beta_1^{t+2}}
            + (1 - \beta_1) \frac{g_t}{1 - \beta_1^{t+1}} \\
        u_t &= \frac{n_t}{\sqrt{v_{t+1} / (1 - \beta_2^{t+1})} + \epsilon}

    The mean :math:`n_t` weighs the newest gradient as the next step of Adam will. Dozat's second
    moment has one more factor :math:`\beta_2`, and `torch.optim.NAdam` a :math:`\beta_1` that
    grows; neither is here.

    Parameters
    ----------
    betas : tuple of two floats, default (0.9, 0.999)
        Decays :math:`\beta_1, \beta_2` of the two moments, each in [0, 1).
    eps : float, optional
        Added outside the square root; by default 1e-8, as `meta` 0 (section 6).
    weight_decay : float, default 0.0
        Decoupled weight decay :math:`\kappa`; with 0 this is NAdam.
    decay_step_size : float, optional
        Step size of weight decay, in place of the learned one: see `metaopt.AdamW`.

    Raises
    ------
    ValueError
        If an argument lies outside its range.
    TypeError
        If it is no number.
    """

    def direction(
        self, grad: ArrayT, slots: Slots[ArrayT], count: ArrayT
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Return :math:`u_t` and the next slots, all of the shape and dtype of `grad`."""
        beta1: Any = self.betas[0]
        moments = self._next_moments(grad, slots)
        ahead = beta1 * reciprocal(one_minus_power(beta1, count + 1.0))
        now = (1.0 - beta1) * reciprocal(one_minus_power(beta1, count))
        mean = moments["exp_avg"] * ahead + grad * now
        return self._over_root(mean, moments, count), moments
