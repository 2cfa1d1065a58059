"""The protocol of scored runs: what is frozen before them, and whether it is still so.

    python -m benchmarks.protocol            # says whether scored runs may be made
    python -m benchmarks.protocol --freeze   # writes frozen.json, to be committed before them

benchmarks/protocol.md says what for. `python -m benchmarks.learning compare` asks before it makes
runs of the tasks that judge.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import metaopt as mo
from benchmarks.training.defaults import configuration, digest
from benchmarks.training.loop import Job
from benchmarks.training.methods import METAS, Method
from benchmarks.training.studies import (
    CHOOSING,
    DEFAULT,
    FAR_STARTS,
    GRIDS,
    JUDGING,
    SEEDS,
    comparison,
)
from benchmarks.training.tasks import TASKS
from metaopt.configuration import META

__all__ = ["FROZEN", "ProtocolError", "check", "current", "main", "unlike"]

FROZEN = Path(__file__).with_name("frozen.json")


class ProtocolError(RuntimeError):
    """Scored runs may not be made."""


def current() -> dict[str, Any]:
    """Return what is to be frozen, as it is now, and its digest."""
    content = {
        "configuration": configuration(),
        "method": asdict(DEFAULT),
        "starts": FAR_STARTS,
        "seeds": SEEDS,
        "calibration": CHOOSING,
        "scored": {name: [TASKS[name].steps, TASKS[name].target] for name in JUDGING},
        "search": {"base": "AdamW", "step sizes": GRIDS["AdamW"], "fixed": True, "cosine": True},
    }
    return {**json.loads(json.dumps(content)), "sha256": digest(content)}


def check(seeds: int = len(SEEDS), frozen: Path = FROZEN) -> None:
    """Raise unless all is as it was frozen, the file is committed, and there are enough seeds.

    Parameters
    ----------
    seeds : int
        How many every run is made with.
    frozen : Path
        What `--freeze` wrote.

    Raises
    ------
    ProtocolError
        The message says what is wrong.
    """
    if seeds < len(SEEDS):
        msg = f"scored runs are made with {len(SEEDS)} seeds; got {seeds}."
        raise ProtocolError(msg)
    if not frozen.is_file():
        msg = f"nothing is frozen: there is no {frozen.name}; see benchmarks/protocol.md."
        raise ProtocolError(msg)
    opt = mo.MetaOptimize()
    if (DEFAULT.meta_lr, DEFAULT.discount) != (opt.meta_lr, opt.discount) or (
        METAS[str(DEFAULT.meta)] is not META
    ):
        msg = f"`studies.DEFAULT`, {DEFAULT.label}, is not what `MetaOptimize()` is."
        raise ProtocolError(msg)
    now, then = current(), json.loads(frozen.read_text(encoding="utf-8"))
    changed = [name for name in {**now, **then} if now.get(name) != then.get(name)]
    if changed:
        first = changed[0]
        msg = (
            f"{', '.join(changed[:-1]) or first} differ from what {frozen.name} has: {first} is "
            f"{now.get(first)}, and was {then.get(first)}. Scored runs need what was frozen, or a "
            "new file, committed before them; see benchmarks/protocol.md."
        )
        raise ProtocolError(msg)
    if _edited(frozen):
        msg = f"{frozen.name} is not committed: it is to be, before scored runs are made."
        raise ProtocolError(msg)


def unlike(log: Path, task: str, frozen: Path = FROZEN) -> str | None:
    """Return why the runs of a log are none that count as scored; None where they are.

    Parameters
    ----------
    log : Path
        A complete one.
    task : str
        One that judges.
    frozen : Path
        What `--freeze` wrote.
    """
    if not frozen.is_file():
        return f"nothing is frozen: there is no {frozen.name}"
    now, then = current(), json.loads(frozen.read_text(encoding="utf-8"))
    for name in ("method", "starts", "seeds", "search"):
        if now[name] != then.get(name):
            return f"{name} is not what {frozen.name} has"
    jobs = {job.name: job for job in comparison(task)}
    if log.stem not in jobs:
        return "it is of other settings, starts or seeds than scored runs have"
    head = json.loads(log.read_text(encoding="utf-8").splitlines()[0])
    steps = then["scored"][task][0]
    if head["steps"] != steps:
        return f"it has {head['steps']} steps; scored runs have {steps}"
    if _is_ours(jobs[log.stem]) and head.get("defaults") != [digest(then["configuration"])]:
        return f"it was made with other defaults of the library than {frozen.name} has"
    return None


def _is_ours(job: Job) -> bool:
    return isinstance(job.method, Method) and job.method.meta is not None


def _edited(path: Path) -> bool:
    """Return whether git has another version of a file, or none; False where there is no git."""
    command = ["git", "-C", str(path.parent), "status", "--porcelain", "--", path.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return bool(done.stdout.strip())


def main(arguments: list[str] | None = None) -> int:
    """Freeze, or say whether all is as it was frozen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--freeze", action="store_true", help="write what is to be committed")
    parser.add_argument("--file", type=Path, default=FROZEN, help=f"default {FROZEN.name}")
    options = parser.parse_args(arguments)
    if options.freeze:
        text = json.dumps(current(), indent=1) + "\n"
        options.file.write_text(text, encoding="utf-8")
        print(f"{options.file} is written; commit it.")
        return 0
    try:
        check(frozen=options.file)
    except ProtocolError as error:
        print(f"No scored runs: {error}")
        return 1
    print(f"All is as {options.file.name} has it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
