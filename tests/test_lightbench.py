"""`benchmarks/lightbench.py`, on tasks that stand in for those of the package."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from benchmarks import lightbench  # noqa: E402
from benchmarks.training import wrapped  # noqa: E402

#: As typer has the default of an option.
DTYPE = SimpleNamespace(default="float64")
OURS = ("metaopt", "AdamW 1e-3", "AdamW 1e-1", "Muon", "Muon, wrapped")


class Bowl(nn.Module):
    """Squares of a vector, with noise in them where that is asked for, on "cuda"."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.param, self.noise = nn.Parameter(torch.ones(3)), noise

    def forward(self) -> Any:
        return (self.param + self.noise * torch.randn(3, device="cuda")).square().mean()


def module(name: str, noise: float, fails: bool = False) -> ModuleType:
    """Return a task as the package has them: its `main` hands it to `trial`."""
    made: Any = ModuleType(f"lightbench.{name}")
    made.configs = {"trivial": {}, "hard": {}}

    def main(dtype: Any = DTYPE, steps: int = 10, config: str | None = None) -> None:
        assert config == "trivial"
        assert not fails
        model = Bowl(noise).cuda()
        made.trial(model, None, None, lambda _, loss: (loss < 0.25, {}), steps, dtype=dtype)

    made.main, made.trial = main, None
    return made


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [module("still", 0.0), module("noisy", 0.01), module("broken", 0.0, fails=True)]
    root: Any = ModuleType("lightbench")
    root.available = lambda: ["MNIST", "still", "noisy", "broken"]
    monkeypatch.setitem(sys.modules, "lightbench", root)
    for one in found:
        monkeypatch.setitem(sys.modules, one.__name__, one)
    methods = {name: lightbench.METHODS[name] for name in OURS}
    monkeypatch.setattr(lightbench, "METHODS", methods)
    monkeypatch.setattr(lightbench, "STEPS", 60)


@pytest.mark.usefixtures("package")
def test_a_run_goes_on_where_it_was_and_says_what_was_solved(tmp_path: Path) -> None:
    assert lightbench.tasks() == [(name, "trivial") for name in ("still", "noisy", "broken")]
    lightbench.train(tmp_path / "lightbench.jsonl", 0.0)  # no time but for what tasks cost
    assert len((tmp_path / "lightbench.jsonl").read_text().splitlines()) == 3
    assert lightbench.main(["--logs", str(tmp_path), "--report"]) == 0  # of nothing yet
    assert lightbench.main(["--logs", str(tmp_path), "--output", str(tmp_path)]) == 0
    log = (tmp_path / "lightbench.jsonl").read_text()
    assert len(log.splitlines()) == 3 + len(OURS) * (1 + len(lightbench.SEEDS))
    lightbench.train(tmp_path / "lightbench.jsonl", 1.0)
    assert (tmp_path / "lightbench.jsonl").read_text() == log
    page = (tmp_path / "lightbench.md").read_text()
    rows = {row.split("|")[1].strip(): row for row in page.splitlines() if row.startswith("| ")}
    assert "| 0 of 4 | 0 of 2 | - |" in rows["AdamW 1e-3"]
    assert "| 4 of 4 | 2 of 2 |" in rows["AdamW 1e-1"]
    assert rows["noisy trivial"].startswith("| noisy trivial | 3 | ")
    assert "fails (broken trivial)" in page


def test_a_report_needs_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lightbench.main(["--logs", str(tmp_path), "--report"])
    assert "there are no runs to report: no lightbench.jsonl in" in capsys.readouterr().err


@pytest.mark.usefixtures("package")
def test_a_task_that_takes_no_time_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightbench, "cost", lambda *_: {"cost": 0.0, "seeds": (0,)})
    monkeypatch.setattr(lightbench, "tasks", lambda: [("still", "trivial")])
    assert lightbench.main(["--logs", str(tmp_path), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "lightbench.md").read_text()
    assert "1 of the 1 tasks" in page
    assert "1 of 1 pairs of task and seed" in page


@pytest.mark.usefixtures("package")
def test_a_run_follows_from_its_seed_and_is_of_the_tasks_dtype() -> None:
    task = lightbench.problem("noisy", "trivial", 0)
    assert task.model.param.dtype == torch.float64
    one, again, other = (
        lightbench.run("noisy", "trivial", "AdamW 1e-3", seed, 5)["loss"] for seed in (0, 0, 1)
    )
    assert one == again != other


def test_muon_is_for_matrices_alone() -> None:
    matrix, vector = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,)))
    make = wrapped.INNER["Muon"]
    assert set(make([("m", matrix), ("v", vector)], 0.0)) == {"matrices", "others"}
    assert set(make([("m", matrix)], 0.0)) == {"matrices"}
    assert set(make([("v", vector)], 0.0)) == {"others"}
