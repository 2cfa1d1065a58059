"""Steps that are made elsewhere: the core needs their size alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.table import FORMS
from metaopt_conformance.tolerances import relative_error

import metaopt as mo
from metaopt.rules.rule import direction_of

METAS = [mo.SGD(), mo.RMSprop(), mo.AdamW(), mo.Lion(), mo.FastStart(mo.AdamW())]
BLOCKS = ["scalar", "tensor", "node", "weight", {"all but b": ["w", "c"], "b": ["b"]}]
SHAPES: dict[str, tuple[int, ...]] = {"w": (4, 3), "b": (3,), "c": ()}
#: Of 200 steps in float64, whose errors training does not magnify on this problem.
ROUNDING = 2e-13


class Elsewhere:
    """An optimizer by a rule of ours, that knows no more than its gradients."""

    def __init__(self, rule: Any, params: dict[str, Any]) -> None:
        self.rule = rule
        self.slots = {
            name: {slot: np.zeros_like(param) for slot in rule.slots}
            for name, param in params.items()
        }
        self.count = dict.fromkeys(params, 0)

    def unit_steps(self, params: dict[str, Any], grads: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, grad in grads.items():
            if grad is None:
                continue
            self.count[name] += 1
            count = np.asarray(float(self.count[name]))
            direction, self.slots[name] = direction_of(
                self.rule, grad, self.slots[name], count, params[name]
            )
            found[name] = direction + self.rule.weight_decay * params[name]
        return found


def gradients(params: dict[str, Any], t: int, *, rest: bool = True) -> dict[str, Any]:
    """Return those of quadratics whose minima move; now and then one is missing."""
    grads = {name: 0.3 * param - np.sin(0.1 * t + param) for name, param in params.items()}
    return grads | ({"b": None} if rest and t % 7 == 3 else {})


def start() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def differ(rule: Any, *, steps: int = 200, opaque: Any = None, **options: Any) -> float:
    """Return how far steps that are handed in lead from those of the rule itself."""
    settings: dict[str, Any] = {
        "step_size": 0.02,
        "meta_lr": 0.01,
        "meta": mo.AdamW(),
        "discount": 1.0,
    } | options
    own = mo.MetaOptimize(base=rule, **settings)
    wrapped = replace(own, base=mo.Opaque(weight_decay=rule.weight_decay))
    wrapped = wrapped if opaque is None else replace(own, base=opaque)
    params, others = start(), start()
    state, other_state = own.init(params), wrapped.init(others)
    elsewhere = Elsewhere(own.base, params)
    for t in range(steps):
        lr = {"w": 1.0, "b": 0.5, "c": 0.0 if t % 5 == 2 else 1.5}
        params, state = own.step(params, gradients(params, t), state, lr=lr)
        grads = gradients(others, t)
        unit_steps = elsewhere.unit_steps(others, grads)
        others, other_state = wrapped.step(others, grads, other_state, lr=lr, unit_steps=unit_steps)
    sizes, other_sizes = own.step_sizes(state), wrapped.step_sizes(other_state)
    pairs = [(others[name], params[name]) for name in params]
    pairs += [(other_sizes[key], sizes[key]) for key in sizes]
    return max(relative_error(got, want) for got, want in pairs)


@pytest.mark.parametrize("rule", FORMS, ids=repr)
def test_steps_of_a_rule_that_are_handed_in_are_those_of_the_rule(rule: Any) -> None:
    assert differ(rule) < ROUNDING


@pytest.mark.parametrize("meta", METAS, ids=repr)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_with_every_meta_update_and_partition(meta: Any, blocks: Any) -> None:
    assert differ(mo.AdamW(weight_decay=0.1), meta=meta, blocks=blocks) < ROUNDING


@pytest.mark.parametrize(
    "options",
    [
        {"discount": 0.9},
        {"discount": (0.9, 1.0)},
        {"meta_first": True},
        {"skip_nonfinite": True},
        {"sigma": "softplus"},
        {"sigma": "identity"},
        {"bounds": (1e-2, 3e-2)},
    ],
    ids=str,
)
def test_with_every_option(options: Any) -> None:
    assert differ(mo.AdamW(weight_decay=0.1), **options) < ROUNDING


def test_decay_that_is_not_named_is_a_part_of_the_step() -> None:
    assert differ(mo.SGD(weight_decay=0.1), opaque=mo.Opaque()) > 1e-6
    assert differ(mo.SGD(), opaque=mo.Opaque()) < ROUNDING


def test_some_leaves_by_a_formula_and_others_by_their_steps() -> None:
    rule = mo.AdamW()
    both: dict[str, Any] = {"w": mo.Opaque(), "*": rule}
    own = mo.MetaOptimize(base=rule, meta=mo.Lion(), step_size=0.02, discount=1.0)
    mixed = replace(own, base=both)
    params, others = start(), start()
    state, other_state = own.init(params), mixed.init(others)
    elsewhere = Elsewhere(rule, params)
    for t in range(20):
        params, state = own.step(params, gradients(params, t, rest=False), state)
        grads = gradients(others, t, rest=False)
        unit_steps = {"w": elsewhere.unit_steps(others, grads)["w"]}
        others, other_state = mixed.step(others, grads, other_state, unit_steps=unit_steps)
    assert max(relative_error(others[name], params[name]) for name in params) < 1e-14
    assert other_state.slots["w"] == {}


def test_narrow_weights_keep_an_average_in_float32() -> None:
    opt = mo.MetaOptimize(base=mo.Opaque(), meta=mo.AdamW(), discount=1.0)
    params = {"w": np.ones(3, dtype=np.float16)}
    state = opt.init(params)
    assert state.average["w"].dtype == np.float32
    assert state.trace == {}
    grads = {"w": np.ones(3, dtype=np.float16)}
    new, after = opt.step(params, grads, state, unit_steps=grads)
    assert new["w"].dtype == np.float16
    assert after.average["w"].dtype == np.float32


def test_steps_that_are_not_finite_are_skipped_with_their_gradients() -> None:
    opt = mo.MetaOptimize(base=mo.Opaque(), meta=mo.AdamW(), skip_nonfinite=True, discount=1.0)
    params = start()
    state = opt.init(params)
    grads = {name: np.full_like(param, np.nan) for name, param in params.items()}
    new, after = opt.step(params, grads, state, unit_steps=grads)
    assert all(np.array_equal(new[name], params[name]) for name in params)
    assert after.skipped == 1


def test_a_state_goes_through_a_file(tmp_path: Any) -> None:
    opt = mo.MetaOptimize(base=mo.Opaque(weight_decay=0.1), meta=mo.AdamW(), discount=1.0)
    params = start()
    grads = gradients(params, 0, rest=False)
    params, state = opt.step(params, grads, opt.init(params), unit_steps=grads)
    mo.save(tmp_path / "state", opt, state)
    again, loaded = mo.load(tmp_path / "state", params)
    assert again == opt
    assert np.array_equal(loaded.average["w"], state.average["w"])


ARRAYS = {"w": np.ones((4, 3)), "b": np.ones(3), "c": np.ones(())}


@pytest.mark.parametrize(
    ("unit_steps", "kind", "message"),
    [
        (None, ValueError, r"`unit_steps\['w'\]` is needed by base Opaque"),
        ({"w": ARRAYS["w"]}, ValueError, r"`unit_steps\['b'\]` is needed"),
        (ARRAYS | {"w": np.ones(4)}, ValueError, r"`unit_steps\['w'\]` has shape \(4,\)"),
        (ARRAYS | {"d": np.ones(4)}, ValueError, r"`unit_steps\['d'\]` is of an unknown leaf"),
        ([1.0], TypeError, "`unit_steps` must be a mapping"),
    ],
)
def test_steps_that_do_not_fit_are_refused(unit_steps: Any, kind: Any, message: str) -> None:
    opt = mo.MetaOptimize(base=mo.Opaque(), meta=mo.AdamW(), discount=1.0)
    params = start()
    with pytest.raises(kind, match=message):
        opt.step(params, ARRAYS, opt.init(params), unit_steps=unit_steps)


def test_steps_for_a_rule_that_makes_its_own_are_refused() -> None:
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.AdamW(), discount=1.0)
    params = start()
    with pytest.raises(ValueError, match="steps are taken for base `Opaque` alone"):
        opt.step(params, ARRAYS, opt.init(params), unit_steps=ARRAYS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "exact"}, '`curvature` must be left out where `base` is `Opaque`.*"?exact'),
        ({"recover": True}, "`recover` must be left out where `base` is `Opaque`"),
        ({"base": mo.SGD(), "meta": mo.Opaque(), "discount": 1.0}, "`meta` must have a formula"),
    ],
)
def test_what_needs_a_formula_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mo.MetaOptimize(**{"base": mo.Opaque(), "meta": mo.AdamW(), "discount": 1.0} | options)


def test_a_rule_without_a_formula_says_so() -> None:
    with pytest.raises(TypeError, match=r"Opaque.* has no formula"):
        mo.Opaque().direction(np.ones(1), {}, np.ones(()))


def test_a_step_handed_in_that_is_not_finite_is_skipped() -> None:
    opt, params = mo.MetaOptimize(base=mo.Opaque(), skip_nonfinite=True), {"w": np.ones(3)}
    step = {"w": np.array([1.0, np.nan, 1.0])}
    moved, state = opt.step(params, params, opt.init(params), unit_steps=step)
    assert int(state.skipped) == 1
    np.testing.assert_array_equal(moved["w"], params["w"])
