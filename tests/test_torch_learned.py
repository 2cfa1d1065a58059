"""Hyperparameters that are learned, in torch: groups, parameters that come and go, checkpoints."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from metaopt_conformance.tolerances import relative_error, rounding  # noqa: E402
from metaopt_torch import MetaOptimizer  # noqa: E402

import metaopt as mo  # noqa: E402
from tests.torch_states import assert_same  # noqa: E402

Learned = mo.Learned
BASE = mo.AdamW(betas=(Learned(0.9), 0.99), weight_decay=Learned(0.1, blocks="tensor"), eps=1e-3)
BLOCKS = ["scalar", "tensor", "node", "weight"]
every_partition = pytest.mark.parametrize("blocks", BLOCKS)


def normal(*shape: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def named() -> list[tuple[str, Any]]:
    return [("w", normal(4, 3).requires_grad_()), ("b", normal(4, seed=1).requires_grad_())]


def made(params: Any, base: Any = BASE, **options: Any) -> MetaOptimizer:
    usual: dict[str, Any] = {"step_size": 0.02, "compile": False}
    return MetaOptimizer(params, base=base, **(usual | options))


def go(opt: MetaOptimizer, steps: int, first: int = 0) -> None:
    for t in range(first, first + steps):
        for group in opt.param_groups:
            for index, param in enumerate(group["params"]):
                noise = normal(*param.shape, seed=10 * t + index)
                param.grad = param.detach() + noise.to(param.dtype)
        opt.step()


@every_partition
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_cores_step(blocks: str, dtype: Any) -> None:
    params = [(name, param.detach().to(dtype).requires_grad_()) for name, param in named()]
    opt = made(params, blocks=blocks)
    config = mo.MetaOptimize(base=BASE, step_size=0.02, blocks=blocks)
    own: Any = {name: param.detach().clone() for name, param in params}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = config.init(own)
    for t in range(4):
        grads = {
            name: param + normal(*param.shape, seed=t).to(dtype) for name, param in own.items()
        }
        for name, param in params:
            param.grad = grads[name].clone()
        opt.step()
        own, state = config.step(own, grads, state)
    for name, param in params:
        assert torch.equal(param.detach(), own[name])
    found, want = opt.hyperparameters(), config.hyperparameters(state)
    assert_same(found, want)
    assert [*found] == ["betas[0]", "weight_decay"]
    assert [*found["weight_decay"]] == ["w", "b"]
    assert all(value.dtype == wide for part in found.values() for value in part.values())
    assert_same(
        opt.diagnostics()["learned"]["weight_decay"]["beta"],
        dict(config.diagnostics(state, own)["learned"]["weight_decay"]["beta"]),
    )


@every_partition
def test_a_state_dict_goes_on_bit_for_bit(blocks: str) -> None:
    params = named()
    opt = made(params, blocks=blocks)
    go(opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    others = [(name, param.detach().clone().requires_grad_()) for name, param in params]
    other = made(others, blocks=blocks)
    other.load_state_dict(saved)
    assert_same(other.state_dict(), opt.state_dict())
    go(opt, 2, 3)
    go(other, 2, 3)
    assert_same(other.state_dict(), opt.state_dict())
    assert_same(other.hyperparameters(), opt.hyperparameters())


@every_partition
@pytest.mark.parametrize("values", BLOCKS)
def test_a_state_goes_on_whatever_groups_said_before_it_came(blocks: str, values: str) -> None:
    """A group may stop to learn weight decay, or begin to, in mid-run; what is loaded says it."""
    base = mo.AdamW(weight_decay=Learned(0.1, blocks=values))

    def by_group() -> tuple[Any, MetaOptimizer]:
        pairs = named()
        return pairs, made([{"params": [pair]} for pair in pairs], base, blocks=blocks)

    pairs, opt = by_group()
    go(opt, 3)
    before = copy.deepcopy(opt.state_dict())
    opt.param_groups[0]["weight_decay"] = 0.3
    go(opt, 2, 3)
    others, other = by_group()
    go(other, 1)
    with torch.no_grad():
        for (_, param), (_, old) in zip(others, pairs, strict=True):
            param.copy_(old)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same(other.state_dict(), opt.state_dict())
    go(opt, 2, 5)
    go(other, 2, 5)
    assert_same(other.state_dict(), opt.state_dict())
    other.load_state_dict(before)
    assert_same(other.state_dict(), before)
    go(other, 1)


def test_a_copy_goes_on_bit_for_bit() -> None:
    opt = made(named())
    go(opt, 3)
    other = copy.deepcopy(opt)
    go(opt, 2, 3)
    go(other, 2, 3)
    assert_same(other.state_dict(), opt.state_dict())


def test_by_names_groups_may_stand_in_another_order() -> None:
    w, b = named()
    opt = made([{"params": [w]}, {"params": [b]}], blocks="tensor")
    go(opt, 3)
    others = [(name, param.detach().clone().requires_grad_()) for name, param in (b, w)]
    other = made([{"params": [pair]} for pair in others], blocks="tensor")
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    found, want = other.hyperparameters(), opt.hyperparameters()
    for name in want:
        assert found[name].keys() == want[name].keys()
        assert all(torch.equal(found[name][key], want[name][key]) for key in want[name])


def test_a_state_dict_without_it_is_refused() -> None:
    opt, plain = made(named()), made(named(), base=mo.AdamW(eps=1e-3))
    go(opt, 2)
    go(plain, 2)
    with pytest.raises(ValueError, match="beta"):
        opt.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"made with .*weight_decay by"):
        plain.load_state_dict(opt.state_dict())


def test_a_groups_weight_decay_stands_in_its_place() -> None:
    """Weights that are not to decay are in a group of their own, and the rest is shared."""
    w, b = named()
    opt = made([{"params": [w]}, {"params": [b], "weight_decay": 0.0}])
    go(opt, 3)
    found = opt.hyperparameters()
    assert [*found] == ["betas[0]", "weight_decay"]
    assert [*found["weight_decay"]] == ["w"]
    assert "weight_decay.trace" not in opt.state[b[1]]
    assert "betas[0].trace" in opt.state[b[1]]


@pytest.mark.parametrize("blocks", ["scalar", "tensor"])
def test_what_is_learned_stays_where_parameters_come(blocks: str) -> None:
    opt = made(named(), blocks=blocks)
    go(opt, 5)
    before = opt.hyperparameters()
    opt.add_param_group({"params": [("c", normal(2, seed=3).requires_grad_())]})
    after = opt.hyperparameters()
    for name, part in before.items():
        for key, value in part.items():
            assert torch.equal(after[name][key], value)
    assert float(after["weight_decay"]["c"]) == pytest.approx(0.1)
    go(opt, 2, 5)
    assert float(opt.hyperparameters()["weight_decay"]["c"]) != pytest.approx(0.1, abs=1e-9)


def test_the_core_saves_and_loads_it(tmp_path: Path) -> None:
    opt = made(named(), curvature="none")
    go(opt, 3)
    mo.save(tmp_path / "state", opt.config, opt.core_state())
    params = {name: param.detach() for name, param in named()}
    _, state = mo.load(tmp_path / "state", params, opt.config)
    values = opt.hyperparameters()
    other = made(named())
    other.load_core_state(state)
    assert_same(other.hyperparameters(), values)


@pytest.mark.parametrize("hvp", ["autograd", "central"])
def test_the_exact_hessian_reaches_it(hvp: str) -> None:
    """Of half the squared norm plus a constant slope; against the core with the Hessian by hand."""
    params = named()
    options: dict[str, Any] = {"curvature": "exact", "blocks": "tensor"}
    opt = made(params, hvp=hvp, **options)
    config = mo.MetaOptimize(base=BASE, step_size=0.02, **options)
    own: Any = {name: param.detach().clone() for name, param in params}
    state = config.init(own)

    def loss() -> Any:
        return sum((param.square() / 2 + 0.3 * param).sum() for _, param in params)

    def closure() -> Any:
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(3):
        grads = {name: param + 0.3 for name, param in own.items()}
        own, state = config.step(own, grads, state, hvp=lambda tangents: dict(tangents))
        if hvp == "central":
            opt.step(closure)
        else:
            opt.zero_grad()
            opt.backward(loss())
            opt.step()
    for name, param in params:
        torch.testing.assert_close(param.detach(), own[name], rtol=1e-6, atol=1e-6)
    for name, part in config.hyperparameters(state).items():
        for key, value in part.items():
            torch.testing.assert_close(opt.hyperparameters()[name][key], value, rtol=1e-5, atol=0)


def test_a_projection_takes_its_traces_along() -> None:
    (_, w), _ = params = named()
    opt = made(params)
    go(opt, 3)
    opt.project(lambda found: {"w": found["w"].clamp(min=0.0)})
    assert torch.all(opt.state[w]["weight_decay.trace"][w.detach() == 0.0] == 0.0)
    assert torch.any(opt.state[w]["weight_decay.trace"] != 0.0)


def test_with_rounding_and_without_gradients_it_goes_on() -> None:
    params = [(name, param.detach().bfloat16().requires_grad_()) for name, param in named()]
    opt = made(params, rounding="kahan")
    go(opt, 2)
    params[0][1].grad = None
    trace = opt.state[params[0][1]]["weight_decay.trace"].clone()
    opt.step()
    assert torch.equal(opt.state[params[0][1]]["weight_decay.trace"], trace)


def test_a_schedule_of_what_is_learned_ends_it() -> None:
    """A group that says a number from now on has it, and nothing of it is learned any more."""
    opt = made(named(), base=mo.SGD(weight_decay=Learned(0.1), momentum=Learned(0.9)))
    go(opt, 2)
    momentum = opt.hyperparameters()["momentum"]["all"]
    opt.param_groups[0]["weight_decay"] = 0.05
    go(opt, 1, 2)
    assert [*opt.hyperparameters()] == ["momentum"]
    assert float(opt.hyperparameters()["momentum"]["all"]) == pytest.approx(
        float(momentum), abs=1e-2
    )


def test_with_blocks_of_groups_it_has_these() -> None:
    w, b = named()
    groups = [{"params": [w], "block": "body"}, {"params": [b], "block": "head"}]
    opt = made(groups, base=mo.SGD(momentum=Learned(0.9)))
    go(opt, 3)
    assert [*opt.hyperparameters()["momentum"]] == ["body", "head"]
    assert [*opt.step_sizes()] == ["body", "head"]


def by_pattern() -> dict[str, Any]:
    """Rules with different numbers in one place, which are called by patterns."""
    return {
        "[ab]": mo.SGD(momentum=Learned(0.9, meta_lr=1e-2)),
        "*": mo.SGD(momentum=Learned(0.8, meta_lr=1e-2)),
    }


def three() -> dict[str, Any]:
    return {name: normal(3, seed=i).requires_grad_() for i, name in enumerate("abc")}


NAMES = ["[ab]: momentum", "*: momentum"]


def of_number(opt: MetaOptimizer, name: str) -> dict[str, Any]:
    """Return all that the state has of a number, by parameter or group and key."""
    held = [*opt.state.values(), *opt.param_groups]
    return {
        f"{index} {key}": value.clone()
        for index, part in enumerate(held)
        for key, value in part.items()
        if isinstance(key, str) and key.startswith(f"{name}.")
    }


@pytest.mark.parametrize("blocks", ["scalar", "tensor", "weight"])
@pytest.mark.parametrize("how", ["edit", "group", "leave"])
def test_what_is_learned_by_pattern_stays_where_groups_change(how: str, blocks: str) -> None:
    """Its name is that of the pattern, whatever groups say, and with it all that it has."""
    params = three()
    first = [(name, params[name]) for name in ("ac" if how == "group" else "abc")]
    opt = made([{"params": first[:-1]}, {"params": first[-1:]}], by_pattern(), blocks=blocks)
    go(opt, 4)
    assert [*opt.hyperparameters()] == NAMES
    before = opt.hyperparameters(), {name: of_number(opt, name) for name in NAMES}
    if how == "edit":
        opt.param_groups[0]["weight_decay"] = 0.1
    elif how == "leave":
        opt.param_groups[1]["params"] = []
        opt.param_groups[1]["param_names"] = []
    else:
        opt.add_param_group({"params": [("b", params["b"])], "weight_decay": 0.1})
    found = opt.hyperparameters()
    stays = NAMES[:1] if how == "leave" else NAMES
    assert [*found] == stays
    for name in stays:
        for key, value in before[0][name].items():
            assert torch.equal(found[name][key], value)
        if how == "edit":
            assert_same(of_number(opt, name), before[1][name])
    go(opt, 1, 4)
    assert [*opt.hyperparameters()] == stays


@pytest.mark.parametrize("decay", [None, 0.1])
def test_what_is_learned_by_pattern_loads_in_another_order(decay: float | None) -> None:
    def both(params: dict[str, Any], names: list[str]) -> MetaOptimizer:
        said = {"a": decay, "cb": 0.0, "bc": 0.0}
        groups = [
            {"params": [(n, params[n]) for n in own], "weight_decay": said[own]} for own in names
        ]
        return made(groups, by_pattern())

    params = three()
    opt = both(params, ["a", "bc"])
    go(opt, 4)
    other = both(three(), ["cb", "a"])
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    found, want = other.hyperparameters(), opt.hyperparameters()
    assert sorted(found) == sorted(NAMES)
    for name in NAMES:
        assert_same(found[name], want[name])


@pytest.mark.parametrize(
    "other", [{"map": "identity"}, {"map": mo.Sigmoid(0.01, 1.0)}], ids=["identity", "sigmoid"]
)
def test_a_state_with_another_map_is_refused(other: dict[str, Any]) -> None:
    """What is learned is the logarithm with one, and the number with another."""
    opt = made(named(), base=mo.SGD(weight_decay=Learned(0.1)))
    go(opt, 2)
    base = mo.SGD(weight_decay=Learned(0.1, **other))
    with pytest.raises(ValueError, match=r"made with .*weight_decay"):
        made(named(), base=base).load_state_dict(opt.state_dict())
    same = made(named(), base=mo.SGD(weight_decay=Learned(0.2, map="exp", bounds=(0.01, 1.0))))
    same.load_state_dict(opt.state_dict())
    assert_same(same.hyperparameters(), opt.hyperparameters())


SAID = [
    ("betas", (0.5, 0.6), mo.AdamW(betas=(Learned(0.9), 0.99), eps=1e-3)),
    ("eps", 0.5, mo.AdamW(eps=Learned(1e-3))),
    ("momentum", 0.5, mo.Averaged(mo.SGD(momentum=Learned(0.9)))),
]


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("weight_decay", Learned(0.1), mo.SGD()),
        ("momentum", Learned(0.9), mo.Averaged(mo.SGD(momentum=0.5))),
        ("betas", (0.9, Learned(0.9)), mo.AdamW()),
        ("betas", [Learned(0.9), 0.9], mo.AdamW(weight_decay=Learned(0.1))),
    ],
)
def test_what_is_learned_is_said_in_the_rule(option: str, value: Any, rule: Any) -> None:
    w, b = named()
    message = f"`{option}` of parameters must be numbers; .* in the rule, as `base="
    with pytest.raises(ValueError, match=message):
        made([{"params": [w]}, {"params": [b], option: value}], rule)
    opt = made([{"params": [w]}], rule)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [b], option: value})
    assert len(opt.param_groups) == 1
    go(opt, 2)
    before, saved = w[1].detach().clone(), opt.param_groups[0][option]
    opt.param_groups[0][option] = value
    for call in (opt.step, lambda: go(opt, 1), opt.diagnostics):
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(w[1].detach(), before)
    opt.param_groups[0][option] = saved
    go(opt, 1)


def test_the_constructor_takes_no_learned_weight_decay() -> None:
    with pytest.raises(ValueError, match="`weight_decay` of parameters must be numbers"):
        made(named(), mo.SGD(), weight_decay=Learned(0.1))


@pytest.mark.parametrize(("option", "value", "base"), SAID, ids=[one[0] for one in SAID])
def test_a_group_cannot_say_what_is_learned(option: str, value: Any, base: Any) -> None:
    """It would have no effect; weight decay alone may be said."""
    w, b = named()
    message = f"`{option}` of a group .* `base` learns"
    with pytest.raises(ValueError, match=message):
        made([{"params": [w], option: value}, {"params": [b]}], base)
    opt = made([{"params": [w]}], base)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [b], option: value})
    go(opt, 2)
    before = w[1].detach().clone()
    opt.param_groups[0][option] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            go(opt, 1, 2)
    assert torch.equal(w[1].detach(), before)
    del opt.param_groups[0][option]
    go(opt, 1, 2)
    assert not torch.equal(w[1].detach(), before)


def test_a_group_says_it_of_rules_that_do_not_learn_it() -> None:
    w, b = named()
    base = {"w": mo.SGD(momentum=Learned(0.9)), "*": mo.SGD(momentum=0.9)}
    opt = made([{"params": [w]}, {"params": [b], "momentum": 0.5}], base)
    go(opt, 1)
    rules: Any = opt.config.plan(dict((w, b))).rules
    assert rules["b"].momentum == 0.5


def test_a_learned_weight_decay_of_no_parameter_is_told() -> None:
    """As a number is: groups that all say their own leave nothing to learn."""
    w, b = named()
    base = mo.AdamW(weight_decay=Learned(0.1, blocks={"all": "*"}))
    with pytest.warns(
        UserWarning, match=r"Learned\(start=0\.1.* of `base` is that of no parameter"
    ):
        made([{"params": [w, b], "weight_decay": 0.0}], base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made([{"params": [w]}, {"params": [b], "weight_decay": 0.0}], base)
        made([w, b], base)


def ruled(rule: str) -> Any:
    """Return a rule with numbers that are learned, one of these with a `meta_lr` of 0."""
    if rule == "AdamW":
        decay = Learned(0.1, blocks="tensor", meta_lr=1e-2)
        betas = (Learned(0.9), Learned(0.99, meta_lr=0.0))
        rest: dict[str, Any] = {"eps": Learned(1e-3), "decay_step_size": 0.02}
        return mo.AdamW(betas=betas, weight_decay=decay, **rest)
    if rule == "delayed":  # in blocks of which a parameter has one each
        momentum, decay = Learned(0.9, blocks="tensor"), Learned(0.1, blocks="scalar")
        return mo.SGD(momentum=momentum, weight_decay=decay, delayed=True)
    if rule == "SGD":
        return mo.SGD(momentum=Learned(0.9))
    return mo.Averaged(mo.Lion(weight_decay=Learned(0.1)))


OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"blocks": "tensor", "skip_nonfinite": True},
    "delayed": {"discount": 0.9, "meta_first": True, "blocks": "node"},
    "Lion": {"held_out": True},
    "SGD": {},
}


@pytest.mark.parametrize(
    ("rule", "compile"),
    [
        *((rule, False) for rule in OPTIONS),
        ("SGD", True),
        *(
            pytest.param(rule, True, marks=pytest.mark.slow)
            for rule in ("AdamW", "delayed", "Lion")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where it compiles
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_in_passes_it_is_the_cores_step(rule: str, compile: bool) -> None:
    """Of leaves that lie by themselves and in a bucket, at rest and without a gradient."""
    options: dict[str, Any] = {"base": ruled(rule), "step_size": 0.02} | OPTIONS[rule]
    sizes = {"large": (70_000,), "w": (4, 3), "b": (4,)}
    params = [
        (name, normal(*shape, seed=seed).float().requires_grad_())
        for seed, (name, shape) in enumerate(sizes.items())
    ]
    opt = MetaOptimizer(
        [{"params": params[:2]}, {"params": params[2:]}], compile=compile, **options
    )
    config = mo.MetaOptimize(**options)
    own: Any = {name: param.detach().clone() for name, param in params}
    state = config.init(own)
    for t in range(6):
        lr = dict.fromkeys(sizes, 1.0) | {"b": 0.0 if t == 3 else 0.5 ** (t // 2)}
        opt.param_groups[1]["lr"] = lr["b"]
        grads = {
            name: param + normal(*param.shape, seed=10 * t).float() for name, param in own.items()
        }
        if t == 1:
            grads["w"] = None
        if t == 2 and config.skip_nonfinite:
            grads["b"] = grads["b"] * torch.inf
        held = {name: normal(*p.shape, seed=99 + t).float() for name, p in own.items()}
        for name, param in params:
            param.grad = None if grads[name] is None else grads[name].clone()
        if config.held_out and t % 2 == 0:
            with opt.meta_gradients():
                for name, param in params:
                    param.backward(held[name])
        opt.step()
        meta_grads = held if config.held_out and t % 2 == 0 else None
        own, state = config.step(own, grads, state, lr=lr, meta_grads=meta_grads)
    tolerance = rounding("float32", 200, steps=6)
    for name, param in params:
        assert relative_error(param.detach().numpy(), own[name].numpy()) < tolerance
    found, want = opt.hyperparameters(), config.hyperparameters(state)
    assert [*found] == [*want]
    for key, values in want.items():
        for block, value in values.items():
            assert float(found[key][block]) == pytest.approx(float(value), rel=tolerance)
    for name, traces in state.learned.items():
        for leaf, trace in traces["trace"].items():
            mine = opt.core_state().learned[name]["trace"][leaf]
            assert relative_error(mine.numpy(), trace.numpy()) < tolerance


@pytest.mark.parametrize("blocks", ["scalar", "tensor", "node"])
def test_what_a_group_says_in_the_place_of_what_is_learned_may_be_taken_back(blocks: str) -> None:
    """Of one group, and of all of them, one after the other."""
    w, b = named()
    opt = made([{"params": [w]}, {"params": [b]}], blocks=blocks)
    first, second = opt.param_groups
    go(opt, 2)
    for said in ((0.0, None), (None, None), (0.0, 0.05), (None, 0.05), (None, None)):
        first["weight_decay"], second["weight_decay"] = said
        go(opt, 2)
        there = "weight_decay" in opt.hyperparameters()
        assert there == (None in said)
    assert [*opt.hyperparameters()["weight_decay"]] == ["w", "b"]


def test_a_number_has_a_name() -> None:
    with pytest.raises(ValueError, match="`name` of a Learned must not be empty"):
        Learned(0.1, name="")
