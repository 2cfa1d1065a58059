"""Several processes that train one model in shared memory learn one step size for each block."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.multiprocessing  # noqa: E402, F811
from metaopt_torch import MetaOptimizer  # noqa: E402

import metaopt as mo  # noqa: E402

STEPS = 5


def made(net: Any, blocks: str = "tensor", **options: Any) -> MetaOptimizer:
    up, down = net
    groups = [
        {"params": list(up.named_parameters("0"))},
        {"params": list(down.named_parameters("1")), "weight_decay": 0.1},
    ]
    rules: dict[str, Any] = {
        "base": mo.AdamW(),
        "meta": mo.AdamW(),
        "compile": False,
        "discount": 1.0,
    }
    rules |= {"step_size": 1e-3, "meta_lr": 0.1, "blocks": blocks}
    return MetaOptimizer(groups, **(rules | options))


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1))


def train(net: Any, opt: Any, begin: int, end: int) -> None:
    for t in range(begin, end):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(t))
        opt.zero_grad()
        (net(x) - 3.0).square().mean().backward()
        opt.step()


def work(net: Any, opts: Any, begin: int) -> None:
    """Do what a worker does, in a process of its own."""
    torch.set_num_threads(1)
    for one, opt in zip(net, opts, strict=True):
        train(one, opt, begin, begin + STEPS)


def same_memory(opt: Any) -> Any:
    """Return another optimizer of the same parameters over the same state, as a worker has it."""
    other = MetaOptimizer.__new__(MetaOptimizer)
    state = opt.__getstate__()
    state["state"] = {param: dict(held) for param, held in state["state"].items()}
    state["param_groups"] = [dict(group) for group in state["param_groups"]]
    other.__setstate__(state)
    return other


def check(net: Any, opt: Any, alone: Any, opt_alone: Any) -> None:
    for got, want in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    for (name, got), want in zip(
        opt.step_sizes().items(), opt_alone.step_sizes().values(), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0.0, msg=name)
    for key in ("step", "skipped"):
        assert torch.equal(opt.param_groups[0][key], opt_alone.param_groups[0][key])
    for param in net.parameters():
        assert int(opt.state[param]["step"]) == int(opt.param_groups[0]["step"])


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("blocks", ["scalar", "tensor", "node", "weight"])
def test_optimizers_over_the_same_memory_are_one(blocks: str, before: int) -> None:
    """They take turns; each sees what the other has learned, packed before or not."""
    (net, alone), opts = (network(), network()), []
    for one in (net, alone):
        opt = made(one, blocks)
        train(one, opt, 0, before)
        opts.append(opt)
    opts[0].share_memory()
    turns = [opts[0], same_memory(opts[0])]
    for t in range(before, before + 6):
        train(net, turns[t % 2], t, t + 1)
        train(alone, opts[1], t, t + 1)
        for opt in turns:
            check(net, opt, alone, opts[1])
    turns[0].param_groups[1]["weight_decay"] = 0.2  # what is built anew stays where it is
    opts[1].param_groups[1]["weight_decay"] = 0.2
    turns[0].zero_grad()
    for one, opt in ((net, turns[0]), (alone, opts[1])):
        x = torch.ones(4, 5)
        opt.zero_grad()
        one(x).sum().backward()
        one[0].bias.grad = None
        opt.step()
    torch.testing.assert_close(
        torch.cat([p.flatten() for p in net.parameters()]),
        torch.cat([p.flatten() for p in alone.parameters()]),
    )
    for name, size in turns[1].step_sizes().items():
        assert torch.equal(size, turns[0].step_sizes()[name])


def test_a_spawned_worker_goes_on_with_the_same_state() -> None:
    """What it learned is there when it has ended, as with torch's own optimizers."""
    nets, alone = [network(), network()], [network(), network()]
    opts = [made(nets[0]), made(nets[1], "scalar")]
    opts_alone = [made(alone[0]), made(alone[1], "scalar")]
    for net in nets:
        net.share_memory()
    for net, opt in ((nets[0], opts[0]), (alone[0], opts_alone[0])):
        train(net, opt, 0, 2)
    context = torch.multiprocessing.get_context("spawn")
    worker = context.Process(target=work, args=(nets, opts, 2))
    worker.start()
    worker.join(120)
    assert worker.exitcode == 0
    for net, opt, other, other_opt in zip(nets, opts, alone, opts_alone, strict=True):
        train(other, other_opt, 2, 2 + STEPS)
        check(net, opt, other, other_opt)
        train(other, other_opt, 10, 12)
        train(net, opt, 10, 12)
        check(net, opt, other, other_opt)


def test_step_sizes_that_are_not_shared_along_are_refused() -> None:
    net = network()
    opt = made(net)
    for state in opt.state.values():
        for value in state.values():
            value.share_memory_()
    before = [param.detach().clone() for param in net.parameters()]
    with pytest.raises(ValueError, match=r"`state` of '0\.weight' is in shared memory.*share_memo"):
        train(net, opt, 0, 1)
    assert all(map(torch.equal, before, net.parameters()))
    assert opt.share_memory() is opt
    train(net, opt, 0, 1)


def test_groups_that_change_under_shared_state_are_refused() -> None:
    opt = made(network()).share_memory()
    with pytest.raises(ValueError, match="in shared memory, but in pieces"):
        opt.add_param_group({"params": [("late", torch.ones(3, requires_grad=True))]})
    assert len(opt.param_groups) == 2
