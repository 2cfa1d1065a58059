"""The families of checks, and the cases that each is made on."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from metaopt_conformance.against_oracle import learned, single_steps, trajectory
from metaopt_conformance.cases import OPTIONS, Case, pairs
from metaopt_conformance.checks import compiled, laws, plain_optimizer, pure, special
from metaopt_conformance.covering import covering
from metaopt_conformance.derivatives import jets, trace_differences
from metaopt_conformance.laws import LAWS
from metaopt_conformance.literature import FORMS
from metaopt_conformance.runs import Under
from metaopt_conformance.table import BASES, METAS, has
from metaopt_conformance.verdicts import Skip

__all__ = ["FAMILIES", "Family"]

Dtypes = tuple[str, ...]

PAIRS: dict[str, Any] = {"base": tuple(BASES), "meta": tuple(METAS)}
#: More discounts than the options have at a time, in a few cases: others would compile for them.
THREE = Case(discount=(0.0, 0.8, 1.0), blocks="tensor")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of check and the cases it is made on.

    Parameters
    ----------
    name : str
    what : str
        In one line, for the report.
    check : callable
        From `Under` and `Case` to the worst error, as a share of what is allowed. It raises
        `Failure` where a number cannot tell, and `Skip` where the check does not apply.
    cases : callable
        From the backend's dtypes and whether to be quick to the cases.
    any_dtype : bool, default False
        Whether it is made in other dtypes than float64.
    wrapped : callable, optional
        In place of `cases` for optimizers that are wrapped.
    """

    name: str
    what: str
    check: Callable[[Under, Case], float]
    cases: Callable[[Dtypes, bool], Iterator[Case]]
    any_dtype: bool = False
    wrapped: Callable[[Dtypes, bool], Iterator[Case]] | None = None

    def run(self, under: Under, case: Case) -> float:
        """Make the check on a case; a warning is an error, but where numbers are to overflow."""
        if case.dtype != "float64" and not self.any_dtype:
            msg = f"{self.name} is compared in float64 alone"
            raise Skip(msg)
        for dtype in dict.fromkeys((case.dtype, *map(case.dtype_of, case.subject.shapes))):
            if dtype not in under.backend.dtypes:
                msg = f"the library has no {dtype}"
                raise Skip(msg)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if case.faulty == "nothing" else "ignore")
            return self.check(under, case)


def _of_pairs(_dtypes: Dtypes, quick: bool) -> Iterator[Case]:
    if quick:
        yield from _quickly()
        yield Case(missing=True)  # a leaf that starts late, in a block that has begun
        yield replace(THREE, base="AdamW", meta="Adam", problem="drifting")
        # the held-out gradient alone is not finite
        yield Case(held_out="each", faulty="gradient", skip_nonfinite=True)
        yield replace(THREE, faulty="huge")  # in the first block one meta-gradient is usable
        # a fast start that ends in the middle of the run
        yield Case(
            blocks="weight", discount=(0.9, 1.0), start="fast", held_out="each", decay_apart=True
        )
        return
    for base, meta in pairs():
        yield from covering(Case(base=base, meta=meta))
        yield replace(THREE, base=base, meta=meta)
        for problem in ("logcosh", "network"):  # long enough for a slow drift to show
            yield Case(base=base, meta=meta, problem=problem, blocks="tensor", steps=200)


@cache
def _quickly() -> tuple[Case, ...]:
    return tuple(covering(Case(), PAIRS | dict(OPTIONS)))


def _of_dtypes(dtypes: Dtypes, quick: bool) -> Iterator[Case]:
    mixed = {"first_leaf": ("same", "float32")} if "float32" in dtypes else {}
    if quick:
        yield from covering(Case(steps=6), PAIRS | {"dtype": dtypes} | dict(OPTIONS) | mixed)
        return
    for base, meta in pairs():
        for dtype in dtypes:
            plain = Case(base=base, meta=meta, dtype=dtype, steps=6)
            yield from covering(plain, dict(OPTIONS) | mixed)


#: What goes with optimizers that are wrapped: no curvature, no option of a formula.
OF_WRAPPED: dict[str, Any] = dict(OPTIONS) | {
    "curvature": ("none",),
    "approximation": ("l",),
    "sigma": ("exp",),
    "delayed": (False,),
    "decay_apart": (False,),
    "eps": (1e-2,),  # where it is 0, others divide 0 by 0
    "faulty": ("nothing", "gradient"),
}


def _of_wrapped(_dtypes: Dtypes, quick: bool) -> Iterator[Case]:
    if quick:
        yield from covering(Case(), PAIRS | OF_WRAPPED)
        yield replace(THREE, base="AdamW", meta="Adam", problem="drifting")
        return
    for base, meta in pairs():
        yield from covering(Case(base=base, meta=meta), OF_WRAPPED)
        yield Case(base=base, meta=meta, blocks="tensor", steps=200)


def _of_wrapped_dtypes(dtypes: Dtypes, quick: bool) -> Iterator[Case]:
    wide = tuple(dtype for dtype in ("float64", "float32") if dtype in dtypes)
    options = {"dtype": wide} | OF_WRAPPED
    plain = Case(dtype=wide[0], steps=6)
    if quick:
        yield from covering(plain, PAIRS | options)
        return
    for base, meta in pairs():
        yield from covering(replace(plain, base=base, meta=meta), options)


def _of_traces(_dtypes: Dtypes, quick: bool) -> Iterator[Case]:
    names = ("approximation", "discount", "delayed", "decay_apart", "meta_first", "start")
    free = {name: OPTIONS[name] for name in names}
    free |= {"blocks": ("scalar", "tensor"), "problem": ("logcosh", "network")}
    # short: delayed RMSprop under a fast start comes to step sizes that differences cannot follow
    plain = Case(curvature="exact", steps=10)
    if quick:
        yield from covering(plain, PAIRS | free)
        three = replace(THREE, curvature="exact", steps=10)
        yield replace(three, base="AdamW", meta="Adam", problem="network")
        return
    for base, meta in pairs():
        yield from covering(replace(plain, base=base, meta=meta), free)


def _of_numbers(_dtypes: Dtypes, quick: bool) -> Iterator[Case]:
    free = {name: values for name, values in OPTIONS.items() if name not in ("eps", "step_size")}
    free["approximation"] = ("l", "2x2")
    free["curvature"] = ("none", "diagonal", "exact")
    plain = Case(learned=True)
    if quick:
        few: dict[str, Any] = {"base": tuple(BASES), "meta": ("SGD", "Adam", "Lion")}
        few |= {"blocks": ("scalar", "node", "weight"), "lr": ("constant", "by name")}
        few |= {"sigma": ("exp", "softplus"), "bounds": ("none",)}
        few |= {"problem": ("logcosh", "drifting")}
        yield from covering(plain, free | few)
        return
    for base, meta in pairs():
        yield from covering(replace(plain, base=base, meta=meta), free)


def _of_rules(_dtypes: Dtypes, _quick: bool) -> Iterator[Case]:
    options = {name: OPTIONS[name] for name in ("delayed", "eps", "bias_correction")}
    for base in BASES:
        yield from covering(Case(base=base), options)


def _of_optimizers(dtypes: Dtypes, _quick: bool) -> Iterator[Case]:
    for base, rule in BASES.items():
        plain = Case(base=base, bias_correction=not has(rule, "bias_correction"), steps=50)
        for dtype in ("float64", "float32"):
            for lr in ("constant", "schedule") if dtype in dtypes else ():
                yield replace(plain, dtype=dtype, lr=lr)


def _of_forms(_dtypes: Dtypes, _quick: bool) -> Iterator[Case]:
    for _, cases in FORMS.values():
        yield from cases


def _of_laws(_dtypes: Dtypes, quick: bool) -> Iterator[Case]:
    for name in LAWS:
        yield Case(name=name, steps=20 if quick else 200)


def _of_compilers(dtypes: Dtypes, quick: bool) -> Iterator[Case]:
    plain: dict[str, Any] = {"lr": "constant", "missing": False, "faulty": "nothing"}
    plain |= {"problem": "logcosh", "dtype": dtypes[0], "steps": 6}
    cases = dict.fromkeys(replace(case, **plain) for case in _quickly())
    yield from list(cases)[:: 16 if quick else 1]  # each takes ten seconds to compile


def _of_purity(dtypes: Dtypes, quick: bool) -> Iterator[Case]:
    for whole in _quickly()[:: 3 if quick else 1]:
        case = replace(whole, dtype=dtypes[0], steps=4)
        if case.possible():
            yield case


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="trajectory",
            what="a float64 run equals the oracle's",
            check=trajectory,
            cases=_of_pairs,
            wrapped=_of_wrapped,
        ),
        Family(
            name="step",
            what="each step equals the oracle's, in every dtype",
            check=single_steps,
            cases=_of_dtypes,
            any_dtype=True,
            wrapped=_of_wrapped_dtypes,
        ),
        Family(
            name="traces",
            what="traces equal differences of whole runs",
            check=trace_differences,
            cases=_of_traces,
        ),
        Family(
            name="learned",
            what="a float64 run that learns hyperparameters equals the oracle's",
            check=learned,
            cases=_of_numbers,
        ),
        Family(
            name="jets",
            what="derivatives of the formulas equal differences",
            check=jets,
            cases=_of_rules,
        ),
        Family(
            name="pure",
            what="no input is changed, order does not matter",
            check=pure,
            cases=_of_purity,
            any_dtype=True,
        ),
        Family(
            name="optimizer",
            what="meta_lr 0 is the library's own optimizer",
            check=plain_optimizer,
            cases=_of_optimizers,
            any_dtype=True,
        ),
        Family(
            name="special",
            what="presets equal their literature forms",
            check=special,
            cases=_of_forms,
        ),
        Family(
            name="laws",
            what="laws that hold for every input",
            check=laws,
            cases=_of_laws,
        ),
        Family(
            name="compiled",
            what="compiled steps equal eager ones",
            check=compiled,
            cases=_of_compilers,
            any_dtype=True,
        ),
    )
}
