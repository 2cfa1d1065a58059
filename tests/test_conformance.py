"""The suite as its users meet it: the command line, a backend of their own, cases that cover."""

import itertools
import json
import random
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from metaopt_conformance.__main__ import main
from metaopt_conformance.backends import BACKENDS, UnavailableError, find
from metaopt_conformance.cases import BASES, METAS, OPTIONS, Case
from metaopt_conformance.covering import covering
from metaopt_conformance.families import FAMILIES
from metaopt_conformance.suite import ADAPTED, run

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jax"])
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
    assert adapted == set(ADAPTED.values() if find(name).optimizer is not None else ())
    passed = [entry for entry in found if entry["status"] == "passed"]
    assert len(passed) > 150
    assert {entry["pair"] for entry in passed if entry["family"] == "traces"} == {
        f"{base} + {meta}" for base in BASES for meta in METAS
    }
    reasons = {entry["detail"] for entry in found if entry["status"] == "skipped"}
    explained = "the library has no", "an adapter may restart a trace one step later"
    assert all(reason.startswith(explained) for reason in reasons)
    page = (tmp_path / f"conformance_{name}.md").read_text()
    assert page.startswith(f"# {name}, default device, quick cases\n")


def test_dask_passes_some() -> None:
    pytest.importorskip("dask.array")
    cases = ["base=AdamW,meta=Adam,curvature=exact,approximation=2x2,blocks=tensor,steps=3"]
    cases += ["base=Lion,meta=Lion,blocks=weight,lr=by name,steps=3", "plain"]
    arguments = itertools.chain.from_iterable(("--case", case) for case in cases)
    assert main(["--backend", "dask", "--family", "trajectory", *arguments]) == 0


DOCUMENTED = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
THIRD_PARTY = re.findall(r"```python\n(.*?)```", DOCUMENTED, re.DOTALL)[0] + textwrap.dedent(
    """

    def broken():
        def asarray(array, device):
            return np.array(array) * (1 + 1e-6)

        return Backend(name="broken", asarray=asarray, to_numpy=np.array)
    """
)


def outside(tmp_path: Path, *arguments: str) -> Any:
    """Run the suite from a folder that is not the project's."""
    (tmp_path / "thin.py").write_text(THIRD_PARTY)
    paths = f"{tmp_path}:{ROOT}:{ROOT / 'conformance'}"
    return subprocess.run(
        [sys.executable, "-m", "metaopt_conformance", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_backend_of_ones_own_is_checked_from_outside(tmp_path: Path) -> None:
    families = ("--family", "trajectory", "--family", "jets")
    done = outside(tmp_path, "--backend", "thin:backend", "--quick", *families)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "AdamW + Adam" in done.stdout
    assert " 0 failed" in done.stdout


def test_a_failure_prints_the_command_that_repeats_its_smallest_case(tmp_path: Path) -> None:
    arguments = ("--backend", "thin:broken", "--quick", "--family", "trajectory", "--stop")
    done = outside(tmp_path, *arguments)
    assert done.returncode == 1
    assert "FAILED trajectory " in done.stdout
    (command,) = [line for line in done.stdout.splitlines() if "python -m" in line]
    python, m, module, *again = shlex.split(command)
    assert (python, m, module) == ("python", "-m", "metaopt_conformance")
    case = again[-1]
    assert Case.parse(case).steps == 1
    assert len(case.split(",")) <= 2  # steps, and nothing else that is not at its default
    assert outside(tmp_path, *again).returncode == 1


def test_several_processes_find_what_one_does(tmp_path: Path) -> None:
    found = []
    for jobs in ("1", "2"):
        folder = tmp_path / jobs
        arguments = ("--backend", "thin:broken", "--family", "jets", "--family", "special")
        done = outside(tmp_path, *arguments, "--jobs", jobs, "--output", str(folder))
        assert done.returncode == 1, done.stderr
        found.append(json.loads((folder / "conformance_broken.json").read_text())["outcomes"])
    assert found[0] == found[1]


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
        (("--backend", "numpy", "--case", "steps=x"), "invalid literal"),
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


def test_list_says_what_is_checked(capsys: Any) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    for family in ("trajectory", "step", "traces", "jets", "optimizer", "special", "laws"):
        assert family in out


def test_cases_are_written_and_read() -> None:
    for case in covering(Case(base="AdamW", meta="Lion")):
        assert Case.parse(str(case)) == case
        case.opt()


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


class Adapter:
    """An optimizer object around the core, as an adapter of a framework is."""

    def __init__(self, opt: Any, params: Any) -> None:
        self.opt, self.current = opt, params
        self.kept = opt.init(params)

    def step(self, grads: Any, lr: Any, hvp: Any) -> None:
        self.advance(grads, lr=lr, hvp=hvp)

    def advance(self, grads: Any, **inputs: Any) -> None:
        self.current, self.kept = self.opt.step(self.current, grads, self.kept, **inputs)

    def params(self) -> Any:
        return self.current

    def state(self) -> Any:
        return self.kept


class Whole(Adapter):
    """One that takes all that the core takes, and changes its parameters in place."""

    def step(self, grads: Any, lr: Any, hvp: Any, **others: Any) -> None:
        own = self.current
        self.advance(grads, lr=lr, hvp=hvp, **others)
        for name, param in own.items():
            param[...] = self.current[name]
        self.current = own


class Forgetful(Adapter):
    """One that drops the multiplier."""

    def step(self, grads: Any, lr: Any, hvp: Any) -> None:  # noqa: ARG002
        super().step(grads, 1.0, hvp)


class Late(Adapter):
    """One that starts a meta-parameter too low."""

    def __init__(self, opt: Any, params: Any) -> None:
        super().__init__(opt, params)
        self.kept = replace(self.kept, beta=self.kept.beta - 1e-3)


class Stateless(Adapter):
    """One whose state is not in the core's form."""

    def state(self) -> Any:
        return vars(self.kept)


STEPS_OF_ADAPTERS = [
    Case(base="AdamW", meta="Lion", lr="schedule"),
    Case(base="SGDm", meta="Adam", blocks="node", lr="schedule", curvature="exact"),
]


@pytest.mark.parametrize(
    ("kind", "detail"),
    [
        (Adapter, ""),
        (Whole, ""),
        (Forgetful, "w in step"),
        (Late, "beta in step 0"),
        (Stateless, r"must return a metaopt\.State; got <class 'dict'>"),
    ],
)
def test_an_adapter_has_a_column_of_its_own(kind: Any, detail: str) -> None:
    backend = replace(find("numpy"), optimizer=kind)
    outcomes = list(run(backend, families=["trajectory"], cases=STEPS_OF_ADAPTERS))
    assert [o.status for o in outcomes if o.family == "trajectory"] == ["passed"] * 2
    found = [o for o in outcomes if o.family == "adapter"]
    assert [o.status for o in found] == ["failed" if detail else "passed"] * 2
    assert all(re.search(detail, o.detail) for o in found)


@pytest.mark.parametrize(
    ("kind", "reasons"),
    [
        (Whole, set()),
        (
            Adapter,
            {
                "the adapter's `step` takes no `third`",
                "the adapter's `step` takes no `hessian_diagonal`",
            },
        ),
    ],
)
def test_a_right_adapter_passes_the_quick_part(kind: Any, reasons: set[str]) -> None:
    backend = replace(find("numpy"), optimizer=kind)
    outcomes = list(run(backend, families=["trajectory"], quick=True))
    assert {o.status for o in outcomes} == {"passed"} | ({"skipped"} if reasons else set())
    assert {o.detail for o in outcomes if o.status == "skipped"} == reasons
    assert len([o for o in outcomes if o.family == "adapter" and o.status == "passed"]) > 15
