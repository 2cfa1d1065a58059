"""What `make gpu` does with its parts: goes on, stops in time, and says how each went."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import gpu
from benchmarks.gpu import Outcome, Part, failed, page, run_all

WRITES = "-c open(r'{output}/ran','a').write('x')"


def folders(tmp_path: Path) -> dict[str, Path]:
    return {"output": tmp_path / "out", "logs": tmp_path / "logs", "data": tmp_path}


def part(command: str, minutes: float = 1.0, *, partial: bool = False) -> Part:
    return Part(command, command, minutes, partial)


def test_what_has_passed_is_not_run_again(tmp_path: Path) -> None:
    parts = {"writes": part(WRITES), "fails": part("-c raise(SystemExit(3))")}
    first = run_all(parts, folders(tmp_path), 1.0)
    again = run_all(parts, folders(tmp_path), 1.0)
    assert [first[name].status for name in parts] == ["passed", "failed"]
    assert [again[name].status for name in parts] == ["passed", "failed"]
    assert (tmp_path / "out" / "ran").read_text() == "x"
    run_all(parts, folders(tmp_path), 1.0, chosen=["writes"])
    assert (tmp_path / "out" / "ran").read_text() == "xx"


def test_of_another_commit_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"writes": part(WRITES)}
    run_all(parts, folders(tmp_path), 1.0)
    monkeypatch.setattr(gpu, "COMMIT", "commit other")
    run_all(parts, folders(tmp_path), 1.0)
    assert (tmp_path / "out" / "ran").read_text() == "xx"


def test_a_part_stops_at_its_limit_and_others_are_left_out(tmp_path: Path) -> None:
    slow = "-c print('begun',flush=True);__import__('time').sleep(60)"
    parts = {"slow": part(slow, 0.05, partial=True), "late": part(WRITES)}
    outcomes = run_all(parts, folders(tmp_path), 0.06)
    assert outcomes["slow"].status == "stopped"
    assert outcomes["slow"].tail == "begun"
    assert outcomes["slow"].seconds < 30.0
    assert outcomes["late"].status in ("left out", "stopped")
    assert failed(outcomes, parts) == ["late"]


def test_the_page_says_how_each_went(tmp_path: Path) -> None:
    parts = {"good": part(WRITES), "bad": part("-c print('why');raise(SystemExit(1))")}
    run_all(parts, folders(tmp_path), 1.0)
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "| good | passed |" in text
    assert "## bad failed" in text
    assert "why" in text
    assert "| never | left out |" in page({}, {"never": parts["good"]})


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "hardware", lambda: "no GPU")
    assert gpu.main([]) == 2
    assert "names no GPU" in capsys.readouterr().out


def test_a_part_runs_on_a_cpu(tmp_path: Path) -> None:
    """As small as it gets; all of them with `-m slow`."""
    folders = ["--logs", str(tmp_path), "--output", str(tmp_path)]
    assert gpu.main(["--smoke", *folders, "--part", "conformance-torch"]) == 0


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    assert sys.executable
    assert gpu.main(["--smoke", "--logs", str(tmp_path), "--output", str(tmp_path)]) == 0


def test_outcomes_of_this_commit_that_passed_are_done() -> None:
    assert Outcome("passed").done
    assert not Outcome("failed").done
    assert not Outcome("passed", commit="commit other").done
