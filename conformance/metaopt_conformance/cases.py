"""What is checked: configurations as data, and what happens to them during a run."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np

import metaopt as mo
from metaopt.rules.learned import at_start, bound
from metaopt.step_sizes import step_size_map
from metaopt_conformance.backends import DTYPES
from metaopt_conformance.oracle import Matrix
from metaopt_conformance.problems import PROBLEMS, Problem
from metaopt_conformance.table import BASES, MAPS, METAS, RULES, SIGMAS, has
from metaopt_conformance.translate import block_index
from metaopt_conformance.updates import Vector

__all__ = ["OPTIONS", "SCHEDULE", "Case", "pairs"]

RATES = {name: use.rate for row in RULES for name, use in row.bases.items()}
META_RATES = {name: use.rate for row in RULES for name, use in row.metas.items()}
#: The rules of the table forget within a dozen steps; these are the decay rates that are used.
USUAL: dict[type, Mapping[str, Any]] = {row.kind: row.usual for row in RULES}
BLOCKS: dict[str, Any] = {name: name for name in ("scalar", "tensor", "node", "weight")} | {
    "last node": mo.blocks.node(axis=-1),
    "groups": {"biases": ("*bias",), "rest": "*"},
}
#: With the table's weight decay of 0.1, a twentieth of the weights is lost in a step.
DECAY_STEP_SIZE = 0.5
ADDITIVE = {row.name for row in MAPS if row.additive}
SCHEDULE = (1.0, 0.5, 0.0, 1.0, 0.25)

OPTIONS: Mapping[str, Sequence[Any]] = {
    "problem": tuple(PROBLEMS),
    "curvature": ("none", "diagonal", "exact", "rectified"),
    "approximation": ("l", "2x2", "full"),
    "blocks": tuple(BLOCKS),
    "sigma": tuple(SIGMAS),
    "discount": (1.0, 0.9, (0.9, 1.0), 0.0),
    "eps": (1e-2, 0.0),
    "decays": ("fast", "usual"),
    "bias_correction": (True, False),
    "delayed": (False, True),
    "decay_apart": (False, True),
    "held_out": ("no", "each", "some"),
    "meta_first": (False, True),
    "step_size": ("one", "each"),
    "bounds": ("none", "all", "one", "upper"),
    "lr": ("constant", "schedule", "by name", "arrays"),
    "missing": (False, True),
    "faulty": ("nothing", "gradient", "huge", "curvature"),
    "skip_nonfinite": (False, True),
    "mixed": (False, True),
    "start": ("usual", "fast"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration and what happens to it during a run; every field has a plain default.

    Parameters
    ----------
    name : str
        Tells checks apart that are no matter of configuration: special cases and laws.
    base, meta, problem, curvature, blocks, sigma : str
        Keys of the tables here, of those in `table`, and of `PROBLEMS`; "rectified" is a
        curvature of its own.
    approximation, discount, meta_first, skip_nonfinite
        As `metaopt.MetaOptimize` takes them.
    eps, bias_correction, delayed
        Of the rules that have them, in either role.
    decay_apart : bool
        Whether weight decay has a step size of its own.
    start : {"usual", "fast"}
        Whether the meta update is three times faster until its count of positive z is 2.
    decays : {"fast", "usual"}
        Decay rates of moments: such that they change within a dozen steps, or the most used.
    held_out : {"no", "each", "some"}
        Whether meta-gradients are made with those of another loss, in each step or in every third.
    step_size : {"one", "each"}
        The same for all blocks at the start, or another for each.
    bounds : {"none", "all", "one", "upper"}
        On no step size, on all, on those of the first name, or from above alone.
    lr : {"constant", "schedule", "by name", "arrays"}
        The multiplier: 1, or a schedule with zeros, by leaf, by leaf as arrays.
    missing : bool
        Whether gradients are absent now and then.
    faulty : {"nothing", "gradient", "huge", "curvature"}
        What of the first weight is not finite, or too large: its gradient in the last step, with
        `held_out` "each" that of the other loss; or its entry on the Hessian's diagonal half way.
    mixed : bool
        Whether some leaves have another rule.
    learned : bool
        Whether all that can be is learned of the base update, see `learnable_places`.
    dtype : str
        Of the parameters; what they are computed in may be wider.
    first_leaf : {"same", "float32"}
        Dtype of the first leaf.
    steps : int
    """

    name: str = ""
    base: str = "SGD"
    meta: str = "SGD"
    problem: str = "logcosh"
    curvature: str = "none"
    approximation: str = "l"
    blocks: str = "scalar"
    sigma: str = "exp"
    discount: float | tuple[float, ...] = 1.0
    eps: float = 1e-2
    decays: str = "fast"
    bias_correction: bool = True
    delayed: bool = False
    decay_apart: bool = False
    start: str = "usual"
    held_out: str = "no"
    meta_first: bool = False
    step_size: str = "one"
    bounds: str = "none"
    lr: str = "constant"
    missing: bool = False
    faulty: str = "nothing"
    skip_nonfinite: bool = False
    mixed: bool = False
    learned: bool = False
    dtype: str = "float64"
    first_leaf: str = "same"
    steps: int = 12

    def __str__(self) -> str:
        """Return the fields that are not at their defaults, as the command line takes them."""
        plain = type(self)()
        changed = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        }
        return ",".join(f"{name}={_text(value)}" for name, value in changed.items()) or "plain"

    @staticmethod
    def parse(text: str) -> "Case":
        """Return the case that `str` wrote; raise ValueError for anything else."""
        values = dict[str, Any]()
        for part in [] if text == "plain" else text.split(","):
            name, found, value = part.partition("=")
            if not found or name not in Case.__dataclass_fields__:
                msg = f"`case` must be name=value,...; got {part!r}."
                raise ValueError(msg)
            values[name] = _parsed(name, value)
        case = Case(**values)
        refusal = case.refusal()
        if refusal is not None:
            msg = f"`case` is not defined: {refusal}; got {text!r}."
            raise ValueError(msg)
        return case

    @property
    def subject(self) -> Problem:
        """The problem."""
        return PROBLEMS[self.problem]

    @property
    def pair(self) -> str:
        """Base and meta update, or the name."""
        return self.name or f"{self.base} + {self.meta}"

    def dtype_of(self, leaf: str) -> str:
        """Return the dtype of a leaf."""
        first = next(iter(self.subject.shapes))
        return self.dtype if self.first_leaf == "same" or leaf != first else self.first_leaf

    @property
    def wide(self) -> bool:
        """Whether everything is computed in float64."""
        return self.dtype == "float64" and self.first_leaf == "same"

    def rules(self) -> tuple[Any, Any]:
        """Return base and meta update."""
        base, meta = (self._varied(rule) for rule in (BASES[self.base], METAS[self.meta]))
        if self.decay_apart:
            base = replace(base, decay_step_size=DECAY_STEP_SIZE)
        if self.learned:
            base = bound(base, _learned(base, meta, META_RATES[self.meta]))
        return base, meta if self.start == "usual" else mo.FastStart(
            meta, factor=3.0, patience=2, retreat=1.0
        )

    def _varied(self, rule: Any) -> Any:
        changes: dict[str, Any] = {} if self.decays == "fast" else dict(USUAL.get(type(rule), {}))
        options = ("eps", "bias_correction", "delayed")
        changes |= {name: getattr(self, name) for name in options if has(rule, name)}
        return replace(rule, **changes)

    def opt(self) -> mo.MetaOptimize:
        """Return the configuration in the library: one object for all its runs, in any dtype."""
        plain = Case()
        return _opt(replace(self, **{name: getattr(plain, name) for name in OF_A_RUN}))

    def multiplier(self, t: int) -> Any:
        """Return what `lr` is in step t, numbers."""
        if self.lr == "constant":
            return 1.0
        if self.lr == "schedule":
            return SCHEDULE[t % 5]
        names = list(self.subject.shapes)
        return {name: SCHEDULE[(t + index) % 5] for index, name in enumerate(names)}

    def absent(self, t: int) -> frozenset[str]:
        """Return the leaves without a gradient in step t: one to three of the first.

        The first leaf has none in the first step, so that it starts later than others.
        """
        names = list(self.subject.shapes)
        if not self.missing or (t > 0 and t % 3 != 1):
            return frozenset()
        return frozenset(names[: t // 3 % 3 + 1])

    def grad(self, t: int, w: Vector) -> Vector:
        """Return the gradient of step t, with what is faulty in it."""
        grad = self.subject.grad(t, w)
        return grad if self.held_out == "each" else self._spoiled(t, grad)

    def source(self, t: int, w: Vector) -> Vector:
        """Return what the meta-gradient of step t is made with, in the leaves `judged`."""
        if self.held_out == "no":
            return self.grad(t, w)
        grad = self.subject.grad(t + 1000, w)  # of other data
        return self._spoiled(t, grad) if self.held_out == "each" else grad

    def judged(self, t: int) -> frozenset[str]:
        """Return the leaves of which there is a `source` in step t."""
        names = frozenset(self.subject.shapes)
        if self.held_out == "no":
            return names
        if self.held_out == "some" and t % 3 != 2:
            return frozenset()
        return names - {list(self.subject.shapes)[-1]} if self.missing and t % 4 == 3 else names

    def _spoiled(self, t: int, grad: Vector) -> Vector:
        """Return a gradient with what is faulty in it."""
        if self.faulty in ("gradient", "huge") and t == self.steps - 1:
            # such that its product with the trace is finite, but not the square of that
            huge = 1e155 if self.dtype == "float64" else 1e22
            grad[0] = np.inf if self.faulty == "gradient" else huge
        return grad

    def hessian(self, t: int, w: Vector) -> Matrix:
        """Return the Hessian of step t, with what is faulty in it."""
        hessian = self.subject.hessian(t, w)
        if self.faulty == "curvature" and t == self.steps // 2:
            hessian[0, 0] = np.inf
        return hessian

    def hessian_diagonal(self, t: int, w: Vector) -> Vector:
        """Return the Hessian's diagonal in step t, stretched until the rectifier is at work."""
        return np.diag(self.hessian(t, w)) * (8.0 if self.curvature == "rectified" else 1.0)

    def possible(self) -> bool:
        """Say whether the library defines this combination, and every option has a meaning."""
        return self.refusal() is None

    def refusal(self) -> str | None:
        """Return what is amiss with a combination that is not possible, else None."""
        plain = Case()
        for name in ("delayed", "decays", "bias_correction"):
            usual = getattr(plain, name)
            if (
                getattr(self, name) != usual
                and self.rules() == replace(self, **{name: usual}).rules()
            ):
                return f"{name} changes neither {self.base} nor {self.meta}"
        if self.eps != plain.eps and not has(BASES[self.base], "eps"):
            return f"eps needs a base that has one, not {self.base}"
        if self.eps == 0.0 and self.delayed and "RMSprop" in (self.base, self.meta):
            # a gradient over the root of older ones alone, which may be as small as they like
            return "delayed RMSprop needs eps above 0"
        if self.meta == "RMSprop" and self.delayed and self.start == "fast":
            # over the root of a far smaller first meta-gradient: step sizes explode, and collapse
            return "delayed RMSprop as meta update needs start usual"
        if self.approximation == "full" and (self.curvature != "exact" or self.meta_first):
            return "approximation full needs curvature exact, and no meta_first"
        if self.approximation != "l" and self.held_out != "no":
            return "held_out needs approximation l"
        if self.approximation != "l" and isinstance(self.discount, tuple):
            return "several discounts need approximation l"
        if self.curvature == "rectified" and self.base != "SGD":
            return f"curvature rectified needs base SGD, not {self.base}"
        if self.learned and (self.curvature == "rectified" or self.approximation == "full"):
            return "learned needs another curvature than rectified, and approximation l or 2x2"
        if self.step_size == "each" and self.blocks == "scalar":
            return "step_size each needs more than one block"
        if self.faulty == "curvature" and (self.curvature == "none" or self.discount == 0.0):
            return "faulty curvature needs curvature, and a discount above 0"
        if self.faulty == "curvature" and self.eps == 0.0:
            # a derivative of 0 times what is not finite: the order of operations says what it is
            return "faulty curvature needs eps above 0"
        if self.faulty == "huge" and not self.wide:
            if self.dtype == "float16" or self.first_leaf != "same":
                return "faulty huge needs leaves of one dtype with room for it"
            if has(BASES[self.base], "eps"):
                return "faulty huge, in float32, needs a base that does not square it"
        if self.first_leaf == self.dtype:
            return f"first_leaf is {self.dtype} already"
        return None


#: What the fields that are no numbers may be.
CHOICES: Mapping[str, Sequence[Any]] = {
    "base": tuple(BASES),
    "meta": tuple(METAS),
    **{name: values for name, values in OPTIONS.items() if name not in ("discount", "eps")},
    "dtype": DTYPES,
    "first_leaf": ("same", "float32"),
    "learned": (False, True),
}
#: What stands between several discounts.
SEVERAL = " and "
#: Fields that are no part of the configuration.
OF_A_RUN = ("name", "lr", "missing", "faulty", "dtype", "first_leaf", "steps")


@cache
def _opt(case: Case) -> mo.MetaOptimize:
    base, meta = case.rules()
    step_size = RATES[case.base] * _shortening(base)
    meta_lr = META_RATES[case.meta] * _shortening(meta)
    if case.sigma in ADDITIVE:  # and z is by differences of step sizes
        meta_lr *= 0.05 * _shortening(base) ** 2
    shapes, blocks = case.subject.shapes, BLOCKS[case.blocks]
    _, names = block_index(blocks, shapes)
    return mo.MetaOptimize(
        base={"*weight": mo.SGD(), "*": base} if case.mixed else base,
        meta=meta,
        step_size=_each(step_size, names, shapes, case.blocks)
        if case.step_size == "each"
        else step_size,
        meta_lr=meta_lr,
        discount=case.discount,
        blocks=blocks,
        sigma=SIGMAS[case.sigma],
        bounds=_bounds(case, step_size, names[0]),
        approximation=case.approximation,
        curvature=mo.curvature.Diagonal(rectified=True)
        if case.curvature == "rectified"
        else case.curvature,
        held_out=case.held_out != "no",
        meta_first=case.meta_first,
        skip_nonfinite=case.skip_nonfinite,
    )


def learnable_places(rule: Any, meta: Any) -> list[str]:
    """Return the numbers of a base update that can be learned, and compared.

    The second meta-gradient of the decay rate of a moment with bias correction is rounding alone,
    which a meta update that divides by the root of its squares, or counts it, would show.
    """
    places = ["weight_decay"] if rule.weight_decay else []
    places += ["eps"] if has(rule, "eps") and rule.eps else []
    corrected = has(rule, "eps") and getattr(rule, "bias_correction", True)
    if isinstance(meta, mo.SGD) or not corrected:
        places += [place for place in ("momentum", "beta2") if getattr(rule, place, 0.0)]
        places += ["betas[0]", "betas[1]"] if has(rule, "betas") and has(rule, "eps") else []
    return places


def _learned(rule: Any, meta: Any, rate: float) -> dict[str, Any]:
    """Return what stands in these places: other blocks than the step size's, and bounds."""
    own: dict[str, Any] = {
        "weight_decay": {"bounds": (0.08, 0.13), "meta_lr": rate},
        "betas[0]": {"blocks": "tensor"},
        "momentum": {"blocks": "tensor"},
        "eps": {"map": "softplus"},
    }
    learned = {}
    for place in learnable_places(rule, meta):
        field, _, index = place.partition("[")
        value = getattr(rule, field)
        start = value[int(index[0])] if index else value
        learned[place] = mo.Learned(start, **({"meta_lr": 0.3 * rate} | own.get(place, {})))
    return learned


def _shortening(rule: Any) -> float:
    """Return the inverse of a direction's length in the first steps."""
    rule = at_start(getattr(rule, "rule", rule))
    if getattr(rule, "bias_correction", True):
        return 1.0
    return float(np.sqrt(1.0 - rule.beta2))


def _each(step_size: float, names: list[str], shapes: Any, blocks: str) -> dict[str, Any]:
    """Return step sizes around one, another for each block, by name."""
    sizes = step_size * np.linspace(0.93, 1.07, len(names))
    by_name: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        own = sizes[[other == name for other in names]]
        if blocks == "weight":
            by_name[name] = own.reshape(shapes[name])
        else:
            by_name[name] = own if own.size > 1 else own[0]
    return by_name


def _text(value: Any) -> str:
    """Return the value of a field as text without a comma."""
    return SEVERAL.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parsed(name: str, value: str) -> Any:
    """Return the value of a field from its text, or raise ValueError."""
    choices = CHOICES.get(name)
    if name == "name":
        return value
    if name == "discount" and SEVERAL in value:
        several = tuple(_parsed(name, part) for part in value.split(SEVERAL))
        if any(one >= other for one, other in itertools.pairwise(several)):
            msg = f"several discounts of a case go from the least to the largest; got {value!r}."
            raise ValueError(msg)
        return several
    if choices is not None:
        found = {str(choice): choice for choice in choices}
        if value not in found:
            msg = f"`{name}` of a case must be one of {', '.join(found)}; got {value!r}."
            raise ValueError(msg)
        return found[value]
    kind, least = (int, 1) if name == "steps" else (float, 0.0)
    try:
        number = kind(value)
    except ValueError:
        number = -1
    if not least <= number < np.inf or (name == "discount" and number > 1.0):
        what = {"steps": "an integer of at least 1", "discount": "a number in [0, 1]"}
        msg = f"`{name}` of a case must be {what.get(name, 'at least 0')}; got {value!r}."
        raise ValueError(msg)
    return number


def _bounds(case: Case, step_size: float, first: str) -> Any:
    """Return bounds that are soon touched."""
    lo, hi = 0.9 * step_size, 1.1 * step_size
    least, _ = step_size_map(SIGMAS[case.sigma]).range
    return {"none": None, "all": (lo, hi), "one": {first: (lo, hi)}, "upper": (least, hi)}[
        case.bounds
    ]


def pairs() -> Iterator[tuple[str, str]]:
    """Yield every base with every meta update."""
    return itertools.product(BASES, METAS)
