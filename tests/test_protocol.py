"""The protocol of scored runs, and the numbers that sum up many tasks."""

import itertools
import json
import math
import statistics
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from benchmarks import learning, protocol
from benchmarks.training import profile
from benchmarks.training.cells import Cell
from benchmarks.training.defaults import configuration, digest
from benchmarks.training.loop import Job, run
from benchmarks.training.methods import Method, Peer
from benchmarks.training.results import archive
from benchmarks.training.studies import DEFAULT, GRIDS, comparison
from benchmarks.training.tasks import TASKS


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    """Return a file in which all is as it is now, outside of any repository."""
    path = tmp_path / "frozen.json"
    assert protocol.main(["--freeze", "--file", str(path)]) == 0
    return path


def test_what_is_frozen_is_the_call_without_options_and_comes_back(frozen: Path) -> None:
    content = json.loads(frozen.read_text())
    assert content["configuration"]["discount"] == [0.99, 1.0]
    assert set(content["scored"]).isdisjoint(content["calibration"])
    assert protocol.main(["--file", str(frozen)]) == 0


@pytest.mark.parametrize("changed", ["configuration", "scored", "search"])
def test_scored_runs_are_refused_where_something_is_not_as_it_was(
    changed: str, frozen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changed == "configuration":
        other = protocol.current()[changed] | {"held_out": True}
        monkeypatch.setattr(protocol, "configuration", lambda: other)
    elif changed == "scored":
        monkeypatch.setattr(TASKS["adding"], "target", 1.0)
    else:
        monkeypatch.setitem(GRIDS, "AdamW", (1e-3,))
    with pytest.raises(protocol.ProtocolError, match=rf"{changed}\b.* what frozen.json has"):
        protocol.check(frozen=frozen)
    assert protocol.main(["--file", str(frozen)]) == 1


def test_scored_runs_are_refused_before_the_file_is_committed(frozen: Path) -> None:
    def git(*words: str) -> None:
        settings = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(frozen.parent), *settings, *words]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    with pytest.raises(protocol.ProtocolError, match="is not committed"):
        protocol.check(frozen=frozen)
    git("add", frozen.name)
    git("commit", "-m", "frozen")
    protocol.check(frozen=frozen)
    frozen.write_text(frozen.read_text() + "\n")
    with pytest.raises(protocol.ProtocolError, match="is not committed"):
        protocol.check(frozen=frozen)


def test_scored_runs_are_refused_with_few_seeds_and_without_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(protocol.ProtocolError, match="nothing is frozen"):
        protocol.check(frozen=tmp_path / "frozen.json")
    with pytest.raises(SystemExit):
        learning.main(["compare", "--task", "adding", "--seeds", "3", "--logs", str(tmp_path)])
    assert "adding: scored runs are made with 5 seeds; got 3" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tries", [1, 2, 3, 5, 9])
def test_the_expected_best_is_the_mean_over_all_choices(tries: int) -> None:
    values = [0.3, -1.0, 2.0, 0.3, 5.0]
    chosen = itertools.combinations(values, min(tries, len(values)))
    want = statistics.fmean(map(max, chosen))
    assert profile.expected_best(values, tries) == pytest.approx(want, rel=1e-12)


def test_a_profile_counts_tasks_and_its_score_is_its_mean() -> None:
    ratios = [1.0, 1.5, 2.0, 8.0, math.inf]
    assert [profile.profile(ratios, tau) for tau in (1.0, 1.9, 2.0, 4.0)] == [0.2, 0.4, 0.6, 0.6]
    taus = [1.0 + 3.0 * (step + 0.5) / 3000 for step in range(3000)]
    mean = statistics.fmean(profile.profile(ratios, tau) for tau in taus)
    assert profile.score(ratios) == pytest.approx(mean, abs=1e-3)


def cell(method: Any, start: float, mean: float, arrivals: tuple[float, ...], **more: Any) -> Cell:
    made = Cell(
        kind=TASKS["adding"],
        method=method,
        start=start,
        steps=TASKS["adding"].steps,
        precision="fp32",
        seeds=5,
        mean=mean,
        spread=0.0,
        diverged=0,
        lost=0,
        arrivals=arrivals,
        final_sizes=None,
        made_with=(),
    )
    return replace(made, **more)


FIXED, COSINE = Method(base="AdamW"), Method(base="AdamW", schedule="cosine")
TABLE = [
    cell(DEFAULT, 1e-8, 0.02, (40.0, 50.0, 60.0, 70.0, 80.0)),
    cell(DEFAULT, 1e-2, 0.01, (10.0, 10.0, 10.0, 10.0, 10.0)),
    cell(FIXED, 1e-3, 0.03, (90.0,)),
    cell(FIXED, 1e-2, 0.01, (30.0, 30.0, 30.0, 30.0, 30.0)),
    cell(FIXED, 1e-1, math.inf, (), diverged=5),
    cell(COSINE, 1e-2, 0.005, (50.0, 60.0, 75.0, 90.0, 95.0)),
    cell(Peer(name="Prodigy"), 1.0, 0.02, (20.0, 20.0, 20.0, 20.0, 20.0), lost=3),
]


def test_ours_is_judged_at_its_worst_start_and_what_is_tuned_at_its_best_try() -> None:
    found = profile.times({"adding": TABLE})
    assert {name: own["adding"] for name, own in found.items()} == {
        "metaopt, worst start": 60.0,
        "AdamW, best fixed": 30.0,
        "AdamW, best cosine": 75.0,
        "AdamW, untuned": math.inf,
        "Prodigy": math.inf,  # most of its runs went away again
    }
    assert profile.rows({"adding": TABLE})["metaopt, worst start"].ratios == [2.0]
    assert profile.times({"adding": TABLE[:2]}) == {}


def test_the_earliest_arrivals_are_taken_for_those_that_were_lost() -> None:
    assert profile.time_of(cell(FIXED, 1.0, 0.1, (1.0, 2.0, 3.0, 4.0, 5.0), lost=1)) == 4.0
    assert profile.time_of(cell(FIXED, 1.0, 0.1, (1.0, 2.0, 3.0), diverged=2)) == math.inf


def test_tries_that_diverged_count_as_the_worst_that_did_not() -> None:
    tries = [part for part in TABLE if part.method in (FIXED, COSINE)]
    want = statistics.fmean([0.03, 0.01, 0.03, 0.005])
    assert profile.best_of_tries(tries, 1) == pytest.approx(want)
    assert profile.best_of_tries(tries, 25) == 0.005


def test_the_page_has_all_of_it_and_is_drawn(tmp_path: Path) -> None:
    tables = {"adding": TABLE}
    page = "\n".join(profile.report(tables))
    assert "| metaopt, worst start | 0.67 | 0% | 0% | 100% | 100% | 2.00 | 1 of 1 |" in page
    assert "| Prodigy | 0.00 | 0% | 0% | 0% | 0% | 4.00 | 1 of 1 | 0 of 5 | 3 |" in page
    assert "| geometric mean of 1 | AdamW, fixed and cosine | |" in page
    profile.picture(tables, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 1000


def test_odd_results_are_shown_as_they_are() -> None:
    def page(table: list[Cell]) -> str:
        return "\n".join(profile.report({"adding": table}))

    at_once = [replace(one, arrivals=(0.0,) * len(one.arrivals)) for one in TABLE]
    assert profile.rows({"adding": at_once})["AdamW, best cosine"].ratios == [1.0]
    assert "| metaopt, worst start | 1.00 |" in page(at_once)
    lost = [replace(one, mean=math.inf, diverged=5, arrivals=()) for one in TABLE]
    assert "| AdamW, fixed and cosine | 4 | diverged | diverged | diverged |" in page(lost)
    assert "geometric mean of" not in page(lost).split("###")[1]
    whole = page([*TABLE[:-1], replace(TABLE[-1], mean=0.0)])
    assert "| peers | 1 | 0 | 0 | 0 |" in whole
    assert "| geometric mean of 1 | peers |" not in whole
    assert "| geometric mean of 1 | AdamW, fixed and cosine |" in whole
    for none in ([], TABLE[:2]):
        assert "There is no task yet with results" in page(none)
        assert "profile.png" not in page(none)


def test_logs_of_scored_runs_are_kept_whole_and_added_to(tmp_path: Path) -> None:
    def log(name: str, *lines: dict[str, Any]) -> None:
        (tmp_path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def kept() -> dict[str, list[str]]:
        with tarfile.open(path) as file:
            members = {member.name: file.extractfile(member) for member in file}
            return {
                name: part.read().decode().splitlines() for name, part in members.items() if part
            }

    def unlike(path: Path, task: str) -> str | None:
        assert task == "adding"
        return "it is short" if path.stem == "adding-short" else None

    path = tmp_path / "scored_adding.tar.xz"
    assert archive(tmp_path, "adding", path, unlike) == []
    assert not path.exists()
    log("adding-one.jsonl", {"step": 1}, {"finished": True})
    log("adding-two.jsonl", {"step": 1})
    log("drift-one.jsonl", {"step": 1}, {"finished": True})
    log("adding-short.jsonl", {"finished": True})
    left_out = ["adding-short.jsonl is not archived: it is short."]
    assert archive(tmp_path, "adding", path, unlike) == left_out
    assert list(kept()) == ["adding-one.jsonl"]
    (tmp_path / "adding-one.jsonl").unlink()
    log("adding-two.jsonl", {"step": 1}, {"step": 2}, {"finished": True})
    archive(tmp_path, "adding", path, unlike)
    assert {name: len(lines) for name, lines in kept().items()} == {
        "adding-one.jsonl": 2,
        "adding-two.jsonl": 3,
    }


def test_logs_of_other_runs_than_were_frozen_are_no_scored_ones(
    frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = [digest(json.loads(frozen.read_text())["configuration"])]

    def why(job: Job, **head: Any) -> str | None:
        whole = {"job": job.settings, "steps": TASKS["adding"].steps, "defaults": defaults} | head
        path = tmp_path / f"{job.name}.jsonl"
        path.write_text(f"{json.dumps(whole)}\n{json.dumps({'finished': True})}\n")
        return protocol.unlike(path, "adding", frozen)

    jobs = {job.method: job for job in comparison("adding")}
    ours, baseline = jobs[DEFAULT], jobs[Method(base="AdamW")]
    assert [why(job) for job in jobs.values()] == [None] * len(jobs)
    assert why(baseline, defaults=[]) is None, "it has none of ours"
    for other in ([], ["0"], ["0", *defaults]):
        assert "other defaults of the library" in str(why(ours, defaults=other))
    assert "it has 3 steps" in str(why(ours, steps=3))
    few = {"starts": (1e-3,)}, {"seeds": (0,)}, {"smoke": True}, {"precision": "bf16"}
    method = {"method": replace(DEFAULT, meta_lr=1e-3)}
    for change in (*few, {"steps": 3}, method):
        assert "other settings" in str(why(replace(ours, **change)))
    monkeypatch.setitem(GRIDS, "AdamW", (1e-3,))
    assert "search is not what frozen.json has" in str(why(ours))
    assert "nothing is frozen" in str(protocol.unlike(tmp_path / "a", "adding", tmp_path / "b"))


def test_a_log_has_the_defaults_of_the_library_that_made_it(tmp_path: Path) -> None:
    job = Job(task="drift", method=DEFAULT, starts=(1e-3,), seeds=(0,), steps=1, smoke=True)
    head = json.loads(run(job, tmp_path).read_text().splitlines()[0])
    assert head["defaults"] == [digest(configuration())]
