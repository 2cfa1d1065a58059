"""Every rule: equal to the frameworks' own optimizers, and its jets equal to its slopes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.backends import UnavailableError, find
from metaopt_conformance.table import (
    BASES,
    DELAYABLE,
    FORMS,
    METAS,
    RULES,
    counterpart,
    has,
    signs,
    update_of,
)
from metaopt_conformance.tolerances import FORMULA, OPTIMIZER, relative_error, rounding
from metaopt_conformance.updates import partials

import metaopt as mo
from metaopt.jets import Jet
from metaopt.rules.rule import feeding_slots, follows_weights

SHAPES = {"w": (4, 3), "b": (3,), "s": ()}
LR = 0.05

EVERY = (*FORMS, *BASES.values())
TORCH, OPTAX = (
    {repr(rule): rule for rule in EVERY if counterpart(library, rule) is not None}
    for library in ("torch", "optax")
)
WITH_EPS = [row.kind for row in RULES if has(row.kind, "eps")]


def start() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {name: np.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def grads_at(step: int, params: Any) -> dict[str, Any]:
    rng = np.random.default_rng(100 + step)
    return {
        name: np.sin(np.asarray(params[name])) + 0.3 * rng.normal(size=shape)
        for name, shape in SHAPES.items()
    }


def our_run(rule: Any, dtype: str, steps: int = 50, lr: Any = 1.0) -> list[dict[str, Any]]:
    opt = mo.MetaOptimize(base=rule, meta=mo.AdamW(), step_size=LR, meta_lr=0.0, discount=1.0)
    params = {name: value.astype(dtype) for name, value in start().items()}
    state, run = opt.init(params), []
    for step in range(steps):
        grads = {name: g.astype(dtype) for name, g in grads_at(step, params).items()}
        params, state = opt.step(params, grads, state, lr=lr(step) if callable(lr) else lr)
        run.append(params)
    return run


def schedule(step: int) -> float:
    return 0.0 if step % 5 == 3 else 1.0 / (1 + step)


def allowance(dtype: str) -> float:
    if dtype == "float64":
        return OPTIMIZER
    # log and exp of the step size, held as float32: |log 0.05| roundings more, taken once
    return rounding(dtype, operations=24, steps=10)


def check_without_meta_updates(library: str, rule: Any, lr: Any, dtype: str) -> None:
    """Compare with the library's own optimizer, each at the gradients of its own run."""
    try:
        backend = find(library)
    except UnavailableError as error:
        pytest.skip(str(error))
    assert backend.plain is not None

    def arrays(values: Any) -> Any:
        return {name: backend.asarray(value.astype(dtype), None) for name, value in values.items()}

    theirs = arrays(start())
    step_of = backend.plain(rule, theirs)
    assert step_of is not None
    # in float32 a run amplifies rounding; the first steps tell the same
    steps = 50 if dtype == "float64" else 10
    for step, ours in enumerate(our_run(rule, dtype, steps, lr)):
        at = {name: backend.to_numpy(value) for name, value in theirs.items()}
        theirs = step_of(arrays(grads_at(step, at)), LR * (lr(step) if callable(lr) else lr))
        for name, mine in ours.items():
            assert relative_error(mine, backend.to_numpy(theirs[name])) < allowance(dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("lr", [1.0, schedule], ids=["constant", "schedule"])
@pytest.mark.parametrize("name", list(TORCH))
def test_without_meta_updates_equals_torch(name: str, lr: Any, dtype: str) -> None:
    check_without_meta_updates("torch", TORCH[name], lr, dtype)


@pytest.mark.parametrize("lr", [1.0, schedule], ids=["constant", "schedule"])
@pytest.mark.parametrize("name", list(OPTAX))
def test_without_meta_updates_equals_optax(name: str, lr: Any) -> None:
    pytest.importorskip("optax")
    check_without_meta_updates("jax", OPTAX[name], lr, "float64")


def values_of(rule: Any, where: str) -> dict[str, Any]:
    """Return grad and slots at which to differentiate, coordinate by coordinate."""
    rng = np.random.default_rng(5)
    values = {"grad": rng.normal(size=6)}
    for slot in rule.slots:
        value = rng.normal(size=6)
        values[slot] = value * value + 0.1 if slot == "exp_avg_sq" else value
    if where == "first step":
        values |= {slot: np.zeros(6) for slot in rule.slots}
    return values


@pytest.mark.parametrize("where", ["middle", "first step"])
@pytest.mark.parametrize("rule", FORMS, ids=repr)
def test_jets_equal_central_differences(rule: Any, where: str) -> None:
    values = values_of(rule, where)
    count = np.asarray(1.0 if where == "first step" else 3.0)
    h = np.finfo(float).eps ** (1 / 3)

    def outputs(**changed: Any) -> dict[str, Any]:
        at = values | changed
        slots = {slot: at[slot] for slot in rule.slots}
        direction, new = rule.direction(at["grad"], slots, count)
        return {"direction": direction, **new}

    for source in values:
        if where == "first step" and source == "exp_avg_sq":
            continue  # nothing lies below zero; the value there has its own test
        jets = {
            name: Jet(value, np.ones(6) if name == source else None)
            for name, value in values.items()
        }
        direction, new = rule.direction(jets.pop("grad"), jets, Jet(count))
        ahead = outputs(**{source: values[source] + h})
        behind = outputs(**{source: values[source] - h})
        plain = outputs()
        for name, jet in {"direction": direction, **new}.items():
            np.testing.assert_array_equal(jet.value, plain[name])
            slope = (ahead[name] - behind[name]) / (2 * h)
            got = np.zeros(6) if jet.first is None else jet.first
            scale = max(np.max(np.abs(slope)), np.max(np.abs(jet.value)))
            assert np.max(np.abs(got - slope)) <= FORMULA * scale, (source, name)


@pytest.mark.parametrize("rule", FORMS, ids=repr)
def test_second_derivatives_equal_differences_of_the_first(rule: Any) -> None:
    """Along two directions that move everything at once, the arguments' own second parts too."""
    values, count = values_of(rule, "middle"), np.asarray(3.0)
    rng, h = np.random.default_rng(9), np.finfo(float).eps ** (1 / 3)
    firsts = {name: rng.normal(size=(2, 6)) for name in values}
    bends = {name: rng.normal(size=(2, 2, 6)) for name in values}
    seconds = {name: bend + bend.swapaxes(0, 1) for name, bend in bends.items()}

    def push(t: float, k: int) -> Any:
        """Return the direction a little further along direction k, as arguments curve."""
        jets = {
            name: Jet(
                value + t * firsts[name][k] + 0.5 * t * t * seconds[name][k, k],
                firsts[name] + t * seconds[name][k],
                seconds[name],
                order=2,
            )
            for name, value in values.items()
        }
        return rule.direction(jets.pop("grad"), jets, Jet(count, order=2))[0]

    got = push(0.0, 0).second
    for k in range(2):
        ahead, behind = push(h, k).first, push(-h, k).first
        if ahead is None:
            assert got is None
            continue
        slope = (ahead - behind) / (2 * h)
        if got is None:  # linear in arguments that do not curve
            assert np.max(np.abs(slope)) < FORMULA * np.max(np.abs(ahead))
        else:
            assert relative_error(got[:, k], slope) < FORMULA


@pytest.mark.parametrize("rule", FORMS, ids=repr)
def test_jets_take_columns(rule: Any) -> None:
    values = values_of(rule, "middle")
    columns = {name: np.random.default_rng(8).normal(size=(3, 6)) for name in values}

    def push(pick: Any) -> Any:
        jets = {name: Jet(value, pick(columns[name])) for name, value in values.items()}
        return rule.direction(jets.pop("grad"), jets, Jet(np.asarray(3.0)))[0].first

    together = push(lambda column: column)
    if together is None:
        assert not follows_weights(rule)
        return
    for j in range(3):
        np.testing.assert_array_equal(together[j], push(lambda column, j=j: column[j]))


@pytest.mark.parametrize("eps", [1e-3, 0.0])
@pytest.mark.parametrize("kind", WITH_EPS)
def test_a_coordinate_without_gradient_contributes_zero(kind: Any, eps: float) -> None:
    """Section 5: where v' = 0 the derivative of the root is 0, and with eps = 0 all is 0."""
    rule = kind(eps=eps)
    slots = {slot: Jet(np.zeros(2), np.ones(2)) for slot in rule.slots}
    direction, new = rule.direction(Jet(np.zeros(2), np.ones(2)), slots, Jet(np.asarray(1.0)))
    assert not np.any(direction.value)
    if eps == 0.0:
        assert not np.any(direction.first)
    else:
        zero = np.zeros(2)
        by = partials(update_of(rule), zero, zero, zero, np.ones(2))
        want = by.u_g + by.u_m + by.u_v
        assert np.all(want > 0.5 / eps)
        np.testing.assert_allclose(direction.first, want, rtol=1e-12)
    assert all(np.all(np.isfinite(jet.first)) for jet in new.values())


@pytest.mark.parametrize("rule", FORMS, ids=repr)
def test_the_first_delayed_direction_is_zero(rule: Any) -> None:
    if not getattr(rule, "delayed", False):
        pytest.skip("not delayed")
    slots = {slot: np.zeros(3) for slot in rule.slots}
    direction, _ = rule.direction(np.asarray([1.0, -2.0, 0.0]), slots, np.asarray(1.0))
    assert not np.any(direction)


@pytest.mark.parametrize("rule", DELAYABLE, ids=repr)
def test_delayed_uses_the_moments_of_the_step_before(rule: Any) -> None:
    """A delayed moment at step t+1 is the fresh one of step t; the gradient alone is newer."""
    rng = np.random.default_rng(3)
    delayed = replace(rule, delayed=True)
    fresh_slots = late_slots = {slot: np.zeros(4) for slot in rule.slots}
    previous: Any = None
    previous_grad: Any = None
    for step in range(1, 6):
        grad, count = rng.normal(size=4), np.asarray(float(step))
        late, late_slots = delayed.direction(grad, late_slots, count)
        if previous is not None:
            want = previous * grad / previous_grad if isinstance(rule, mo.RMSprop) else previous
            np.testing.assert_allclose(late, want, rtol=1e-12)
        previous, fresh_slots = rule.direction(grad, fresh_slots, count)
        previous_grad = grad
        for slot in rule.slots:
            np.testing.assert_array_equal(late_slots[slot], fresh_slots[slot])


def test_what_feeds_back_is_found_from_the_formula() -> None:
    assert feeding_slots(mo.AdamW()) == ("exp_avg", "exp_avg_sq")
    assert feeding_slots(mo.RMSprop()) == ("exp_avg_sq",)
    assert feeding_slots(mo.SGD(momentum=0.5)) == ("exp_avg",)
    assert feeding_slots(mo.SGD()) == ()
    assert feeding_slots(mo.Lion()) == ()
    assert not follows_weights(mo.Lion())
    assert feeding_slots(mo.FastStart(mo.AdamW())) == ("exp_avg", "exp_avg_sq")
    assert feeding_slots(mo.FastStart(mo.Lion())) == ()
    assert not follows_weights(mo.FastStart(mo.Lion()))
    assert all(follows_weights(rule) != signs(rule) for rule in FORMS)


def test_a_hyperparameter_can_be_a_jet() -> None:
    """Tangents of other hyperparameters come from the same formula: beta2 of AdamW here."""
    values, count, h = values_of(mo.AdamW(), "middle"), np.asarray(7.0), 1e-6
    slots = {slot: values[slot] for slot in mo.AdamW().slots}

    def direction(beta2: float) -> Any:
        return mo.AdamW(betas=(0.9, beta2)).direction(values["grad"], slots, count)[0]

    rule = mo.AdamW(betas=(0.9, Jet(0.95, 1.0)))  # type: ignore[arg-type]
    jets = {slot: Jet(value) for slot, value in slots.items()}
    jet, _ = rule.direction(Jet(values["grad"]), jets, Jet(count))
    slope = (direction(0.95 + h) - direction(0.95 - h)) / (2 * h)
    assert relative_error(jet.first, slope) < FORMULA


def test_a_rule_of_ones_own_runs() -> None:
    """One file, one formula: here sign descent with a decaying step."""

    class SignDescent:
        slots = ()
        weight_decay = 0.0

        def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
            return mo.rules.Lion().direction(grad, {"exp_avg": 0.0 * grad}, count)[0] / count, {}

    opt = mo.MetaOptimize(
        base=SignDescent(), meta=mo.SGD(), step_size=0.5, meta_lr=0.0, discount=1.0
    )
    params = {"w": np.asarray([3.0, -4.0])}
    state = opt.init(params)
    for _ in range(3):
        params, state = opt.step(params, {"w": params["w"]}, state)
    np.testing.assert_allclose(params["w"], np.asarray([3.0, -4.0]) - np.asarray([1, -1]) * 11 / 12)


@pytest.mark.parametrize("kind", WITH_EPS)
def test_an_eps_below_what_float32_holds_counts_as_zero(kind: Any) -> None:

    def first(eps: float, dtype: str) -> Any:
        slots = {slot: np.zeros(3, dtype) for slot in kind().slots}
        grad = np.asarray([0.0, 1.0, -2.0], dtype)
        return kind(eps=eps).direction(grad, slots, np.asarray(1.0, dtype))[0]

    assert relative_error(first(1e-40, "float32"), first(0.0, "float64")) < 1e-6


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("kind", WITH_EPS)
def test_second_derivatives_of_small_gradients_stay_within_float32(kind: Any, eps: float) -> None:
    """The cube of the root's reciprocal does not; with a tangent of the gradient's size, all is."""
    rule = kind(eps=eps)

    def second(dtype: str) -> Any:
        grad = np.asarray([1e-15, 1.0], dtype)
        slots = {slot: Jet(np.zeros(2, dtype), order=2) for slot in rule.slots}
        jet = Jet(grad, grad[None, :], 0 * grad[None, None, :], order=2)
        return rule.direction(jet, slots, Jet(np.asarray(1.0, dtype), order=2))[0].second

    want = second("float64")
    assert np.max(np.abs(second("float32") - want)) < rounding("float32", operations=60)


def test_delayed_rmsprop_has_no_second_derivative_where_nothing_was_seen() -> None:
    rule = mo.RMSprop(delayed=True)
    grad = Jet(np.ones(2), np.ones((1, 2)), np.ones((1, 1, 2)), order=2)
    slots = {"exp_avg_sq": Jet(np.zeros(2), np.zeros((1, 2)), order=2)}
    direction, _ = rule.direction(grad, slots, Jet(np.asarray(3.0), order=2))
    for part in (direction.value, direction.first, direction.second):
        assert not np.any(part)


@pytest.mark.parametrize("rule", METAS.values(), ids=repr)
def test_a_fast_start_ends_where_z_has_been_positive_often_enough(rule: Any) -> None:
    fast = mo.FastStart(rule, factor=7.0, patience=2)
    # by block: never positive, at once, after zeros, not in a row, with a step back, after others
    run = np.array(
        [
            [0.0, 1.0, 0.0, 1.0, 1.0, -1.0],
            [-1.0, 2.0, 1.0, 0.0, -2.0, -1.0],
            [-3.0, 1.0, 2.0, 1.0, 1.0, 1.0],
            [-1.0, -1.0, -4.0, -2.0, 3.0, 2.0],
            [-1.0, -1.0, -4.0, 1.0, -2.0, -1.0],
        ]
    )
    speeds = np.where(np.array([[5, 1, 2, 2, 3, 3]]) <= np.arange(5)[:, None], 1.0, 7.0)
    slots = {slot: np.zeros(6) for slot in fast.slots}
    for t, (z, speed) in enumerate(zip(run, speeds, strict=True), start=1):
        own = {slot: slots[slot] for slot in rule.slots}
        plain, own = rule.direction(z, own, np.asarray(float(t)))
        direction, slots = fast.direction(z, slots, np.asarray(float(t)))
        assert np.array_equal(direction, speed * plain)
        assert all(np.array_equal(slots[slot], own[slot]) for slot in rule.slots)


def test_step_sizes_that_start_too_small_arrive_sooner() -> None:
    """Beta moves by factor * meta_lr a step while z asks for more, and by meta_lr afterwards.

    In between it goes back by as much as ten of the former steps.
    """
    params, moved = {"w": np.full(3, 5.0)}, []
    opt = mo.MetaOptimize(
        base=mo.SGD(), meta=mo.FastStart(mo.Lion()), step_size=1e-4, meta_lr=1e-2, discount=1.0
    )
    state = opt.init(params)
    for _ in range(400):
        before = state.beta
        params, state = opt.step(params, {"w": np.asarray(params["w"])}, state)
        moved.append(float(state.beta[0] - before[0]))
    turn = next(t for t, delta in enumerate(moved) if delta < -0.5)
    assert 92 < turn < 120  # ln(1 / 1e-4) / 0.1 = 92 steps to the right step size
    assert np.allclose(np.abs(moved[1:turn]), 0.1)
    assert np.isclose(moved[turn], -1.0)
    assert np.allclose(np.abs(moved[turn + 1 :]), 0.01)
    assert np.abs(params["w"]).max() < 1e-2


def test_the_retreat_is_of_rules_whose_direction_keeps_its_size() -> None:
    for rule in (mo.AdamW(), mo.NAdamW(), mo.RMSprop(), mo.Lion()):
        assert mo.FastStart(rule).retreat == 10.0
    assert mo.FastStart(mo.SGD()).retreat == mo.FastStart(mo.SGD(momentum=0.9)).retreat == 0.0
    assert mo.FastStart(mo.SGD(), retreat=2).retreat == 2.0
    with pytest.raises(ValueError, match="`retreat` must be finite and at least 0"):
        mo.FastStart(mo.AdamW(), retreat=-1.0)
    with pytest.raises(ValueError, match="`rule` must have a formula"):
        mo.FastStart(mo.Opaque())


def test_a_fast_start_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="`factor` must be finite and at least 1"):
        mo.FastStart(mo.AdamW(), factor=0.5)
    with pytest.raises(ValueError, match="`patience` must be at least 1; got 0"):
        mo.FastStart(mo.AdamW(), patience=0)
    with pytest.raises(TypeError, match=r"`patience` must be a whole number; got 1\.5"):
        mo.FastStart(mo.AdamW(), patience=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`rule` must have no slot 'against'"):
        mo.FastStart(mo.FastStart(mo.AdamW()))
    with pytest.raises(TypeError, match="`rule` must be a rule such as"):
        mo.FastStart(mo.AdamW)  # type: ignore[arg-type]
    fast = mo.FastStart(mo.AdamW())
    with pytest.raises(ValueError, match="`base` must be an update of weights"):
        mo.MetaOptimize(base=fast, meta=mo.AdamW(), discount=1.0)
    with pytest.raises(ValueError, match=r"`base\['b'\]` must be an update of weights"):
        mo.MetaOptimize(base={"w": mo.SGD(), "b": fast}, meta=mo.AdamW(), discount=1.0)
    with pytest.raises(ValueError, match="`meta` must have weight_decay 0"):
        mo.MetaOptimize(base=mo.SGD(), meta=mo.FastStart(mo.AdamW(weight_decay=0.1)), discount=1.0)


def test_a_fast_start_is_saved(tmp_path: Any) -> None:
    opt = mo.MetaOptimize(
        base=mo.AdamW(),
        meta=mo.FastStart(mo.Lion(betas=(0.5, 0.6)), factor=3, patience=4),
        discount=1.0,
    )
    params = {"w": np.ones(3)}
    state = opt.init(params)
    for grad in (1.0, -1.0, -1.0, 1.0):  # the weights have gone too far, and back
        params, state = opt.step(params, {"w": grad * np.ones(3)}, state)
    assert state.meta_slots["against"] == 1.5
    mo.save(tmp_path / "state", opt, state)
    loaded, found = mo.load(tmp_path / "state", params)
    assert loaded == opt
    assert found.meta_slots["against"] == 1.5
