"""Hessian-vector products: by double backward, or from gradients of displaced parameters."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.step import Reduce
from metaopt_torch.shards import local

__all__ = [
    "CHOICES",
    "DoubleBackward",
    "RandomState",
    "by_central_difference",
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


class DoubleBackward:
    """Gradients that `MetaOptimizer.backward` made, to be differentiated again."""

    def __init__(self) -> None:
        #: Gradients made since the last step, and the version of each.
        self._made: list[tuple[weakref.ref[Tensor], int]] = []
        self._checked = False

    def add(self, loss: Tensor, params: Sequence[Tensor]) -> None:
        """Add to the parameters' gradients those of a loss, with their graph."""
        if not isinstance(loss, Tensor):
            msg = f"`loss` must be a tensor; got {type(loss).__name__}."
            raise TypeError(msg)
        if loss.numel() != 1:
            msg = f"`loss` must be one number; got shape {tuple(loss.shape)}."
            raise ValueError(msg)
        leaves = [param for param in params if param.requires_grad]
        if not leaves:
            msg = (
                f"`loss` has no gradient: of {len(params)} parameters of this "
                "optimizer none requires one. Call `requires_grad_()` on those that are to move."
            )
            raise ValueError(msg)
        found: Sequence[Tensor | None] = [None]
        if loss.requires_grad:
            found = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        if all(grad is None for grad in found):
            why = "on others alone" if loss.requires_grad else "on nothing that requires a gradient"
            msg = (
                f"`loss` must depend on a parameter of this optimizer; got one that depends {why}. "
                "Compute it from the parameters that the optimizer was given, outside of "
                "`torch.no_grad`."
            )
            raise ValueError(msg)
        self._made = [known for known in self._made if known[0]() is not None]
        for param, grad in zip(leaves, found, strict=True):
            if grad is not None:
                param.grad = grad if param.grad is None else param.grad + grad
                self._made.append((weakref.ref(param.grad), param.grad._version))

    def derivatives(
        self, grads: Arrays, params: Arrays
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return `hvp` and `third` from these gradients."""
        # those of a loss without second derivatives have no graph, wherever they come from
        made = {(id(grad()), version) for grad, version in self._made}
        own = [params[name].grad for name in grads]
        constant = all(grad is not None and (id(grad), grad._version) in made for grad in own)
        if not constant and not any(grad.requires_grad for grad in grads.values()):
            msg = (
                '`curvature="exact"` needs gradients that can be differentiated; that of '
                f"{next(iter(grads))!r} has no graph. Call `optimizer.backward(loss)` in place of "
                "`loss.backward()`; and where gradients are constants, change none of them in "
                f"place before the step. {ADVICE}"
            )
            raise ValueError(msg)
        if not self._checked:
            _check_graph(grads)
            self._checked = True
        return _by_autograd(grads, params)

    def release(self, params: Iterable[Tensor]) -> None:
        """Let go of the graph, which holds all activations of the forward pass."""
        self._made = []
        for param in params:
            if param.grad is not None and param.grad.requires_grad:
                param.grad = param.grad.detach()


def _check_graph(grads: Arrays) -> None:
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


def _by_autograd(grads: Arrays, params: Arrays) -> tuple[Callable[..., Any], Callable[..., Any]]:
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

    def column(tangents: Arrays, index: int) -> dict[str, Tensor]:
        return {name: tangents[name][index] for name in names}

    def products(outputs: Sequence[Tensor], tangents: Arrays) -> dict[str, Tensor]:
        """Return derivatives along all tangents, stacked."""
        count = len(tangents[names[0]])
        columns = [along(outputs, column(tangents, j), graph=False) for j in range(count)]
        return {name: torch.stack([c[i] for c in columns]) for i, name in enumerate(names)}

    outputs = [grads[name] for name in names]

    def hvp(tangents: Arrays) -> dict[str, Tensor | None]:
        return {**dict.fromkeys(tangents), **products(outputs, tangents)}

    def third(us: Arrays, vs: Arrays) -> dict[str, Tensor | None]:
        rows = []
        for j in range(len(us[names[0]])):
            rows.append(products(along(outputs, column(us, j), graph=True), vs))
        return {
            **dict.fromkeys(us),
            **{name: torch.stack([row[name] for row in rows]) for name in names},
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
    # the closure works on the parameters themselves: they are displaced, and put back
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
