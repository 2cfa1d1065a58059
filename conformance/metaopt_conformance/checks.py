"""The checks: each compares the library under test with something it shares no code with.

A check is a function from the library under test and a `Case` to the worst error, as a share of
what is allowed. It raises `Failure` where that is not enough to tell, and `Skip` where the check
does not apply.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import metaopt as mo
from metaopt.arrays import namespace
from metaopt.jets import Jet
from metaopt_conformance import tolerances
from metaopt_conformance.cases import BASES, METAS, OPTIONS, Case, covering, delay, pairs
from metaopt_conformance.laws import LAWS
from metaopt_conformance.literature import FORMS
from metaopt_conformance.runs import (
    Failure,
    Skip,
    Under,
    as_oracle_state,
    config,
    differences,
    oracle_run,
    oracle_step,
    wanted,
)
from metaopt_conformance.translate import contents

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """A kind of check and the cases it is made on.

    Parameters
    ----------
    name : str
    what : str
        In one line, for the report.
    check : callable
        From `Under` and `Case` to the worst error over its tolerance.
    cases : callable
        From dtypes and whether to be quick to the cases.
    """

    name: str
    what: str
    check: Callable[[Under, Case], float]
    cases: Callable[[tuple[str, ...], bool], Iterator[Case]]


def trajectory(under: Under, case: Case) -> float:
    """Compare a float64 run with the oracle's: params, step sizes, traces, meta state."""
    worst, scale = 0.0, dict[str, float]()
    for t, (params, state) in enumerate(under.steps(case)):
        want = oracle_run(case)[t]
        for key, got in under.translated(case, params, state).items():
            value = wanted(case, want, key)
            scale[key] = max(scale.get(key, 0.0), float(np.max(np.abs(value), initial=0.0)))
            error = tolerances.relative_error(got, value, scale[key])
            worst = _judged(worst, error, tolerances.trajectory(case.steps), f"{key} in step {t}")
    return worst


def single_steps(under: Under, case: Case) -> float:
    """Compare every step with the oracle's from the same state, in the dtype of the case.

    No error can grow from step to step, so what is allowed is the rounding of one step. Entries
    where Lion's sign hangs on that rounding are left out.
    """
    worst, before = 0.0, None
    for t, (params, state) in enumerate(under.steps(case)):
        found = under.translated(case, params, state)
        if before is not None:
            want = oracle_step(
                case,
                t - 1,
                before,
                lambda vector: under.vector(under.arrays(vector, case), case),
            )
            firm_rows, firm_blocks = _decided(case, t - 1, before, want)
            for key, got in found.items():
                value = wanted(case, want, key)
                got, value = _firm(key, got, value, firm_rows, firm_blocks)
                allowed = tolerances.single_step(case.dtype, key)
                error = tolerances.relative_error(got, value, _size(case, before, want, key))
                worst = _judged(worst, error, allowed, f"{key} in step {t - 1}")
        for param in params.values():
            if param.dtype != getattr(namespace(param), case.dtype):
                msg = f"params turned from {case.dtype} into {param.dtype} in step {t}"
                raise Failure(msg)
        before = as_oracle_state(case, found, t)
    return worst


def trace_differences(under: Under, case: Case) -> float:
    """Compare the traces at the end of a run with central differences of whole trajectories.

    Curvature is the library's own, by automatic differentiation, where it has that.
    """
    if case.curvature != "exact":
        msg = "without exact curvature the traces are no derivatives"
        raise Skip(msg)
    under = replace(under, autodiff=True)
    *_, (params, state) = under.steps(case)
    found = under.translated(case, params, state)
    allowed = tolerances.THIRD_DIFFERENCES if "Z" in found else tolerances.FINITE_DIFFERENCES
    worst = 0.0
    for name, want in differences(case).items():
        for key, got in found.items():
            if key.partition("/")[0] == name:
                value = wanted(case, replace(oracle_run(case)[-1], **{name: want}), key)
                worst = _judged(worst, tolerances.relative_error(got, value), allowed, key)
    kept = {"H", *(("B",) if _follows_beta(case) else ())}
    missing = [name for name in sorted(kept) if name not in found]
    if missing:
        msg = f"the trace {missing[0]} is not kept"
        raise Failure(msg)
    want = oracle_run(case)[-1].B
    if _follows_beta(case) and np.max(np.abs(want - np.eye(len(want)))) < tolerances.SHOWN:
        msg = f"Y moved by less than {tolerances.SHOWN:g}: this case shows nothing of it"
        raise Skip(msg)
    return worst


def jets(under: Under, case: Case) -> float:
    """Compare the jets of a rule's formula, both orders, with central differences."""
    rule = BASES[case.base] if case.meta == "SGD" else METAS[case.meta]
    rule = delay(rule) if case.delayed else rule
    rng, h = np.random.default_rng(0), tolerances.STEP
    values = {name: rng.normal(size=8) for name in ("grad", *rule.slots)}
    if "exp_avg_sq" in values:
        values["exp_avg_sq"] = values["exp_avg_sq"] ** 2 + 0.1
        for name in values:
            values[name][:2] = 0.0  # a coordinate that never had a gradient
    firsts = {name: rng.normal(size=(2, 8)) for name in values}
    for name in values:
        if "exp_avg_sq" in values and name != "grad":
            firsts[name][:, :2] = 0.0

    def array(value: Any) -> Any:
        return under.backend.asarray(np.asarray(value, dtype=np.float64), under.device)

    def push(t: float, k: int, order: int) -> Any:
        moved = {name: value + t * firsts[name][k] for name, value in values.items()}
        if "exp_avg_sq" in values:
            moved["grad"][:2] = 0.0
        arguments = {
            name: Jet(array(value), array(firsts[name]), order=order)
            for name, value in moved.items()
        }
        grad = arguments.pop("grad")
        direction, slots = rule.direction(grad, arguments, Jet(array(3.0), order=order))
        return {"direction": direction, **slots}

    def numbers(part: Any, like: Any) -> Any:
        return np.zeros(like) if part is None else under.backend.to_numpy(part)

    worst, live = 0.0, slice(2, None) if "exp_avg_sq" in values else slice(None)
    at = push(0.0, 0, 2)
    for name, jet in at.items():
        for part in (jet.value, jet.first, jet.second):
            if part is not None and not np.all(np.isfinite(under.backend.to_numpy(part))):
                msg = f"{name} is not finite where a second moment is 0"
                raise Failure(msg)
        for k in range(2):
            ahead, behind = push(h, k, 1)[name], push(-h, k, 1)[name]
            for order, lower, upper in ((1, "value", "first"), (2, "first", "second")):
                shape = (8,) if order == 1 else (2, 8)
                difference = numbers(getattr(ahead, lower), shape) - numbers(
                    getattr(behind, lower), shape
                )
                slope = difference / (2.0 * h)
                got = numbers(getattr(jet, upper), (2, *shape))
                got = got[k] if order == 1 else got[:, k]
                scale = np.max(np.abs(numbers(getattr(jet, lower), shape)))
                error = tolerances.relative_error(got[..., live], slope[..., live], scale)
                worst = _judged(worst, error, tolerances.FORMULA, f"order {order} of {name}")
    if under.backend.differentiate is None:
        return worst
    return max(worst, _jets_by_autodiff(under, rule, values, live))


def _jets_by_autodiff(under: Under, rule: Any, values: dict[str, Any], live: slice) -> float:
    """Compare the jets with the library's own derivatives of the same formula.

    The formula is elementwise: the gradient of a sum over the entries is the derivative of each.
    """
    derive, worst = under.backend.differentiate, 0.0
    assert derive is not None
    at = {
        name: under.backend.asarray(np.asarray(value[live], dtype=np.float64), under.device)
        for name, value in values.items()
    }
    count = under.backend.asarray(np.asarray(3.0), under.device)
    xp = namespace(count)

    def outputs(arguments: dict[str, Any], count: Any) -> dict[str, Any]:
        slots = {name: value for name, value in arguments.items() if name != "grad"}
        direction, moved = rule.direction(arguments["grad"], slots, count)
        return {"direction": direction, **moved}

    for source in at:
        pushed = outputs(
            {
                name: Jet(value, xp.ones_like(value) if name == source else None)
                for name, value in at.items()
            },
            Jet(count),
        )
        for name, jet in pushed.items():

            def summed(value: Any, name: str = name, source: str = source) -> Any:
                return xp.sum(outputs(at | {source: value[source]}, count)[name])

            want = under.backend.to_numpy(derive(summed)({source: at[source]})[source])
            got = np.zeros_like(want) if jet.first is None else under.backend.to_numpy(jet.first)
            error = tolerances.relative_error(got, want)
            allowed = tolerances.rounding("float64", operations=60)
            worst = _judged(worst, error, allowed, f"{name} by {source}, against autodiff")
    return worst


def plain_optimizer(under: Under, case: Case) -> float:
    """Compare a run at meta learning rate 0 with the library's own optimizer."""
    if under.backend.plain is None:
        msg = "the library has no optimizers of its own"
        raise Skip(msg)
    rule = replace(BASES[case.base], weight_decay=0.1 if case.base in ("AdamW", "Lion") else 0.0)
    if case.base == "RMSprop":
        rule = replace(rule, bias_correction=False)
    params = under.arrays(case.subject.start(), case)
    theirs = under.backend.plain(rule, params)
    if theirs is None:
        msg = f"the library has no {case.base} of this form"
        raise Skip(msg)
    opt = mo.MetaOptimize(base=rule, meta=METAS[case.meta], step_size=0.05, meta_lr=0.0)
    state, worst = opt.init(params), 0.0
    for t in range(case.steps):
        grads = under.arrays(case.subject.grad(t, under.vector(params, case)), case)
        params, state = under.backend.settle(opt.step(params, grads, state))
        want = under.vector(theirs(grads, 0.05), case)
        error = tolerances.relative_error(under.vector(params, case), want)
        worst = _judged(worst, error, tolerances.OPTIMIZER, f"params in step {t}")
    return worst


def special(under: Under, case: Case) -> float:
    """Compare a preset with its literature form, step by step."""
    if case.name not in FORMS:
        msg = f"no special case is called {case.name!r}"
        raise Skip(msg)
    worst = 0.0
    for t, (got, want) in enumerate(FORMS[case.name][0](under, case)):
        for what, found, value in zip(("params", "step sizes"), got, want, strict=True):
            error = tolerances.relative_error(found, value)
            worst = _judged(worst, error, tolerances.LITERATURE, f"{what} in step {t}")
    return worst


def compiled(under: Under, case: Case) -> float:
    """Compare compiled steps with the same steps run one operation at a time."""
    if under.backend.compile is None:
        msg = "the library has no compiler"
        raise Skip(msg)
    opt = case.opt()
    start = under.arrays(case.subject.start(), case)
    curved = under.arrays(np.ones(case.subject.size), case)

    def step(params: Any, state: Any, lr: Any, diagonal: Any) -> Any:
        return opt.step(
            params,
            {name: diagonal[name] * param for name, param in params.items()},
            state,
            lr=lr,
            hvp=lambda v: {name: diagonal[name] * v[name] for name in v},
            third=lambda us, vs: {
                name: 0.0 * (us[name][:, None, ...] * vs[name][None, ...]) for name in us
            },
            hessian_diagonal=diagonal,
        )

    run = under.backend.compile(step)
    fast = slow = (start, opt.init(start))
    worst = 0.0
    for t in range(case.steps):
        lr = under.backend.asarray(np.asarray((1.0, 0.5, 0.0)[t % 3], case.dtype), under.device)
        fast, slow = run(*fast, lr, curved), step(*slow, lr, curved)
        got, want = (under.translated(case, *state) for state in (fast, slow))
        for key, value in want.items():
            allowed = tolerances.rounding(case.dtype, operations=60, steps=t + 1)
            error = tolerances.relative_error(got[key], value)
            worst = _judged(worst, error, allowed, f"{key} in step {t}")
    return worst


def laws(under: Under, case: Case) -> float:
    """See that a law holds for inputs that hypothesis draws, as many as the case has steps."""
    if case.name not in LAWS:
        msg = f"no law is called {case.name!r}"
        raise Skip(msg)
    return LAWS[case.name](under, case.steps)


def pure(under: Under, case: Case) -> float:
    """See that a step changes none of its inputs, and that the order of leaves does not matter."""
    params, state = next(iter(under.steps(case)))
    opt, back = case.opt(), under.backend.to_numpy
    inputs = under.inputs(case, 0, under.vector(params, case))
    given = {name: grad for name, grad in inputs["grads"].items() if grad is not None}

    def now() -> Any:
        return [contents(tree, back) for tree in (params, given, state)]

    before = now()
    after, _ = opt.step(params, state=state, **inputs)
    flipped, _ = opt.step(
        dict(reversed(params.items())),
        state=state,
        **(inputs | {"grads": dict(reversed(inputs["grads"].items()))}),
    )
    if before != now():
        msg = "an input was changed"
        raise Failure(msg)
    if contents(after, back) != contents({name: flipped[name] for name in after}, back):
        msg = "the order of leaves made a difference"
        raise Failure(msg)
    return 0.0


def _judged(worst: float, error: float, allowed: float, where: str) -> float:
    """Return the larger of two shares, or raise where the error is more than is allowed."""
    if not error <= allowed:
        msg = f"{where}: error {error:.1e}, allowed {allowed:.1e}"
        raise Failure(msg)
    return max(worst, error / allowed)


def _follows_beta(case: Case) -> bool:
    return case.approximation != "l" and case.discount > 0.0 and case.meta != "Lion"


def _size(case: Case, before: Any, after: Any, key: str) -> float:
    """Return what the entries of a quantity are made of: sums keep the rounding of their terms."""
    name = key.partition("/")[0]
    size = max(np.max(np.abs(wanted(case, state, key)), initial=0.0) for state in (before, after))
    if name in ("z", "meta_m", "meta_v"):
        t = before.step
        terms = np.sum(np.abs(before.H * case.subject.grad(t, before.w)[:, None]), axis=0)
        size = max(size, np.max(terms) ** (2 if name == "meta_v" else 1))
    if name in ("B", "Bm", "Bv", "Z"):
        size = max(size, 1.0)
    return float(size)


def _decided(case: Case, t: int, before: Any, after: Any) -> tuple[Any, Any]:
    """Say for every weight and block whether rounding could turn the sign in a Lion's step."""
    margin = tolerances.sign_margin(case.dtype)
    rows = np.ones(case.subject.size, dtype=bool)
    grad = case.subject.grad(t, before.w)
    for rule, at in config(case).base:
        if rule.kind == "lion":
            parts = rule.interpolation * before.m[at], (1.0 - rule.interpolation) * grad[at]
            rows[at] = np.abs(sum(parts)) > margin * np.max(np.abs(parts))
    blocks, meta = np.ones(len(before.beta), dtype=bool), config(case).meta
    if meta.kind == "lion":
        terms = np.abs(before.H * grad[:, None])
        parts = meta.interpolation * before.meta_m, (1.0 - meta.interpolation) * after.z
        scale = np.abs(parts[0]) + (1.0 - meta.interpolation) * np.sum(terms, axis=0)
        blocks = (np.abs(parts[0] + parts[1]) > margin * scale) | (scale == 0.0)
    if config(case).meta_first:
        rows &= blocks[config(case).block_of]
    return rows, blocks


def _firm(key: str, got: Any, value: Any, rows: Any, blocks: Any) -> tuple[Any, Any]:
    if key in ("w", "H", "Z"):
        return got[rows], value[rows]
    if key == "beta":
        return got[blocks], value[blocks]
    return got, value


FAMILIES: dict[str, Family] = {}


def _family(name: str, what: str, check: Any, cases: Any) -> None:
    FAMILIES[name] = Family(name, what, check, cases)


def _of_options(dtypes: tuple[str, ...], quick: bool, **fixed: Any) -> Iterator[Case]:  # noqa: ARG001
    if quick:
        both = {"base": tuple(BASES), "meta": tuple(METAS)}
        yield from covering(Case(**fixed), both | dict(OPTIONS))
        return
    for base, meta in pairs():
        yield from covering(Case(base=base, meta=meta, **fixed))
        if not fixed:  # long enough for a slow drift to show
            for problem in ("logcosh", "network"):
                yield Case(base=base, meta=meta, problem=problem, blocks="tensor", steps=200)


def _of_dtypes(dtypes: tuple[str, ...], quick: bool) -> Iterator[Case]:
    for dtype in dtypes:
        yield from _of_options(dtypes, quick or dtype == "float16", dtype=dtype, steps=6)


def _of_traces(dtypes: tuple[str, ...], quick: bool) -> Iterator[Case]:  # noqa: ARG001
    exact = {"curvature": ("exact",), "approximation": ("l", "2x2", "full")}
    free = {name: OPTIONS[name] for name in ("discount", "delayed", "meta_first")}
    free |= {"blocks": ("scalar", "tensor"), "problem": ("logcosh", "network")}
    if quick:
        both = {"base": tuple(BASES), "meta": tuple(METAS)}
        yield from covering(Case(curvature="exact"), both | exact | free)
        return
    for base, meta in pairs():
        yield from covering(Case(base=base, meta=meta, curvature="exact"), exact | free)


def _of_rules(dtypes: tuple[str, ...], quick: bool) -> Iterator[Case]:  # noqa: ARG001
    for base in BASES:
        yield Case(base=base)
        if delay(BASES[base]) != BASES[base]:
            yield Case(base=base, delayed=True)
    for meta in METAS:
        if meta != "SGD":
            yield Case(meta=meta)


def _of_plain(dtypes: tuple[str, ...], quick: bool) -> Iterator[Case]:  # noqa: ARG001
    for base in BASES:
        yield Case(base=base, steps=50)


def _of_forms(dtypes: tuple[str, ...], quick: bool) -> Iterator[Case]:  # noqa: ARG001
    for _, cases in FORMS.values():
        yield from cases


def _of_laws(dtypes: tuple[str, ...], quick: bool) -> Iterator[Case]:  # noqa: ARG001
    for name in LAWS:
        yield Case(name=name, steps=20 if quick else 200)


def _of_compiled(dtypes: tuple[str, ...], quick: bool) -> Iterator[Case]:
    cases = [
        replace(case, lr="constant", missing=False, problem="logcosh", steps=6)
        for case in _of_options(dtypes, quick=True)
    ]
    yield from list(dict.fromkeys(cases))[:: 8 if quick else 1]  # each takes ten seconds to compile


def _of_pure(dtypes: tuple[str, ...], quick: bool) -> Iterator[Case]:
    yield from list(_of_options(dtypes, quick=True))[:: 3 if quick else 1]


_family("trajectory", "a float64 run equals the oracle's", trajectory, _of_options)
_family("step", "each step equals the oracle's, in every dtype", single_steps, _of_dtypes)
_family("traces", "traces equal differences of whole runs", trace_differences, _of_traces)
_family("jets", "derivatives of the formulas equal differences", jets, _of_rules)
_family("optimizer", "meta_lr 0 is the library's own optimizer", plain_optimizer, _of_plain)
_family("special", "presets equal their literature forms", special, _of_forms)
_family("laws", "laws that hold for every input", laws, _of_laws)
_family("compiled", "compiled steps equal eager ones", compiled, _of_compiled)
_family("pure", "no input is changed, order does not matter", pure, _of_pure)
