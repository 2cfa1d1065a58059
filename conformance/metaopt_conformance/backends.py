"""What the suite asks of an array library, and how it finds one.

A backend is a `Backend`, of which most is told by the defaults. It is found by name, as
`module:attribute`, or under the entry point group "metaopt_conformance.backends".
"""

import contextlib
import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from metaopt_conformance.table import counterpart

__all__ = ["BACKENDS", "DTYPES", "Backend", "UnavailableError", "find", "names"]

GROUP = "metaopt_conformance.backends"
DTYPES = ("float64", "float32", "float16", "bfloat16")


class UnavailableError(Exception):
    """A backend that cannot run here; the message says why."""


def _same(tree: Any) -> Any:
    return tree


@dataclass(frozen=True, kw_only=True)
class Backend:
    """An array library under test.

    Parameters
    ----------
    name : str
    asarray : callable
        From a NumPy array and a device, None for the default one, to an array of the library.
    to_numpy : callable
        Back to NumPy, whatever the device; bfloat16 as float32.
    dtypes : tuple of str, default ("float64", "float32")
        Those to check, of "float64", "float32", "float16" and "bfloat16", at least one. Without
        "float64" what is compared in that alone is skipped: whole runs, traces, laws.
    devices : callable, default none
        Returns the names of devices that can be asked for.
    compile : callable or None, default None
        Compiles a pure function of nested mappings of arrays, as `jax.jit` does.
    differentiate : callable or None, default None
        From a function of a mapping of arrays to a 0-d array, to a function that returns its
        gradient as a mapping of arrays; can be nested.
    settle : callable, default identity
        Computes what is lazy; the suite calls it after every step.
    optimizer : callable or None, default None
        From a `metaopt.MetaOptimize` and params to an adapter to check as well: an object with
        `params()`, by name; `state()`, a `metaopt.State`; and `step(grads, lr, hvp)`, to which the
        suite passes by name what `metaopt.MetaOptimize.step` takes. Where `step` has parameters
        `third`, `hessian_diagonal` and `meta_grads` too, or takes any keyword, these are passed as
        well; where not, the cases that need them are skipped. It may change params in place: they
        are its own.
    wrapped : callable or None, default None
        The same of the library's own optimizers, of the rules of the configuration, that have been
        wrapped. It raises `Skip` where the library has none, or what is asked needs a formula.
    plain : callable or None, default None
        From a `metaopt` rule and params to a function from gradients and a step size to the params
        after a step of the library's own optimizer, or None where it has no such rule; it is then
        asked once more without weight decay.
    slow : bool, default False
        Take the quick part for the whole: for libraries in which a step of a dozen numbers takes a
        tenth of a second.
    slow_optimizer : bool, default False
        Take the quick part for the whole of `optimizer`'s and `wrapped`'s: where they are compiled
        for every case.

    Raises
    ------
    ValueError
        If `dtypes` is not as described.
    """

    name: str
    asarray: Callable[[Any, Any], Any]
    to_numpy: Callable[[Any], Any]
    dtypes: tuple[str, ...] = ("float64", "float32")
    devices: Callable[[], tuple[str, ...]] = tuple
    compile: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    differentiate: Callable[[Callable[[Any], Any]], Callable[[Any], Any]] | None = None
    settle: Callable[[Any], Any] = _same
    optimizer: Callable[[Any, Any], Any] | None = None
    wrapped: Callable[[Any, Any], Any] | None = None
    plain: Callable[[Any, Mapping[str, Any]], Any] | None = None
    slow: bool = False
    slow_optimizer: bool = False

    def __post_init__(self) -> None:
        if not self.dtypes or not set(self.dtypes) <= set(DTYPES):
            msg = f"`dtypes` must be some of {', '.join(DTYPES)}; got {self.dtypes!r}."
            raise ValueError(msg)


def names() -> tuple[str, ...]:
    """Return the backends that are known by name: those here, and all entry points."""
    points = (point.name for point in entry_points(group=GROUP))
    return tuple(dict.fromkeys([*BACKENDS, *points]))


def find(name: str) -> Backend:
    """Return the backend of this name.

    Parameters
    ----------
    name : str
        One of `BACKENDS`, "module:attribute", or the name of an entry point. An attribute may be a
        backend or a function that returns one.

    Raises
    ------
    UnavailableError
        If the library is not installed.
    LookupError
        If there is no such backend, or it cannot be loaded.
    """
    points = {point.name: point for point in entry_points(group=GROUP)}
    if ":" not in name and name not in names():
        msg = f"`backend` must be one of {', '.join(names())}, or module:attribute; got {name!r}."
        raise LookupError(msg)
    try:
        if name in BACKENDS:
            found: Any = BACKENDS[name]
        else:
            found = points[name].load() if name in points else _attribute(*name.split(":", 1))
        if callable(found):
            found = found()
    except UnavailableError:
        raise
    except Exception as error:  # a module of somebody else's may raise any
        msg = f"`backend` {name!r} cannot be loaded: {type(error).__name__}: {error}"
        raise LookupError(msg) from error
    if not isinstance(found, Backend):
        msg = (
            f"`backend` {name!r} must be a Backend, or a function that returns one; got {found!r}."
        )
        raise LookupError(msg)
    return found


def _attribute(module: str, attribute: str) -> Any:
    return getattr(importlib.import_module(module), attribute)


def _numpy() -> Backend:
    return Backend(
        name="numpy",
        asarray=lambda array, _: np.array(array),
        to_numpy=np.array,
        dtypes=("float64", "float32", "float16"),
        optimizer=_InPlace if _is_installed("metaopt_kernels", "numba") else None,
    )


class _InPlace:
    """The optimizer of `metaopt_kernels`, on copies of the parameters."""

    def __init__(self, opt: Any, params: Mapping[str, Any]) -> None:
        own = {name: param.copy() for name, param in params.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # float16 of NumPy has no kernels
            self._opt = importlib.import_module("metaopt_kernels").from_config(opt, own)
        self.step = self._opt.step

    def params(self) -> Any:
        return self._opt.params

    def state(self) -> Any:
        return self._opt.state


def _is_installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def _strict() -> Backend:
    xp = _imported("array_api_strict", "array-api-strict")
    return Backend(name="strict", asarray=lambda array, _: xp.asarray(array), to_numpy=np.array)


def _torch() -> Backend:
    torch = _imported("torch", "torch")

    def to_numpy(array: Any) -> Any:
        host = array.detach().cpu()
        return np.array((host.float() if host.dtype == torch.bfloat16 else host).numpy())

    def asarray(array: Any, device: Any) -> Any:
        return torch.tensor(np.asarray(array), device=device)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        torch._dynamo.reset()  # else what earlier cases left counts as recompilation
        fast = torch.compile(function, fullgraph=True)

        def run(*arguments: Any) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, of deprecations of its own
                return fast(*arguments)

        return run

    return Backend(
        name="torch",
        asarray=asarray,
        to_numpy=to_numpy,
        dtypes=("float64", "float32", "float16", "bfloat16"),
        devices=lambda: ("cpu", *(("cuda",) if torch.cuda.is_available() else ())),
        compile=compiled if torch.cuda.is_available() or _has_cpp_compiler() else None,
        differentiate=torch.func.grad,
        optimizer=_adapter("torch_adapter", "Optimizer"),
        wrapped=_adapter("torch_adapter", "Wrapped"),
        plain=lambda rule, params: _torch_optimizer(torch, rule, params),
    )


def _has_cpp_compiler() -> bool:
    """Say whether Inductor will find a compiler for the CPU."""
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ([named] if named else ["g++", "clang++", "cl"]))


def _torch_optimizer(torch: Any, rule: Any, params: Mapping[str, Any]) -> Any:
    found = counterpart("torch", rule)
    if found is None:
        return None
    name, options = found
    leaves = {leaf: param.clone().requires_grad_() for leaf, param in params.items()}
    theirs = getattr(torch.optim, name)(leaves.values(), **options)
    for leaf in leaves.values() if options.get("momentum") else ():
        # else torch starts it with the whole first gradient
        theirs.state[leaf]["momentum_buffer"] = torch.zeros_like(leaf)

    def step(grads: Mapping[str, Any], lr: float) -> Any:
        theirs.param_groups[0]["lr"] = lr
        for name, leaf in leaves.items():
            leaf.grad = grads[name]
        theirs.step()
        return {name: leaf.detach().clone() for name, leaf in leaves.items()}

    return step


def _jax() -> Backend:
    jax = _imported("jax", "jax")
    jax.config.update("jax_enable_x64", True)
    mo = importlib.import_module("metaopt")
    with contextlib.suppress(ValueError):  # registered already
        jax.tree_util.register_dataclass(mo.State)

    def asarray(array: Any, device: Any) -> Any:
        return jax.device_put(np.asarray(array), None if device is None else jax.devices(device)[0])

    return Backend(
        name="jax",
        asarray=lambda array, device: jax.numpy.asarray(asarray(array, device)),
        to_numpy=lambda array: np.array(
            array.astype("float32") if array.dtype == "bfloat16" else array
        ),
        dtypes=("float64", "float32", "float16", "bfloat16"),
        devices=lambda: tuple(dict.fromkeys(device.platform for device in jax.devices())),
        compile=jax.jit,
        differentiate=jax.grad,
        optimizer=_adapter("jax_adapter", "Optimizer"),
        wrapped=_adapter("jax_adapter", "Wrapped"),
        slow_optimizer=True,
        plain=_optax_optimizer,
    )


def _adapter(module: str, name: str) -> Any:
    """Return the adapter here of this name, or None where what it needs is not installed."""
    try:
        return getattr(importlib.import_module(f"metaopt_conformance.{module}"), name)
    except ModuleNotFoundError:
        return None


def _optax_optimizer(rule: Any, params: Mapping[str, Any]) -> Any:
    found = counterpart("optax", rule)
    if found is None:
        return None
    try:
        optax = importlib.import_module("optax")
    except ModuleNotFoundError:
        return None
    name, options = found
    theirs = optax.inject_hyperparams(getattr(optax, name))(1.0, **options)
    current = {"params": dict(params), "state": theirs.init(dict(params))}

    def step(grads: Mapping[str, Any], lr: float) -> Any:
        current["state"].hyperparams["learning_rate"] = lr
        updates, current["state"] = theirs.update(dict(grads), current["state"], current["params"])
        current["params"] = optax.apply_updates(current["params"], updates)
        return current["params"]

    return step


def _cupy() -> Backend:
    cupy = _imported("cupy", "cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        msg = f"CuPy finds no GPU: {error}"
        raise UnavailableError(msg) from error
    return Backend(
        name="cupy",
        asarray=lambda array, _: cupy.asarray(array),
        to_numpy=lambda array: np.array(array.get() if hasattr(array, "get") else array),
        dtypes=("float64", "float32", "float16"),
        optimizer=_InPlace if _is_installed("metaopt_kernels") else None,
    )


def _dask() -> Backend:
    arrays = _imported("dask.array", "dask[array]")
    return Backend(
        name="dask",
        asarray=lambda array, _: arrays.asarray(np.array(array)),
        to_numpy=np.array,
        settle=lambda tree: importlib.import_module("dask").persist(tree)[0],
        slow=True,
    )


def _mlx() -> Backend:
    mx = _imported("mlx.core", "mlx")

    def to_numpy(array: Any) -> Any:
        return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)

    return Backend(
        name="mlx",
        asarray=lambda array, _: mx.array(np.asarray(array)),
        to_numpy=to_numpy,
        # its float64 takes the numbers of Python in float32
        dtypes=("float32", "float16", "bfloat16"),
        optimizer=_adapter("mlx_adapter", "Optimizer"),
    )


def _keras() -> Backend:
    os.environ.setdefault("KERAS_BACKEND", "torch")  # for as long as Keras is not imported
    keras = _imported("keras", "keras")
    name = keras.backend.backend()
    if name not in ("torch", "jax"):
        msg = f"KERAS_BACKEND must be torch or jax; Keras has {name}"
        raise UnavailableError(msg)
    # the arrays are those of its backend, whose core and optimizers have columns of their own
    return replace(
        BACKENDS[name](),
        name="keras",
        optimizer=_adapter("keras_adapter", "Optimizer"),
        slow_optimizer=name == "jax",
        wrapped=None,
        plain=None,
    )


def _imported(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        msg = f"{distribution} is not installed"
        raise UnavailableError(msg) from error


BACKENDS: dict[str, Callable[[], Backend]] = {
    "numpy": _numpy,
    "strict": _strict,
    "torch": _torch,
    "jax": _jax,
    "cupy": _cupy,
    "dask": _dask,
    "mlx": _mlx,
    "keras": _keras,
}
