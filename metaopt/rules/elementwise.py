"""The proof that a rule of the scope "weight" is what it says."""

import numpy as np

from metaopt.rules import SHIPPED
from metaopt.rules.fast_start import FastStart
from metaopt.rules.rule import ResultError, Rule, checked, direction_of, scope_of
from metaopt.tracer import Program, Scalar

__all__ = ["check_elementwise"]


def check_elementwise(name: str, rule: Rule) -> None:
    """Raise ValueError unless a rule of scope "weight" is elementwise; `name` is for the message.

    The formula is traced: scalars have no shape to depend on, and operations of one entry alone.
    Evaluated once on arrays it shows whether the results have their shape and dtype.
    """
    rule = rule.rule if isinstance(rule, FastStart) else rule
    # those that are shipped may have hyperparameters that are arrays, which cannot be traced
    if scope_of(rule) != "weight" or type(rule) in SHIPPED:
        return
    # of two axes, and in the narrowest dtype: what is widened or not broadcast shows
    grad = np.ones((2, 3), "float32")
    slots = {slot: np.zeros_like(grad) for slot in rule.slots}
    try:
        with np.errstate(all="ignore"):
            result = direction_of(rule, grad, slots, np.ones((), "float32"), np.ones_like(grad))
        checked(rule, result, grad, slots)
        _trace(rule)
    except ResultError:
        raise
    except Exception as error:  # whatever a rule does that scalars cannot
        msg = (
            f'`{name}` has the `scope` "weight", but is not provably elementwise: {error}. Write '
            "`direction` with operators, Python numbers and the functions of metaopt.numerics; or "
            f'say `scope = "leaf"`, and it is handed whole leaves. Got {rule!r}.'
        )
        raise ValueError(msg) from error


def _trace(rule: Rule) -> None:
    program = Program()

    def entry(name: str) -> Scalar:
        return program.variable(name, "float32", varies=True)

    slots = {slot: entry(f"slot{index}") for index, slot in enumerate(rule.slots)}
    count = program.variable("count", "float32", varies=False)
    direction, new = direction_of(rule, entry("grad"), slots, count, entry("param"))
    for what, result in {"direction": direction, **new}.items():
        if not isinstance(result, Scalar):
            msg = f"its {what} is a {type(result).__name__}"
            raise TypeError(msg)
