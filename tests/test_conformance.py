"""The suite as its users meet it: the command line, its reports, cases that cover."""

import itertools
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metaopt_conformance import backends
from metaopt_conformance.__main__ import main
from metaopt_conformance.backends import BACKENDS, UnavailableError, find
from metaopt_conformance.cases import OPTIONS, Case
from metaopt_conformance.covering import covering
from metaopt_conformance.families import FAMILIES
from metaopt_conformance.oracle_runs import config, oracle_run
from metaopt_conformance.suite import ADAPTED, run
from metaopt_conformance.table import BASES, METAS

from tests.on_demand import slow_but

NUMPY = find("numpy")


#: What these run in every run of the tests; on demand all.
SOME = {"torch": ("trajectory", "optimizer", "special", "jets"), "jax": ("jets", "special")}


@pytest.mark.parametrize("name", SOME)
def test_some_families_pass(name: str, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip(name)
    families = [argument for family in SOME[name] for argument in ("--family", family)]
    status = main(["--backend", name, "--quick", "--output", str(tmp_path), *families])
    assert status == 0, capsys.readouterr().out
    found = json.loads((tmp_path / f"conformance_{name}.json").read_text())["outcomes"]
    passed = {entry["family"] for entry in found if entry["status"] == "passed"}
    assert passed >= set(SOME[name])


@pytest.mark.parametrize("name", slow_but(["numpy"], ["numpy", "strict", "torch", "jax"]))
def test_the_quick_part_passes(name: str, tmp_path: Path, capsys: Any) -> None:
    try:
        find(name)
    except UnavailableError as error:
        pytest.skip(str(error))
    status = main(["--backend", name, "--quick", "--output", str(tmp_path)])
    assert status == 0, capsys.readouterr().out
    found = json.loads((tmp_path / f"conformance_{name}.json").read_text())["outcomes"]
    # an adapter, where the library has one, is checked beside the core
    adapted = {entry["family"] for entry in found} - set(FAMILIES)
    made = {"adapter": find(name).optimizer, "wrapped": find(name).wrapped}
    columns = [ADAPTED[subject] for subject, make in made.items() if make is not None]
    assert adapted == {title for titles in columns for title in titles.values()}
    passed = [entry for entry in found if entry["status"] == "passed"]
    assert len(passed) > 150
    assert {entry["pair"] for entry in passed if entry["family"] == "traces"} == {
        f"{base} + {meta}" for base in BASES for meta in METAS
    }
    reasons = {entry["detail"] for entry in found if entry["status"] == "skipped"}
    explained = (
        "the library has no",
        "what is wrapped",
        "an adapter may restart a trace one step later",
        "the adapter takes a single discount",
    )
    assert all(reason.startswith(explained) for reason in reasons)
    page = (tmp_path / f"conformance_{name}.md").read_text()
    assert page.startswith(f"# {name}, default device, quick cases\n")


def test_dask_passes_some() -> None:
    pytest.importorskip("dask.array")
    cases = ["base=AdamW,meta=Adam,curvature=exact,approximation=2x2,blocks=tensor,steps=3"]
    cases += ["base=Lion,meta=Lion,blocks=weight,lr=by name,steps=3", "plain"]
    arguments = itertools.chain.from_iterable(("--case", case) for case in cases)
    assert main(["--backend", "dask", "--family", "trajectory", *arguments]) == 0


def test_several_processes_need_a_name() -> None:
    with pytest.raises(TypeError, match="`backend` must be a name where `jobs` is more than 1"):
        next(run(find("numpy"), jobs=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --backend or --all"),
        (("--all", "--backend", "numpy"), "give either --backend or --all"),
        (("--all", "--device", "cpu"), "--device goes with --backend"),
        (("--backend", "numpy", "--jobs", "0"), "--jobs must be at least 1; got 0"),
        (("--backend", "nothing"), "must be one of numpy, strict, torch"),
        (("--backend", "no_such_module:x"), "cannot be loaded"),
        (("--backend", "numpy", "--device", "cuda"), "--device must be one of none but"),
        (("--backend", "numpy", "--case", "speed=3"), "`case` must be name=value"),
        (("--backend", "numpy", "--case", "steps=x"), "must be an integer of at least 1; got 'x'"),
        (("--backend", "numpy", "--case", "steps=0"), "must be an integer of at least 1; got '0'"),
        (("--backend", "numpy", "--case", "missing=yes"), "must be one of False, True; got 'yes'"),
        (("--backend", "numpy", "--case", "delayed=1"), "must be one of False, True; got '1'"),
        (("--backend", "numpy", "--case", "base=Foo"), "must be one of SGD, SGDm, RMSprop"),
        (("--backend", "numpy", "--case", "discount=1.5"), "must be a number in [0, 1]; got '1.5'"),
        (("--backend", "numpy", "--case", "discount=1.0 and 0.9"), "from the least to the largest"),
        (("--backend", "numpy", "--case", "discount=0.9 and 2"), "a number in [0, 1]; got '2'"),
        (
            ("--backend", "numpy", "--case", "discount=0.9 and 1.0,approximation=2x2"),
            "is not defined: several discounts need approximation l",
        ),
        (("--backend", "numpy", "--case", "eps=nan"), "must be at least 0; got 'nan'"),
        (
            ("--backend", "numpy", "--case", "approximation=full"),
            "is not defined: approximation full needs curvature exact",
        ),
        (
            ("--backend", "numpy", "--case", "delayed=True"),
            "is not defined: delayed changes neither SGD nor SGD",
        ),
        (("--backend", "numpy", "--output", __file__), "--output must be a folder"),
    ],
)
def test_bad_options_are_refused(arguments: Any, message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_library_that_is_missing_is_named(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(SystemExit):
        main(["--backend", "cupy"])
    assert "cupy is not installed" in capsys.readouterr().err
    assert "cupy" in BACKENDS


@pytest.mark.parametrize(
    ("family", "case", "reason"),
    [
        ("special", "base=AdamW", "no special case is called ''"),
        ("laws", "name=gravity", "no law is called 'gravity'"),
        ("traces", "plain", "without exact curvature the traces are no derivatives"),
        ("traces", "curvature=exact,lr=schedule", "differences are taken of runs with lr=constant"),
        ("traces", "curvature=exact,missing=True", "of runs with missing=False"),
        ("trajectory", "dtype=float32", "trajectory is compared in float64 alone"),
        ("step", "dtype=bfloat16", "the library has no bfloat16"),
    ],
)
def test_where_nothing_was_checked_the_status_says_so(
    family: str, case: str, reason: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(BACKENDS, "numpy", lambda: replace(NUMPY, optimizer=None))
    assert main(["--backend", "numpy", "--family", family, "--case", case]) == 2
    out = capsys.readouterr().out
    assert reason in out
    assert "nothing was checked" in out


class Point:
    """An entry point, as a package declares it for a backend of its own."""

    def __init__(self, name: str, factor: float) -> None:
        self.name = name
        self.made = replace(
            NUMPY, name=name, optimizer=None, asarray=lambda array, _: np.array(array) * factor
        )

    def load(self) -> Any:
        return self.made


def test_all_has_entry_points_and_ends_with_the_first_failure(
    monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    points = [Point("good", 1.0), Point("bad/ly", 1.0 + 1e-6), Point("worse", 2.0)]
    monkeypatch.setattr(backends, "entry_points", lambda group: points if group else [])
    for name in [*BACKENDS]:
        monkeypatch.delitem(BACKENDS, name)
    arguments = ["--family", "trajectory", "--case", "plain", "--output", str(tmp_path)]
    assert main(["--all", *arguments]) == 1
    page = (tmp_path / "conformance.md").read_text()
    for name in ("good", "bad/ly", "worse"):
        assert f"| {name} (default device, chosen) |" in page
    assert main(["--all", "--stop", *arguments]) == 1
    page = (tmp_path / "conformance.md").read_text()
    assert "bad/ly" in page
    assert "worse" not in page
    assert main(["--backend", "bad/ly", *arguments]) == 1
    assert (tmp_path / "conformance_bad_ly.md").is_file()
    capsys.readouterr()


def test_what_is_found_is_written_before_the_next_library(monkeypatch: Any, tmp_path: Path) -> None:
    points = [Point("good", 1.0), Point("endless", 1.0)]

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    points[1].made = replace(points[1].made, asarray=interrupted)
    monkeypatch.setattr(backends, "entry_points", lambda group: points if group else [])
    for name in [*BACKENDS]:
        monkeypatch.delitem(BACKENDS, name)
    arguments = ["--family", "trajectory", "--case", "plain", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(["--all", *arguments])
    assert "| good (default device, chosen) |" in (tmp_path / "conformance.md").read_text()


def test_a_report_names_the_device(monkeypatch: Any, tmp_path: Path) -> None:
    backend = replace(NUMPY, optimizer=None, devices=lambda: ("cpu",))
    monkeypatch.setitem(BACKENDS, "numpy", lambda: backend)
    arguments = ["--family", "jets", "--case", "plain", "--output", str(tmp_path)]
    assert main(["--backend", "numpy", "--device", "cpu", *arguments]) == 0
    page = (tmp_path / "conformance_numpy_cpu.md").read_text()
    assert page.startswith("# numpy, cpu, chosen cases\n")


def test_list_says_what_is_checked(capsys: Any) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == list(FAMILIES)


def test_cases_are_written_and_read() -> None:
    for case in covering(Case(base="AdamW", meta="Lion")):
        assert Case.parse(str(case)) == case
        case.opt()


@pytest.mark.parametrize("family", ["trajectory", "traces"])
def test_each_of_several_discounts_decides_in_some_case(family: str) -> None:
    several: tuple[tuple[float, ...], ...] = ((0.9, 1.0), (0.0, 0.8, 1.0))
    alone = {discounts: np.zeros(len(discounts)) for discounts in several}
    for case in FAMILIES[family].cases(NUMPY.dtypes, True):
        if not isinstance(case.discount, tuple):
            continue
        with np.errstate(all="ignore"):  # of cases that are to overflow
            decided = np.diff([state.decided for state in oracle_run(case)], axis=0)
        sole = decided * (np.sum(decided, axis=1, keepdims=True) == 1)
        alone[case.discount] += np.sum(sole, axis=(0, 2))
    assert all(np.all(times >= 3) for times in alone.values()), alone


def test_one_of_several_meta_gradients_is_not_usable_in_some_case() -> None:
    apart = []
    for case in FAMILIES["trajectory"].cases(NUMPY.dtypes, True):
        if isinstance(case.discount, tuple) and case.faulty == "huge":
            with np.errstate(all="ignore"):
                usable = np.abs(oracle_run(case)[-1].z) < config(case).largest
            apart.append(np.any(usable & np.logical_not(np.all(usable, axis=0))))
    assert any(apart)


@pytest.mark.parametrize("pair", [("SGD", "SGD"), ("AdamW", "Lion"), ("Lion", "Adam")])
def test_any_two_values_that_go_together_meet(pair: tuple[str, str]) -> None:
    plain = Case(base=pair[0], meta=pair[1])
    met = {
        (a, getattr(case, a), b, getattr(case, b))
        for case in covering(plain)
        for a, b in itertools.combinations(OPTIONS, 2)
    }
    rng = random.Random(0)
    for _ in range(3000):
        case = replace(plain, **{name: rng.choice(values) for name, values in OPTIONS.items()})
        if case.possible():
            for a, b in itertools.combinations(OPTIONS, 2):
                assert (a, getattr(case, a), b, getattr(case, b)) in met
