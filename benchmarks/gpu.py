"""Everything that wants a GPU, in parts: `make gpu`.

    python -m benchmarks.gpu [--part conformance-torch] [--minutes 25] [--smoke]

Each part is a command of its own, with a limit of minutes. What has passed with this commit is not
run again, so a run that was killed goes on; what has failed is. `--smoke` runs every part on the
CPU, as small as it gets: does it run?
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import metaopt as mo
from benchmarks.training.loop import COMMIT

PACKAGES = ("torch", "triton", "jax", "jaxlib", "optax", "cupy-cuda12x", "cupy-cuda13x", "numpy")
RESULTS = Path(__file__).parent / "results"
#: Lines of its output that the page has of a part that failed.
TAIL = 12


@dataclass(frozen=True, slots=True)
class Part:
    """A command of Python modules, with what stands for the device and the folders.

    Parameters
    ----------
    command, smoke : str
        Arguments of the interpreter; `{output}`, `{logs}` and `{data}` are folders. `smoke` is what
        takes the place of `command` where there is no GPU.
    minutes : float
        Limit.
    partial : bool
        Whether being stopped at the limit is no failure: it goes on where it was.
    """

    command: str
    smoke: str
    minutes: float
    partial: bool = False


def _conformance(backend: str, device: str, host: str) -> Part:
    common = f"-m metaopt_conformance --backend {backend}"
    return Part(
        f"{common} --device {device} --quick --jobs 8 --output {{output}}",
        f"{common} --device {host} --family special --stop",
        minutes=6,
    )


def _cost(library: str) -> Part:
    return Part(
        f"-m benchmarks.step_cost {library} --problem large --problem resnet18 --problem llama15m "
        "--output {output}",
        f"-m benchmarks.step_cost {library} --problem resnet18 --rounds 2",
        minutes=3,
    )


PARTS: Mapping[str, Part] = {
    "conformance-torch": _conformance("torch", "cuda", "cpu"),
    "conformance-jax": _conformance("jax", "gpu", "cpu"),
    "conformance-cupy": Part(
        "-m metaopt_conformance --backend cupy --quick --output {output}",
        "-m metaopt_conformance --backend numpy --family special --stop",
        minutes=6,
    ),
    "step-cost-torch": _cost("torch"),
    "step-cost-jax": _cost("jax"),
    "step-cost-cupy": Part(
        "-m benchmarks.step_cost cupy --output {output}",
        "-m benchmarks.step_cost numpy --problem resnet18 --rounds 2",
        minutes=3,
    ),
    "iterations": Part(
        "-m benchmarks.iterations --device cuda --output {output}",
        "-m benchmarks.iterations --device cpu --smoke --rounds 2",
        minutes=4,
    ),
    "tests": Part(
        "-m pytest -q tests/test_torch_compiled.py tests/test_torch_rounding.py -n 8",
        "-m pytest -q tests/test_torch_compiled.py -k without_a_compiler",
        minutes=5,
    ),
    "cifar10": Part(
        "-m benchmarks.reproduce cifar10 --device cuda --precision bf16 --logs {logs} "
        "--data {data}",
        "-m benchmarks.reproduce cifar10 --device cpu --smoke --logs {logs} --data {data}",
        minutes=10,
        partial=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part went.

    Parameters
    ----------
    status : {"passed", "failed", "stopped", "left out"}
        "stopped" is at the limit of minutes; "left out" what the time was not enough for.
    seconds : float
    tail : str
        The last lines that it printed.
    commit : str
    """

    status: str
    seconds: float = 0.0
    tail: str = ""
    commit: str = COMMIT

    @property
    def done(self) -> bool:
        """Whether it need not be run again with this commit."""
        return self.status == "passed" and self.commit == COMMIT


def run(part: Part, folders: Mapping[str, Path], seconds: float, *, smoke: bool) -> Outcome:
    """Run a part for as long as there is time, and return how it went.

    Parameters
    ----------
    part : Part
    folders : mapping of name to Path
        What stands in its command.
    seconds : float
        How long it may take, beside its own limit.
    smoke : bool
    """
    limit = min(60.0 * part.minutes, seconds)
    if limit < 1.0:
        return Outcome("left out")
    command = (part.smoke if smoke else part.command).format(**folders)
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=limit)
        status = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        process.terminate()
        said, _ = process.communicate()
        status = "stopped"
    tail = "\n".join(said.splitlines()[-TAIL:])
    return Outcome(status, round(time.monotonic() - start, 1), tail)


def hardware() -> str:
    """Return the GPUs that the system names, or that there is none."""
    if shutil.which("nvidia-smi") is None:
        return "no GPU"
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    return "; ".join(found.splitlines()) or "no GPU"


def _versions() -> str:
    known = []
    for name in PACKAGES:
        try:
            known.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(known)


def page(outcomes: Mapping[str, Outcome], parts: Mapping[str, Part]) -> str:
    """Return the page of results: how each part went, and the tables that it wrote."""
    lines = [
        "# On a GPU",
        "",
        f"Made by `make gpu`. {hardware()}; {platform.machine()}, {platform.system()}, Python "
        f"{platform.python_version()}, {_versions()}, metaopt {mo.__version__}.",
        "",
        "| part | status | seconds | made with |",
        "| --- | --- | --- | --- |",
    ]
    for name in parts:
        outcome = outcomes.get(name, Outcome("left out"))
        lines.append(f"| {name} | {outcome.status} | {outcome.seconds:g} | {outcome.commit} |")
    for name, outcome in outcomes.items():
        if outcome.status == "failed":
            lines += ["", f"## {name} failed", "", "```", outcome.tail, "```"]
    return "\n".join(lines) + "\n"


def run_all(
    parts: Mapping[str, Part],
    folders: Mapping[str, Path],
    minutes: float,
    *,
    smoke: bool = False,
    chosen: list[str] | None = None,
) -> dict[str, Outcome]:
    """Run parts one after the other, and write down how each went as soon as it is known.

    Parameters
    ----------
    parts : mapping of name to Part
    folders : mapping of name to Path
        "output" gets gpu.md and the tables, "logs" what runs go on from, "data" has data sets.
    minutes : float
        For all of them.
    smoke : bool
    chosen : list of str, optional
        Names of parts; by default all that have not passed.
    """
    for folder in ("output", "logs"):
        folders[folder].mkdir(parents=True, exist_ok=True)
    record = folders["logs"] / ("gpu-smoke.json" if smoke else "gpu.json")
    found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    outcomes = {name: Outcome(**entry) for name, entry in found.items() if name in parts}
    end = time.monotonic() + 60.0 * minutes
    for name, part in parts.items():
        if chosen is not None and name not in chosen:
            continue
        if chosen is None and name in outcomes and outcomes[name].done:
            print(f"{name}: passed before")
            continue
        print(f"{name}: at most {part.minutes:g} minutes", flush=True)
        outcomes[name] = run(part, folders, end - time.monotonic(), smoke=smoke)
        print(f"{name}: {outcomes[name].status} after {outcomes[name].seconds:g} s", flush=True)
        entries = {key: asdict(one) for key, one in outcomes.items()}
        part_file = record.with_suffix(".part")
        part_file.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        part_file.replace(record)
        if not smoke:
            (folders["output"] / "gpu.md").write_text(page(outcomes, parts), encoding="utf-8")
    return outcomes


def failed(outcomes: Mapping[str, Outcome], parts: Mapping[str, Part]) -> list[str]:
    """Return the parts that were not as they should be; a `partial` one may be stopped."""
    fine = {name: {"passed", "stopped"} if parts[name].partial else {"passed"} for name in outcomes}
    return [name for name, outcome in outcomes.items() if outcome.status not in fine[name]]


def main(arguments: list[str] | None = None) -> int:
    """Answer the command line; return 1 if a part failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=tuple(PARTS))
    parser.add_argument("--minutes", type=float, default=25.0, help="for all parts (default 25)")
    parser.add_argument("--smoke", action="store_true", help="on the CPU: does it run?")
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder (default runs)")
    parser.add_argument("--data", type=Path, default=Path(), help="folder with CIFAR-10")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu", help="folder for tables")
    options = parser.parse_args(arguments)
    if not options.smoke and hardware() == "no GPU":
        print("`nvidia-smi` names no GPU: use `--smoke` to see whether the parts run.")
        return 2
    folders = {"output": options.output, "logs": options.logs, "data": options.data}
    outcomes = run_all(PARTS, folders, options.minutes, smoke=options.smoke, chosen=options.part)
    wrong = failed(outcomes, PARTS)
    for name in wrong:
        print(f"\n{name} {outcomes[name].status}:\n{outcomes[name].tail}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
