"""The optimizer object: parameters, state and configuration in one, updated in place."""

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
from array_api_compat import is_torch_array

import metaopt as mo
from metaopt.arrays import is_number, map_leaves, solid
from metaopt.configuration import BASE, META, META_LR, STEP_SIZE, RuleLike
from metaopt.inputs import check_formulas, check_grads, check_meta_grads, multipliers
from metaopt.metaoptimize import check_config
from metaopt_kernels.memory import Layout, check_writable, layout
from metaopt_kernels.pool import Pool
from metaopt_kernels.sharing import device_of, shared

__all__ = ["MetaOptimizer", "from_config"]


class MetaOptimizer:
    """MetaOptimize in place, on arrays of CuPy or NumPy; docs/mathematics.md sections 2 to 11.

    A step passes over memory once: kernels that are generated from the core's own formulas, for
    CuPy in CUDA, for NumPy by numba, compute all of it for each weight, to the core's numbers but
    for rounding. Where a meta-gradient is not finite, though, the trace restarts one step later,
    and what the step in between made of it is lost (section 11). Where there can be no such kernel
    the core makes the step, and `unfused` says why.

    Parameters
    ----------
    params : mapping of name to array, or sequence of arrays
        Real and floating, all on one device; those of a sequence are called "0", "1", and so on.
        Steps write to these very arrays. Tensors of PyTorch are taken as well, by DLPack, as long
        as they stay where they lie.
    base, meta, step_size, meta_lr, discount, blocks, sigma, bounds
        As for `metaopt.MetaOptimize`.
    approximation, curvature, held_out, meta_first, skip_nonfinite, recover
        As for `metaopt.MetaOptimize`; all but the first take more than one pass, and so the core,
        unless they are left at their defaults.
    fused : bool, optional
        True raises ValueError where a leaf cannot have a kernel, False has the core make every
        step. By default there are kernels where there can be; a warning says where a rule or a
        missing package stands against it. Rules of the `scope` "leaf" have none, and are no
        reason to warn.

    Attributes
    ----------
    config : metaopt.MetaOptimize
    unfused : dict of str to str
        Why leaves have no kernel.

    Raises
    ------
    TypeError
        If parameters are not as described.
    ValueError
        If they are on several devices, share memory or cannot be written to, or options do not go
        together.

    Examples
    --------
    >>> import numpy as np
    >>> import metaopt as mo
    >>> params = {"w": np.array([3.0, -2.0])}
    >>> opt = MetaOptimizer(params, base=mo.SGD(), meta=mo.SGD(), step_size=0.1, fused=False)
    >>> for _ in range(100):
    ...     opt.step({"w": params["w"]})  # the gradient of half the squared norm
    >>> bool(abs(params["w"]).max() < 1e-3)
    True
    """

    def __init__(
        self,
        params: Mapping[str, Any] | Sequence[Any],
        *,
        base: RuleLike = BASE,
        meta: RuleLike = META,
        step_size: float | Mapping[str, Any] = STEP_SIZE,
        meta_lr: float = META_LR,
        discount: float | tuple[float, ...] | None = None,
        blocks: Any = "scalar",
        sigma: Any = "exp",
        bounds: Any = None,
        approximation: str = "l",
        curvature: Any = "none",
        held_out: bool = False,
        meta_first: bool = False,
        skip_nonfinite: bool = False,
        recover: bool = False,
        fused: bool | None = None,
    ) -> None:
        config = mo.MetaOptimize(
            base=base,
            meta=meta,
            step_size=step_size,
            meta_lr=meta_lr,
            discount=discount,
            blocks=blocks,
            sigma=sigma,
            bounds=bounds,
            approximation=approximation,
            curvature=curvature,
            held_out=held_out,
            meta_first=meta_first,
            skip_nonfinite=skip_nonfinite,
            recover=recover,
        )
        self._prepare(params, config, fused)

    def _prepare(
        self,
        params: Mapping[str, Any] | Sequence[Any],
        config: mo.MetaOptimize,
        fused: bool | None,
        state: mo.State | None = None,
        stacklevel: int = 3,
    ) -> None:
        check_formulas(
            config.base,
            "hand the steps of an optimizer of your own to `metaopt.MetaOptimize.step` as "
            "`unit_steps`.",
        )
        params_by_name = _named("params", params)
        self._xp, self._params = _adopted(params_by_name)
        self._layouts = {name: layout(param) for name, param in self._params.items()}
        self._tensors = {
            name: (param, param.data_ptr())
            for name, param in params_by_name.items()
            if is_torch_array(param)
        }
        self._by_position = not isinstance(params, Mapping)
        self._fused, self.config = fused, config
        self._pool: Pool | None = None
        with self._device():
            state = config.init(self._params) if state is None else state
            self._plan = config.plan(self._params)
            check_writable(self._params, self._xp)
            chosen = "`fused` is False" if fused is False else _needs_more(config, self._plan)
            missing = "" if chosen else _missing(self._xp)
            self._state, self.unfused = state, dict.fromkeys(self._params, chosen or missing)
            if not chosen and not missing:
                self._pool = self._pooled(state)
                self.unfused = self._pool.unfused
            if self._xp is not np:  # steps may be on other streams than what is made here
                self._xp.cuda.get_current_stream().synchronize()
        if fused and self.unfused:
            name, reason = next(iter(self.unfused.items()))
            msg = f"`fused` is True, but there is no kernel for {name!r}: {reason}."
            raise ValueError(msg)
        if not chosen:
            rules = self._plan.rules  # of which those that want whole leaves get them
            unwanted = {n: why for n, why in self.unfused.items() if not _whole(rules[n])}
            for reason in dict.fromkeys(unwanted.values()):
                msg = f"the core makes steps in place of a kernel: {reason}"
                warnings.warn(msg, stacklevel=stacklevel)

    def _pooled(self, state: mo.State) -> Pool:
        own = {
            part: map_leaves(lambda array: self._xp.array(array, order="C"), getattr(state, part))
            for part in ("slots", "trace", "average")
        }
        engine: Any
        if self._xp is np:
            engine = importlib.import_module("metaopt_kernels.cpu").Cpu()
        else:
            engine = importlib.import_module("metaopt_kernels.gpu").Gpu(self._xp)
        return Pool(self.config, self._plan, self._params, replace(state, **own), engine)

    def _device(self) -> Any:
        """Return what makes the parameters' device the current one."""
        if self._xp is np:
            return contextlib.nullcontext()
        return next(iter(self._params.values())).device

    @property
    def params(self) -> dict[str, Any]:
        """The arrays that steps write to, by name."""
        return dict(self._params)

    @property
    def state(self) -> mo.State:
        """The state in the core's form: the optimizer's own arrays, which the next step changes."""
        return self._state if self._pool is None else self._pool.state

    def step(
        self,
        grads: Mapping[str, Any] | Sequence[Any],
        *,
        lr: Any = 1.0,
        hvp: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
        third: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] | None = None,
        hessian_diagonal: Mapping[str, Any] | None = None,
        meta_grads: Mapping[str, Any] | Sequence[Any] | None = None,
    ) -> None:
        """Make a step: parameters and state change in place, on the current stream.

        Parameters
        ----------
        grads : mapping of name to array or None, or a sequence where `params` was one
            Of the shapes of `params`, any floating dtype of NumPy. Arrays of other libraries on
            the same device are read in place, by DLPack; bfloat16 cannot be. A leaf with None
            rests.
        lr, hvp, third, hessian_diagonal, meta_grads
            As in `metaopt.MetaOptimize.step`.

        Raises
        ------
        ValueError
            If names, shapes or devices do not fit, `lr` is negative, or what `curvature` needs is
            not given, or a parameter lies, or is laid out, otherwise than when the optimizer was
            made.
        TypeError
            If a gradient is no dense, real floating array, or cannot be read.

        Notes
        -----
        These errors come before anything is changed. A meta rule of your own is called once when
        the optimizer is made; what it raises only in a later step, it raises when the parameters
        have moved.
        """
        self._check_params()
        with self._device():
            found, lrs = self._read("grads", grads), self._multipliers(lr)
            if self._pool is None:
                judges = None if meta_grads is None else self._read("meta_grads", meta_grads)
                if hessian_diagonal is not None:
                    hessian_diagonal = self._read("hessian_diagonal", hessian_diagonal)
                params, self._state = self.config.step(
                    self._params,
                    found,
                    self._state,
                    lr=lrs,
                    hvp=hvp,
                    third=third,
                    hessian_diagonal=hessian_diagonal,
                    meta_grads=judges,
                )
                for name, param in self._params.items():
                    param[...] = params[name]
            else:
                check_grads(found, self._params, self._plan.shapes)
                check_meta_grads(meta_grads, self._params, self._plan.shapes, held_out=False)
                self._pool.step(found, lrs)
        self._mark_written(name for name, grad in found.items() if grad is not None)

    def _mark_written(self, names: Iterable[str]) -> None:
        """Tell autograd, or it would go backward through what is no longer there."""
        for name in names:
            if name in self._tensors and not self._tensors[name][0].is_inference():
                sys.modules["torch"].autograd.graph.increment_version(self._tensors[name][0])

    def project(
        self,
        jvp: Callable[
            [Mapping[str, Any], Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, Any]]
        ],
    ) -> None:
        """Project the parameters in place, and push their traces through the projection.

        Parameters
        ----------
        jvp : callable
            As `metaopt.MetaOptimize.project` takes it; `metaopt.projection.elementwise` makes one.

        Raises
        ------
        ValueError, TypeError
            As `metaopt.MetaOptimize.project` does, and where a parameter lies, or is laid out,
            otherwise than when the optimizer was made. Nothing is changed then.
        """
        self._check_params()
        with self._device():
            params, state = self.config.project(self._params, self.state, jvp)
            for name, param in self._params.items():
                param[...] = params[name]
            self._mark_written(self._params)
            if self._pool is None:
                self._state = state
                return
            for kept, new in ((self.state.trace, state.trace), (self.state.average, state.average)):
                for name, array in kept.items():
                    array[...] = new[name]

    def _check_params(self) -> None:
        """Raise where parameters do not lie any more where, and as, steps write to them."""
        for name, param in self._params.items():
            for what, got, was in zip(
                Layout._fields, layout(param), self._layouts[name], strict=True
            ):
                if got != was:
                    msg = (
                        f"`params[{name!r}]` has another {what} than when this optimizer was made, "
                        f"{got} in place of {was}. Put it back, or make an optimizer for the "
                        "parameters as they are."
                    )
                    raise ValueError(msg)
        for name, (tensor, pointer) in self._tensors.items():
            if tensor.data_ptr() != pointer:
                msg = (
                    f"`params[{name!r}]` lies elsewhere than when this optimizer was made: its "
                    "`data` has been replaced. Make one for the parameters as they are, by `save` "
                    "and `MetaOptimizer.load`."
                )
                raise ValueError(msg)

    def _multipliers(self, lr: Any) -> Any:
        """Return multipliers by leaf: floats where the host has them, arrays of the device."""
        found = multipliers(lr, self._plan.shapes)
        if is_number(lr):
            return found
        like = next(iter(self._params.values()))
        for name in found:
            array = lr[name] if isinstance(lr, Mapping) else lr
            if is_number(array) or not hasattr(array, "__dlpack_device__"):
                continue
            what = f"lr[{name!r}]" if isinstance(lr, Mapping) else "lr"
            # a number of the host's is judged as what it was given as, not as rounded to 0
            on_host = device_of(array) == "cpu"
            found[name] = float(array) if on_host else shared(what, found[name], like, self._xp)
        return multipliers(found, self._plan.shapes)

    def _read(self, what: str, arrays: Any) -> Any:
        """Return a mapping of arrays as this library's."""
        if self._by_position:
            arrays = _named(what, arrays)
        if not isinstance(arrays, Mapping):
            return arrays  # for the core to judge
        like = next(iter(self._params.values()))
        return {
            name: None
            if array is None
            else solid(shared(f"{what}[{name!r}]", array, like, self._xp))
            for name, array in arrays.items()
        }

    def __reduce__(self) -> Any:
        """Copy and pickle by what the optimizer consists of: kernels hold addresses."""
        by_name = self._params | {name: tensor for name, (tensor, _) in self._tensors.items()}
        params = list(by_name.values()) if self._by_position else by_name
        return _restored, (type(self), params, self.config, self._fused, self.state)

    def step_sizes(self) -> dict[str, Any]:
        """Return the learned step sizes by block, as `metaopt.MetaOptimize.step_sizes`."""
        with self._device():
            return self.config.step_sizes(self.state)

    def hyperparameters(self) -> dict[str, dict[str, Any]]:
        """Return the numbers of rules that are learned, by name and block.

        As `metaopt.MetaOptimize.hyperparameters`.
        """
        with self._device():
            return self.config.hyperparameters(self.state)

    def averaged_params(self) -> dict[str, Any]:
        """Return weights averaged over the latest steps, by name, better to evaluate than the last.

        As `metaopt.MetaOptimize.averaged_params`: new arrays, of the parameters' library and
        dtypes. Training goes on from the parameters.

        Raises
        ------
        ValueError
            If there is no `discount` below 1, or with curvature or another `sigma` than "exp".
        """
        with self._device():
            return self.config.averaged_params(self.state, self._params)

    def diagnostics(self) -> dict[str, Any]:
        """Return how the adaptation is doing, as `metaopt.MetaOptimize.diagnostics`."""
        with self._device():
            return self.config.diagnostics(self.state, self._params)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write configuration and state, not the parameters, to a file; see `metaopt.save`.

        Any library on any device can read it, by `load` or `metaopt.load`.
        """
        mo.save(path, self.config, self.state)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        params: Mapping[str, Any] | Sequence[Any],
        config: mo.MetaOptimize | None = None,
        *,
        fused: bool | None = None,
    ) -> Self:
        """Return the optimizer whose run `save`, or `metaopt.save`, wrote.

        Parameters
        ----------
        path : path
        params : mapping of name to array, or sequence of arrays
            As they were when the file was written; on any device.
        config : metaopt.MetaOptimize, optional
            As `opt` of `metaopt.load`.
        fused
            As in the class.

        Raises
        ------
        OSError, ValueError
            As `metaopt.load` does.
        """
        _, arrays = _adopted(_named("params", params))
        config, state = mo.load(path, arrays, config)
        return _restored(cls, params, config, fused, state, stacklevel=4)


def from_config(
    config: mo.MetaOptimize, params: Any, *, fused: bool | None = None
) -> MetaOptimizer:
    """Return an optimizer with a configuration of the core, such as one of `metaopt.presets`.

    Parameters
    ----------
    config : metaopt.MetaOptimize
    params, fused
        As `MetaOptimizer` takes them.

    Raises
    ------
    ValueError, TypeError
        As `MetaOptimizer` does.
    """
    check_config(config)
    return _restored(MetaOptimizer, params, config, fused, None, stacklevel=4)


def _restored(
    cls: type[Any],
    params: Any,
    config: mo.MetaOptimize,
    fused: bool | None,
    state: mo.State | None,
    stacklevel: int = 3,
) -> Any:
    self: Any = object.__new__(cls)
    self._prepare(params, config, fused, state, stacklevel)
    return self


def _named(what: str, arrays: Any) -> Any:
    """Return a sequence of arrays as a mapping, anything else as it is."""
    if isinstance(arrays, Sequence) and not isinstance(arrays, str):
        return {str(index): array for index, array in enumerate(arrays)}
    if isinstance(arrays, Mapping):
        return arrays
    msg = (
        f"`{what}` must be a mapping of name to array, or a sequence; got {type(arrays).__name__}."
    )
    raise TypeError(msg)


def _adopted(params: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the library of the parameters' device, and the parameters as arrays of it."""
    if not params:
        msg = "`params` must hold at least one array; got none."
        raise ValueError(msg)
    devices = {name: _device_name(name, param) for name, param in params.items()}
    (first, here), *others = devices.items()
    for name, there in others:
        if there != here:
            msg = (
                "`params` must all be on one device; "
                f"{first!r} is on {here}, but {name!r} on {there}."
            )
            raise ValueError(msg)
    xp = np if here == "cpu" else _cupy(here)
    some = next(iter(params.values()))
    return xp, {
        name: shared(f"params[{name!r}]", param, some, xp) for name, param in params.items()
    }


def _device_name(name: str, param: Any) -> str:
    if not hasattr(param, "__dlpack_device__"):
        msg = f"`params[{name!r}]` must be an array of CuPy or NumPy; got {type(param).__name__}."
        raise TypeError(msg)
    return device_of(param)


def _cupy(device: str) -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        msg = f"parameters on {device} need CuPy, which is not installed: {error}"
        raise ImportError(msg) from error


def _needs_more(config: mo.MetaOptimize, plan: Any) -> str:
    """Return what of the options takes more than one pass, if anything."""
    if plan.curvature != "none":
        return f"`curvature` {plan.curvature!r} takes more than one pass"
    for option in ("held_out", "meta_first", "skip_nonfinite", "recover"):
        if getattr(config, option):
            return f"`{option}` takes more than one pass"
    if plan.learned:
        return f"{next(iter(plan.learned))} of a rule is learned, which takes more than one pass"
    return ""


def _whole(rule: Any) -> bool:
    """Say whether a rule asks for whole leaves, and so for no kernel."""
    return getattr(rule, "scope", None) == "leaf"


def _missing(xp: Any) -> str:
    """Return which package kernels lack, if any."""
    if xp is np:
        try:
            importlib.import_module("numba")
        except ImportError:
            return "numba is not installed"
    return ""
