"""Hessian-vector products: by double backward, or from gradients of displaced parameters."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.step import Reduce
from metaopt_torch.shards import local

__all__ = [
    "ADVICE",
    "CHOICES",
    "RandomState",
    "by_autograd",
    "by_central_difference",
    "check_graph",
]

CHOICES = ("autograd", "central")
#: What to do where a second backward pass fails.
ADVICE = (
    'Construct the optimizer with `hvp="central"` and pass a closure to `step`: central '
    "differences of gradients work everywhere, for two more gradients a block. Or make second "
    "derivatives possible: attention by SDPBackend.MATH, a model that is not compiled, parameters "
    "that are not sharded by FSDP."
)

Arrays = Mapping[str, Tensor]


def check_graph(grads: Arrays) -> None:
    """Raise RuntimeError where a function has no second derivative and autograd would not say so.

    What is marked `once_differentiable` is left out of a second backward pass in silence.
    """
    seen: set[Any] = set()
    waiting = [grad.grad_fn for grad in grads.values()]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            msg = f"The gradients could not be differentiated: a function allows it once.\n{ADVICE}"
            raise RuntimeError(msg)
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]


def by_autograd(grads: Arrays, params: Arrays) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return `hvp` and `third` from gradients that a backward pass left with their graph.

    Leaves without a gradient are not looked at. Their products are None.
    """
    names = list(grads)
    leaves = [params[name] for name in names]

    def along(outputs: Sequence[Tensor], tangent: Arrays, *, graph: bool) -> list[Tensor]:
        """Return the derivative, along a tangent, of what the outputs are the gradient of."""
        pairs = [
            (output, tangent[name].to(output.dtype))
            for name, output in zip(names, outputs, strict=True)
            if output.requires_grad  # the others do not depend on the parameters
        ]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in leaves]
        try:
            with torch.enable_grad():
                found = torch.autograd.grad(
                    [output for output, _ in pairs],
                    leaves,
                    grad_outputs=[vector for _, vector in pairs],
                    retain_graph=True,
                    create_graph=graph,
                    materialize_grads=True,
                )
        except (RuntimeError, NotImplementedError) as error:
            msg = f"The gradients could not be differentiated: {error}\n{ADVICE}"
            raise RuntimeError(msg) from error
        return list(found)

    def stacked(columns: Sequence[Sequence[Any]], like: Mapping[str, Any]) -> dict[str, Any]:
        found = {
            name: torch.stack([column[index] for column in columns])
            for index, name in enumerate(names)
        }
        return {name: found.get(name) for name in like}

    def column(tangents: Arrays, index: int) -> dict[str, Tensor]:
        return {name: tangents[name][index] for name in names}

    outputs = [grads[name] for name in names]

    def hvp(tangents: Arrays) -> dict[str, Any]:
        count = len(tangents[names[0]])
        return stacked(
            [along(outputs, column(tangents, j), graph=False) for j in range(count)], tangents
        )

    def third(us: Arrays, vs: Arrays) -> dict[str, Any]:
        count = len(us[names[0]])
        rows = []
        for j in range(count):
            products = along(outputs, column(us, j), graph=True)
            rows.append(
                stacked([along(products, column(vs, k), graph=False) for k in range(count)], us)
            )
        return {
            name: None if name not in names else torch.stack([row[name] for row in rows])
            for name in us
        }

    return hvp, third


def by_central_difference(
    closure: Callable[[], Any],
    params: Arrays,
    grads: Arrays,
    random: "RandomState",
    reduce: Reduce | None,
) -> Callable[..., Any]:
    """Return `hvp` from gradients of displaced parameters.

    Parameters
    ----------
    closure : callable
        Computes the loss and its gradients anew, as `torch.optim.Optimizer.step` takes it.
    params : mapping of leaf name to parameter
    grads : mapping of leaf name to tensor
        Of the leaves to differentiate.
    random : RandomState
        That from before the closure was first called: each time it draws the same numbers.
    reduce : callable, optional
        As `MetaOptimize.step` takes it.
    """
    held = {name: local(param).clone() for name, param in params.items()}
    kept = {name: param.grad for name, param in params.items()}

    def gradients(displaced: Arrays) -> dict[str, Any]:
        for name, param in params.items():
            local(param).copy_(displaced[name])
            param.grad = None
        with torch.enable_grad(), random.again():
            closure()
        return {
            name: None if name not in grads or param.grad is None else local(param.grad).clone()
            for name, param in params.items()
        }

    derivative = mo.curvature.central_difference(gradients, held, reduce=reduce)

    def hvp(tangents: Arrays) -> Any:
        with _restored(params, held, kept):
            return derivative(tangents)

    return hvp


@contextmanager
def _restored(params: Arrays, held: Arrays, kept: Mapping[str, Any]) -> Iterator[None]:
    """Put values and gradients back, whatever happens."""
    try:
        yield
    finally:
        for name, param in params.items():
            local(param).copy_(held[name])
            param.grad = kept[name]


class RandomState:
    """The state of the random number generators, to draw the same numbers again.

    Parameters
    ----------
    devices : iterable of device
        Those beside the CPU.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = [device for device in devices if device.type == "cuda"]
        self._cpu = torch.get_rng_state()
        self._others = [torch.cuda.get_rng_state(device) for device in self._devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw from this state on, and afterwards go on as if nothing had been drawn."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._others, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
