"""Kernels for NumPy arrays, compiled by numba from the traced source."""

from typing import Any

import numpy as np

from metaopt.tracer import PYTHON
from metaopt_kernels.programs import GIVEN, Traced

__all__ = ["Cpu", "source"]

TEMPLATE = """\
def block(fixed, given, counts, discount_, row, start, stop, first):
    told = given[row]
    if told.grad == 0:
        return 0.0
    n = stop - start
    {inputs}
    {once}
    total = np.{compute}(0.0)
    for i in range(n):
        {loads}
        {each}
        {stores}
    return np.float64(total)
"""


def source(traced: Traced, compute: str, *, per_weight: bool) -> str:
    """Return the source of a function that steps the weights from `start` to `stop` of a leaf.

    It returns the sum of their products, which it writes in place of that where step sizes differ
    from weight to weight. Rows of `fixed` hold the addresses of the arrays of `Traced.arrays` that
    `given`, of dtype `ROW`, does not.
    """
    fixed = [name for name in traced.arrays if name not in GIVEN]
    numbers = {
        "lr": f"np.{compute}(told.lr)",
        "count": "counts[row]",
        "discount": f"np.{compute}(discount_)",
    }
    inputs = []
    for name, dtype in (traced.arrays | traced.shared).items():
        if name in numbers:
            inputs.append(f"{name} = {numbers[name]}")
            continue
        at = f"told.{name}" if name in GIVEN else f"fixed[{fixed.index(name)}, row]"
        offset = "first" if name in ("value", "rate", "meta_grad") else "start"
        array = f"carray(pointer({at} + {offset} * {_size(dtype)}), n, np.{dtype})"
        one = name in traced.shared
        inputs.append(f"{name} = {array}[0]" if one else f"{name}_ = {array}")
    if per_weight:
        address = f"told.product + start * {_size(compute)}"
        inputs.append(f"product_ = carray(pointer({address}), n, np.{compute})")
    product = PYTHON.written(traced.product)
    stores = [f"{name}_[i] = {PYTHON.written(value)}" for name, value in traced.written.items()]
    stores.append(f"product_[i] = {product}" if per_weight else f"total += {product}")
    return TEMPLATE.format(
        compute=compute,
        inputs="\n    ".join(inputs),
        once="\n    ".join(PYTHON.lines(traced.program.once)),
        loads="\n        ".join(f"{name} = {name}_[i]" for name in traced.arrays),
        each="\n        ".join(PYTHON.lines(traced.program.each)),
        stores="\n        ".join(stores),
    )


def _size(dtype: str) -> int:
    return np.dtype(dtype).itemsize


class Cpu:
    """Runs traced steps on NumPy arrays.

    Raises
    ------
    ImportError
        If numba is not installed.
    """

    xp = np
    #: Weights that a kernel steps in one go: few calls, and parts enough for every core.
    chunk = 16384
    #: Of parameters; numba computes in no narrower ones.
    dtypes = ("float32", "float64")

    def __init__(self) -> None:
        from metaopt_kernels import numba_tools

        self._tools = numba_tools

    def kernel(self, traced: Traced, compute: str, *, per_weight: bool) -> Any:
        """Return the compiled kernel of a traced step."""
        return self._tools.compiled(source(traced, compute, per_weight=per_weight))

    def table(self, array: Any) -> Any:
        """Return a table of integers where kernels read it."""
        return array

    def blocks(self, blocks: Any, size: int) -> Any:  # noqa: ARG002
        """Return the blocks of chunks as `gathered` takes them."""
        return blocks

    def run(self, kernel: Any, group: Any, given: Any, discount: float) -> None:
        """Step the leaves of a group."""
        self._tools.run(
            kernel,
            group.weights,
            *(group.fixed, given, group.counts, discount, group.chunks, group.sums),
        )
        group.counts += given["grad"] != 0

    def gathered(self, groups: Any, size: int, dtype: Any) -> Any:
        """Return the sums of all chunks by block."""
        total = np.zeros(size)
        for group in groups:
            total += np.bincount(group.blocks, weights=group.sums, minlength=size)
        return total.astype(dtype)
