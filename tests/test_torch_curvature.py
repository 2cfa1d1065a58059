"""Hessian-vector products: by double backward and central differences, and where one cannot be."""

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from metaopt_conformance.tolerances import distance, relative_error  # noqa: E402
from metaopt_conformance.translate import traces as traces_of  # noqa: E402
from metaopt_torch import MetaOptimizer  # noqa: E402

import metaopt as mo  # noqa: E402


def network(dtype: Any = torch.float64) -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)]
    return torch.nn.Sequential(*layers).to(dtype)


def made(net: Any, **options: Any) -> MetaOptimizer:
    defaults: dict[str, Any] = {
        "base": mo.AdamW(eps=1e-3, weight_decay=0.1),
        "meta": mo.AdamW(eps=1e-3),
        "step_size": 0.02,
        "meta_lr": 0.05,
        "blocks": "tensor",
        "curvature": "exact",
        "approximation": "2x2",
        "compile": False,
        "discount": 1.0,
    }
    return MetaOptimizer(net.named_parameters(), **(defaults | options))


def loss_of(net: Any, t: int) -> Any:
    dtype = next(net.parameters()).dtype
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t)).to(dtype)
    return (net(x) - x.sum(dim=1, keepdim=True).sin()).square().mean()


def trained(net: Any, opt: Any, steps: int = 8) -> None:
    for t in range(steps):

        def closure(t: int = t) -> Any:
            opt.zero_grad()
            loss = loss_of(net, t)
            opt.backward(loss) if opt._hvp == "autograd" else loss.backward()
            return loss.detach()

        opt.step(closure)


@pytest.mark.parametrize("meta_first", [False, True])
@pytest.mark.parametrize("approximation", ["l", "2x2"])
def test_central_differences_are_near_double_backward(approximation: str, meta_first: bool) -> None:
    nets = [network() for _ in range(2)]
    options: dict[str, Any] = {"approximation": approximation, "meta_first": meta_first}
    opts = [
        made(net, hvp=hvp, **options)
        for net, hvp in zip(nets, ("autograd", "central"), strict=True)
    ]
    for net, opt in zip(nets, opts, strict=True):
        trained(net, opt)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert relative_error(b.detach().numpy(), a.detach().numpy()) < 1e-7
    states = [opt.core_state() for opt in opts]
    for name in states[0].trace:
        assert relative_error(states[1].trace[name].numpy(), states[0].trace[name].numpy()) < 1e-7
    assert bool(states[0].beta_trace) == (approximation == "2x2")


def test_central_differences_leave_parameters_gradients_and_random_numbers_alone() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 1))
    opt = made(net, hvp="central", meta_lr=0.0, step_size=1e-6)
    draws = []

    def closure() -> Any:
        opt.zero_grad()
        mask = torch.rand(3)
        draws.append(mask)
        loss = loss_of(net, 0)
        loss.backward()
        return loss.detach()

    torch.manual_seed(1)
    opt.step(closure)
    opt.step(closure)
    after = torch.rand(3)
    torch.manual_seed(1)
    torch.rand(3), net(torch.zeros(16, 4))
    once = torch.rand(3)
    # the closure is called again along every column, each time with the numbers of its first call
    assert len(draws) > 2
    half = len(draws) // 2
    assert all(torch.equal(draw, draws[0]) for draw in draws[:half])
    assert torch.equal(draws[half], once)
    assert not torch.equal(after, once)


LOSSES: dict[str, Any] = {
    "of 2 parameters of this optimizer none requires one": lambda net: net.requires_grad_(False)(
        torch.ones(1, 4, dtype=torch.float64)
    ),
    "got one that depends on others alone": lambda _: torch.ones(1, requires_grad=True) * 2.0,
    "on nothing that requires a gradient": lambda net: net(torch.ones(1, 4).double()).detach(),
    r"`loss` must be one number; got shape \(3, 1\)": lambda net: net(torch.ones(3, 4).double()),
}


@pytest.mark.parametrize("message", LOSSES)
def test_a_loss_without_gradients_is_told_at_once(message: str) -> None:
    net = torch.nn.Linear(4, 1).double()
    opt = made(net)
    loss = LOSSES[message](net)
    with pytest.raises(ValueError, match=message):
        opt.backward(loss)
    assert all(param.grad is None for param in net.parameters())
    net.requires_grad_(True)
    opt.backward(net(torch.ones(1, 4).double()).sum())
    opt.step()


@pytest.mark.parametrize("hvp", ["autograd", "central"])
@pytest.mark.parametrize("approximation", ["l", "2x2", "full"])
def test_without_gradients_nothing_moves_and_no_product_is_needed(
    approximation: str, hvp: str
) -> None:
    if hvp == "central" and approximation == "full":
        pytest.skip("differences give no third derivatives")
    net = network()
    opt = made(net, approximation=approximation, hvp=hvp)
    trained(net, opt, 2)
    opt.zero_grad()
    before = [param.detach().clone() for param in net.parameters()]
    sizes, traces = opt.step_sizes(), opt.core_state().trace
    opt.step(lambda: 0.0)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(opt.step_sizes()[name], size) for name, size in sizes.items())
    assert all(torch.equal(opt.core_state().trace[name], trace) for name, trace in traces.items())


def test_a_graph_is_let_go_after_the_step() -> None:
    net = network()
    opt = made(net)
    trained(net, opt, 2)
    assert all(param.grad.grad_fn is None for param in net.parameters())


def test_an_hvp_of_ones_own_is_used() -> None:
    nets = [network() for _ in range(2)]
    opts = [made(net) for net in nets]
    calls = []
    names = [name for name, _ in nets[1].named_parameters()]
    for t in range(4):
        opts[0].zero_grad()
        opts[0].backward(loss_of(nets[0], t))
        opts[0].step()

        def loss(values: Any, t: int = t) -> Any:
            return loss_of(_Called(nets[1], values), t)

        values = {name: param.detach() for name, param in nets[1].named_parameters()}

        def hvp(tangents: Any, loss: Any = loss, values: Any = values) -> Any:
            calls.append(len(tangents))

            def along(j: int) -> Any:
                def slope(values: Any) -> Any:
                    grads = torch.func.grad(loss)(values)
                    return sum((grads[name] * tangents[name][j]).sum() for name in names)

                return torch.func.grad(slope)(values)

            columns = [along(j) for j in range(len(tangents[names[0]]))]
            return {name: torch.stack([column[name] for column in columns]) for name in names}

        opts[1].zero_grad()
        loss_of(nets[1], t).backward()
        opts[1].step(hvp=hvp)
    assert calls
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert relative_error(b.detach().numpy(), a.detach().numpy()) < 1e-12


class _Called:
    """A module with other values for its parameters."""

    def __init__(self, net: Any, values: Any) -> None:
        self.net, self.values = net, values

    def parameters(self) -> Any:
        return iter(self.values.values())

    def __call__(self, x: Any) -> Any:
        return torch.func.functional_call(self.net, self.values, x)


def test_a_linear_loss_has_no_curvature() -> None:
    param = torch.ones(3, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {
        "base": mo.SGD(),
        "meta": mo.SGD(),
        "compile": False,
        "discount": 1.0,
    }
    opts = []
    kinds: list[dict[str, Any]] = [{"curvature": "exact"}, {}]
    for extra in kinds:
        weight = param.detach().clone().requires_grad_()
        opt = MetaOptimizer([weight], **options, **extra)
        for _ in range(3):
            opt.zero_grad()
            opt.backward((weight * torch.arange(3.0)).sum())
            opt.step()
        opts.append(opt)
    want = opts[0].core_state().trace["0"][0].numpy()
    got = traces_of({"0": weight}, opts[1].core_state())["0"]
    assert np.all(abs(got - want) <= 3 * distance("float64", weight.detach().numpy(), want))


def test_maximizing_is_minimizing_the_negative_with_curvature_too() -> None:
    nets = [network() for _ in range(2)]
    opts = [made(net, maximize=flag) for net, flag in zip(nets, (False, True), strict=True)]
    for t in range(5):
        for net, opt, sign in zip(nets, opts, (1.0, -1.0), strict=True):
            opt.zero_grad()
            opt.backward(sign * loss_of(net, t))
            opt.step()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)


# --- where it cannot be


def test_gradients_without_a_graph_are_refused_with_advice() -> None:
    net = network()
    opt = made(net)
    loss_of(net, 0).backward()
    before = [param.detach().clone() for param in net.parameters()]
    with pytest.raises(ValueError, match=r"has no graph.*optimizer.backward\(loss\)"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_backward_pass_whose_gradients_are_gone_vouches_for_none(set_to_none: bool) -> None:
    param = torch.ones(3, requires_grad=True)
    opt = MetaOptimizer(
        [param], base=mo.SGD(), meta=mo.SGD(), step_size=0.1, curvature="exact", discount=1.0
    )
    opt.backward(param.pow(4).sum())
    opt.zero_grad(set_to_none=set_to_none)
    param.pow(4).sum().backward()
    with pytest.raises(ValueError, match="has no graph"):
        opt.step()


def test_a_loss_without_second_derivatives_is_none_the_less_one() -> None:
    param = torch.ones(3, requires_grad=True)
    opt = MetaOptimizer(
        [param], base=mo.SGD(), meta=mo.SGD(), step_size=0.1, curvature="exact", discount=1.0
    )
    for _ in range(2):
        opt.zero_grad()
        opt.backward(param.sum())
        opt.step()
    assert torch.allclose(opt.state[param]["trace"], torch.full((3,), -0.2))


def test_central_differences_need_a_closure() -> None:
    net = network()
    opt = made(net, hvp="central")
    loss_of(net, 0).backward()
    with pytest.raises(ValueError, match='needs a closure for `hvp="central"`'):
        opt.step()


class Once(torch.autograd.Function):  # type: ignore[misc, name-defined]
    """A function that has no second derivative, as flash attention has none."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:  # noqa: ARG004
        return x * 1.0

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Any) -> Any:  # noqa: ARG004
        return grad * 1.0


def test_what_has_no_second_derivative_is_told_and_central_differences_work() -> None:
    def loss(net: Any) -> Any:
        return Once.apply(net(torch.ones(3, 4).to(next(net.parameters()).dtype))).square().mean()

    net = network()
    opt = made(net)
    opt.backward(loss(net))
    before = [param.detach().clone() for param in net.parameters()]
    with pytest.raises(RuntimeError, match=r'(?s)could not be differentiated.*hvp="central"'):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert int(opt.core_state().step) == 0

    opt = made(net, hvp="central")

    def closure() -> Any:
        opt.zero_grad()
        value = loss(net)
        value.backward()
        return value.detach()

    for _ in range(3):
        opt.step(closure)
    assert int(opt.core_state().step) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flash_attention_trains_with_central_differences() -> None:
    torch.manual_seed(0)
    project = torch.nn.Linear(16, 48)
    opt = made(project, hvp="central", step_size=1e-3)
    x = torch.randn(2, 8, 16)

    def closure() -> Any:
        opt.zero_grad()
        q, k, v = project(x).chunk(3, dim=-1)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(
                *(part.unsqueeze(1) for part in (q, k, v))
            )
        loss = (out.squeeze(1) - x).square().mean()
        loss.backward()
        return loss.detach()

    losses = [float(opt.step(closure)) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert torch.any(opt.core_state().trace["weight"][0] != 0.0)
