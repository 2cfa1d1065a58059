"""Which runs make a comparison, and which the maps of robustness."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.training.loop import Job
from benchmarks.training.methods import Method, Peer
from benchmarks.training.peers import PEERS
from benchmarks.training.tasks import TASKS

__all__ = [
    "ADVISED",
    "CHOOSING",
    "CURED",
    "DEFAULT",
    "DISCOUNTED",
    "FAR_STARTS",
    "GRIDS",
    "JUDGING",
    "LONG",
    "LONG_STEPS",
    "MAP_STARTS",
    "META_LRS",
    "PAIRS",
    "SCHEDULED",
    "SEEDS",
    "STARTS",
    "STREAMED",
    "comparison",
    "long",
    "maps",
    "starts_of",
]

SEEDS = (0, 1, 2, 3, 4)
#: Cheap tasks that are run for so many steps too.
LONG = ("drift", "logistic", "digits")
LONG_STEPS = 100_000
#: Tasks that constants of the library were chosen by, and those that none was chosen on.
CHOOSING = ("drift", "logistic", "digits", "characters", "cifar10", "continual")
JUDGING = ("shifts", "adding", "residual", "bytes", "autoencoder", "finetuning")
#: Where the learned step sizes of the comparison start, and where those that are to need no choice.
STARTS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
FAR_STARTS = (1e-8, 1e-7, 1e-5, 1e-3, 1e-2)
PAIRS = (
    ("AdamW", "Adam"),
    ("AdamW", "Lion"),
    ("Lion", "Lion"),
    ("RMSprop", "Adam"),
    ("SGDm", "Adam"),
)


def _grid(lowest: int) -> tuple[float, ...]:
    """Return half decades over four decades from 10**lowest."""
    digits = [f"{digit}e{power}" for power in range(lowest, lowest + 4) for digit in (1, 3)]
    return (*map(float, digits), 10.0 ** (lowest + 4))


#: Fixed step sizes. The momentum of SGDm is an average, so its steps are ten times smaller.
GRIDS = {"AdamW": _grid(-5), "Lion": _grid(-6), "RMSprop": _grid(-5), "SGDm": _grid(-3)}
#: Larger ones for the linear tasks, where the best of these is the last.
WIDER = {"AdamW": (0.3, 1.0), "RMSprop": (0.3, 1.0)}
LINEAR = ("drift", "logistic")
#: What keeps a step size from running away, on one step size for all weights.
BOUNDS = (1e-7, 1.0)
MAP_STARTS = tuple(10.0**power for power in range(-8, 0))
META_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MAP_PAIRS = (("AdamW", "Adam"), ("AdamW", "Lion"), ("Lion", "Lion"), ("SGDm", "Adam"))
#: The tasks whose runs cost most are compared on fewer methods, from fewer starts.
LARGE = ("characters", "cifar10", "continual", "continual-as-released")
#: meta_lr, discount and blocks that are compared.
VARIANTS = (
    (1e-2, 1.0, "scalar"),
    (1e-3, 1.0, "scalar"),
    (1e-2, 0.999, "scalar"),
    (1e-2, 1.0, "tensor"),
)
#: meta_lr and discount with which fast starts are compared.
CURES = ((1e-2, 0.99), (1e-2, 1.0), (1e-3, 1.0))
CURED = (
    ("AdamW", "fast Adam"),
    ("Lion", "fast Adam"),
    ("RMSprop", "fast Adam"),
    ("SGDm", "fast Adam"),
    ("AdamW", "fast Lion"),
)
#: What needs no choice: the defaults of the library, with the task's weight decay.
DEFAULT = Method(base="AdamW", meta="default", meta_lr=1e-2, discount=(0.99, 1.0), averages=True)
#: The same with a step size for each kind of layer.
GROUPED = replace(DEFAULT, blocks="groups")
SCHEDULED = Method(base="AdamW", meta="fast Adam", meta_lr=1e-2, schedule="cosine", warm_up=0.0)
DISCOUNTED = Method(base="AdamW", meta="fast Adam", meta_lr=1e-2, discount=0.99)
STREAMED = replace(DISCOUNTED, discount=0.999, blocks="groups")
#: What is advised, and for what.
ADVISED = {
    DEFAULT: "everything",
    SCHEDULED: "a known length",
    DISCOUNTED: "a target that moves",
    STREAMED: "a network, an example a step",
}


def starts_of(task: str, method: Method) -> tuple[float, ...]:
    """Return from where a method that learns its step sizes is run on a task.

    Parameters
    ----------
    task : str
    method : Method
        One of several discounts is to need no choice, so it starts far away too.
    """
    if task in JUDGING or isinstance(method.discount, tuple):
        return FAR_STARTS
    return STARTS[::2] if task in LARGE else STARTS


def comparison(task: str, seeds: tuple[int, ...] = SEEDS) -> Iterator[Job]:
    """Yield the jobs of a task's comparison, those that matter most first.

    Parameters
    ----------
    task : str
    seeds : tuple of int
    """
    yield from judged(task, seeds) if task in JUDGING else compared(task, seeds)
    if task in CHOOSING and TASKS[task].groups:
        yield _job(task, GROUPED, starts_of(task, GROUPED), seeds)


def judged(task: str, seeds: tuple[int, ...]) -> Iterator[Job]:
    """Yield the jobs of a task that judges: what is advised, and what it is held against.

    Parameters
    ----------
    task : str
    seeds : tuple of int
    """
    for schedule in ("constant", "cosine"):
        yield from tuned(task, ("AdamW",), schedule, seeds)
    for method in (DEFAULT, SCHEDULED, DISCOUNTED):
        yield _job(task, method, starts_of(task, method), seeds)
    yield from of_peers(task, seeds)


def tuned(task: str, bases: Iterable[str], schedule: str, seeds: tuple[int, ...]) -> Iterator[Job]:
    """Yield the jobs of a grid of fixed or scheduled step sizes.

    Parameters
    ----------
    task : str
    bases : iterable of str
        Of `GRIDS`.
    schedule : {"constant", "cosine"}
    seeds : tuple of int
    """
    for base in bases:
        method = Method(base=base, schedule=schedule)
        yield _job(task, method, GRIDS[base], seeds)
        if task in LINEAR and base in WIDER:
            yield _job(task, method, WIDER[base], seeds)


def of_peers(task: str, seeds: tuple[int, ...]) -> Iterator[Job]:
    """Yield the jobs of the peers, a run each: weights of theirs share numbers.

    Parameters
    ----------
    task : str
    seeds : tuple of int
    """
    for name in PEERS:
        starts = (1e-6, 1e-3) if name.startswith(("gdtuo", "hypergradient")) else (1.0,)
        for start in starts:
            for seed in seeds:
                yield _job(task, Peer(name=name), (start,), (seed,))


def compared(task: str, seeds: tuple[int, ...]) -> Iterator[Job]:
    """Yield the jobs of a task that constants were chosen by: all that was tried.

    Parameters
    ----------
    task : str
    seeds : tuple of int
    """
    yield _job(task, DEFAULT, starts_of(task, DEFAULT), seeds)
    large = task in LARGE
    bases = ("AdamW", "Lion") if large else tuple(GRIDS)
    yield from tuned(task, bases, "constant", seeds)
    cured = CURED[:2] if large else CURED
    initial = STARTS[::2] if large else STARTS

    def learned(
        pairs: Iterable[tuple[str, str]], meta_lr: float, discount: float, **more: Any
    ) -> Iterator[Job]:
        for base, meta in pairs:
            method = Method(base=base, meta=meta, meta_lr=meta_lr, discount=discount, **more)
            yield _job(task, method, initial, seeds)

    yield from learned(cured, *CURES[0])
    yield from of_peers(task, seeds)
    yield from tuned(task, bases, "cosine", seeds)
    yield _job(task, SCHEDULED, initial, seeds)
    for meta_lr, discount in CURES[1:]:
        yield from learned(cured, meta_lr, discount)
    for advised in (DISCOUNTED, SCHEDULED):  # with starts that one meta-gradient ends
        yield _job(task, replace(advised, meta="fast Adam 1"), initial, seeds)
    yield from learned(PAIRS[:1] if large else (*PAIRS[:1], *PAIRS[3:]), 1e-2, 0.99)
    for meta_lr, discount, blocks in VARIANTS:
        if blocks == "tensor" and large:
            continue
        if (task, blocks) == ("drift", "tensor"):
            blocks = "weight"  # it has one array, and is known for a step size a weight
        pairs = PAIRS[:3] if large else PAIRS
        yield from learned(pairs, meta_lr, discount, blocks=blocks)
    if task == "drift":
        for meta_lr in (1e-3, 1e-2):
            yield _job(task, idbd(meta_lr), (1e-3, 1e-2, 0.05), seeds)
        yield from learned(CURED[:4], 1e-2, 0.99, curvature="diagonal")
    if task == "continual":
        for streamed in (
            STREAMED,
            replace(STREAMED, blocks="scalar"),
            replace(STREAMED, meta_lr=1e-3),
        ):
            yield _job(task, streamed, initial, seeds)
    for discount in () if large else (1.0, 0.999):
        yield from learned(PAIRS[:3], 1e-2, discount, bounds=BOUNDS)
    yield from trials(task, initial, seeds)


def trials(task: str, initial: tuple[float, ...], seeds: tuple[int, ...]) -> Iterator[Job]:
    """Yield the jobs of a task that show what did not help, and with what they are compared.

    Parameters
    ----------
    task : str
    initial : tuple of float
        Initial step sizes.
    seeds : tuple of int
    """
    if task in ("drift", "logistic", "digits"):
        for base in ("averaged AdamW", "SGDm", "RMSprop", "Lion"):
            yield _job(task, replace(DEFAULT, base=base), FAR_STARTS, seeds)
        for base, meta in (("AdamW", "Adam"), ("AdamW", "Lion"), ("SGDm", "Adam")):
            clipped = Method(base=base, meta=f"clipped {meta}", meta_lr=1e-2)
            yield _job(task, clipped, initial, seeds)
    if task in ("logistic", "digits"):
        offsets = Method(base="AdamW", meta="Adam and offsets", meta_lr=1e-2, blocks="tensor")
        yield _job(task, offsets, initial, seeds)
    if task == "characters":
        for meta in ("fast Adam", "fast Adam and offsets"):
            yield _job(task, replace(SCHEDULED, meta=meta, blocks="tensor"), initial, seeds)


def long(task: str, seeds: tuple[int, ...]) -> Iterator[Job]:
    """Yield the jobs of a task's long runs: whether the `meta_lr` of short runs does for them.

    Parameters
    ----------
    task : str
    seeds : tuple of int
    """
    if task not in LONG:
        return
    averaged = replace(DEFAULT, base="averaged AdamW")
    for method in (DEFAULT, replace(DEFAULT, meta_lr=1e-3), averaged):
        yield _job(task, method, starts_of(task, method), seeds, LONG_STEPS)
    for schedule in ("constant", "cosine"):
        yield _job(task, Method(base="AdamW", schedule=schedule), GRIDS["AdamW"], seeds, LONG_STEPS)


def idbd(meta_lr: float) -> Method:
    """Return IDBD as `metaopt.presets.idbd` has it."""
    return Method(
        base="SGD",
        meta="SGD",
        meta_lr=meta_lr,
        blocks="weight",
        curvature="rectified",
        meta_first=True,
    )


def maps(task: str, seeds: tuple[int, ...] = SEEDS, steps: int | None = None) -> Iterator[Job]:
    """Yield the jobs of a task's maps: start by meta_lr in full, then one factor at a time.

    Parameters
    ----------
    task : str
    seeds : tuple of int
    steps : int, optional
        In place of the task's.
    """
    for base, meta in MAP_PAIRS:
        for meta_lr in META_LRS:
            method = Method(base=base, meta=meta, meta_lr=meta_lr)
            yield _job(task, method, MAP_STARTS, seeds, steps)
    for base, meta in MAP_PAIRS:
        for discount in (0.99, 0.999, 0.9999):
            method = Method(base=base, meta=meta, meta_lr=1e-2, discount=discount)
            yield _job(task, method, MAP_STARTS, seeds, steps)
        for blocks in ("tensor", "node", "weight"):
            method = Method(base=base, meta=meta, meta_lr=1e-2, blocks=blocks)
            yield _job(task, method, MAP_STARTS, seeds, steps)
    for base, meta in (("AdamW", "Adam"), ("SGDm", "Adam")):
        diagonal = Method(base=base, meta=meta, meta_lr=1e-2, curvature="diagonal")
        yield _job(task, diagonal, MAP_STARTS, seeds, steps)
        for start in MAP_STARTS[::2]:  # one run at a time: the traces of all would be dense
            exact = Method(base=base, meta=meta, meta_lr=1e-2, curvature="exact")
            yield _job(task, exact, (start,), seeds[:1], steps)


def _job(
    task: str,
    method: Method | Peer,
    starts: tuple[float, ...],
    seeds: tuple[int, ...],
    steps: int | None = None,
) -> Job:
    return Job(task=task, method=method, starts=starts, seeds=seeds, steps=steps)
