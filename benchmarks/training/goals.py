"""The goals: which configurations reach them, and by how much others fall short."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.training.cells import Cell, best_of, shown, worst_of
from benchmarks.training.methods import Method, Peer
from benchmarks.training.studies import ADVISED, CHOOSING, JUDGING, starts_of

__all__ = ["NAMES", "ROLES", "advised", "learned", "misses", "of_base"]

NAMES = {
    "drift": "Drifting linear regression",
    "logistic": "Logistic regression",
    "digits": "Digits network",
    "characters": "Character language model",
    "cifar10": "CIFAR-10 convolutional network",
    "continual": "Continual CIFAR-100, as printed",
    "continual-as-released": "Continual CIFAR-100, as released",
    "shifts": "Regression with shifts and heavy tails",
    "adding": "GRU on the adding problem",
    "residual": "ResNet on CIFAR-100's coarse classes",
    "bytes": "Byte language model",
    "autoencoder": "Autoencoder on digits",
    "finetuning": "Fine-tuning on other classes",
}
#: Which tasks choose, and which judge.
ROLES = (
    f"Constants of the library were chosen on {', '.join(CHOOSING)}. The tasks "
    f"{', '.join(JUDGING)} judge: no constant was chosen on them, and none is to be."
)
GOALS = (
    "Goals, from every start that is shown: no diverged run; at least the result of the best fixed "
    "step size of the same base; within 0.5 points, or 1% of the loss, of the best cosine schedule "
    "of the base; never behind a peer. Shown is what is missing at the worst start: points of "
    "accuracy, or per cent of the loss; nothing where the goal is reached, to 0.05 of these."
)
#: A twentieth of a point, or of a per cent, is no difference.
SAME = 5e-4


def learned(name: str, table: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Return the cells of MetaOptimize by label, of what was run from all the starts of a task."""
    found: dict[Method, list[Cell]] = {}
    for cell in table:
        method = cell.method
        if isinstance(method, Method) and method.meta and cell.start in starts_of(name, method):
            found.setdefault(method, []).append(cell)
    return {
        method.label: some
        for method, some in found.items()
        if {cell.start for cell in some} >= set(starts_of(name, method))
    }


def of_base(table: Sequence[Cell], base: str, schedule: str) -> list[Cell]:
    """Return the cells of a base update whose step size is not learned."""
    return [
        cell
        for cell in table
        if isinstance(cell.method, Method)
        and (cell.method.base, cell.method.meta, cell.method.schedule) == (base, None, schedule)
    ]


def advised(tables: Mapping[str, Sequence[Cell]]) -> Iterator[str]:
    """Yield the table of the goals for what is advised; nothing if none of it was run."""
    lines = []
    for name, table in tables.items():
        found = learned(name, table)
        for method, purpose in ADVISED.items():
            some = found.get(method.label)
            if some:
                worst, best = worst_of(some), best_of(some)
                reached = f"{shown(worst.mean, worst.kind)} to {shown(best.mean, best.kind)}"
                lines.append(f"| {NAMES[name]} | {purpose} | {reached} | {_goals(some, table)} |")
    if not lines:
        return
    yield ""
    yield "## What is advised, and where it falls short"
    yield ""
    yield (
        f"{GOALS} *Everything* is the defaults with the task's weight decay, judged at averaged "
        "weights, from 1e-8 to 1e-2. The others are older advice, from 1e-7 to 1e-3: (AdamW, fast "
        "Adam) with a `meta_lr` of 1e-2; for runs of a known length a cosine on top, towards a "
        "target that moves a discount of 0.99, for a network that sees an example a step one of "
        "0.999 and blocks that differ in kind. [All configurations](#where-it-falls-short)."
    )
    yield ""
    yield (
        "| task | advised for | worst to best start | diverged | to best fixed | to cosine | "
        "behind the best peer |"
    )
    yield "|" + " --- |" * 7
    yield from lines


def misses(tables: Mapping[str, Sequence[Cell]]) -> Iterator[str]:
    """Yield the table of the goals for all that was run."""
    yield ""
    yield "## Where it falls short"
    yield ""
    yield GOALS
    yield ""
    yield "| task | method | diverged | to best fixed | to cosine | behind the best peer |"
    yield "|" + " --- |" * 6
    for name, table in tables.items():
        for label, some in sorted(learned(name, table).items()):
            yield f"| {NAMES[name]} | {label} | {_goals(some, table)} |"


def _goals(some: Sequence[Cell], table: Sequence[Cell]) -> str:
    """Return by how much a configuration falls short from its worst start, in four cells."""
    worst = worst_of(some)
    assert isinstance(worst.method, Method)
    fixed, cosine = (of_base(table, worst.method.base, name) for name in ("constant", "cosine"))
    peers = [cell for cell in table if isinstance(cell.method, Peer)]
    diverged = sum(cell.diverged for cell in some)
    slack = 0.005 if worst.kind.more_is_better else 0.01
    behind = _short(worst, peers)
    who = f" ({best_of(peers).method.label})" if peers and behind else ""
    return (
        f"{diverged or ''} | {_short(worst, fixed)} | {_short(worst, cosine, slack)} | "
        f"{behind}{who}"
    )


def _short(cell: Cell, others: Sequence[Cell], slack: float = 0.0) -> str:
    """Return by how much a cell falls short of the best of others; empty where it does not."""
    if not others:
        return "not run"
    if cell.diverged:
        return "diverged"
    goal = best_of(others)
    if cell.kind.more_is_better:
        gap = goal.mean - cell.mean
        return f"{100 * gap:.1f}" if gap > max(slack, SAME) else ""
    gap = cell.mean / goal.mean - 1
    return f"{100 * gap:.1f}%" if gap > max(slack, SAME) else ""
