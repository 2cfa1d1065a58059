"""Leaves that rest, values that are not finite, steps that are left out; sections 7 and 11."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from metaopt_conformance.table import BASES, METAS, has, update_of
from metaopt_conformance.tolerances import distance, relative_error, rounding
from metaopt_conformance.translate import contents, traces, with_traces

import metaopt as mo
from metaopt.rules.rule import follows_weights

#: JAX and Dask are slow to run step by step: they take part where the library matters
QUICK = ["numpy", "strict", "torch"]
quick_backends = pytest.mark.parametrize("backend", QUICK, indirect=True)

START = {
    "a": np.array([[1.0, -2.0], [0.5, 3.0]]),
    "b": np.array([0.3, -0.7, 1.1]),
    "c": np.array(-1.5),
}
LEVELS: dict[str, Any] = {
    "scalar": "scalar",
    "tensor": "tensor",
    "node": "node",
    "weight": "weight",
    "named": {"one": ("a", "c"), "other": "b"},
}
DECAY = BASES["SGD"].weight_decay
KINDS: list[tuple[str, str]] = [
    ("none", "l"),
    ("diagonal", "2x2"),
    ("exact", "l"),
    ("exact", "2x2"),
]
#: NumPy says so where inf meets inf; the other libraries do not
numpy_may_warn = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
every_kind = pytest.mark.parametrize(("curvature", "approximation"), KINDS)


def configured(base: str = "AdamW", meta: str = "Adam", **options: Any) -> mo.MetaOptimize:
    defaults: dict[str, Any] = {"step_size": 0.05, "meta_lr": 0.05, "discount": 0.9}
    return mo.MetaOptimize(base=BASES[base], meta=METAS[meta], **(defaults | options))


def gradients(params: Any) -> dict[str, Any]:
    """Return the gradient of the sum of w**4 / 4 + w**2 / 2: no leaf, no weight sees another."""
    return {name: w * w * w + w for name, w in params.items()}


def curvature_of(params: Any) -> dict[str, Any]:
    diagonal = {name: 3.0 * (w * w) + 1.0 for name, w in params.items()}
    return {
        "hessian_diagonal": diagonal,
        "hvp": lambda tangents: {name: diagonal[name] * t for name, t in tangents.items()},
    }


def stepped(opt: mo.MetaOptimize, params: Any, state: mo.State, **options: Any) -> Any:
    grads = gradients(params) | options.pop("grads", {})
    return opt.step(params, grads, state, **(curvature_of(params) | options))


def warmed_up(opt: mo.MetaOptimize, params: Any, steps: int = 3) -> Any:
    state = opt.init(params)
    for _ in range(steps):
        params, state = stepped(opt, params, state)
    return params, state


def as_numpy(backend: Any, state: mo.State, *leave_out: str) -> dict[str, Any]:
    return {
        name: backend.to_numpy(value)
        for name, value in vars(state).items()
        if name not in leave_out
    }


class PlainNumPy:
    """What the fixture `backend` is for NumPy, for tests of one library only."""

    name = "numpy"

    def asarray(self, array: Any) -> Any:
        return np.asarray(array)

    def to_numpy(self, tree: Any) -> Any:
        if hasattr(tree, "items"):
            return {name: self.to_numpy(value) for name, value in tree.items()}
        return np.asarray(tree)


NUMPY = PlainNumPy()

BLOCKS_OF_META = ("beta", "meta_slots", "meta_count", "beta_trace", "restarts")


def resting(backend: Any, how: str, names: Any) -> dict[str, Any]:
    """Return the options of `step` in which the leaves rest."""
    if how == "None":
        return {"grads": dict.fromkeys(names)}
    zero: Any = {"number": 0.0, "integer": 0}.get(how)
    if zero is None:
        zero = backend.asarray(np.asarray(0.0))
    if set(names) == set(START):
        return {"lr": zero}
    return {"lr": {name: zero if name in names else 1.0 for name in START}}


# --- what rests stays ---------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("how", ["number", "integer", "array", "None"])
@quick_backends
def test_a_run_that_rests_keeps_all_it_has_learned(
    backend: Any, how: str, level: str, curvature: str, approximation: str
) -> None:
    """All leaves rest at a discount below 1: h' = h, beta' = beta, bit by bit."""
    opt = configured(blocks=LEVELS[level], curvature=curvature, approximation=approximation)
    params, before = warmed_up(opt, backend.tree(START))
    new, after = stepped(opt, params, before, **resting(backend, how, START))
    np.testing.assert_equal(backend.to_numpy(new), backend.to_numpy(params))
    kept = [*BLOCKS_OF_META, "trace", "average"]
    kept += ["slots", "count", "slot_traces"] if how == "None" else []
    for name in kept:
        np.testing.assert_equal(
            backend.to_numpy(getattr(after, name)), backend.to_numpy(getattr(before, name)), name
        )
    if how != "None":
        for leaf in START:
            assert int(backend.to_numpy(after.count[leaf])) == 4
            for slot, value in after.slots[leaf].items():
                was = backend.to_numpy(before.slots[leaf][slot])
                assert not np.any(backend.to_numpy(value) == was), (leaf, slot)
    assert int(backend.to_numpy(after.step)) == 4


@pytest.mark.parametrize("base", BASES)
def test_moments_at_lr_zero_advance_as_if_the_leaf_moved(base: str) -> None:
    """They follow the gradients, which a framework's own optimizer would take in just so."""
    opt = configured(base)
    params, state = warmed_up(opt, START)
    _, rested = stepped(opt, params, state, lr=0.0)
    _, moved = stepped(opt, params, state)
    np.testing.assert_equal(as_numpy(NUMPY, rested)["slots"], as_numpy(NUMPY, moved)["slots"])
    np.testing.assert_equal(rested.count, moved.count)


@pytest.mark.parametrize("how", ["number", "array", "None"])
@pytest.mark.parametrize("backend", [*QUICK, "jax", "dask"], indirect=True)
def test_every_library_lets_a_leaf_rest(backend: Any, how: str) -> None:
    opt = configured(blocks="tensor")
    params, before = warmed_up(opt, backend.tree(START), steps=2)
    new, after = stepped(opt, params, before, **resting(backend, how, ["b"]))
    np.testing.assert_array_equal(backend.to_numpy(new["b"]), backend.to_numpy(params["b"]))
    np.testing.assert_array_equal(
        backend.to_numpy(after.average["b"]), backend.to_numpy(before.average["b"])
    )
    unchanged = backend.to_numpy(after.beta) == backend.to_numpy(before.beta)
    assert unchanged.tolist() == [False, True, False]
    counts = [int(backend.to_numpy(count)) for count in after.count.values()]
    assert counts == [3, 2 if how == "None" else 3, 3]
    assert backend.to_numpy(after.meta_count).tolist() == [3, 2, 3]


@every_kind
@pytest.mark.parametrize("meta", METAS)
@pytest.mark.parametrize("how", ["number", "array", "None"])
def test_a_block_at_rest_stays_while_others_work(
    how: str, meta: str, curvature: str, approximation: str
) -> None:
    """Leaf b alone rests: its block stays, and the others do as if b were not there."""
    for level in ("tensor", "weight", "named", "node"):
        opt = configured(
            meta=meta, blocks=LEVELS[level], curvature=curvature, approximation=approximation
        )
        params, before = warmed_up(opt, START)
        options = resting(NUMPY, how, ["b"])
        new, after = stepped(opt, params, before, **options)
        others_new, others_after = stepped(opt, params, before)
        key = "other" if level == "named" else "b"
        for part in ("beta", "trace_norm"):
            told = opt.diagnostics(after, new)[part]
            was = opt.diagnostics(before, params)[part]
            if part == "beta" or curvature != "exact":
                np.testing.assert_array_equal(told[key], was[key])
            if curvature == "exact":
                continue  # b's absence is seen by the other columns
            working = opt.diagnostics(others_after, others_new)[part]
            for other in told.keys() - {key}:
                np.testing.assert_array_equal(told[other], working[other])
                assert not np.array_equal(told[other], was[other])
        for name in ("a", "c"):
            np.testing.assert_array_equal(new[name], others_new[name])
        now, then = traces(new, after)["b"], traces(params, before)["b"]
        np.testing.assert_array_equal(now, then)
        for name, counts in opt.plan(START).blocks.by_name(after.meta_count).items():
            assert np.all(counts == (3 if name == key else 4))
        z = opt.diagnostics(after, new)["meta_grad"]
        assert not np.any(z[key])


@pytest.mark.parametrize("how", ["number", "array", "None"])
@quick_backends
def test_a_block_goes_on_with_the_products_of_the_leaves_that_work(backend: Any, how: str) -> None:
    opt = configured("SGD", "SGD", blocks={"one": ("a", "c"), "other": "b"})
    params, before = warmed_up(opt, backend.tree(START))
    _, after = stepped(opt, params, before, **resting(backend, how, ["c"]))
    trace, grads = traces(params, before), gradients(backend.to_numpy(params))
    want = np.array([np.sum(trace["a"] * grads["a"]), np.sum(trace["b"] * grads["b"])])
    assert relative_error(backend.to_numpy(after.meta_grad), want) < rounding("float64", 20)
    moved = backend.to_numpy(before.beta) - opt.meta_lr * want
    assert relative_error(backend.to_numpy(after.beta), moved) < rounding("float64", 20)
    assert backend.to_numpy(after.meta_count).tolist() == [4, 4]
    np.testing.assert_array_equal(
        backend.to_numpy(after.average["c"]), backend.to_numpy(before.average["c"])
    )


@every_kind
@pytest.mark.parametrize("meta", METAS)
@pytest.mark.parametrize("base", BASES)
def test_a_pause_without_gradients_leaves_no_trace(
    base: str, meta: str, curvature: str, approximation: str
) -> None:
    """Where no leaf sees another, a leaf runs after a pause as if there had been none."""
    for level in ("tensor", "weight", "node"):
        opt = configured(
            base, meta, blocks=LEVELS[level], curvature=curvature, approximation=approximation
        )
        straight = warmed_up(opt, START, 6)
        params, state = warmed_up(opt, START, 3)
        for step in range(7):
            at_rest = ["b"] if step < 4 else ["a", "c"]
            if step == 6:
                at_rest = ["a", "c", "b"]
            grads: Any = dict.fromkeys(at_rest)
            hvp = curvature_of(params)["hvp"]
            params, state = stepped(opt, params, state, grads=grads, hvp=hvp)
            if step == 2:  # a and c have made their three steps, b none
                for name in ("a", "c"):
                    np.testing.assert_allclose(
                        params[name], straight[0][name], rtol=rounding("float64", 50, 6)
                    )
                reached = params
        # step 3 moved a and c once more, then b made two steps
        np.testing.assert_array_equal(reached["b"], warmed_up(opt, START, 3)[0]["b"])
        np.testing.assert_allclose(
            params["b"], warmed_up(opt, START, 5)[0]["b"], rtol=rounding("float64", 50, 6)
        )
        np.testing.assert_allclose(
            params["a"], warmed_up(opt, START, 7)[0]["a"], rtol=rounding("float64", 50, 7)
        )


@pytest.mark.parametrize("level", ["tensor", "weight", "node", "named"])
@pytest.mark.parametrize("how", ["number", "array", "None"])
def test_adam_on_beta_starts_at_its_first_step_after_a_long_rest(how: str, level: str) -> None:
    """Section 7: at its own meta count, b does after a rest what it does without."""
    opt = configured("SGD", "Adam", blocks=LEVELS[level], meta_lr=0.01)
    alone = configured(
        "SGD", "Adam", blocks={"other": "b"} if level == "named" else LEVELS[level], meta_lr=0.01
    )
    params, state = START, opt.init(START)
    for _ in range(12):
        params, state = stepped(opt, params, state, **resting(NUMPY, how, ["b"]))
    one: Any = {"b": START["b"]}
    fresh = alone.init(one)
    for _ in range(12):
        params, state = stepped(opt, params, state)
        one, fresh = stepped(alone, one, fresh)
        np.testing.assert_allclose(params["b"], one["b"], rtol=rounding("float64", 50, 12))
        key = "other" if level == "named" else "b"
        np.testing.assert_allclose(
            opt.step_sizes(state)[key], alone.step_sizes(fresh)[key], rtol=rounding("float64", 50)
        )
    for name, counts in opt.plan(START).blocks.by_name(state.meta_count).items():
        assert np.all(counts == (12 if name == key else 24))


def test_every_block_has_its_own_meta_count_at_weight_level() -> None:
    opt = configured(blocks="weight")
    params, state = START, opt.init(START)
    for step in range(6):
        awake = {"a": 1.0, "b": float(step % 2), "c": float(step == 5)}
        params, state = stepped(opt, params, state, lr=awake)
    for name, count in {"a": 6, "b": 3, "c": 1}.items():
        assert np.all(state.meta_count[name] == count)


@every_kind
def test_leaves_at_rest_still_enter_the_tangents(curvature: str, approximation: str) -> None:
    """Section 7: undiscounted rows of H go to `hvp`, which may return None for such a leaf."""
    if curvature != "exact":
        return
    opt = configured(
        "SGD", "SGD", blocks="tensor", curvature=curvature, approximation=approximation
    )
    params, state = warmed_up(opt, START)
    seen: dict[str, Any] = {}

    def hvp(tangents: Any) -> Any:
        seen.update(tangents)
        return {"a": tangents["a"], "b": None, "c": tangents["c"]}

    _, after = opt.step(params, gradients(params) | {"b": None}, state, hvp=hvp)
    np.testing.assert_array_equal(seen["b"], state.trace["b"])
    np.testing.assert_array_equal(seen["a"], 0.9 * state.trace["a"])
    np.testing.assert_array_equal(after.trace["b"], state.trace["b"])


@pytest.mark.parametrize("approximation", ["l", "2x2"])
@pytest.mark.parametrize("base", BASES)
def test_traces_of_moments_follow_the_moments_at_lr_zero(base: str, approximation: str) -> None:
    """Section 7: R' is section 3 with the discount as 1; here by the formulas of the moments."""
    opt = configured(base, "SGD", blocks="tensor", curvature="exact", approximation=approximation)
    params, state = warmed_up(opt, START)
    if not state.slot_traces:
        assert not follows_weights(BASES[base]) or not BASES[base].slots
        return
    _, after = stepped(opt, params, state, lr=0.0)
    diagonal, grads = curvature_of(params)["hessian_diagonal"], gradients(params)
    update = update_of(BASES[base])
    decay = {"exp_avg": update.rho, "exp_avg_sq": update.decay_sq}
    for name, of_slots in state.slot_traces.items():
        dot = diagonal[name] * state.trace[name]
        for slot, trace in of_slots.items():
            rho = decay[slot]
            change = dot if slot == "exp_avg" else 2.0 * grads[name] * dot
            want = rho * trace + (1.0 - rho) * change
            assert relative_error(after.slot_traces[name][slot], want) < rounding("float64", 20)


# --- lr -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*QUICK, "jax", "dask"], indirect=True)
def test_a_schedule_of_arrays_equals_one_of_numbers(backend: Any) -> None:
    opt = configured("SGDm", "Adam", blocks="tensor")
    lrs = [0.5, 0.0, -1.5e-17, 1.0]  # below 0 by rounding, as schedules end
    ends = []
    for kind in ("number", "array", "by name"):
        params, state = backend.tree(START), opt.init(backend.tree(START))
        for number in lrs:
            array = backend.asarray(np.asarray(number))
            lr: Any = {"number": number, "array": array}.get(kind, dict.fromkeys(START, array))
            params, state = stepped(opt, params, state, lr=lr)
        ends.append((backend.to_numpy(params), as_numpy(backend, state)))
    np.testing.assert_equal(ends[1], ends[0])
    np.testing.assert_equal(ends[2], ends[0])


@numpy_may_warn
@pytest.mark.parametrize("number", [1.0, 0.0])
@quick_backends
def test_an_array_and_a_number_do_the_same_with_traces_that_are_not_finite(
    backend: Any, number: float
) -> None:
    """Section 11: only those of a leaf at rest are left out; the trace of a moment has no z."""
    opt = configured("SGDm", "Adam", blocks="tensor", curvature="diagonal")
    params, state = warmed_up(opt, backend.tree(START))
    spoilt = backend.asarray(np.full(3, np.inf))
    slot_traces = state.slot_traces | {"b": {"exp_avg": spoilt}}
    state = replace(state, slot_traces=slot_traces)
    ends = [
        as_numpy(backend, stepped(opt, params, state, lr=lr)[1])
        for lr in (number, backend.asarray(np.asarray(number)))
    ]
    np.testing.assert_equal(ends[1], ends[0])


def test_a_multiplier_multiplies_the_step_and_its_derivative() -> None:
    """Section 1: alpha = lr sigma(beta), and so sigma' times lr; by hand for one SGD step."""
    opt = configured("SGD", "SGD", sigma="softplus", curvature="none")
    params, state = warmed_up(opt, START)
    new, after = stepped(opt, params, state, lr={"a": 0.5, "b": 2.0, "c": 0.0})
    beta = float(state.beta[0])
    alpha, rate = np.log1p(np.exp(beta)), 1 / (1 + np.exp(-beta))
    for name, lr in (("a", 0.5), ("b", 2.0)):
        p = gradients(params)[name] + DECAY * params[name]
        want = params[name] - lr * alpha * p
        assert relative_error(new[name], want) < rounding("float64", 20)
        h = 0.9 * (1 - DECAY * lr * alpha) * state.trace[name] - lr * rate * p
        assert relative_error(after.trace[name], h) < rounding("float64", 20)


# --- values that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("meta", METAS)
@pytest.mark.parametrize("level", LEVELS)
@quick_backends
@numpy_may_warn
def test_a_trace_that_is_not_finite_restarts(
    backend: Any, level: str, meta: str, bad: float
) -> None:
    """Section 11: the block keeps beta and its meta state, and h' = -alpha p; others go on."""
    opt = configured("SGD", meta, blocks=LEVELS[level])
    params, state = warmed_up(opt, backend.tree(START))
    spoilt = traces(params, state)["b"]
    spoilt[1] = bad
    before = with_traces(params, state, {"b": spoilt}, backend.asarray)
    new, after = stepped(opt, params, before)
    good_new, good = stepped(opt, params, state)
    np.testing.assert_equal(backend.to_numpy(new), backend.to_numpy(good_new))

    blocks = opt.plan(params).blocks
    per_leaf = blocks.partition.per_leaf
    hit = {"a": np.zeros((2, 2), bool), "b": np.array([False, True, False]), "c": np.array(False)}
    if not per_leaf:
        index = blocks.families[blocks.family_of["b"]].start
        hit = {
            name: np.full(START[name].shape, blocks.families[blocks.family_of[name]].start == index)
            for name in START
        }
    sizes = opt.step_sizes(state)
    at = backend.to_numpy(params)
    for name, where in hit.items():
        size = backend.to_numpy(sizes[{"scalar": "all"}.get(level, blocks.family_of[name])])
        if level == "node" and size.ndim:
            size = size[:, None]
        want = -size * (gradients(at)[name] + DECAY * at[name])
        got = traces(new, after)[name]
        assert np.all(np.isfinite(got))
        allowed = rounding("float64", 20) * np.abs(want) + distance("float64", at[name], want)
        assert np.all(np.abs(got - want)[where] <= allowed[where])
        np.testing.assert_array_equal(got[~where], traces(good_new, good)[name][~where])

    lost: Any = hit if per_leaf else np.arange(blocks.size) == index
    for part in ("beta", *(("meta_slots", slot) for slot in opt.meta.slots)):

        def of(which: mo.State, part: Any = part) -> Any:
            value = which.beta if part == "beta" else which.meta_slots[part[1]]
            return backend.to_numpy(value)

        for key in START if per_leaf else [None]:
            trees: Any = (of(after), of(state), of(good), lost)
            new_value, kept, moved, stays = (tree[key] if key else tree for tree in trees)
            np.testing.assert_array_equal(new_value, np.where(stays, kept, moved))
    counts, restarts = (backend.to_numpy(part) for part in (after.meta_count, after.restarts))
    if per_leaf:
        assert restarts.tolist() == [0, 1, 0]
        np.testing.assert_equal(dict(counts), {name: 4 - where for name, where in hit.items()})
    else:
        np.testing.assert_array_equal(restarts, lost)
        np.testing.assert_array_equal(counts, 4 - lost)
    assert not np.all(
        np.isfinite(backend.to_numpy(after.meta_grad["b"] if per_leaf else after.meta_grad))
    )

    # and it goes on from there
    _, later = stepped(opt, new, after)
    total = np.sum(backend.to_numpy(later.restarts))
    assert total == np.sum(backend.to_numpy(after.restarts))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("meta", METAS)
@quick_backends
@numpy_may_warn
def test_a_gradient_that_is_not_finite_spares_beta(backend: Any, meta: str, bad: float) -> None:
    """With Lion as base nothing but the moment and, for NaN, the weight is spoilt."""
    opt = configured("Lion", meta, blocks="tensor")
    params, before = warmed_up(opt, backend.tree(START))
    grads = gradients(backend.to_numpy(params))
    grads["b"][2] = bad
    new, after = stepped(opt, params, before, grads=backend.tree(grads))
    good_new, good = stepped(opt, params, before)
    mask = np.array([False, True, False])
    np.testing.assert_array_equal(
        backend.to_numpy(after.beta),
        np.where(mask, backend.to_numpy(before.beta), backend.to_numpy(good.beta)),
    )
    for slot in opt.meta.slots:
        np.testing.assert_array_equal(
            backend.to_numpy(after.meta_slots[slot]),
            np.where(
                mask,
                backend.to_numpy(before.meta_slots[slot]),
                backend.to_numpy(good.meta_slots[slot]),
            ),
        )
    assert backend.to_numpy(after.restarts).tolist() == [0, 1, 0]
    assert backend.to_numpy(after.meta_count).tolist() == [4, 3, 4]
    for name in ("a", "c"):
        np.testing.assert_array_equal(traces(new, after)[name], traces(good_new, good)[name])
    trace = traces(new, after)["b"][:2]
    # the first two entries: h' = -alpha (sign + kappa w), sign by the rule's own formula
    weights = backend.to_numpy(params["b"])[:2]
    alpha = backend.to_numpy(opt.step_sizes(before)["b"])
    sign = np.sign(weights)  # the gradient has the sign of the weight, and has had it throughout
    assert relative_error(trace, -alpha * (sign + DECAY * weights)) < rounding("float64", 20)


@pytest.mark.parametrize("approximation", ["l", "2x2"])
@pytest.mark.parametrize("meta", METAS)
@pytest.mark.parametrize("base", BASES)
def test_a_dense_column_restarts_as_at_the_start(base: str, meta: str, approximation: str) -> None:
    """Section 11: the step is that from a state whose column is E_i, but beta_i stays."""
    opt = configured(base, meta, blocks="tensor", curvature="exact", approximation=approximation)
    params, state = warmed_up(opt, START)
    if not state.trace:
        return  # Lion asks for no Hessian

    def with_column(tree: Any, value: float) -> Any:
        return {name: with_entry(array, value) for name, array in tree.items()}

    def with_entry(array: Any, value: float) -> Any:
        array = np.array(array)
        array[1] = value
        return array

    bad = replace(
        state,
        trace=with_column(state.trace, np.nan),
        slot_traces={n: with_column(t, np.nan) for n, t in state.slot_traces.items()},
        beta_trace=with_column(state.beta_trace, np.nan),
    )
    zeroed = with_column(state.beta_trace, 0.0)
    if "beta" in zeroed:
        zeroed["beta"][1, 1] = 1.0
    clean = replace(
        state,
        trace=with_column(state.trace, 0.0),
        slot_traces={n: with_column(t, 0.0) for n, t in state.slot_traces.items()},
        beta_trace=zeroed,
    )
    new, after = stepped(opt, params, bad)
    clean_new, clean_after = stepped(opt, params, clean)
    np.testing.assert_equal(new, clean_new)
    np.testing.assert_equal(NUMPY.to_numpy(after.trace), NUMPY.to_numpy(clean_after.trace))
    np.testing.assert_equal(
        NUMPY.to_numpy(after.slot_traces), NUMPY.to_numpy(clean_after.slot_traces)
    )
    assert after.restarts.tolist() == [0, 1, 0]
    assert after.meta_count.tolist() == [4, 3, 4]
    others = np.array([True, False, True])
    assert after.beta[1] == state.beta[1]
    # z of the other blocks is that of their own columns
    np.testing.assert_array_equal(after.beta[others], clean_after.beta[others])
    for slot in opt.meta.slots:
        assert after.meta_slots[slot][1] == state.meta_slots[slot][1]
    for key, trace in after.beta_trace.items():
        assert np.all(np.isfinite(trace))
        # rows (last axis) of the block stay, the columns of the others and all
        np.testing.assert_array_equal(trace[:, 1], clean.beta_trace[key][:, 1])


@numpy_may_warn
def test_restarts_grow_by_one_each_time() -> None:
    opt = configured("Lion", "Lion", blocks="tensor")
    params, state = warmed_up(opt, START)
    for times in range(1, 4):
        state = with_traces(params, state, {"b": np.full(3, np.inf)})
        params, state = stepped(opt, params, state)
        assert state.restarts.tolist() == [0, times, 0]


@pytest.mark.parametrize("meta_first", [False, True])
@every_kind
def test_beta_is_finite_after_an_overflow_of_the_trace(
    meta_first: bool, curvature: str, approximation: str
) -> None:
    """A trace that grows without end, in float32: beta, meta state and traces recover."""
    opt = mo.MetaOptimize(
        base=mo.SGD(),
        meta=mo.Lion(),
        step_size=1.0,
        meta_lr=0.0,
        blocks="tensor",
        meta_first=meta_first,
        curvature=curvature,
        approximation=approximation,
        discount=1.0,
    )
    params: Any = {"a": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}
    state = opt.init(params)
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(60):
            diagonal = {name: np.full_like(w, -100.0) for name, w in params.items()}
            # the weights stay put and only the traces that are kept grow
            grads = {name: np.full_like(w, (-1.0) ** step) for name, w in params.items()}
            _, state = opt.step(
                params,
                grads,
                state,
                hessian_diagonal=diagonal,
                hvp=lambda tangents: {name: -100.0 * t for name, t in tangents.items()},
            )
            assert np.all(np.isfinite(state.beta))
            for traces in (state.beta_trace, state.meta_slots):
                assert all(np.all(np.isfinite(trace)) for trace in traces.values())
    if curvature != "none":
        assert np.all(state.restarts > 0)


# --- skip_nonfinite -----------------------------------------------------------------------------


def spoilt_gradients(params: Any, bad: float) -> dict[str, Any]:
    grads = {name: np.array(grad) for name, grad in gradients(params).items()}
    grads["b"][0] = bad
    return grads


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("level", LEVELS)
@every_kind
@quick_backends
@numpy_may_warn
def test_a_skipped_step_leaves_every_bit(
    backend: Any, curvature: str, approximation: str, level: str, bad: float
) -> None:
    opt = configured(
        blocks=LEVELS[level],
        curvature=curvature,
        approximation=approximation,
        skip_nonfinite=True,
    )
    params, before = warmed_up(opt, backend.tree(START))
    grads = backend.tree(spoilt_gradients(backend.to_numpy(params), bad))
    new, after = stepped(opt, params, before, grads=grads)
    np.testing.assert_equal(backend.to_numpy(new), backend.to_numpy(params))
    np.testing.assert_equal(
        as_numpy(backend, after, "skipped"), as_numpy(backend, before, "skipped")
    )
    assert int(backend.to_numpy(after.skipped)) == 1
    # the step after it is the one that would have been
    got, got_state = stepped(opt, new, after)
    want, want_state = stepped(opt, params, before)
    np.testing.assert_equal(backend.to_numpy(got), backend.to_numpy(want))
    np.testing.assert_equal(
        as_numpy(backend, got_state, "skipped"), as_numpy(backend, want_state, "skipped")
    )


@pytest.mark.parametrize("backend", ["jax", "dask"], indirect=True)
@numpy_may_warn
def test_every_library_skips(backend: Any) -> None:
    opt = configured("SGDm", "Lion", blocks="tensor", skip_nonfinite=True)
    params, before = warmed_up(opt, backend.tree(START), steps=1)
    grads = backend.tree(spoilt_gradients(backend.to_numpy(params), np.inf))
    new, after = stepped(opt, params, before, grads=grads)
    np.testing.assert_equal(backend.to_numpy(new), backend.to_numpy(params))
    np.testing.assert_equal(
        as_numpy(backend, after, "skipped"), as_numpy(backend, before, "skipped")
    )
    assert int(backend.to_numpy(after.skipped)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("approximation", ["l", "2x2"])
@numpy_may_warn
def test_a_step_is_skipped_for_hessian_products_too(approximation: str, bad: float) -> None:
    opt = configured(curvature="exact", approximation=approximation, skip_nonfinite=True)
    params, before = warmed_up(opt, START)

    def hvp(tangents: Any) -> Any:
        products = {name: np.array(t) for name, t in tangents.items()}
        products["a"][0, 1, 1] = bad
        return products

    new, after = stepped(opt, params, before, hvp=hvp)
    np.testing.assert_equal(new, params)
    np.testing.assert_equal(as_numpy(NUMPY, after, "skipped"), as_numpy(NUMPY, before, "skipped"))
    assert int(after.skipped) == 1


def test_a_step_without_any_gradient_is_not_skipped() -> None:
    opt = configured(skip_nonfinite=True)
    params, before = warmed_up(opt, START)
    _, after = opt.step(params, dict.fromkeys(START), before)
    assert int(after.skipped) == 0
    assert int(after.step) == 4


@pytest.mark.parametrize("how", ["number", "None"])
def test_an_overflow_in_a_leaf_at_rest_does_not_skip_every_step(how: str) -> None:
    """The trace of b overflows in the last step before b rests: a goes on learning.

    z holds no product of b, so z alone cannot tell that the tangents handed to `hvp` are not
    finite; each step would be skipped for its Hessian products, for as long as b rests.
    """
    opt = configured("SGD", "Lion", curvature="exact", skip_nonfinite=True)
    params, state = warmed_up(opt, {"a": START["a"], "b": START["b"]})
    state = replace(state, trace=state.trace | {"b": np.full((1, 3), np.inf)})
    before = params

    def hvp(tangents: Any) -> Any:
        """Return products with a Hessian in which each weight sees all."""
        total = sum(t.sum(axis=tuple(range(1, t.ndim))) for t in tangents.values())
        return {n: t + total.reshape(-1, *(1,) * (t.ndim - 1)) for n, t in tangents.items()}

    for _ in range(4):
        options: dict[str, Any] = (
            {"lr": {"a": 1.0, "b": 0.0}} if how == "number" else {"grads": {"b": None}}
        )
        params, state = stepped(opt, params, state, hvp=hvp, **options)
    assert int(state.skipped) <= 1
    assert not np.array_equal(params["a"], before["a"])


@pytest.mark.parametrize("curvature", ["none", "exact"])
def test_skipping_works_inside_jit(curvature: str) -> None:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    opt = configured(curvature=curvature, approximation="2x2", skip_nonfinite=True)

    def eager(params: Any, grads: Any, parts: Any, bad: Any) -> Any:
        def hvp(tangents: Any) -> Any:
            return {name: t + bad for name, t in tangents.items()}

        new, after = opt.step(params, grads, mo.State(**parts), hvp=hvp)
        return new, vars(after)

    step = jax.jit(eager)
    params = {name: jax.numpy.asarray(value) for name, value in START.items()}
    grads = gradients(params)
    params, parts = step(params, grads, vars(opt.init(params)), 0.0)
    bad_grads = grads | {"b": grads["b"] * np.nan}
    cases = [(bad_grads, 0.0)] + ([(grads, np.inf)] if curvature == "exact" else [])
    for times, (given, bad) in enumerate(cases, start=1):
        new, after = step(params, given, parts, bad)
        assert int(after["skipped"]) == 1
        for name in params:
            np.testing.assert_array_equal(np.asarray(new[name]), np.asarray(params[name]))
        left, was = ({**tree, "skipped": 0} for tree in (after, parts))
        for ours, theirs in zip(jax.tree.leaves(left), jax.tree.leaves(was), strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), str(times))
    good, after = step(params, grads, parts, 0.0)
    assert int(after["skipped"]) == 0
    assert not np.array_equal(np.asarray(good["b"]), np.asarray(params["b"]))


@pytest.mark.parametrize(
    "meta", [type(rule)() for rule in METAS.values() if has(rule, "eps")], ids=repr
)
def test_a_meta_gradient_whose_square_overflows_restarts_the_block(meta: Any) -> None:
    """Kept, an infinite second moment, or the trace that made it, would freeze it for good."""
    opt = mo.MetaOptimize(base=mo.SGD(), meta=meta, step_size=0.1, meta_lr=0.1, discount=1.0)
    params = {"w": np.ones(2, "float32")}
    state = opt.init(params)
    for size in (1e10, 1e12):
        before = state
        params, state = opt.step(params, {"w": np.full(2, size, "float32")}, state)
    assert np.isfinite(state.meta_grad[0])
    assert state.beta == before.beta
    assert state.meta_count == before.meta_count
    for _ in range(50):
        before = state
        params, state = opt.step(params, {"w": np.ones(2, "float32")}, state)
        assert state.beta != before.beta
    assert all(np.all(np.isfinite(moment)) for moment in state.meta_slots.values())
    assert int(state.restarts[0]) == 1


@numpy_may_warn
def test_a_third_trace_restarts_with_either_of_its_columns() -> None:
    opt = configured("AdamW", "Adam", blocks="tensor", curvature="exact", approximation="full")
    nothing = {name: np.zeros((3, 3, *value.shape)) for name, value in START.items()}
    options: Any = {"hvp": lambda tangents: tangents, "third": lambda *_: nothing}
    params, state = START, opt.init(START)
    for _ in range(4):
        params, state = opt.step(params, gradients(params), state, **options)
    assert all(np.any(z) for z in state.third_trace.values())
    broken: Any = {name: np.array(z) for name, z in state.third_trace.items()}
    broken["b"][0, 1] = broken["b"][1, 0] = np.nan
    trace: Any = {name: np.array(h) for name, h in state.trace.items()}
    trace["b"][1] = np.inf  # so that z of the second block is not finite
    state = replace(state, third_trace=broken, trace=trace)
    _, state = opt.step(params, gradients(params), state, **options)
    assert all(np.all(np.isfinite(z)) for z in state.third_trace.values())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_multiplier_that_rounds_to_nothing_is_0(dtype: str) -> None:
    opt = configured(blocks="tensor")
    params, state = warmed_up(opt, {name: array.astype(dtype) for name, array in START.items()})
    want, rested = stepped(opt, params, state, lr=0.0)
    for tiny in (1e-300, np.float64(1e-60), 1e-40, -1.5e-17, np.array(-1e-17), np.float32(-1e-8)):
        got, after = stepped(opt, params, state, lr=tiny)
        assert contents(got) == contents(want)
        assert contents(after) == contents(rested)
    moved, _ = stepped(opt, params, state, lr={"a": 1e-30, "b": 1.0, "c": 0.0})
    assert not np.array_equal(moved["b"], params["b"])


@dataclass(frozen=True)
class Signed:
    """A rule whose slot is fed back, and which no derivative reaches."""

    weight_decay: float = 0.0
    scope: ClassVar[str] = "weight"
    slots: ClassVar[tuple[str, ...]] = ("before",)

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
        return grad * (1.0 + 0.5 * slots["before"]), {"before": mo.numerics.sign(grad)}


def test_the_trace_of_a_slot_that_nothing_reaches_is_0() -> None:
    opt: Any = mo.MetaOptimize
    opt = opt(base=Signed(), meta=mo.SGD(), step_size=0.1, meta_lr=0.1, curvature="diagonal")
    params = {"w": np.array([1.0, -2.0])}
    state = opt.init(params)
    for _ in range(3):
        diagonal = {"w": np.ones(2)}
        params, state = opt.step(params, params, state, hessian_diagonal=diagonal)
        np.testing.assert_array_equal(state.slot_traces["w"]["before"], np.zeros((2, 2)))


def test_a_meta_update_that_nothing_reached_in_a_step_goes_on() -> None:
    @dataclass(frozen=True)
    class Kept(Signed):
        def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
            return grad + 0.5 * slots["before"], {"before": grad}

    opt: Any = mo.MetaOptimize
    opt = opt(base=mo.SGD(), meta=Kept(), curvature="exact", approximation="2x2", step_size=0.1)
    params = {"w": np.array([1.0, -2.0])}
    state = opt.init(params)
    hvp = lambda tangents: tangents  # noqa: E731
    for grad in (None, params["w"], None, params["w"]):
        params, state = opt.step(params, {"w": grad}, state, hvp=hvp)
        assert state.beta_trace["before"].dtype == np.float64


def test_what_overflows_when_it_is_cast_is_not_finite() -> None:
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), skip_nonfinite=True, discount=1.0)
    params = {"w": np.ones(2, "float32")}
    state = opt.init(params)
    with np.errstate(over="ignore"):
        params, state = opt.step(params, {"w": np.array([1e300, 1.0])}, state)
    np.testing.assert_array_equal(params["w"], np.ones(2, "float32"))
    assert int(state.skipped) == 1
