"""The families of checks, and the cases that each is made on."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from metaopt_conformance.against_oracle import single_steps, trajectory
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
    """

    name: str
    what: str
    check: Callable[[Under, Case], float]
    cases: Callable[[Dtypes, bool], Iterator[Case]]
    any_dtype: bool = False

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
        return
    for base, meta in pairs():
        yield from covering(Case(base=base, meta=meta))
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


def _of_traces(_dtypes: Dtypes, quick: bool) -> Iterator[Case]:
    names = ("approximation", "discount", "delayed", "meta_first", "start")
    free = {name: OPTIONS[name] for name in names}
    free |= {"blocks": ("scalar", "tensor"), "problem": ("logcosh", "network")}
    if quick:
        yield from covering(Case(curvature="exact"), PAIRS | free)
        return
    for base, meta in pairs():
        yield from covering(Case(base=base, meta=meta, curvature="exact"), free)


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
        ),
        Family(
            name="step",
            what="each step equals the oracle's, in every dtype",
            check=single_steps,
            cases=_of_dtypes,
            any_dtype=True,
        ),
        Family(
            name="traces",
            what="traces equal differences of whole runs",
            check=trace_differences,
            cases=_of_traces,
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
