"""State dicts of runs whose parameters come in another order, or are called otherwise."""

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from metaopt_torch import MetaOptimizer  # noqa: E402

import metaopt as mo  # noqa: E402

OPTIONS: dict[str, Any] = {
    "base": mo.AdamW(),
    "meta": mo.AdamW(),
    "step_size": 1e-2,
    "meta_lr": 1e-2,
    "compile": False,
    "discount": 1.0,
}
#: Shapes that do not tell one layer from another.
LAYERS = ("head", "body", "stem")


def network(order: Any = LAYERS) -> Any:
    torch.manual_seed(0)
    made = {name: torch.nn.Linear(3, 3).double() for name in LAYERS}
    return torch.nn.ModuleDict({name: made[name] for name in order})


def trained(net: Any, opt: Any, steps: range) -> None:
    for t in steps:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(t)).double()
        y = x
        for name in LAYERS:
            y = net[name](y).tanh()
        loss = (y - x.flip(1)).square().mean()
        opt.zero_grad()
        if opt.config.curvature == "exact":
            opt.backward(loss)
        else:
            loss.backward()
        opt.step()


def by_layer(net: Any) -> Any:
    return [
        {"params": [*layer.named_parameters(name)], "block": name, "layer": name}
        for name, layer in net.items()
    ]


def by_kind(net: Any) -> Any:
    named = [*net.named_parameters()]
    return [
        {"params": [pair for pair in named if pair[1].dim() == dim], "lr": lr}
        for dim, lr in ((2, 1.0), (1, 0.5))
    ]


CASES: dict[str, Any] = {
    "scalar": (lambda net: net.named_parameters(), {}),
    "tensor": (lambda net: net.named_parameters(), {"blocks": "tensor"}),
    "node": (lambda net: net.named_parameters(), {"blocks": "node"}),
    "weight": (lambda net: net.named_parameters(), {"blocks": "weight"}),
    "named": (
        lambda net: net.named_parameters(),
        {"blocks": {"head": "head.*", "rest": "*"}, "base": {"*.bias": mo.SGD(), "*": mo.AdamW()}},
    ),
    "a group for each layer": (by_layer, {}),
    "a group for each kind": (by_kind, {"blocks": "tensor"}),
    "exact": (
        lambda net: net.named_parameters(),
        {"blocks": "tensor", "curvature": "exact", "approximation": "2x2"},
    ),
}


def by_name(net: Any, opt: MetaOptimizer) -> Any:
    """Return all that a run consists of, by name."""
    state = opt.core_state()
    return {
        "params": dict(net.named_parameters()),
        "sizes": opt.step_sizes(),
        "slots": dict(state.slots),
        "count": dict(state.count),
    }


def assert_same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            # sums over parameters are taken in another order
            torch.testing.assert_close(value, other[key], rtol=1e-11, atol=1e-13)
        else:
            assert_same(value, other[key])


@pytest.mark.parametrize("case", CASES)
def test_layers_that_come_in_another_order_are_loaded_by_name(case: str) -> None:
    groups, extra = CASES[case]
    nets = [network(), network(("stem", "head", "body"))]
    opts = [MetaOptimizer(groups(net), **(OPTIONS | extra)) for net in nets]
    trained(nets[0], opts[0], range(4))
    nets[1].load_state_dict(nets[0].state_dict())
    saved = copy.deepcopy(opts[0].state_dict())
    names = [list(group["param_names"]) for group in opts[1].param_groups]
    opts[1].load_state_dict(saved)
    assert [group["param_names"] for group in opts[1].param_groups] == names
    assert_same(by_name(nets[0], opts[0]), by_name(nets[1], opts[1]))
    for net, opt in zip(nets, opts, strict=True):
        trained(net, opt, range(4, 8))
    assert_same(by_name(nets[0], opts[0]), by_name(nets[1], opts[1]))
    if case == "a group for each layer":
        layers = [group["layer"] for group in opts[1].param_groups]
        assert layers == ["stem", "head", "body"]


def test_a_head_keeps_its_step_size() -> None:
    """The least case: two parameters of one shape."""
    params = {name: torch.ones(2, requires_grad=True) for name in ("body", "head")}
    options = OPTIONS | {"blocks": "tensor", "step_size": {"body": 1e-3, "head": 1e-1}}
    opt = MetaOptimizer(params.items(), **options)
    other = MetaOptimizer(reversed(params.items()), **options)
    other.load_state_dict(opt.state_dict())
    assert {name: round(float(size), 6) for name, size in other.step_sizes().items()} == {
        "head": 0.1,
        "body": 0.001,
    }


def saved(names: Any) -> Any:
    return MetaOptimizer([(name, torch.ones(2)) for name in names], **OPTIONS).state_dict()


def test_other_names_in_the_same_places_are_loaded_by_position() -> None:
    """As from a model that was wrapped, whose names have a prefix."""
    opt = MetaOptimizer([(name, torch.ones(2)) for name in "ab"], **OPTIONS)
    for names in (("module.a", "module.b"), ("a", "c")):
        state = saved(names)
        state["param_groups"][0]["beta"] = torch.tensor([-1.0])
        opt.load_state_dict(state)
        assert opt.param_groups[0]["param_names"] == ["a", "b"]
        assert float(opt.step_sizes()["all"]) == pytest.approx(0.36787944)


def test_names_stay_away_where_there_were_none() -> None:
    opt = MetaOptimizer([torch.ones(2), torch.ones(2)], **(OPTIONS | {"blocks": "tensor"}))
    named = MetaOptimizer(
        [(name, torch.ones(2)) for name in "ab"], **(OPTIONS | {"blocks": "tensor"})
    )
    opt.load_state_dict(named.state_dict())
    assert "param_names" not in opt.param_groups[0]
    assert list(opt.step_sizes()) == ["0", "1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("b", "c"), "has parameter 'b' in another place .* it has 'c' too"),
        (("c", "a"), "has parameter 'a' in another place .* it has 'c' too"),
    ],
)
def test_names_that_contradict_the_positions_are_refused(names: Any, message: str) -> None:
    opt = MetaOptimizer([(name, torch.ones(2)) for name in "ab"], **OPTIONS)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved(names))
    assert str(opt.state_dict()) == str(before)


def test_groups_of_other_parameters_are_refused() -> None:
    params = {name: torch.ones(2) for name in "abcd"}

    def made(*groups: str) -> MetaOptimizer:
        return MetaOptimizer(
            [{"params": [(name, params[name]) for name in some]} for some in groups], **OPTIONS
        )

    with pytest.raises(ValueError, match=r"'b' in another place .* its groups hold other"):
        made("ab", "cd").load_state_dict(made("ac", "bd").state_dict())


def test_a_state_is_loaded_again_after_a_group_has_come() -> None:
    opt = MetaOptimizer([("a", torch.ones(2))], **OPTIONS)
    opt.load_state_dict(opt.state_dict())
    opt.add_param_group({"params": [("b", torch.ones(3))]})
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["beta"] = torch.tensor([-1.0])
    opt.load_state_dict(state)
    assert float(opt.step_sizes()["all"]) == pytest.approx(0.36787944)


def test_shapes_are_looked_at_where_nothing_was_learned_yet() -> None:
    """A parameter that is frozen here has no state to compare with."""
    opt = MetaOptimizer([torch.ones(3, requires_grad=True)], **OPTIONS)
    frozen = MetaOptimizer([torch.ones(2)], **OPTIONS)
    with pytest.raises(ValueError, match=r"of '0' has shape \(3,\); expected"):
        frozen.load_state_dict(opt.state_dict())


def test_dense_traces_are_loaded_in_another_dtype() -> None:
    net = network()
    options: dict[str, Any] = OPTIONS | {"blocks": "tensor", "curvature": "exact"}
    opt = MetaOptimizer(net.named_parameters(), **options)
    trained(net, opt, range(3))
    narrow = network().float()
    other = MetaOptimizer(narrow.named_parameters(), **options)
    other.load_state_dict(opt.state_dict())
    for wide, param in zip(net.parameters(), narrow.parameters(), strict=True):
        for key in ("trace", "exp_avg_trace"):
            assert opt.state[wide][key].any()
            torch.testing.assert_close(other.state[param][key], opt.state[wide][key].float())
