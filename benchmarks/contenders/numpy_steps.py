"""NumPy: the core's step, and the one of `metaopt_kernels` in one pass through numba.

The core is compared with the very rule at a fixed step size, in NumPy; the step in one pass with
torch's fused AdamW, where that is installed, and with the rule as a kernel that is made alike.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from metaopt_kernels import MetaOptimizer

import metaopt as mo
from benchmarks.contenders import Contender, Shapes
from benchmarks.contenders.plain import PlainSteps

NOTE = (
    "the same rule at a fixed step size, in NumPy; for rows through numba torch's fused AdamW, or "
    "the same rule at a fixed step size by a kernel made the same way"
)
PACKAGES = tuple(
    name for name in ("numpy", "numba", "torch") if importlib.util.find_spec(name) is not None
)

PAIRS: dict[str, tuple[Any, Any]] = {
    "AdamW + Lion": (mo.AdamW(weight_decay=0.1), mo.Lion()),
    "Lion + Lion": (mo.Lion(weight_decay=0.1), mo.Lion()),
    "RMSprop + Adam": (mo.RMSprop(weight_decay=0.1), mo.AdamW()),
    "SGD momentum + Adam": (mo.SGD(momentum=0.9, weight_decay=0.1), mo.AdamW()),
}


def steps(shapes: Shapes) -> Iterator[Contender]:
    """Yield the plain rule of each pair and what is compared with it."""
    rng = np.random.default_rng(0)
    grads = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for pair, (base, meta) in PAIRS.items():
        yield Contender(f"{pair.split(' + ')[0]}, fixed", plain_step(base, grads), reference=True)
        for blocks in ("scalar", "tensor") if pair == "AdamW + Lion" else ("scalar",):
            opt = mo.MetaOptimize(base=base, meta=meta, blocks=blocks, discount=1.0)
            yield Contender(f"{pair}, {blocks}", meta_step(opt, grads))
    if "numba" not in PACKAGES:
        return
    if "torch" in PACKAGES:
        yield Contender("AdamW, torch, fused", torch_step(grads), reference=True)
        for blocks in ("scalar", "tensor", "node"):
            step = fused_step(*PAIRS["AdamW + Lion"], blocks, grads)
            yield Contender(f"AdamW + Lion, {blocks}, numba", step)
    engine = importlib.import_module("metaopt_kernels.cpu").Cpu()
    for pair, (base, meta) in PAIRS.items():
        plain = PlainSteps(engine, base, grads)
        yield Contender(f"{pair.split(' + ')[0]}, fixed, numba", plain.step, reference=True)
        yield Contender(f"{pair}, scalar, numba", fused_step(base, meta, "scalar", grads))


def plain_step(rule: Any, grads: dict[str, Any]) -> Callable[[], None]:
    """Return a function that makes one step of the rule at a fixed step size."""
    lr = np.float32(1e-4)
    params = {name: np.zeros_like(grad) for name, grad in grads.items()}
    slots = {
        name: {slot: np.zeros_like(grad) for slot in rule.slots} for name, grad in grads.items()
    }
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        for name, grad in grads.items():
            direction, slots[name] = rule.direction(grad, slots[name], np.asarray(count, "float32"))
            step = direction + rule.weight_decay * params[name] if rule.weight_decay else direction
            params[name] = params[name] - lr * step

    return step


def meta_step(opt: mo.MetaOptimize, grads: dict[str, Any]) -> Callable[[], None]:
    """Return a function that makes one step of MetaOptimize."""
    params = {name: np.zeros_like(grad) for name, grad in grads.items()}
    state = opt.init(params)

    def step() -> None:
        nonlocal params, state
        params, state = opt.step(params, grads, state)

    return step


def torch_step(grads: dict[str, Any]) -> Callable[[], object]:
    """Return a function that makes one step of torch's fused AdamW."""
    torch = importlib.import_module("torch")
    params = [torch.zeros(grad.shape) for grad in grads.values()]
    for param, grad in zip(params, grads.values(), strict=True):
        param.grad = torch.from_numpy(grad.copy())
    step: Callable[[], object] = torch.optim.AdamW(params, weight_decay=0.1, fused=True).step
    return step


def fused_step(base: Any, meta: Any, blocks: str, grads: dict[str, Any]) -> Callable[[], object]:
    """Return a function that makes one step of MetaOptimize in one pass."""
    params = {name: np.zeros_like(grad) for name, grad in grads.items()}
    opt = MetaOptimizer(params, base=base, meta=meta, blocks=blocks, fused=True, discount=1.0)
    return lambda: opt.step(grads)
