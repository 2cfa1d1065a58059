"""What is checked: configurations as data, and which of their combinations."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import metaopt as mo
from metaopt_conformance.problems import PROBLEMS, Problem

__all__ = ["BASES", "METAS", "OPTIONS", "Case", "covering", "pairs"]

# eps is large enough that rounding is not amplified where a gradient is small
BASES: dict[str, Any] = {
    "SGD": mo.SGD(weight_decay=0.1),
    "SGDm": mo.SGD(momentum=0.9, weight_decay=0.1),
    "RMSprop": mo.RMSprop(beta2=0.8, eps=1e-2, weight_decay=0.1),
    "AdamW": mo.AdamW(betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1),
    "Lion": mo.Lion(betas=(0.8, 0.9), weight_decay=0.1),
}
METAS: dict[str, Any] = {
    "SGD": mo.SGD(),
    "RMSprop": mo.RMSprop(beta2=0.8, eps=1e-2),
    "Adam": mo.AdamW(betas=(0.8, 0.9), eps=1e-2),
    "Lion": mo.Lion(betas=(0.8, 0.9)),
}
STEP_SIZES = {"SGD": 0.15, "SGDm": 0.2, "RMSprop": 0.05, "AdamW": 0.05, "Lion": 0.05}
META_LRS = {"SGD": 0.1, "RMSprop": 0.1, "Adam": 0.15, "Lion": 0.05}
GROUPS: dict[str, Any] = {"biases": ("*bias",), "rest": "*"}
SIGMAS: dict[str, Any] = {name: name for name in ("exp", "identity", "softplus")} | {
    "sigmoid": mo.Sigmoid(1e-3, 0.5)
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration and what happens to it during a run; every field has a plain default.

    `name` tells checks apart that are no matter of configuration: special cases and laws.
    """

    name: str = ""
    base: str = "SGD"
    meta: str = "SGD"
    problem: str = "logcosh"
    curvature: str = "none"
    approximation: str = "l"
    blocks: str = "scalar"
    sigma: str = "exp"
    discount: float = 1.0
    delayed: bool = False
    meta_first: bool = False
    trace: str = "update"
    bounds: str = "none"
    lr: str = "constant"
    missing: bool = False
    mixed: bool = False
    dtype: str = "float64"
    steps: int = 12

    def __str__(self) -> str:
        """Return the fields that are not at their defaults, as the command line takes them."""
        plain = Case()
        changed = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        }
        return ",".join(f"{name}={value}" for name, value in changed.items()) or "plain"

    @staticmethod
    def parse(text: str) -> "Case":
        """Return the case that `str` wrote; raise ValueError for anything else."""
        plain, values = Case(), dict[str, Any]()
        for part in [] if text == "plain" else text.split(","):
            name, found, value = part.partition("=")
            if not found or name not in Case.__dataclass_fields__:
                msg = f"`case` must be name=value,...; got {part!r}."
                raise ValueError(msg)
            kind = type(getattr(plain, name))
            values[name] = value == "True" if kind is bool else kind(value)
        return replace(plain, **values)

    @property
    def subject(self) -> Problem:
        """The problem."""
        return PROBLEMS[self.problem]

    @property
    def pair(self) -> str:
        """Base and meta update, or the name."""
        return self.name or f"{self.base} + {self.meta}"

    def opt(self) -> mo.MetaOptimize:
        """Return the configuration in the library."""
        base, meta = BASES[self.base], METAS[self.meta]
        if self.delayed:
            base, meta = delay(base), delay(meta)
        step_size, meta_lr = STEP_SIZES[self.base], META_LRS[self.meta]
        if self.sigma == "identity":
            meta_lr *= 0.05
        return mo.MetaOptimize(
            base={"*weight": mo.SGD(), "*": base} if self.mixed else base,
            meta=meta,
            step_size=step_size,
            meta_lr=meta_lr,
            discount=self.discount,
            blocks=GROUPS if self.blocks == "groups" else self.blocks,
            sigma=SIGMAS[self.sigma],
            bounds=self._bounds(step_size),
            approximation=self.approximation,
            curvature=mo.curvature.Diagonal(rectified=True)
            if self.curvature == "rectified"
            else self.curvature,
            trace=self.trace,
            meta_first=self.meta_first,
        )

    def _bounds(self, step_size: float) -> Any:
        """Return bounds that are soon touched, for all blocks or those of one name."""
        pair = (0.9 * step_size, 1.1 * step_size)
        first = {"scalar": "all", "groups": "biases"}.get(
            self.blocks, next(iter(self.subject.shapes))
        )
        return {"none": None, "all": pair, "one": {first: pair}}[self.bounds]

    def multiplier(self, t: int) -> Any:
        """Return what `lr` is in step t."""
        if self.lr == "constant":
            return 1.0
        schedule = (1.0, 0.5, 0.0, 1.0, 0.25)
        if self.lr == "schedule":
            return schedule[t % 5]
        names = list(self.subject.shapes)
        return {name: schedule[(t + index) % 5] for index, name in enumerate(names)}

    def absent(self, t: int) -> frozenset[str]:
        """Return the leaves without a gradient in step t."""
        names = list(self.subject.shapes)
        if not self.missing or t % 4 != 2:
            return frozenset()
        return frozenset(names[: t // 4 + 1])

    def possible(self) -> bool:
        """Say whether the library defines this combination."""
        pair = BASES[self.base], METAS[self.meta]
        if self.delayed and tuple(map(delay, pair)) == pair:
            return False
        if self.approximation == "full" and (self.curvature != "exact" or self.meta_first):
            return False
        if self.trace == "gradient" and (
            self.curvature != "none" or self.delayed or self.base == "Lion"
        ):
            return False
        return self.curvature != "rectified" or self.base == "SGD"


def delay(rule: Any) -> Any:
    """Return the rule with delayed moments, itself where it has none to delay."""
    return replace(rule, delayed=True) if rule.slots and hasattr(rule, "delayed") else rule


OPTIONS: Mapping[str, Sequence[Any]] = {
    "problem": tuple(PROBLEMS),
    "curvature": ("none", "diagonal", "exact", "rectified"),
    "approximation": ("l", "2x2", "full"),
    "blocks": ("scalar", "tensor", "node", "weight", "groups"),
    "sigma": tuple(SIGMAS),
    "discount": (1.0, 0.9, 0.0),
    "delayed": (False, True),
    "meta_first": (False, True),
    "trace": ("update", "gradient"),
    "bounds": ("none", "all", "one"),
    "lr": ("constant", "schedule", "by name"),
    "missing": (False, True),
    "mixed": (False, True),
}


def pairs() -> Iterator[tuple[str, str]]:
    """Yield every base with every meta update."""
    return itertools.product(BASES, METAS)


def covering(plain: Case, options: Mapping[str, Sequence[Any]] = OPTIONS) -> list[Case]:
    """Return cases in which any two values of two options that go together meet at least once.

    Greedy: a case starts from a pair of values not yet met, and takes for every other option, in
    turn, the value by which most new pairs meet. Deterministic.
    """
    names = list(options)
    open_pairs = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in options[a]
        for y in options[b]
    }
    order = sorted(
        open_pairs, key=lambda p: (names.index(p[0]), str(p[1]), names.index(p[2]), str(p[3]))
    )
    cases: list[Case] = []
    for pair in order:
        if pair not in open_pairs:
            continue
        a, x, b, y = pair
        case = _completed(plain, {a: x, b: y}, options, open_pairs)
        open_pairs.discard(pair)
        if case is not None:
            cases.append(case)
            open_pairs -= _met(case, names)
    return cases


def _completed(plain: Case, fixed: dict[str, Any], options: Any, open_pairs: Any) -> Case | None:
    """Return a possible case with the fixed values, or None if there is none."""
    names = list(options)
    chosen = dict(fixed)
    if not _completable(plain, chosen):
        return None
    for name in names:
        if name in chosen:
            continue
        trials = [chosen | {name: value} for value in options[name]]
        for trial in sorted(trials, key=lambda trial: -_new(trial, open_pairs)):
            if _completable(plain, trial):
                chosen = trial
                break
        else:
            return None
    case = replace(plain, **chosen)
    return case if case.possible() else None


def _new(chosen: dict[str, Any], open_pairs: Any) -> int:
    """Return how many pairs of values not yet met the choice has."""
    return sum(1 for a, x, b, y in open_pairs if _has(chosen, a, x) and _has(chosen, b, y))


def _has(chosen: dict[str, Any], name: str, value: Any) -> bool:
    return name in chosen and chosen[name] == value


def _completable(plain: Case, chosen: dict[str, Any]) -> bool:
    """Say whether a choice is possible, or will be by the values of options left."""
    if chosen.get("approximation") == "full":  # what it needs need not be chosen yet
        chosen = {"curvature": "exact"} | chosen
    return replace(plain, **chosen).possible()


def _met(case: Case, names: list[str]) -> set[tuple[str, Any, str, Any]]:
    return {(a, getattr(case, a), b, getattr(case, b)) for a, b in itertools.combinations(names, 2)}
