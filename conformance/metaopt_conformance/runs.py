"""A run of the library under test, step by step in the oracle's terms."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

import metaopt as mo
from metaopt.arrays import cast, namespace
from metaopt_conformance import finite_differences, oracle
from metaopt_conformance.backends import Backend
from metaopt_conformance.cases import Case
from metaopt_conformance.translate import config_of, dense, expected, flat, slices, tree

__all__ = ["Failure", "Skip", "Under", "differences", "oracle_run"]


class Failure(AssertionError):  # noqa: N818
    """What the library did that it should not."""


class Skip(Exception):  # noqa: N818
    """Why a check does not apply."""


@cache
def config(case: Case) -> oracle.Config:
    """Return the case's configuration in the oracle's terms."""
    return config_of(case.opt(), case.subject.shapes)


def by_weight(case: Case, values: Any) -> Any:
    """Return values by leaf, or one value, as one per weight."""
    if not isinstance(values, Mapping):
        return values
    shapes = case.subject.shapes
    return np.concatenate(
        [np.full(at.stop - at.start, values[name]) for name, at in slices(shapes).items()]
    )


def oracle_step(
    case: Case, t: int, before: oracle.State, rounded: Callable[[Any], Any] = np.asarray
) -> oracle.State:
    """Return the oracle's state after step t of the case, from inputs rounded as the library's."""
    problem, shapes = case.subject, case.subject.shapes
    hessian = problem.hessian(t, before.w)
    if case.curvature in ("diagonal", "rectified"):
        hessian = np.diag(rounded(np.diag(hessian)))
    present = {name: name not in case.absent(t) for name in shapes}
    return oracle.step(
        config(case),
        before,
        rounded(problem.grad(t, before.w)),
        hessian,
        by_weight(case, case.multiplier(t)),
        by_weight(case, present),
        partial(problem.third, t, before.w),
    )


@cache
def oracle_run(case: Case) -> tuple[oracle.State, ...]:
    """Return the oracle's states before each step and after the last."""
    run = [oracle.init(config(case), case.subject.start())]
    for t in range(case.steps):
        run.append(oracle_step(case, t, run[-1]))
    return tuple(run)


@cache
def differences(case: Case) -> dict[str, Any]:
    """Return the traces at the end of the oracle's run by finite differences."""
    return finite_differences.traces(config(case), case.subject, oracle_run(case))


@dataclass(frozen=True)
class Under:
    """The library under test: a backend on a device, by the core or by its own adapter.

    Parameters
    ----------
    backend : Backend
    device : str or None, default None
    adapter : bool, default False
        Run the backend's `optimizer` in place of the core.
    autodiff : bool, default False
        Take Hessian-vector products and third derivatives from the backend's own differentiation
        of the loss, where it has one, in place of the problem's written-out ones.
    """

    backend: Backend
    device: str | None = None
    adapter: bool = False
    autodiff: bool = False

    def arrays(self, vector: Any, case: Case, dtype: str | None = None) -> dict[str, Any]:
        """Return a vector of all weights, or (..., weights), as arrays by leaf."""
        wide = "float64" if (dtype or case.dtype) == "float64" else "float32"
        found = {
            name: self.backend.asarray(np.asarray(array).astype(wide), self.device)
            for name, array in tree(np.asarray(vector), case.subject.shapes).items()
        }
        xp = namespace(next(iter(found.values())))
        return {
            name: cast(array, getattr(xp, dtype or case.dtype)) for name, array in found.items()
        }

    def vector(self, arrays: Mapping[str, Any], case: Case) -> Any:
        """Return arrays by leaf, of parameters or with leading axes, as float64 (..., weights)."""
        return flat(arrays, case.subject.shapes, self.backend.to_numpy)

    def hvp(self, case: Case, t: int, w: Any) -> Any:
        """Return the `hvp` of step t at w."""
        missing = case.absent(t)
        if self.autodiff and self.backend.differentiate is not None:
            return lambda tangents: self._along(case, t, w, tangents)

        def products(tangents: Mapping[str, Any]) -> dict[str, Any]:
            array = self.vector(tangents, case) @ case.subject.hessian(t, w)
            found = self.arrays(array, case, _dtype_of(tangents))
            return {name: None if name in missing else found[name] for name in tangents}

        return products

    def third(self, case: Case, t: int, w: Any) -> Any:
        """Return the `third` of step t at w."""
        missing = case.absent(t)
        if self.autodiff and self.backend.differentiate is not None:
            return lambda us, vs: self._along(case, t, w, us, vs)

        def products(us: Mapping[str, Any], vs: Mapping[str, Any]) -> dict[str, Any]:
            columns = self.vector(us, case).T, self.vector(vs, case).T
            array = case.subject.third(t, w, *columns).transpose(1, 2, 0)
            found = self.arrays(array, case, _dtype_of(us))
            return {name: None if name in missing else found[name] for name in us}

        return products

    def _along(self, case: Case, t: int, w: Any, *tangents: Mapping[str, Any]) -> dict[str, Any]:
        """Return the gradient's derivatives along all columns of one or two sets of tangents."""
        derive = self.backend.differentiate
        assert derive is not None
        params = self.arrays(w, case)
        xp = namespace(next(iter(params.values())))
        data = [self.backend.asarray(part, self.device) for part in case.subject.data(t)]

        def loss(point: Mapping[str, Any]) -> Any:
            return case.subject.loss_of(xp, point, *data)

        def along(function: Any, tangent: Mapping[str, Any]) -> Any:
            """Return the derivative of a function along a tangent, as a function."""
            gradient = derive(function)
            return lambda point: sum(
                xp.sum(part * tangent[name]) for name, part in gradient(point).items()
            )

        columns = [
            [{name: array[j, ...] for name, array in some.items()} for j in range(_columns(some))]
            for some in tangents
        ]
        if len(tangents) == 1:
            found = [derive(along(loss, tangent))(params) for tangent in columns[0]]
            return {name: xp.stack([part[name] for part in found]) for name in params}
        rows = [
            [derive(along(along(loss, one), other))(params) for other in columns[1]]
            for one in columns[0]
        ]
        return {
            name: xp.stack([xp.stack([part[name] for part in row]) for row in rows])
            for name in params
        }

    def steps(
        self, case: Case, opt: mo.MetaOptimize | None = None
    ) -> Iterator[tuple[Any, mo.State]]:
        """Yield params and state before each step and after the last; `opt` is the case's own."""
        opt = case.opt() if opt is None else opt
        params = self.arrays(case.subject.start(), case)
        if self.adapter:
            yield from self._steps_of_adapter(case, opt, params)
            return
        state = opt.init(params)
        yield params, state
        for t in range(case.steps):
            inputs = self.inputs(case, t, self.vector(params, case))
            params, state = self.backend.settle(opt.step(params, state=state, **inputs))
            yield params, state

    def _steps_of_adapter(
        self, case: Case, opt: mo.MetaOptimize, params: Any
    ) -> Iterator[tuple[Any, mo.State]]:
        """Yield what `steps` yields, of the backend's own adapter."""
        assert self.backend.optimizer is not None
        adapter = self.backend.optimizer(opt, params)
        taken = _taken(adapter.step)
        for name, needed in (
            ("third", case.approximation == "full"),
            ("hessian_diagonal", case.curvature in ("diagonal", "rectified")),
        ):
            if needed and name not in taken:
                msg = f"the adapter's `step` takes no `{name}`"
                raise Skip(msg)
        for t in range(case.steps + 1):
            params, state = adapter.params(), adapter.state()
            if not isinstance(state, mo.State):
                msg = f"`state()` of an adapter must return a metaopt.State; got {type(state)}"
                raise Failure(msg)
            yield params, state
            if t < case.steps:
                inputs = self.inputs(case, t, self.vector(params, case))
                adapter.step(**{name: inputs[name] for name in inputs if name in taken})

    def inputs(self, case: Case, t: int, w: Any) -> dict[str, Any]:
        """Return what step t is given at the weights w."""
        grads = self.arrays(case.subject.grad(t, w), case)
        missing = case.absent(t)
        return {
            "grads": {name: None if name in missing else grads[name] for name in grads},
            "lr": case.multiplier(t),
            "hvp": self.hvp(case, t, w),
            "third": self.third(case, t, w),
            "hessian_diagonal": self.arrays(np.diag(case.subject.hessian(t, w)), case),
        }

    def translated(self, case: Case, params: Any, state: mo.State) -> dict[str, Any]:
        """Return params and state under the oracle's names, as far as the library keeps them."""
        return dense(params, state, config(case), case.subject.shapes, self.backend.to_numpy)


def as_oracle_state(case: Case, found: Mapping[str, Any], step: int) -> oracle.State:
    """Return what `Under.translated` found as a state of the oracle's."""
    parts: dict[str, Any] = {
        name: np.array(value) for name, value in vars(oracle.init(config(case), found["w"])).items()
    }
    for key, value in found.items():
        name, _, leaf = key.partition("/")
        if leaf:
            parts[name][slices(case.subject.shapes)[leaf]] = value
        else:
            parts[name] = np.asarray(value, dtype=np.float64)
    return oracle.State(**(parts | {"step": step}))


def wanted(case: Case, state: oracle.State, key: str) -> Any:
    """Return the oracle's value of what `Under.translated` calls `key`."""
    return expected(state, key, case.subject.shapes)


def _taken(step: Callable[..., Any]) -> set[str]:
    """Return the arguments that an adapter's `step` takes: the three it has to, and others."""
    parameters = inspect.signature(step).parameters.values()
    named = {parameter.name for parameter in parameters}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        named |= {"third", "hessian_diagonal"}
    return named | {"grads", "lr", "hvp"}


def _columns(arrays: Mapping[str, Any]) -> int:
    return int(next(iter(arrays.values())).shape[0])


def _dtype_of(arrays: Mapping[str, Any]) -> str:
    some = next(iter(arrays.values()))
    return "float64" if some.dtype == namespace(some).float64 else "float32"
