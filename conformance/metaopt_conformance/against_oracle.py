"""Runs and single steps against the oracle."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import metaopt as mo
from metaopt.arrays import namespace
from metaopt_conformance import oracle, tolerances
from metaopt_conformance.cases import Case
from metaopt_conformance.oracle_runs import (
    by_weight,
    config,
    learned_run,
    numbers,
    oracle_run,
    oracle_step,
    wanted,
)
from metaopt_conformance.runs import Under
from metaopt_conformance.translate import block_index, dense_number, from_dense, slices
from metaopt_conformance.updates import direction, signed
from metaopt_conformance.verdicts import Failure, finite_alike, judged

__all__ = ["learned", "single_steps", "trajectory"]


def trajectory(under: Under, case: Case) -> float:
    """Compare a float64 run with the oracle's: params, step sizes, traces, meta state.

    Which of several discounts decided is left out of blocks where that has hung on rounding: of a
    huge meta-gradient, whatever its size, a direction that divides by its root may be the same.
    """
    worst, scale, allowed = 0.0, dict[str, float](), tolerances.trajectory(case.steps)
    run = oracle_run(case)
    firm = np.ones(config(case).blocks, dtype=bool)
    for t, (params, state) in enumerate(under.steps(case)):
        if t > 0 and config(case).horizons:
            firm &= _least_is_firm(case, t - 1, run[t - 1], run[t])
        for key, got in under.translated(case, params, state).items():
            value, where = wanted(case, run[t], key), f"{key} in step {t}"
            if key == "decided":
                got, value = got[..., firm], value[..., firm]
            if case.faulty != "nothing":
                got, value = finite_alike(got, value, where)
            scale[key] = max(scale.get(key, 0.0), float(np.max(np.abs(value), initial=0.0)))
            error = tolerances.relative_error(got, value, scale[key])
            worst = judged(worst, error, allowed, where)
    for what, key, got, value in _reported(under, case, params, state, run[-1]):
        if key == "decided":
            got, value = got[..., firm], value[..., firm]
        got, value = finite_alike(got, value, what)
        error = tolerances.relative_error(got, value, scale.get(key, 0.0))
        worst = judged(worst, error, allowed, what)
    return worst


def learned(under: Under, case: Case) -> float:
    """Compare a float64 run in which numbers are learned with the oracle's.

    The parameters and step sizes, and of each number what `trajectory` compares of step sizes.
    Traces that are 0 but for rounding in a first step are so beside those of the step size.
    """
    worst, allowed = 0.0, tolerances.trajectory(case.steps)
    run, own = learned_run(case), numbers(case)
    for t, (params, state) in enumerate(under.steps(case)):
        if [*state.learned] != [*own]:
            msg = f"what is learned is {[*state.learned]}"
            raise Failure(msg)
        told = case.opt().hyperparameters(state)
        found = {"": under.translated(case, params, state)}
        for name, number in own.items():
            found[name] = dense_number(
                state.learned[name], number, case.subject.shapes, under.backend.to_numpy
            )
            by_block = [np.reshape(under.numbers(array), -1) for array in told[name].values()]
            found[name]["value"] = np.concatenate(by_block)
        for name, parts in found.items():
            for key, got in parts.items():
                if key in ("meta_count", "peak") and _may_be_noise(name):
                    continue
                value, where = _of_number(case, run[t], name, key), f"{name} {key} in step {t}"
                if case.faulty != "nothing":
                    got, value = finite_alike(got, value, where)
                scale = [_of_number(case, state, name, key) for state in run[: t + 1]]
                if key[0] in "HMVz":
                    scale.append(_of_number(case, run[t], "", key))
                error = tolerances.relative_error(got, value, max(map(_size_of, scale)))
                worst = judged(worst, error, allowed, where)
    return worst


def _size_of(values: Any) -> float:
    """Return the largest finite entry."""
    return float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0))


def _may_be_noise(name: str) -> bool:
    """Say whether a number is a decay rate, whose second z may be 0 exactly or rounding alone."""
    return name.endswith(("momentum", "beta2", "]"))


def _of_number(case: Case, run: Any, name: str, key: str) -> Any:
    """Return the oracle's value of a key, of a learned number or, of no name, of its own."""
    state = run.numbers[name] if name else run.own
    if key == "value":
        return numbers(case)[name].config.sigma.value(state.beta)
    return np.asarray(wanted(case, state, key), dtype=np.float64)


def _reported(under: Under, case: Case, params: Any, state: mo.State, want: oracle.State) -> Any:
    """Yield what a user is told of a state by the names of blocks, and what the oracle has.

    Beside what it is called, the quantity of the state that it is made of.
    """
    opt = case.opt()
    _, names = block_index(opt.blocks, case.subject.shapes)
    told = opt.diagnostics(state, params)
    sizes = config(case).sigma.value(want.beta)
    norms = np.sqrt(np.sum(want.H**2, axis=-2))
    reported = [
        ("step sizes", "", opt.step_sizes(state), sizes),
        ("diagnostics of beta", "beta", told["beta"], want.beta),
        ("diagnostics of the meta-gradient", "z", told["meta_grad"], want.z),
        ("diagnostics of the trace's norm", "H", told["trace_norm"], norms),
    ]
    if config(case).horizons:
        reported.append(("diagnostics of who decided", "decided", told["decided"], want.decided))
    for what, key, by_name, values in reported:
        if list(by_name) != list(dict.fromkeys(names)):
            msg = f"{what}: the names are {list(by_name)}"
            raise Failure(msg)
        axes = values.shape[:-1]  # of several discounts, then blocks
        found = [np.reshape(under.numbers(array), (*axes, -1)) for array in by_name.values()]
        yield what, key, np.concatenate(found, axis=-1), values


def single_steps(under: Under, case: Case) -> float:
    """Compare every step with the oracle's from the same state, in the dtype of the case.

    No error can grow from step to step, so what is allowed is the rounding of one step. Entries
    where a sign hangs on that rounding, Lion's or that which ends a fast start, are left out.
    """
    worst, compared, allowed = 0.0, 0, tolerances.single_step(wide=case.wide)
    start = before = oracle.init(config(case), case.subject.start())
    for t, (params, state) in enumerate(under.steps(case)):
        _see_dtypes(case, params, state)
        found = under.translated(case, params, state)
        if t > 0:
            want = _step_from(under, case, t - 1, before)
            weights, blocks = _firm(case, t - 1, before, want)
            compared += int(np.sum(weights))
            firm_of: dict[str, Any] = {"w": weights, "H": (..., weights, slice(None)), "Z": weights}
            firm_of |= dict.fromkeys(("beta", "B"), blocks)
            firm_of["against"] = (..., blocks)
            firm_of["decided"] = (..., blocks & _least_is_firm(case, t - 1, before, want))
            for key, got in found.items():
                value, where = wanted(case, want, key), f"{key} in step {t - 1}"
                if key in ("w", "H"):
                    slack = _rounding(
                        case, before.w, found["w"], want.w, adapter=under.subject != "core"
                    )
                    if key == "H":
                        slack = (slack + _of_average(case, state, want))[..., None]
                    got = tolerances.without(slack, got, value)
                if key == "B":
                    got = tolerances.without(
                        allowed * _cancelled(case, t - 1, before, want), got, value
                    )
                firm = firm_of.get(key, ...)
                got, value = np.asarray(got)[firm], np.asarray(value)[firm]
                if case.faulty != "nothing":
                    got, value = finite_alike(got, value, where)
                error = tolerances.relative_error(got, value, _size(case, t - 1, before, want, key))
                worst = judged(worst, error, allowed, where)
        before = from_dense(found, start, case.subject.shapes)
    if not compared:
        msg = "every sign hung on rounding: nothing is shown"
        raise Failure(msg)
    return worst


def _step_from(under: Under, case: Case, t: int, before: oracle.State) -> oracle.State:
    """Return the oracle's state after step t, from inputs rounded to the dtypes of the case."""
    return oracle_step(case, t, before, lambda v: under.vector(under.arrays(v, case), case))


def _see_dtypes(case: Case, params: Any, state: mo.State) -> None:
    """Raise unless parameters kept their dtypes, and state has those that it is computed in."""
    widest = "float64" if "float64" in map(case.dtype_of, params) else "float32"
    beta = next(iter(state.beta.values())) if isinstance(state.beta, Mapping) else state.beta
    expected = [("beta", beta, widest)]
    for name, param in params.items():
        own = case.dtype_of(name)
        expected.append((f"params[{name!r}]", param, own))
        wide = "float64" if own == "float64" else "float32"
        kept = state.average if name in state.average else state.trace
        expected.append((f"the trace of {name!r}", kept[name], wide))
    for what, array, dtype in expected:
        if array.dtype != getattr(namespace(array), dtype):
            msg = f"{what} has dtype {array.dtype}; expected {dtype}"
            raise Failure(msg)


def _rounding(case: Case, before: Any, got: Any, want: Any, *, adapter: bool) -> Any:
    """Return what the last roundings of w - delta may do to each weight.

    That of the difference, and that to the dtype of the leaf. Adapters of frameworks whose
    optimizers return updates have these in that dtype too, and may round once more.
    """
    largest = np.maximum(np.abs(got), np.abs(want))
    slack = np.zeros_like(largest)
    for name, at in slices(case.subject.shapes).items():
        own = case.dtype_of(name)
        for dtype in (own, "float64" if own == "float64" else "float32"):
            slack[at] += 0.5 * tolerances.spacing(dtype, largest[at])
        if adapter:
            slack[at] += 0.5 * tolerances.spacing(own, np.abs(want - before)[at])
    return slack


def _of_average(case: Case, state: mo.State, want: oracle.State) -> Any:
    """Return what the last rounding of an average may do to each weight's traces."""
    traces = np.sum(want.H, axis=-1)
    slack = np.zeros_like(traces)
    for name, at in slices(case.subject.shapes).items():
        if name in state.average:
            own = case.dtype_of(name)
            slack[..., at] = tolerances.distance(own, want.w[at], traces[..., at])
    return slack


def _cancelled(case: Case, t: int, before: oracle.State, after: oracle.State) -> Any:
    """Return the terms of Y that may cancel, without their signs.

    In its first steps a meta update that divides by the root of z squared has a direction of 1 or
    -1, whose derivative is 0: the difference of two terms that are the larger the smaller z is.
    """
    rule = config(case).meta
    if not rule.has_v:
        return np.zeros_like(after.B)
    hessian = case.hessian(t, before.w)
    if case.curvature in ("diagonal", "rectified"):
        hessian = np.diag(case.hessian_diagonal(t, before.w))
    # where there is none the direction is 0, and a curvature that is not finite is none
    seen = np.where(np.isfinite(hessian), np.abs(hessian), 0.0)
    trace = np.where(np.isfinite(before.H), np.abs(before.H), 0.0)
    correction = 1.0 - rule.decay_sq ** np.maximum(after.meta_count, 1.0)
    root = np.sqrt(after.meta_v / (correction if rule.bias_correction else 1.0)) + rule.eps
    scale = np.divide(1.0, root, out=np.zeros_like(root), where=(root > 0.0) & np.isfinite(root))
    return config(case).meta_lr * rule.factor * scale[:, None] * (trace.T @ seen @ trace)


def _size(case: Case, t: int, before: oracle.State, after: oracle.State, key: str) -> float:
    """Return what the entries of a quantity are made of: sums keep the rounding of their terms."""
    name = key.partition("/")[0]
    if name == "w":  # the rest is a matter of `_rounding`
        return _largest(after.w - before.w)
    size = _largest(wanted(case, before, key), wanted(case, after, key))
    if name in ("z", "meta_m", "meta_v"):
        terms = np.sum(_terms(case, t, before), axis=-2)
        size = max(size, _largest(terms**2 if name == "meta_v" else terms))
    if name in ("B", "Bm", "Bv", "Z"):
        size = max(size, 1.0)
    return size


def _terms(case: Case, t: int, before: oracle.State) -> Any:
    """Return the terms whose sums over the weights are the meta-gradient, without their signs."""
    taken = by_weight(case, {name: name not in case.absent(t) for name in case.subject.shapes})
    taken &= by_weight(case, case.multiplier(t)) != 0.0
    taken &= by_weight(case, {name: name in case.judged(t) for name in case.subject.shapes})
    products = np.abs(before.H * case.source(t, before.w)[:, None])
    return np.where(taken[:, None] & config(case).own, products, 0.0)


def _largest(*arrays: Any) -> float:
    """Return the largest absolute value of the finite entries."""
    entries = np.concatenate([np.ravel(array) for array in arrays])
    return float(np.max(np.abs(entries[np.isfinite(entries)]), initial=0.0))


def _firm(case: Case, t: int, before: oracle.State, after: oracle.State) -> tuple[Any, Any]:
    """Say for every weight and block that rounding cannot turn the sign that its step hangs on.

    Nor can it where all is exactly 0, infinite, or not used. Of several discounts the signs of all
    count.
    """
    margin = tolerances.sign_margin(wide=case.wide)
    weights = np.ones(case.subject.size, dtype=bool)
    grad = case.grad(t, before.w)
    for rule, at in config(case).base:
        if rule.signs:
            parts = signed(rule, grad[at], before.m[at])
            scale, total = np.max(np.abs(parts), axis=0), np.abs(sum(parts))
            weights[at] = (total > margin * scale) | (scale == 0.0) | np.isinf(total)
    blocks, meta = np.ones(after.z.shape, dtype=bool), config(case).meta
    terms = np.sum(_terms(case, t, before), axis=-2)
    unused = np.logical_not(np.abs(after.z) < config(case).largest)
    if meta.signs:
        parts = signed(meta, after.z, before.meta_m)
        scale = np.abs(parts[0]) + (1.0 - meta.interpolation) * terms
        blocks = (np.abs(sum(parts)) > margin * scale) | (scale == 0.0) | unused
    if meta.factor != 1.0:
        settled = (terms == 0.0) | unused | (before.against >= meta.patience)
        blocks &= (np.abs(after.z) > margin * terms) | settled
    blocks = np.all(blocks.reshape(-1, len(after.beta)), axis=0)
    if config(case).meta_first:
        weights &= blocks[config(case).block_of]
    return weights, blocks


def _least_is_firm(case: Case, t: int, before: oracle.State, after: oracle.State) -> Any:
    """Say for every block that rounding cannot make another of its directions the least.

    Nor can it where two are equal as their meta-gradients are, or as signs, or where nothing moves.
    """
    margin, meta = tolerances.sign_margin(wide=case.wide), config(case).meta

    def asked(z: Any) -> Any:
        moments = before.meta_m, before.meta_v, before.meta_count + 1
        return oracle.speed(config(case), after.against) * direction(meta, z, *moments)[0]

    found, rounding = asked(after.z), margin * np.sum(_terms(case, t, before), axis=-2)
    moved = [np.abs(asked(after.z + noise) - found) for noise in (rounding, -rounding)]
    slack = margin * np.abs(found) + np.max(moved, axis=0)
    z, found, slack = (values.reshape(-1, len(after.beta)) for values in (after.z, found, slack))
    first = np.argmin(found, axis=0)[None]
    ahead = found - np.min(found, axis=0)
    equal = (ahead == 0.0) & (meta.signs | (z == np.take_along_axis(z, first, axis=0)))
    idle = np.all((after.decided == before.decided).reshape(z.shape), axis=0)
    return np.all(equal | (ahead > 2.0 * np.max(slack, axis=0)), axis=0) | idle
