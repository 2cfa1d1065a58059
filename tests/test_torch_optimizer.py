"""What torch's own tests ask of every optimizer, of every rule, eager and compiled."""

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from metaopt_conformance.tolerances import relative_error, rounding  # noqa: E402
from metaopt_torch import MetaOptimizer  # noqa: E402

import metaopt as mo  # noqa: E402

BASES: dict[str, Any] = {
    "SGD": mo.SGD(weight_decay=0.01),
    "SGDm": mo.SGD(momentum=0.9),
    "RMSprop": mo.RMSprop(),
    "AdamW": mo.AdamW(weight_decay=0.01),
    "Lion": mo.Lion(),
}
METAS: dict[str, Any] = {"SGD": mo.SGD(), "Adam": mo.AdamW(), "Lion": mo.Lion()}
BLOCKS = ["scalar", "tensor", "node", "weight"]

every_base = pytest.mark.parametrize("base", BASES)
every_meta = pytest.mark.parametrize("meta", METAS)
every_partition = pytest.mark.parametrize("blocks", BLOCKS)


def made(params: Any, base: str = "AdamW", meta: str = "Lion", **options: Any) -> MetaOptimizer:
    defaults: dict[str, Any] = {"step_size": 1e-2, "meta_lr": 1e-2, "compile": False}
    return MetaOptimizer(params, base=BASES[base], meta=METAS[meta], **(defaults | options))


def model(dtype: Any = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)]
    return torch.nn.Sequential(*layers).to(dtype)


def data(dtype: Any = torch.float32, t: int = 0) -> Any:
    generator = torch.Generator().manual_seed(100 + t)
    x = torch.randn(32, 4, generator=generator)
    return x.to(dtype), x.sum(dim=1, keepdim=True).sin().to(dtype)


def loss_of(net: Any, t: int = 0) -> Any:
    x, y = data(next(net.parameters()).dtype, t)
    return (net(x) - y).square().mean()


def trained(net: Any, opt: Any, steps: range | int) -> list[float]:
    losses = []
    for t in steps if isinstance(steps, range) else range(steps):
        opt.zero_grad()
        loss = loss_of(net, t)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


def bits(tree: Any) -> Any:
    """Return everything in a tree as what can be compared with `==`, tensors to the last bit."""
    if isinstance(tree, torch.Tensor):
        raw = tree.detach().contiguous().reshape(-1).view(torch.uint8)
        return (str(tree.dtype), tuple(tree.shape), raw.numpy().tobytes())
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    return tree


# --- steps


@every_base
@every_meta
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_steps_go_in_the_right_direction(
    base: str, meta: str, maximize: bool, strided: bool
) -> None:
    start = torch.tensor([[3.0, -2.0], [1.0, 4.0]])
    weight = (start.repeat(1, 2)[:, ::2] if strided else start).clone(
        memory_format=torch.preserve_format
    )
    if strided:
        weight = torch.empty_strided((2, 2), (1, 3)).copy_(start)
    weight.requires_grad_()
    bias = torch.tensor(1.0, requires_grad=True)
    opt = made([weight, bias], base, meta, maximize=maximize)

    def closure() -> Any:
        opt.zero_grad()
        loss = (weight.square().sum() + bias.square()).sqrt()
        loss.backward()
        return loss.detach()

    first = float(closure())
    for _ in range(20):
        opt.step(closure)
    assert (float(closure()) > first) == maximize
    assert weight.stride() == ((1, 3) if strided else (2, 1))


@every_base
@every_partition
def test_without_gradients_nothing_moves(base: str, blocks: str) -> None:
    net = model()
    opt = made(net.parameters(), base, blocks=blocks)
    trained(net, opt, 2)
    opt.zero_grad()
    before = bits([net.state_dict(), opt.core_state().beta, opt.core_state().average])
    opt.step()
    assert bits([net.state_dict(), opt.core_state().beta, opt.core_state().average]) == before


@every_base
@every_partition
def test_lr_0_freezes_params_traces_and_step_sizes(base: str, blocks: str) -> None:
    net = model()
    opt = made(net.parameters(), base, blocks=blocks)
    trained(net, opt, 3)
    opt.param_groups[0]["lr"] = 0.0
    state = opt.core_state()
    before = bits([net.state_dict(), state.beta, state.average, state.meta_slots])
    trained(net, opt, 3)
    after = opt.core_state()
    assert bits([net.state_dict(), after.beta, after.average, after.meta_slots]) == before
    assert all(int(count) == 6 for count in after.count.values())


@every_base
def test_zero_gradients_move_nothing_without_weight_decay(base: str) -> None:
    net = model()
    opt = made(net.parameters(), base, weight_decay=0.0)
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    before = bits(net.state_dict())
    opt.step()
    assert bits(net.state_dict()) == before


def test_meta_lr_0_is_torchs_adamw() -> None:
    nets = [model(torch.float64) for _ in range(2)]
    theirs = torch.optim.AdamW(nets[0].parameters(), lr=1e-2, weight_decay=0.1)
    ours = MetaOptimizer(
        nets[1].parameters(),
        base=mo.AdamW(weight_decay=0.1),
        meta=mo.Lion(),
        step_size=1e-2,
        meta_lr=0.0,
        compile=False,
        discount=1.0,
    )
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(opt, 30) for opt in (theirs, ours)]
    for t in range(30):
        for net, opt, scheduler in zip(nets, (theirs, ours), schedulers, strict=True):
            trained(net, opt, range(t, t + 1))
            scheduler.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert relative_error(b.detach().numpy(), a.detach().numpy()) < 1e-12


@every_base
@every_partition
def test_params_of_several_dtypes(base: str, blocks: str) -> None:
    """As if each were alone in float32 or wider, but for its own last rounding."""
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    start = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
    params = [start.to(dtype, copy=True).requires_grad_() for dtype in dtypes]
    alone = [start.to(dtype).double().requires_grad_() for dtype in dtypes]
    opts = [made(group, base, blocks=blocks, discount=1.0) for group in (params, alone)]
    for _ in range(3):
        for group, opt in zip((params, alone), opts, strict=True):
            for param in group:
                param.grad = torch.ones_like(param)
            opt.step()
    for param, wide, dtype in zip(params, alone, dtypes, strict=True):
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert relative_error(param.detach().double().numpy(), wide.detach().numpy()) < 12 * eps
        state = opts[0].state[param]
        want = torch.float64 if dtype == torch.float64 else torch.float32
        kept = "average" if dtype == want else "trace"
        assert {state[key].dtype for key in (kept, *BASES[base].slots)} == {want}


@every_meta
def test_channels_last_and_contiguous_agree(meta: str) -> None:
    nets, found = [], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        nets.append(torch.nn.Conv2d(3, 4, 3).double().to(memory_format=memory_format))
        opt = made(nets[-1].parameters(), "AdamW", meta, blocks="node")
        for t in range(5):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(t)).double()
            opt.zero_grad()
            nets[-1](x.to(memory_format=memory_format)).square().mean().backward()
            opt.step()
        found.append(opt.step_sizes()["0"])
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert relative_error(b.detach().numpy(), a.detach().numpy()) < rounding("float64", 60, 50)
    assert relative_error(found[1].numpy(), found[0].numpy()) < rounding("float64", 60, 50)


def test_gradients_of_another_layout_than_their_parameter() -> None:
    """A transposed gradient, and one that is expanded from a number."""
    params = [torch.ones(3, 2, requires_grad=True) for _ in range(2)]
    opts = [made([param]) for param in params]
    values = torch.arange(6.0).reshape(2, 3)
    params[0].grad, params[1].grad = values.t(), values.t().contiguous()
    for opt in opts:
        opt.step()
    assert bits(params[0]) == bits(params[1])
    params[0].grad, params[1].grad = torch.ones(()).expand(3, 2), torch.ones(3, 2)
    for opt in opts:
        opt.step()
    assert bits(params[0]) == bits(params[1])


def test_memory_format_may_change_in_mid_training() -> None:
    torch.manual_seed(0)
    nets = [torch.nn.Conv2d(3, 4, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = [made(net.parameters()) for net in nets]
    for t in range(4):
        if t == 2:
            nets[1].to(memory_format=torch.channels_last)
        for net, opt in zip(nets, opts, strict=True):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(t))
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert relative_error(b.detach().numpy(), a.detach().numpy()) < rounding("float32", 60, 50)


# --- closures, hooks, groups


def test_a_closure_is_called_once_with_gradients_on() -> None:
    net, calls = model(), []
    opt = made(net.parameters())

    def closure() -> Any:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert calls == [True]
    assert float(loss.detach()) > 0.0


def test_hooks_run_before_and_after_a_step() -> None:
    net, seen = model(), []
    opt = made(net.parameters())
    handles = [
        opt.register_step_pre_hook(lambda *_: seen.append("before")),
        opt.register_step_post_hook(lambda *_: seen.append("after")),
    ]
    trained(net, opt, 1)
    handles[0].remove()
    trained(net, opt, 1)
    assert seen == ["before", "after", "after"]


def test_step_sizes_may_be_arrays_of_a_length_for_each_leaf() -> None:
    params = [("a", torch.zeros(3, 2)), ("b", torch.zeros(4, 2))]
    sizes = {"a": np.array([0.1, 0.2, 0.3]), "b": np.array([0.1, 0.1, 0.1, 0.4])}
    opt = made(params, blocks="node", step_size=sizes)
    for name, size in opt.step_sizes().items():
        assert relative_error(size.numpy(), sizes[name]) < rounding("float32", operations=4)


def test_groups_have_options_of_their_own() -> None:
    net = model(torch.float64)
    named = list(net.named_parameters())
    groups = [
        {"params": named[:2], "weight_decay": 0.5, "lr": 0.5, "block": "body", "step_size": 0.02},
        {"params": named[2:], "bounds": (5e-3, 2e-2), "maximize": True, "block": "head"},
    ]
    opt = made(groups, blocks="tensor")
    state, params = None, {n: p.detach().clone() for n, p in net.named_parameters()}
    core = mo.MetaOptimize(
        base={"0.*": mo.AdamW(weight_decay=0.5), "*": BASES["AdamW"]},
        meta=METAS["Lion"],
        step_size={"body": 0.02, "head": 0.01},
        meta_lr=1e-2,
        blocks={"body": "0.*", "head": "*"},
        bounds={"head": (5e-3, 2e-2)},
        discount=1.0,
    )
    state = core.init(params)
    assert list(opt.step_sizes()) == ["body", "head"]
    for t in range(6):
        opt.zero_grad()
        loss_of(net, t).backward()
        grads = {name: p.grad * (-1 if "2." in name else 1) for name, p in net.named_parameters()}
        lrs = {name: 0.5 if name.startswith("0.") else 1.0 for name in params}
        params, state = core.step(params, grads, state, lr=lrs)
        opt.step()
    for name, param in net.named_parameters():
        assert relative_error(param.detach().numpy(), params[name].numpy()) < 1e-12
    for name, size in core.step_sizes(state).items():
        assert relative_error(opt.step_sizes()[name].numpy(), size.numpy()) < 1e-12


def test_weight_decay_of_a_group_may_follow_a_schedule() -> None:
    param = torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt = made([param], "SGD", meta_lr=0.0, step_size=0.1)
    expected = 1.0
    for decay in (0.0, 0.5, 0.1, 0.2, 0.0):
        opt.param_groups[0]["weight_decay"] = decay
        param.grad = torch.zeros_like(param)
        opt.step()
        expected *= 1.0 - 0.1 * decay
    assert relative_error(param.detach().numpy(), np.full(3, expected)) < 1e-12
    base: Any = opt.config.base
    assert base["0"].weight_decay == 0.0


@pytest.mark.parametrize(
    ("blocks", "extra"),
    [
        ("scalar", {}),
        ("tensor", {}),
        ("node", {}),
        ("weight", {}),
        ("tensor", {"curvature": "exact", "approximation": "2x2"}),
    ],
)
def test_a_group_may_be_added_in_mid_training(blocks: str, extra: dict[str, Any]) -> None:
    """What was there goes on; with a block that rests until then, the whole run is the same."""
    one, two = torch.nn.Linear(3, 2).double(), torch.nn.Linear(3, 2).double()
    two.load_state_dict(one.state_dict())
    late = [torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    opts = [
        made([*one.parameters()], blocks=blocks, **extra),
        made([{"params": [*two.parameters()]}, {"params": [late[1]]}], blocks=blocks, **extra),
    ]
    for t in range(6):
        if t == 3:
            opts[0].add_param_group({"params": [late[0]]})
        for net, extra_param, opt in zip((one, two), late, opts, strict=True):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(t)).double()
            loss = net(x).square().mean()
            if t >= 3:
                loss = loss + (extra_param * net.bias).square().sum()
            opt.zero_grad()
            opt.backward(loss) if extra else loss.backward()
            opt.step()
    for a, b in zip([*one.parameters(), late[0]], [*two.parameters(), late[1]], strict=True):
        assert relative_error(a.detach().numpy(), b.detach().numpy()) < 1e-12
    for name, size in opts[1].step_sizes().items():
        assert relative_error(opts[0].step_sizes()[name].numpy(), size.numpy()) < 1e-12


def test_frozen_parameters_have_no_state_until_they_thaw() -> None:
    net = model()
    net[0].requires_grad_(False)
    opt = made(net.parameters(), discount=1.0)
    trained(net, opt, 2)
    frozen, live = net[0].weight, net[2].weight
    assert frozen not in opt.state
    assert "average" in opt.state[live]
    before = bits(frozen)
    net[0].requires_grad_(True)
    trained(net, opt, 2)
    assert bits(frozen) != before
    assert int(opt.state[frozen]["step"]) == 2
    assert int(opt.state[live]["step"]) == 4


# --- copies and checkpoints


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    **{blocks: {"blocks": blocks} for blocks in BLOCKS},
    "2x2": {"curvature": "exact", "approximation": "2x2", "blocks": "tensor", "hvp": "central"},
    "skip": {"skip_nonfinite": True, "meta_first": True},
    "kahan": {"rounding": "kahan"},
}


def stepped(net: Any, opt: Any, steps: range) -> None:
    for t in steps:

        def closure(t: int = t) -> Any:
            opt.zero_grad()
            loss = loss_of(net, t)
            loss.backward()
            return loss

        opt.step(closure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_goes_on_from_a_checkpoint_to_the_last_bit(name: str, dtype: Any) -> None:
    if name == "2x2" and dtype == torch.bfloat16:
        pytest.skip("central differences need more digits than bfloat16 has")
    whole, half, rest = (model(dtype) for _ in range(3))
    opts = [made(net.parameters(), **CONFIGURATIONS[name]) for net in (whole, half, rest)]
    stepped(whole, opts[0], range(8))
    stepped(half, opts[1], range(4))
    kept = saved_and_loaded({"net": half.state_dict(), "opt": opts[1].state_dict()})
    rest.load_state_dict(kept["net"])
    opts[2].load_state_dict(kept["opt"])
    before = bits(kept["opt"])
    stepped(rest, opts[2], range(4, 8))
    assert bits(rest.state_dict()) == bits(whole.state_dict())
    assert bits(opts[2].state_dict()) == bits(opts[0].state_dict())
    assert bits(kept["opt"]) == before  # the checkpoint is nobody's memory


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_copies_train_on_by_themselves(name: str, how: str) -> None:
    net = model()
    opt = made(net.parameters(), **CONFIGURATIONS[name])
    stepped(net, opt, range(3))
    both = (net, opt)
    twin, twin_opt = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    before = bits(net.state_dict())
    stepped(twin, twin_opt, range(3, 6))
    assert bits(net.state_dict()) == before
    stepped(net, opt, range(3, 6))
    assert bits(net.state_dict()) == bits(twin.state_dict())
    assert bits(opt.state_dict()) == bits(twin_opt.state_dict())


def test_a_state_dict_is_that_of_the_moment_it_is_made() -> None:
    net = model()
    opt = made(net.parameters())
    trained(net, opt, 2)
    assert bits(opt.state_dict()) == bits(opt.state_dict())
    assert all(
        isinstance(entry["step"], torch.Tensor) for entry in opt.state_dict()["state"].values()
    )


def test_a_checkpoint_without_newer_keys_loads() -> None:
    net = model()
    opt = made(net.parameters(), blocks="tensor", discount=1.0)
    trained(net, opt, 2)
    state = saved_and_loaded(opt.state_dict())
    for key in ("restarts", "meta_grad", "skipped", "block", "bounds", "maximize"):
        del state["param_groups"][0][key]
    for entry in state["state"].values():
        del entry["average"]
    fresh = made(net.parameters(), blocks="tensor", discount=1.0)
    fresh.load_state_dict(state)
    assert bits(fresh.step_sizes()) == bits(opt.step_sizes())
    assert not any(torch.any(norm) for norm in fresh.diagnostics()["trace_norm"].values())
    trained(net, fresh, 2)


def test_a_checkpoint_of_named_parameters_loads_without_names_and_back() -> None:
    net = model()
    named, unnamed = made(net.named_parameters()), made(net.parameters())
    trained(net, named, 3)
    unnamed.load_state_dict(saved_and_loaded(named.state_dict()))
    assert bits(unnamed.step_sizes()) == bits(named.step_sizes())
    fresh = made(net.named_parameters())
    fresh.load_state_dict(saved_and_loaded(unnamed.state_dict()))
    assert bits(fresh.step_sizes()) == bits(named.step_sizes())


def test_a_state_dict_of_other_blocks_is_refused_and_nothing_changes() -> None:
    net = model()
    opt, other = made(net.parameters()), made(net.parameters(), blocks="tensor")
    trained(net, opt, 2)
    before = bits(opt.state_dict())
    with pytest.raises(ValueError, match=r"'beta' of group 0 has shape \(4,\); expected \(1,\)"):
        opt.load_state_dict(other.state_dict())
    assert bits(opt.state_dict()) == before


def test_a_state_dict_of_other_shapes_is_refused() -> None:
    opt, other = made(torch.nn.Linear(3, 2).parameters()), made(torch.nn.Linear(3, 4).parameters())
    with pytest.raises(ValueError, match=r"of '0' has shape \(4, 3\); expected \(2, 3\)"):
        opt.load_state_dict(other.state_dict())


def test_a_state_dict_of_another_optimizer_is_refused() -> None:
    net = model()
    adamw = torch.optim.AdamW(net.parameters())
    trained(net, adamw, 1)
    with pytest.raises(ValueError, match="no 'beta' in group 0"):
        made(net.parameters()).load_state_dict(adamw.state_dict())


def test_the_state_goes_through_the_cores_file(tmp_path: Any) -> None:
    net = model()
    opt = made(net.named_parameters(), blocks="node")
    trained(net, opt, 3)
    mo.save(tmp_path / "state.safetensors", opt.config, opt.core_state())
    params = {name: param.detach() for name, param in net.named_parameters()}
    _, state = mo.load(tmp_path / "state.safetensors", params)
    twin = copy.deepcopy(net)
    fresh = made(twin.named_parameters(), blocks="node")
    fresh.load_core_state(state)
    trained(net, opt, range(3, 6))
    trained(twin, fresh, range(3, 6))
    assert bits(twin.state_dict()) == bits(net.state_dict())
    assert bits(fresh.state_dict()) == bits(opt.state_dict())
    with pytest.raises(ValueError, match="state"):
        made(net.named_parameters()).load_core_state(state)


def test_the_state_dict_goes_through_safetensors(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    net = model()
    opt = made(net.parameters(), blocks="tensor")
    trained(net, opt, 3)
    state = opt.state_dict()
    flat = {f"{i}/{key}": v for i, entry in state["state"].items() for key, v in entry.items()}
    groups = [
        {key: value for key, value in group.items() if not isinstance(value, torch.Tensor)}
        for group in state["param_groups"]
    ]
    flat |= {
        f"group{i}/{key}": value
        for i, group in enumerate(state["param_groups"])
        for key, value in group.items()
        if isinstance(value, torch.Tensor)
    }
    save_file(flat, tmp_path / "opt.safetensors")
    read = load_file(tmp_path / "opt.safetensors")
    again: dict[str, Any] = {"state": {}, "param_groups": copy.deepcopy(groups)}
    for key, value in read.items():
        where, name = key.split("/")
        if where.startswith("group"):
            again["param_groups"][int(where[5:])][name] = value
        else:
            again["state"].setdefault(int(where), {})[name] = value
    fresh = made(net.parameters(), blocks="tensor")
    fresh.load_state_dict(again)
    assert bits(fresh.state_dict()) == bits(state)


# --- what is refused


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "complex": (lambda: made([torch.zeros(2, dtype=torch.complex64)]), TypeError, "complex64"),
    "integer": (lambda: made([torch.zeros(2, dtype=torch.int64)]), TypeError, "int64"),
    "sparse": (lambda: made([torch.zeros(2).to_sparse()]), TypeError, "sparse"),
    "no params": (lambda: made([]), ValueError, "empty"),
    "negative lr": (lambda: made([torch.zeros(2)], lr=-1.0), ValueError, "`lr` must be"),
    "lr of two": (lambda: made([torch.zeros(2)], lr=torch.ones(2)), ValueError, r"shape \(2,\)"),
    "weight decay": (
        lambda: made([torch.zeros(2)], weight_decay=-0.1),
        ValueError,
        "`weight_decay` must be",
    ),
    "block": (
        lambda: made([{"params": [torch.zeros(2)], "block": 3}]),
        TypeError,
        "`block` must be the name",
    ),
    "names twice": (
        lambda: made([("a", torch.zeros(2)), ("a", torch.zeros(3))]),
        ValueError,
        "two parameters called 'a'",
    ),
    "rounding": (
        lambda: made([torch.zeros(2)], rounding="up"),
        ValueError,
        "`rounding` must be one",
    ),
    "hvp": (lambda: made([torch.zeros(2)], hvp="finite"), ValueError, "`hvp` must be one"),
    "stochastic float16": (
        lambda: made([torch.zeros(2, dtype=torch.float16)], rounding="stochastic"),
        ValueError,
        "bfloat16",
    ),
    "groups that disagree": (
        lambda: made(
            [
                {"params": [torch.zeros(2)], "step_size": 0.1},
                {"params": [torch.zeros(2)], "step_size": 0.2},
            ]
        ),
        ValueError,
        "groups that share a block must agree",
    ),
    "step size of no block": (
        lambda: made([torch.zeros(2)], step_size={"every": 0.1}),
        ValueError,
        "unknown block 'every'",
    ),
    "meta with decay": (
        lambda: MetaOptimizer(
            [torch.zeros(2)], base=mo.SGD(), meta=mo.SGD(weight_decay=0.1), discount=1.0
        ),
        ValueError,
        "`meta` must have weight_decay 0",
    ),
    "foreach": (lambda: made([torch.zeros(2)], foreach=True), TypeError, "foreach"),
    "differentiable": (
        lambda: made([torch.zeros(2)], differentiable=True),
        TypeError,
        "differentiable",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_a_group_that_is_refused_changes_nothing() -> None:
    net = model()
    opt = made(net.parameters())
    trained(net, opt, 2)
    before = bits(opt.state_dict())
    with pytest.raises(ValueError, match="`lr` must be"):
        opt.add_param_group({"params": [torch.zeros(2, requires_grad=True)], "lr": -1.0})
    with pytest.raises(ValueError, match="groups that share a block must agree"):
        opt.add_param_group({"params": [torch.zeros(2, requires_grad=True)], "step_size": 3.0})
    assert bits(opt.state_dict()) == before
    trained(net, opt, 1)


def test_sparse_gradients_are_refused() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    opt = made(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    before = bits(embedding.state_dict())
    with pytest.raises(TypeError, match=r"gradient of '0' must be dense; got layout torch.sparse"):
        opt.step()
    assert bits(embedding.state_dict()) == before


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_a_scheduler_that_goes_wrong_is_told(lr: float) -> None:
    net = model()
    opt = made(net.parameters())
    opt.param_groups[0]["lr"] = lr
    before = bits(net.state_dict())
    with pytest.raises(ValueError, match="`lr` must be a finite number and at least 0"):
        trained(net, opt, 1)
    assert bits(net.state_dict()) == before
