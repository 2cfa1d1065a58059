"""The suite on backends and adapters of one's own: found, checked from outside, and told apart."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.backends import Backend, find
from metaopt_conformance.cases import Case
from metaopt_conformance.families import FAMILIES
from metaopt_conformance.suite import run

ROOT = Path(__file__).parents[1]
DOCUMENTED = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
THIN, ADAPTED = re.findall(r"```python\n(.*?)```", DOCUMENTED, re.DOTALL)
OTHERS = """
import os

number, module = 3, os


def broken():
    def asarray(array, device):
        return np.array(array) * (1 + 1e-6)

    return Backend(name="broken", asarray=asarray, to_numpy=np.array)


def deadly():
    return Backend(name="deadly", asarray=lambda array, device: os._exit(1), to_numpy=np.array)


def raising():
    raise RuntimeError("no licence")


def without_dtypes():
    return Backend(name="none", asarray=np.array, to_numpy=np.array, dtypes=())
"""


def outside(tmp_path: Path, *arguments: str, python: tuple[str, ...] = ()) -> Any:
    """Run the suite from a folder that is not the project's."""
    (tmp_path / "thin.py").write_text(THIN + OTHERS)
    (tmp_path / "adapted.py").write_text(ADAPTED)
    (tmp_path / "spoilt.py").write_text("raise OSError('no driver')")
    paths = f"{tmp_path}:{ROOT}:{ROOT / 'conformance'}"
    return subprocess.run(
        [sys.executable, *python, "-m", "metaopt_conformance", *arguments],
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


def test_an_adapter_of_ones_own_is_checked_from_outside(tmp_path: Path) -> None:
    arguments = ("--backend", "adapted:backend", "--quick", "--family", "trajectory")
    done = outside(tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"base \+ meta +trajectory +adapter", done.stdout)
    assert " 0 failed" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spoilt:backend", "cannot be loaded: OSError: no driver"),
        ("thin:raising", "cannot be loaded: RuntimeError: no licence"),
        ("thin:without_dtypes", "cannot be loaded: ValueError: `dtypes` must be some of float64"),
        ("thin:missing", "cannot be loaded: AttributeError"),
        ("thin:number", "must be a Backend, or a function that returns one; got 3"),
        ("thin:module", "must be a Backend, or a function that returns one; got <module"),
        (":", "cannot be loaded: ValueError"),
    ],
)
def test_what_is_no_backend_is_refused(tmp_path: Path, name: str, message: str) -> None:
    done = outside(tmp_path, "--backend", name)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_that_dies_is_a_failure(tmp_path: Path) -> None:
    arguments = ("--backend", "thin:deadly", "--family", "special", "--family", "trajectory")
    done = outside(tmp_path, *arguments, "--jobs", "2", "--output", "report")
    assert done.returncode == 1
    assert "a process died at this check" in done.stdout
    assert "a process died" in (tmp_path / "report" / "conformance_deadly.md").read_text()


def test_optimized_python_checks_as_well(tmp_path: Path) -> None:
    """`python -O` drops assertions, of which none may be a check."""
    for family in FAMILIES:
        if family in ("optimizer", "compiled"):  # NumPy has neither
            continue
        arguments = ("--backend", "thin:broken", "--quick", "--stop", "--family", family)
        done = outside(tmp_path, *arguments, python=("-O",))
        # derivatives, adjoints and literature forms at other numbers are as good
        wrong = ("trajectory", "step", "traces", "special", "learned")
        expected = 1 if family in wrong else 0
        assert done.returncode == expected, family + done.stdout


def test_the_smallest_case_is_found_where_one_option_needs_another(tmp_path: Path) -> None:
    case = "curvature=exact,approximation=full,problem=network,steps=2"
    arguments = ("--backend", "thin:broken", "--family", "trajectory", "--case", case)
    done = outside(tmp_path, *arguments)
    assert done.returncode == 1
    assert "FAILED trajectory steps=1:" in done.stdout


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


def test_a_library_without_float64_is_checked_in_what_it_has() -> None:
    backend = Backend(
        name="narrow",
        asarray=lambda array, _: np.asarray(array, dtype=np.float32),
        to_numpy=np.array,
        dtypes=("float32",),
    )
    outcomes = list(run(backend, quick=True))
    assert [o.detail for o in outcomes if o.status == "failed"] == []
    assert {o.detail for o in outcomes if o.status == "skipped"} == {
        "the library has no float64",
        "the library has no compiler",
        "the library has no optimizers of its own",
    }
    assert {o.family for o in outcomes if o.status == "passed"} == {"step", "pure"}


def test_a_library_that_makes_another_dtype_is_told() -> None:
    backend = Backend(
        name="narrow",
        asarray=lambda array, _: np.asarray(array, dtype=np.float32),
        to_numpy=np.array,
    )
    (outcome,) = run(backend, families=["trajectory"], cases=[Case()])
    assert outcome.status == "failed"
    assert outcome.detail.startswith("`asarray` makes float32 of float64")


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
                "the adapter's `step` takes no `meta_grads`",
            },
        ),
    ],
)
def test_a_right_adapter_passes_the_quick_part(kind: Any, reasons: set[str]) -> None:
    backend = replace(find("numpy"), optimizer=kind)
    outcomes = list(run(backend, families=["trajectory"], quick=True))
    later = "an adapter may restart a trace one step later (docs/mathematics.md section 11)"
    assert {o.status for o in outcomes} == {"passed", "skipped"}
    assert {o.detail for o in outcomes if o.status == "skipped"} == reasons | {later}
    assert len([o for o in outcomes if o.family == "adapter" and o.status == "passed"]) > 10
