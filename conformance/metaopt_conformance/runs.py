"""A run of the library under test, step by step in the oracle's terms."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import metaopt as mo
from metaopt.arrays import cast, map_leaves, namespace
from metaopt_conformance.backends import Backend
from metaopt_conformance.cases import Case
from metaopt_conformance.oracle_runs import config
from metaopt_conformance.translate import dense, flat, tree
from metaopt_conformance.verdicts import Failure, Skip

__all__ = ["Under"]


@dataclass(frozen=True)
class Under:
    """The library under test: a backend on a device, by the core or by an adapter.

    Parameters
    ----------
    backend : Backend
    device : str or None, default None
    subject : {"core", "adapter", "wrapped"}, default "core"
        Run the backend's `optimizer` in place of the core, or its `wrapped`.
    derives : bool, default False
        Take Hessian-vector products, and third derivatives, from the backend's own differentiation
        of the loss, or products from differences of gradients where it has none, in place of the
        problem's written-out ones.
    """

    backend: Backend
    device: str | None = None
    subject: str = "core"
    derives: bool = False

    def array(self, value: Any, dtype: str) -> Any:
        """Return numbers as an array of the library, of a dtype that it is to have."""
        wide = "float64" if dtype == "float64" else "float32"
        array = self.backend.asarray(np.asarray(value).astype(wide), self.device)
        xp = namespace(array)
        if array.dtype != getattr(xp, wide):
            msg = (
                f"`asarray` makes {array.dtype} of {wide}; the `dtypes` of a backend are those "
                "that its arrays have"
            )
            raise Failure(msg)
        return cast(array, getattr(xp, dtype))

    def arrays(self, vector: Any, case: Case, *, computed: bool = False) -> dict[str, Any]:
        """Return a vector of all weights, or (..., weights), as arrays by leaf.

        They have the dtypes of the parameters, or those in which the leaves are `computed`.
        """
        return {
            name: self.array(array, _computed(case, name) if computed else case.dtype_of(name))
            for name, array in tree(np.asarray(vector), case.subject.shapes).items()
        }

    def vector(self, arrays: Mapping[str, Any], case: Case) -> Any:
        """Return arrays by leaf, of parameters or with leading axes, as float64 (..., weights)."""
        return flat(arrays, case.subject.shapes, self.backend.to_numpy)

    def numbers(self, arrays: Any) -> Any:
        """Return an array, or a mapping of them, in NumPy."""
        return map_leaves(self.backend.to_numpy, arrays)

    def hvp(self, case: Case, t: int, w: Any) -> Any:
        """Return the `hvp` of step t at w."""
        if self.derives and self.backend.differentiate is not None:
            return lambda tangents: self._along(case, t, w, tangents)
        if self.derives:
            return mo.curvature.central_difference(
                lambda params: self.arrays(case.grad(t, self.vector(params, case)), case),
                self.arrays(w, case),
            )
        missing = case.absent(t)

        def products(tangents: Mapping[str, Any]) -> dict[str, Any]:
            array = self.vector(tangents, case) @ case.hessian(t, w)
            found = self.arrays(array, case, computed=True)
            return {name: None if name in missing else found[name] for name in tangents}

        return products

    def third(self, case: Case, t: int, w: Any) -> Any:
        """Return the `third` of step t at w."""
        if self.derives and self.backend.differentiate is not None:
            return lambda us, vs: self._along(case, t, w, us, vs)
        missing = case.absent(t)

        def products(us: Mapping[str, Any], vs: Mapping[str, Any]) -> dict[str, Any]:
            columns = self.vector(us, case).T, self.vector(vs, case).T
            array = case.subject.third(t, w, *columns).transpose(1, 2, 0)
            found = self.arrays(array, case, computed=True)
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

    def diagonal(self, case: Case, t: int, w: Any) -> Any:
        """Return the `hessian_diagonal` of step t at w.

        In float64 that of a plain diagonal is estimated, with probes that make the estimate exact.
        """
        if case.curvature != "diagonal" or not case.wide:
            return self.arrays(case.hessian_diagonal(t, w), case)
        probes = self.arrays(_orthogonal_signs(len(w)), case)
        return mo.curvature.hutchinson(self.hvp(case, t, w), probes)

    def meta_grads(self, case: Case, t: int, w: Any) -> Any:
        """Return the `meta_grads` of step t at w; None without `held_out`, and where it rests."""
        judged = case.judged(t)
        if case.held_out == "no" or not judged:
            return None
        grads = self.arrays(case.source(t, w), case)
        return {name: grads[name] if name in judged else None for name in grads}

    def inputs(self, case: Case, t: int, w: Any) -> dict[str, Any]:
        """Return what step t is given at the weights w."""
        grads = self.arrays(case.grad(t, w), case)
        missing, lr = case.absent(t), case.multiplier(t)
        if case.lr == "arrays":
            lr = {name: self.array(value, _computed(case, name)) for name, value in lr.items()}
        return {
            "grads": {name: None if name in missing else grads[name] for name in grads},
            "lr": lr,
            "hvp": self.hvp(case, t, w),
            "third": self.third(case, t, w),
            "hessian_diagonal": self.diagonal(case, t, w),
            "meta_grads": self.meta_grads(case, t, w),
        }

    def steps(
        self, case: Case, opt: mo.MetaOptimize | None = None
    ) -> Iterator[tuple[Any, mo.State]]:
        """Yield params and state before each step and after the last; `opt` is the case's own."""
        opt = case.opt() if opt is None else opt
        params = self.arrays(case.subject.start(), case)
        if self.subject != "core":
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
        """Yield what `steps` yields, of an adapter."""
        make = self.backend.optimizer if self.subject == "adapter" else self.backend.wrapped
        assert make is not None
        two_passes = config(case).follows_hessian or case.meta_first or case.skip_nonfinite
        two_passes |= case.learned or case.held_out != "no"
        if case.faulty != "nothing" and not two_passes:
            msg = "an adapter may restart a trace one step later (docs/mathematics.md section 11)"
            raise Skip(msg)
        adapter = make(opt, params)
        taken = _taken(adapter.step)
        for name, needed in (
            ("third", case.approximation == "full"),
            ("hessian_diagonal", case.curvature in ("diagonal", "rectified")),
            ("meta_grads", case.held_out != "no"),
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

    def translated(self, case: Case, params: Any, state: mo.State) -> dict[str, Any]:
        """Return params and state under the oracle's names, as far as the library keeps them."""
        return dense(params, state, config(case), case.subject.shapes, self.backend.to_numpy)


def _computed(case: Case, leaf: str) -> str:
    """Return the dtype that a leaf is computed in: float32, or float64 where that is its own."""
    return "float64" if case.dtype_of(leaf) == "float64" else "float32"


def _orthogonal_signs(columns: int) -> Any:
    """Return rows of signs in which any two columns are orthogonal, by Sylvester's doubling."""
    signs = np.ones((1, 1))
    while len(signs) < columns:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs[:, :columns]


def _taken(step: Callable[..., Any]) -> set[str]:
    """Return the arguments that an adapter's `step` takes: the three it has to, and others."""
    parameters = inspect.signature(step).parameters.values()
    named = {parameter.name for parameter in parameters}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        named |= {"third", "hessian_diagonal", "meta_grads"}
    return named | {"grads", "lr", "hvp"}


def _columns(arrays: Mapping[str, Any]) -> int:
    return int(next(iter(arrays.values())).shape[0])
