"""What needs numba, imported where it is used."""

import math
from typing import Any

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

from metaopt_cupy.programs import ROW

__all__ = ["compiled", "run"]

#: Weights that are stepped in the time in which a thread wakes up.
WORTH_A_THREAD = 16384


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing_context: Any, address: Any) -> Any:  # noqa: ARG001
    """Return an integer as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


TABLE = types.int64[:, ::1]
BLOCK = types.float64(
    *(TABLE, numba.from_dtype(ROW)[::1], types.int32[::1], types.float64),
    *(types.int64, types.int64, types.int64, types.int64),
)


def compiled(source: str) -> Any:
    """Compile a block function.

    Sums may be reordered, or they could not be vectorized; no value may be assumed finite.
    """
    names = {"np": np, "math": math, "carray": numba.carray, "pointer": pointer}
    exec(source, names)
    compiler = numba.njit(BLOCK, fastmath={"reassoc", "contract"}, error_model="numpy", nogil=True)
    return compiler(names["block"])


def run(block: Any, weights: int, *arguments: Any) -> None:
    """Call a block function on all chunks, by as many threads as the weights are worth."""
    own = numba.get_num_threads()
    numba.set_num_threads(max(1, min(own, weights // WORTH_A_THREAD)))
    try:
        _run(block, *arguments)
    finally:
        numba.set_num_threads(own)


@numba.njit(  # type: ignore[untyped-decorator]
    types.void(types.FunctionType(BLOCK), *BLOCK.args[:4], TABLE, types.float64[::1]),
    parallel=True,
    nogil=True,
)
def _run(
    block: Any,
    fixed: Any,
    given: Any,
    counts: Any,
    discount: float,
    chunks: Any,
    sums: Any,
) -> None:
    for index in numba.prange(len(chunks)):
        sums[index] = block(
            fixed,
            given,
            counts,
            discount,
            chunks[index, 0],
            chunks[index, 1],
            chunks[index, 2],
            chunks[index, 3],
        )
