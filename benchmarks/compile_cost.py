"""What compiling an update of many leaves costs in JAX, beside optax.adamw.

    python -m benchmarks.compile_cost [--leaves 62 --leaves 300] [--output FOLDER]

The CPU time of tracing, lowering and compiling an update with `apply_updates`, and by how much the
memory of the process grew in that time; each in a process of its own. Leaves have seven shapes, as
the layers of a network repeat.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LEAVES = (62, 100, 300)
CONTENDERS = {
    "optax.adamw": {},
    "one discount": {"discount": 1.0},
    "one discount, a step size for each leaf": {"discount": 1.0, "blocks": "tensor"},
    "defaults": {},
}


def cost(name: str, leaves: int) -> tuple[float, float]:
    """Return the seconds of CPU and the MB that compiling an update in this process takes."""
    import jax
    import optax
    from metaopt_jax import metaoptimize

    import metaopt as mo

    tx: Any = optax.adamw(1e-3, weight_decay=0.1)
    if name != "optax.adamw":
        options: Any = CONTENDERS[name]
        tx = metaoptimize(base=mo.AdamW(weight_decay=0.1), **options)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {f"w{i}": jax.ShapeDtypeStruct((64, 64 + i % 7), "float32") for i in range(leaves)}
    state = jax.eval_shape(tx.init, params)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    seconds = time.process_time() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024


def in_its_own_process(name: str, leaves: int) -> tuple[float, float]:
    """Return what `cost` does, in a new process."""
    command = [sys.executable, "-m", "benchmarks.compile_cost", "--one", name]
    command += ["--leaves", str(leaves)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, memory = json.loads(run.stdout)
    return seconds, memory


def main() -> None:
    """Measure all contenders; print, and with `--output` write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--leaves", type=int, action="append")
    parser.add_argument("--output", type=Path, help="folder for compile_cost_jax.md")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(cost(options.one, options.leaves[0])))
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "optax"))
    lines = [
        "# Cost of compiling an update, jax",
        "",
        "Made by `python -m benchmarks.compile_cost`: CPU time, in brackets as a multiple of "
        "optax.adamw's, and what memory grew by, each in a process of its own. "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{packages}.",
        "",
        "| leaves | " + " | ".join(CONTENDERS) + " |",
        "|" + " --- |" * (1 + len(CONTENDERS)),
    ]
    for leaves in options.leaves or LEAVES:
        found = [in_its_own_process(name, leaves) for name in CONTENDERS]
        cells = [
            f"{seconds:.1f} s ({seconds / found[0][0]:.1f}), {memory:.0f} MB"
            for seconds, memory in found
        ]
        lines.append(f"| {leaves} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "compile_cost_jax.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
