"""Several discounts in torch: what a state holds, and how it is saved, loaded and edited.

That the steps are those of the core stands in test_torch_core.py, compiled ones in
test_torch_compiled.py, distributed ones in test_torch_distributed.py.
"""

import copy
import io
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from metaopt_torch import MetaOptimizer  # noqa: E402

import metaopt as mo  # noqa: E402
from metaopt.arrays import map_leaves  # noqa: E402
from tests.torch_states import assert_same  # noqa: E402

OPTIONS: dict[str, dict[str, Any]] = {
    "tensor": {"blocks": "tensor"},
    "weight": {"blocks": "weight"},
    "two passes": {"skip_nonfinite": True},
    "softplus": {"sigma": "softplus"},
    "diagonal": {"curvature": "diagonal"},
}


def made(net: Any, discount: Any = (0.9, 1.0), **options: Any) -> MetaOptimizer:
    return MetaOptimizer(
        net if isinstance(net, list) else net.named_parameters(),
        base=mo.AdamW(weight_decay=0.1),
        meta=mo.FastStart(mo.AdamW()),
        step_size=1e-2,
        meta_lr=1e-2,
        discount=discount,
        compile=False,
        **options,
    )


def network(dtype: Any = torch.float32) -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).to(
        dtype
    )


def trained(opt: Any, net: Any, steps: int = 5) -> None:
    dtype = net[0].weight.dtype
    for t in range(steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(t)).to(dtype)
        opt.zero_grad()
        (net(x) - x[:, :2]).square().mean().backward()
        diagonal = None
        if opt.config.curvature == "diagonal":
            diagonal = {name: torch.ones_like(p) for name, p in net.named_parameters()}
        opt.step(hessian_diagonal=diagonal)


def test_a_parameter_has_an_average_for_each_discount() -> None:
    net = network()
    opt = made(net, (0.9, 0.99, 1.0), blocks="tensor")
    trained(opt, net)
    for param in net.parameters():
        entry = opt.state[param]
        averages = {key for key in entry if key.startswith("average")}
        assert averages == {"average_0", "average_1", "average_2"}
        assert all(entry[key].shape == param.shape for key in averages)
    assert opt.param_groups[0]["meta_grad"].shape == (3, 4)
    assert opt.diagnostics()["decided"]["0.weight"].shape == (3,)
    assert opt.step_sizes()["0.weight"].shape == ()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_from_its_state_dict(name: str, dtype: Any) -> None:
    nets = [network(dtype), network(dtype)]
    opts = [made(net, **OPTIONS[name]) for net in nets]
    trained(opts[0], nets[0])
    nets[1].load_state_dict(nets[0].state_dict())
    file = io.BytesIO()
    torch.save(opts[0].state_dict(), file)
    file.seek(0)
    opts[1].load_state_dict(torch.load(file, weights_only=True))
    assert_same(opts[1].state_dict(), opts[0].state_dict())
    for opt, net in zip(opts, nets, strict=True):
        trained(opt, net)
    assert_same(opts[1].state_dict(), opts[0].state_dict())
    assert_same(nets[1].state_dict(), nets[0].state_dict())


@pytest.mark.parametrize("name", OPTIONS)
def test_the_cores_state_goes_both_ways(name: str) -> None:
    net = network()
    opt = made(net, **OPTIONS[name])
    trained(opt, net)
    state, other = opt.core_state(), made(net, **OPTIONS[name])
    other.load_core_state(state)
    again = other.core_state()
    for field in vars(state):
        map_leaves(
            lambda one, two: assert_same(one, two), getattr(again, field), getattr(state, field)
        )
    assert_same(
        other.state_dict()["state"],
        {
            number: {key: opt.state_dict()["state"][number][key] for key in entry}
            for number, entry in other.state_dict()["state"].items()
        },
    )


@pytest.mark.parametrize("blocks", ["scalar", "weight"])
@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (1.0, (0.9, 1.0), "it was made with AdamW, FastStart of AdamW, exp; expected"),
        ((0.9, 1.0), 1.0, "exp, 2 discounts; expected AdamW, FastStart of AdamW, exp"),
        ((0.9, 1.0), (0.9, 0.99, 1.0), "2 discounts; expected .* 3 discounts"),
        ((1.0,), 1.0, "1 discount"),
    ],
)
def test_a_state_of_another_number_is_refused(
    saved: Any, loaded: Any, message: str, blocks: str
) -> None:
    net = network()
    opt, other = (made(net, discount, blocks=blocks) for discount in (saved, loaded))
    trained(opt, net)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match=r"`state\."):
        other.load_core_state(opt.core_state())
    assert_same(other.state_dict(), before)


def test_weights_of_another_dtype_have_averages_for_traces() -> None:
    net, wide = network(torch.bfloat16), network(torch.bfloat16)
    opt = made(net)
    trained(opt, net)
    wide.load_state_dict(net.state_dict())
    wide.float()
    other = made(wide)
    other.load_state_dict(opt.state_dict())
    for param, narrow in zip(wide.parameters(), net.parameters(), strict=True):
        for index in range(2):
            trace = opt.state[narrow][f"trace_{index}"]
            average = other.state[param][f"average_{index}"]
            assert torch.equal(average, param.detach() - trace)


def test_groups_come_and_go_and_keep_what_their_blocks_have() -> None:
    net = network()
    named = list(net.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    opt = made(groups, blocks="tensor")
    trained(opt, net)
    last = {
        key: opt.param_groups[1][key].clone() for key in ("meta_grad", "meta_decided", "meta_peak")
    }
    averages = [opt.state[param]["average_0"].clone() for param in net[2].parameters()]
    extra = torch.nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [("extra", extra)]})
    assert opt.param_groups[2]["meta_grad"].tolist() == [[0.0], [0.0]]
    opt.param_groups.pop(0)
    extra.grad = torch.ones(2)
    trained(opt, net, 0)
    opt.step_sizes()
    for key, value in last.items():
        assert torch.equal(opt.param_groups[0][key], value), key
    for param, average in zip(net[2].parameters(), averages, strict=True):
        assert torch.equal(opt.state[param]["average_0"], average)
    opt.step()
    assert torch.equal(opt.state[extra]["average_1"], torch.ones(2))
