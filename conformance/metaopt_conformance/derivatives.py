"""Traces and jets against differences, which take the formulas and not their derivatives."""

from dataclasses import replace
from typing import Any

import numpy as np

from metaopt.arrays import namespace
from metaopt.jets import Jet
from metaopt_conformance import tolerances
from metaopt_conformance.cases import Case
from metaopt_conformance.oracle_runs import config, differences, oracle_run, wanted
from metaopt_conformance.runs import Under
from metaopt_conformance.verdicts import Failure, Skip, judged

__all__ = ["jets", "trace_differences"]


def trace_differences(under: Under, case: Case) -> float:
    """Compare the traces at the end of a run with central differences of whole trajectories.

    Curvature is the library's own: by automatic differentiation, where it has that, or by
    differences of gradients.
    """
    _see_that_traces_are_derivatives(case)
    under = replace(under, derives=True)
    *_, (params, state) = under.steps(case)
    found = under.translated(case, params, state)
    kept = {"H", *(("B",) if config(case).follows_beta else ())}
    for name in sorted(kept - found.keys()):
        msg = f"the trace {name} is not kept"
        raise Failure(msg)
    third = config(case).follows_third
    allowed = tolerances.THIRD_DIFFERENCES if third else tolerances.FINITE_DIFFERENCES
    worst = 0.0
    for name, want in differences(case).items():
        for key, got in found.items():
            if key.partition("/")[0] == name:
                value = wanted(case, replace(oracle_run(case)[-1], **{name: want}), key)
                worst = judged(worst, tolerances.relative_error(got, value), allowed, key)
    want = oracle_run(case)[-1].B
    if config(case).follows_beta and np.max(np.abs(want - np.eye(len(want)))) < tolerances.SHOWN:
        msg = f"Y moved by less than {tolerances.SHOWN:g}: this case shows nothing of it"
        raise Skip(msg)
    return worst


def _see_that_traces_are_derivatives(case: Case) -> None:
    """Raise Skip where section 4 of the mathematics does not claim it, or the differences do not.

    A rerun of a run knows no multiplier, bounds, absent gradients or restarts.
    """
    plain = Case()
    if case.curvature != "exact":
        msg = "without exact curvature the traces are no derivatives"
        raise Skip(msg)
    for name in ("lr", "bounds", "missing", "faulty"):
        if getattr(case, name) != getattr(plain, name):
            msg = f"differences are taken of runs with {name}={getattr(plain, name)}"
            raise Skip(msg)
    if np.any(oracle_run(case)[-1].restarts):
        msg = "differences are taken of runs in which no trace starts anew"
        raise Skip(msg)


#: Entries of the arrays that formulas are pushed through, directions, and entries of no gradient.
ENTRIES, DIRECTIONS, DEAD = 8, 2, 2


def jets(under: Under, case: Case) -> float:
    """Compare the jets of a rule's formula, both orders, with central differences.

    And with the library's own derivatives of it, where it has automatic differentiation.
    """
    formula = _Formula(under, case.rules()[0])
    at = formula.pushed(0.0, 0, order=2)
    for name, jet in at.items():
        for part in (jet.value, jet.first, jet.second):
            if part is not None and not np.all(np.isfinite(under.backend.to_numpy(part))):
                msg = f"{name} is not finite where a second moment is 0"
                raise Failure(msg)
    worst = max(formula.against_differences(at, k) for k in range(DIRECTIONS))
    if under.backend.differentiate is None:
        return worst
    return max(worst, formula.against_autodiff())


class _Formula:
    """The direction and next slots of a rule, at some gradient and slots and along some tangents.

    Where the rule divides by a second moment, the first entries never had a gradient.
    """

    def __init__(self, under: Under, rule: Any) -> None:
        rng = np.random.default_rng(0)
        self.under, self.rule = under, rule
        self.values = {name: rng.normal(size=ENTRIES) for name in ("grad", *rule.slots)}
        self.firsts = {name: rng.normal(size=(DIRECTIONS, ENTRIES)) for name in self.values}
        self.live = slice(None)
        if "exp_avg_sq" in self.values:
            self.live = slice(DEAD, None)
            self.values["exp_avg_sq"] = self.values["exp_avg_sq"] ** 2 + 0.1
            for name in self.values:
                self.values[name][:DEAD] = 0.0
            for slot in rule.slots:
                self.firsts[slot][:, :DEAD] = 0.0

    def _array(self, value: Any) -> Any:
        return self.under.array(value, "float64")

    def outputs(self, arguments: dict[str, Any], count: Any) -> dict[str, Any]:
        """Return the direction and the next slots of a gradient and slots."""
        slots = {name: value for name, value in arguments.items() if name != "grad"}
        direction, moved = self.rule.direction(arguments["grad"], slots, count)
        return {"direction": direction, **moved}

    def pushed(self, t: float, k: int, order: int) -> dict[str, Any]:
        """Return the outputs as jets, at a point moved by t along direction k."""
        moved = {name: value + t * self.firsts[name][k] for name, value in self.values.items()}
        if "exp_avg_sq" in self.values:
            moved["grad"][:DEAD] = 0.0
        arguments = {
            name: Jet(self._array(value), self._array(self.firsts[name]), order=order)
            for name, value in moved.items()
        }
        return self.outputs(arguments, Jet(self._array(3.0), order=order))

    def _numbers(self, part: Any, shape: tuple[int, ...]) -> Any:
        return np.zeros(shape) if part is None else self.under.backend.to_numpy(part)

    def against_differences(self, at: dict[str, Any], k: int) -> float:
        """Return the worst share of jets against differences, along k, of the order below."""
        ahead, behind = (self.pushed(sign * tolerances.STEP, k, order=1) for sign in (1.0, -1.0))
        worst = 0.0
        for name, jet in at.items():
            for order, lower, upper in ((1, "value", "first"), (2, "first", "second")):
                shape = (DIRECTIONS,) * (order - 1) + (ENTRIES,)
                ends = [self._numbers(getattr(end[name], lower), shape) for end in (ahead, behind)]
                slope = (ends[0] - ends[1]) / (2.0 * tolerances.STEP)
                got = self._numbers(getattr(jet, upper), (DIRECTIONS, *shape))[..., k, :]
                scale = np.max(np.abs(self._numbers(getattr(jet, lower), shape)))
                error = tolerances.relative_error(got[..., self.live], slope[..., self.live], scale)
                worst = judged(worst, error, tolerances.FORMULA, f"order {order} of {name}")
        return worst

    def against_autodiff(self) -> float:
        """Return the worst share of first derivatives against the library's own.

        The formula is elementwise: the gradient of a sum over entries is the derivative of each.
        """
        derive, worst = self.under.backend.differentiate, 0.0
        assert derive is not None
        at = {name: self._array(value[self.live]) for name, value in self.values.items()}
        count = self._array(3.0)
        xp = namespace(count)
        for source in at:
            pushed = self.outputs(
                {
                    name: Jet(value, xp.ones_like(value) if name == source else None)
                    for name, value in at.items()
                },
                Jet(count),
            )
            for name, jet in pushed.items():

                def summed(value: Any, name: str = name, source: str = source) -> Any:
                    return xp.sum(self.outputs(at | {source: value[source]}, count)[name])

                want = self.under.backend.to_numpy(derive(summed)({source: at[source]})[source])
                error = tolerances.relative_error(self._numbers(jet.first, want.shape), want)
                allowed = tolerances.rounding("float64", operations=60)
                where = f"{name} by {source}, against autodiff"
                worst = judged(worst, error, allowed, where)
        return worst
