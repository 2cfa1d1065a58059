"""The mean of squares that rules divide by the root of, as either role keeps it."""

from dataclasses import replace
from typing import Any, TypeVar

from metaopt.arrays import ArrayT
from metaopt.numerics import hypot, reciprocal, sqrt
from metaopt.rules.rule import settle

__all__ = ["EPS", "Roots", "Squares", "acting"]

RuleT = TypeVar("RuleT", bound=Any)

#: `eps` of each role where none is given.
EPS = {"base": 1e-8, "meta": 0.0}


class Squares:
    """The mean of the squares of the weights' gradients."""

    slot = "exp_avg_sq"

    @staticmethod
    def following(before: ArrayT, grad: ArrayT, decay: Any) -> ArrayT:
        """Return the next moment."""
        return decay * before + (1.0 - decay) * (grad * grad)

    @staticmethod
    def root(moment: ArrayT, correction: ArrayT | None) -> ArrayT:
        """Return the root of the mean square, divided by the correction before if there is one."""
        return sqrt(moment if correction is None else moment * reciprocal(correction))


class Roots:
    """The root of the mean of the squares of meta-gradients.

    These are smaller than gradients by a step size and grow with the square of the loss's scale:
    in float32 their squares would underflow.
    """

    slot = "exp_avg_rms"

    @staticmethod
    def following(before: ArrayT, grad: ArrayT, decay: Any) -> ArrayT:
        """Return the next moment."""
        return hypot(decay**0.5 * before, (1.0 - decay) ** 0.5 * grad)

    @staticmethod
    def root(moment: ArrayT, correction: ArrayT | None) -> ArrayT:
        """Return the root of the mean square, divided by the correction before if there is one."""
        return moment if correction is None else moment * sqrt(reciprocal(correction))


#: What keeps the second moment in each role.
MOMENTS: dict[str, Any] = {"base": Squares, "meta": Roots}


def acting(rule: RuleT, role: str) -> RuleT:
    """Return a rule with the `eps` and the second moment of a role; itself if it has them."""
    eps, moment = EPS[role] if rule.eps is None else rule.eps, MOMENTS[role]
    if eps is rule.eps and moment is rule._moment:
        return rule
    found: RuleT = replace(rule, eps=eps)
    settle(found, _moment=moment)
    return found
