"""`with opt.meta_gradients():` keeps the gradients of a held-out loss apart from those of training.

What steps make of them is compared with the core, by the conformance suite and here.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from metaopt_torch import MetaOptimizer, wrap  # noqa: E402

import metaopt as mo  # noqa: E402

FEATURES = 5
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks": {"blocks": "tensor"},
    "nodes": {"blocks": "node", "discount": 0.9},
    "weights": {"blocks": "weight"},
    "skip": {"skip_nonfinite": True},
    "meta first": {"meta_first": True},
    "maximize": {"maximize": True},
    "exact": {"curvature": "exact", "blocks": "tensor"},
}


class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Two layers and a bias that training does not reach in every step."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.nn.Linear(FEATURES, 4, dtype=torch.float64)
        self.out = torch.nn.Linear(4, 1, dtype=torch.float64)
        self.gain = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Any) -> Any:
        return self.out(torch.tanh(self.hidden(x)) * (1.0 + self.gain))


def batch(t: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(t)
    return (
        torch.randn(12, FEATURES, generator=generator, dtype=torch.float64),
        torch.randn(12, 1, generator=generator, dtype=torch.float64),
    )


def loss_of(net: Any, t: int, *, sign: float = 1.0) -> Any:
    x, y = batch(t)
    return sign * (net(x) - y).square().mean()


def made(net: Any, **options: Any) -> MetaOptimizer:
    settings: dict[str, Any] = {"step_size": 0.02, "meta_lr": 0.05, "compile": False}
    settings |= {"base": mo.AdamW(weight_decay=0.1), "held_out": True}
    return MetaOptimizer(net.named_parameters(), **(settings | options))


def held_out(net: Any, opt: Any, t: int, **options: Any) -> None:
    with opt.meta_gradients(**options):
        loss_of(net, 1000 + t).backward()


def grads_of(net: Any, t: int, *, sign: float = 1.0) -> dict[str, Any]:
    named = dict(net.named_parameters())
    found = torch.autograd.grad(loss_of(net, t, sign=sign), list(named.values()))
    return dict(zip(named, found, strict=True))


def params_of(net: Any) -> dict[str, Any]:
    return {name: param.detach().clone() for name, param in net.named_parameters()}


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_run_is_the_cores(options: dict[str, Any], every: int) -> None:
    net, twin = Net(), Net()
    opt, sign = made(net, **options), -1.0 if options.get("maximize") else 1.0
    config = opt.config
    params = params_of(twin)
    state = config.init(params)
    for t in range(9):
        opt.zero_grad()
        loss = loss_of(net, t, sign=sign)
        if config.curvature == "exact":
            opt.backward(loss)
        else:
            loss.backward()
        if t % every == every - 1:
            with opt.meta_gradients():
                loss_of(net, 1000 + t, sign=sign).backward()
        opt.step()

        twin.load_state_dict(params)
        grads, judge = grads_of(twin, t), None
        if t % every == every - 1:
            judge = grads_of(twin, 1000 + t)

        def hvp(tangents: Any, t: int = t) -> Any:
            named = dict(twin.named_parameters())
            first = torch.autograd.grad(loss_of(twin, t), list(named.values()), create_graph=True)
            count = len(next(iter(tangents.values())))
            columns = [
                torch.autograd.grad(
                    first, list(named.values()), [tangents[n][j] for n in named], retain_graph=True
                )
                for j in range(count)
            ]
            return {
                name: torch.stack([column[i] for column in columns]) for i, name in enumerate(named)
            }

        params, state = config.step(params, grads, state, meta_grads=judge, hvp=hvp)
    for name, param in net.named_parameters():
        torch.testing.assert_close(param.detach(), params[name], rtol=1e-9, atol=1e-12)
    for name, size in config.step_sizes(state).items():
        assert not torch.all(size == 0.02)
        torch.testing.assert_close(opt.step_sizes()[name], size, rtol=1e-9, atol=0.0)


def test_training_has_its_gradients_back_and_steps_with_them() -> None:
    net = Net()
    opt = made(net)
    net.gain.requires_grad_(requires_grad=False)
    loss_of(net, 0).backward()
    net.out.bias.grad = None
    before = {name: param.grad for name, param in net.named_parameters()}
    values = {name: None if g is None else g.clone() for name, g in before.items()}
    with opt.meta_gradients():
        assert all(param.grad is None for param in net.parameters())
        loss_of(net, 1).backward()
        net.hidden.bias.grad = None
    for name, param in net.named_parameters():
        assert param.grad is before[name]
        assert param.grad is None or torch.equal(param.grad, values[name])
    start = params_of(net)
    opt.step()
    assert torch.equal(net.out.bias, start["out.bias"])
    assert not torch.equal(net.hidden.bias, start["hidden.bias"])


def test_training_has_its_gradients_back_after_an_exception() -> None:
    net = Net()
    opt = made(net)
    loss_of(net, 0).backward()
    before = {name: (param.grad, param.grad.clone()) for name, param in net.named_parameters()}

    def fail() -> None:
        with opt.meta_gradients():
            loss_of(net, 1).backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    for name, param in net.named_parameters():
        assert param.grad is before[name][0]
        assert torch.equal(param.grad, before[name][1])
    opt.step()  # to which nothing has come of what failed
    assert opt.diagnostics()["asleep"]["all"]
    held_out(net, opt, 1)
    opt.step()
    assert not opt.diagnostics()["asleep"]["all"]


def test_gradients_that_are_views_of_one_buffer_are_kept_as_well() -> None:
    """As DistributedDataParallel has them, whose backward writes into the same buffer again."""
    net, twin = Net(), Net()
    opt, twin_opt = made(net), made(twin)
    params = list(net.parameters())
    buffer = torch.zeros(sum(param.numel() for param in params), dtype=torch.float64)
    views = torch.split(buffer, [param.numel() for param in params])

    def backward(t: int) -> None:
        found = grads_of(net, t)
        for (name, param), view in zip(net.named_parameters(), views, strict=True):
            view.copy_(found[name].reshape(-1))
            param.grad = view.view(param.shape)

    for t in range(3):
        backward(t)
        before = [param.grad for param in params]
        with opt.meta_gradients():
            backward(1000 + t)
        assert all(param.grad is grad for param, grad in zip(params, before, strict=True))
        opt.step()
        twin_opt.zero_grad()
        loss_of(twin, t).backward()
        held_out(twin, twin_opt, t)
        twin_opt.step()
    assert equal(params_of(net), params_of(twin))


def first_training(net: Any, opt: Any, t: int) -> None:
    opt.zero_grad()
    loss_of(net, t).backward()
    held_out(net, opt, t)
    opt.step()


def first_held_out(net: Any, opt: Any, t: int) -> None:
    held_out(net, opt, t)
    opt.zero_grad()
    loss_of(net, t).backward()
    opt.step()


def in_a_closure(net: Any, opt: Any, t: int) -> None:
    def closure() -> Any:
        opt.zero_grad()
        held_out(net, opt, t)
        loss = loss_of(net, t)
        loss.backward()
        return loss

    assert opt.step(closure).item() > 0.0


def in_two_calls(net: Any, opt: Any, t: int) -> None:
    opt.zero_grad()
    loss_of(net, t).backward()
    with opt.meta_gradients():
        (0.25 * loss_of(net, 1000 + t)).backward()
        (0.75 * loss_of(net, 1000 + t)).backward()
    opt.step()


def in_two_contexts(net: Any, opt: Any, t: int) -> None:
    opt.zero_grad()
    for share in (0.25, 0.75):
        loss_of(net, t).mul(share).backward()
        with opt.meta_gradients():
            (share * loss_of(net, 1000 + t)).backward()
    opt.step()


@pytest.mark.parametrize("way", [first_held_out, in_a_closure, in_two_calls, in_two_contexts])
def test_where_it_stands_makes_no_difference(way: Callable[..., None]) -> None:
    net, twin = Net(), Net()
    opt, twin_opt = made(net), made(twin)
    for t in range(6):
        way(net, opt, t)
        first_training(twin, twin_opt, t)
    for name, param in twin.named_parameters():
        torch.testing.assert_close(net.get_parameter(name), param, rtol=1e-12, atol=1e-14)
    assert opt.step_sizes()["all"] != 0.02


def test_a_closure_that_is_called_for_differences_counts_once() -> None:
    net, twin = Net(), Net()
    exact: dict[str, Any] = {"curvature": "exact", "discount": 1.0}
    opt, twin_opt = made(net, hvp="central", **exact), made(twin, **exact)
    for t in range(4):
        in_a_closure(net, opt, t)
        twin_opt.zero_grad()
        twin_opt.backward(loss_of(twin, t))
        held_out(twin, twin_opt, t)
        twin_opt.step()
    torch.testing.assert_close(
        opt.step_sizes()["all"], twin_opt.step_sizes()["all"], rtol=1e-7, atol=0.0
    )
    assert opt.diagnostics()["meta_grad"]["all"] != 0.0


def test_they_are_for_one_step() -> None:
    net = Net()
    opt = made(net)
    for t in range(3):
        first_training(net, opt, t)
    size = opt.step_sizes()["all"]
    opt.zero_grad()
    loss_of(net, 3).backward()
    opt.step()
    assert opt.step_sizes()["all"] == size


@pytest.mark.parametrize("blocks", ["scalar", "tensor"])
@pytest.mark.parametrize("discount", [1.0, (0.9, 1.0)])
def test_a_leaf_without_one_adds_nothing(blocks: str, discount: Any) -> None:
    net = Net()
    opt = made(net, blocks=blocks, discount=discount)
    for t in range(4):
        first_training(net, opt, t)
    params, state, config = params_of(net), opt.core_state(), opt.config
    opt.zero_grad()
    loss_of(net, 5).backward()
    grads = {name: param.grad for name, param in net.named_parameters()}
    judge = grads_of(net, 1005)
    judge["out.weight"] = judge["hidden.bias"] = None
    with opt.meta_gradients():
        for name, param in net.named_parameters():
            param.grad = judge[name]
    opt.step()
    _, want = config.step(params, grads, state, meta_grads=judge)
    torch.testing.assert_close(opt.core_state().meta_grad, want.meta_grad, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(opt.core_state().beta, want.beta, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("skip", [False, True])
def test_one_that_is_not_finite(skip: bool) -> None:
    net = Net()
    opt = made(net, skip_nonfinite=skip)
    for t in range(4):
        first_training(net, opt, t)
    before, size = params_of(net), opt.step_sizes()["all"]
    opt.zero_grad()
    loss_of(net, 5).backward()
    with opt.meta_gradients():
        (torch.inf * loss_of(net, 5)).backward()
    opt.step()
    told = opt.diagnostics()
    assert opt.step_sizes()["all"] == size
    assert (int(told["skipped"]), int(told["restarts"]["all"])) == ((1, 0) if skip else (0, 1))
    assert equal(before, params_of(net)) == skip
    first_training(net, opt, 6)
    first_training(net, opt, 7)
    assert opt.step_sizes()["all"] != size


@pytest.mark.parametrize("options", [{}, {"blocks": "weight"}], ids=str)
def test_losses_that_a_grad_scaler_has_scaled(options: dict[str, Any]) -> None:
    net, twin = Net(), Net()
    opt, twin_opt = made(net, **options), made(twin, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(6):
        opt.zero_grad()
        scaler.scale(loss_of(net, t)).backward()
        with opt.meta_gradients(scaler=scaler):
            loss = scaler.scale(loss_of(net, 1000 + t))
            (torch.inf * loss if t == 3 else loss).backward()
        scaler.step(opt)
        scaler.update()
        twin_opt.zero_grad()
        loss_of(twin, t).backward()
        if t != 3:
            held_out(twin, twin_opt, t)
        twin_opt.step()
    assert equal(params_of(net), params_of(twin))
    assert equal(opt.step_sizes(), twin_opt.step_sizes())
    assert not opt.diagnostics()["restarts"]["all" if not options else "gain"].any()


@pytest.mark.parametrize("kind", ["copy", "pickle", "state_dict"])
def test_a_run_goes_on_in_a_copy(kind: str) -> None:
    net, twin = Net(), Net()
    opt, twin_opt = made(net), made(twin)
    for t in range(4):
        first_training(net, opt, t)
        first_training(twin, twin_opt, t)
    if kind == "state_dict":
        other = Net()
        other.load_state_dict(net.state_dict())
        new = made(other)
        new.load_state_dict(opt.state_dict())
    elif kind == "copy":
        other, new = copy.deepcopy((net, opt))
    else:
        other, new = pickle.loads(pickle.dumps((net, opt)))
    for t in range(4, 8):
        first_training(other, new, t)
        first_training(twin, twin_opt, t)
    assert equal(params_of(other), params_of(twin))
    assert equal(new.step_sizes(), twin_opt.step_sizes())


@pytest.mark.parametrize("options", [{}, {"blocks": "node"}], ids=str)
def test_a_wrapped_optimizer_takes_them(options: dict[str, Any]) -> None:
    net, twin = Net(), Net()
    twin_opt = made(twin, discount=1.0, base=mo.AdamW(), **options)
    opt = wrap(
        torch.optim.AdamW(net.named_parameters(), lr=1.0, weight_decay=0.0),
        step_size=0.02,
        meta_lr=0.05,
        discount=1.0,
        held_out=True,
        compile=False,
        **options,
    )
    for t in range(8):
        for own, one in ((net, opt), (twin, twin_opt)):
            one.zero_grad()
            loss_of(own, t).backward()
            if t % 3 != 1:
                held_out(own, one, t)
            one.step()
    for name, size in twin_opt.step_sizes().items():
        assert not torch.all(size == 0.02)
        torch.testing.assert_close(opt.step_sizes()[name], size, rtol=1e-9, atol=0.0)


def test_parameters_of_bfloat16() -> None:
    net = Net().bfloat16()
    opt = made(net)
    for t in range(6):
        for scale, context in ((1.0, None), (-1.0, opt)):
            loss = scale * sum((p.float() - t).square().sum() for p in net.parameters())
            if context is None:
                opt.zero_grad()
                loss.backward()
            else:
                with context.meta_gradients():
                    loss.backward()
        opt.step()
    assert opt.step_sizes()["all"] < 0.02  # for the held-out loss is the other way round


def test_what_must_not_be_done_inside() -> None:
    net = Net()
    opt = made(net)
    loss_of(net, 0).backward()
    for name, call in (
        ("meta_gradients", lambda: opt.meta_gradients()),
        ("step", lambda: opt.step()),
        ("backward", lambda: opt.backward(loss_of(net, 0))),
        ("averaged_params", lambda: opt.averaged_params()),
    ):
        with opt.meta_gradients():
            loss_of(net, 1).backward()
            with pytest.raises(RuntimeError, match=f"`{name}` must not be called inside"):
                call()
    with (
        opt.averaged_params(),
        pytest.raises(RuntimeError, match="the parameters are averages"),
    ):
        opt.meta_gradients()
    wrapped = wrap(torch.optim.SGD(Net().parameters(), lr=1.0), held_out=True, compile=False)
    context = wrapped.meta_gradients()
    context.__enter__()
    with pytest.raises(RuntimeError, match="`step` must not be called inside"):
        wrapped.step()
    loss_of(net, 0).backward()  # of another model
    with pytest.raises(RuntimeError, match="No gradient has come to a parameter"):
        context.__exit__(None, None, None)


def test_an_optimizer_that_was_not_made_for_it_refuses() -> None:
    with pytest.raises(ValueError, match="`meta_gradients` needs an optimizer made with held_out"):
        made(Net(), held_out=False).meta_gradients()


def test_a_sparse_one_is_refused_where_it_comes() -> None:
    net = Net()
    opt = made(net)
    loss_of(net, 0).backward()
    grad = net.gain.grad
    values = torch.ones(1, dtype=torch.float64)
    sparse = torch.sparse_coo_tensor([[0]], values, (4,), check_invariants=True)
    context = opt.meta_gradients()
    context.__enter__()
    net.gain.grad = sparse
    with pytest.raises(TypeError, match="The held-out gradient of 'gain' must be dense"):
        context.__exit__(None, None, None)
    assert net.gain.grad is grad
    opt.step()


def test_one_of_a_parameter_that_has_changed_is_refused_once() -> None:
    net = Net()
    opt = made(net)
    held_out(net, opt, 0)
    net.gain.data = torch.zeros(3, dtype=torch.float64)
    net.gain.grad = torch.zeros(3, dtype=torch.float64)
    opt.state[net.gain] = {}  # to start afresh
    with pytest.raises(ValueError, match=r"held-out gradient of `params\['gain'\]` must have"):
        opt.step()
    opt.step()


def test_what_is_no_scaler_is_refused_before_anything_is_done() -> None:
    net = torch.nn.Linear(3, 1)
    opt = MetaOptimizer(net.parameters(), held_out=True, compile=False)
    with pytest.raises(TypeError, match=r"`scaler` must be a torch\.amp\.GradScaler; got 3"):
        opt.meta_gradients(scaler=3)
    with opt.meta_gradients(scaler=torch.amp.GradScaler("cpu", enabled=False)):
        net(torch.ones(2, 3)).sum().backward()


def test_a_context_made_earlier_knows_the_parameters_of_its_entry() -> None:
    net, late = torch.nn.Linear(3, 1), torch.nn.Parameter(torch.ones(2))
    opt = MetaOptimizer(net.parameters(), held_out=True, compile=False)
    made, other = opt.meta_gradients(), opt.meta_gradients()
    opt.add_param_group({"params": [late]})
    with made:
        with pytest.raises(RuntimeError, match="must not be called inside"), other:
            pass
        (net(torch.ones(2, 3)).sum() + late.sum()).backward()
    assert late.grad is None
    assert late in opt._held_out.grads
