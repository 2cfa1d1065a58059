"""The harness of benchmarks/training: resuming, runs side by side, what is read and reported."""

import json
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

import torch
from filelock import FileLock
from metaopt_conformance.tolerances import rounding

import metaopt as mo
from benchmarks import find_lr, one_batch_first, wrapped
from benchmarks.training import loop
from benchmarks.training.cells import Cell, best_of, cells, keep, kept, merged, worst_of
from benchmarks.training.data import COARSE, DataMissingError, cifar, coarse, jpegs, wikitext
from benchmarks.training.goals import advised, misses
from benchmarks.training.imagenet import image_sets
from benchmarks.training.loop import Job, TakenError, finished, run
from benchmarks.training.methods import METAS, Method, Peer, updater
from benchmarks.training.peers import PACKAGES
from benchmarks.training.replicas import side_by_side, starts_of_blocks
from benchmarks.training.results import Result, read
from benchmarks.training.stories import stories
from benchmarks.training.studies import (
    FAR_STARTS,
    GRIDS,
    SCHEDULED,
    STARTS,
    comparison,
    idbd,
    long,
    maps,
    starts_of,
)
from benchmarks.training.tasks import TASKS, Task
from benchmarks.training.tasks.digits import DigitsNetwork, OneBatchFirst
from benchmarks.training.tasks.linear import DriftingRegression
from benchmarks.training.timing import milliseconds
from benchmarks.training.trials import Clipped, Offsets
from benchmarks.training.wrapped import KINDS
from tests.made_up_data import (
    FOLDERS,
    cifar_batches,
    write_cifar,
    write_compact,
    write_imagenet,
    write_stories,
    write_wikitext,
)

SEEDS = (3, 1)


class Short(DriftingRegression):
    """Twelve steps, logged every five; killed at a step."""

    steps: ClassVar[int] = 12
    every: ClassVar[int] = 5
    killed_at: ClassVar[int] = -1

    def forward(self, step: int) -> Any:
        if step == self.killed_at:
            raise KeyboardInterrupt
        return super().forward(step)


def killed(step: int) -> dict[str, type[Task]]:
    return {"short": type("Killed", (Short,), {"killed_at": step})}


def without_times(path: Path) -> list[Any]:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


METHODS: list[Method | Peer] = [
    Method(base="AdamW"),
    Method(base="Lion", schedule="cosine"),
    Method(base="AdamW", meta="Adam", meta_lr=1e-2, discount=0.9, blocks="tensor"),
    Method(base="SGDm", meta="Lion", blocks="weight", bounds=(1e-6, 0.1)),
    Method(base="AdamW", meta="Adam", curvature="exact"),
    Method(base="AdamW", meta="Adam", discount=0.9, averages=True),
    idbd(1e-2),
    *(Peer(name=name) for name in PACKAGES),
]


def needs_package(method: Method | Peer) -> None:
    if isinstance(method, Peer):
        try:
            updater(method, Short((0,)), (1e-3,), 3)
        except ImportError as error:
            pytest.skip(str(error))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_killed_at_any_step_a_run_ends_as_if_it_had_not_been(
    method: Method | Peer, tmp_path: Path
) -> None:
    needs_package(method)
    seeds = SEEDS[:1] if isinstance(method, Peer) or method.curvature == "exact" else SEEDS
    job = Job(task="short", method=method, starts=(1e-3,), seeds=seeds)
    whole = run(job, tmp_path / "whole", tasks={"short": Short})
    for step in (0, 1, 5, 7, 11):
        folder = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            run(job, folder, tasks=killed(step), checkpoint_every=0.0)
        assert not finished(folder / whole.name)
        resumed = run(job, folder, tasks={"short": Short}, checkpoint_every=0.0)
        assert without_times(resumed) == without_times(whole), step
        assert [path.name for path in folder.iterdir()] == [whole.name]


def test_averages_are_judged_in_place_of_the_weights_and_change_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Method(base="AdamW", meta="Adam")
    job = Job(task="digits", method=method, starts=(1e-2,), seeds=SEEDS, steps=50)
    plain = without_times(run(job, tmp_path / "plain"))
    given: list[Any] = []

    def zeros(made: Any, task: Task, *more: Any) -> Any:
        steps = updater(made, task, *more)
        given.append([torch.zeros_like(param) for param in task.parameters()])
        steps.averaged = lambda: given[0]  # type: ignore[method-assign]
        return steps

    monkeypatch.setattr(loop, "updater", zeros)
    averaged = without_times(run(job, tmp_path / "averaged"))
    assert [one.get("train") for one in averaged] == [one.get("train") for one in plain]
    assert all(np.allclose(one["test"]["loss"], np.log(10)) for one in averaged[1:-1])
    assert not np.allclose(plain[-2]["test"]["loss"], np.log(10), rtol=0.1)
    task = DigitsNetwork(SEEDS)
    before = [param.detach().clone() for param in task.parameters()]

    @torch.no_grad()
    def interrupted() -> None:
        with loop._held(task, given[0]):
            assert not any(map(torch.count_nonzero, task.parameters()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(map(torch.equal, task.parameters(), before))


def test_averages_of_learned_step_sizes_are_moving_averages_of_the_weights() -> None:
    task = DigitsNetwork(SEEDS)
    method = Method(base="SGDm", meta="Adam", meta_lr=1e-2, discount=0.9, averages=True)
    steps = updater(method, task, (0.5, 0.1), 20)
    expected = [param.detach().clone() for param in task.parameters()]
    for step in range(20):
        for average, param in zip(expected, task.parameters(), strict=True):
            average.lerp_(param.detach(), 0.1)
        steps.step(step, lambda step=step: task(step))  # type: ignore[misc]
    found = steps.averaged()
    assert found is not None
    for name, got, average in zip(dict(task.named_parameters()), found, expected, strict=True):
        allowed = rounding("float32", 10, steps=20) * average.abs().max()
        assert (got - average).abs().max() <= allowed, name


def test_prodigy_takes_a_cosine_as_its_authors_advise() -> None:
    needs_package(Peer(name="Prodigy, cosine"))
    task, steps = Short((0,)), 12
    made = updater(Peer(name="Prodigy, cosine"), task, (1.0,), steps)
    factors = []
    for step in range(steps):
        factors.append(made._optimizer.param_groups[0]["lr"])  # type: ignore[attr-defined]
        made.step(step, lambda step=step: task(step))  # type: ignore[misc]
    expected = 0.5 * (1.0 + np.cos(np.pi * np.arange(steps) / steps))
    np.testing.assert_allclose(factors, expected, rtol=1e-12)


def test_several_discounts_start_everywhere_and_are_read_as_they_were_kept(tmp_path: Path) -> None:
    method = Method(base="AdamW", meta="fast Adam", meta_lr=1e-2, discount=(0.99, 1.0))
    assert "discount (0.99, 1.0)" in method.label
    assert all(starts_of(task, method) == FAR_STARTS for task in TASKS)
    assert starts_of("digits", SCHEDULED) == STARTS
    assert starts_of("cifar10", SCHEDULED) == STARTS[::2]
    assert starts_of("bytes", SCHEDULED) == FAR_STARTS
    table = cells([replace(of_digits((0.5,), (1.0,)), method=method)], TASKS["digits"])
    keep({"digits": table}, tmp_path / "kept")
    assert list(kept(tmp_path / "kept", TASKS)) == table
    assert milliseconds({"(AdamW, fast Adam)": 1.0}, method) is None, "two traces cost more"


def test_a_line_that_was_cut_is_written_again(tmp_path: Path) -> None:
    job = Job(task="short", method=METHODS[0], starts=(1e-3,), seeds=SEEDS)
    whole = run(job, tmp_path / "whole", tasks={"short": Short})
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, tasks=killed(11), checkpoint_every=0.0)
    log = tmp_path / whole.name
    log.write_bytes(log.read_bytes()[:-7])
    assert not finished(log)
    assert without_times(run(job, tmp_path, tasks={"short": Short})) == without_times(whole)


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    job = Job(task="short", method=METHODS[0], starts=(1e-3,), seeds=SEEDS)
    path = run(job, tmp_path, tasks={"short": Short})
    before = path.read_bytes()
    assert run(job, tmp_path, tasks=killed(0)) == path
    assert path.read_bytes() == before


def test_what_another_process_runs_is_left_to_it(tmp_path: Path) -> None:
    job = Job(task="short", method=METHODS[0], starts=(1e-3,), seeds=SEEDS)
    with FileLock(tmp_path / f"{job.name}.lock"), pytest.raises(TakenError, match="another"):
        run(job, tmp_path, tasks={"short": Short})
    assert run(job, tmp_path, tasks={"short": Short}).is_file()


@pytest.mark.parametrize("blocks", ["scalar", "tensor", "node", "weight", "groups"])
def test_runs_side_by_side_are_those_of_each_by_itself(blocks: str) -> None:
    method = Method(base="SGDm", meta="Adam", meta_lr=1e-2, blocks=blocks)
    kind = TASKS["digits"]
    runs = ((0.1, 0), (0.5, 1), (0.1, 1))
    together = trained(kind, method, runs)
    for index, one in enumerate(runs):
        alone = trained(kind, method, (one,))
        for name, param in alone.items():
            difference = (together[name][index] - param[0]).abs().max()
            scale = param.abs().max()
            assert difference <= rounding("float32", 128, steps=5) * scale, (name, one)


def trained(
    kind: type[Task], method: Method, runs: tuple[tuple[float, int], ...]
) -> dict[str, Any]:
    starts, seeds = zip(*runs, strict=True)
    task = kind(seeds)
    steps = updater(method, task, starts, 5)
    for step in range(5):
        steps.step(step, lambda step=step: task(step))  # type: ignore[misc]
    return {name: param.detach() for name, param in task.named_parameters()}


def test_learning_rates_that_are_found_are_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TASKS["logistic"], "steps", find_lr.WINDOW)
    monkeypatch.setattr(find_lr, "GRID", (1e-5, 1e-2))
    monkeypatch.setattr(find_lr, "SEEDS", (0, 1))
    monkeypatch.setattr(find_lr, "found", lambda _, seed: (1e-2 * (1 + seed), 600))
    monkeypatch.setattr(find_lr, "suggested", lambda _, seed: 1e6 if seed else None)
    whos = ("grid", "find_lr", "lightning")
    result = {who: json.loads(json.dumps(find_lr.run("logistic", who))) for who in whos}
    assert result["find_lr"]["lost"] == [False, False]
    # the same run as that of the grid
    assert result["find_lr"]["values"][0] == pytest.approx(result["grid"]["values"][2])
    assert result["lightning"]["lost"] == [True]
    head, ours, theirs = list(find_lr.report({"logistic": result}))[-3:]
    assert head.count("|") == ours.count("|") == theirs.count("|") == len(find_lr.HEAD) + 1
    assert "at 1e-2 | `find_lr` | 0.01, 0.02 | 2.0 |" in ours
    assert ours.endswith("| 0 of 2 | 600 |")
    assert theirs.endswith("| 2 of 2 | 100 |")


def test_one_batch_comes_first_and_then_all_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = OneBatchFirst((0, 1))
    first, *others = (task.batch(step, 8, 1000) for step in (0, 1, 999, 1000))
    assert [torch.equal(first, other) for other in others] == [True, True, False]
    with torch.no_grad():
        task.get_parameter("0.bias")[0] = -1e3
    assert task.evaluate()["dead"][0] >= 0.5 > task.evaluate()["dead"][1]
    for kind, steps in ((OneBatchFirst, 4), (DigitsNetwork, 2)):
        monkeypatch.setattr(kind, "steps", steps)
        monkeypatch.setattr(kind, "every", 1)
    monkeypatch.setattr(OneBatchFirst, "alone", 2)
    assert one_batch_first.main(["--logs", str(tmp_path / "runs"), "--seeds", "1"]) == 0
    lines = list(one_batch_first.report(list(read(tmp_path / "runs"))))
    assert len(lines) == 6 + 2 * len(STARTS) + len(GRIDS["AdamW"])


@pytest.mark.parametrize("kind", KINDS)
def test_wrapped_runs_side_by_side_are_those_of_each_by_itself_and_go_on(
    kind: str, tmp_path: Path
) -> None:
    """Those of Muon, which takes matrices alone, so that their parameters are the task's parts."""
    method, few = Peer(name=f"Muon, {kind}"), {"steps": 4, "every": 2, "size": 8}
    tasks: dict[str, type[Task]] = {"few": type("Few", (DigitsNetwork,), few)}
    job = Job(task="few", method=method, starts=(1e-4, 1e-2), seeds=SEEDS)
    together = run(job, tmp_path / "together", tasks=tasks)

    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    def ends(path: Path) -> dict[Any, float]:
        return {(r.start, r.seed): r.series["test.loss"][-1] for r in read(path.parent)}

    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "again", tasks=tasks, progress=interrupt, checkpoint_every=0.0)
    again = run(job, tmp_path / "again", tasks=tasks)
    assert ends(again) == ends(together)
    alone = run(replace(job, starts=(1e-2,), seeds=SEEDS[1:]), tmp_path / "alone", tasks=tasks)
    ((which, loss),) = ends(alone).items()
    assert loss == pytest.approx(ends(together)[which], rel=1e-3)  # products of bfloat16
    lines = "\n".join(wrapped.report([replace(r, task="digits") for r in read(together.parent)]))
    assert "| Muon | " in lines
    assert lines.count("not run") == len(KINDS) - 1


def test_equal_seeds_see_equal_data_and_others_do_not() -> None:
    task = TASKS["digits"]((1, 2, 1))
    batch = task.batch(300, 8, 1000)
    assert torch.equal(batch[0], batch[2])
    assert not torch.equal(batch[0], batch[1])
    assert torch.equal(batch, TASKS["digits"]((1, 2, 1)).batch(300, 8, 1000))
    assert torch.equal(task.get_parameter("0.weight")[0], task.get_parameter("0.weight")[2])


def test_starts_are_those_of_the_runs_in_every_block() -> None:
    shapes = {"a": (2, 3, 4), "b": (2, 3)}
    for blocks in ("scalar", "tensor", "node", "weight", {"one": "a", "two": "b"}):
        partition = side_by_side(blocks)
        sizes = starts_of_blocks(partition, shapes, (1e-3, 1e-5))
        opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), blocks=partition, step_size=sizes)
        state = opt.init({name: np.zeros(shape) for name, shape in shapes.items()})
        for values in opt.step_sizes(state).values():
            first, second = np.asarray(values).reshape(2, -1)
            np.testing.assert_allclose(first, 1e-3, rtol=rounding("float64", 4))
            np.testing.assert_allclose(second, 1e-5, rtol=rounding("float64", 4))


def test_the_drifting_target_changes_one_sign_every_twenty_steps() -> None:
    task = DriftingRegression((0,))
    steps = np.arange(2 * task.period, 12 * task.period)
    examples = [task._examples(int(step)) for step in steps]
    x = np.stack([x[0].numpy() for x, _ in examples]).reshape(10, task.period, -1)
    y = np.stack([y[0].numpy() for _, y in examples]).reshape(10, task.period)
    found = [np.linalg.lstsq(a[:, : task.relevant], b)[0] for a, b in zip(x, y, strict=True)]
    weights = np.round(np.stack(found))
    np.testing.assert_allclose(np.stack(found), weights, atol=1e-5)
    assert np.all(np.abs(weights) == 1)
    assert np.all(np.sum(weights[1:] != weights[:-1], axis=1) == 1)


def test_a_run_may_be_longer_than_its_task() -> None:
    kind = TASKS["drift"]
    task = kind((0,))
    assert np.isfinite(float(task(kind.steps + 5 * 1024)["loss"].detach()))


def test_idbd_of_the_comparison_is_the_preset() -> None:
    task = DriftingRegression((0,))
    steps = updater(idbd(1e-2), task, (0.05,), 30)
    preset = mo.presets.idbd(0.05, 1e-2)
    params = {"weight": np.zeros((1, task.inputs))}
    state = preset.init(params)
    for step in range(30):
        x, y = (
            part.numpy().astype(np.float64) for part in DriftingRegression((0,))._examples(step)
        )
        error = np.sum(x * params["weight"]) - y
        steps.step(step, lambda step=step: task(step))  # type: ignore[misc]
        params, state = preset.step(
            params, {"weight": error * x}, state, hessian_diagonal={"weight": x * x}
        )
    got = task.weight.detach().numpy()
    allowed = rounding("float32", 20, steps=30) * np.max(np.abs(got))
    np.testing.assert_allclose(got, params["weight"], atol=allowed)


def test_jobs_that_differ_have_logs_of_their_own() -> None:
    for task in TASKS:
        jobs = [*comparison(task), *maps(task), *long(task, (0, 1))]
        assert len({job.name for job in jobs}) == len(set(jobs))
    assert all(set(STARTS) >= {1e-7, 1e-3} for _ in GRIDS)


# --- readers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_the_same_from_a_folder_and_from_an_archive(classes: int, tmp_path: Path) -> None:
    write_cifar(tmp_path / "unpacked", classes)
    (tmp_path / "packed").mkdir()
    name = {10: "cifar-10-python.tar.gz", 100: "cifar-100-python.tar.gz"}[classes]
    with tarfile.open(tmp_path / "packed" / name, "w:gz") as archive:
        archive.add(tmp_path / "unpacked" / FOLDERS[classes], FOLDERS[classes])
    one, other = (cifar(tmp_path / kind, classes) for kind in ("unpacked", "packed"))
    first = next(iter(cifar_batches(classes).values()))
    raw = pickle.loads(first)
    assert np.array_equal(one["train"][0][0].numpy().reshape(-1), raw["data"][0])
    assert one["train"][0].shape[1:] == (3, 32, 32)
    for split in ("train", "test"):
        assert torch.equal(one[split][0], other[split][0])
        assert torch.equal(one[split][1], other[split][1])
        assert set(one[split][1].tolist()) == set(range(classes))


def test_coarse_classes_have_five_fine_ones_each(tmp_path: Path) -> None:
    assert np.array_equal(np.bincount(COARSE), [5] * 20)
    people, trees = (2, 11, 35, 46, 98), (47, 52, 56, 59, 96)
    assert [{COARSE[fine] for fine in kind} for kind in (people, trees)] == [{14}, {17}]
    write_cifar(tmp_path, 100)
    fine, found = cifar(tmp_path, 100)["test"], coarse(tmp_path)["test"]
    assert torch.equal(found[0], fine[0])
    assert found[1].tolist() == [COARSE[label] for label in fine[1].tolist()]


def test_wikitext_is_bytes_and_the_same_from_a_folder_and_from_an_archive(tmp_path: Path) -> None:
    write_wikitext(tmp_path / "unpacked")
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / "wikitext-2.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "unpacked" / "wikitext-2", "wikitext-2")
    one, other = (wikitext(tmp_path / kind) for kind in ("unpacked", "packed"))
    for split in ("train", "valid"):
        assert np.array_equal(one[split], other[split])
        written = (tmp_path / "unpacked" / "wikitext-2" / f"{split}.txt").read_bytes()
        assert one[split].tobytes() == written


def test_a_cifar_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path, 100)
    (tmp_path / FOLDERS[100] / "train").write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match="arrays and lists alone; got builtins"):
        cifar(tmp_path, 100)


def test_compact_images_decode_as_the_whole_files_do(tmp_path: Path) -> None:
    expected = write_compact(tmp_path / "cifar10-q95.npz", 10, 32)
    images, labels = jpegs(tmp_path / "cifar10-q95.npz", "train")
    assert np.array_equal(images, expected)
    assert np.array_equal(labels, np.arange(20) % 10)
    read, _ = cifar(tmp_path, 10)["train"]
    assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), expected)


def test_imagenet_from_folders(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    sets = image_sets(tmp_path)
    assert (len(sets["train"]), len(sets["test"]), sets["train"].classes) == (8, 8, 2)
    picture, label = sets["train"][(0, 3, 5)]
    assert (tuple(picture.shape), picture.dtype, label) == ((3, 224, 224), torch.float32, 1)
    assert torch.equal(picture, sets["train"][(0, 3, 5)][0])
    assert not torch.equal(picture, sets["train"][(0, 4, 5)][0])
    assert torch.equal(sets["test"][(0, 0, 5)][0], sets["test"][(1, 1, 5)][0])


def test_stories_from_tokens(tmp_path: Path) -> None:
    write_stories(tmp_path)
    train, test, vocabulary = stories(tmp_path)
    assert (len(train), len(test), vocabulary) == (800, 400, 32_000)
    assert np.array_equal(test, np.fromfile(tmp_path / "data00.bin", dtype=np.uint16))


@pytest.mark.parametrize(
    ("read", "named"),
    [
        (lambda folder: cifar(folder, 10), "cifar-10-python.tar.gz"),
        (lambda folder: cifar(folder, 100), "cifar100-jpeg.npz"),
        (image_sets, "train/ and val/"),
        (stories, "data00.bin"),
        (lambda folder: TASKS["characters"]((0,), data=folder), "tinyshakespeare.txt"),  # type: ignore[call-arg]
        (lambda folder: TASKS["residual"]((0,), data=folder), "cifar100-jpeg.npz"),  # type: ignore[call-arg]
        (lambda folder: TASKS["finetuning"]((0,), data=folder), "cifar100-jpeg.npz"),  # type: ignore[call-arg]
        (lambda folder: TASKS["bytes"]((0,), data=folder), "wikitext-2.tar.xz"),  # type: ignore[call-arg]
    ],
)
def test_what_is_missing_is_named(read: Callable[[Any], Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=named):
        read(tmp_path)
    with pytest.raises(DataMissingError, match="`--data` must be the folder with the data sets"):
        read(None)


# --- what runs are said to have done -------------------------------------------------------------


def of_digits(accuracy: tuple[float, ...], loss: tuple[float, ...]) -> Result:
    return Result(
        "digits",
        METHODS[0],
        1e-3,
        0,
        3000,
        tuple(range(0, 25 * len(accuracy), 25)),
        {"test.accuracy": accuracy, "test.loss": loss},
    )


def test_a_run_has_arrived_diverged_or_lost_what_it_had() -> None:
    kind = TASKS["digits"]
    good = of_digits((0.1, 0.96, 0.97), (2.3, 0.2, 0.1))
    lost = of_digits((0.1, 0.96, 0.4), (2.3, 0.2, 2.0))
    worse = of_digits((0.1, 0.2, 0.1), (2.3, 2.2, 9.0))
    broken = of_digits((0.1, 0.96, 0.97), (2.3, float("nan"), 0.1))
    assert [run.steps_to_target(kind) for run in (good, lost, worse)] == [25, 25, None]
    assert [run.lost(kind) for run in (good, lost, worse)] == [False, True, False]
    assert [run.diverged(kind) for run in (good, lost, worse, broken)] == [False, False, True, True]
    assert good.judged(kind) == 0.97
    (cell,) = cells([good, replace(worse, seed=1)], kind)
    assert (cell.seeds, cell.diverged, cell.mean) == (2, 1, float("-inf"))
    assert cell.spread == 0.0, "of the one that did not diverge"
    (one,), (other,) = cells([good], kind), cells([lost], kind)
    assert one.better_than(other)


def test_a_run_that_is_in_two_logs_counts_once() -> None:
    kind, one = TASKS["digits"], of_digits((0.1, 0.96), (2.3, 0.2))
    other = replace(one, seed=1)
    assert [cell.results for cell in cells([one, other, replace(one)], kind)] == [(one, other)]


def test_cells_are_kept_and_added_to(tmp_path: Path) -> None:
    """What a folder of results holds stays, also where the logs that it was made of are gone."""
    kind, path = TASKS["digits"], tmp_path / "learning.jsonl.xz"
    run_ = replace(of_digits((0.1, 0.96), (2.3, 0.2)), sizes={"all": (1e-3, 2e-3)})
    method = Method(base="AdamW", meta="fast Adam", bounds=(1e-6, 1.0), weight_decay=0.0)
    results = [run_, replace(run_, seed=1), replace(run_, method=method, made_with=("a commit",))]
    results += [replace(run_, method=Peer(name="DoG"), series={"test.loss": (1.0, float("nan"))})]
    results[-1].series["test.accuracy"] = (0.1, 0.1)
    before = cells(results, kind)
    assert list(kept(path, TASKS)) == []
    keep({"digits": before}, path)
    assert list(kept(path, TASKS)) == before

    fewer = cells([replace(run_, made_with=("a later commit",))], kind)
    assert merged(before, fewer) == before
    again = cells([replace(one, made_with=("a later commit",)) for one in results[:2]], kind)
    assert merged(before, again) == [*again, *before[1:]]
    assert merged(before, cells([replace(run_, start=0.5)], kind))[:-1] == before


def test_clipped_meta_gradients_are_at_most_what_they_were() -> None:
    rule, slots = Clipped(mo.SGD(), beta=0.5), {"mean_sq": torch.zeros(2)}
    seen = []
    for count, grad in enumerate(([1.0, -3.0], [0.5, -6.0], [-4.0, 1.0]), start=1):
        direction, slots = rule.direction(torch.tensor(grad), slots, torch.tensor(float(count)))
        seen.append(direction.tolist())
    # means of squares, weighed by halves: 1 and 9; (1 + 2 * 0.25) / 3 = 0.5 and (9 + 72) / 3 = 27
    assert seen[:2] == [[1.0, -3.0], [0.5, -3.0]]
    assert seen[2] == pytest.approx([-(0.5**0.5), 1.0])


def test_offsets_that_stand_still_leave_one_step_size(tmp_path: Path) -> None:
    """And those that move differ from it, for each run by itself."""
    starts = (1e-5, 1e-3)

    def sizes(meta: Any, blocks: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        monkeypatch.setitem(METAS, "tried", meta)
        method = Method(base="AdamW", meta="tried", meta_lr=1e-2, blocks=blocks)
        job = Job(task="digits", method=method, starts=starts, seeds=SEEDS, steps=25)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        last = json.loads(run(job, folder).read_text().splitlines()[-2])
        return list(last["step_sizes"].values())

    with pytest.MonkeyPatch.context() as patch:
        ((*one,),) = sizes(mo.AdamW(), "scalar", patch)
        still = sizes(Offsets(mo.AdamW(), part=0.0), "tensor", patch)
        moving = sizes(Offsets(mo.AdamW(), part=0.5), "tensor", patch)
    assert len(still) == len(moving) == 6
    for leaf in still:
        assert leaf == pytest.approx(one, rel=1e-5)
    assert all(leaf != pytest.approx(one, rel=1e-2) for leaf in moving)


def test_goals_are_held_against_the_worst_start() -> None:
    def cell(task: str, method: Method | Peer, mean: float, start: float = 1.0) -> Cell:
        run_ = replace(of_digits((0.5,), (1.0,)), method=method, start=start)
        (found,) = cells([run_], TASKS["digits"])
        diverged = int(mean == float("inf"))
        return replace(found, kind=TASKS[task], mean=mean, diverged=diverged)

    def table(task: str, fixed: float, cosine: float, peer: float, found: Any) -> list[Cell]:
        return [
            cell(task, Method(base="AdamW"), fixed, 1e-2),
            cell(task, Method(base="AdamW"), 0.5, 1e-1),
            cell(task, Method(base="AdamW", schedule="cosine"), cosine, 1e-1),
            cell(task, Peer(name="DoG"), peer),
            cell(task, Peer(name="Prodigy"), peer),
            *(cell(task, SCHEDULED, *one) for one in zip(found, STARTS, strict=True)),
        ]

    def ends(lines: Any) -> list[str]:
        return [line.split("|", 3)[3].strip() for line in lines if SCHEDULED.label in line]

    better = {"digits": table("digits", 0.97, 0.9835, 0.97, (0.98, 0.981, 0.979, 0.99, 0.99))}
    assert ends(misses(better)) == ["|  |  |  |"]
    assert "| a known length | 97.9% to 99.0% |  |  |  |  |" in "\n".join(advised(better))
    worse = {"digits": table("digits", 0.97, 0.98, 0.975, (0.98, 0.96, 0.99, 0.99, 0.99))}
    assert ends(misses(worse)) == ["| 1.0 | 2.0 | 1.5 (DoG) |"]
    losses = {"drift": table("drift", 0.4, 0.3, 0.2, (0.302, 0.3, 0.3, 0.3, 0.3))}
    assert ends(misses(losses)) == ["|  |  | 51.0% (DoG) |"]
    gone = float("inf")
    diverged = {"drift": table("drift", 0.4, 0.3, 0.2, (0.3, gone, 0.3, gone, 0.3))}
    assert ends(misses(diverged)) == ["2 | diverged | diverged | diverged (DoG) |"]
    untold = {"digits": better["digits"][5:]}
    assert ends(misses(untold)) == ["| not run | not run | not run |"]
    lion = Method(base="Lion")
    of_another = {"digits": [*better["digits"], cell("digits", lion, 1.0)]}
    assert ends(misses(of_another)) == ends(misses(better)), "another base's best is no goal"
    same = {"digits": table("digits", 0.9794, 0.9, 0.9, (0.98, 0.981, 0.979, 0.99, 0.99))}
    assert ends(misses(same)) == ["|  |  |  |"], "0.04 points are none"
    of_five = table("cifar10", 0.5, 0.5, 0.5, (0.5,) * 5)
    large = {"cifar10": [*of_five[:5], *of_five[5::2]]}
    assert ends(misses(large)) == ["|  |  |  |"], "large tasks have three starts"
    fewer = {"digits": [*better["digits"][:8], better["digits"][9]]}
    assert not ends(misses(fewer)), "not run from all starts"
    assert list(advised(fewer)) == []
    first, second = better["digits"][3:5]
    assert best_of([first, second]) is worst_of([first, second]) is first


def test_online_tasks_are_judged_by_their_second_half() -> None:
    run_ = Result(
        "drift",
        METHODS[0],
        1e-3,
        0,
        40,
        (0, 10, 20, 30, 40),
        {"train.loss": (float("nan"), 8.0, 6.0, 3.0, 1.0)},
    )
    assert run_.judged(DriftingRegression) == 2.0
    assert not run_.diverged(DriftingRegression)


def test_weights_that_stand_still_while_the_target_shifts_have_not_diverged() -> None:
    ends = {
        loss: Result("shifts", METHODS[0], 1e-3, 0, 2, (0, 1, 2), {"train.loss": (4.0, 4.0, loss)})
        for loss in (20.0, 400.0)
    }
    assert [run.diverged(TASKS["shifts"]) for run in ends.values()] == [False, True]
    assert ends[20.0].diverged(DriftingRegression)


def test_logs_are_read_as_they_were_written(tmp_path: Path) -> None:
    method = Method(base="AdamW", meta="Adam", bounds=(1e-6, 1e-1))
    job = Job(task="short", method=method, starts=(1e-3, 1e-2), seeds=SEEDS)
    run(job, tmp_path, tasks={"short": Short})
    found = cells(read(tmp_path), Short)
    assert [(cell.method, cell.start) for cell in found] == [(method, 1e-3), (method, 1e-2)]
    assert [cell.seeds for cell in found] == [2, 2]
    (first, *_), _ = found[0].results, found
    assert first.at == (0, 5, 10, 12)
    assert first.sizes["all"][0] == 1e-3


@pytest.mark.parametrize(("classes", "file"), [(10, "cifar10-q95.npz"), (100, "cifar100-jpeg.npz")])
def test_the_compact_files_hold_all_images(classes: int, file: str) -> None:
    folder = os.environ.get("METAOPT_DATA")
    if folder is None or not (Path(folder) / file).is_file():
        pytest.skip(f"METAOPT_DATA must name a folder with {file}")
    sets = cifar(Path(folder), classes)
    assert {split: tuple(images.shape) for split, (images, _) in sets.items()} == {
        "train": (50_000, 3, 32, 32),
        "test": (10_000, 3, 32, 32),
    }
    for _, labels in sets.values():
        assert len(set(np.bincount(labels.numpy()))) == 1
        assert len(np.unique(labels.numpy())) == classes
