"""Layouts that change, packs that part, states that do not fit: the core's step, or an error."""

import copy
import random
import shutil
import sys
import types
from typing import Any, ClassVar

import pytest

torch = pytest.importorskip("torch")

from metaopt_torch import MetaOptimizer, buckets  # noqa: E402
from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402

import metaopt as mo  # noqa: E402
from tests.torch_states import assert_same  # noqa: E402

OPTIONS: dict[str, Any] = {
    "base": mo.AdamW(weight_decay=0.1),
    "meta": mo.AdamW(),
    "step_size": 1e-2,
    "meta_lr": 1e-2,
    "compile": False,
    "discount": 1.0,
}


def run_beside_the_core(params: Any, grads: Any, relayout: Any = None, **options: Any) -> None:
    """Step parameters with gradients by step, None for none, and compare with the core's step."""
    opt = MetaOptimizer(params, **(OPTIONS | options))
    config = opt.config
    twins = {str(i): param.detach().clone() for i, param in enumerate(params)}
    state = config.init(twins)
    for t, row in enumerate(grads):
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        opt.step()
        twins, state = config.step(
            twins, {str(i): grad for i, grad in enumerate(row)}, state, lr=1.0
        )
        if relayout is not None:
            relayout(t, params)
    for param, twin in zip(params, twins.values(), strict=True):
        torch.testing.assert_close(param.detach(), twin, rtol=1e-12, atol=1e-12)
    for name, size in config.step_sizes(state).items():
        torch.testing.assert_close(opt.step_sizes()[name], size, rtol=1e-12, atol=0.0)


def normal(*shape: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(params=[0, 2**16], ids=["direct", "packed"])
def small(request: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(buckets.SMALL, "cpu", request.param)


def freed(tensor: Any) -> Any:
    """Return a tensor whose storage holds less than its numbers."""
    tensor.untyped_storage().resize_(tensor.nbytes - 1)
    return tensor


#: What a tensor's `data` is replaced by, the error, and what it says.
REPLACED: dict[str, Any] = {
    "grown": (lambda data: torch.ones(2 * len(data)), ValueError, "must have the shape"),
    "shrunk": (lambda data: data[:-1].clone(), ValueError, "must have the shape"),
    "one number": (lambda data: data[:1].clone(), ValueError, "must have the shape"),
    "empty": (lambda data: data[:0].clone(), ValueError, "must have the shape"),
    "reshaped": (lambda data: data.reshape(2, -1).clone(), ValueError, "must have the shape"),
    "freed": (lambda data: freed(data.clone()), ValueError, "must lie in its storage"),
    "complex": (
        lambda data: data.to(torch.complex64),
        TypeError,
        "must be dense, real",
    ),
    "integers": (lambda data: data.to(torch.int32), TypeError, "must be dense, real"),
    "expanded": (lambda data: data[:1].expand(len(data)), ValueError, "is expanded"),
    "negated": (lambda data: torch._neg_view(data.clone()), ValueError, "is negated"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["compiled", "eager", "weight", "two passes"])
def test_no_step_reads_past_what_was_replaced(how: str) -> None:
    """The parameter is named, nothing moves, and once it is put back steps go on."""
    if how == "compiled" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    options = OPTIONS | {
        "compile": how == "compiled",
        "blocks": "weight" if how == "weight" else "tensor",
        "skip_nonfinite": how == "two passes",
    }

    def made() -> tuple[Any, list[Any]]:
        params = [torch.ones(n, requires_grad=True) for n in (2**16, 2**16, 10, 10)]
        for param in params:
            param.grad = torch.ones_like(param)
        opt = MetaOptimizer([(f"layer.{i}", p) for i, p in enumerate(params)], **options)
        opt.step()
        return opt, params

    def held(opt: Any, params: list[Any]) -> list[Any]:
        own = [value for param in params for value in opt.state[param].values()]
        shared = [value for value in opt.param_groups[0].values() if torch.is_tensor(value)]
        return [value.detach().clone() for value in (*params, *own, *shared)]

    opt, params = made()
    before = held(opt, params)
    alone, packed = params[1], params[3]
    for name, (change, error, message) in REPLACED.items():
        tensors = {"layer.1": [alone, alone.grad], "layer.3": [packed, packed.grad]}
        for which, own in tensors.items():
            # gradients may lie as they like; integers torch keeps from parameters itself
            for tensor in {"expanded": own[:1], "negated": own[:1], "integers": own[1:]}.get(
                name, own
            ):
                data = tensor.data
                tensor.data = change(data)
                named = rf"`params\['{which}'\]` {message}|parameter '{which}' must be a tensor of"
                with pytest.raises(error, match=named):
                    opt.step()
                tensor.data = data
    assert all(torch.equal(a, b) for a, b in zip(held(opt, params), before, strict=True))
    opt.step()
    other, twins = made()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


#: Layers of two tensors each, and which of them rest in a step.
PATTERNS: dict[str, Any] = {
    "every other step": lambda layer, t: layer % 2 == t % 2 == 1,
    "in turns": lambda layer, t: layer % 3 != t % 3,
    "at random": lambda layer, t: random.Random(f"{layer} {t}").random() < 0.5,
}


@pytest.mark.parametrize("blocks", ["scalar", "tensor"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_leaves_that_rest_and_come_back_are_packed_once(
    pattern: str, blocks: str, monkeypatch: Any
) -> None:
    """Not anew in every step in which others have a gradient, to the core's numbers."""
    layers, steps, made = 6, 30, []
    plain = buckets.Bucket.__init__

    def counting(self: Any, leaves: Any) -> None:
        made.append(len(leaves))
        plain(self, leaves)

    monkeypatch.setattr(buckets.Bucket, "__init__", counting)
    numbers = []
    rests = PATTERNS[pattern]
    grads = [
        [
            None if rests(index // 2, t) else normal(3, 5, seed=100 * t + index)
            for index in range(2 * layers)
        ]
        for t in range(steps)
    ]
    params = [normal(3, 5, seed=index).requires_grad_() for index in range(2 * layers)]
    run_beside_the_core(
        params, grads, lambda *_: numbers.append(len(made)), blocks=blocks, meta_lr=1e-4
    )
    assert numbers[-1] == numbers[steps // 2]
    assert numbers[-1] < 2 * layers  # a pack is split at most once for every layer
    assert min(made) >= 2  # and no layer is


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("blocks", ["scalar", "node", "weight"])
@pytest.mark.parametrize(
    "layout",
    {
        "columns": lambda: normal(8, 8)[:, :4],
        "every other": lambda: normal(8, 8)[:, ::2],
        "transposed": lambda: normal(4, 8).T,
        "a row that is expanded to itself": lambda: normal(6).as_strided((1, 6), (0, 1)),
        "with gaps": lambda: normal(100).as_strided((2, 3, 2, 2), (4, 8, 2, 1)),
    }.items(),
    ids=lambda entry: entry[0],
)
def test_parameters_lie_in_memory_as_they_like(layout: Any, blocks: str) -> None:
    param = layout[1]().requires_grad_()
    grads = [[normal(*param.shape, seed=t)] for t in range(3)]
    run_beside_the_core([param], grads, blocks=blocks)


class Whole(mo.SGD):
    """A rule that has to see leaves whole."""

    scope: ClassVar[str] = "leaf"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("base", [mo.SGD(), Whole()], ids=["weight", "leaf"])
def test_no_pass_is_handed_a_gradient_that_is_negated_by_a_bit(base: Any, monkeypatch: Any) -> None:
    """A compiled one reads the memory itself."""
    found: list[Any] = []
    plain = buckets.Bucket.buffers

    def looked_at(self: Any, grads: Any) -> Any:
        found.append(plain(self, grads))
        return found[-1]

    monkeypatch.setattr(buckets.Bucket, "buffers", looked_at)
    param = normal(4).requires_grad_()
    want = param.detach() + 1e-2 * torch.ones(4)
    opt = MetaOptimizer([param], **(OPTIONS | {"base": base, "meta": mo.Lion(), "discount": 1.0}))
    param.grad = torch._neg_view(torch.ones(4, dtype=torch.float64))
    opt.step()
    torch.testing.assert_close(param.detach(), want, rtol=1e-6, atol=0.0)
    assert found
    assert not any(grad.is_neg() for _, grad in found)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("blocks", ["scalar", "node"])
def test_memory_may_be_laid_out_anew_between_steps(blocks: str) -> None:
    param = normal(3, 4, 5, 6).requires_grad_()

    def relayout(t: int, params: Any) -> None:
        formats = (torch.channels_last, torch.contiguous_format)
        params[0].data = params[0].data.to(memory_format=formats[t % 2])

    grads = [[normal(3, 4, 5, 6, seed=t)] for t in range(4)]
    run_beside_the_core([param], grads, relayout, blocks=blocks)


@pytest.mark.parametrize("meta_first", [False, True])
def test_refused_steps_part_leaves_whose_counts_part(meta_first: bool) -> None:
    """One leaf took part in the step that was refused, the other did not."""
    inf = torch.full((3,), float("inf"), dtype=torch.float64)
    one, two = normal(3, seed=1), normal(3, seed=2)
    rows = [[inf, None], [None, one], [one, two], [two, one], [one, one]]
    params = [normal(3, seed=3).requires_grad_() for _ in range(2)]
    run_beside_the_core(params, rows, skip_nonfinite=True, meta_first=meta_first)


@pytest.mark.parametrize("meta_first", [False, True])
def test_step_sizes_that_are_what_is_learned_are_those_before_the_step(meta_first: bool) -> None:
    grads = [[normal(5, seed=t)] for t in range(5)]
    run_beside_the_core(
        [normal(5, seed=9).requires_grad_()],
        grads,
        sigma="identity",
        skip_nonfinite=True,
        meta_first=meta_first,
    )


def test_step_sizes_are_the_callers_own() -> None:
    param = torch.ones(3, requires_grad=True)
    opt = MetaOptimizer([param], **(OPTIONS | {"sigma": "identity"}))
    size = opt.step_sizes()["all"]
    before = float(size)
    for _ in range(3):
        param.grad = torch.ones(3)
        opt.step()
    assert float(size) == before
    assert float(opt.step_sizes()["all"]) != before


def test_a_tensor_with_a_gradient_moves_whether_it_requires_one_or_not() -> None:
    params = [torch.ones(3), torch.ones(3, requires_grad=True)]
    opt = MetaOptimizer(params, **OPTIONS)
    for param in params:
        param.grad = torch.ones(3)
    opt.step()
    assert torch.equal(params[0], params[1].detach())
    assert float(params[0][0]) < 1.0


def test_gradients_may_be_wider_than_their_parameters() -> None:
    """Gradients beyond the range of float16, packed and alone."""
    moved = []
    for number in (1, 2):
        params = [torch.ones(3, dtype=torch.float16, requires_grad=True) for _ in range(number)]
        opt = MetaOptimizer(params, **(OPTIONS | {"skip_nonfinite": True}))
        for param in params:
            param.grad_dtype = None
            param.grad = torch.full((3,), 1e5)
        opt.step()
        assert int(opt.diagnostics()["skipped"]) == 0
        moved.append(params[0].detach())
    assert torch.equal(moved[0], moved[1])
    assert float(moved[0][0]) < 1.0


def test_parameters_that_become_narrow_are_compensated_from_then_on() -> None:
    net = torch.nn.Linear(4, 2)
    opt = MetaOptimizer(net.parameters(), **(OPTIONS | {"rounding": "kahan"}))
    net.bfloat16()
    net.weight.grad = torch.ones_like(net.weight)
    opt.step()
    assert opt.state[net.weight]["compensation"].dtype == torch.bfloat16


def test_what_has_overflowed_is_not_compensated() -> None:
    param = torch.full((2,), 6e4, dtype=torch.float16, requires_grad=True)
    options = OPTIONS | {"rounding": "kahan", "step_size": 1e5, "base": mo.SGD(), "maximize": True}
    opt = MetaOptimizer([param], **options)
    for _ in range(2):
        param.grad = torch.ones(2, dtype=torch.float16)
        opt.step()
    assert torch.all(torch.isinf(param.detach()))


# --- states


def trained(steps: int = 3, **options: Any) -> tuple[Any, MetaOptimizer]:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 2)
    opt = MetaOptimizer(net.parameters(), **(OPTIONS | options))
    for t in range(steps):
        for param in net.parameters():
            param.grad = normal(*param.shape, seed=t).float()
        opt.step()
    return net, opt


def frozen(opt: MetaOptimizer) -> Any:
    return copy.deepcopy(opt.state_dict())


def remapped(state: Any) -> Any:
    """Return a state whose parameters have been numbered the other way round."""
    other = copy.deepcopy(state)
    other["param_groups"][0]["params"] = [1, 0]
    return other


def test_a_hook_may_put_another_state_in_the_place_of_the_one_given() -> None:
    _, opt = trained()
    found = frozen(opt)
    _, other = trained(0)
    other.register_load_state_dict_pre_hook(
        lambda _, state: (
            {"state": {i: state["state"][1 - i] for i in (0, 1)}}
            | {"param_groups": remapped(state)["param_groups"]}
        )
    )
    other.load_state_dict(found)
    assert_same(frozen(other)["state"], found["state"])


def test_a_count_may_be_a_number() -> None:
    _, opt = trained()
    found = frozen(opt)
    for entry in found["state"].values():
        entry["step"] = int(entry["step"])
    _, other = trained(0)
    other.load_state_dict(found)
    assert_same(frozen(other), frozen(opt))


CHANGES: dict[str, Any] = {
    "bounds": lambda state: state["param_groups"][0].update(bounds=(1.0, 0.0)),
    "lr": lambda state: state["param_groups"][0].update(lr=-5.0),
    "beta": lambda state: state["param_groups"][0].update(beta=[1.0]),
    "a list": lambda state: state["state"][1].update(exp_avg=[1.0, 2.0]),
    "another slot": lambda state: state["state"][1].update(momentum=torch.zeros(2)),
    "other rules": lambda state: state["param_groups"][0].update(made_with="SGD, Lion, exp"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_does_not_fit_changes_nothing(change: str) -> None:
    _, opt = trained()
    state = frozen(opt)
    CHANGES[change](state)
    net, other = trained(1)
    before = frozen(other)
    with pytest.raises((ValueError, TypeError)):
        other.load_state_dict(state)
    assert_same(frozen(other), before)
    twin, twin_opt = trained(1)
    for some, some_opt in ((net, other), (twin, twin_opt)):
        for param in some.parameters():
            param.grad = torch.ones_like(param)
        some_opt.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [{"base": mo.SGD(momentum=0.9)}, {"meta": mo.Lion()}, {"sigma": "softplus"}],
    ids=["base", "meta", "sigma"],
)
def test_a_state_of_another_method_is_refused(options: Any) -> None:
    _, opt = trained(**options)
    _, other = trained()
    with pytest.raises(ValueError, match=r"was made with .* expected AdamW, AdamW, exp"):
        other.load_state_dict(opt.state_dict())


def test_a_fast_start_of_another_rule_is_another_method() -> None:
    _, opt = trained(meta=mo.FastStart(mo.Lion()))
    _, other = trained(meta=mo.FastStart(mo.SGD(momentum=0.9)))
    with pytest.raises(ValueError, match=r"FastStart of Lion.* expected AdamW, FastStart of SGD"):
        other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize(("of", "into"), [("float32", "float64"), ("float64", "float32")])
def test_a_state_takes_the_dtype_that_goes_with_the_parameters(
    of: str, into: str, moves: bool
) -> None:
    nets = [torch.nn.Linear(4, 2, dtype=getattr(torch, dtype)) for dtype in (of, into)]
    opts = [MetaOptimizer(net.parameters(), **OPTIONS) for net in nets]
    nets[1].requires_grad_(moves)
    opts[1].load_state_dict(opts[0].state_dict())
    for param in nets[1].parameters():
        assert opts[1].state[param]["average"].dtype == getattr(torch, into)
        param.grad = torch.ones_like(param)
    opts[1].step()
    assert opts[1].step_sizes()["all"].dtype == getattr(torch, into)


# --- what is refused


REFUSED: dict[str, Any] = {
    "is expanded": lambda _: [torch.ones(1).expand(3)],
    "is negated by a bit alone": lambda _: [torch._neg_view(torch.ones(3))],
    "`maximize` must be True or False": lambda p: [{"params": [p], "maximize": "no"}],
    r"`params\['0'\]` is a TwoTensor, which keeps": lambda p: [TwoTensor(p.data, p.data)],
    r"`params\['0'\]` is partitioned by DeepSpeed's ZeRO": lambda p: [marked(p, "ds_id")],
    "FullyShardedDataParallel .* Pass `process_group=`": lambda p: [marked(p, "_fsdp_flattened")],
    "`lr` must be a finite number and at least 0": lambda p: [
        {"params": [p], "lr": torch.tensor(-1.0)}
    ],
}


def test_parts_that_deepspeed_puts_in_place_of_parameters_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They bear no mark; it is DeepSpeed's optimizer that asks for the first step with them."""

    class ZeROOptimizer:
        def __init__(self, opt: Any) -> None:
            opt.param_groups[0]["params"] = [torch.ones(3, requires_grad=True)]
            opt.step()

    module = types.ModuleType("deepspeed.runtime.base_optimizer")
    module.__dict__["ZeROOptimizer"] = ZeROOptimizer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    opt = MetaOptimizer([torch.ones(6, requires_grad=True)], **OPTIONS)
    with pytest.raises(ValueError, match=r"DeepSpeed's ZeRO has put parts .* `process_group=`"):
        ZeROOptimizer(opt)


def marked(param: Any, attribute: str) -> Any:
    """Return a parameter with the mark of someone who cuts parameters into parts."""
    setattr(param, attribute, 1)
    return param


@pytest.mark.parametrize("message", REFUSED)
def test_parameters_and_groups_that_are_refused(message: str) -> None:
    given = REFUSED[message](torch.ones(3, requires_grad=True))
    with pytest.raises((ValueError, TypeError), match=message):
        MetaOptimizer(given, **OPTIONS)


def test_float16_is_not_rounded_stochastically_in_a_group_that_comes_late_either() -> None:
    param = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    opt = MetaOptimizer([param], **(OPTIONS | {"rounding": "stochastic"}))
    late = torch.ones(3, dtype=torch.float16, requires_grad=True)
    with pytest.raises(ValueError, match=r"'1' is torch\.float16"):
        opt.add_param_group({"params": [late]})
    assert len(opt.param_groups) == 1


def test_eight_bits_are_not_rounded_stochastically() -> None:
    param = torch.ones(3).to(torch.float8_e4m3fn).requires_grad_()
    with pytest.raises(ValueError, match=r"is for bfloat16; '0' is torch\.float8_e4m3fn"):
        MetaOptimizer([param], **(OPTIONS | {"rounding": "stochastic"}))


@pytest.mark.parametrize("curvature", ["none", "diagonal"])
def test_a_multiplier_too_small_for_float32_is_zero(curvature: str) -> None:
    param = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    opt = MetaOptimizer([param], **(OPTIONS | {"curvature": curvature, "meta_lr": 0.1}))
    for lr in (1.0, 1e-40, 1e-40):
        opt.param_groups[0]["lr"] = lr
        param.grad = param.detach().clone()
        diagonal = {"0": torch.ones(3)} if curvature == "diagonal" else None
        opt.step(hessian_diagonal=diagonal)
    assert opt.core_state().meta_count.tolist() == [1]


def test_a_group_without_parameters_is_no_matter() -> None:
    param = torch.ones(3, requires_grad=True)
    opt = MetaOptimizer([{"params": []}, {"params": [param]}, {"params": []}], **OPTIONS)
    param.grad = torch.ones(3)
    opt.step()
    again = MetaOptimizer([{"params": []}, {"params": [param]}, {"params": []}], **OPTIONS)
    again.load_state_dict(opt.state_dict())
    assert_same(frozen(again), frozen(opt))


def test_a_parameter_twice_in_a_group_is_stepped_once_with_torchs_warning() -> None:
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    with pytest.warns(UserWarning, match="contains a parameter group with duplicate parameters"):
        twice = MetaOptimizer([("a", params[0]), ("b", params[0])], **OPTIONS)
    once = MetaOptimizer([("a", params[1])], **OPTIONS)
    for param, opt in zip(params, (twice, once), strict=True):
        param.grad = torch.ones(3)
        opt.step()
    assert torch.equal(params[0], params[1])
    assert_same(frozen(twice), frozen(once))


def test_groups_may_be_empty_until_a_parameter_comes() -> None:
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    late = MetaOptimizer([{"params": [], "lr": 0.5}, {"params": []}], **OPTIONS)
    assert late.step(lambda: torch.tensor(2.0)) == 2.0
    assert late.step_sizes() == {}
    with pytest.raises(ValueError, match="`params` holds no parameter yet, in 2 groups"):
        late.core_state()
    late.load_state_dict(copy.deepcopy(late).state_dict())
    assert late.param_groups[0]["lr"] == 0.5
    late.add_param_group({"params": [params[0]]})
    once = MetaOptimizer([params[1]], **OPTIONS)
    for param, opt in zip(params, (late, once), strict=True):
        param.grad = torch.ones(3)
        opt.step()
    assert torch.equal(params[0], params[1])
    assert_same(late.step_sizes(), once.step_sizes())


def test_bad_options_are_told_before_bad_parameters() -> None:
    """As torch does it."""
    with pytest.raises(ValueError, match="`lr` must be a finite number and at least 0"):
        MetaOptimizer(None, lr=-1.0, **OPTIONS)


def test_numbers_of_numpy_are_numbers() -> None:
    import numpy as np

    param = torch.ones(3, requires_grad=True)
    opt = MetaOptimizer([param], **(OPTIONS | {"lr": np.float32(0.5)}))
    param.grad = torch.ones(3)
    opt.step()
    assert float(param.detach()[0]) < 1.0
