"""CuPy: the step in one pass, over a copy of as many bytes and over a plain kernel made alike."""

from collections.abc import Callable, Iterator
from typing import Any

from metaopt_kernels import MetaOptimizer
from metaopt_kernels.gpu import Gpu

from benchmarks.contenders import Contender, Shapes
from benchmarks.contenders.numpy_steps import PAIRS
from benchmarks.contenders.plain import PlainSteps
from benchmarks.contenders.shapes import LARGE

try:
    import cupy

    cupy.cuda.runtime.getDeviceCount()
except ImportError:
    msg = "Nothing to measure: cupy is not installed."
    raise SystemExit(msg) from None
except cupy.cuda.runtime.CUDARuntimeError as error:
    msg = f"Nothing to measure: CuPy finds no GPU ({error})."
    raise SystemExit(msg) from None

NOTE = (
    "(here each time is of ten steps, launched without waiting as in training) a copy on the "
    "device that reads and writes as many bytes, 36 a weight, so that 1 / ratio is the share of a "
    "copy's bandwidth; or the rule at a fixed step size by a kernel made the same way. "
    f"{cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()}"
)
PACKAGES = ("numpy",)
PROBLEMS = LARGE


def steps(shapes: Shapes) -> Iterator[Contender]:
    """Yield a copy, then each pair with what it is compared with; all wait for the device."""
    random = cupy.random.RandomState(0)
    grads = {name: random.standard_normal(shape, "float32") for name, shape in shapes.items()}
    weights = sum(grad.size for grad in grads.values())
    source, target = (cupy.zeros(36 * weights // 8, dtype="float32") for _ in range(2))
    yield Contender("copy", waiting(lambda: cupy.copyto(target, source)), reference=True)
    yield Contender(
        "AdamW + Lion, scalar, one pass", fused(*PAIRS["AdamW + Lion"], "scalar", grads)
    )
    for pair, (base, meta) in PAIRS.items():
        plain = PlainSteps(Gpu(cupy), base, grads)
        name = f"{pair.split(' + ')[0]}, fixed, one pass"
        yield Contender(name, waiting(plain.step), reference=True)
        for blocks in ("scalar", "tensor", "node") if pair == "AdamW + Lion" else ("scalar",):
            yield Contender(f"{pair}, {blocks}, one pass", fused(base, meta, blocks, grads))


def fused(base: Any, meta: Any, blocks: str, grads: dict[str, Any]) -> Callable[[], object]:
    """Return a function that makes one step of MetaOptimize in one pass."""
    params = {name: cupy.zeros_like(grad) for name, grad in grads.items()}
    opt = MetaOptimizer(params, base=base, meta=meta, blocks=blocks, fused=True, discount=1.0)
    return waiting(lambda: opt.step(grads))


def waiting(step: Callable[[], object]) -> Callable[[], object]:
    """Return ten steps, launched one after the other, that end when the device has."""

    def run() -> None:
        for _ in range(10):
            step()
        cupy.cuda.get_current_stream().synchronize()

    return run
