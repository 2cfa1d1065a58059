"""AlgoPerf's submissions, in a small harness of our own and, where it is installed, in its own."""

import functools
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from tests.algoperf_harness import JaxDigits, Run, TorchDigits, submission

STEPS = 150


@pytest.fixture(params=["torch", "jax"], scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Return a function that begins a run, of a model with or without batch normalization."""
    for package in {"torch": ("torch",), "jax": ("jax", "flax")}[request.param]:
        pytest.importorskip(package)
    made = submission(request.param)
    kind = {"torch": TorchDigits, "jax": JaxDigits}[request.param]
    begun: dict[bool, Run] = {}

    def begin(normalized: bool = False) -> Run:
        if normalized not in begun:
            begun[normalized] = Run(made, kind(normalized))
        return begun[normalized].again()

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            uncompiled(patch, made)
        yield begin


def uncompiled(patch: pytest.MonkeyPatch, made: Any) -> None:
    patch.setattr(made, "MetaOptimizer", functools.partial(made.MetaOptimizer, compile=False))


def batches(run: Run) -> Any:
    return run.workload.batches(seed=1)


def bits(arrays: dict[str, Any]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "batch norm"])
def test_it_learns_the_digits_and_evaluations_change_nothing(runs: Any, normalized: bool) -> None:
    alone, judged = runs(normalized), runs(normalized)
    alone.train(batches(alone), STEPS)
    queue, accuracies = batches(judged), []
    for _ in range(3):
        judged.train(queue, STEPS // 3)
        training = judged.weights()
        accuracies.append(judged.evaluate())
    assert accuracies[-1] > 0.9
    assert bits(training) == bits(alone.weights())
    averages = judged.weights()
    assert all(np.any(averages[name] != training[name]) for name in training)


def test_it_is_judged_at_the_optimizers_averages(runs: Any) -> None:
    run = runs()
    run.train(batches(run), 20)
    if of_torch(run):
        found = run.optimizer_state["optimizer"].averaged_params(copy=True)
        want = {name: average.numpy().copy() for name, average in found.items()}
    else:
        state, compiled = run.optimizer_state
        found = compiled.average(state["optimizer"], run.params)
        want = {name: np.asarray(part["w"]) for name, part in found.items()}
    for _ in range(2):  # and again, without a step between
        run.evaluate()
        assert bits(run.weights()) == bits(want)


def test_a_checkpoint_after_an_evaluation_goes_on_with_training(runs: Any) -> None:
    run, other = runs(True), runs(True)
    queue = batches(run)
    run.train(queue, 20)
    run.evaluate()
    other.restore(run.checkpoint(), 20)
    rest = [next(queue) for _ in range(10)]
    for one in (run, other):
        one.train(iter(rest), 10)
    assert bits(other.weights()) == bits(run.weights())


def test_masked_examples_count_for_nothing(runs: Any) -> None:
    found = []
    for pixels in (9.0, -5.0):
        run = runs()
        batch = {name: np.asarray(array).copy() for name, array in next(batches(run)).items()}
        batch["inputs"][batch["weights"] == 0.0] = pixels
        run.train(iter([run.workload.placed(batch)]), 1)
        found.append(bits(run.weights()))
    assert found[0] == found[1]


def test_statistics_of_batch_normalization_are_those_of_the_averages(runs: Any) -> None:
    run = runs(True)
    run.train(batches(run), 60)

    def mean() -> Any:
        if of_torch(run):
            return run.params[1].running_mean.numpy().copy()
        return np.asarray(run.model_state["batch_stats"]["mean"])

    kept = run.optimizer_state["training"] if of_torch(run) else run.optimizer_state[1]
    inputs = np.concatenate([np.asarray(batch["inputs"]) for batch in kept.batches])
    before = mean()
    run.evaluate()
    weights = run.weights()
    if of_torch(run):
        want = np.mean(inputs @ weights["0.weight"].T + weights["0.bias"], 0)
    else:
        want = np.mean(inputs @ weights["hidden"], 0)
    assert np.max(np.abs(mean() - want)) < 0.2 * np.max(np.abs(before - want))


def of_torch(run: Run) -> bool:
    return isinstance(run.workload, TorchDigits)


def test_batch_sizes_are_those_of_the_workloads_and_variants_are_left_to_the_harness(
    runs: Any,
) -> None:
    made = runs().submission
    assert made.get_batch_size("wmt") == 128
    with pytest.raises(ValueError, match=r"`workload_name` must be one of .*mnist.*got 'wmt_post'"):
        made.get_batch_size("wmt_post")


@pytest.mark.parametrize("framework_name", ["torch", "jax"])
def test_the_packages_own_mnist_learns(
    framework_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the package's workload, on the digits, enlarged: its data set would be downloaded."""
    module = {"torch": "mnist_pytorch", "jax": "mnist_jax"}[framework_name]
    own = pytest.importorskip(
        f"algoperf.workloads.mnist.{module}.workload", reason="needs AlgoPerf"
    )
    made = submission(framework_name)
    if framework_name == "torch":
        uncompiled(monkeypatch, made)
    workload, digits = own.MnistWorkload(), TorchDigits().digits

    def batch(images: Any, labels: Any) -> Any:
        large = np.kron(images.reshape(-1, 8, 8), np.ones((3, 3), np.float32))
        large = np.pad(large, ((0, 0), (2, 2), (2, 2)))[..., None]
        weights = np.ones(len(labels), bool)
        placed = {"inputs": large, "targets": labels, "weights": weights}
        if framework_name == "jax":
            return placed
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in placed.items()}
        return tensors | {"inputs": tensors["inputs"].permute(0, 3, 1, 2)}

    size, rng = made.get_batch_size("mnist"), np.random.default_rng(0)
    drawn = [rng.choice(len(digits.train_labels), size) for _ in range(300)]
    train = [batch(digits.train_images[at], digits.train_labels[at]) for at in drawn]
    run = Run(made, workload)
    run.train(cycle(train), 300)
    workload.accuracy = lambda params, state: (
        workload._eval_model(params, batch(digits.test_images, digits.test_labels), state, run.rng)[
            "accuracy"
        ].item()
        / len(digits.test_labels)
    )
    assert run.evaluate() > 0.85
