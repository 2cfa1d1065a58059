"""A rule at a fixed step size, as a kernel that is made like those of `metaopt_kernels`."""

from typing import Any

import numpy as np
from metaopt_kernels.chunks import cut
from metaopt_kernels.memory import address
from metaopt_kernels.pool import Group
from metaopt_kernels.programs import ROW, Spec, Traced

from metaopt.tracer import Program, Scalar

__all__ = ["PlainSteps"]


def traced(rule: Any) -> Traced:
    """Return the step of a rule in float32, without a trace; the discount is its count."""
    program = Program()
    slots = {slot: f"slot{index}" for index, slot in enumerate(rule.slots)}
    names = ("param", "grad", *slots.values())
    arrays: dict[str, Any] = {
        name: program.variable(name, "float32", varies=True) for name in names
    }
    lr, count = (program.variable(name, "float32", varies=False) for name in ("lr", "discount0"))
    inner = {slot: arrays[name] for slot, name in slots.items()}
    direction, after = rule.direction(arrays["grad"], inner, count)
    step = direction + rule.weight_decay * arrays["param"]
    written: dict[str, Scalar] = {"param": arrays["param"] - lr * step}
    written |= {name: after[slot] for slot, name in slots.items()}
    nothing = program.constant(0.0, "float32")
    used = program.prune(written.values())
    shared: dict[str, str] = {name: "float32" for name in ("lr", "discount0") if name in used}
    return Traced(program, dict.fromkeys(names, "float32"), shared, written, [nothing])


class PlainSteps:
    """Steps of a rule at the step size 1e-4, on parameters of zeros.

    Parameters
    ----------
    engine : metaopt_kernels.cpu.Cpu or metaopt_kernels.gpu.Gpu
    rule : Rule
    grads : mapping of name to array, float32
    """

    def __init__(self, engine: Any, rule: Any, grads: dict[str, Any]) -> None:
        xp, leaves = engine.xp, len(grads)
        self._engine, self._grads, self._count = engine, grads, 0
        self._arrays = [
            [xp.zeros_like(grad) for _ in range(1 + len(rule.slots))] for grad in grads.values()
        ]
        pieces = [cut(g.shape, (), engine.chunk, per_weight=False) for g in grads.values()]
        table = np.concatenate([np.insert(part, 0, i, axis=1) for i, part in enumerate(pieces)])
        fixed = np.array([[address(array) for array in row] for row in self._arrays]).T
        self._kernel = engine.kernel(traced(rule), "float32", per_weight=False)
        nothing = np.zeros(leaves, dtype=np.int64)
        self._group = Group(
            names=list(grads),
            weights=sum(grad.size for grad in grads.values()),
            spec=Spec(rule, "float32", "float32", "float32", "float32", False, "trace"),
            fixed=engine.table(np.ascontiguousarray(fixed)),
            counts=xp.zeros(leaves, dtype=xp.int32),
            chunks=engine.table(table),
            ends=np.cumsum([len(part) for part in pieces]),
            blocks=None,
            sums=xp.zeros((len(table), 1), dtype=xp.float64),
            own=nothing,
            sizes=nothing,
            starts=nothing,
        )

    def step(self) -> None:
        """Make a step."""
        self._count += 1
        given = np.zeros(len(self._grads), dtype=ROW)
        given["grad"] = [address(grad) for grad in self._grads.values()]
        given["lr"] = 1e-4
        self._engine.run(self._kernel, self._group, given, np.array([float(self._count)]))

    def params(self) -> list[Any]:
        """Return the parameters, in the order of the gradients."""
        return [row[0] for row in self._arrays]
