"""Optimizers of torch's, wrapped: equal to the core's own rules, or to the method written out."""

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from metaopt_conformance.table import FORMS, counterpart  # noqa: E402
from metaopt_conformance.tolerances import relative_error  # noqa: E402
from metaopt_torch import MetaOptimizer, WrappedOptimizer, wrap  # noqa: E402

import metaopt as mo  # noqa: E402
from tests.test_torch_optimizer import bits  # noqa: E402

#: Of 200 steps in float64, whose errors training does not magnify on these problems.
ROUNDING = 2e-13
META: dict[str, Any] = {"meta": mo.AdamW(), "meta_lr": 1e-2, "compile": False}


class Lion(torch.optim.Optimizer):  # type: ignore[misc, name-defined]
    """Lion as Chen et al. (2023) print it; torch has none."""

    def __init__(self, params: Any, lr: float, betas: Any = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is not None:
                    exp_avg = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    sign = (beta1 * exp_avg + (1 - beta1) * p.grad).sign()
                    p.mul_(1 - lr * group["weight_decay"]).sub_(lr * sign)
                    exp_avg.mul_(beta2).add_((1 - beta2) * p.grad)


def model(dtype: Any = torch.float64, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)]
    return torch.nn.Sequential(*layers).to(dtype)


def backward(net: Any, t: int) -> Any:
    dtype = next(net.parameters()).dtype
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t)).to(dtype)
    net.zero_grad()
    loss = (net(x) - torch.sin(x[:, :2] + 0.01 * t)).square().mean()
    loss.backward()
    return loss


def train(net: Any, opt: Any, steps: range, *, rest: bool = False) -> None:
    for t in steps:
        backward(net, t)
        if rest and t % 5 == 3:
            net[2].bias.grad = None
        opt.step()


def error(net: Any, other: Any) -> float:
    """Return how far the parameters of one network are from those of another."""
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    return max(relative_error(p.detach().numpy(), q.detach().numpy()) for p, q in pairs)


# --- equal to the core's own rules


def of_torch(name: str, **options: Any) -> Callable[[Any], Any]:
    """Return what makes an optimizer of torch's with lr 1; torch has no Lion."""
    kind = Lion if name == "Lion" else getattr(torch.optim, name)
    return lambda params: kind(params, lr=1.0, **options)


OWN: list[tuple[Any, Callable[[Any], Any]]] = [
    (rule, of_torch(found[0], **found[1]))
    for rule in (*FORMS, mo.AdamW(betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1))
    if (found := counterpart("torch", rule)) is not None
]
OWN += [
    (mo.SGD(weight_decay=0.1), of_torch("SGD", weight_decay=0.1)),
    (mo.Lion(), of_torch("Lion")),
    (mo.Lion(weight_decay=0.1), of_torch("Lion", weight_decay=0.1)),
]
ADAMW = mo.AdamW(eps=1e-3, weight_decay=0.1)


def adamw(params: Any, **options: Any) -> Any:
    return torch.optim.AdamW(params, **({"lr": 1.0, "eps": 1e-3, "weight_decay": 0.1} | options))


def differ(
    rule: Any, inner: Any, steps: int = 200, schedule: Any = None, **options: Any
) -> tuple[float, Any, Any]:
    """Return how far a wrapped optimizer leads from the same rule of the core, and both."""
    settings: Any = META | {"step_size": 1e-3} | options
    net, twin = model(), model()
    opt = wrap(inner(net.named_parameters()), **settings)
    if getattr(rule, "momentum", 0.0):  # torch's average of gradients starts at the first of them
        for param in net.parameters():
            opt.inner[0].state[param]["momentum_buffer"] = torch.zeros_like(param)
    own = MetaOptimizer(twin.named_parameters(), base=rule, **settings)
    schedulers = [] if schedule is None else [schedule(opt), schedule(own)]
    for t in range(steps):
        for some, optimizer in ((net, opt), (twin, own)):
            train(some, optimizer, range(t, t + 1), rest=True)
        for scheduler in schedulers:
            scheduler.step()
    sizes, own_sizes = opt.step_sizes(), own.step_sizes()
    assert sizes.keys() == own_sizes.keys()
    apart = [relative_error(sizes[key], own_sizes[key]) for key in sizes]
    return max(error(net, twin), *apart), opt, own


@pytest.mark.parametrize(("rule", "inner"), OWN, ids=[repr(rule) for rule, _ in OWN])
def test_a_wrapped_optimizer_is_the_rule_of_the_core(rule: Any, inner: Any) -> None:
    apart, opt, _ = differ(rule, inner)
    assert apart < ROUNDING
    assert float(opt.step_sizes()["all"]) != 1e-3


@pytest.mark.parametrize(
    "blocks", ["scalar", "tensor", "node", "weight", {"first": "0.*", "*": "*"}]
)
@pytest.mark.parametrize(
    "meta", [mo.SGD(), mo.RMSprop(), mo.Lion(), mo.FastStart(mo.AdamW())], ids=repr
)
def test_it_is_with_every_partition_and_meta_update(blocks: Any, meta: Any) -> None:
    meta_lr = 1e-3 if isinstance(meta, mo.SGD) else 1e-2
    assert differ(ADAMW, adamw, 60, blocks=blocks, meta=meta, meta_lr=meta_lr)[0] < ROUNDING


@pytest.mark.parametrize(
    "options",
    [
        {"discount": 0.9},
        {"discount": (0.9, 1.0)},
        {"discount": (0.9, 1.0), "blocks": "node"},
        {"meta_first": True},
        {"skip_nonfinite": True},
        {"bounds": (5e-4, 2e-3)},
        {"step_size": {"0.weight": 1e-2, "0.bias": 1e-3, "2.weight": 1e-4, "2.bias": 1e-5},
         "blocks": "tensor"},
    ],
    ids=str,
)  # fmt: skip
def test_it_is_with_every_option(options: Any) -> None:
    assert differ(ADAMW, adamw, 60, **options)[0] < ROUNDING


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_is_where_passes_are_compiled() -> None:
    assert differ(ADAMW, adamw, 60, compile=True)[0] < ROUNDING


@pytest.mark.parametrize("blocks", ["scalar", "node"])
def test_schedulers_drive_its_multipliers(blocks: str) -> None:
    def schedule(opt: Any) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=50)

    apart, opt, _ = differ(ADAMW, adamw, 50, schedule, blocks=blocks)
    assert apart < ROUNDING
    assert opt.param_groups[0]["lr"] < 1e-12


def test_weight_decay_of_a_wrapped_group_may_follow_a_schedule() -> None:
    net, twin = model(), model()
    opt = wrap(adamw(net.parameters()), **META)
    own = MetaOptimizer(twin.parameters(), base=ADAMW, **META)
    for t in range(30):
        opt.inner[0].param_groups[0]["weight_decay"] = 0.1 * t
        own.param_groups[0]["weight_decay"] = 0.1 * t
        train(net, opt, range(t, t + 1))
        train(twin, own, range(t, t + 1))
    assert error(net, twin) < ROUNDING


# --- others, against the method written out


def of_others(name: str, **options: Any) -> Callable[[Any], Any]:
    """Return what makes an optimizer of pytorch_optimizer's with lr 1, or skips."""

    def make(params: Any) -> Any:
        return getattr(pytest.importorskip("pytorch_optimizer"), name)(params, lr=1.0, **options)

    return make


OTHERS: dict[str, Callable[[Any], Any]] = {
    "Muon": lambda ps: torch.optim.Muon(
        [p for p in ps if p.ndim == 2], lr=1.0, weight_decay=0.1, ns_steps=1
    ),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1.0, weight_decay=0.1),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1.0),
    "Adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1.0),
    "Adamax": lambda ps: torch.optim.Adamax(ps, lr=1.0),
    "NAdam": lambda ps: torch.optim.NAdam(
        ps, lr=1.0, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "RAdam": lambda ps: torch.optim.RAdam(ps, lr=1.0),
    "AMSGrad": lambda ps: torch.optim.AdamW(ps, lr=1.0, amsgrad=True, weight_decay=0.1),
    "Nesterov": lambda ps: torch.optim.SGD(
        ps, lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    # whose later bases, of matrices without full rank, hang on rounding
    "SOAP": of_others("SOAP", weight_decay=0.0, precondition_frequency=1000),
    "AdEMAMix": of_others("AdEMAMix", weight_decay=0.0),
    "AdaBelief": of_others("AdaBelief", weight_decay=0.1, weight_decouple=True),
    "centered": lambda ps: torch.optim.RMSprop(ps, lr=1.0, centered=True, momentum=0.9),
}
DECAY = dict.fromkeys(("Muon", "Adafactor", "NAdam", "AMSGrad", "AdaBelief"), 0.1)


def written_out(net: Any, inner: Any, steps: int, decay: float, discount: float) -> float:
    """Train by the method as docs/mathematics.md section 10 has it; return the step size."""
    params = [p for group in inner.param_groups for p in group["params"]]
    averages = [p.detach().clone() for p in params]
    beta, m, v, count = np.log(1e-3), 0.0, 0.0, 0
    for t in range(steps):
        backward(net, t)
        alpha = float(np.exp(beta))
        z = 0.0
        for p, a in zip(params, averages, strict=True):
            with torch.no_grad():
                z += float(((p - a) * p.grad).sum())
                a += (1 - discount * (1 - decay * alpha)) * (p - a)
        for group in inner.param_groups:
            group["lr"] = alpha
        inner.step()
        count += z != 0.0 or count == 0  # what has not moved rests
        if z != 0.0:
            m, v = 0.9 * m + 0.1 * z, 0.999 * v + 0.001 * z * z
            beta -= 0.01 * (m / (1 - 0.9**count)) / np.sqrt(v / (1 - 0.999**count))
    return float(np.exp(beta))


@pytest.mark.parametrize("discount", [1.0, 0.99])
@pytest.mark.parametrize("name", OTHERS)
def test_it_is_the_method_written_out(name: str, discount: float) -> None:
    net, twin = model(), model()
    opt = wrap(OTHERS[name](list(net.parameters())), step_size=1e-3, discount=discount, **META)
    steps = 20 if name == "Muon" else 100  # whose products of bfloat16 are slow on a CPU
    train(net, opt, range(steps))
    inner = OTHERS[name](list(twin.parameters()))
    size = written_out(twin, inner, steps, DECAY.get(name, 0.0), discount)
    assert relative_error(float(opt.step_sizes()["all"]), size) < 1e-11
    assert error(net, twin) < 1e-11


@pytest.mark.parametrize("blocks", ["node", "weight"])
@pytest.mark.parametrize("name", [*OTHERS, "AdamW"])
def test_a_step_size_a_unit_is_one_for_all_where_there_is_one_unit(name: str, blocks: str) -> None:
    """And the wrapped optimizer sees no lr beyond those of the units: Adafactor has a cap."""
    found = []
    for one in ("scalar", blocks):
        torch.manual_seed(0)
        shape = (1, 4) if blocks == "node" else (1, 1)
        w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        opt = wrap((OTHERS | {"AdamW": adamw})[name]([w]), blocks=one, step_size=1e-2, **META)
        if name != "Muon":  # whose lr of 1 would not be seen
            opt.param_groups[0]["lr"] = 0.5
        for t in range(40):
            w.grad = w.detach() - torch.sin(torch.tensor(0.1 * t))
            opt.step()
        found.append((w.detach(), *(size.reshape(()) for size in opt.step_sizes().values())))
    for one, other in zip(*found, strict=True):
        assert relative_error(other.numpy(), one.numpy()) < 1e-11


def test_an_optimizer_with_a_cap_makes_units_below_it() -> None:
    lrs = []

    class Watched(torch.optim.Adafactor):  # type: ignore[misc, name-defined]
        def step(self, closure: Any = None) -> Any:
            lrs.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    net = model()
    opt = wrap(Watched(net.parameters(), lr=1.0), blocks="node", step_size=1e-3, **META)
    train(net, opt, range(20))
    largest = max(float(size.max()) for size in opt.step_sizes().values())
    assert all(1e-4 < lr < 4 * largest for some in lrs for lr in some)


# --- several optimizers


def pair(net: Any, **lrs: float) -> tuple[Any, Any]:
    matrices = [p for p in net.named_parameters() if p[1].ndim == 2]
    others = [p for p in net.named_parameters() if p[1].ndim < 2]
    return (
        torch.optim.Muon(matrices, lr=lrs.get("muon", 1.0), weight_decay=0.0),
        torch.optim.AdamW(others, lr=lrs.get("adamw", 1.0)),
    )


def test_several_optimizers_share_one_meta_gradient() -> None:
    net = model()
    muon, adamw = pair(net, adamw=0.1)
    opt = wrap([muon, adamw], **META)
    train(net, opt, range(5))
    assert list(opt.step_sizes()) == ["all"]
    # the groups' shares of it are as they were given
    assert muon.param_groups[0]["lr"] == pytest.approx(10 * adamw.param_groups[0]["lr"])


def test_several_optimizers_by_name_have_a_block_each() -> None:
    net = model()
    muon, adamw = pair(net)
    step_size = {"matrices": 1e-2, "others": 1e-4}
    opt = wrap({"matrices": muon, "others": adamw}, step_size=step_size, **META)
    assert {k: float(v) for k, v in opt.step_sizes().items()} == pytest.approx(step_size)
    train(net, opt, range(1))
    assert muon.param_groups[0]["lr"] == pytest.approx(1e-2)
    assert adamw.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_it_learns_from_a_start_that_is_far_too_small() -> None:
    net = model()
    fast = META | {"meta": mo.FastStart(mo.AdamW()), "step_size": 1e-6, "discount": 1.0}
    opt = wrap(adamw(net.parameters()), **fast)
    before = float(backward(net, 0).detach())
    train(net, opt, range(600))
    assert float(backward(net, 0).detach()) < 0.1 * before


# --- at home in torch


def test_groups_say_how_their_blocks_start() -> None:
    net = model()
    groups = [
        {"params": net[0].parameters(), "block": "first", "step_size": 1e-2, "lr": 0.5},
        {"params": net[2].parameters(), "block": "last", "bounds": (1e-5, 1e-4)},
    ]
    opt = wrap(torch.optim.Adam(groups, lr=1.0), step_size=1e-4, **META)
    sizes = {key: float(size) for key, size in opt.step_sizes().items()}
    assert sizes == pytest.approx({"first": 1e-2, "last": 1e-4})
    train(net, opt, range(1))
    assert [g["lr"] for g in opt.inner[0].param_groups] == pytest.approx([5e-3, 1e-4])


def test_groups_of_several_step_sizes_are_cut_into_as_many() -> None:
    net = model()
    inner = torch.optim.Adam(net.named_parameters(), lr=1.0)
    opt = wrap(inner, blocks="tensor", **META)
    assert len(opt.param_groups) == 1
    assert [group["param_names"] for group in inner.param_groups] == [
        ["0.weight"], ["0.bias"], ["2.weight"], ["2.bias"],
    ]  # fmt: skip


def test_a_closure_is_called_once_with_gradients_on() -> None:
    net, calls = model(), []
    opt = wrap(torch.optim.SGD(net.parameters(), lr=1.0), **META)

    def closure() -> Any:
        calls.append(torch.is_grad_enabled())
        return backward(net, 0)

    assert float(opt.step(closure).detach()) > 0.0
    assert calls == [True]


def test_hooks_run_around_the_step_and_around_that_of_the_wrapped() -> None:
    net, seen = model(), []
    opt = wrap(torch.optim.SGD(net.parameters(), lr=1.0), **META)
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.inner[0].register_step_pre_hook(lambda *_: seen.append("inner"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    train(net, opt, range(1))
    assert seen == ["before", "inner", "after"]


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str
)
def test_implementations_of_the_wrapped_stay_as_they_are(options: Any) -> None:
    net, twin = model(), model()
    train(net, wrap(adamw(net.parameters(), **options), **META), range(50))
    train(twin, MetaOptimizer(twin.parameters(), base=ADAMW, **META), range(50))
    assert error(net, twin) < ROUNDING


def test_an_lr_that_is_a_tensor_is_written_in_place() -> None:
    net, twin = model(), model()
    lr = torch.tensor(1.0, dtype=torch.float64)
    opt = wrap(adamw(net.parameters(), lr=lr, fused=True), **META)
    written = opt.inner[0].param_groups[0]["lr"]
    train(net, opt, range(50))
    train(twin, MetaOptimizer(twin.parameters(), base=ADAMW, **META), range(50))
    assert opt.inner[0].param_groups[0]["lr"] is written
    assert 0.0 < float(written) < 1.0
    assert float(lr) == 1.0
    assert error(net, twin) < ROUNDING


def test_an_lr_that_groups_share_is_one_for_each() -> None:
    """torch gives all groups the tensor of `defaults`, which those added later begin with."""
    net, lr = model(), torch.tensor(0.5)
    params = [[p] for p in net.parameters()]
    blocks = [{"params": params[0], "block": "a"}, {"params": params[1], "block": "b"}]
    step_size = {"a": 1e-2, "b": 1e-4, "all": 1e-3}
    first = torch.optim.AdamW(blocks, lr=lr, fused=True)
    second = torch.optim.AdamW(params[2], lr=lr, fused=True)
    opt = wrap([first, second], step_size=step_size, **META)
    train(net, opt, range(1))
    lrs = [group["lr"] for inner in opt.inner for group in inner.param_groups]
    assert [float(one) for one in lrs] == pytest.approx([5e-3, 5e-5, 5e-4])
    opt.add_param_group({"params": params[3], "optimizer": 0})
    assert opt.param_groups[-1]["lr"] == float(lr) == 0.5


def test_maximize_of_a_wrapped_group_turns_the_meta_gradient() -> None:
    net, twin = model(), model()
    opt = wrap(adamw(net.parameters(), maximize=True), **META)
    own = MetaOptimizer(twin.parameters(), base=ADAMW, maximize=True, **META)
    train(net, opt, range(20))
    train(twin, own, range(20))
    assert error(net, twin) < ROUNDING
    assert float(opt.step_sizes()["all"]) == pytest.approx(float(own.step_sizes()["all"]))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("option", "value"), [("weight_decay", 0.0), ("maximize", True)])
def test_what_is_the_wrapped_groups_to_say_cannot_be_said_in_ours(
    option: str, value: Any, steps: int
) -> None:
    net = model()
    opt = wrap(adamw(net.parameters()), **META)
    train(net, opt, range(steps))
    kept, opt.param_groups[0][option] = opt.param_groups[0][option], value
    before = bits(net.state_dict())
    opt.step_sizes()  # which looks at the groups as well
    backward(net, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"`{option}` in the groups of a wrapper .* `inner`"):
            opt.step()
    assert bits(net.state_dict()) == before
    opt.param_groups[0][option] = kept
    train(net, opt, range(2, 4))
    opt.inner[0].param_groups[0][option] = value
    train(net, opt, range(4, 5))
    assert opt.param_groups[0][option] == value


def test_an_lr_that_is_written_into_the_groups_of_the_wrapped_is_told() -> None:
    net = model()
    opt = wrap(adamw(net.parameters()), **META)
    train(net, opt, range(2))
    group = opt.inner[0].param_groups[0]
    kept, group["lr"] = group["lr"], 0.5
    for _ in range(2):
        with pytest.raises(ValueError, match="`lr` in the groups of `inner` is written in every"):
            train(net, opt, range(2, 3))
    group["lr"] = kept
    train(net, opt, range(2, 3))


@pytest.mark.parametrize("blocks", ["scalar", "node", "weight"])
def test_an_optimizer_may_write_into_the_gradients(blocks: str) -> None:
    """As those do that add their decay to them, or turn their sign, in place."""

    class Scribbling(torch.optim.AdamW):  # type: ignore[misc, name-defined]
        def step(self, closure: Any = None) -> Any:
            found = super().step(closure)
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad.neg_().mul_(3.0)
            return found

    net, twin = model(), model()
    opt = wrap(Scribbling(net.parameters(), lr=1.0, eps=1e-3), blocks=blocks, **META)
    other = wrap(adamw(twin.parameters(), weight_decay=1e-2), blocks=blocks, **META)
    train(net, opt, range(20))
    train(twin, other, range(20))
    assert bits(net.state_dict()) == bits(twin.state_dict())
    assert bits(opt.step_sizes()) == bits(other.step_sizes())


@pytest.mark.parametrize("before", [True, False])
def test_a_scheduler_of_the_wrapped_is_refused(before: bool) -> None:
    net = model()
    inner = adamw(net.parameters())
    opt = None if before else wrap(inner, **META)
    torch.optim.lr_scheduler.CosineAnnealingLR(inner, T_max=5)
    with pytest.raises(ValueError, match="this AdamW has one, whose lr would be overwritten"):
        wrap(inner, **META) if opt is None else train(net, opt, range(1))


def test_a_step_asks_no_tensor_whether_it_is_true(monkeypatch: Any) -> None:
    """That would wait for the device; `skip_nonfinite` has to."""
    net = model()
    opt = wrap(torch.optim.AdamW(net.parameters(), lr=1.0), compile=False)
    train(net, opt, range(2))
    backward(net, 2)
    asked: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "__bool__", asked.append)
    opt.step()
    assert not asked


def test_skip_nonfinite_leaves_the_wrapped_alone() -> None:
    net = model()
    opt = wrap(adamw(net.parameters()), skip_nonfinite=True, **META)
    train(net, opt, range(3))
    before, moments = bits(net.state_dict()), bits(opt.inner[0].state_dict())
    backward(net, 3)
    net[0].weight.grad[0, 0] = torch.inf
    opt.step()
    assert bits(net.state_dict()) == before
    after = bits(opt.inner[0].state_dict())
    assert after == moments
    assert int(opt.diagnostics()["skipped"]) == 1


def test_a_grad_scaler_skips_and_unscales() -> None:
    net, twin = model(torch.float32), model(torch.float32)
    opt = wrap(adamw(net.parameters()), **META)
    own = MetaOptimizer(twin.parameters(), base=ADAMW, **META)
    for some, optimizer in ((net, opt), (twin, own)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for t in range(10):
            scaler.scale(torch.ones(()))
            backward(some, t)
            with torch.no_grad():
                for param in some.parameters():
                    param.grad *= scaler.get_scale()
                if t == 4:
                    some[0].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    assert error(net, twin) < 1e-5
    assert int(opt.state[net[0].weight]["step"]) == 9


def test_narrow_weights_keep_their_average_in_float32() -> None:
    net = model(torch.bfloat16)
    opt = wrap(torch.optim.AdamW(net.parameters(), lr=1.0), step_size=1e-2, **META)
    train(net, opt, range(20))
    for entry in opt.state.values():
        averages = [value for key, value in entry.items() if key.startswith("average")]
        assert [average.dtype for average in averages] == [torch.float32] * 2  # one a discount
    assert float(opt.step_sizes()["all"]) != pytest.approx(1e-2)


def test_lr_0_moves_no_weight_and_no_step_size() -> None:
    net = model()
    opt = wrap(torch.optim.AdamW(net.parameters(), lr=1.0), **META)
    train(net, opt, range(3))
    before, sizes = bits(net.state_dict()), bits(opt.step_sizes())
    opt.param_groups[0]["lr"] = 0.0
    train(net, opt, range(3, 6))
    assert bits(net.state_dict()) == before
    assert bits(opt.step_sizes()) == sizes


def test_edits_of_the_weights_are_followed() -> None:
    """On w0 >= 0 active, a trace would believe that what was undone still happened."""
    w = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    opt = wrap(torch.optim.AdamW([w], lr=1.0, weight_decay=0.0), step_size=1e-6,
               meta=mo.FastStart(mo.AdamW()), meta_lr=1e-2, compile=False)  # fmt: skip
    for _ in range(1000):
        w.grad = torch.stack([torch.ones_like(w[0]), w[1].detach() - 1.0])
        opt.step()
        with torch.no_grad():
            w[0].clamp_(min=0.0)
    assert float(opt.step_sizes()["all"]) < 1.0


@pytest.mark.parametrize("blocks", ["node", "weight"])
def test_weights_stay_where_a_step_at_lr_1_raises(blocks: str) -> None:
    net = model()
    opt = wrap(adamw(net.parameters()), blocks=blocks, **META)
    train(net, opt, range(2))
    before = bits(net.state_dict())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = opt.inner[0].register_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(net, opt, range(2, 3))
    assert bits(net.state_dict()) == before
    hook.remove()
    train(net, opt, range(2, 3))
    assert bits(net.state_dict()) != before


# --- state


def wrapped(net: Any, **options: Any) -> WrappedOptimizer:
    matrices = [p for p in net.named_parameters() if p[1].ndim == 2]
    others = [p for p in net.named_parameters() if p[1].ndim < 2]
    inner = (torch.optim.Muon(matrices, lr=1.0), adamw(others))
    return wrap(inner, **(META | {"step_size": 1e-3} | options))


STATES = [{}, {"blocks": "tensor"}, {"blocks": "weight"}, {"skip_nonfinite": True}]


@pytest.mark.parametrize("options", STATES, ids=str)
def test_a_run_goes_on_from_a_state_dict_to_the_last_bit(options: Any) -> None:
    net, other = model(), model(seed=1)
    opt, fresh = wrapped(net, **options), wrapped(other, **options)
    train(net, opt, range(7))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["net"])
    fresh.load_state_dict(saved["opt"])
    train(net, opt, range(7, 12))
    train(other, fresh, range(7, 12))
    assert bits(other.state_dict()) == bits(net.state_dict())
    assert bits(fresh.state_dict()) == bits(opt.state_dict())


@pytest.mark.parametrize("options", [{}, {"blocks": "tensor"}], ids=str)
def test_a_wrapped_optimizer_may_load_a_state_by_itself(options: Any) -> None:
    """Which replaces its groups, and their lr by that of the state."""
    net, twin = model(), model()
    opt, own = (wrap(adamw(some.parameters()), **META, **options) for some in (net, twin))
    train(net, opt, range(5))
    train(twin, own, range(5))
    state = opt.inner[0].state_dict()
    for group in state["param_groups"]:
        group["lr"] = 1.0
    opt.inner[0].load_state_dict(state)
    train(net, opt, range(5, 8))
    train(twin, own, range(5, 8))
    assert bits(net.state_dict()) == bits(twin.state_dict())


def test_named_parameters_may_come_in_another_order() -> None:
    net, other = model(), model(seed=1)
    opt = wrap(adamw(net.named_parameters()), blocks="tensor", **META)
    fresh = wrap(adamw(reversed(list(other.named_parameters()))), blocks="tensor", **META)
    train(net, opt, range(7))
    other.load_state_dict(net.state_dict())
    fresh.load_state_dict(opt.state_dict())
    train(net, opt, range(7, 12))
    train(other, fresh, range(7, 12))
    assert error(net, other) < ROUNDING


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_train_on_by_themselves(how: str) -> None:
    net = model()
    opt = wrapped(net)
    train(net, opt, range(5))
    together = (net, opt)
    if how == "deepcopy":
        other, again = copy.deepcopy(together)
    else:
        other, again = pickle.loads(pickle.dumps(together))
    train(net, opt, range(5, 9))
    train(other, again, range(5, 9))
    assert bits(other.state_dict()) == bits(net.state_dict())


def test_a_state_dict_is_that_of_the_moment_it_is_made() -> None:
    net = model()
    opt = wrapped(net)
    train(net, opt, range(3))
    keys = set(opt.state[net[0].weight])
    state = opt.state_dict()
    assert any(key.startswith("inner.") for key in state["state"][0])
    assert set(opt.state[net[0].weight]) == keys
    assert "inner" not in opt.param_groups[0]


def test_a_state_dict_of_another_wrapped_class_is_refused_and_nothing_changes() -> None:
    net, other = model(), model()
    opt = wrap(torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9), **META)
    given = wrap(adamw(other.parameters()), **META)
    train(net, opt, range(3))
    train(other, given, range(3))
    before = bits(opt.state_dict())
    with pytest.raises(
        ValueError, match=r"of group 0 it has the state of a wrapped AdamW; exp.* SGD"
    ):
        opt.load_state_dict(given.state_dict())
    assert bits(opt.state_dict()) == before
    train(net, opt, range(3, 5))


@pytest.mark.parametrize("without", ["all", "wrapped"])
def test_a_state_dict_of_another_optimizer_is_refused_and_nothing_changes(without: str) -> None:
    net, other = model(), model()
    opt = wrapped(net)
    train(net, opt, range(3))
    if without == "all":
        state = MetaOptimizer(other.named_parameters(), base=ADAMW, **META).state_dict()
    else:
        state = opt.state_dict()
        for group in state["param_groups"]:
            del group["inner"]
    before = bits(opt.state_dict())
    with pytest.raises(ValueError, match="state_dict"):
        opt.load_state_dict(state)
    assert bits(opt.state_dict()) == before


def test_the_state_goes_through_the_cores_file(tmp_path: Any) -> None:
    net = model()
    opt = wrapped(net)
    train(net, opt, range(3))
    mo.save(tmp_path / "state", opt.config, opt.core_state())
    params = {name: p.detach() for name, p in net.named_parameters()}
    names = [name for group in opt.param_groups for name in group["param_names"]]
    _, state = mo.load(tmp_path / "state", {name: params[name] for name in names})
    train(net, opt, range(3, 6))
    opt.load_core_state(state)
    assert int(opt.state[net[0].weight]["step"]) == 3


@pytest.mark.parametrize("blocks", ["scalar", "tensor", "weight"])
def test_a_group_may_be_added_in_mid_training(blocks: str) -> None:
    net, twin = model(), model()
    opt = wrap(adamw(net[0].parameters()), blocks=blocks, **META)
    own = MetaOptimizer(twin[0].parameters(), base=ADAMW, blocks=blocks, **META)
    for some, optimizer in ((net, opt), (twin, own)):
        train(some, optimizer, range(5))
        more: dict[str, Any] = {
            "params": list(some[2].parameters()),
            "lr": 0.5,
            "weight_decay": 0.2,
        }
        optimizer.add_param_group(more)
        train(some, optimizer, range(5, 20))
    assert error(net, twin) < ROUNDING


def test_a_group_that_is_added_says_whose_it_is() -> None:
    net = model()
    matrices, rest = list(net[0].parameters()), list(net[2].parameters())
    opt = wrap([adamw(matrices[:1]), adamw(matrices[1:])], **META)
    with pytest.raises(ValueError, match=r"`optimizer` of a group .*from 0 to 1; got None"):
        opt.add_param_group({"params": rest})
    opt.add_param_group({"params": rest, "optimizer": 1, "block": "rest"})
    assert opt.inner[1].param_groups[1]["params"] == rest
    assert list(opt.step_sizes()) == ["all", "rest"]


def test_a_group_that_is_added_has_the_block_of_its_optimizer() -> None:
    net = model()
    params = list(net.parameters())
    inner = {"first": adamw(params[:1]), "second": adamw(params[1:2])}
    opt = wrap(inner, step_size={"first": 1e-2, "second": 1e-4}, **META)
    for one in (opt, copy.deepcopy(opt)):
        one.add_param_group({"params": torch.nn.Parameter(torch.ones(2)), "optimizer": 1})
        assert [group["block"] for group in one.param_groups] == ["first", "second", "second"]
        assert list(one.step_sizes()) == ["first", "second"]
    opt.add_param_group({"params": params[2:], "optimizer": 0, "block": "third", "step_size": 1.0})
    assert list(opt.step_sizes()) == ["first", "second", "third"]


def test_a_group_that_is_refused_changes_nothing() -> None:
    net = model()
    opt = wrap(adamw(net[0].parameters()), **META)
    with pytest.raises(ValueError, match="step_size"):
        opt.add_param_group({"params": list(net[2].parameters()), "block": "b", "step_size": -1.0})
    assert len(opt.param_groups) == len(opt.inner[0].param_groups) == 1
    train(net, opt, range(2))


# --- errors

NET = model()
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no optimizer": (lambda: wrap(NET, **META), TypeError, "must be a torch.optim.Optimizer"),
    "none": (lambda: wrap([], **META), ValueError, "`optimizer` must be one or more"),
    "twice": (
        lambda: wrap([adamw(NET.parameters()), adamw(NET.parameters())], **META),
        ValueError,
        "more than one parameter group",
    ),
    "LBFGS": (
        lambda: wrap(torch.optim.LBFGS(NET.parameters()), **META),
        ValueError,
        "proportional to its lr; those of LBFGS are not",
    ),
    "one that learns its step sizes": (
        lambda: wrap(MetaOptimizer(NET.parameters(), compile=False), **META),
        ValueError,
        "this MetaOptimizer learns its step sizes already",
    ),
    "one that is a wrapper": (
        lambda: wrap(wrap(adamw(NET.parameters()), **META), **META),
        ValueError,
        "this WrappedOptimizer learns its step sizes already",
    ),
    "one that is wrapped": (
        lambda: wrap(wrap(adamw(NET.parameters()), **META).inner, **META),
        ValueError,
        "this AdamW is wrapped already",
    ),
    "several step sizes and skip_nonfinite": (
        lambda: wrap(adamw(NET.parameters()), blocks="node", skip_nonfinite=True, **META),
        ValueError,
        "`skip_nonfinite` must be False",
    ),
    "several step sizes of narrow weights": (
        lambda: wrap(adamw(model(torch.bfloat16).parameters()), blocks="weight", **META),
        ValueError,
        "needs float32 or wider",
    ),
    "a rule without a formula": (
        lambda: MetaOptimizer(NET.parameters(), base=mo.Opaque(), meta=mo.AdamW(), discount=1.0),
        ValueError,
        "`base` must have a formula",
    ),
    "a meta update that is none": (
        lambda: wrap(adamw(NET.parameters()), meta=torch.optim.AdamW),
        TypeError,
        "`meta` must be a rule",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused(case: str) -> None:
    make, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    "name",
    [
        "AdamWScheduleFreeReference",
        "ScheduleFreeWrapper",
        "DAdaptAdanIP",
        "ProdigyPlusScheduleFree",
    ],
)
def test_versions_of_those_that_are_not_proportional_are_refused(name: str) -> None:
    kind = type(name, (torch.optim.SGD,), {})
    derived = type("Mine", (kind,), {})
    for one, said in ((kind, name), (derived, "Mine")):
        with pytest.raises(ValueError, match=f"those of {said} are not"):
            wrap(one(NET.parameters(), lr=1.0), **META)


def test_an_optimizer_that_was_refused_may_be_wrapped_otherwise() -> None:
    inner = adamw(NET.parameters())
    with pytest.raises(ValueError, match="`skip_nonfinite` must be False"):
        wrap(inner, blocks="node", skip_nonfinite=True, **META)
    wrap(inner, blocks="node", **META)


def test_parameters_that_were_replaced_in_the_groups_are_told() -> None:
    net = model()
    opt = wrap(adamw(net.parameters()), **META)
    opt.param_groups[0]["params"][0] = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.float64))
    backward(net, 0)
    for _ in range(2):
        with pytest.raises(ValueError, match="`param_groups` lacks a parameter"):
            opt.step()


def test_parameters_that_a_wrapped_optimizer_got_by_itself_are_told() -> None:
    net, calls = model(), []
    opt = wrap(adamw(net[0].parameters()), **META)
    train(net, opt, range(2))
    opt.inner[0].add_param_group({"params": net[2].parameters()})
    before = bits(net.state_dict())
    backward(net, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match="`param_groups` lacks a parameter"):
            opt.step(lambda: calls.append(0))
    for call in (opt.state_dict, opt.diagnostics, lambda: opt.load_state_dict({})):
        with pytest.raises(ValueError, match="`param_groups` lacks a parameter"):
            call()
    assert calls == []
    assert bits(net.state_dict()) == before


def test_parameters_that_a_wrapped_optimizer_has_lost_are_told() -> None:
    """Nothing would step them, and their step sizes would learn from it."""
    net = model()
    opt = wrap(adamw(net.named_parameters()), **META)
    train(net, opt, range(2))
    kept = opt.inner[0].param_groups[:]
    opt.inner[0].param_groups.clear()
    backward(net, 2)
    for call in (opt.step, opt.step, opt.state_dict):
        with pytest.raises(ValueError, match=r"`param_groups` has '0\.weight', which no wrapped"):
            call()
    opt.inner[0].param_groups += kept
    train(net, opt, range(2, 4))
