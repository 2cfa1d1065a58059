"""What a kernel computes for each weight: the core's own function of a leaf's step, traced."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from metaopt.arrays import cast
from metaopt.jets import Jet
from metaopt.leaf import Leaf, one_pass
from metaopt.tracer import Program, Scalar, UntraceableError

__all__ = ["GIVEN", "OF_BLOCKS", "ROW", "Spec", "Traced", "trace"]

#: Arrays of which a kernel is told anew in every step where they lie, 0 where there is none.
GIVEN = ("grad", "value", "rate", "mask", "lr_at")
#: Those of them with an entry per block.
OF_BLOCKS = ("value", "rate", "mask")
#: What a kernel is told of a leaf anew in every step; `lr` counts where `lr_at` is 0.
ROW = np.dtype([*((name, np.int64) for name in GIVEN), ("lr", np.float64)])


@dataclass(frozen=True)
class Spec:
    """What a kernel depends on.

    Parameters
    ----------
    rule : Rule
        Base update.
    param, grad, compute, beta : {"float16", "float32", "float64"}
        Dtypes of the parameter, its gradient, its state, and of what belongs to blocks.
    per_weight : bool
        Whether step sizes differ from weight to weight.
    kept : {"trace", "average"}
        Which of them the state has.
    horizons : int, default 1
        How many discounts there are, each with a trace or average of its own.
    """

    rule: Any
    param: str
    grad: str
    compute: str
    beta: str
    per_weight: bool
    kept: str
    horizons: int = 1


@dataclass(frozen=True)
class Traced:
    """A traced step: its program, inputs for each weight, shared inputs, and what it writes.

    Parameters
    ----------
    program : Program
    arrays : mapping of variable to dtype
        An array each, with an entry per weight.
    shared : mapping of variable to dtype
        A value for all weights of a block.
    written : mapping of variable to Scalar
        What the entry of an array is after the step.
    products : list of Scalar
        Of gradient and trace, for each discount.
    """

    program: Program
    arrays: dict[str, str]
    shared: dict[str, str]
    written: dict[str, Scalar]
    products: list[Scalar]


def trace(spec: Spec) -> Traced:
    """Return the step of `spec` as a program.

    Raises
    ------
    UntraceableError
        If the rule is no formula of scalars; the message says why.
    """
    program, arrays, shared = Program(), dict[str, str](), dict[str, str]()

    def of_weight(name: str, dtype: str) -> Scalar:
        arrays[name] = dtype
        return program.variable(name, dtype, varies=True)

    def of_block(name: str, dtype: str) -> Scalar:
        shared[name] = dtype
        return program.variable(name, dtype, varies=False)

    of_blocks = of_weight if spec.per_weight else of_block
    slots = {slot: f"slot{index}" for index, slot in enumerate(spec.rule.slots)}
    param, grad = of_weight("param", spec.param), of_weight("grad", spec.grad)
    moments = {slot: of_weight(name, spec.compute) for slot, name in slots.items()}
    count, lr = of_block("count", "int32"), of_block("lr", spec.compute)
    size = Jet(of_blocks("value", spec.beta), of_blocks("rate", spec.beta))
    mask = of_blocks("mask", "bool")
    written, products = dict[str, Any](), list[Any]()
    try:
        for horizon in range(spec.horizons):  # what they have in common is one line
            kept = f"{spec.kept}{horizon}"
            row = Leaf.of(param, moments, count, **{spec.kept: of_weight(kept, spec.compute)})
            discount = of_block(f"discount{horizon}", spec.compute)
            product, _, leaf = one_pass(
                spec.rule, row, grad, size, lr=lr, mask=mask, discount=discount
            )
            products.append(product)
            written |= {
                kept: leaf.param.first if leaf.average is None else leaf.average,
                "param": cast(leaf.param.value, spec.param),
                **{name: leaf.slots[slot].value for slot, name in slots.items()},
            }
        _check(written | {"product": products[0]}, arrays | {"product": spec.compute})
    except UntraceableError:
        raise
    except Exception as error:  # whatever a rule does that scalars cannot
        raise UntraceableError(str(error)) from error
    used = program.prune([*written.values(), *products])
    shared = {name: dtype for name, dtype in shared.items() if name in used}
    arrays = {name: dtype for name, dtype in arrays.items() if name in used or name not in GIVEN}
    return Traced(program, arrays, shared, written, products)


def _check(results: dict[str, Any], dtypes: dict[str, str]) -> None:
    """Raise UntraceableError where a result is no scalar of the dtype that it is kept in."""
    for name, result in results.items():
        if not isinstance(result, Scalar):
            msg = f"its {name} is {type(result).__module__}.{type(result).__name__}"
            raise UntraceableError(msg)
        if result.dtype != dtypes[name]:
            msg = f"its {name} is {result.dtype} in place of {dtypes[name]}"
            raise UntraceableError(msg)
