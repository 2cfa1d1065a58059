"""Meta-gradients made with the gradient of another loss, such as that of a held-out batch.

docs/mathematics.md section 2, *Another loss*. The conformance suite has the same against its
oracle, for every rule and option, and for the adapters.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from metaopt_conformance import table, tolerances
from metaopt_conformance.problems import PROBLEMS
from metaopt_conformance.translate import contents, flat, traces, tree, values_of

import metaopt as mo
from metaopt.rules.rule import direction_of

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tensor": {"blocks": "tensor", "discount": 1.0},
    "node": {"blocks": "node", "discount": 0.9},
    "weight": {"blocks": "weight"},
    "softplus": {"sigma": "softplus", "step_size": 0.03},
    "diagonal": {"blocks": "tensor", "curvature": "diagonal"},
    "exact": {"blocks": "tensor", "curvature": "exact"},
    "meta first": {"meta_first": True, "skip_nonfinite": True},
}
PROBLEM = PROBLEMS["network"]
STEPS = 12
#: The held-out batch is that of a step that training never comes to.
HELD_OUT = 1000


def made(**options: Any) -> mo.MetaOptimize:
    settings: dict[str, Any] = {"base": mo.AdamW(weight_decay=0.1), "step_size": 0.02}
    settings |= {"meta": mo.FastStart(mo.AdamW()), "meta_lr": 0.05, "held_out": True}
    return mo.MetaOptimize(**(settings | options))


def gradients(params: Mapping[str, Any], t: int) -> dict[str, Any]:
    return tree(PROBLEM.grad(t, flat(params, PROBLEM.shapes)), PROBLEM.shapes)


def derivatives(params: Mapping[str, Any], t: int) -> dict[str, Any]:
    hessian = PROBLEM.hessian(t, flat(params, PROBLEM.shapes))

    def hvp(tangents: Mapping[str, Any]) -> dict[str, Any]:
        return tree(flat(tangents, PROBLEM.shapes) @ hessian, PROBLEM.shapes)

    return {"hvp": hvp, "hessian_diagonal": tree(np.diag(hessian), PROBLEM.shapes)}


def run(opt: mo.MetaOptimize, judge: Any = None, **given: Any) -> Iterator[tuple[Any, mo.State]]:
    """Yield params and state before each step and after the last.

    `judge` is from params and step to `meta_grads`, None for none.
    """
    params = tree(PROBLEM.start(), PROBLEM.shapes)
    state = opt.init(params)
    yield params, state
    for t in range(STEPS):
        meta_grads = None if judge is None else judge(params, t)
        params, state = opt.step(
            params,
            gradients(params, t),
            state,
            meta_grads=meta_grads,
            **derivatives(params, t),
            **given,
        )
        yield params, state


def elsewhere(params: Mapping[str, Any], t: int) -> dict[str, Any]:
    """Return the gradients of a batch that training does not have."""
    return gradients(params, HELD_OUT + t)


def every_third(params: Mapping[str, Any], t: int) -> dict[str, Any] | None:
    return elsewhere(params, t) if t % 3 == 2 else None


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("base", table.BASES.values(), ids=repr)
def test_the_gradients_of_training_in_their_place_change_nothing(
    base: Any, options: dict[str, Any]
) -> None:
    opt = made(base=base, **options)
    for one, other in zip(run(opt, gradients), run(replace(opt, held_out=False)), strict=True):
        assert contents(list(one)) == contents(list(other))


@pytest.mark.parametrize("base", table.BASES.values(), ids=repr)
@pytest.mark.parametrize("meta_first", [False, True])
def test_the_meta_gradient_is_the_slope_of_the_held_out_loss(base: Any, meta_first: bool) -> None:
    """By central differences of whole runs along the step sizes that were learned."""
    options: dict[str, Any] = {"blocks": "tensor", "curvature": "exact", "discount": 1.0}
    options["meta_lr"] = 0.03  # no sign of Lion's changes between the two runs of a difference
    opt = made(base=base, meta_first=meta_first, **options)
    states = list(run(opt, elsewhere))
    names = list(PROBLEM.shapes)
    shift = int(meta_first)
    sizes = [opt.step_sizes(state) for _, state in states][shift : STEPS + shift]

    def replayed(nudge: Mapping[str, float]) -> list[Any]:
        """Return the weights of a run at these step sizes, each times exp of its nudge."""
        fixed = mo.MetaOptimize(base=base, meta_lr=0.0, step_size=1.0, discount=1.0)
        params = tree(PROBLEM.start(), PROBLEM.shapes)
        state, found = fixed.init(params), [params]
        for t in range(STEPS):
            lr = {name: float(sizes[t][name] * np.exp(nudge.get(name, 0.0))) for name in names}
            params, state = fixed.step(params, gradients(params, t), state, lr=lr)
            found.append(params)
        return found

    def losses(nudge: Mapping[str, float]) -> list[float]:
        weights = (flat(params, PROBLEM.shapes) for params in replayed(nudge))
        return [PROBLEM.loss(HELD_OUT + t, w) for t, w in enumerate(weights)]

    for index, name in enumerate(names):
        ahead, behind = (losses({name: sign * tolerances.STEP}) for sign in (1.0, -1.0))
        slopes = (np.array(ahead) - behind) / (2.0 * tolerances.STEP)
        got = np.array([state.meta_grad[index] for _, state in states[1:]])
        scale = float(np.max(np.abs(slopes)))
        assert scale > 1e-4
        error = tolerances.relative_error(got, slopes[:STEPS], scale)
        assert error < tolerances.FINITE_DIFFERENCES


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_them_step_sizes_rest_and_traces_go_on(options: dict[str, Any]) -> None:
    opt = made(**options)
    fixed = replace(opt, held_out=False, meta_lr=0.0)
    states = list(run(opt, every_third))
    rested = moved = 0
    for t in range(1, STEPS):
        (params, state), (new_params, new) = states[t], states[t + 1]
        if t % 3 == 2:
            moved += contents(state.beta) != contents(new.beta)
            continue
        rested += 1
        want_params, want = fixed.step(
            params, gradients(params, t), state, **derivatives(params, t)
        )
        assert contents(new_params) == contents(want_params)
        for part in ("step", "count", "slots", "trace", "average", "slot_traces"):
            assert contents(getattr(new, part)) == contents(getattr(want, part))
        for part in ("beta", "meta_slots", "meta_count", "restarts"):
            assert contents(getattr(new, part)) == contents(getattr(state, part))
        assert not np.any(np.concatenate([np.ravel(z) for z in leaves_of(new.meta_grad)]))
    assert rested
    assert moved


def leaves_of(values: Any) -> list[Any]:
    return list(values.values()) if isinstance(values, Mapping) else [values]


@pytest.mark.parametrize(
    "nothing",
    [
        lambda _: {},
        dict.fromkeys,
        lambda params: {name: np.zeros_like(param) for name, param in params.items()},
    ],
    ids=["empty", "None", "zeros"],
)
def test_nothing_can_be_said_in_several_ways(nothing: Any) -> None:
    opt = made()

    def judge(params: Mapping[str, Any], t: int) -> Any:
        return every_third(params, t) or nothing(params)

    for one, other in zip(run(opt, every_third), run(opt, judge), strict=True):
        assert contents(list(one)) == contents(list(other))


def test_leaves_left_out_add_nothing() -> None:
    opt = made(discount=1.0)
    whole = made(discount=1.0, blocks="tensor", meta_lr=0.0)

    def some(params: Mapping[str, Any], t: int) -> dict[str, Any]:
        found = elsewhere(params, t)
        return {"out.weight": found["out.weight"], "out.bias": None}

    (params, state), *_ = list(run(whole, elsewhere))[5:]
    grads = gradients(params, 5)
    _, each = whole.step(params, grads, state, meta_grads=elsewhere(params, 5))
    one_block = list(run(replace(opt, meta_lr=0.0), elsewhere))[5][1]
    _, got = opt.step(params, grads, one_block, meta_grads=some(params, 5))
    assert float(each.meta_grad[2]) != 0.0
    np.testing.assert_allclose(float(got.meta_grad[0]), float(each.meta_grad[2]), rtol=1e-12)


@pytest.mark.parametrize("how", ["lr 0", "no gradient"])
def test_a_leaf_at_rest_adds_nothing(how: str) -> None:
    opt = made(discount=1.0)
    (params, state), *_ = list(run(opt, elsewhere))[5:]
    grads, judge = gradients(params, 5), elsewhere(params, 5)
    given: dict[str, Any] = {}
    if how == "lr 0":
        given["lr"] = {name: 0.0 if name == "out.weight" else 1.0 for name in params}
    else:
        grads["out.weight"] = None
    _, one = opt.step(params, grads, state, meta_grads=judge, **given)
    del judge["out.weight"]
    _, other = opt.step(params, grads, state, meta_grads=judge, **given)
    assert contents(one) == contents(other)


def spoiled(params: Mapping[str, Any], t: int) -> dict[str, Any]:
    """Return held-out gradients, of which one is not finite in one step."""
    found = elsewhere(params, t)
    if t == 5:
        found["hidden.bias"][1] = np.inf
    return found


def test_one_that_is_not_finite_starts_the_trace_anew_and_leaves_the_weights_alone() -> None:
    opt = made()
    states, others = list(run(opt, spoiled)), list(run(opt, elsewhere))
    (params, before), (new_params, after) = states[5:7]
    assert contents(new_params) == contents(others[6][0])
    assert contents(after.beta) == contents(before.beta)
    assert int(after.restarts[0]) == 1
    own = replace(opt, held_out=False)
    # traces are those of this one step
    _, fresh = own.step(params, gradients(params, 5), replace(own.init(params), **vars_of(before)))
    for name, trace in traces(new_params, after).items():
        np.testing.assert_allclose(trace, traces(new_params, fresh)[name], atol=1e-15)
    assert all(np.all(np.isfinite(part)) for part in leaves_of(states[-1][0]))
    assert contents(states[-1][1].beta) != contents(after.beta)


def vars_of(state: mo.State) -> dict[str, Any]:
    """Return all of a state that a restart of its traces leaves alone."""
    return {name: getattr(state, name) for name in ("slots", "count", "beta", "step")}


def test_skip_nonfinite_leaves_out_steps_with_one_that_is_not_finite() -> None:
    states = list(run(made(skip_nonfinite=True), spoiled))
    (params, before), (new_params, after) = states[5:7]
    assert contents(new_params) == contents(params)
    assert contents(replace(after, skipped=before.skipped)) == contents(before)
    assert int(states[-1][1].skipped) == 1


def test_an_optimizer_known_by_its_steps_alone_takes_them() -> None:
    rule = mo.AdamW()
    own, other = made(base=rule), made(base=mo.Opaque())
    formula: Any = own.base
    params = others = tree(PROBLEM.start(), PROBLEM.shapes)
    state, other_state = own.init(params), other.init(others)
    slots = {name: {slot: np.zeros_like(p) for slot in rule.slots} for name, p in params.items()}
    for t in range(STEPS):
        judge, other_judge = every_third(params, t), every_third(others, t)
        params, state = own.step(params, gradients(params, t), state, meta_grads=judge)
        grads, units = gradients(others, t), {}
        for name, grad in grads.items():
            count = np.asarray(t + 1.0)
            units[name], slots[name] = direction_of(formula, grad, slots[name], count, others[name])
        others, other_state = other.step(
            others, grads, other_state, unit_steps=units, meta_grads=other_judge
        )
    for name in params:
        np.testing.assert_allclose(others[name], params[name], rtol=1e-11)
    assert own.step_sizes(state)["all"] != 0.02
    np.testing.assert_allclose(other_state.beta, state.beta, rtol=1e-11)


def test_update_takes_them_as_step_does() -> None:
    opt = made()
    (params, state), *_ = list(run(opt, elsewhere))[5:]
    grads, judge = gradients(params, 5), elsewhere(params, 5)
    new_params, new = opt.step(params, grads, state, meta_grads=judge)
    deltas, other = opt.update(params, grads, state, meta_grads=judge)
    assert contents(values_of(new)) == contents(values_of(other))
    for name, delta in deltas.items():
        np.testing.assert_allclose(params[name] - delta, new_params[name], rtol=1e-12)


def test_parts_on_two_devices_are_the_whole() -> None:
    """Of which one has no held-out gradient, and sums all the same."""
    opt = made(skip_nonfinite=True)
    (params, state), *_ = list(run(opt, elsewhere))[5:]
    grads, judge = gradients(params, 5), elsewhere(params, 5)
    del judge["out.bias"]
    _, want = opt.step(params, grads, state, meta_grads=judge)
    halves = [[name for name in params if name.startswith(part)] for part in ("hidden", "out")]

    def held(names: list[str]) -> Any:
        parts = {
            part: {name: getattr(state, part)[name] for name in names}
            for part in ("count", "slots", "average")
        }
        own = {name: params[name] for name in names}
        return own, replace(state, **{part: type(state.count)(v) for part, v in parts.items()})

    sums: list[Any] = []

    def stepped(names: list[str], reduce: Any) -> mo.State:
        own, own_state = held(names)
        own_judge = {name: judge[name] for name in names if name in judge}
        own_grads = {name: grads[name] for name in names}
        return opt.step(own, own_grads, own_state, meta_grads=own_judge, reduce=reduce)[1]

    def noted(arrays: list[Any]) -> list[Any]:
        sums.append(arrays)
        return arrays

    for names in halves:
        stepped(names, noted)
    total = [sum(parts) for parts in zip(*sums, strict=True)]
    for names in halves:
        got = stepped(names, lambda _: total)
        np.testing.assert_allclose(got.meta_grad, want.meta_grad, rtol=1e-12)
        np.testing.assert_allclose(got.beta, want.beta, rtol=1e-12)


def test_a_file_says_that_they_were_asked_for(tmp_path: Any) -> None:
    opt = made()
    *_, (params, state) = run(opt, every_third)
    mo.save(tmp_path / "state", opt, state)
    loaded, again = mo.load(tmp_path / "state", params)
    assert loaded.held_out is True
    judge = elsewhere(params, STEPS)
    one, other = (
        o.step(params, gradients(params, STEPS), s, meta_grads=judge)
        for o, s in ((opt, state), (loaded, again))
    )
    assert contents(list(one)) == contents(list(other))


@pytest.mark.parametrize(
    ("options", "meta_grads", "error", "message"),
    [
        ({"held_out": False}, {}, ValueError, "`meta_grads` must be left out without `held_out`"),
        ({}, {"x": np.zeros(3)}, ValueError, "`meta_grads` has unknown leaf 'x'; expected any of"),
        ({}, [1.0], TypeError, "`meta_grads` must be a mapping of leaf to array; got list"),
        ({}, {"out.bias": 1.0}, TypeError, r"`meta_grads\['out.bias'\]` must be an array"),
        (
            {},
            {"out.bias": np.zeros(2)},
            ValueError,
            r"`meta_grads\['out.bias'\]` has shape \(2,\); expected \(\)",
        ),
        (
            {},
            {"out.weight": np.zeros(3, complex)},
            TypeError,
            r"`meta_grads\['out.weight'\]` must be real and floating; got dtype complex128",
        ),
    ],
)
def test_wrong_ones_are_refused(
    options: dict[str, Any], meta_grads: Any, error: type[Exception], message: str
) -> None:
    opt = made(**options)
    params = tree(PROBLEM.start(), PROBLEM.shapes)
    with pytest.raises(error, match=message):
        opt.step(params, gradients(params, 0), opt.init(params), meta_grads=meta_grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 1}, "`held_out` must be True or False; got 1"),
        ({"recover": True}, "`recover` needs `held_out` False; got True"),
        (
            {"approximation": "2x2", "curvature": "exact", "discount": 1.0},
            "`held_out` needs `approximation` \"l\": .* got '2x2'",
        ),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        made(**options)


@pytest.mark.parametrize(
    "base",
    [
        mo.AdamW(weight_decay=mo.Learned(0.1, meta_lr=0.0)),
        mo.SGD(momentum=mo.Learned(0.8, meta_lr=0.0)),
    ],
    ids=["weight_decay", "momentum"],
)
def test_numbers_that_are_learned_have_its_slope_too(base: Any) -> None:
    options: dict[str, Any] = {"curvature": "exact", "discount": 1.0, "meta_lr": 0.0}
    place = "weight_decay" if isinstance(base, mo.AdamW) else "momentum"
    *_, last = list(run(made(base=base, **options), elsewhere))
    got = last[1].learned[place]["meta_grad"]

    def loss(number: float) -> float:
        """Return the held-out loss at which the last step began."""
        opt = made(base=replace(base, **{place: number}), **options)
        params, _ = list(run(opt, elsewhere))[-2]
        return PROBLEM.loss(HELD_OUT + STEPS - 1, flat(params, PROBLEM.shapes))

    start = 0.1 if place == "weight_decay" else 0.8
    slope = (loss(start + tolerances.STEP) - loss(start - tolerances.STEP)) / 2 / tolerances.STEP
    slope *= start if place == "weight_decay" else 1.0 - start  # of "exp", and of "decay"
    assert abs(slope) > 1e-4
    assert tolerances.relative_error(got, [slope]) < tolerances.FINITE_DIFFERENCES


@pytest.mark.parametrize("held_out", [False, True])
def test_weight_decay_grows_by_a_held_out_loss_and_shrinks_by_that_of_training(
    held_out: bool,
) -> None:
    """On noise alone, where the best weights of any other data are 0."""
    rng = np.random.default_rng(0)
    (x, y), (x_val, y_val) = ((rng.normal(size=(30, 20)), rng.normal(size=30)) for _ in range(2))
    base = mo.AdamW(weight_decay=mo.Learned(0.1, meta_lr=0.01))
    opt = made(base=base, meta=mo.AdamW(), held_out=held_out, meta_lr=0.0)
    params = {"w": np.zeros(20)}
    state = opt.init(params)
    for _ in range(300):
        grads, judge = (
            {"w": inputs.T @ (inputs @ params["w"] - targets) / 30}
            for inputs, targets in ((x, y), (x_val, y_val))
        )
        params, state = opt.step(params, grads, state, meta_grads=judge if held_out else None)
    decay = float(opt.hyperparameters(state)["weight_decay"]["all"])
    assert decay > 0.2 if held_out else decay < 0.05
