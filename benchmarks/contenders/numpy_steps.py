"""NumPy: the core's step, and the one of `metaopt_cupy` in one pass through numba.

The core is compared with the very rule at a fixed step size, in NumPy. The step in one pass is
compared with that of an AdamW whose kernel is made the same way, and with torch's fused AdamW.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import metaopt as mo
from contenders import Contender, Shapes
from contenders.plain import PlainSteps
from metaopt.rules.move import move

NOTE = (
    "the same rule at a fixed step size, in NumPy; for rows through numba, torch's fused AdamW where "
    "it is installed, then a plain AdamW whose kernel is made the same way"
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
            opt = mo.MetaOptimize(base=base, meta=meta, blocks=blocks)
            yield Contender(f"{pair}, {blocks}", meta_step(opt, grads))
    if "numba" not in PACKAGES:
        return
    references = [("AdamW, plain, numba", PlainSteps(mo.AdamW(weight_decay=0.1), grads).step)]
    if "torch" in PACKAGES:
        references.insert(0, ("AdamW, torch, fused", torch_step(grads)))
    for name, reference in references:
        yield Contender(name, reference, reference=True)
        for pair, (base, meta) in PAIRS.items():
            for blocks in ("scalar", "tensor", "node") if pair == "AdamW + Lion" else ("scalar",):
                yield Contender(f"{pair}, {blocks}, numba", fused_step(base, meta, blocks, grads))


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
            params[name] = params[name] - move(params[name], direction, lr, rule.weight_decay).delta

    return step

    return step


def meta_step(opt: mo.MetaOptimize, grads: dict[str, Any]) -> Callable[[], None]:
    """Return a function that makes one step of MetaOptimize."""
    params = {name: np.zeros_like(grad) for name, grad in grads.items()}
    state = opt.init(params)

    def step() -> None:
        nonlocal params, state
        params, state = opt.step(params, grads, state)

    return step
