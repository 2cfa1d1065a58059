"""Rules that see whole leaves: the same numbers in every adapter, refused where leaves are cut."""

# ruff: noqa: ARG005

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from metaopt_conformance.tolerances import relative_error, rounding

import metaopt as mo
from metaopt.arrays import namespace, to_numpy
from metaopt.rules.rule import scope_of

STEPS = 8
SHAPES: dict[str, tuple[int, ...]] = {"w": (6, 4), "v": (4, 6), "b": (5,), "s": ()}


@dataclass(frozen=True)
class Normalized:
    """The average of gradients over its norm; it says nothing of its scope."""

    weight_decay: float = 0.1

    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
        xp, exp_avg = namespace(grad), 0.9 * slots["exp_avg"] + 0.1 * grad
        return exp_avg / (xp.sqrt(xp.sum(exp_avg * exp_avg)) + 1e-3), {"exp_avg": exp_avg}


@dataclass(frozen=True)
class Orthogonal:
    """Newton and Schulz's iteration on matrices, the way to go depending on the shape."""

    scope: ClassVar[str] = "leaf"
    slots: ClassVar[tuple[str, ...]] = ()
    weight_decay: float = 0.0

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
        xp = namespace(grad)
        x = grad / (xp.sqrt(xp.sum(grad * grad)) + 1e-6)
        if grad.ndim != 2:
            return x, {}
        x = xp.matrix_transpose(x) if grad.shape[0] > grad.shape[1] else x
        for _ in range(3):
            x = 1.5 * x - 0.5 * (x @ xp.matrix_transpose(x) @ x)
        return xp.matrix_transpose(x) if grad.shape[0] > grad.shape[1] else x, {}


@dataclass(frozen=True)
class Factored:
    """The mean square of each row and column in place of the leaf's shape."""

    scope: ClassVar[str] = "leaf"
    slots: ClassVar[tuple[str, ...]] = ("row", "column")
    weight_decay: float = 0.0

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        if len(shape) < 2:
            return {"column": (2,)}
        return {"row": shape[:-1], "column": (*shape[:-2], *shape[-1:])}

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
        xp, new = namespace(grad), dict(slots)
        if grad.ndim < 2:
            new["row"] = 0.9 * slots["row"] + grad * grad
            new["column"] = slots["column"] + 1.0
            return grad / xp.sqrt(new["row"] + 1e-3), new
        new["row"] = 0.9 * slots["row"] + xp.mean(grad * grad, axis=-1)
        new["column"] = 0.9 * slots["column"] + xp.mean(grad * grad, axis=-2)
        return grad / xp.sqrt(new["row"][..., None] * new["column"][..., None, :] + 1e-3), new


@dataclass(frozen=True)
class Trusting:
    """As long as the weights, as LARS has it."""

    scope: ClassVar[str] = "leaf"
    uses_param: ClassVar[bool] = True
    slots: ClassVar[tuple[str, ...]] = ()
    weight_decay: float = 0.0

    def direction(self, grad: Any, slots: Any, count: Any, param: Any) -> Any:  # noqa: ARG002
        xp = namespace(grad)
        ratio = xp.sqrt(xp.sum(param * param)) / (xp.sqrt(xp.sum(grad * grad)) + 1e-3)
        return ratio * grad, {}


RULES: dict[str, Any] = {
    "normalized": Normalized(),
    "orthogonal": Orthogonal(),
    "factored": Factored(),
    "trusting": Trusting(),
}
BLOCKS: tuple[Any, ...] = ("scalar", "tensor", "node", "weight")
OPTIONS: dict[str, Any] = {"meta": mo.AdamW(), "step_size": 0.02, "meta_lr": 0.05, "discount": 1.0}


def start(dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {n: np.asarray(rng.normal(size=shape), dtype) for n, shape in SHAPES.items()}


def grads_of(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(np.sin(to_numpy(p)) + 0.3, p.dtype) for name, p in params.items()}


def by_core(params: Any, **options: Any) -> Any:
    opt = mo.MetaOptimize(**options)
    state = opt.init(params)
    for _ in range(STEPS):
        params, state = opt.step(params, grads_of(params), state)
    return params, opt.step_sizes(state)


def by_torch(compile: bool | None) -> Callable[..., Any]:
    def run(params: Any, **options: Any) -> Any:
        torch = pytest.importorskip("torch")
        from metaopt_torch import MetaOptimizer

        leaves = {name: torch.tensor(p, requires_grad=True) for name, p in params.items()}
        opt = MetaOptimizer(leaves.items(), compile=compile, **options)
        for _ in range(STEPS):
            for name, grad in grads_of({n: p.detach().numpy() for n, p in leaves.items()}).items():
                leaves[name].grad = torch.tensor(grad)
            opt.step()
        return {name: p.detach() for name, p in leaves.items()}, opt.step_sizes()

    return run


def by_jax(params: Any, **options: Any) -> Any:
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    from metaopt_jax import metaoptimize

    with jax.enable_x64(params["w"].dtype == np.float64):
        tx = metaoptimize(**options)
        params = jax.tree.map(jax.numpy.asarray, params)
        state = tx.init(params)

        def update(grads: Any, state: Any, params: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(update)
        for _ in range(STEPS):
            params, state = step(grads_of(params), state, params)
        return params, tx.step_sizes(state)


def by_numba(params: Any, **options: Any) -> Any:
    pytest.importorskip("numba")
    from metaopt_kernels import MetaOptimizer

    opt = MetaOptimizer(params, **options)
    base = opt.config.base
    rules = [base] if not isinstance(base, Mapping) else base.values()
    assert bool(opt.unfused) == any(scope_of(rule) == "leaf" for rule in rules)
    assert all("scope" in reason for reason in opt.unfused.values())
    for _ in range(STEPS):
        opt.step(grads_of(params))
    return params, opt.step_sizes()


ADAPTERS: dict[str, Callable[..., Any]] = {
    "torch eager": by_torch(False),
    "torch compiled": by_torch(True),
    "jax": by_jax,
    "numba": by_numba,
}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.filterwarnings("ignore:the core makes steps in place of a kernel")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_rule_that_sees_whole_leaves_equals_the_core(
    adapter: str, rule: str, blocks: Any
) -> None:
    if adapter == "torch compiled" and (rule != "orthogonal" or blocks in ("tensor", "weight")):
        pytest.skip("compiled for one rule; test_your_own_rule.py has five")
    base = {"s": mo.SGD(), "*": RULES[rule]}  # kernels and packs beside whole leaves
    options = OPTIONS | {"base": base, "blocks": blocks}
    want, sizes = by_core(start("float64"), **options)
    got, found = ADAPTERS[adapter](start("float64"), **options)
    allowed = rounding("float64", operations=200, steps=STEPS)
    for name in SHAPES:
        assert relative_error(to_numpy(got[name]), want[name]) < allowed, name
    for key, size in sizes.items():
        assert relative_error(to_numpy(found[key]), size) < allowed, key


def test_a_checkpoint_holds_slots_of_their_own_shape(tmp_path: Any) -> None:
    rule: Any = Factored()
    opt = mo.MetaOptimize(base=rule, **OPTIONS)
    params = start("float32")
    params, state = opt.step(params, grads_of(params), opt.init(params))
    mo.save(tmp_path / "run", opt, state)
    _, loaded = mo.load(tmp_path / "run", params, opt)
    assert loaded.slots["w"]["row"].shape == (6,)
    assert loaded.slots["b"]["column"].shape == (2,)
    np.testing.assert_array_equal(loaded.slots["w"]["row"], state.slots["w"]["row"])


def test_torch_keeps_slots_of_their_own_shape() -> None:
    torch = pytest.importorskip("torch")
    from metaopt_torch import MetaOptimizer

    def trained(steps: int, opt: Any, leaves: Any) -> None:
        for _ in range(steps):
            for param in leaves:
                param.grad = torch.sin(param.detach()) + 0.3
            opt.step()

    def made(dtype: Any = torch.float64) -> Any:
        leaves = [torch.tensor(p, dtype=dtype).requires_grad_() for p in start("float64").values()]
        rule: Any = Factored()
        return MetaOptimizer(leaves, base=rule, compile=False, **OPTIONS), leaves

    opt, leaves = made()
    trained(3, opt, leaves)
    again, others = made()
    again.load_state_dict(opt.state_dict())
    third, more = made()
    third.load_core_state(opt.core_state())
    for param, *same in zip(leaves, others, more, strict=True):
        for other in same:
            other.data.copy_(param.data)
    for one, own in ((opt, leaves), (again, others), (third, more)):
        trained(2, one, own)
    for param, *same in zip(leaves, others, more, strict=True):
        assert all(torch.equal(param, other) for other in same)
    narrow, leaves = made(torch.bfloat16)
    trained(2, narrow, leaves)
    assert narrow.state[leaves[0]]["row"].shape == (6,)
    assert narrow.state[leaves[0]]["row"].dtype == torch.float32


MetaOptimize: Any = mo.MetaOptimize  # a protocol asks for properties, dataclasses have fields


@dataclass(frozen=True)
class Made:
    """A rule of one expression."""

    function: Any
    scope: Any = "leaf"
    slots: tuple[str, ...] = ("m",)
    weight_decay: float = 0.0

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:
        return self.function(grad, slots, count)


WRONG: dict[str, tuple[Any, str]] = {
    "scalar": (lambda g, s, c: (c, s), r"return the direction as shape \(2, 3\).*got shape \(\)"),
    "number": (lambda g, s, c: (1.0, s), "return the direction as shape .*got a float"),
    "dtype": (
        lambda g, s, c: (namespace(g).astype(g, namespace(g).float64), s),
        "and dtype float32; got shape .* and dtype float64",
    ),
    "forgotten slot": (lambda g, s, c: (g, {}), "returns lacks slot 'm'; expected exactly"),
    "slot too many": (lambda g, s, c: (g, {"m": g, "v": g}), "has slot 'v', unknown to `slots`"),
    "undeclared slot": (
        lambda g, s, c: (s["v"], s),
        r"asks for slot 'v'; its `slots` are \('m',\)",
    ),
    "slot's shape": (lambda g, s, c: (g, {"m": c}), "return slot 'm' as shape"),
    "no slots": (lambda g, s, c: g, "must return a direction and a mapping of slots"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("scope", ["weight", "leaf"])
def test_what_a_rule_returns_is_checked(scope: str, what: str) -> None:
    """Of scope "weight" when an optimizer is made, of "leaf" in a step; nothing is broadcast."""
    function, message = WRONG[what]
    rule: Any = Made(function, scope)
    if scope == "weight":
        with pytest.raises(ValueError, match=rf"Made.*{message}"):
            MetaOptimize(base=rule, meta=mo.SGD(), discount=1.0)
        return
    opt = MetaOptimize(base=rule, meta=mo.SGD(), discount=1.0)
    params = {"w": np.ones((2, 3), "float32")}
    state = opt.init(params)
    with pytest.raises(ValueError, match=rf"Made.*{message}"):
        opt.step(params, params, state)


NOT_ELEMENTWISE: dict[str, Any] = {
    "norm": lambda g, s, c: (g / namespace(g).sum(g), s),
    "shape": lambda g, s, c: (g / g.shape[0], s),
    "branch": lambda g, s, c: (g if c == 1 else 2.0 * g, s),
    "order": lambda g, s, c: (namespace(g).flip(g), s),
    "NumPy": lambda g, s, c: (np.abs(g), s),
    "position": lambda g, s, c: (g * np.arange(3, dtype="float32"), s),
}


@pytest.mark.parametrize("what", NOT_ELEMENTWISE)
def test_what_is_not_provably_elementwise_is_refused(what: str) -> None:
    rule: Any = Made(NOT_ELEMENTWISE[what], "weight")
    for options in ({"base": rule}, {"base": {"w": mo.SGD(), "*": rule}}):
        with pytest.raises(ValueError, match='has the `scope` "weight", but is not provably'):
            MetaOptimize(meta=mo.SGD(), **options)
    for meta in (rule, mo.FastStart(rule)):
        with pytest.raises(ValueError, match='`meta` has the `scope` "weight", but is not'):
            MetaOptimize(base=mo.SGD(), meta=meta, discount=1.0)
    if what in ("norm", "shape", "order"):  # and as what they are they run
        opt = MetaOptimize(base=Made(NOT_ELEMENTWISE[what]), meta=mo.SGD(), discount=1.0)
        params = {"w": np.ones((2, 3), "float32")}
        opt.step(params, params, opt.init(params))


def test_scopes_go_with_what_they_can() -> None:
    leaf, elementwise = Made(lambda g, s, c: (g, s)), Made(lambda g, s, c: (g, s), "weight")
    with pytest.raises(ValueError, match='`curvature` other than "none" needs rules of the scope'):
        MetaOptimize(base=leaf, meta=mo.SGD(), curvature="exact", discount=1.0)
    with pytest.raises(
        ValueError, match='needs rules of the scope "weight", but `meta` sees whole'
    ):
        MetaOptimize(base=mo.SGD(), meta=leaf, curvature="exact", approximation="2x2", discount=1.0)
    MetaOptimize(base=mo.SGD(), meta=leaf, curvature="exact", discount=1.0)
    MetaOptimize(
        base=elementwise, meta=elementwise, curvature="exact", approximation="2x2", discount=1.0
    )
    with pytest.raises(ValueError, match='`base` must have the `scope` "weight" or "leaf"; got 1'):
        MetaOptimize(base=Made(None, 1), meta=mo.SGD(), discount=1.0)
    with pytest.raises(ValueError, match="`meta` must have no `uses_param`"):
        MetaOptimize(base=mo.SGD(), meta=Trusting(), discount=1.0)
    with pytest.raises(ValueError, match="`meta` must have no `slot_shapes`"):
        MetaOptimize(base=mo.SGD(), meta=Factored(), discount=1.0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"v": (3,)}, "has 'v', which `slots` does not name"),
        ({"m": 3}, "must give tuples of int; got 3 for 'm'"),
        ({"m": (-1,)}, r"must give tuples of int; got \(-1,\)"),
    ],
)
def test_shapes_of_slots_are_checked(shapes: Any, message: str) -> None:
    class Shaped(Made):
        def slot_shapes(self, shape: Any) -> Any:  # noqa: ARG002
            return shapes

    opt = MetaOptimize(base=Shaped(lambda g, s, c: (g, s)), meta=mo.SGD(), discount=1.0)
    with pytest.raises(ValueError, match=message):
        opt.init({"w": np.ones(3)})
    with pytest.raises(ValueError, match='has `slot_shapes`, which go with the `scope` "leaf"'):
        MetaOptimize(base=Shaped(lambda g, s, c: (g, s), "weight"), meta=mo.SGD(), discount=1.0)
