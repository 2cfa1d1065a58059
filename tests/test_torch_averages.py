"""Averaged weights in torch: put in the place of the parameters, and taken away without a trace."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from metaopt_conformance.tolerances import relative_error, rounding  # noqa: E402
from metaopt_torch import MetaOptimizer, buckets, wrap  # noqa: E402

import metaopt as mo  # noqa: E402
from metaopt.arrays import to_numpy  # noqa: E402
from tests.torch_states import assert_same  # noqa: E402

OPTIONS: dict[str, dict[str, Any]] = {
    "one discount": {"discount": 0.8},
    "several": {},
    "tensor": {"blocks": "tensor"},
    "node": {"blocks": "node"},
    "weight": {"blocks": "weight"},
    "two passes": {"meta_first": True, "blocks": "tensor"},
    "recover": {"recover": True},
    "own mean": {"base": mo.Averaged(mo.AdamW(weight_decay=0.3))},
    "own mean, one discount": {"base": mo.Averaged(mo.Lion()), "discount": 1.0},
}


def made(params: Any, **options: Any) -> MetaOptimizer:
    defaults: dict[str, Any] = {
        "base": mo.AdamW(weight_decay=0.3),
        "meta": mo.AdamW(),
        "step_size": 0.05,
        "meta_lr": 0.05,
        "discount": (0.8, 1.0),
        "compile": False,
    }
    return MetaOptimizer(params, **(defaults | options))


def network(dtype: Any = torch.float64) -> Any:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    return net.to(dtype)


def trained(opt: Any, net: Any, steps: int = 8, after: Callable[[int], Any] = int) -> None:
    """Train with a schedule, and a step in which one parameter has no gradient."""
    for t in range(steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(t)).to(net[0].weight.dtype)
        opt.zero_grad()
        (net(x) - x[:, :2]).square().mean().backward()
        if t == 3:
            net[2].bias.grad = None
        for group in opt.param_groups:
            group["lr"] = (1.0, 0.5, 0.0)[t % 3]
        opt.step()
        after(t)


@pytest.mark.parametrize("small", [0, 2**16], ids=["direct", "packed"])
@pytest.mark.parametrize("name", OPTIONS)
def test_they_are_those_of_the_core(name: str, small: int, monkeypatch: Any) -> None:
    monkeypatch.setitem(buckets.SMALL, "cpu", small)
    net = network()
    opt = made(net.named_parameters(), **OPTIONS[name])
    trained(opt, net)
    params = {name: param.detach().clone() for name, param in net.named_parameters()}
    want = opt.config.averaged_params(opt.core_state(), params)
    found = opt.averaged_params(copy=True)
    assert list(found) == list(params)
    allowed = rounding("float64", operations=10)
    with opt.averaged_params():
        for key, param in net.named_parameters():
            assert not torch.equal(param, params[key])
            assert torch.equal(param, found[key])
            assert relative_error(to_numpy(found[key]), to_numpy(want[key])) < allowed
    for key, param in net.named_parameters():
        assert torch.equal(param, params[key])


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_with_evaluations_is_the_run_without(name: str, monkeypatch: Any) -> None:
    """To the last bit; and nothing is built or packed anew."""
    nets = [network(), network()]
    opts = [made(net.named_parameters(), **OPTIONS[name]) for net in nets]
    trained(opts[0], nets[0])

    def evaluated(t: int) -> None:
        if t == 0:  # from here on all is packed, but for what step 3 leaves out
            monkeypatch.setattr(opts[1], "_build", None)
        with opts[1].averaged_params():
            nets[1](torch.zeros(1, 4, dtype=torch.float64))
        opts[1].averaged_params(copy=True)

    trained(opts[1], nets[1], after=evaluated)
    monkeypatch.undo()
    assert_same(opts[1].state_dict(), opts[0].state_dict())
    for one, other in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_group_has_its_own_hyperparameters_within_an_average() -> None:
    """As its rule would have them without, alone and in what is compiled for it."""
    nets = [network(), network()]
    for net, base in zip(nets, (mo.AdamW(), mo.Averaged(mo.AdamW())), strict=True):
        decayed = {"weight_decay": 0.3, "betas": (0.5, 0.9)}
        groups = [{"params": net[0].parameters(), **decayed}, {"params": net[2].parameters()}]
        opt = made(groups, base=base)
        trained(opt, net)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert opt.param_groups[0]["betas"] == (0.5, 0.9)


def test_a_state_of_another_rule_within_is_refused() -> None:
    net = network()
    opt, other = (
        made(net.parameters(), base=mo.Averaged(rule)) for rule in (mo.AdamW(), mo.NAdamW())
    )
    trained(opt, net)
    with pytest.raises(ValueError, match="Averaged of AdamW"):
        other.load_state_dict(opt.state_dict())


def test_after_an_exception_the_parameters_are_what_they_were() -> None:
    net = network()
    opt = made(net.parameters())
    trained(opt, net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ZeroDivisionError), opt.averaged_params():
        net[0].weight.data.fill_(1 / 0)
    assert_same(net.state_dict(), before)
    opt.step()


def test_what_is_for_the_parameters_of_training_is_refused_inside() -> None:
    net = network()
    opt = made(net.parameters(), blocks="tensor")
    trained(opt, net)
    before = copy.deepcopy(opt.state_dict())
    calls: dict[str, Callable[[], Any]] = {
        "step": opt.step,
        "step with a closure": lambda: opt.step(lambda: pytest.fail("the closure was called")),
        "deepcopy": lambda: copy.deepcopy(opt),
        "pickle": lambda: pickle.dumps(opt),
        "nested": lambda: opt.averaged_params().__enter__(),
        "copy": lambda: opt.averaged_params(copy=True),
        "state_dict": opt.state_dict,
        "load_state_dict": lambda: opt.load_state_dict(before),
        "core_state": opt.core_state,
        "diagnostics": opt.diagnostics,
        "project": lambda: opt.project(lambda params: params),
        "add_param_group": lambda: opt.add_param_group({"params": [torch.zeros(2)]}),
    }
    made_before = opt.averaged_params()
    with opt.averaged_params():
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=r"Inside `with opt.averaged_params\(\):`"):
                call()
            assert len(opt.param_groups) == 1, name
        with pytest.raises(RuntimeError, match="Inside"), made_before:
            pass
        assert set(opt.step_sizes()) == {"0", "1", "2", "3"}
        assert opt.config.blocks == "tensor"
    assert_same(opt.state_dict(), before)
    opt.step()


def test_what_a_scheduler_changed_is_built_in_inference_mode_too() -> None:
    nets = [network(), network()]
    for net in nets:
        opt = made(net.named_parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=10)
        for t in range(4):
            opt.zero_grad()
            net(torch.full((1, 4), float(t), dtype=torch.float64)).square().mean().backward()
            opt.step()
            schedule.step()
            if net is nets[0]:
                with torch.inference_mode(), opt.averaged_params():
                    net(torch.zeros(1, 4, dtype=torch.float64))
    assert_same(nets[0].state_dict(), nets[1].state_dict())


def test_the_backup_is_held_inside_alone() -> None:
    param = torch.nn.Parameter(torch.ones(1000))
    opt = made([param], base=mo.SGD())
    param.grad = torch.ones_like(param)
    opt.step()
    opt.step()
    held = {id(value) for value in opt.state[param].values()}
    address, version = param.data_ptr(), param._version
    with opt.averaged_params():
        assert param.data_ptr() == address
        assert param._version > version  # of which autograd is told
    assert param.data_ptr() == address
    assert {id(value) for value in opt.state[param].values()} == held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nearest", "kahan"])
def test_narrow_parameters_have_them_in_their_dtype(dtype: Any, kind: str) -> None:
    net = network(dtype)
    opt = made(net.named_parameters(), rounding=kind)
    trained(opt, net, 12)
    found, state = opt.averaged_params(copy=True), opt.core_state()
    for name, param in net.named_parameters():
        lost = opt.state[param].get("compensation", torch.zeros(()))
        mean = param.detach().float() + lost - state.trace[name][0]
        assert found[name].dtype == dtype
        assert torch.equal(found[name], mean.to(dtype))
    before = copy.deepcopy(net.state_dict())
    with opt.averaged_params():
        assert torch.equal(net[0].weight, found["0.weight"])
    assert_same(net.state_dict(), before)


def test_frozen_parameters_and_those_before_a_step_are_as_they_are() -> None:
    net = network()
    net[0].weight.requires_grad_(False)
    opt = made(net.named_parameters())
    for name, average in opt.averaged_params(copy=True).items():
        param = net.get_parameter(name)
        assert torch.equal(average, param)
        assert average.data_ptr() != param.data_ptr()
        assert not average.requires_grad
    trained(opt, net)
    assert torch.equal(opt.averaged_params(copy=True)["0.weight"], net[0].weight)


def test_a_trace_that_is_yet_to_restart_has_none() -> None:
    """In one pass what a meta-gradient that is not finite does is seen a step later."""
    net = network()
    opt = made(net.named_parameters(), blocks={"first": "0.*", "last": "2.*"})
    trained(opt, net)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    net[0].weight.grad[0, 0] = float("inf")
    opt.step()
    found = opt.averaged_params(copy=True)
    assert torch.equal(found["0.bias"], net[0].bias)
    assert not torch.equal(found["2.bias"], net[2].bias)


def test_those_of_an_optimizer_that_is_wrapped() -> None:
    net = network()
    inner = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
    opt = wrap(inner, meta=mo.AdamW(), step_size=0.05, discount=(0.8, 1.0), compile=False)
    averages = [param.detach().clone() for param in net.parameters()]
    for t in range(6):
        before = [param.detach().clone() for param in net.parameters()]
        opt.zero_grad()
        net(torch.full((1, 4), float(t), dtype=torch.float64)).square().mean().backward()
        opt.step()
        averages = [0.2 * w + 0.8 * a if t else w for w, a in zip(before, averages, strict=True)]
    for call in (
        opt.step,
        lambda: opt.step(lambda: pytest.fail("the closure was called")),
        lambda: copy.deepcopy(opt),
    ):
        with opt.averaged_params(), pytest.raises(RuntimeError, match="Inside"):
            call()
    for found, want in zip(opt.averaged_params(copy=True).values(), averages, strict=True):
        assert relative_error(to_numpy(found), to_numpy(want)) < 1e-12


def test_batch_norm_and_a_second_model() -> None:
    """As docs/torch.md says: statistics are made anew for the averages."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 1))
    opt = made(net.named_parameters(), base=mo.AdamW(), discount=(0.9, 1.0), step_size=1e-2)
    batches = [torch.randn(32, 4) * 3.0 + 1.0 for _ in range(30)]
    for x in batches:
        opt.zero_grad()
        (net(x) - x.sum(dim=1, keepdim=True)).square().mean().backward()
        opt.step()
    second = copy.deepcopy(net)
    second.load_state_dict(opt.averaged_params(copy=True), strict=False)
    torch.optim.swa_utils.update_bn(batches, second)
    with opt.averaged_params():
        torch.optim.swa_utils.update_bn(batches, net)
        assert_same(net.state_dict(), second.state_dict())
        with torch.no_grad():
            hidden = torch.cat([net[0](x) for x in batches])
        mean = net[1].running_mean
        assert mean is not None
        assert torch.allclose(mean, hidden.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert not torch.equal(net[0].weight, second[0].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discount": 1.0}, "need a `discount` below 1"),
        ({"sigma": "softplus"}, '`sigma` "exp"'),
        ({"curvature": "diagonal"}, '`curvature` "none"'),
    ],
)
@pytest.mark.parametrize("copy", [False, True])
def test_where_there_are_none(options: dict[str, Any], message: str, copy: Any) -> None:
    opt = made(network().parameters(), **options)
    with pytest.raises(ValueError, match=message):
        opt.averaged_params(copy=copy)
