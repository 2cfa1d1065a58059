"""What is done to `param_groups`, `state` and parameters between steps is seen at the next one."""

import copy
import shutil
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from metaopt_conformance.tolerances import relative_error  # noqa: E402
from metaopt_torch import MetaOptimizer, buckets  # noqa: E402

import metaopt as mo  # noqa: E402
from tests.torch_states import assert_same  # noqa: E402

OPTIONS: dict[str, Any] = {
    "base": mo.AdamW(weight_decay=0.1),
    "meta": mo.AdamW(),
    "step_size": 1e-2,
    "meta_lr": 1e-2,
    "discount": 1.0,
}
BLOCKS = ["scalar", "tensor", "node", "weight"]
every_partition = pytest.mark.parametrize("blocks", BLOCKS)


@pytest.fixture(params=[0, 2**16], ids=["direct", "packed"])
def small(request: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(buckets.SMALL, "cpu", request.param)


def normal(*shape: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def parameter(*shape: int, seed: int = 0) -> Any:
    return normal(*shape, seed=seed).requires_grad_()


class Twin:
    """The core's step of the same parameters, whose state is put together by hand."""

    def __init__(self, params: list[Any], **options: Any) -> None:
        self.options = OPTIONS | options
        self.params = _named(params)
        self.config = mo.MetaOptimize(**self.options)
        self.state = self.config.init(self.params)

    def step(self, grads: list[Any]) -> None:
        named = dict(zip(self.params, grads, strict=True))
        self.params, self.state = self.config.step(self.params, named, self.state)

    def become(
        self, params: list[Any], was: Mapping[str, str], kept: Mapping[str, Callable[[Any], Any]]
    ) -> None:
        """Go on with other parameters.

        `was` says which of before a parameter continues, as far as its block is concerned, `kept`
        what becomes of the arrays of its own state; without, that starts afresh.
        """
        old, blocks = self.state, self.config.plan(self.params).blocks
        values = {n: p if n not in was else self.params[was[n]] for n, p in _named(params).items()}
        self.params = {
            name: kept[name](values[name]) if name in kept else p
            for (name, p) in _named(params).items()
        }
        self.config = mo.MetaOptimize(**self.options)
        new, plan = self.config.init(self.params), self.config.plan(self.params)
        fields: dict[str, Any] = {"step": old.step, "skipped": old.skipped}
        for field in ("count", "average", "slots"):
            mapping = dict(getattr(new, field))
            for name, change in kept.items():
                part = getattr(old, field)[was[name]]
                if isinstance(part, Mapping):
                    mapping[name] = OrderedDict((slot, change(a)) for slot, a in part.items())
                else:
                    mapping[name] = part if field == "count" else change(part)
            fields[field] = type(getattr(new, field))(mapping)
        if plan.blocks.partition.per_leaf:
            for field in ("beta", "meta_count", "meta_grad"):
                fields[field] = _leaves(getattr(new, field), getattr(old, field), was, kept)
            fields["meta_slots"] = type(new.meta_slots)(
                (slot, _leaves(part, old.meta_slots[slot], was, kept))
                for slot, part in new.meta_slots.items()
            )
        families = list(blocks.families)
        vectors: dict[str, Any] = {"restarts": new.restarts.clone()}
        if not plan.blocks.partition.per_leaf:
            for field in ("beta", "meta_count", "meta_grad"):
                vectors[field] = getattr(new, field).clone()
            vectors |= {slot: part.clone() for slot, part in new.meta_slots.items()}
        for number, (key, family) in enumerate(plan.blocks.families.items()):
            source = key if key == "all" else was.get(key)
            if source is None:
                continue
            before = blocks.families[source]
            if before.size != family.size and not plan.blocks.partition.per_leaf:
                continue
            for field, vector in vectors.items():
                held = old.meta_slots[field] if field in old.meta_slots else getattr(old, field)
                if plan.blocks.partition.per_leaf:
                    vector[number] = held[families.index(source)]
                else:
                    vector[family.start : family.start + family.size] = held[
                        before.start : before.start + before.size
                    ]
        slots = {slot: vectors.pop(slot) for slot in new.meta_slots if slot in vectors}
        if slots:
            fields["meta_slots"] = type(new.meta_slots)(slots)
        self.state = replace(new, **fields, **vectors)


def _leaves(new: Any, old: Any, was: Any, kept: Any) -> Any:
    return type(new)(
        (name, kept[name](old[was[name]]) if name in kept else part) for name, part in new.items()
    )


def _named(params: list[Any]) -> dict[str, Any]:
    return {str(i): param.detach().clone() for i, param in enumerate(params)}


def stepped(opt: Any, twin: Twin | None, times: range) -> None:
    """Step both with the same gradients, of the parameters that the optimizer has now."""
    for t in times:
        params = [param for group in opt.param_groups for param in group["params"]]
        grads = [normal(*param.shape, seed=100 * t + i) for i, param in enumerate(params)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        opt.step()
        if twin is not None:
            twin.step(grads)


def agree(opt: Any, twin: Twin) -> None:
    params = [param for group in opt.param_groups for param in group["params"]]
    for param, want in zip(params, twin.params.values(), strict=True):
        assert relative_error(param.detach().numpy(), want.numpy()) < 1e-12
    sizes = twin.config.step_sizes(twin.state)
    assert list(opt.step_sizes()) == list(sizes)
    for name, size in sizes.items():
        assert relative_error(opt.step_sizes()[name].numpy(), size.numpy()) < 1e-12, name
    assert {str(i): int(opt.state[p]["step"]) for i, p in enumerate(params)} == {
        name: int(count) for name, count in twin.state.count.items()
    }


def same(array: Any) -> Any:
    return array


# --- parameters


def _replace_one(opt: Any) -> Any:
    opt.param_groups[0]["params"][0] = parameter(3, 2, seed=9)
    return {"0": "0", "1": "1", "2": "2"}, {"1": same, "2": same}


def _replace_all(opt: Any) -> Any:
    group = opt.param_groups[0]
    group["params"] = [parameter(*p.shape, seed=9 + i) for i, p in enumerate(group["params"])]
    return {"0": "0", "1": "1", "2": "2"}, {}


def _append(opt: Any) -> Any:
    opt.param_groups[0]["params"].append(parameter(4, 2, seed=9))
    return {"0": "0", "1": "1", "2": "2"}, {"0": same, "1": same, "2": same}


def _insert(opt: Any) -> Any:
    opt.param_groups[0]["params"].insert(0, parameter(4, 2, seed=9))
    return {"1": "0", "2": "1", "3": "2"}, {"1": same, "2": same, "3": same}


def _remove(opt: Any) -> Any:
    opt.param_groups[0]["params"].pop(0)
    return {"0": "1", "1": "2"}, {"0": same, "1": same}


def _move_state(opt: Any) -> Any:
    """As a script does that prunes points: parameter and state lose rows."""
    group, rows = opt.param_groups[0], torch.tensor([2, 0])
    old = group["params"][0]
    new = old.detach()[rows].clone().requires_grad_()
    entry = opt.state.pop(old)
    opt.state[new] = {key: v if key == "step" else v[rows] for key, v in entry.items()}
    group["params"][0] = new
    return {"0": "0", "1": "1", "2": "2"}, {"0": lambda a: a[rows], "1": same, "2": same}


def _extend(opt: Any) -> Any:
    """As a script does that splits points: copies of two rows, with the state of these."""
    group, rows = opt.param_groups[0], torch.tensor([0, 1, 2, 0, 1])
    old = group["params"][0]
    new = torch.cat([old.detach(), old.detach()[:2]]).requires_grad_()
    entry = opt.state[old]
    del opt.state[old]
    for key, value in entry.items():
        if key != "step":
            entry[key] = torch.cat([value, value[:2]])
    opt.state[new] = entry
    group["params"] = [new, *group["params"][1:]]
    return {"0": "0", "1": "1", "2": "2"}, {"0": lambda a: a[rows], "1": same, "2": same}


def _in_place(opt: Any) -> Any:
    """The parameter stays the same object, its numbers and state are others."""
    param, rows = opt.param_groups[0]["params"][0], torch.tensor([2, 0])
    param.data, param.grad = param.data[rows].clone(), None
    for key, value in opt.state[param].items():
        if key != "step":
            opt.state[param][key] = value[rows]
    return {"0": "0", "1": "1", "2": "2"}, {"0": lambda a: a[rows], "1": same, "2": same}


ROWS = (_move_state, _extend, _in_place)
EDITS = [_replace_one, _replace_all, _append, _insert, _remove, _move_state, _extend, _in_place]


@pytest.mark.usefixtures("small")
@every_partition
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_parameters_come_go_and_are_replaced(edit: Any, blocks: str) -> None:
    params = [parameter(3, 2, seed=1), parameter(5, seed=2), parameter(2, 2, seed=3)]
    opt = MetaOptimizer(params, compile=False, blocks=blocks, **OPTIONS)
    twin = Twin(params, blocks=blocks)
    stepped(opt, twin, range(4))
    was, kept = edit(opt)
    now = [param for group in opt.param_groups for param in group["params"]]
    twin.become(now, was, kept)
    stepped(opt, twin, range(4, 8))
    agree(opt, twin)
    gone = [param.detach().clone() for param in params]
    stepped(opt, None, range(8, 9))
    here = {id(param) for param in now}
    for param, before in zip(params, gone, strict=True):
        assert id(param) in here or torch.equal(param.detach(), before)
    opt.state_dict()


@every_partition
def test_rows_whose_state_is_filled_with_zeros_are_new(blocks: str) -> None:
    """As a script does that adds points, and knows of no state that starts elsewhere."""
    nets = [[parameter(3, 2, seed=1), parameter(2, seed=2)] for _ in "ab"]
    opts = [MetaOptimizer(params, compile=False, blocks=blocks, **OPTIONS) for params in nets]
    rows = normal(2, 2, seed=3)
    for opt, knows in zip(opts, (False, True), strict=True):
        stepped(opt, None, range(4))
        group = opt.param_groups[0]
        entry = opt.state.pop(group["params"][0])
        group["params"][0] = torch.cat([group["params"][0].detach(), rows]).requires_grad_()
        for key, value in entry.items():
            more = torch.zeros_like(rows)
            if knows and key == "average":
                more = rows
            if knows and key == "beta":
                more = torch.full_like(rows, OPTIONS["step_size"]).log()
            entry[key] = value if key == "step" else torch.cat([value, more])
        opt.state[group["params"][0]] = entry
        stepped(opt, None, range(4, 8))
    for a, b in zip(*(opt.param_groups[0]["params"] for opt in opts), strict=True):
        assert relative_error(a.detach().numpy(), b.detach().numpy()) < 1e-12
    for name, size in opts[1].step_sizes().items():
        assert relative_error(opts[0].step_sizes()[name].numpy(), size.numpy()) < 1e-12


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("blocks", "small"), [("tensor", 0), ("node", 2**16)])
def test_compiled_steps_follow_edits_as_eager_ones_do(
    blocks: str, small: int, monkeypatch: Any
) -> None:
    monkeypatch.setitem(buckets.SMALL, "cpu", small)
    nets = [[parameter(3, 2, seed=1), parameter(5, seed=2), parameter(2, 2, seed=3)] for _ in "ab"]
    opts = [
        MetaOptimizer(params, compile=flag, blocks=blocks, **OPTIONS)
        for params, flag in zip(nets, (True, False), strict=True)
    ]
    edits: list[Any] = [*EDITS, _clear, lambda opt: opt.param_groups[0]["beta"].sub_(0.5)]
    for t, edit in enumerate(edits):
        for opt in opts:
            if opt.param_groups[0]["params"][0].shape == (3, 2) or edit not in ROWS:
                edit(opt)
            stepped(opt, None, range(2 * t, 2 * t + 2))
    for a, b in zip(*(opt.param_groups[0]["params"] for opt in opts), strict=True):
        assert relative_error(a.detach().numpy(), b.detach().numpy()) < 1e-11
    for name, size in opts[1].step_sizes().items():
        assert relative_error(opts[0].step_sizes()[name].numpy(), size.numpy()) < 1e-11


@pytest.mark.parametrize("approximation", ["l", "2x2"])
def test_columns_of_dense_traces_go_with_their_blocks(approximation: str) -> None:
    """Without the parameter that has left, whose block was the first, as if it rested for ever."""
    options: dict[str, Any] = {"curvature": "exact", "blocks": "tensor"}
    options["approximation"] = approximation
    nets = [[parameter(2, seed=1), parameter(3, seed=2), parameter(3, seed=3)] for _ in "ab"]
    opts = [MetaOptimizer(params, **options, **OPTIONS) for params in nets]
    for t in range(8):
        if t == 4:
            opts[0].param_groups[0]["params"] = nets[0][:0:-1]
        for (first, *rest), opt in zip(nets, opts, strict=True):
            opt.zero_grad()
            loss = ((rest[0] * rest[1]).sum() - 1.0).square() + rest[0].pow(4).sum()
            opt.backward(loss + first.square().sum() * rest[1].sum() if t < 4 else loss)
            opt.step()
    for a, b in zip(*nets, strict=True):
        assert relative_error(a.detach().numpy(), b.detach().numpy()) < 1e-12
    sizes = [list(opt.step_sizes().values()) for opt in opts]
    assert (
        relative_error(torch.stack(sizes[0][::-1]).numpy(), torch.stack(sizes[1][1:]).numpy())
        < 1e-12
    )


@pytest.mark.parametrize("blocks", ["scalar", "tensor"])
def test_groups_come_and_go(blocks: str) -> None:
    """The step size that is shared stays, whichever group it was kept in."""
    params = [parameter(3, 2, seed=1), parameter(5, seed=2), parameter(2, 2, seed=3)]
    opt = MetaOptimizer(
        [{"params": params[:1]}, {"params": params[1:]}], compile=False, blocks=blocks, **OPTIONS
    )
    twin = Twin(params, blocks=blocks)
    stepped(opt, twin, range(4))
    del opt.param_groups[0]
    twin.become(params[1:], {"0": "1", "1": "2"}, {"0": same, "1": same})
    stepped(opt, twin, range(4, 7))
    agree(opt, twin)
    late = parameter(4, seed=4)
    opt.param_groups.append({"params": [late]})
    now = [*params[1:], late]
    twin.become(now, {"0": "0", "1": "1"}, {"0": same, "1": same})
    stepped(opt, twin, range(7, 10))
    agree(opt, twin)
    opt.param_groups = opt.param_groups[::-1]
    twin.become([late, *params[1:]], {"0": "2", "1": "0", "2": "1"}, dict.fromkeys("012", same))
    stepped(opt, twin, range(10, 13))
    agree(opt, twin)


def test_a_parameter_that_comes_back_has_its_state() -> None:
    """As it rests without a gradient: the state of what leaves is kept, as torch keeps it."""
    params = [[parameter(3, seed=i) for i in range(2)] for _ in range(2)]
    opts = [MetaOptimizer(some, compile=False, **OPTIONS) for some in params]
    for t in range(9):
        away = 3 <= t < 6
        opts[0].param_groups[0]["params"] = params[0][: 1 if away else 2]
        for some, opt in zip(params, opts, strict=True):
            for i, param in enumerate(some):
                param.grad = None if away and i == 1 else normal(3, seed=10 * t + i)
            opt.step()
            assert len(opt.state_dict()["state"]) == len(opt.param_groups[0]["params"])
    for a, b in zip(*params, strict=True):
        assert torch.equal(a, b)


def test_names_go_with_their_parameters() -> None:
    def fresh(name: str) -> tuple[str, Any]:
        return name, parameter(3, seed=len(name))

    opt = MetaOptimizer(
        map(fresh, ["head", "neck", "body.all"]), compile=False, blocks="tensor", **OPTIONS
    )
    group, steps = opt.param_groups[0], iter(range(100))

    def sizes() -> list[str]:
        stepped(opt, None, range(t := next(steps), t + 1))
        assert group["param_names"] == list(opt.step_sizes())
        return list(opt.step_sizes())

    group["params"][0] = parameter(4)
    assert sizes() == ["head", "neck", "body.all"]
    group["params"].pop(0)
    assert sizes() == ["neck", "body.all"]
    group["params"].append(parameter(4))
    assert sizes() == ["neck", "body.all", "2"]
    group["params"].append(parameter(4))
    group["param_names"] = ["neck", "body.all", "tail", "tip"]
    assert sizes() == ["neck", "body.all", "tail", "tip"]
    for names in (["neck"], [*group["param_names"], "one too many"]):
        group["param_names"] = names
        before = frozen(opt, look=False)
        with pytest.raises(ValueError, match=rf"has {len(names)} entries for 4 parameters"):
            opt.step()
        assert_same(frozen(opt, look=False), before)


def test_patterns_go_with_their_parameters() -> None:
    """A group that is popped takes the patterns of its names along."""
    parts = {name: torch.nn.Linear(3, 1).double() for name in ("head", "body")}
    opt = MetaOptimizer(
        [{"params": [*part.named_parameters(name)]} for name, part in parts.items()],
        base={"head.*": mo.Lion(), "*.bias": mo.SGD(), "*": mo.AdamW()},
        meta=mo.AdamW(),
        blocks={"head": "head.*", "body": ("*.weight", "*.bias")},
        step_size={"head": 1e-2, "body": 1e-3},
        bounds={"head": (1e-4, 1.0)},
        compile=False,
        discount=1.0,
    )
    stepped(opt, None, range(3))
    kept = opt.step_sizes()["body"]
    opt.param_groups.pop(0)
    assert opt.step_sizes() == {"body": kept}
    stepped(opt, None, range(3, 5))
    twin = copy.deepcopy(opt)
    assert twin.step_sizes() == opt.step_sizes()
    twin.load_state_dict(opt.state_dict())


def test_a_new_name_is_none_that_another_group_has_been_given() -> None:
    groups = [{"params": [(name, parameter(3))]} for name in "ab"]
    opt = MetaOptimizer(groups, compile=False, **OPTIONS)
    stepped(opt, None, range(1))
    first, other = opt.param_groups
    first["params"].append(parameter(3, seed=1))
    first["param_names"] = ["a", "2"]
    other["params"].append(parameter(3, seed=2))
    stepped(opt, None, range(1, 2))
    assert other["param_names"] == ["b", "3"]


def test_all_patterns_may_leave() -> None:
    """Blocks are then those of groups; a base has to be there for every parameter."""
    opt = MetaOptimizer([("a", parameter(3))], compile=False, blocks={"first": ["a"]}, **OPTIONS)
    stepped(opt, None, range(2))
    opt.add_param_group({"params": [("b", parameter(3, seed=1))], "block": "own"})
    del opt.param_groups[0]
    stepped(opt, None, range(2, 4))
    assert list(opt.step_sizes()) == ["own"]

    options = OPTIONS | {"base": {"a": mo.AdamW()}}
    opt = MetaOptimizer([("a", parameter(3))], compile=False, **options)
    stepped(opt, None, range(2))
    opt.param_groups[0] |= {"params": [parameter(3, seed=1)], "param_names": ["b"]}
    with pytest.raises(ValueError, match="`base` has no pattern that matches leaf 'b'"):
        opt.step_sizes()


def test_what_cannot_be_stepped_is_refused_at_the_step() -> None:
    params = [parameter(3), parameter(2)]
    opt = MetaOptimizer(params, compile=False, **OPTIONS)
    stepped(opt, None, range(2))
    group, good = opt.param_groups[0], list(opt.param_groups[0]["params"])
    for bad, message in (
        ([*good, good[0]], "has one parameter twice"),
        ([*good, torch.zeros(2, dtype=torch.int64)], r"params\['2'\].* must be dense, real"),
    ):
        group["params"] = bad
        before = frozen(opt, look=False)
        with pytest.raises((ValueError, TypeError), match=message):
            opt.step()
        assert_same(frozen(opt, look=False), before)
    group["params"] = good
    stepped(opt, None, range(2, 3))


def test_moments_that_do_not_fit_are_refused_and_the_rest_starts_afresh() -> None:
    """A script that knows of the moments alone leaves the trace as it was."""
    param = parameter(3, 2)
    opt = MetaOptimizer([param], compile=False, **OPTIONS)
    stepped(opt, None, range(3))
    entry = opt.state.pop(param)
    new = param.detach()[:2].clone().requires_grad_()
    entry["exp_avg"] = entry["exp_avg"][:2]
    opt.param_groups[0]["params"][0], opt.state[new] = new, entry
    message = r"\['exp_avg_sq'\]` of parameter '0' must be a tensor of shape \(2, 2\)"
    before = frozen(opt, look=False)
    with pytest.raises(ValueError, match=message):
        stepped(opt, None, range(3, 4))
    assert_same(frozen(opt, look=False), before)
    kept = entry["exp_avg"].clone()
    entry["exp_avg_sq"] = entry["exp_avg_sq"][:2]
    state = opt.core_state()
    assert torch.equal(state.slots["0"]["exp_avg"], kept)
    assert torch.equal(state.average["0"], new.detach())
    assert int(state.count["0"]) == 3
    stepped(opt, None, range(4, 6))


# --- state


def _clear(opt: Any) -> None:
    opt.state.clear()


def _another_state(opt: Any) -> None:
    opt.state = defaultdict(dict)


def _a_plain_state(opt: Any) -> None:
    opt.state = {}


def _empty_entries(opt: Any) -> None:
    for param in list(opt.state):
        opt.state[param] = {}


@pytest.mark.usefixtures("small")
@every_partition
@pytest.mark.parametrize(
    "edit", [_clear, _another_state, _a_plain_state, _empty_entries], ids=lambda e: e.__name__
)
def test_a_state_that_is_cleared_starts_afresh(edit: Any, blocks: str) -> None:
    """Moments, traces and counts; step sizes that lie in groups, as the multiplier does, stay."""
    params = [parameter(3, 2, seed=1), parameter(5, seed=2)]
    opt = MetaOptimizer(params, compile=False, blocks=blocks, **OPTIONS)
    twin = Twin(params, blocks=blocks)
    stepped(opt, twin, range(4))
    edit(opt)
    twin.become([p.detach().clone() for p in params], {"0": "0", "1": "1"}, {})
    kept, values = frozen(opt), [param.detach().clone().requires_grad_() for param in params]
    assert len(kept["state"]) == 2
    stepped(opt, twin, range(4, 8))
    agree(opt, twin)
    assert {int(entry["step"]) for entry in opt.state_dict()["state"].values()} == {4}
    # a checkpoint of the moment in between goes on as the run did
    again = MetaOptimizer(values, compile=False, blocks=blocks, **OPTIONS)
    again.load_state_dict(kept)
    stepped(again, None, range(4, 8))
    for a, b in zip(params, values, strict=True):
        assert torch.equal(a, b)
    assert_same(frozen(again), frozen(opt))


@pytest.mark.usefixtures("small")
@every_partition
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_state_that_was_elsewhere_goes_on(blocks: str, dtype: Any) -> None:
    """Offloaded and brought back: every tensor is another one, of equal numbers."""
    params = [[parameter(3, 2, seed=1), parameter(5, seed=2)] for _ in range(2)]
    opts = [MetaOptimizer(some, compile=False, blocks=blocks, **OPTIONS) for some in params]
    for t in range(8):
        for opt in opts:
            stepped(opt, None, range(t, t + 1))
        for entry in opts[0].state.values() if t in (2, 3, 6) else ():
            for key, value in entry.items():
                moved = value.to(dtype) if value.is_floating_point() else value
                entry[key] = moved.clone().to(value.dtype)
        if dtype != torch.float64:
            for entry in opts[1].state.values() if t in (2, 3, 6) else ():
                for value in entry.values():
                    value.copy_(value.to(dtype) if value.is_floating_point() else value)
    for a, b in zip(*params, strict=True):
        assert torch.equal(a, b)
    assert_same(frozen(opts[0]), frozen(opts[1]))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("blocks", ["scalar", "weight"])
@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq", "average"])
def test_a_state_that_is_edited_in_place_is_the_one_that_is_used(key: str, blocks: str) -> None:
    """One of two leaves that are packed: after its count is set they part."""
    params = [parameter(5, seed=1), parameter(5, seed=2)]
    opt = MetaOptimizer(params, compile=False, blocks=blocks, **OPTIONS)
    twin = Twin(params, blocks=blocks)
    stepped(opt, twin, range(4))
    opt.state[params[0]][key].zero_()
    opt.state[params[1]][key].mul_(2)
    state = twin.state
    held: dict[str, Any] = {"step": dict(state.count), "average": dict(state.average)}
    held |= {slot: {n: state.slots[n][slot] for n in "01"} for slot in ("exp_avg", "exp_avg_sq")}
    held[key]["0"].zero_()
    held[key]["1"].mul_(2)
    stepped(opt, twin, range(4, 8))
    agree(opt, twin)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq", "average", "beta"])
def test_memory_that_is_replaced_is_the_one_that_is_used(key: str) -> None:
    """By `data`, which leaves the tensor the same object."""
    params = [[parameter(5, seed=1), parameter(5, seed=2)] for _ in range(2)]
    opts = [MetaOptimizer(some, compile=False, blocks="tensor", **OPTIONS) for some in params]
    for opt, some in zip(opts, params, strict=True):
        stepped(opt, None, range(3))
        held = opt.param_groups[0] if key == "beta" else opt.state[some[0]]
        if opt is opts[0]:
            held[key].data = 2 * held[key]
        else:
            held[key].mul_(2)
        stepped(opt, None, range(3, 6))
    for a, b in zip(*params, strict=True):
        assert torch.equal(a, b)
    assert_same(frozen(opts[0]), frozen(opts[1]))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("key", ["step", "exp_avg", "average", "beta"])
def test_memory_that_is_too_small_is_refused(key: str) -> None:
    param = parameter(1000)
    opt = MetaOptimizer([param], compile=False, blocks="node", **OPTIONS)
    stepped(opt, None, range(2))
    held = opt.param_groups[0] if key == "beta" else opt.state[param]
    held[key].untyped_storage().resize_(2)
    before = param.detach().clone()
    with pytest.raises(ValueError, match=key):
        stepped(opt, None, range(2, 3))
    assert torch.equal(param, before)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("step", None, "must be the number of its steps; got None"),
        ("step", torch.zeros(3), "must be the number of its steps"),
        ("exp_avg", torch.zeros(3).to_sparse(), "must be dense"),
        ("exp_avg", None, r"shape \(3,\) on this device; got None"),
    ],
)
def test_state_that_is_none_is_refused(key: str, value: Any, message: str) -> None:
    param = parameter(3)
    opt = MetaOptimizer([param], compile=False, **OPTIONS)
    stepped(opt, None, range(2))
    kept, before = opt.state[param][key], param.detach().clone()
    opt.state[param][key] = value
    with pytest.raises(ValueError, match=message):
        stepped(opt, None, range(2, 3))
    assert torch.equal(param, before)
    opt.state[param][key] = kept
    stepped(opt, None, range(2, 3))


def test_a_moment_does_not_start_afresh_under_a_count_that_goes_on() -> None:
    """Adam's second moment, not corrected for its start, makes steps 30 times as long."""
    param = parameter(3)
    opt = MetaOptimizer([param], compile=False, **OPTIONS)
    stepped(opt, None, range(2))
    del opt.state[param]["exp_avg_sq"]
    with pytest.raises(ValueError, match="number of its steps, but no 'exp_avg_sq'"):
        stepped(opt, None, range(2, 3))
    opt.state[param] = {}
    stepped(opt, None, range(2, 4))


@pytest.mark.usefixtures("small")
def test_parameters_of_one_memory_each_make_their_step() -> None:
    first, other = parameter(5), parameter(5)
    other.data = first.data
    opt = MetaOptimizer(
        [first, other], base=mo.SGD(), meta=mo.SGD(), step_size=0.5, compile=False, discount=1.0
    )
    want = first.detach() - 0.5 * 3.0
    first.grad, other.grad = torch.full_like(first, 1.0), torch.full_like(other, 2.0)
    opt.step()
    torch.testing.assert_close(first.detach(), want)


def test_entries_and_groups_may_be_copied() -> None:
    """Other dicts of the same objects: what is written to them from then on counts."""
    param = parameter(3)
    opt = MetaOptimizer([param], compile=False, **OPTIONS)
    stepped(opt, None, range(2))
    opt.state[param] = dict(opt.state[param])
    opt.param_groups[0] = dict(opt.param_groups[0])
    stepped(opt, None, range(2, 3))
    assert opt._built is not None
    assert opt._built.leaves["0"].state is opt.state[param]
    opt.param_groups[0] = opt.param_groups[0] | {"lr": 0.0}
    before = param.detach().clone()
    stepped(opt, None, range(3, 4))
    assert torch.equal(param.detach(), before)


def test_a_count_may_be_put_as_a_number() -> None:
    params = [parameter(5, seed=1), parameter(5, seed=2)]
    opt = MetaOptimizer(params, compile=False, **OPTIONS)
    twin = Twin(params)
    stepped(opt, twin, range(4))
    opt.state[params[0]]["step"] = 0
    twin.state.count["0"].zero_()
    stepped(opt, twin, range(4, 8))
    agree(opt, twin)


def test_steps_that_find_nothing_edited_build_nothing(monkeypatch: Any) -> None:
    params = [parameter(3, 2), parameter(2)]
    opt = MetaOptimizer(params, compile=False, blocks="tensor", **OPTIONS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)
    stepped(opt, None, range(2))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("metaopt_torch.base.build", never)
    for t in range(6):
        params[0].requires_grad_(t % 2 == 0)
        opt.param_groups[0]["weight_decay"] = 0.1 * t
        stepped(opt, None, range(t, t + 1))
        schedule.step()
        opt.state_dict()


# --- options


@every_partition
def test_bounds_that_change_hold_from_then_on(blocks: str) -> None:
    param = parameter(4, 3)
    opt = MetaOptimizer([param], compile=False, blocks=blocks, **(OPTIONS | {"meta_lr": 0.1}))
    stepped(opt, None, range(3))
    for lo, hi in ((0.02, 0.03), (1e-3, 2e-3), (1e-5, 1e-2)):
        opt.param_groups[0]["bounds"] = [lo, hi]
        before = param.detach().clone()
        stepped(opt, None, range(3, 4))
        # of AdamW at rest the first step is at most the step size, up to the moments' lag
        assert float((param.detach() - before).abs().max()) < 4.0 * hi
        for size in opt.step_sizes().values():
            assert torch.all((size >= lo * (1 - 1e-9)) & (size <= hi * (1 + 1e-9)))
    with pytest.raises(TypeError, match="does not support item assignment"):
        opt.param_groups[0]["bounds"][0] = 1.0
    opt.param_groups[0]["bounds"] = (0.02, 0.03)
    again = MetaOptimizer([parameter(4, 3)], compile=False, blocks=blocks, **OPTIONS)
    again.load_state_dict(opt.state_dict())
    assert opt.config.bounds == again.config.bounds == (0.02, 0.03)


def test_bounds_hold_for_step_sizes_that_start_as_arrays() -> None:
    sizes = {"0": torch.tensor([1e-2, 2e-2, 3e-2]).numpy()}
    options = OPTIONS | {"step_size": sizes, "bounds": (1e-3, 1.0), "blocks": "node"}
    opt = MetaOptimizer([parameter(3, 2)], compile=False, **options)
    stepped(opt, None, range(2))
    opt.param_groups[0]["bounds"] = (1e-3, 1.5e-2)
    stepped(opt, None, range(2, 3))
    assert float(opt.step_sizes()["0"].max()) <= 1.5e-2 * (1 + 1e-6)


def test_beta_that_is_set_is_the_step_size_that_is_learned() -> None:
    """In place, or by another tensor in its place."""
    params = [parameter(4, seed=1), parameter(3, seed=2)]
    opt = MetaOptimizer(params, compile=False, blocks="tensor", **OPTIONS)
    twin = Twin(params, blocks="tensor")
    stepped(opt, twin, range(3))
    for t, beta in enumerate(([-3.0, -4.0], [-5.0, -2.0])):
        want = torch.tensor(beta, dtype=torch.float64)
        if t == 0:
            opt.param_groups[0]["beta"].copy_(want)
        else:
            opt.param_groups[0]["beta"] = want.float()
        twin.state = replace(twin.state, beta=want.clone())
        sizes = torch.stack(list(opt.step_sizes().values()))
        assert relative_error(sizes.numpy(), want.exp().numpy()) < 1e-12
        stepped(opt, twin, range(3 + t, 4 + t))
        agree(opt, twin)
    for bad in (torch.zeros(3), -5.0):
        opt.param_groups[0]["beta"] = bad
        with pytest.raises(ValueError, match=r"`beta` of group 0 must be a tensor of shape \(2,\)"):
            opt.step()


@every_partition
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("step_size", 0.1, r"`step_size` of group 1, where .* was 0\.01 and cannot become 0\.1"),
        ("block", "other", r"`block` of group 1 was None and cannot become 'other'"),
        ("bounds", (1.0, 0.5), "`bounds"),
    ],
)
def test_options_that_hold_for_the_start_alone_are_refused_later(
    option: str, value: Any, message: str, blocks: str
) -> None:
    params = [parameter(4, seed=1), parameter(3, seed=2)]
    opt = MetaOptimizer(
        [{"params": [param]} for param in params], compile=False, blocks=blocks, **OPTIONS
    )
    stepped(opt, None, range(2))
    before, values = frozen(opt, look=False), [param.detach().clone() for param in params]
    for group in opt.param_groups[1:] if blocks != "scalar" else opt.param_groups:
        group[option] = value
    if blocks == "scalar":
        message = message.replace("group 1", "group 0")
    for look in (opt.step, opt.step_sizes, opt.core_state, opt.state_dict):
        with pytest.raises(ValueError, match=message):
            look()
    for group in opt.param_groups:
        group[option] = None
    assert_same(frozen(opt, look=False), before)
    for a, b in zip(params, values, strict=True):
        assert torch.equal(a.detach(), b)
    stepped(opt, None, range(2, 4))


def test_groups_without_parameters_make_no_step() -> None:
    """As in torch; what was learned goes on when parameters come back."""
    param = parameter(3)
    opt = MetaOptimizer([param], compile=False, **OPTIONS)
    twin = Twin([param])
    stepped(opt, twin, range(2))
    group = opt.param_groups.pop()
    assert opt.step(lambda: 2.0) == 2.0
    opt.param_groups.append(group)
    stepped(opt, twin, range(2, 4))
    agree(opt, twin)


def test_maximize_is_checked_where_it_changes() -> None:
    param = parameter(3)
    opt = MetaOptimizer([param], compile=False, **OPTIONS)
    stepped(opt, None, range(2))
    before = param.detach().clone()
    opt.param_groups[0]["maximize"] = "no"
    with pytest.raises(TypeError, match="`maximize` must be True or False; got 'no'"):
        stepped(opt, None, range(2, 3))
    assert torch.equal(param, before)
    opt.param_groups[0]["maximize"] = True
    stepped(opt, None, range(2, 3))
    assert not torch.equal(param, before)


def frozen(opt: Any, *, look: bool = True) -> Any:
    """Return a copy of the state dict, or, without a look at what was edited, of what there is."""
    if look:
        return copy.deepcopy(opt.state_dict())
    entries = [dict(entry) for entry in opt.state.values()]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    return copy.deepcopy({"state": entries, "groups": groups})
