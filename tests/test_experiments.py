"""`benchmarks/learning.py` and `reproduce.py`: every experiment starts, on made-up data."""

import json
import lzma
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import torch

import metaopt as mo
from benchmarks import learning, meta_parameters, reproduce
from benchmarks.paper.images import Cifar10, ImageNet
from benchmarks.paper.language import TinyStories
from benchmarks.paper.resnet import GROUPS, ResNet18
from benchmarks.paper.settings import EXPERIMENTS, PAPER_TASKS, runs
from benchmarks.training.loop import Job, run
from benchmarks.training.methods import Method
from benchmarks.training.studies import JUDGING
from benchmarks.training.tasks import TASKS, Measures, Task
from tests.made_up_data import write_cifar, write_imagenet, write_stories, write_wikitext

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tiny data sets in their standard distributions."""
    folder = tmp_path_factory.mktemp("data")
    for classes in (10, 100):
        write_cifar(folder, classes)
    write_imagenet(folder)
    write_stories(folder)
    write_wikitext(folder)
    letters = np.random.default_rng(0).choice(list("abcdefgh \n"), size=4000)
    with lzma.open(folder / "tinyshakespeare.txt.xz", "wt", encoding="utf-8") as file:
        file.write("".join(letters))
    return folder


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CIFAR-100 have as many steps as the made-up images, and little come before a run."""
    monkeypatch.setattr(TASKS["continual-as-released"], "steps", 100)
    monkeypatch.setattr(TASKS["finetuning"], "before", 2)


@pytest.mark.parametrize("released", [False, True], ids=["as printed", "as released"])
@pytest.mark.parametrize("experiment", tuple(EXPERIMENTS))
@pytest.mark.usefixtures("few_steps")
def test_each_experiment_runs_a_few_steps(
    experiment: str, released: bool, data: Path, tmp_path: Path
) -> None:
    arguments = [experiment, "--smoke", "--data", str(data), "--logs", str(tmp_path)]
    reproduce.main([*arguments, *(["--released"] if released else []), "--threads", "1"])
    logs = list(tmp_path.glob("*.jsonl"))
    assert logs
    wanted = {
        job.name
        for job in runs(experiment, released=released, smoke=True)
        if isinstance(job.method, Method)
    }
    assert wanted <= {log.stem for log in logs}
    for log in logs:
        head, *entries, end = (json.loads(line) for line in log.read_text().splitlines())
        assert head["job"]["smoke"]
        assert end == {"finished": True}
        assert entries[-1]["step"] == 2
        assert np.all(np.isfinite(entries[-1]["train"]["loss"]))


@pytest.mark.usefixtures("few_steps")
def test_the_comparison_runs_a_few_steps(data: Path, tmp_path: Path) -> None:
    arguments = ["--smoke", "--data", str(data), "--logs", str(tmp_path)]
    tasks = ("drift", "logistic", "characters", *JUDGING)
    for task in tasks:
        learning.main(["compare", "--task", task, *arguments])
    for study in ("maps", "long"):
        learning.main([study, "--task", "drift", *arguments])
    assert {path.name.split("-")[0] for path in tmp_path.glob("*.jsonl")} == set(tasks)


def test_without_data_tasks_are_left_out_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "--task", "cifar10", "--smoke", "--logs", str(tmp_path)]
    assert learning.main(arguments) > 0
    assert "is left out. `--data` must be the folder with the data sets" in " ".join(
        capsys.readouterr().out.split()
    )


def test_jobs_are_shared_out_between_processes(data: Path, tmp_path: Path) -> None:
    arguments = ["continual-cifar100", "--smoke", "--data", str(data), "--threads", "1"]
    for part in ("0/2", "1/2"):
        reproduce.main([*arguments, "--part", part, "--logs", str(tmp_path / part[0])])
    halves = [{log.name for log in (tmp_path / half).glob("*.jsonl")} for half in "01"]
    assert halves[0].isdisjoint(halves[1])
    whole = {f"{job.name}.jsonl" for job in runs("continual-cifar100", smoke=True)}
    assert halves[0] | halves[1] == whole


@pytest.mark.parametrize("task", ["cifar10-resnet18", "imagenet", "tinystories"])
def test_a_network_goes_on_where_it_was(task: str, data: Path, tmp_path: Path) -> None:
    kind = PAPER_TASKS[task]

    def forward(self: Task, step: int) -> Measures:
        if step == 3:
            raise KeyboardInterrupt
        return kind.forward(self, step)

    killed = type("Killed", (kind,), {"forward": forward})
    method = Method(base="AdamW", meta="Lion")
    job = Job(task=task, method=method, starts=(1e-3,), seeds=(0,), steps=5, smoke=True)
    whole = run(job, tmp_path / "whole", data=data, tasks=PAPER_TASKS)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, data=data, tasks={task: killed}, checkpoint_every=0.0)
    run(job, tmp_path, data=data, tasks=PAPER_TASKS)
    kept = []
    for folder in (tmp_path, tmp_path / "whole"):
        lines = (folder / whole.name).read_text().splitlines()
        kept.append([{**json.loads(line), "seconds": None} for line in lines])
    assert kept[0] == kept[1]


def test_resnet_has_the_blocks_of_the_paper() -> None:
    named = {f"network.{name}": p for name, p in ResNet18(10, large=False).named_parameters()}
    blocks = mo.blocks.named(GROUPS).bind({name: tuple(p.shape) for name, p in named.items()})
    counts = {key: 0 for key in blocks.families}
    for family in blocks.family_of.values():
        counts[family] += 1
    assert list(counts.values()) == [3, 12, 15, 15, 15, 2]
    assert sum(p.numel() for p in named.values()) == 11_173_962


def test_the_language_model_has_fifteen_million_parameters(data: Path) -> None:
    task = TinyStories((0,), data=data)
    assert sum(param.numel() for param in task.parameters()) == 15_191_712


def test_a_token_is_predicted_from_those_before_it(data: Path) -> None:
    task = TinyStories((0,), data=data, smoke=True)
    tokens = torch.arange(20).reshape(1, 20)
    changed = tokens.clone()
    changed[0, 12:] += 7
    with torch.no_grad():
        scores, others = task.network(tokens), task.network(changed)
    assert torch.equal(scores[:, :12], others[:, :12])
    assert not torch.equal(scores[:, 12:], others[:, 12:])


def test_lengths_are_those_of_the_paper() -> None:
    assert (Cifar10.steps, Cifar10.size) == (30_000, 100)
    assert (TinyStories.steps, ImageNet.steps // 90) == (30_000, 5004)
    assert TASKS["continual"].steps == 50_000


def test_released_settings_act_ten_times_larger_for_adam() -> None:
    found = {
        (job.method.base, job.method.meta): (job.starts[0], job.method)
        for job in runs("cifar10", released=True)
        if isinstance(job.method, Method) and job.method.blocks == "scalar"
    }
    start, method = found["AdamW as released", "Adam as released"]
    assert (start, method.meta_lr, method.weight_decay) == (1e-5, 1e-2, 0.01)
    start, method = found["Lion", "Lion"]
    assert (method.meta_lr, method.weight_decay) == (1e-3, 0.1)


def test_a_report_shows_what_was_run_and_says_what_was_not(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = TASKS["drift"]
    monkeypatch.setattr(kind, "steps", 40)
    monkeypatch.setattr(kind, "every", 10)
    starts = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
    for meta_lr in (1e-3, 3e-3, 1e-2):
        method = Method(base="AdamW", meta="Adam", meta_lr=meta_lr)
        job = Job(task="drift", method=method, starts=(*starts, 1e-8), seeds=(0, 1))
        run(job, tmp_path)
    fixed = Job(task="drift", method=Method(base="AdamW"), starts=(1e-3, 1e-2), seeds=(0, 1))
    run(fixed, tmp_path)
    output = tmp_path / "made"
    learning.main(["report", "--logs", str(tmp_path), "--output", str(output)])
    summary = (output / "learning.md").read_text()
    assert "| AdamW, best fixed step size: 1e-2 |" in summary
    assert "| (AdamW, Adam), scalar, meta_lr 0.01 |" in summary
    assert "not run" in summary.split("## Where it falls short")[1]
    everything = (output / "learning_drift.md").read_text()
    assert everything.count("\n| (AdamW, Adam)") == 10, "a meta_lr and a start are of maps alone"
    assert (output / "map_drift.png").stat().st_size > 1000
    assert "Runs were made with commit" in summary
    assert "learning_starts.png" not in summary
    fast = Method(base="AdamW", meta="fast Adam", meta_lr=1e-2, discount=0.99)
    run(Job(task="drift", method=fast, starts=starts, seeds=(0, 1)), tmp_path)
    learning.main(["report", "--logs", str(tmp_path), "--output", str(output)])
    assert "learning_starts.png" in (output / "learning.md").read_text()
    assert (output / "learning_starts.png").stat().st_size > 1000

    monkeypatch.setattr("benchmarks.training.report.LONG_STEPS", 80)
    run(replace(fixed, steps=80), tmp_path)
    learning.main(["report", "--logs", str(tmp_path), "--output", str(output)])
    assert "| AdamW, best fixed step size: 1e-" in (output / "learning_long.md").read_text()

    monkeypatch.setattr(TASKS["continual"], "steps", 100)
    job = next(iter(runs("continual-cifar100")))
    run(job, tmp_path, data=data)
    reproduce.main(["report", "--logs", str(tmp_path), "--output", str(output)])
    page = (output / "paper_continual-cifar100.md").read_text()
    assert "| AdamW, fixed, weight decay 0.1 | 1e-5 |  | not run |" in page
    shown = next(line for line in page.splitlines() if line.startswith(f"| {job.method.label} |"))
    assert "%" in shown
    assert "not run" not in shown
    assert (output / "paper_continual-cifar100.png").stat().st_size > 1000
    listed = (output / "paper.md").read_text()
    assert "| continual-cifar100 | [results](paper_continual-cifar100.md) | not run |" in listed
    assert "| imagenet | not run | not run |" in listed

    learning.main(["report", "--logs", str(tmp_path), "--output", str(output)])
    made = {path.name: path.read_bytes() for path in output.iterdir()}
    nothing = tmp_path / "nothing"
    learning.main(["report", "--logs", str(nothing), "--output", str(output)])
    reproduce.main(["report", "--logs", str(nothing), "--output", str(output)])
    assert {path.name: path.read_bytes() for path in output.iterdir()} == made, "results stay"


@pytest.mark.parametrize("name", ["noisy", "drift", "finetuning"])
def test_what_is_learned_is_held_against_grids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = meta_parameters.TASKS[name]
    monkeypatch.setattr(meta_parameters, "SEEDS", range(1))
    lines = meta_parameters.section(name, lambda seed: replace(make(seed), steps=30))
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in lines if "|" in line}
    assert any(row.startswith("step size; best weight decay of 0, 0.01, 0.1, 1: ") for row in rows)
    *_, decay, first, second = rows["and weight decay and betas, held out"]
    assert float(decay) != meta_parameters.DECAY, "it is learned"
    assert (float(first), float(second.removesuffix(" |"))) != meta_parameters.BETAS
    assert rows["step size"][-3:] == ["", "", " |"], "numbers that are not learned are not shown"


def test_a_page_keeps_the_parts_of_tasks_that_are_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "meta_parameters.md"

    def run(task: str, result: str) -> list[str]:
        # where pages are made in the process of the test
        monkeypatch.setattr(meta_parameters, "ProcessPoolExecutor", ThreadPoolExecutor)
        monkeypatch.setattr(
            meta_parameters, "section", lambda name, _: [f"## {name.capitalize()}", "", result]
        )
        monkeypatch.setattr(meta_parameters, "times", lambda: iter([f"taken with {task}"]))
        meta_parameters.main(["--task", task, "--output", str(tmp_path)])
        return [line for line in page.read_text().splitlines() if line][2:]

    first = run("drift", "as it was")
    assert first[:2] == ["## Drift", "as it was"]
    both = run("noisy", "new")
    assert both[:4] == ["## Noisy", "new", "## Drift", "as it was"]
    assert both[-1] == "taken with noisy"
    assert run("drift", "other")[:4] == ["## Noisy", "new", "## Drift", "other"]
    assert [path.name for path in tmp_path.iterdir()] == ["meta_parameters.md"]
