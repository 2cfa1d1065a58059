"""Steps in the backward pass: those after it, to the last bit, gradients freed as they come."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
metaopt_torch = pytest.importorskip("metaopt_torch")

import metaopt as mo  # noqa: E402

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "SGD by tensor": {"base": mo.SGD(momentum=0.9), "blocks": "tensor", "discount": 0.9},
    "node": {"blocks": "node", "meta": mo.AdamW()},
    "two groups": {"base": {"0.*": mo.Lion(), "*": mo.AdamW(weight_decay=0.1)}},
    "identity": {"sigma": "identity", "lr": 0.5},
}


def network() -> Any:
    """Two parameters large enough to be stepped alone, and small ones that are packed."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(300, 300), torch.nn.Tanh(), torch.nn.Linear(300, 300))
    return torch.nn.Sequential(*layers, torch.nn.Tanh(), torch.nn.Linear(300, 3))


def optimizer(model: Any, **options: Any) -> Any:
    return metaopt_torch.MetaOptimizer(model.named_parameters(), compile=False, **options)


def loss_of(model: Any, step: int) -> Any:
    torch.manual_seed(step)
    inputs = torch.randn(8, 300)
    layers = model[:2] if step == 2 else model  # the others have no gradient in that step
    return layers(inputs).square().mean()


def states(opt: Any) -> list[Any]:
    found = [value for state in opt.state.values() for value in state.values()]
    found += [v for group in opt.param_groups for v in group.values() if torch.is_tensor(v)]
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_the_numbers_are_those_of_a_step_after_the_backward_pass(name: str) -> None:
    runs = []
    for in_backward in (False, True):
        model = network()
        opt = optimizer(model, **OPTIONS[name])
        if in_backward:
            opt.step_in_backward()
        for step in range(5):
            loss_of(model, step).backward()
            opt.step()
            opt.zero_grad()
        runs.append([*model.parameters(), *states(opt)])
    assert len(runs[0]) > 20
    for plain, ours in zip(*runs, strict=True):
        assert torch.equal(plain, ours)


def test_a_gradient_is_freed_before_the_next_one_comes() -> None:
    model = network()
    opt = optimizer(model)
    opt.step_in_backward()
    held: list[int] = []

    def see(_: Any) -> None:  # hooks run in the order in which they were made
        held.append(sum(p.grad.numel() for p in model.parameters() if p.grad is not None))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(see)
    loss_of(model, 0).backward()
    assert len(held) == 6
    assert max(held) < 2000  # the large ones have 90,000 each
    opt.step()
    assert all(param.grad is None for param in model.parameters())


def test_steps_by_hand_go_on_where_the_handle_is_removed() -> None:
    runs = []
    for remove in (False, True):
        model = network()
        opt = optimizer(model)
        handle = opt.step_in_backward()
        for step in range(4):
            if remove and step == 2:
                handle.remove()
            loss_of(model, step).backward()
            assert remove == (model[0].weight.grad is not None) or step < 2
            opt.step()
            opt.zero_grad()
        runs.append([*model.parameters(), *states(opt)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_a_parameter_that_is_added_steps_too() -> None:
    model, late = network(), torch.nn.Parameter(torch.ones(4))
    opt = optimizer(model)
    opt.step_in_backward()
    opt.add_param_group({"params": [("late", late)]})
    (loss_of(model, 0) + late.square().sum()).backward()
    opt.step()
    assert late.grad is None
    assert bool((late < 1.0).all())


def test_a_second_backward_pass_before_the_step_is_an_error() -> None:
    model = network()
    opt = optimizer(model)
    opt.step_in_backward()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"second gradient of .* since the last `step`"):
        loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="call `step` first"):
        opt.state_dict()
    assert sorted(opt.step_sizes()) == ["all"]
    opt.step()
    loss_of(model, 1).backward()
    opt.step()
    assert sorted(opt.state_dict()) == ["param_groups", "state"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"skip_nonfinite": True}, "skip_nonfinite"),
        ({"meta_first": True}, "meta_first"),
        ({"held_out": True}, "held_out"),
        ({"recover": True}, "recover"),
        ({"curvature": "exact", "discount": 0.9, "base": mo.SGD()}, "curvature"),
        ({"blocks": "weight"}, "weight"),
        ({"base": mo.AdamW(weight_decay=mo.Learned(0.1))}, "numbers that are learned"),
    ],
)
def test_what_needs_all_gradients_first_is_refused(options: Any, match: str) -> None:
    opt = optimizer(torch.nn.Linear(3, 1), **options)
    with pytest.raises(ValueError, match=f"does not go with .*{match}"):
        opt.step_in_backward()


def test_a_number_that_groups_let_be_learned_ends_it() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    base = mo.AdamW(weight_decay=mo.Learned(0.5))
    opt = metaopt_torch.MetaOptimizer([param], base=base, weight_decay=0.0, compile=False)
    opt.step_in_backward()
    opt.param_groups[0]["weight_decay"] = None
    with pytest.raises(ValueError, match="does not go with numbers that are learned"):
        param.sum().backward()


def test_hooks_are_there_once_and_end_with_the_optimizer() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    opt = metaopt_torch.MetaOptimizer([param], compile=False)
    handle = opt.step_in_backward()
    with pytest.raises(RuntimeError, match="`step_in_backward` has been called before"):
        opt.step_in_backward()
    handle.remove()
    opt.step_in_backward()
    plain = opt.to_plain()
    param.sum().backward()
    assert param.grad is not None, "the plain optimizer's"
    plain.step()
    assert torch.all(param.detach() < 1.0)
