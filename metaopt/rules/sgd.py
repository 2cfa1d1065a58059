"""SGD, with or without momentum."""

from dataclasses import dataclass
from typing import Any, ClassVar

from metaopt.arrays import ArrayT
from metaopt.rules.learned import Number
from metaopt.rules.rule import Slots, decay_rate, not_negative, optional, settle

__all__ = ["SGD"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SGD:
    r"""Stochastic gradient descent; docs/mathematics.md section 5.

    .. math::
        m_{t+1} &= \rho\, m_t + (1 - \rho)\, g_t \\
        u_t &= m_{t+1}

    The momentum is an *average* of gradients: with `momentum=0.9` a step is ten times smaller than
    that of `torch.optim.SGD(momentum=0.9)`, which sums them, and equal to it with `dampening=0.9`.

    Parameters
    ----------
    momentum : float, default 0.0
        Decay :math:`\rho` of the average, in [0, 1). With 0 the direction is the gradient and
        there is no slot.
    weight_decay : float, default 0.0
        Decoupled weight decay :math:`\kappa`.
    decay_step_size : float, optional
        Step size of weight decay, in place of the learned one: see `metaopt.AdamW`.
    delayed : bool, default False
        Use the average from before this step, which is zero in the first. Needs momentum.

    Raises
    ------
    ValueError
        If an argument lies outside its range.
    TypeError
        If it is no number.
    """

    momentum: Number = 0.0
    weight_decay: Number = 0.0
    decay_step_size: float | None = None
    delayed: bool = False

    scope: ClassVar[str] = "weight"
    learnable: ClassVar[dict[str, str]] = {"momentum": "decay", "weight_decay": "exp"}

    def __post_init__(self) -> None:
        settle(
            self,
            momentum=decay_rate("momentum", self.momentum),
            weight_decay=not_negative("weight_decay", self.weight_decay),
            decay_step_size=optional("decay_step_size", self.decay_step_size),
        )
        if self.delayed and not self._has_momentum:
            msg = "`delayed` must be False when `momentum` is 0: there is no moment to delay."
            raise ValueError(msg)

    @property
    def _has_momentum(self) -> bool:
        return not isinstance(self.momentum, float) or self.momentum > 0

    @property
    def slots(self) -> tuple[str, ...]:
        """The average of gradients, where there is momentum."""
        return ("exp_avg",) if self._has_momentum else ()

    def direction(
        self,
        grad: ArrayT,
        slots: Slots[ArrayT],
        count: ArrayT,  # noqa: ARG002
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Return :math:`u_t` and the next slots, all of the shape and dtype of `grad`."""
        if not self._has_momentum:
            return grad, {}
        momentum: Any = self.momentum
        exp_avg = momentum * slots["exp_avg"] + (1.0 - momentum) * grad
        return slots["exp_avg"] if self.delayed else exp_avg, {"exp_avg": exp_avg}
