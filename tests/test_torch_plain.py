"""What a plain optimizer of torch's goes on with: step sizes, moments and counts."""

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from metaopt_conformance.tolerances import relative_error  # noqa: E402
from metaopt_torch import MetaOptimizer  # noqa: E402

import metaopt as mo  # noqa: E402


def network() -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)]
    return torch.nn.Sequential(*layers).double()


def trained(net: Any, opt: Any, steps: range) -> None:
    for t in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t)).double()
        opt.zero_grad()
        (net(x) - x.sum(dim=1, keepdim=True).sin()).square().mean().backward()
        opt.step()


RULES = {
    "AdamW": mo.AdamW(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    "AdamW, decay apart": mo.AdamW(weight_decay=0.1, decay_step_size=0.02),
    "SGD": mo.SGD(weight_decay=0.1),
    "SGD with momentum": mo.SGD(momentum=0.9),
    "RMSprop": mo.RMSprop(bias_correction=False),
}


@pytest.mark.parametrize("blocks", ["scalar", "tensor", {"first": "0.*", "rest": "*"}])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_it_goes_on_as_if_nothing_were_learned_any_more(rule: Any, blocks: Any) -> None:
    """As the same optimizer with a `meta_lr` of 0 from here on, under a multiplier."""
    options: dict[str, Any] = {"base": rule, "step_size": 0.01, "compile": False, "lr": 0.5}
    net = network()
    opt = MetaOptimizer(net.named_parameters(), blocks=blocks, meta_lr=0.05, **options)
    trained(net, opt, range(8))
    other = copy.deepcopy(net)
    plain = opt.to_plain()
    sizes = {name: float(size) for name, size in opt.step_sizes().items()}
    held = MetaOptimizer(
        other.named_parameters(),
        blocks=blocks,
        **(options | {"step_size": sizes, "meta_lr": 0.0}),
    )
    state, own = opt.core_state(), held.core_state()
    held.load_core_state(mo.State(**(vars(state) | {"beta": own.beta})))
    trained(net, plain, range(8, 14))
    trained(other, held, range(8, 14))
    for one, another in zip(net.parameters(), other.parameters(), strict=True):
        assert relative_error(one.detach().numpy(), another.detach().numpy()) < 1e-12


def test_groups_schedules_and_state_dicts_are_torchs_own() -> None:
    net = network()
    groups = [
        {"params": [("a", net[0].weight)], "weight_decay": 0.2, "lr": 0.5},
        {"params": [("b", net[0].bias), ("c", net[2].weight)], "betas": (0.5, 0.9)},
    ]
    opt = MetaOptimizer(groups, base=mo.AdamW(weight_decay=0.1), blocks="tensor", compile=False)
    trained(net, opt, range(3))
    plain = opt.to_plain()
    size = {name: float(size) for name, size in opt.step_sizes().items()}
    found = [(g["param_names"], g["lr"], g["weight_decay"]) for g in plain.param_groups]
    assert found == [
        (["a"], 0.5 * size["a"], 0.2),
        (["b"], size["b"], 0.1),
        (["c"], size["c"], 0.1),
    ]
    assert [group["betas"] for group in plain.param_groups] == [(0.9, 0.999), *[(0.5, 0.9)] * 2]
    assert not any(key.startswith(("trace", "average")) for s in plain.state.values() for key in s)
    scheduler = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: 0.5**step)
    trained(net, plain, range(3, 4))
    scheduler.step()
    assert plain.param_groups[0]["lr"] == 0.25 * size["a"]
    fresh = torch.optim.AdamW([{**g, "params": list(g["params"])} for g in plain.param_groups])
    fresh.load_state_dict(plain.state_dict())
    assert float(fresh.state[net[0].weight]["step"]) == 4.0
    before = net[0].weight.detach().clone()
    opt.state.clear()  # which is its own
    trained(net, plain, range(4, 5))
    assert not torch.equal(before, net[0].weight)


def test_keys_of_ones_own_stay_in_the_groups() -> None:
    net = network()
    own: dict[str, Any] = {"name": "first", "depth": 3, "amsgrad": True}
    groups = [{"params": net[0].parameters(), **own}, {"params": net[2].parameters()}]
    opt = MetaOptimizer(groups, blocks="tensor", compile=False)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0)
    trained(net, opt, range(1))
    plain = opt.to_plain()
    usual = set(torch.optim.AdamW([torch.ones(1)]).param_groups[0]) | {"param_names"}
    assert [set(group) - usual for group in plain.param_groups] == [{"name", "depth"}] * 2 + [
        set()
    ] * 2
    assert (plain.param_groups[1]["name"], plain.param_groups[1]["depth"]) == ("first", 3)
    assert not plain.param_groups[0]["amsgrad"], "it is the option of another optimizer"


def test_it_is_refused_where_parameters_or_gradients_are_others() -> None:
    net = network()
    opt = MetaOptimizer(net.parameters(), held_out=True, compile=False)
    with opt.meta_gradients():
        net(torch.ones(2, 4).double()).sum().backward()
        with pytest.raises(RuntimeError, match="`to_plain` must not be called inside"):
            opt.to_plain()
    trained(net, opt, range(1))
    with (
        opt.averaged_params(),
        pytest.raises(RuntimeError, match=r"Inside `with opt\.averaged_params"),
    ):
        opt.to_plain()
    opt.to_plain()
    one = MetaOptimizer(net.parameters(), compile=False)
    one.step_in_backward()
    net(torch.ones(2, 4).double()).sum().backward()
    with pytest.raises(RuntimeError, match="call `step` first"):
        one.to_plain()


def test_before_the_first_step_there_are_no_moments() -> None:
    net = network()
    plain = MetaOptimizer(net.parameters(), step_size=0.1, compile=False).to_plain()
    assert not plain.state
    trained(net, plain, range(2))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Lion": ({"base": mo.Lion()}, "`base` must be a rule that torch has an optimizer for"),
    "delayed": ({"base": mo.AdamW(delayed=True)}, "`base` must be a rule that torch has"),
    "momentum and decay": ({"base": mo.SGD(momentum=0.9, weight_decay=0.1)}, "torch has an"),
    "bias correction": ({"base": mo.RMSprop()}, "torch has an optimizer for"),
    "several": ({"base": {"0.*": mo.SGD(), "*": mo.AdamW()}}, "those of SGD and AdamW"),
    "a step size a unit": ({"blocks": "node"}, "`blocks` must give each parameter one step size"),
    "a step size a weight": ({"blocks": "weight"}, "`blocks` must give each parameter one"),
    "learned": (
        {"base": mo.AdamW(weight_decay=mo.Learned(0.1))},
        "and none that is learned; got 'weight_decay'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_has_not_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    opt = MetaOptimizer(network().named_parameters(), compile=False, **options)
    with pytest.raises(ValueError, match=message):
        opt.to_plain()


def test_a_parameter_without_a_step_makes_its_first_as_before() -> None:
    """torch's SGD would take the whole gradient into a new buffer, whatever its dampening."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = MetaOptimizer(params, base=mo.SGD(momentum=0.9), step_size=0.1, compile=False)
    plain = opt.to_plain()
    params[0].grad = torch.ones(3)
    plain.step()
    assert params[0].tolist() == pytest.approx([1.0 - 0.1 * (1.0 - 0.9)] * 3)


def test_decay_apart_needs_a_step_size_to_become_weight_decay() -> None:
    base = mo.SGD(weight_decay=0.1, decay_step_size=1e-3)
    options: dict[str, Any] = {
        "sigma": "identity",
        "step_size": 0.0,
        "discount": 1.0,
        "compile": False,
    }
    opt = MetaOptimizer([torch.nn.Parameter(torch.ones(3))], base=base, **options)
    with pytest.raises(ValueError, match="the step size of block 'all' must not be 0"):
        opt.to_plain()
