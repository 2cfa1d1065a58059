"""Kernels for NumPy arrays, compiled by numba from the traced source."""

from typing import Any

import numpy as np

from metaopt.tracer import PYTHON
from metaopt_kernels.programs import GIVEN, OF_BLOCKS, Traced

__all__ = ["Cpu", "source"]

TEMPLATE = """\
def block(fixed, given, counts, discounts, sums, chunk, row, start, stop, first):
    sums[chunk, :] = 0.0
    told = given[row]
    if told.grad == 0:
        return
    n = stop - start
    {inputs}
    {once}
    {totals}
    for i in range(n):
        {loads}
        {each}
        {stores}
    {sums}
"""


def source(traced: Traced, compute: str, *, per_weight: bool) -> str:
    """Return the source of a function that steps the weights from `start` to `stop` of a leaf.

    It writes the sums of their products, or the products where step sizes differ from weight to
    weight. Rows of `fixed` hold the addresses of the arrays of `Traced.arrays` that `given`, of
    dtype `ROW`, does not, and of such products.
    """
    horizons = range(len(traced.products))
    products = [f"product{horizon}" for horizon in horizons] if per_weight else []
    fixed = [*(name for name in traced.arrays if name not in GIVEN), *products]
    numbers = {"lr": f"np.{compute}(told.lr)", "count": "counts[row]"}
    numbers |= {f"discount{horizon}": f"np.{compute}(discounts[{horizon}])" for horizon in horizons}
    inputs = []
    for name, dtype in (traced.arrays | traced.shared | dict.fromkeys(products, compute)).items():
        if name in numbers:
            inputs.append(f"{name} = {numbers[name]}")
            continue
        at = f"told.{name}" if name in GIVEN else f"fixed[{fixed.index(name)}, row]"
        offset = "first" if name in OF_BLOCKS else "start"
        kind = PYTHON.dtypes[dtype]
        array = f"carray(pointer({at} + {offset} * {_size(dtype)}), n, np.{kind})"
        one = name in traced.shared
        inputs.append(f"{name} = {array}[0]" if one else f"{name}_ = {array}")
    stores = [f"{name}_[i] = {PYTHON.written(value)}" for name, value in traced.written.items()]
    stores += [
        f"product{horizon}_[i] = {product}" if per_weight else f"total{horizon} += {product}"
        for horizon, product in enumerate(map(PYTHON.written, traced.products))
    ]
    summed = [] if per_weight else horizons
    return TEMPLATE.format(
        inputs="\n    ".join(inputs),
        once="\n    ".join(PYTHON.lines(traced.program.once)),
        loads="\n        ".join(f"{name} = {name}_[i]" for name in traced.arrays),
        each="\n        ".join(PYTHON.lines(traced.program.each)),
        stores="\n        ".join(stores),
        totals="\n    ".join(f"total{horizon} = np.{compute}(0.0)" for horizon in summed),
        sums="\n    ".join(f"sums[chunk, {horizon}] = total{horizon}" for horizon in summed),
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

    def run(self, kernel: Any, group: Any, given: Any, discounts: Any) -> None:
        """Step the leaves of a group."""
        self._tools.run(
            kernel,
            group.weights,
            *(group.fixed, given, group.counts, discounts, group.sums, group.chunks),
        )
        group.counts += given["grad"] != 0

    def gathered(self, groups: Any, horizons: int, size: int, dtype: Any) -> Any:
        """Return the sums of all chunks by horizon and block."""
        total = np.zeros((horizons, size))
        for group in groups:
            for horizon, sums in enumerate(group.sums.T):
                total[horizon] += np.bincount(group.blocks, weights=sums, minlength=size)
        return total.astype(dtype)
