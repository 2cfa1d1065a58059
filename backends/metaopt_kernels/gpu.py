"""Kernels for CuPy arrays, CUDA compiled from the traced source.

A step launches kernels on the current stream and waits for nothing. What changes from step to step
is passed by value, so that no table has to be copied to the device.
"""

from typing import Any

import numpy as np

from metaopt.tracer import C
from metaopt_kernels.programs import GIVEN, OF_BLOCKS, ROW, Traced

__all__ = ["Gpu", "source"]

#: Leaves of one launch: a kernel's arguments may have 4096 bytes, and a leaf's take 48.
ROWS = 64
#: The struct that a launch is passed by value, as CuPy takes one: in an array of one entry.
AT = np.dtype([("at", ROW, ROWS)])
#: Threads of a block, a power of two.
THREADS = 256

HEADER = """\
struct Row {{ long long {given}; double lr; }};
struct Rows {{ Row at[{rows}]; }};

// the sum over the threads of a block, in the first of them
__device__ double summed(double mine)
{{
    __shared__ double parts[{threads}];
    __syncthreads();  // until all have read the sum of before
    parts[threadIdx.x] = mine;
    __syncthreads();
    for (int width = {threads} / 2; width > 0; width /= 2) {{
        if (threadIdx.x < width) parts[threadIdx.x] += parts[threadIdx.x + width];
        __syncthreads();
    }}
    return parts[0];
}}
"""

STEP = """
// steps the weights of a chunk, and sums their products
extern "C" __global__ void step(
    const Rows rows, const int row_0, const int leaves, const long long* fixed, const int* counts,
    const long long* chunks, double* sums, {discounts})
{{
    const long long* chunk = chunks + 4 * (long long)blockIdx.x;
    const int leaf = (int)chunk[0];
    const long long start = chunk[1], n = chunk[2] - chunk[1];
    const Row row = rows.at[leaf - row_0];
    {totals}
    if (row.grad) {{
        {inputs}
        {once}
        for (long long i = threadIdx.x; i < n; i += {threads}) {{
            {loads}
            {each}
            {stores}
        }}
    }}
    {sums}
}}

// counts the step of every leaf that had a gradient
extern "C" __global__ void advance(
    const Rows rows, const int row_0, const int leaves, int* counts)
{{
    const int leaf = row_0 + (int)threadIdx.x;
    if (leaf < leaves && rows.at[threadIdx.x].grad) counts[leaf] += 1;
}}
"""

GATHER = """
// adds up the sums of each meta-gradient's chunks, for every discount
extern "C" __global__ void gather(
    const double* sums, const int horizons, const int size, const long long* order,
    const long long* ends, {beta}* z)
{{
    const int horizon = blockIdx.x / size, block = blockIdx.x % size;
    double mine = 0;
    for (long long i = ends[block] + threadIdx.x; i < ends[block + 1]; i += {threads})
        mine += sums[order[i] * horizons + horizon];
    const double sum = summed(mine);
    if (threadIdx.x == 0) z[blockIdx.x] = ({beta})sum;
}}
"""


def source(traced: Traced, compute: str, *, per_weight: bool) -> str:
    """Return the source of the kernels `step`, for a chunk of a leaf a block, and `advance`."""
    horizons = range(len(traced.products))
    products = [f"product{horizon}" for horizon in horizons] if per_weight else []
    fixed = [*(name for name in traced.arrays if name not in GIVEN), *products]
    wide = C.dtypes[compute]
    numbers = {
        "lr": f"row.lr_at ? *(const {wide}*)row.lr_at : ({wide})row.lr",
        "count": "counts[leaf]",
    }
    numbers |= {f"discount{horizon}": f"({wide})discount{horizon}_" for horizon in horizons}
    inputs = []
    for name, dtype in (traced.arrays | traced.shared | dict.fromkeys(products, compute)).items():
        kind = C.dtypes[dtype]
        if name in numbers:
            inputs.append(f"const {kind} {name} = {numbers[name]};")
            continue
        told = name in GIVEN
        at = f"row.{name}" if told else f"fixed[{fixed.index(name)} * leaves + leaf]"
        offset = "chunk[3]" if name in OF_BLOCKS else "start"
        constant = "const " if told else ""
        pointer = f"({constant}{kind}*){at} + {offset}"
        if name in traced.shared:
            inputs.append(f"const {kind} {name} = *({pointer});")
        else:
            inputs.append(f"{constant}{kind}* {name}_ = {pointer};")
    stores = [f"{name}_[i] = {C.written(value)};" for name, value in traced.written.items()]
    stores += [
        f"product{horizon}_[i] = {product};" if per_weight else f"total{horizon} += {product};"
        for horizon, product in enumerate(map(C.written, traced.products))
    ]
    totals = ", ".join(f"total{horizon} = 0" for horizon in horizons)
    sums = [
        f"const double sum{horizon} = summed(total{horizon});\n    "
        f"if (threadIdx.x == 0) sums[(long long)blockIdx.x * {len(horizons)} + {horizon}] = "
        f"sum{horizon};"
        for horizon in horizons
    ]
    include = "#include <cuda_fp16.h>\n" if "float16" in traced.arrays.values() else ""
    loads = (
        f"const {C.dtypes[dtype]} {name} = {name}_[i];" for name, dtype in traced.arrays.items()
    )
    return (
        include
        + _header()
        + STEP.format(
            threads=THREADS,
            discounts=", ".join(f"const double discount{horizon}_" for horizon in horizons),
            totals=f"{wide} {totals};",
            sums="\n    ".join(sums),
            inputs="\n        ".join(inputs),
            once="\n        ".join(C.lines(traced.program.once)),
            loads="\n            ".join(loads),
            each="\n            ".join(C.lines(traced.program.each)),
            stores="\n            ".join(stores),
        )
    )


def _header() -> str:
    return HEADER.format(given=", ".join(GIVEN), rows=ROWS, threads=THREADS)


class Gpu:
    """Runs traced steps on CuPy arrays.

    Parameters
    ----------
    cupy : module
    """

    #: Weights that a block steps, 32 a thread: enough blocks for every processor of a device.
    chunk = 8192
    dtypes = ("float16", "float32", "float64")

    def __init__(self, cupy: Any) -> None:
        self.xp = cupy
        self._compiled: dict[str, Any] = {}

    def _functions(self, text: str, *names: str) -> Any:
        if text not in self._compiled:
            module = self.xp.RawModule(code=text, options=("--std=c++17",))
            self._compiled[text] = [module.get_function(name) for name in names]
        return self._compiled[text]

    def kernel(self, traced: Traced, compute: str, *, per_weight: bool) -> Any:
        """Return the kernels of a traced step, compiled."""
        text = source(traced, compute, per_weight=per_weight)
        return self._functions(text, "step", "advance")

    def table(self, array: Any) -> Any:
        """Return a table of integers where kernels read it."""
        return self.xp.asarray(array, dtype=self.xp.int64)

    def blocks(self, blocks: Any, size: int) -> Any:
        """Return the order of chunks by block, and where each block begins and the last ends."""
        order = np.argsort(blocks, kind="stable")
        return self.table(order), self.table(np.searchsorted(blocks[order], np.arange(size + 1)))

    def run(self, kernel: Any, group: Any, given: Any, discounts: Any) -> None:
        """Step the leaves of a group."""
        step, advance = kernel
        leaves, done = len(group.names), 0
        for row_0 in range(0, leaves, ROWS):
            stop = min(row_0 + ROWS, leaves)
            rows = np.zeros(1, dtype=AT)
            rows["at"][0, : stop - row_0] = given[row_0:stop]
            span = np.int32(row_0), np.int32(leaves)
            end = int(group.ends[stop - 1])
            if end > done:
                step(
                    (end - done,),
                    (THREADS,),
                    (
                        rows,
                        *span,
                        group.fixed,
                        group.counts,
                        group.chunks[done:end],
                        group.sums[done:end],
                        *discounts,
                    ),
                )
            advance((1,), (ROWS,), (rows, *span, group.counts))
            done = end

    def gathered(self, groups: Any, horizons: int, size: int, dtype: Any) -> Any:
        """Return the sums of all chunks by horizon and block."""
        xp = self.xp
        total = xp.zeros((horizons, size), dtype=dtype)
        sizes = np.int32(horizons), np.int32(size)
        beta = C.dtypes["float64" if dtype == xp.float64 else "float32"]
        text = _header() + GATHER.format(beta=beta, threads=THREADS)
        (gather,) = self._functions(text, "gather")
        for group in groups if size else ():
            part = total if group is groups[0] else xp.zeros_like(total)
            gather((horizons * size,), (THREADS,), (group.sums, *sizes, *group.blocks, part))
            total = total if part is total else total + part
        return total
