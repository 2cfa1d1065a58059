"""Steps that are made elsewhere."""

from dataclasses import dataclass
from typing import ClassVar

from metaopt.arrays import ArrayT
from metaopt.rules.rule import Slots, not_negative, settle

__all__ = ["Opaque"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque:
    r"""An optimizer that is known by its steps alone; docs/mathematics.md section 10.

    As base update only. The steps have to be proportional to the step size: what they are at step
    size 1, :math:`p_t`, decay and all, is handed to `metaopt.MetaOptimize.step` as `unit_steps`:

    .. math::
        w_{t+1} = w_t - \alpha_t p_t

    Parameters
    ----------
    weight_decay : float, default 0.0
        Decoupled weight decay :math:`\kappa` that is part of the steps: they have
        :math:`\kappa w_t` in them. Nothing is added to them for it. 0 takes it for a part of the
        steps like any other.

    Raises
    ------
    ValueError
        If `weight_decay` is negative or not finite.
    TypeError
        If it is no number.
    """

    weight_decay: float = 0.0

    scope: ClassVar[str] = "weight"
    slots: ClassVar[tuple[str, ...]] = ()
    opaque: ClassVar[bool] = True

    def __post_init__(self) -> None:
        settle(self, weight_decay=not_negative("weight_decay", self.weight_decay))

    def direction(
        self,
        grad: ArrayT,  # noqa: ARG002
        slots: Slots[ArrayT],  # noqa: ARG002
        count: ArrayT,  # noqa: ARG002
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        """Raise TypeError: there is no formula.

        Raises
        ------
        TypeError
            Always.
        """
        msg = (
            f"{self!r} has no formula: its steps are made elsewhere. Hand them to `step` as "
            "`unit_steps`; torch's optimizers are wrapped by `metaopt_torch.wrap`, optax's by "
            "`metaopt_jax.wrap`."
        )
        raise TypeError(msg)
