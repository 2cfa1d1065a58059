"""The paper's runs, as printed and as the authors' released code acts; mathematics section 14.

The released code sums gradients in the first moments of AdamW and of the Adam of step sizes,
without the factor 1 - rho, so that a step size is worth ten, and weight decay beside it a tenth;
its SGD with momentum lags a step, and its epsilon is 1e-10 inside of the root.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.paper.images import Cifar10, ImageNet
from benchmarks.paper.language import TinyStories
from benchmarks.training.loop import Job
from benchmarks.training.methods import Method, Peer
from benchmarks.training.tasks import TASKS, Task

__all__ = ["EXPERIMENTS", "PAPER_TASKS", "Experiment", "runs"]

PAPER_TASKS: dict[str, type[Task]] = {
    "cifar10-resnet18": Cifar10,
    "continual": TASKS["continual"],
    "continual-as-released": TASKS["continual-as-released"],
    "imagenet": ImageNet,
    "tinystories": TinyStories,
}
PEERS = ("DoG, averaged", "gdtuo Adam/Adam", "Prodigy", "mechanic AdamW")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What the paper reports of one data set.

    Parameters
    ----------
    task, released : str
        Of `PAPER_TASKS`, as printed and as the released code has it.
    pairs : tuple of (base, meta)
    blocks : tuple of str
    fixed : tuple of (base, step sizes)
        Fixed step sizes: the best that the paper found, or a grid.
    cosine : (step size, part of warm-up), optional
        Peak of AdamW with warm-up and cosine.
    peers : tuple of str
    robustness : tuple of float
        More starts of (Lion, Lion) with one step size.
    start, discount : float
    seeds : tuple of int
    beyond : tuple of (Method, starts)
        What the paper does not have; not run as the released code acts.
    """

    task: str
    released: str
    pairs: tuple[tuple[str, str], ...]
    blocks: tuple[str, ...] = ("scalar",)
    fixed: tuple[tuple[str, tuple[float, ...]], ...]
    cosine: tuple[float, float] | None = None
    peers: tuple[str, ...] = ()
    robustness: tuple[float, ...] = ()
    start: float = 1e-6
    discount: float = 1.0
    seeds: tuple[int, ...] = (0,)
    beyond: tuple[tuple[Method, tuple[float, ...]], ...] = ()


#: Fast starts, with the paper's settings otherwise, and as they suit runs of a few thousand steps.
FAST = Method(base="AdamW", meta="fast Adam", meta_lr=1e-3, discount=0.999, weight_decay=0.1)
CONTINUAL = (
    (replace(FAST, meta_lr=1e-2, discount=0.99), (1e-7, 1e-4)),
    (FAST, (1e-7, 1e-4)),
    (replace(FAST, blocks="groups"), (1e-7, 1e-4)),
)

EXPERIMENTS: dict[str, Experiment] = {
    "cifar10": Experiment(
        task="cifar10-resnet18",
        released="cifar10-resnet18",
        pairs=(("AdamW", "Adam"), ("Lion", "Lion"), ("RMSprop", "Adam"), ("SGDm", "Adam")),
        blocks=("scalar", "groups"),
        fixed=(
            ("AdamW", (1e-5,)),
            ("Lion", (1e-4,)),
            ("RMSprop", (1e-5,)),
            ("SGDm", (1e-3,)),
        ),
        robustness=(1e-7, 1e-8, 1e-9),
    ),
    "continual-cifar100": Experiment(
        task="continual",
        released="continual-as-released",
        pairs=(("AdamW", "Adam"),),
        blocks=("scalar", "groups"),
        fixed=(("AdamW", (1e-5, 1e-4, 1e-3, 1e-2)),),
        start=1e-4,
        discount=0.999,
        seeds=(0, 1, 2, 3, 4),
        beyond=CONTINUAL,
    ),
    "imagenet": Experiment(
        task="imagenet",
        released="imagenet",
        pairs=(("AdamW", "Lion"), ("Lion", "Lion"), ("SGDm", "Lion")),
        fixed=(("AdamW", (1e-5, 1e-4, 1e-3)), ("Lion", (1e-5, 1e-4, 1e-3))),
        cosine=(1e-3, 10_000 / ImageNet.steps),
        peers=PEERS,
    ),
    "tinystories": Experiment(
        task="tinystories",
        released="tinystories",
        pairs=(("AdamW", "Lion"), ("AdamW", "Adam"), ("Lion", "Lion")),
        fixed=(("AdamW", (1e-5, 1e-4, 1e-3)), ("Lion", (1e-5, 1e-4, 1e-3))),
        cosine=(1e-3, 1000 / TinyStories.steps),
        peers=PEERS,
    ),
}


def runs(
    name: str, *, released: bool = False, smoke: bool = False, precision: str = "fp32"
) -> Iterator[Job]:
    """Yield the jobs of an experiment.

    Parameters
    ----------
    name : str
        Of `EXPERIMENTS`.
    released : bool
        As the authors' released code acts, in place of as printed.
    smoke : bool
        Two steps of each, on tiny networks.
    precision : {"fp32", "tf32", "bf16"}
        The paper's is fp32.
    """
    experiment = EXPERIMENTS[name]
    task = experiment.released if released else experiment.task
    plans: list[tuple[Method | Peer, tuple[float, ...]]] = []
    for base, meta in experiment.pairs:
        for blocks in experiment.blocks:
            starts: tuple[float, ...] = (experiment.start,)
            if (base, meta, blocks) == ("Lion", "Lion", "scalar"):
                starts += experiment.robustness
            plans.append(_method(base, meta, blocks, experiment.discount, starts, released))
    plans += [
        _method(base, None, "scalar", 1.0, sizes, released) for base, sizes in experiment.fixed
    ]
    if experiment.cosine is not None:
        peak, part = experiment.cosine
        scheduled = Method(base="AdamW", schedule="cosine", warm_up=part, weight_decay=0.1)
        plans.append((scheduled, (peak,)))
    plans += [(Peer(name=peer), (1e-3,)) for peer in experiment.peers]
    plans += () if released else experiment.beyond
    seeds = experiment.seeds[:1] if smoke else experiment.seeds
    for method, starts in plans:
        together = PAPER_TASKS[task].replicated and isinstance(method, Method)
        for some in [starts] if together else [(start,) for start in starts]:
            for these in [seeds] if together else [(seed,) for seed in seeds]:
                yield Job(
                    task=task,
                    method=method,
                    starts=some,
                    seeds=these,
                    steps=2 if smoke else None,
                    precision=precision,
                    smoke=smoke,
                )


def _method(
    base: str,
    meta: str | None,
    blocks: str,
    discount: float,
    starts: tuple[float, ...],
    released: bool,
) -> tuple[Method, tuple[float, ...]]:
    """Return a method and its starts, multiplied where the released code's are worth more."""
    tenfold = 10.0 if released and base == "AdamW" else 1.0
    meta_tenfold = 10.0 if released and meta == "Adam" else 1.0
    method = Method(
        base=f"{base} as released" if released and base != "Lion" else base,
        meta=f"{meta} as released" if released and meta == "Adam" else meta,
        meta_lr=meta_tenfold * 1e-3,
        discount=discount,
        blocks=blocks,
        weight_decay=0.1 / tenfold,
    )
    return method, tuple(float(f"{tenfold * start:.6g}") for start in starts)
