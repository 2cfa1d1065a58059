"""Lion."""

from dataclasses import dataclass
from typing import Any, ClassVar

from metaopt.arrays import ArrayT
from metaopt.numerics import sign
from metaopt.rules.learned import Number
from metaopt.rules.rule import Slots, decay_rates, not_negative, optional, settle

__all__ = ["Lion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lion:
    r"""Lion, Chen et al. (2023); docs/mathematics.md section 5.

    .. math::
        u_t &= \operatorname{sign}(c\, m_t + (1 - c)\, g_t) \\
        m_{t+1} &= \rho\, m_t + (1 - \rho)\, g_t

    The direction is constant almost everywhere, so no derivative passes through it: the moment
    never enters the traces.

    Parameters
    ----------
    betas : tuple of two floats, default (0.9, 0.99)
        :math:`c`, the interpolation inside the sign, and :math:`\rho`, the decay of the moment,
        each in [0, 1).
    weight_decay : float, default 0.0
        Decoupled weight decay :math:`\kappa`.
    decay_step_size : float, optional
        Step size of weight decay, in place of the learned one: see `metaopt.AdamW`.

    Raises
    ------
    ValueError
        If an argument lies outside its range.
    TypeError
        If it is no number.
    """

    betas: tuple[Number, Number] = (0.9, 0.99)
    weight_decay: Number = 0.0
    decay_step_size: float | None = None

    scope: ClassVar[str] = "weight"
    learnable: ClassVar[dict[str, str]] = {"betas": "decay", "weight_decay": "exp"}
    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __post_init__(self) -> None:
        settle(
            self,
            betas=decay_rates("betas", self.betas),
            weight_decay=not_negative("weight_decay", self.weight_decay),
            decay_step_size=optional("decay_step_size", self.decay_step_size),
        )

    def direction(
        self,
        grad: ArrayT,
        slots: Slots[ArrayT],
        count: ArrayT,  # noqa: ARG002
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Return :math:`u_t` and the next slots, all of the shape and dtype of `grad`."""
        betas: Any = self.betas  # numbers, arrays or jets by now
        interpolation, decay = betas
        exp_avg = slots["exp_avg"]
        direction = sign(interpolation * exp_avg + (1.0 - interpolation) * grad)
        return direction, {"exp_avg": decay * exp_avg + (1.0 - decay) * grad}
