"""What needs numba, imported where it is used."""

import functools
import math
import os
import threading
from typing import Any

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

from metaopt_kernels.programs import ROW

__all__ = ["compiled", "run"]

#: Weights that are stepped in the time in which a thread wakes up.
WORTH_A_THREAD = 16384


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:  # noqa: ARG001
    """Return an integer as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


TABLE = types.int64[:, ::1]
BLOCK = types.void(
    *(TABLE, numba.from_dtype(ROW)[::1], types.int32[::1], types.float64[::1]),
    *(types.float64[:, ::1], types.int64, types.int64, types.int64, types.int64, types.int64),
)


#: How many compiled formulas are kept for optimizers to come; those in use are kept by them.
KEPT = 64

# Held while threads of numba run, for one of its threading layers ends the process where two such
# regions meet, and while it compiles.
_running, _compiling = threading.Lock(), threading.Lock()
_forked = False


def _after_fork() -> None:
    """Step on one thread from now on: those of the parent are gone, with what they held."""
    global _running, _compiling, _forked
    _running, _compiling, _forked = threading.Lock(), threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def compiled(source: str) -> Any:
    """Return a block function, compiled."""
    with _compiling:
        return _compiled(source)


@functools.lru_cache(KEPT)
def _compiled(source: str) -> Any:
    """Compile a block function.

    Sums may be reordered, or they could not be vectorized; no value may be assumed finite.
    """
    names = {"np": np, "math": math, "carray": numba.carray, "pointer": pointer}
    exec(source, names)
    compiler = numba.njit(BLOCK, fastmath={"reassoc", "contract"}, error_model="numpy", nogil=True)
    return compiler(names["block"])


def run(block: Any, weights: int, *arguments: Any) -> None:
    """Call a block function on all chunks, by as many threads as the weights are worth.

    One thread is this one: numba starts its own only where they are needed, since a process that
    has them can no longer be forked into such that use them.
    """
    worth = 1 if _forked else min(numba.config.NUMBA_NUM_THREADS, weights // WORTH_A_THREAD)  # type: ignore[attr-defined]
    if worth <= 1:
        _loop(parallel=False)(block, *arguments)
        return
    with _running:
        loop, own = _loop(parallel=True), numba.get_num_threads()
        numba.set_num_threads(min(own, worth))
        try:
            loop(block, *arguments)
        finally:
            numba.set_num_threads(own)


@functools.cache
def _loop(*, parallel: bool) -> Any:
    """Return the loop over chunks, compiled."""
    signature = types.void(types.FunctionType(BLOCK), *BLOCK.args[:5], TABLE)

    def loop(
        block: Any, fixed: Any, given: Any, counts: Any, discounts: Any, sums: Any, chunks: Any
    ) -> None:
        for index in numba.prange(len(chunks)):
            block(
                fixed,
                given,
                counts,
                discounts,
                sums,
                np.int64(index),  # of a parallel loop it is unsigned
                chunks[index, 0],
                chunks[index, 1],
                chunks[index, 2],
                chunks[index, 3],
            )

    return numba.njit(signature, parallel=parallel, nogil=True)(loop)
