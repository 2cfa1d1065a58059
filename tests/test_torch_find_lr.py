"""A fixed learning rate that is found by learning one: what comes back, and that nothing else does.

How good it is on real tasks, `python -m benchmarks.find_lr` says.
"""

import copy
import random
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import metaopt_torch  # noqa: E402
from metaopt_torch import FoundLR, find_lr  # noqa: E402

import metaopt as mo  # noqa: E402


def network() -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.1)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(8, 1))


def batches(number: int = 20) -> list[Any]:
    return [torch.randn(16, 4, generator=torch.Generator().manual_seed(t)) for t in range(number)]


def loss(model: Any, batch: Any) -> Any:
    return (model(batch) - batch.sum(dim=1, keepdim=True)).square().mean()


class Loader:
    """Shuffled by torch, Python and NumPy at once."""

    def __iter__(self) -> Any:
        order = torch.randperm(20).tolist()
        random.shuffle(order)
        np.random.shuffle(order)  # noqa: NPY002
        return (batches()[index] for index in order)


def test_the_model_and_all_random_states_are_as_they_were() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # type: ignore[index] # noqa: NPY002
    find_lr(model, loss, Loader(), steps=20)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index] # noqa: NPY002


def test_it_is_the_same_again_and_lies_where_training_is_fast() -> None:
    found = [find_lr(network(), loss, batches(), steps=60) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].settled
    ends = []
    for lr in (found[0].lr, found[0].lr / 30.0):
        model = network()
        opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        for batch in batches() * 5:
            opt.zero_grad()
            loss(model, batch).backward()
            opt.step()
        ends.append(float(sum(loss(model, batch).detach() for batch in batches())))
    assert ends[0] < 0.5 * ends[1]


def test_two_starts_that_differ_go_on_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients of pure noise nothing brings them together."""

    def noise(model: Any, batch: Any) -> Any:  # noqa: ARG001
        return sum((param * torch.randn_like(param)).sum() for param in model.parameters())

    torch.manual_seed(1)
    monkeypatch.setattr(metaopt_torch.lr_finder, "STARTS", (1e-6, 1e-3))
    found = find_lr(torch.nn.Linear(3, 1), noise, [None], steps=10)
    assert not found.settled
    assert found.steps == 50


def test_ratios_by_block_make_groups_for_a_plain_optimizer() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    named = {"first": "0.*", "rest": "*"}
    found = find_lr(model, loss, batches(), blocks=named, steps=30)
    assert list(found.ratios) == ["first", "rest"]
    weights = {"first": 32, "rest": 16 + 9}
    mean = sum(weights[block] * np.log(ratio) for block, ratio in found.ratios.items())
    assert mean == pytest.approx(0.0, abs=1e-9)
    groups = found.groups(model)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.weight"],
        ["1.weight", "1.bias", "3.weight", "3.bias"],
    ]
    assert [group["lr"] for group in groups] == [found.lr * r for r in found.ratios.values()]
    assert len(torch.optim.AdamW(groups).param_groups) == 2
    with pytest.raises(ValueError, match=r"it has '0\.bias' as well"):
        found.groups(network())


@pytest.mark.parametrize("base", ["sgd", mo.Lion()])
def test_it_may_be_for_another_rule(base: Any) -> None:
    found = find_lr(network(), loss, batches(), base=base, steps=10)
    assert isinstance(found, FoundLR)
    assert 0.0 < found.lr < float("inf")
    assert found.ratios == {"all": pytest.approx(1.0)}


def _nan(model: Any, batch: Any) -> Any:
    return loss(model, batch) * float("nan")


def _another(other: Any) -> Any:
    return lambda _, batch: loss(other, batch)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no module": ({"model": [1]}, TypeError, "`model` must be a torch.nn.Module; got list"),
    "nothing to train": (
        {"model": torch.nn.Flatten()},
        ValueError,
        "`model` must have a parameter that requires a gradient",
    ),
    "no function": ({"loss": 1.0}, TypeError, "`loss` must be callable"),
    "a number as loss": ({"loss": lambda _m, _b: 1.0}, TypeError, "`loss` must return a tensor"),
    "a loss for each example": (
        {"loss": lambda model, batch: model(batch)},
        TypeError,
        "`loss` must return a tensor of one number",
    ),
    "a loss that is NaN": ({"loss": _nan}, ValueError, "`loss` must be finite; got nan in step 0"),
    "another model": (
        {"loss": _another(network())},
        ValueError,
        "`loss` must use the model that it is handed",
    ),
    "no batch": ({"loader": []}, ValueError, "`loader` must have a batch; got none"),
    "no loader": ({"loader": 3}, TypeError, "`loader` must be an iterable of batches; got int"),
    "batches once": ({"loader": iter(batches())}, ValueError, "a list_iterator, which has its"),
    "few steps": ({"steps": 3}, ValueError, "`steps` must be at least 10; got 3"),
    "half a step": ({"steps": 10.5}, TypeError, "`steps` must be a whole number; got 10.5"),
    "a step size a unit": ({"blocks": "node"}, ValueError, "`blocks` must give each parameter one"),
    "a step size a weight": ({"blocks": "weight"}, ValueError, "`blocks` must give each parameter"),
}


@pytest.mark.parametrize("partly", [False, True])
def test_a_loss_of_ones_own_model_is_refused_and_leaves_its_gradients(partly: bool) -> None:
    model = network()
    loss(model, batches()[0]).backward()
    grads = [param.grad for param in model.parameters()]
    before = copy.deepcopy(grads)

    def of_mine(handed: Any, batch: Any) -> Any:
        return loss(torch.nn.Sequential(*handed[:3], model[3]) if partly else model, batch)

    with pytest.raises(ValueError, match=r"that it is handed, .*; it used '.*weight' of yours"):
        find_lr(model, of_mine, batches())
    find_lr(model, loss, batches(), steps=10)
    for param, grad, old in zip(model.parameters(), grads, before, strict=True):
        assert param.grad is grad
        assert torch.equal(grad, old)


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments_are_refused(case: str) -> None:
    change, error, message = WRONG[case]
    arguments: dict[str, Any] = {"model": network(), "loss": loss, "loader": batches()} | change
    with pytest.raises(error, match=message):
        find_lr(**arguments)
