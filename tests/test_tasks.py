"""The tasks of the comparison are what they say: data, networks, and what runs are judged by."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

import torch
from metaopt_conformance.tolerances import rounding
from torch import nn

from benchmarks.training.layers import BatchNorm, Linear, convolved
from benchmarks.training.methods import Method, updater
from benchmarks.training.studies import CHOOSING, JUDGING
from benchmarks.training.tasks import TASKS, Task
from benchmarks.training.tasks.digits import Autoencoder
from benchmarks.training.tasks.images import FineTuning, _pretrained, _Pretraining
from benchmarks.training.tasks.linear import ShiftingRegression
from benchmarks.training.tasks.recurrent import WIDTH, AddingProblem
from benchmarks.training.tasks.residual import ResidualCifar100
from benchmarks.training.tasks.text import ByteModel
from tests.made_up_data import write_cifar, write_wikitext

#: A few steps whose products are summed in another order.
ALLOWED = rounding("float32", 1024, steps=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tiny data sets of the tasks that judge."""
    folder = tmp_path_factory.mktemp("data")
    write_cifar(folder, 100)
    write_wikitext(folder)
    return folder


@pytest.fixture(autouse=True)
def _little_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FineTuning, "before", 2)


def made(name: str, seeds: tuple[int, ...], data: Path | None = None) -> Task:
    return TASKS[name](seeds, data=data)  # type: ignore[call-arg]


def trained(task: Task, starts: tuple[float, ...], steps: int) -> list[Any]:
    """Train with AdamW at fixed step sizes and return the losses of every step."""
    steps_of = updater(Method(base="AdamW"), task, starts, steps)
    losses = []
    for step in range(steps):
        measures = steps_of.step(step, lambda step=step: task(step))  # type: ignore[misc]
        losses.append(measures["loss"].detach().numpy())
    return losses


def test_half_of_the_tasks_judge() -> None:
    assert len(CHOOSING) == 6
    assert set(JUDGING) == set(TASKS) - set(CHOOSING) - {"continual-as-released"}


@pytest.mark.parametrize("name", JUDGING)
def test_runs_depend_on_their_seed_alone(name: str, data: Path) -> None:
    together, alone = made(name, (2, 1), data), made(name, (1,), data)
    both, one = (np.stack(trained(task, (1e-2,) * n, 4)) for task, n in ((together, 2), (alone, 1)))
    np.testing.assert_allclose(both[:, 1:], one, rtol=ALLOWED)
    assert np.all(both[:, 0] != both[:, 1])
    with torch.no_grad():
        judged, of_one = together.evaluate(), alone.evaluate()
    for measure, values in judged.items():
        np.testing.assert_allclose(values[1:], of_one[measure], rtol=ALLOWED)
    again = np.stack(trained(made(name, (2, 1), data), (1e-2, 1e-2), 4))
    assert np.array_equal(again, both)


@pytest.mark.parametrize(
    ("name", "start", "steps", "part"), [("shifts", 3e-2, 450, 0.7), ("autoencoder", 1e-3, 60, 0.7)]
)
def test_training_lowers_the_loss(name: str, start: float, steps: int, part: float) -> None:
    losses = np.stack(trained(made(name, (0, 1)), (start, start), steps))
    first, last = (np.mean(some, axis=0) for some in np.array_split(losses, 3)[::2])
    assert np.all(last < part * first)


def test_the_shifting_target_drifts_and_shifts_and_has_heavy_noise() -> None:
    task = ShiftingRegression((0,))
    path = task._path(0)
    moves = np.linalg.norm(np.diff(path, axis=0), axis=1)
    shifts = np.flatnonzero(moves > 1.0) + 1
    assert np.array_equal(shifts, np.arange(task.period, len(path), task.period))
    drifts = np.delete(np.diff(path, axis=0), shifts - 1, axis=0)
    assert np.std(drifts) == pytest.approx(task.walk, rel=0.02)
    x, noisy, clean = (
        np.concatenate([task._examples(step)[part].numpy() for step in range(task.steps)])
        for part in range(3)
    )
    np.testing.assert_allclose(clean, np.sum(x * path[: task.steps], axis=1), rtol=1e-4, atol=1e-5)
    noise = noisy - clean
    assert np.quantile(np.abs(noise), 0.5) == pytest.approx(0.765, rel=0.1), "Student's, 3 degrees"
    assert np.max(np.abs(noise)) > 10.0, "a normal one of this variance has 6 or 7"
    with torch.no_grad():
        task.weight.copy_(torch.from_numpy(path[:1]))
        measures = task(0)
    assert measures["error"].item() == pytest.approx(0.0, abs=1e-10)
    assert measures["loss"].item() == pytest.approx(0.5 * noise[0] ** 2, rel=1e-5)


def test_two_numbers_are_marked_and_added() -> None:
    task = AddingProblem((3, 4))
    inputs, sums = task._examples(300)
    assert tuple(inputs.shape) == (2, task.size, task.length, 2)
    numbers, marks = inputs.unbind(3)
    assert np.array_equal(np.unique(marks), (0.0, 1.0))
    for half in marks.chunk(2, dim=2):
        assert torch.all(half.sum(2) == 1)
    np.testing.assert_allclose(sums, (numbers * marks).sum(2), rtol=1e-6)
    assert not torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs, task._examples(301)[0])


def test_the_recurrent_network_is_a_gru() -> None:
    task = AddingProblem((5,))
    gru: Any = torch.nn.GRU(2, WIDTH, batch_first=True)
    with torch.no_grad():
        gru.weight_ih_l0.copy_(task.from_input[0].T)
        gru.weight_hh_l0.copy_(task.from_state[0].T)
        gru.bias_ih_l0.copy_(task.input_bias[0])
        gru.bias_hh_l0.copy_(task.state_bias[0])
        inputs, _ = task._examples(0)
        states, _ = gru(inputs[0])
        expected = states[:, -1] @ task.output.weight[0].T + task.output.bias[0]
        got = task._sums(inputs)[0]
    allowed = rounding("float32", WIDTH, steps=task.length)
    np.testing.assert_allclose(got, expected[:, 0], atol=allowed)


def test_the_autoencoder_is_judged_by_other_images_through_a_code_of_eight() -> None:
    task = Autoencoder((0, 1))
    assert min(p.shape[1] for name, p in task.named_parameters() if "weight" in name) == 8
    with torch.no_grad():
        for param in task.parameters():
            param.zero_()
    power = task._test.square().sum(1).mean().item()
    with torch.no_grad():
        np.testing.assert_allclose(task.evaluate()["loss"], [power, power], rtol=1e-5)
    train, test = ({row.tobytes() for row in part.numpy()} for part in (task._train, task._test))
    assert train.isdisjoint(test)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_convolutions_side_by_side_are_those_of_each_run(size: int, stride: int) -> None:
    layer = Linear((0, 1), size**2 * 4, 6, 0)
    x = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = convolved(layer, x, size, stride)
    for run, y in enumerate(found):
        weight = layer.weight[run].reshape(6, 4, size, size)
        expected = nn.functional.conv2d(
            x[run], weight, layer.bias[run], stride=stride, padding=size // 2
        )
        torch.testing.assert_close(y, expected)


def test_batch_normalization_side_by_side_is_that_of_each_run() -> None:
    norm = BatchNorm((0, 1), 4)
    x = 2.0 + torch.randn(2, 8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm.gain.copy_(torch.arange(8.0).reshape(2, 4))
        norm.bias.copy_(torch.arange(8.0).reshape(2, 4) - 3.0)
    trained_on, tested_on = norm(x), norm.eval()(x[:, :2])
    for run in range(2):
        alone = nn.BatchNorm2d(4, momentum=None)
        with torch.no_grad():
            alone.weight.copy_(norm.gain[run])
            alone.bias.copy_(norm.bias[run])
        torch.testing.assert_close(trained_on[run], alone(x[run]))
        torch.testing.assert_close(tested_on[run], alone.eval()(x[run, :2]))


def test_the_residual_network_is_tested_with_the_statistics_of_the_weights_at_hand(
    data: Path,
) -> None:
    task = ResidualCifar100((0, 1), data)
    with torch.no_grad():
        before = task.evaluate()
        assert task.training
        task.stem.weight.mul_(3.0)  # of no consequence behind batch normalization
        task.stem.bias.add_(1.0)
        after = task.evaluate()
        torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-3, atol=0.0)
        task.get_parameter("blocks.0.second_norm.gain").mul_(3.0)
        assert torch.all((task.evaluate()["loss"] - before["loss"]).abs() > 1e-3)
    assert not [name for name in task.state_dict() if "mean" in name], "nothing to go on from"


def test_fine_tuning_starts_from_what_was_learned_of_other_classes(data: Path) -> None:
    task = FineTuning((3, 1), data)
    learned = _pretrained(1, data, FineTuning.before)
    for name, param in task.named_parameters():
        same = torch.equal(param[1], learned[name][0])
        assert same != name.startswith("3."), name
        assert not torch.equal(param[0], param[1])
    images = {image.numpy().tobytes() for image in task._images}
    others = {image.numpy().tobytes() for image in _Pretraining((0,), data)._images}
    assert len(images) == len(others) == 50
    assert images.isdisjoint(others)
    assert torch.equal(task._labels.unique(), torch.arange(10))


def test_the_byte_model_predicts_from_what_came_before(data: Path) -> None:
    task = ByteModel((0, 1), data)
    text = task._test.expand(2, -1, -1)
    inputs = text[..., :-1]
    changed = inputs.clone()
    changed[..., -1] = 0
    with torch.no_grad():
        scores, others = (
            task._scores(some).reshape(2, 64, task.length, 256) for some in (inputs, changed)
        )
        torch.testing.assert_close(scores[:, :, :-1], others[:, :, :-1])
        assert torch.all((scores[:, :, -1] - others[:, :, -1]).abs().amax(2) > 1e-3)
        task.last.weight.zero_()
        task.last.bias.zero_()
        np.testing.assert_allclose(task.evaluate()["loss"], np.log(256), rtol=1e-5)
