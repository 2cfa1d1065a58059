"""Hessian-free comes out of the general code without dead work: operations and arrays counted.

An operation is a call or operator that reads or writes a parameter-sized array, the sum included.
Counted twice: on a namespace that records, for what eager libraries do, and on a jaxpr.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.table import BASES, METAS, SIGMAS

import metaopt as mo
from metaopt import arrays

SIZE = 1000


class Recording:
    """A namespace that counts the operations on parameter-sized arrays."""

    def __init__(self) -> None:
        self.operations: list[str] = []
        self.__name__ = "recording"

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found):
            return found

        def recorded(*args: Any, device: Any = None, **kwargs: Any) -> Any:  # noqa: ARG001
            return self.record(name, found, *args, **kwargs)

        return recorded

    def record(self, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `function` on the arrays inside and note it where one is parameter-sized."""
        plain = [a.array if isinstance(a, RecordingArray) else a for a in args]
        result = function(*plain, **kwargs)
        if any(getattr(a, "size", 0) == SIZE for a in (*plain, result)):
            self.operations.append(name)
        return RecordingArray(np.asarray(result), self)


class RecordingArray:
    """An array whose operators are counted."""

    def __init__(self, array: Any, space: Recording) -> None:
        self.array, self.space = array, space

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    ndim = property(lambda self: self.array.ndim)
    size = property(lambda self: self.array.size)
    device = "cpu"

    def __getitem__(self, key: Any) -> Any:
        return self.space.record("getitem", lambda a: a[key], self)


def _operator(name: str) -> Any:
    def apply(self: RecordingArray, *others: Any) -> Any:
        def call(array: Any, *rest: Any) -> Any:
            return getattr(np.asarray(array), name)(*rest)

        return self.space.record(name, call, self, *others)

    return apply


for _name in ["add", "sub", "mul", "truediv"]:
    setattr(RecordingArray, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(RecordingArray, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ["neg", "invert", "and", "or", "gt", "ge", "lt", "le", "eq", "ne"]:
    setattr(RecordingArray, f"__{_name}__", _operator(f"__{_name}__"))


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> Recording:
    recording = Recording()
    monkeypatch.setitem(arrays._namespaces, RecordingArray, recording)
    monkeypatch.setattr("metaopt.arrays.device", lambda array: array.device)
    monkeypatch.setattr("metaopt.start.home", lambda array: array.device)
    return recording


def wrap(tree: Any, space: Recording) -> Any:
    return arrays.map_leaves(lambda array: RecordingArray(np.asarray(array), space), tree)


def stepped(param: Any, direction: Any, lr: Any, weight_decay: float) -> Any:
    """Return the weights after a step with a fixed step size."""
    return param - lr * (direction + weight_decay * param if weight_decay else direction)


def plain_operations(rule: Any, space: Recording) -> int:
    """Return the operations of the rule with a fixed step size."""
    grad, param = (wrap(np.ones(SIZE, "float32"), space) for _ in range(2))
    slots = {slot: wrap(np.ones(SIZE, "float32"), space) for slot in rule.slots}
    lr, count = (wrap(np.asarray(value, "float32"), space) for value in (0.1, 1.0))
    space.operations.clear()
    direction, _ = rule.direction(grad, slots, count)
    stepped(param, direction, lr, rule.weight_decay)
    return len(space.operations)


def meta_operations(opt: mo.MetaOptimize, space: Recording) -> int:
    params = {"w": np.ones(SIZE, "float32")}
    state = opt.init(params)
    wrapped = mo.State(**{key: wrap(value, space) for key, value in vars(state).items()})
    grads = {"w": wrap(np.ones(SIZE, "float32"), space)}
    space.operations.clear()
    opt.step(wrap(params, space), grads, wrapped)
    return len(space.operations)


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("sigma", SIGMAS.values(), ids=str)
@pytest.mark.parametrize("base", BASES.values(), ids=repr)
def test_operations_of_a_step(base: Any, sigma: Any, discount: float, space: Recording) -> None:
    opt = mo.MetaOptimize(base=base, meta=mo.Lion(), step_size=0.01, sigma=sigma, discount=discount)
    extra = meta_operations(opt, space) - plain_operations(base, space)
    assert 3 <= extra <= 6


@pytest.mark.parametrize("blocks", ["scalar", "tensor", {"all": "*"}], ids=str)
def test_operations_do_not_depend_on_the_meta_update(blocks: Any, space: Recording) -> None:
    counts = {
        meta_operations(
            mo.MetaOptimize(
                base=mo.AdamW(), meta=meta, blocks=blocks, meta_first=first, discount=1.0
            ),
            space,
        )
        for meta in METAS.values()
        for first in (False, True)
    }
    assert len(counts) == 1


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield the operations of a jaxpr, those of nested calls in place of the call."""
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr")
        if inner is None:
            yield equation
        else:
            yield from equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("sigma", ["exp", "identity"])
@pytest.mark.parametrize("base", BASES.values(), ids=repr)
def test_operations_of_the_traced_step(base: Any, sigma: Any) -> None:
    jax = pytest.importorskip("jax")
    params = {"w": jax.numpy.ones(SIZE, "float32")}
    opt = mo.MetaOptimize(base=base, meta=mo.Lion(), sigma=sigma, discount=1.0)
    state = opt.init(params)

    def plain(param: Any, slots: Any, lr: Any, count: Any) -> Any:
        direction, new = base.direction(param, slots, count)
        return stepped(param, direction, lr, base.weight_decay), new

    def count(function: Any, *args: Any) -> int:
        found = equations(jax.make_jaxpr(function)(*args).jaxpr)
        sized = [
            equation
            for equation in found
            # a fill is part of the selection that reads it
            if equation.primitive.name != "broadcast_in_dim"
            and any(
                getattr(v.aval, "size", 0) == SIZE for v in (*equation.invars, *equation.outvars)
            )
        ]
        return len(sized)

    meta = count(lambda p, g, a, s: meta_step(opt, state, p, g, a, s), *_leaves(params, state))
    one = jax.numpy.ones((), "float32")
    extra = meta - count(plain, params["w"], dict(state.slots["w"]), one, one)
    assert 3 <= extra <= 6


def _leaves(params: Any, state: Any) -> tuple[Any, ...]:
    kept = state.average if "w" in state.average else state.trace
    return params["w"], params["w"], kept["w"], dict(state.slots["w"])


def meta_step(opt: Any, state: Any, param: Any, grad: Any, kept: Any, slots: Any) -> Any:
    """Return what a step changes of parameter size, all other state constant."""
    part = "average" if "w" in state.average else "trace"
    parts = vars(state) | {part: {"w": kept}, "slots": {"w": slots}}
    params, new = opt.step({"w": param}, {"w": grad}, mo.State(**parts))
    return params["w"], getattr(new, part)["w"], dict(new.slots["w"]), new.beta


@pytest.mark.parametrize("blocks", ["scalar", "tensor", {"a": "*"}], ids=str)
@pytest.mark.parametrize("base", BASES.values(), ids=repr)
def test_arrays_of_state(base: Any, blocks: Any) -> None:
    for discount, horizons in ((1.0, 1), ((0.99, 1.0), 2)):
        opt = mo.MetaOptimize(base=base, meta=mo.AdamW(), blocks=blocks, discount=discount)
        params = {"w": np.ones(SIZE, "float32")}
        state = opt.init(params)
        _, state = opt.step(params, params, state)
        sizes: list[int] = []
        for value in vars(state).values():
            arrays.map_leaves(lambda array: sizes.append(array.size), value)  # noqa: B023
        large = [size for size in sizes if size > 2]
        assert sum(large) == SIZE * (len(base.slots) + horizons)


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_what_cannot_feed_back_is_not_kept(discount: float) -> None:
    def state(**options: Any) -> mo.State:
        opt = mo.MetaOptimize(
            **{"base": mo.AdamW(), "meta": mo.AdamW(), "discount": 1.0, **options}
        )
        return opt.init({"w": np.ones((2, 3)), "b": np.ones(3)})

    exact = state(curvature="exact", approximation="2x2", blocks="tensor", discount=discount)
    if discount == 0.0:
        assert exact.average["w"].shape == (2, 3)
        assert not exact.slot_traces
        assert not exact.beta_trace
        return
    assert exact.trace["w"].shape == (2, 2, 3)
    assert list(exact.slot_traces["w"]) == ["exp_avg", "exp_avg_sq"]
    assert list(exact.beta_trace) == ["beta", "exp_avg", "exp_avg_rms"]
    assert exact.beta_trace["beta"].shape == (2, 2)
    assert not state(curvature="exact", approximation="l").beta_trace
    assert not state(curvature="exact", approximation="2x2", meta=mo.Lion()).beta_trace
    assert not state(curvature="none", approximation="2x2").beta_trace
    assert not state(curvature="exact", base=mo.Lion()).slot_traces
    mixed = state(curvature="diagonal", base={"w": mo.Lion(), "b": mo.SGD(momentum=0.9)})
    assert list(mixed.slot_traces) == ["b"]
