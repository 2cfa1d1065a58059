"""What is frozen steps as before, at the step sizes of then, and has no traces."""

import copy
import gc
import pickle
import shutil
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from metaopt_conformance.tolerances import relative_error  # noqa: E402
from metaopt_torch import MetaOptimizer, wrap  # noqa: E402

import metaopt as mo  # noqa: E402


def compiles(test: Any) -> Any:
    test = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")(test)
    for kind in ("DeprecationWarning", "FutureWarning"):  # the compiler's own
        test = pytest.mark.filterwarnings(f"ignore::{kind}")(test)
    return test


def network(dtype: Any = torch.float64) -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)]
    return torch.nn.Sequential(*layers).to(dtype)


def with_gradients(net: Any, opt: Any, t: int) -> None:
    dtype = next(net.parameters()).dtype
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t)).to(dtype)
    opt.zero_grad()
    loss = (net(x) - x.sum(dim=1, keepdim=True).sin()).square().mean()
    if isinstance(opt, MetaOptimizer) and opt.config.curvature == "exact":
        opt.backward(loss)
    else:
        loss.backward()


def trained(net: Any, opt: Any, steps: range) -> None:
    for t in steps:
        with_gradients(net, opt, t)
        opt.step()


def size_of(opt: Any) -> int:
    return sum(value.numel() for state in opt.state.values() for value in state.values())


def assert_same(one: Any, other: Any, allowed: float) -> None:
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        mine, theirs = (param.detach().double().numpy() for param in (mine, theirs))
        assert relative_error(mine, theirs) <= allowed


LEARNED = mo.AdamW(weight_decay=mo.Learned(0.1), betas=(mo.Learned(0.9), 0.99))
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "Lion": {"base": mo.Lion(weight_decay=0.1)},
    "SGD": {"base": mo.SGD(momentum=0.9, weight_decay=0.1), "discount": 0.9},
    "decay apart": {"base": mo.AdamW(weight_decay=0.1, decay_step_size=0.02)},
    "several rules": {"base": {"0.*": mo.SGD(), "*": mo.RMSprop()}, "blocks": "tensor"},
    "maximize": {"maximize": True},
    "a step size a unit": {"blocks": "node"},
    "a step size a weight": {"blocks": "weight", "sigma": "softplus"},
    "learned numbers": {"base": LEARNED},
    "learned numbers a unit": {"base": LEARNED, "blocks": "node"},
    "learned numbers a weight": {"base": LEARNED, "blocks": "weight"},
    "curvature": {"curvature": "exact", "base": mo.SGD(momentum=0.5), "approximation": "2x2"},
    "recovery": {"recover": True},
    "nothing refused": {"skip_nonfinite": True},
    "an average of its own": {"base": mo.Averaged(mo.AdamW())},
    "step sizes themselves": {"sigma": "identity", "discount": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_it_steps_as_what_learns_does_until_that_has_learned_more(case: str) -> None:
    """A step is made with the values from before its meta update."""
    net = network()
    options: dict[str, Any] = {"step_size": 0.01, "meta_lr": 0.05, "lr": 0.5} | CASES[case]
    opt = MetaOptimizer(net.named_parameters(), compile=False, **options)
    for t in range(4):
        other, frozen = copy.deepcopy((net, opt))
        frozen.freeze()
        assert size_of(frozen) < size_of(opt)
        sizes, numbers = frozen.step_sizes(), frozen.hyperparameters()
        for some, ours in ((net, opt), (other, frozen)):
            with_gradients(*(some, ours), t)
            ours.step()
        # the order of sums in a step may differ, as that learns too
        assert_same(net, other, 1e-14)
        for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
            for slot in frozen.state[theirs]:
                if slot != "beta" and not slot.endswith(".beta"):
                    assert torch.allclose(opt.state[mine][slot], frozen.state[theirs][slot])
        for before, now in ((sizes, frozen.step_sizes()), (numbers, frozen.hyperparameters())):
            torch.testing.assert_close(before, now, rtol=0.0, atol=0.0)
    trained(other, frozen, range(4, 8))
    torch.testing.assert_close(sizes, frozen.step_sizes(), rtol=0.0, atol=0.0)
    frozen.diagnostics()


@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
def test_it_steps_narrow_parameters_as_before(rounding: str) -> None:
    net = network(torch.bfloat16)
    opt = MetaOptimizer(net.parameters(), step_size=0.01, rounding=rounding, compile=False)
    trained(net, opt, range(3))
    other, frozen = copy.deepcopy((net, opt))
    frozen.freeze()
    for some, ours in ((net, opt), (other, frozen)):
        trained(some, ours, range(3, 4))
    assert_same(net, other, 0.0)


PLAIN: dict[str, tuple[Any, Any]] = {
    "AdamW": (
        mo.AdamW(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        lambda params, lr: torch.optim.AdamW(
            params, lr=lr, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1
        ),
    ),
    "SGD": (mo.SGD(weight_decay=0.1), lambda p, lr: torch.optim.SGD(p, lr=lr, weight_decay=0.1)),
    "RMSprop": (
        mo.RMSprop(bias_correction=False, beta2=0.9, eps=1e-6),
        lambda p, lr: torch.optim.RMSprop(p, lr=lr, alpha=0.9, eps=1e-6),
    ),
}


@pytest.mark.parametrize("rule", PLAIN)
def test_it_makes_the_steps_of_torchs_own_optimizer(rule: str) -> None:
    """From the first one on, at the step size times `lr`, under the same schedule."""
    base, plain = PLAIN[rule]
    net = network()
    other = copy.deepcopy(net)
    opt = MetaOptimizer(net.parameters(), base=base, step_size=0.02, lr=0.5, compile=False)
    opt.freeze()
    its = plain(other.parameters(), 0.01)
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 2, gamma=0.5) for one in (opt, its)]
    for t in range(6):
        for some, ours, scheduler in zip((net, other), (opt, its), schedulers, strict=True):
            trained(some, ours, range(t, t + 1))
            scheduler.step()
    assert_same(net, other, 1e-13)


@compiles
def test_compiled_steps_are_those_of_eager_ones() -> None:
    net, opt = _trained(blocks="scalar")
    opt.freeze()
    other = copy.deepcopy(net)
    compiled = MetaOptimizer(other.named_parameters(), base=LEARNED, compile=True)
    compiled.load_state_dict(copy.deepcopy(opt.state_dict()))
    for some, ours in ((net, opt), (other, compiled)):
        trained(some, ours, range(3, 6))
    assert_same(net, other, 1e-12)


def _trained(**given: Any) -> tuple[Any, Any]:
    net = network()
    options: dict[str, Any] = {
        "step_size": 0.01,
        "base": LEARNED,
        "blocks": "tensor",
        "compile": False,
    } | given
    opt = MetaOptimizer(net.named_parameters(), **options)
    trained(net, opt, range(3))
    return net, opt


@pytest.mark.parametrize("blocks", ["tensor", "weight"])
@pytest.mark.parametrize("frozen_before", [False, True])
def test_its_state_goes_on_frozen_in_another(blocks: str, frozen_before: bool) -> None:
    net, opt = _trained(blocks=blocks)
    opt.freeze()
    other = copy.deepcopy(net)
    fresh = MetaOptimizer(
        other.named_parameters(), base=LEARNED, blocks=blocks, step_size=0.01, compile=False
    )
    if frozen_before:
        fresh.freeze()
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    for some, ours in ((net, opt), (other, fresh)):
        trained(some, ours, range(3, 6))
    assert_same(net, other, 0.0)
    torch.testing.assert_close(opt.step_sizes(), fresh.step_sizes(), rtol=0.0, atol=0.0)
    assert size_of(fresh) == size_of(opt)


def test_a_state_from_before_learns_again() -> None:
    net, opt = _trained()
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(net.state_dict())
    full = size_of(opt)
    trained(net, opt, range(3, 5))
    sizes = opt.step_sizes()
    opt.freeze()
    opt.load_state_dict(saved)
    net.load_state_dict(weights)
    trained(net, opt, range(3, 5))
    torch.testing.assert_close(opt.step_sizes(), sizes, rtol=0.0, atol=0.0)
    assert size_of(opt) == full


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_are_frozen(copied: Any) -> None:
    net, opt = _trained()
    opt.freeze()
    other, its = copied((net, opt))
    for some, ours in ((net, opt), (other, its)):
        trained(some, ours, range(3, 5))
    assert_same(net, other, 0.0)
    assert size_of(its) == size_of(opt)


def test_a_core_state_has_traces_of_zero_and_can_be_loaded() -> None:
    net, opt = _trained(base=mo.AdamW())
    opt.freeze()
    state = opt.core_state()
    params = {name: param.detach() for name, param in net.named_parameters()}
    norms = opt.config.diagnostics(state, params)["trace_norm"]
    assert all(bool((norm == 0.0).all()) for norm in norms.values())
    other = copy.deepcopy(net)
    learning = MetaOptimizer(other.named_parameters(), blocks="tensor", compile=False)
    learning.load_core_state(state)
    torch.testing.assert_close(learning.step_sizes(), opt.step_sizes())
    learning.freeze()
    learning.load_core_state(state)
    for some, ours in ((net, opt), (other, learning)):
        trained(some, ours, range(3, 5))
    assert_same(net, other, 1e-13)


def test_groups_that_are_added_step_and_do_not_learn() -> None:
    net, opt = _trained(base=mo.AdamW())
    opt.freeze()
    new = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="a name of this optimizer's state"):
        opt.add_param_group({"params": [("new", new)], "step_sizes_frozen": True})
    opt.add_param_group({"params": [("new", new)], "lr": 2.0, "step_size": 0.125})
    sizes = opt.step_sizes()
    for t in range(3, 6):
        with_gradients(net, opt, t)
        new.grad = torch.ones_like(new)
        opt.step()
    torch.testing.assert_close(opt.step_sizes(), sizes, rtol=0.0, atol=0.0)
    assert new.tolist() == pytest.approx([1.0 - 3 * 2.0 * 0.125] * 3)
    assert float(opt.effective_lr()[-1]["new"]) == pytest.approx(0.25)
    assert "average" not in opt.state[new]


def test_traces_are_freed() -> None:
    """Also the memory in which traces of small parameters lie together."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((12347,), (5, 7), (3,), (70001,))]
    opt = MetaOptimizer(params, compile=False)

    def step() -> None:
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()

    step()
    keys = [key for key in opt.state[params[0]] if key.startswith("average")]
    bases = [opt.state[param][key] for param in params for key in keys]
    held = [weakref.ref(base if base._base is None else base._base) for base in bases]
    del bases
    assert len(keys) == 2, "one a discount"
    opt.freeze()
    step()
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_averages_end_but_those_of_the_base() -> None:
    net, opt = _trained(base=mo.AdamW())
    opt.freeze()
    with pytest.raises(ValueError, match="come with the traces, which `freeze` has freed"):
        opt.averaged_params(copy=True)
    with pytest.raises(ValueError, match="come with the traces, which `freeze` has freed"):
        opt.averaged_params()
    net, opt = _trained(base=mo.Averaged(mo.AdamW(), power=0))
    opt.freeze()
    kept = [opt.averaged_params(copy=True)]
    trained(net, opt, range(3, 5))
    kept.append(opt.averaged_params(copy=True))
    assert not torch.equal(kept[0]["0.weight"], kept[1]["0.weight"])
    with opt.averaged_params():
        assert torch.equal(net[0].weight, kept[1]["0.weight"])


@pytest.mark.parametrize("blocks", ["tensor", "weight"])
def test_steps_with_nonfinite_gradients_are_still_skipped(blocks: str) -> None:
    net, opt = _trained(skip_nonfinite=True, blocks=blocks)
    opt.freeze()
    before = copy.deepcopy((net.state_dict(), opt.core_state().slots))
    with_gradients(net, opt, 3)
    net[2].weight.grad[0, 0] = float("nan")
    opt.step()
    torch.testing.assert_close((net.state_dict(), opt.core_state().slots), before, rtol=0, atol=0)
    assert int(opt.diagnostics()["skipped"]) == 1
    trained(net, opt, range(4, 5))
    assert int(opt.core_state().step) == 4
    assert not torch.equal(net[0].weight, before[0]["0.weight"])


def test_held_out_gradients_are_not_looked_at_any_more() -> None:
    net, opt = _trained(base=mo.AdamW(), held_out=True)
    opt.freeze()
    for t in range(3, 6):
        with opt.meta_gradients():
            net(torch.ones(2, 4).double()).sum().backward()
            with pytest.raises(RuntimeError, match="`freeze` must not be called inside"):
                opt.freeze()
        trained(net, opt, range(t, t + 1))
    assert bool(opt.diagnostics()["asleep"]["0.weight"])


def test_parameters_that_step_in_the_backward_pass() -> None:
    net, opt = _trained(base=mo.AdamW())
    other, its = copy.deepcopy((net, opt))
    opt.step_in_backward()
    with_gradients(net, opt, 3)
    with pytest.raises(RuntimeError, match="call `step` first"):
        opt.freeze()
    opt.step()
    trained(other, its, range(3, 4))
    for some, ours in ((net, opt), (other, its)):
        ours.freeze()
        trained(some, ours, range(4, 6))
    assert net[0].weight.grad is None
    assert_same(net, other, 1e-13)


@pytest.mark.parametrize("blocks", ["scalar", "node"])
def test_wrapped_optimizers_go_on_at_the_lr_of_then(blocks: str) -> None:
    net = network()
    inner = torch.optim.AdamW(net.parameters(), lr=1.0, weight_decay=0.1)
    opt = wrap(inner, step_size=0.01, meta_lr=0.05, blocks=blocks, compile=False)
    trained(net, opt, range(3))
    other, frozen = copy.deepcopy((net, opt))
    frozen.freeze()
    for some, ours in ((net, opt), (other, frozen)):
        trained(some, ours, range(3, 4))
    assert_same(net, other, 1e-13)
    assert size_of(frozen) < size_of(opt)
    sizes = frozen.step_sizes()
    trained(other, frozen, range(4, 6))
    torch.testing.assert_close(sizes, frozen.step_sizes(), rtol=0.0, atol=0.0)
    third, fresh = copy.deepcopy(other), None
    fresh = wrap(
        torch.optim.AdamW(third.parameters(), lr=1.0, weight_decay=0.1),
        step_size=0.01,
        blocks=blocks,
        compile=False,
    )
    fresh.load_state_dict(copy.deepcopy(frozen.state_dict()))
    for some, ours in ((other, frozen), (third, fresh)):
        trained(some, ours, range(6, 8))
    assert_same(other, third, 0.0)


def test_a_frozen_optimizer_becomes_a_plain_one() -> None:
    net, opt = _trained(base=mo.AdamW())
    opt.freeze()
    opt.freeze()  # which changes nothing
    other, its = copy.deepcopy((net, opt))
    plain = opt.to_plain()
    assert "step_sizes_frozen" not in plain.param_groups[0]
    for some, ours in ((net, plain), (other, its)):
        trained(some, ours, range(3, 6))
    assert_same(net, other, 1e-13)


def test_without_parameters_there_is_nothing_to_freeze() -> None:
    opt = MetaOptimizer([{"params": []}], compile=False)
    with pytest.raises(ValueError, match="holds no parameter yet"):
        opt.freeze()
