"""The checks that need no oracle: the library against its own optimizers, and against itself."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

import metaopt as mo
from metaopt_conformance import tolerances
from metaopt_conformance.cases import SCHEDULE, Case
from metaopt_conformance.laws import LAWS
from metaopt_conformance.literature import FORMS
from metaopt_conformance.runs import Under
from metaopt_conformance.table import signs, update_of
from metaopt_conformance.translate import contents, flat
from metaopt_conformance.updates import signed
from metaopt_conformance.verdicts import Failure, Skip, judged

__all__ = ["compiled", "laws", "plain_optimizer", "pure", "special"]


def plain_optimizer(under: Under, case: Case) -> float:
    """Compare a run at meta learning rate 0 with the library's own optimizer."""
    if under.backend.plain is None:
        msg = "the library has no optimizers of its own"
        raise Skip(msg)
    rule, meta = case.rules()
    params = under.arrays(case.subject.start(), case)
    theirs = under.backend.plain(rule, params)
    if theirs is None:  # perhaps as the library's weight decay is another
        rule = replace(rule, weight_decay=0.0)
        theirs = under.backend.plain(rule, params)
    if theirs is None:
        msg = f"the library has no {case.base} of this form"
        raise Skip(msg)
    opt = mo.MetaOptimize(base=rule, meta=meta, step_size=0.05, meta_lr=0.0)
    state, worst = opt.init(params), 0.0
    firm = np.ones(case.subject.size, dtype=bool)
    for t in range(case.steps):
        grad = case.grad(t, under.vector(params, case))
        if signs(rule):
            firm &= _signs_are_firm(under, case, rule, state, grad)
        grads = under.arrays(grad, case)
        lr = case.multiplier(t)
        params, state = under.backend.settle(opt.step(params, grads, state, lr=lr))
        got, want = (under.vector(found, case) for found in (params, theirs(grads, 0.05 * lr)))
        allowed = tolerances.optimizer(case.dtype, case.steps)
        error = tolerances.relative_error(got[firm], want[firm])
        worst = judged(worst, error, allowed, f"params in step {t}")
    return worst


def _signs_are_firm(under: Under, case: Case, rule: Any, state: mo.State, grad: Any) -> Any:
    """Say for which weights rounding cannot turn the sign in a step of Lion or its like."""
    slots = {name: slots["exp_avg"] for name, slots in state.slots.items()}
    moment = flat(slots, case.subject.shapes, under.backend.to_numpy)
    parts = signed(update_of(rule), grad, moment)
    margin = tolerances.sign_margin(wide=case.wide)
    scale = np.max(np.abs(parts), axis=0)
    return (np.abs(sum(parts)) > margin * scale) | (scale == 0.0)


def special(under: Under, case: Case) -> float:
    """Compare a preset with its literature form, step by step."""
    if case.name not in FORMS:
        msg = f"no special case is called {case.name!r}"
        raise Skip(msg)
    worst = 0.0
    for t, (got, want) in enumerate(FORMS[case.name][0](under, case)):
        for what, found, value in zip(("params", "step sizes"), got, want, strict=True):
            error = tolerances.relative_error(found, value)
            worst = judged(worst, error, tolerances.LITERATURE, f"{what} in step {t}")
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
            meta_grads={name: params[name] for name in [*params][1:]} if opt.held_out else None,
        )

    run = under.backend.compile(step)
    fast = slow = (start, opt.init(start))
    worst = 0.0
    for t in range(case.steps):
        lr = under.array(SCHEDULE[t % 5], case.dtype)
        fast, slow = run(*fast, lr, curved), step(*slow, lr, curved)
        got, want = (under.translated(case, *state) for state in (fast, slow))
        for key, value in want.items():
            allowed = tolerances.rounding(case.dtype, operations=60, steps=t + 1)
            error = tolerances.relative_error(got[key], value)
            worst = judged(worst, error, allowed, f"{key} in step {t}")
    return worst


def laws(under: Under, case: Case) -> float:
    """See that a law holds for inputs that hypothesis draws, as many as the case has steps."""
    if case.name not in LAWS:
        msg = f"no law is called {case.name!r}"
        raise Skip(msg)
    return LAWS[case.name](under, case.steps)


def pure(under: Under, case: Case) -> float:
    """See that a step changes none of its inputs, and that no order of leaves matters.

    In every step of a run: at the start, where almost all is 0, neither would leave a mark.
    """
    opt, back = case.opt(), under.backend.to_numpy
    for t, (params, state) in enumerate(under.steps(case)):
        if t == case.steps:
            break
        inputs = under.inputs(case, t, under.vector(params, case))
        given = [params, state, inputs["grads"], inputs["lr"], inputs["hessian_diagonal"]]
        given.append(inputs["meta_grads"])
        before = contents(given, back)
        once = under.backend.settle(opt.step(params, state=state, **inputs))
        if contents(given, back) != before:
            msg = f"an input was changed in step {t}"
            raise Failure(msg)
        reversed_inputs = {name: _reversed(value) for name, value in inputs.items()}
        again = under.backend.settle(opt.step(_reversed(params), state=state, **reversed_inputs))
        in_order = {name: again[0][name] for name in once[0]}
        if contents([in_order, again[1]], back) != contents(list(once), back):
            msg = f"the order of leaves made a difference in step {t}"
            raise Failure(msg)
    return 0.0


def _reversed(value: Any) -> Any:
    """Return a mapping in the reverse order, and so what a function returns; else the value."""
    if callable(value):
        return lambda *tangents: _reversed(value(*tangents))
    return {name: value[name] for name in [*value][::-1]} if isinstance(value, Mapping) else value
