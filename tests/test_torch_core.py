"""The torch adapter makes the steps of the core: every option, packed and direct, in all orders."""

from typing import Any

import pytest
from metaopt_conformance import table
from metaopt_conformance.translate import values_of

torch = pytest.importorskip("torch")

from metaopt_conformance.tolerances import relative_error, rounding  # noqa: E402
from metaopt_torch import MetaOptimizer, buckets  # noqa: E402

import metaopt as mo  # noqa: E402
from metaopt.arrays import map_leaves, to_numpy  # noqa: E402

SHAPES = {"w": (6, 5), "b": (6,), "conv": (3, 2, 2, 2), "scale": (), "empty": (0, 3)}
STEPS = 8
BASES: dict[str, Any] = {
    **table.BASES,
    "mixed": {"w": mo.Lion(), "*": mo.AdamW(eps=1e-3)},
}
METAS = table.METAS
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tensor": {"blocks": "tensor"},
    "node": {"blocks": "node"},
    "node, last axis": {"blocks": mo.blocks.node(-1)},
    "weight": {"blocks": "weight", "bounds": (1e-3, 1.0)},
    "named": {"blocks": {"kernels": ("w", "conv"), "rest": "*"}},
    "discount": {"discount": 0.9, "blocks": "tensor"},
    "identity": {"sigma": "identity"},
    "softplus": {"sigma": "softplus", "blocks": "tensor"},
    "bounds": {"bounds": (0.045, 0.055), "blocks": "node"},
    "bounds by block": {"bounds": {"w": (0.045, 0.055)}, "blocks": "tensor"},
    "meta first": {"meta_first": True, "blocks": "tensor"},
    "skip": {"skip_nonfinite": True, "blocks": "node"},
    "skip, weight": {"skip_nonfinite": True, "blocks": "weight"},
    "exact": {"curvature": "exact", "blocks": "tensor"},
    "2x2": {"curvature": "exact", "approximation": "2x2", "blocks": "tensor", "discount": 0.9},
    "2x2, weight": {"curvature": "diagonal", "approximation": "2x2", "blocks": "weight"},
    "full": {"curvature": "exact", "approximation": "full"},
    "step sizes": {
        "blocks": "tensor",
        "step_size": {name: 0.01 * (i + 1) for i, name in enumerate(SHAPES)},
    },
}
#: Several discounts, with whatever makes another kind of step.
SEVERAL: dict[str, dict[str, Any]] = {
    "several": {"discount": (0.9, 1.0)},
    "several, tensor": {"discount": (0.5, 0.9, 1.0), "blocks": "tensor", "meta_first": True},
    "several, node": {"discount": (0.9, 1.0), "blocks": "node", "skip_nonfinite": True},
    "several, weight": {"discount": (0.9, 1.0), "blocks": "weight"},
    "several, softplus": {"discount": (0.9, 1.0), "sigma": "softplus", "blocks": "tensor"},
    "several, diagonal": {"discount": (0.9, 1.0), "curvature": "diagonal", "blocks": "tensor"},
    "several, exact": {"discount": (0.9, 1.0), "curvature": "exact", "blocks": "tensor"},
    "several, recover": {"discount": (0.9, 1.0), "recover": True, "blocks": "tensor"},
}


def start(dtype: Any = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def loss_of(params: Any, t: int) -> Any:
    """Return a loss whose Hessian joins all weights that it depends on, different in every step."""
    flat = torch.cat(
        [param.reshape(-1) for name, param in params.items() if name not in missing(t)]
    )
    return torch.logaddexp(flat, -flat).sum() + 0.1 * torch.sin(flat.sum() + t)


def derivatives(params: Any, t: int) -> dict[str, Any]:
    """Return what the core is given, by differentiation of differentiation."""

    def along(function: Any, tangent: Any) -> Any:
        """Return the derivative of a function along a tangent, as a function."""

        def slope(params: Any) -> Any:
            gradient = torch.func.grad(function)(params)
            return sum((part * tangent[name]).sum() for name, part in gradient.items())

        return slope

    def loss(params: Any) -> Any:
        return loss_of(params, t)

    def columns(tangents: Any) -> list[Any]:
        count = len(next(iter(tangents.values())))
        return [{name: part[j] for name, part in tangents.items()} for j in range(count)]

    def stacked(parts: list[Any]) -> Any:
        return {name: torch.stack([part[name] for part in parts]) for name in params}

    def hvp(tangents: Any) -> Any:
        return stacked([torch.func.grad(along(loss, v))(params) for v in columns(tangents)])

    def third(us: Any, vs: Any) -> Any:
        return stacked(
            [
                stacked([torch.func.grad(along(along(loss, u), v))(params) for v in columns(vs)])
                for u in columns(us)
            ]
        )

    flat = torch.cat(
        [param.reshape(-1) for name, param in params.items() if name not in missing(t)]
    )
    bend = -0.1 * torch.sin(flat.sum() + t)
    diagonal = {name: 1.0 - torch.tanh(param) ** 2 + bend for name, param in params.items()}
    return {"hvp": hvp, "third": third, "hessian_diagonal": diagonal}


def missing(t: int) -> set[str]:
    """Return the leaves without a gradient in step t."""
    return {"b"} if t == 2 else {"w", "scale"} if t == 5 else set()


def core_run(opt: mo.MetaOptimize, lrs: Any) -> Any:
    params = start()
    state = opt.init(params)
    for t in range(STEPS):
        given = derivatives(params, t)
        grads = torch.func.grad(loss_of)(params, t)
        if opt.skip_nonfinite and t == 4:
            grads["w"][1, 2] = float("nan")
        for name in missing(t):
            grads[name] = None
        params, state = opt.step(params, grads, state, lr=lrs(t), **given)
    return params, state


def adapter_run(opt: MetaOptimizer, params: Any, lrs: Any) -> None:
    for t in range(STEPS):
        opt.zero_grad()
        if opt.config.curvature == "exact":
            opt.backward(loss_of(params, t))
        else:
            loss_of(params, t).backward()
        if opt.config.skip_nonfinite and t == 4:
            params["w"].grad[1, 2] = float("nan")
        for group in opt.param_groups:
            group["lr"] = lrs(t)
        diagonal = None
        if opt.config.curvature == "diagonal":
            diagonal = derivatives({n: p.detach() for n, p in params.items()}, t)[
                "hessian_diagonal"
            ]
        opt.step(hessian_diagonal=diagonal)


def compared(got: Any, want: Any, allowed: float) -> None:
    got, want = (values_of(state) for state in (got, want))
    for name in want:
        map_leaves(
            lambda a, b, name=name: _close(to_numpy(a), to_numpy(b), allowed, name),
            got[name],
            want[name],
        )


def _close(got: Any, want: Any, allowed: float, name: str) -> None:
    assert got.dtype == want.dtype, name
    error = relative_error(got, want, 1e-3)
    assert error < allowed, (name, error)


def options_of(base: str, meta: str, name: str) -> dict[str, Any]:
    defaults = {
        "base": BASES[base],
        "meta": METAS[meta],
        "step_size": 0.05,
        "meta_lr": 0.05,
        "discount": 1.0,
    }
    return defaults | (OPTIONS | SEVERAL)[name]


def schedule(t: int) -> float:
    return (1.0, 0.5, 0.0, 1.0, 0.25)[t % 5]


PAIRS = [(base, meta) for base in BASES for meta in METAS]
CASES = [
    (*pair, name) for index, pair in enumerate(PAIRS) for name in list(OPTIONS)[index % 3 :: 3]
]
CASES += [(*pair, list(SEVERAL)[index % len(SEVERAL)]) for index, pair in enumerate(PAIRS)]


@pytest.mark.parametrize("direct", [False, True], ids=["packed", "direct"])
@pytest.mark.parametrize(("base", "meta", "name"), CASES)
def test_a_run_is_the_cores(
    base: str, meta: str, name: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(buckets.SMALL, "cpu", 0 if direct else 2**16)
    options = options_of(base, meta, name)
    params = {n: p.requires_grad_() for n, p in start().items()}
    opt = MetaOptimizer(list(params.items()), **options, compile=False)
    adapter_run(opt, params, schedule)
    want, state = core_run(mo.MetaOptimize(**options), schedule)
    allowed = rounding("float64", operations=60 * 12, steps=STEPS)
    for leaf in want:
        assert relative_error(to_numpy(params[leaf]), to_numpy(want[leaf])) < allowed
    compared(opt.core_state(), state, allowed)
