"""Narrow parameters, scaled and non-finite gradients."""

import shutil
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from metaopt_conformance.tolerances import distance, relative_error, rounding  # noqa: E402
from metaopt_torch import MetaOptimizer  # noqa: E402
from metaopt_torch.rounding import rounded  # noqa: E402

import metaopt as mo  # noqa: E402


def made(params: Any, **options: Any) -> MetaOptimizer:
    defaults: dict[str, Any] = {
        "base": mo.SGD(),
        "meta": mo.Lion(),
        "step_size": 1e-2,
        "discount": 1.0,
    }
    return MetaOptimizer(params, **({"compile": False} | defaults | options))


compiled = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    # the compiler's own deprecations
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
eager_and_compiled = pytest.mark.parametrize(
    ("blocks", "compile"),
    [(blocks, False) for blocks in ("scalar", "tensor", "weight")]
    + [pytest.param(blocks, True, marks=compiled) for blocks in ("scalar", "tensor")],
)


# --- small steps of narrow parameters


def drifted(dtype: Any, how: str, blocks: str, compile: bool, steps: int = 400) -> Any:
    """Return where weights of 1 get to by steps of a tenth of what the dtype can tell from 1."""
    torch.manual_seed(0)
    small = 0.1 * torch.finfo(dtype).eps
    params = [torch.ones(2000, dtype=dtype, requires_grad=True) for _ in range(2)]
    options = {"step_size": small, "meta_lr": 0.0, "blocks": blocks, "compile": compile}
    opt = made(params, rounding=how, **options)
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
    return params[0].detach().float(), 1.0 - steps * small


@eager_and_compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kahan_rounding_loses_no_small_step(dtype: Any, blocks: str, compile: bool) -> None:
    got, want = drifted(dtype, "kahan", blocks, compile)
    assert relative_error(got.numpy(), np.full(2000, want)) < torch.finfo(dtype).eps
    stuck, _ = drifted(dtype, "nearest", blocks, compile)
    assert torch.all(stuck == 1.0)


@eager_and_compiled
def test_stochastic_rounding_is_right_in_the_mean(blocks: str, compile: bool) -> None:
    got, want = drifted(torch.bfloat16, "stochastic", blocks, compile)
    step = float(torch.finfo(torch.bfloat16).eps) / 2
    # 400 steps, each up or down by at most one bfloat16: a random walk of each of 2000 weights
    spread = step * np.sqrt(400 / 2000)
    assert abs(float(got.mean()) - want) < 5 * spread
    assert torch.unique(got).numel() > 1


def test_stochastic_rounding_chooses_between_the_two_neighbours() -> None:
    torch.manual_seed(0)
    value = torch.tensor([1.0 + 2.0**-9, -3.3, 0.0, 1e-40, float("inf"), -float("inf")])
    many = torch.stack([rounded(value, torch.bfloat16, "stochastic") for _ in range(4000)]).float()
    below = torch.tensor([1.0, -3.3125])
    above = torch.tensor([1.0 + 2.0**-7, -3.296875])
    for column in range(2):
        found = set(many[:, column].tolist())
        assert found == {float(below[column]), float(above[column])}
    share = (many[:, 0] == above[0]).float().mean()
    assert abs(float(share) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4000)
    assert torch.equal(many[:, 2], torch.zeros(4000))
    assert torch.equal(many[0, 4:], value[4:])
    nan = rounded(torch.tensor([float("nan")]), torch.bfloat16, "stochastic")
    assert torch.isnan(nan).all()


@pytest.mark.parametrize("blocks", ["scalar", "tensor", "node", "weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_is_float32_and_follows_the_wide_run(dtype: Any, blocks: str) -> None:
    """Where the parameters' own rounding is kept by kahan, a narrow run is the float32 run."""
    start = torch.linspace(-1.0, 1.0, 12).reshape(4, 3).to(dtype)
    narrow, wide = (start.to(d).clone().requires_grad_() for d in (dtype, torch.float32))
    options: dict[str, Any] = {
        "base": mo.AdamW(eps=1e-3),
        "meta": mo.SGD(),
        "meta_lr": 0.1,
        "discount": 1.0,
    }
    opts = [
        made([narrow], blocks=blocks, rounding="kahan", **options),
        made([wide], blocks=blocks, **options),
    ]
    for t in range(10):
        grad = torch.cos(torch.arange(12.0).reshape(4, 3) + t).to(dtype)
        narrow.grad, wide.grad = grad, grad.float()
        for opt in opts:
            opt.step()
    eps = torch.finfo(dtype).eps
    assert relative_error(narrow.detach().float().numpy(), wide.detach().numpy()) < eps
    states = [opt.core_state() for opt in opts]
    # of a float32 that is held as two narrow ones about eps**2 is lost
    allowed = rounding("float32", operations=60, steps=10) + 10 * eps**2
    assert states[0].trace["0"].dtype == torch.float32
    trace = wide.detach().numpy() - states[1].average["0"].numpy()
    error = np.abs(states[0].trace["0"].numpy() - trace)
    slack = distance("float32", wide.detach().numpy(), trace)
    assert np.max(error - slack) < allowed * np.max(np.abs(trace))


def test_a_bfloat16_checkpoint_keeps_the_float32_of_the_state() -> None:
    param = torch.ones(5, dtype=torch.bfloat16, requires_grad=True)
    opt = made([param], base=mo.AdamW(), blocks="weight")
    for _ in range(3):
        param.grad = torch.full_like(param, 0.1234)
        opt.step()
    fresh = made([param], base=mo.AdamW(), blocks="weight")
    fresh.load_state_dict(opt.state_dict())
    for key, value in opt.state[param].items():
        assert fresh.state[param][key].dtype == value.dtype
        assert torch.equal(fresh.state[param][key], value)


# --- GradScaler and autocast


def test_a_scaler_skips_the_steps_that_overflow() -> None:
    net = torch.nn.Linear(3, 1)
    opt = made(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    weights = []
    for t in range(4):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(torch.ones(2, 3)).float().square().mean()
        scaler.scale(loss).backward()
        if t == 1:
            net.weight.grad[0, 0] = float("inf")
        scaler.step(opt)
        scaler.update()
        weights.append(net.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert int(opt.core_state().step) == 3
    assert scaler.get_scale() == 2.0**19


# --- gradients that are not finite


@pytest.mark.parametrize("blocks", ["scalar", "tensor", "node", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skip_nonfinite_leaves_everything_as_it_was(blocks: str, value: float) -> None:
    net = torch.nn.Linear(3, 2)
    opt = made(net.parameters(), base=mo.AdamW(), skip_nonfinite=True, blocks=blocks)
    for _ in range(2):
        opt.zero_grad()
        net(torch.ones(4, 3)).square().mean().backward()
        opt.step()
    before = _bytes([net.state_dict(), opt.state_dict()["state"], vars(opt.core_state())])
    net.bias.grad[1] = value
    opt.step()
    after = opt.core_state()
    assert int(after.skipped) == 1
    same = vars(after) | {"skipped": torch.zeros((), dtype=torch.int32)}
    assert _bytes([net.state_dict(), opt.state_dict()["state"], same]) == before
    opt.zero_grad()
    net(torch.ones(4, 3)).square().mean().backward()
    opt.step()
    assert int(opt.core_state().step) == 3


def _bytes(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().numpy().tobytes()
    if isinstance(tree, dict):
        return {key: _bytes(value) for key, value in tree.items()}
    return [_bytes(value) for value in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize(
    ("blocks", "compile"),
    [(blocks, False) for blocks in ("scalar", "tensor", "node")]
    + [pytest.param(blocks, True, marks=compiled) for blocks in ("scalar", "node")],
)
def test_a_trace_that_overflows_restarts_in_the_next_step(blocks: str, compile: bool) -> None:
    """docs/mathematics.md section 11: of one pass and of two, and both learn on."""
    runs = []
    for two_passes in (False, True):
        param = torch.zeros(2, 2, requires_grad=True)
        options = {"skip_nonfinite": two_passes, "blocks": blocks, "compile": compile}
        opt = made([param], meta=mo.AdamW(), **options)
        for size in (1.0, 1e12, 1e12, 1.0, 1.0, 1.0):
            param.grad = torch.full_like(param, size)
            opt.step()
        state = opt.core_state()
        assert torch.all(state.restarts == 1)
        trace = param.detach() - state.average["0"]
        assert torch.all(torch.isfinite(trace))
        assert torch.all(torch.isfinite(state.beta))
        runs.append((state, trace))
    assert torch.all(runs[0][0].beta != torch.log(torch.tensor(1e-2)))
    # the effect of the one step in between is what the trace of one pass lacks
    assert torch.allclose(runs[1][1] - runs[0][1], torch.full((2, 2), -1e-2 * 1e12), rtol=1e-2)


def test_no_warning_is_raised_by_plain_use() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = torch.nn.Linear(3, 1)
        opt = made(net.parameters(), blocks="tensor")
        for _ in range(3):
            opt.zero_grad()
            net(torch.ones(2, 3)).square().mean().backward()
            opt.step()
        repr(opt)
        opt.state_dict()


def test_moments_outlive_a_meta_gradient_that_cannot_be_used() -> None:
    """The trace alone is told as what it restarts from."""
    param = torch.ones(3, requires_grad=True)
    opt = MetaOptimizer([param], base=mo.AdamW(), meta=mo.SGD(), compile=False, discount=1.0)
    param.grad = torch.ones(3)
    opt.step()
    opt.param_groups[0]["meta_grad"].fill_(float("inf"))
    moments = opt.core_state().slots["0"]
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.any(moments[slot])
        assert torch.equal(moments[slot], opt.state[param][slot])
