"""Numbers of rules that are learned: their traces are those of whole runs, and 0 learns nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from metaopt_conformance.tolerances import FINITE_DIFFERENCES, STEP, relative_error, rounding
from metaopt_conformance.translate import contents

import metaopt as mo
from metaopt import projection
from metaopt.numerics import maximum
from metaopt.rules.learned import at_start, bound

SHAPES: dict[str, tuple[int, ...]] = {"a": (4, 3), "b": (3,), "c": ()}
SIZE = 16
Learned = mo.Learned

RULES: dict[str, Any] = {
    "AdamW": mo.AdamW(betas=(0.9, 0.99), eps=1e-2, weight_decay=0.1),
    "AdamW, delayed": mo.AdamW(betas=(0.9, 0.99), eps=1e-2, weight_decay=0.1, delayed=True),
    "NAdamW": mo.NAdamW(betas=(0.9, 0.99), eps=1e-2, weight_decay=0.1),
    "RMSprop": mo.RMSprop(beta2=0.9, eps=1e-2, weight_decay=0.1),
    "RMSprop, uncorrected": mo.RMSprop(beta2=0.9, eps=1e-2, bias_correction=False),
    "SGD": mo.SGD(momentum=0.9, weight_decay=0.1),
    "SGD, delayed": mo.SGD(momentum=0.9, weight_decay=0.1, delayed=True),
    "SGD, without momentum": mo.SGD(weight_decay=0.1),
    "Lion": mo.Lion(weight_decay=0.1),
}


def places(rule: Any) -> list[str]:
    """Return what can be learned of a rule, in these settings."""
    decay = ["weight_decay"] if rule.weight_decay else []
    if isinstance(rule, mo.AdamW | mo.NAdamW):
        return ["betas[0]", "betas[1]", "eps", *decay]
    if isinstance(rule, mo.RMSprop):
        return ["beta2", "eps", *decay]
    return ["momentum", *decay] if getattr(rule, "momentum", 0.0) else decay


EVERY = [(name, place) for name, rule in RULES.items() for place in places(rule)]
every_number = pytest.mark.parametrize(("name", "place"), EVERY)


def number(rule: Any, place: str) -> float:
    """Return the number that stands in a place of a rule."""
    value = getattr(rule, place.split("[")[0])
    return float(value[int(place[-2])] if place.endswith("]") else value)


def learning(rule: Any, place: str, **options: Any) -> Any:
    return bound(rule, {place: Learned(number(rule, place), **options)})


def all_learned(rule: Any, **options: Any) -> Any:
    values = {place: Learned(number(rule, place), **options) for place in places(rule)}
    return bound(rule, values)


def tree(vector: Any) -> dict[str, Any]:
    stops = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])
    parts = np.split(vector, stops[:-1], axis=-1)
    return {
        name: part.reshape((*vector.shape[:-1], *shape))
        for part, (name, shape) in zip(parts, SHAPES.items(), strict=True)
    }


def flat(arrays: Any) -> Any:
    parts = []
    for name, shape in SHAPES.items():
        lead = arrays[name].shape[: arrays[name].ndim - len(shape)]
        parts.append(np.reshape(arrays[name], (*lead, -1)))
    return np.concatenate(parts, axis=-1)


RNG = np.random.default_rng(0)
START = tree(RNG.normal(size=SIZE))
GIVEN = [tree(RNG.normal(size=SIZE)) for _ in range(30)]
HALF = RNG.normal(size=(SIZE, SIZE))
HESSIAN = HALF @ HALF.T / SIZE + 0.1 * np.eye(SIZE)


def gradient(params: Any, t: int, *, curved: bool) -> dict[str, Any]:
    """Return a gradient from outside, which no weight has a part in, or that of a quadratic."""
    return tree(HESSIAN @ flat(params) + np.sin(t)) if curved else GIVEN[t]


def hvp(tangents: Any) -> dict[str, Any]:
    return tree(flat(tangents) @ HESSIAN)


def run(opt: mo.MetaOptimize, steps: int = 20) -> tuple[Any, mo.State]:
    params: Any = START
    state = opt.init(params)
    for t in range(steps):
        grads = gradient(params, t, curved=opt.curvature != "none")
        params, state = opt.step(params, grads, state, hvp=hvp)
    return params, state


def still(base: Any, **options: Any) -> mo.MetaOptimize:
    """Return a configuration that learns no step size."""
    usual: dict[str, Any] = {"meta": mo.SGD(), "step_size": 0.05, "meta_lr": 0.0, "discount": 1.0}
    return mo.MetaOptimize(base=base, **(usual | options))


@pytest.mark.parametrize("curvature", ["none", "exact"])
@every_number
def test_traces_are_differences_of_whole_runs(name: str, place: str, curvature: str) -> None:
    """Hessian-free, of gradients that do not depend on the weights, and exact for all others."""
    rule = RULES[name]
    value, decay = number(rule, place), place[:4] in ("beta", "mome")
    _, state = run(still(learning(rule, place, meta_lr=0.0), curvature=curvature))
    traces = state.learned[place]["trace"]
    found = flat({k: np.reshape(trace, SHAPES[k]) for k, trace in traces.items()})
    # along the logarithm, or that of 1 - value
    slope = 1.0 - value if decay else value

    def moved(by: float) -> Any:
        there = bound(rule, {place: value + by * slope})
        return flat(run(still(there, curvature=curvature))[0])

    want = (moved(STEP) - moved(-STEP)) / (2.0 * STEP)
    assert np.max(np.abs(want)) > 1e-4
    assert relative_error(found, want) < FINITE_DIFFERENCES


@pytest.mark.parametrize("discount", [0.0, 0.8])
@every_number
def test_a_discount_weighs_what_lies_back(name: str, place: str, discount: float) -> None:
    """Of each past step's number, by differences of the run from there on; section 3."""
    rule, steps = RULES[name], 8
    value, decay = number(rule, place), place[:4] in ("beta", "mome")
    opt = still(learning(rule, place, meta_lr=0.0), discount=discount)
    _, state = run(opt, steps)
    slope = 1.0 - value if decay else value

    def ended(at: int, by: float) -> Any:
        """Return the weights where the number is another from one step on."""
        params: Any = START
        plain = still(rule)
        kept = plain.init(params)
        for t in range(steps):
            there = value + (by * slope if t >= at else 0.0)
            params, kept = still(bound(rule, {place: there})).step(params, GIVEN[t], kept)
        return flat(params)

    total = np.zeros(SIZE)
    for at in range(steps):
        weight = (1.0 - discount) * discount ** (steps - 1 - at)
        weight += discount**steps if at == 0 else 0.0
        total += weight * (ended(at, STEP) - ended(at, -STEP)) / (2.0 * STEP)
    found = flat(state.learned[place]["trace"])
    error = np.max(np.abs(found - total)) / max(np.max(np.abs(total)), 1e-3)
    assert error < FINITE_DIFFERENCES


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("blocks", ["scalar", "tensor", "node", "weight"])
@pytest.mark.parametrize("name", RULES)
def test_without_a_meta_step_it_is_the_number_bit_for_bit(
    name: str, blocks: str, dtype: str
) -> None:
    rule = RULES[name]
    opt = mo.MetaOptimize(base=rule, step_size=0.05, blocks=blocks)
    other = replace(opt, base=all_learned(rule, meta_lr=0.0))
    assert places(rule) == [*other.learned] or set(places(rule)) == {*other.learned}
    params: Any = {k: v.astype(dtype) for k, v in START.items()}
    state, kept, own = opt.init(params), other.init(params), params
    for t in range(6):
        grads = {k: v.astype(dtype) for k, v in GIVEN[t].items()}
        grads = {k: None if (k, t) == ("b", 2) else grad for k, grad in grads.items()}
        lr = 0.0 if t == 3 else 1.0
        params, state = opt.step(params, grads, state, lr=lr)
        own, kept = other.step(own, grads, kept, lr=lr)
    assert contents(own) == contents(params)
    assert contents(replace(kept, learned=state.learned)) == contents(state)
    for part in kept.learned.values():
        assert np.any(part["meta_grad"]["a"] if blocks == "weight" else part["meta_grad"])


def test_without_any_a_state_is_what_it_was() -> None:
    state = mo.MetaOptimize(base=mo.AdamW()).init(START)
    assert state.learned == {}


@pytest.mark.parametrize("blocks", ["scalar", "tensor", "node", "weight"])
def test_values_are_told_by_name_and_block(blocks: str) -> None:
    base = mo.AdamW(weight_decay=Learned(0.1), betas=(Learned(0.9, blocks="tensor"), 0.999))
    opt = mo.MetaOptimize(base=base, blocks=blocks)
    _, state = run(opt, 3)
    found = opt.hyperparameters(state)
    assert [*found] == ["betas[0]", "weight_decay"]
    assert [*found["weight_decay"]] == [*opt.step_sizes(state)]
    assert [*found["betas[0]"]] == [*SHAPES]
    told = opt.diagnostics(state, START)["learned"]["weight_decay"]
    for key, value in found["weight_decay"].items():
        assert value.shape == opt.step_sizes(state)[key].shape
        assert np.allclose(value, np.exp(told["beta"][key]))
        assert np.all(value != 0.1)
    assert set(told) == {*opt.diagnostics(state, START)} - {"learned", "skipped", "decided"}


def test_equal_ones_in_the_same_place_of_several_rules_are_one_number() -> None:
    rules: dict[str, Any] = {
        "a": mo.SGD(weight_decay=Learned(0.1)),
        "*": mo.AdamW(weight_decay=Learned(0.1)),
    }
    opt = mo.MetaOptimize(base=rules)
    _, state = run(opt, 3)
    assert [*opt.hyperparameters(state)] == ["weight_decay"]
    assert [*state.learned["weight_decay"]["trace"]] == [*SHAPES]
    base: dict[str, Any] = {"b": mo.AdamW(weight_decay=Learned(0.2)), **rules}
    other = replace(opt, base=base)
    _, state = run(other, 3)
    found = other.hyperparameters(state)
    assert [*found] == ["b: weight_decay", "a: weight_decay"]
    assert [*state.learned["b: weight_decay"]["trace"]] == ["b"]
    assert [*state.learned["a: weight_decay"]["trace"]] == ["a", "c"]


@dataclass(frozen=True, slots=True)
class Signed(mo.SGD):
    """Its momentum is learned through its logarithm, as that of no rule of ours."""

    learnable: ClassVar[dict[str, str]] = {"momentum": "exp", "weight_decay": "exp"}


def test_equal_ones_of_different_kinds_are_numbers_of_their_own() -> None:
    rules = {"a": mo.SGD(momentum=Learned(0.5)), "*": Signed(momentum=Learned(0.5))}
    opt = mo.MetaOptimize(base=rules)
    assert [*opt.learned] == ["a: momentum", "*: momentum"]
    maps = [config.sigma_map for config in opt.learned.values()]
    assert maps[0] != maps[1], "the logarithm of 1 - momentum, and of momentum"


def test_a_name_is_what_a_number_is_called_whatever_the_patterns_are() -> None:
    rules = {
        "a": mo.SGD(momentum=Learned(0.9, name="of weights")),
        "*": mo.SGD(momentum=Learned(0.8), weight_decay=Learned(0.1)),
    }
    opt = mo.MetaOptimize(base=rules)
    assert [*opt.learned] == ["of weights", "*: momentum", "weight_decay"]
    # as in a base of the same rules by other patterns
    named = opt.base_with_names
    other = mo.MetaOptimize(base={"c": named["*"], "b": named["*"], "*": named["a"]})
    assert [*other.learned] == ["*: momentum", "weight_decay", "of weights"]
    with pytest.raises(ValueError, match="two numbers called 'eps'"):
        mo.MetaOptimize(base=mo.AdamW(weight_decay=Learned(0.1, name="eps"), eps=Learned(1e-3)))
    with pytest.raises(TypeError, match="`name` of a Learned"):
        Learned(0.1, name=1)  # type: ignore[arg-type]


def test_leaves_of_rules_with_a_number_in_its_place_have_no_part_in_it() -> None:
    base = {"a": mo.SGD(weight_decay=Learned(0.1)), "*": mo.SGD(weight_decay=0.0)}
    opt = mo.MetaOptimize(base=base, blocks="tensor")
    params, state = run(opt, 4)
    assert [*opt.hyperparameters(state)["weight_decay"]] == ["a"]
    plain = replace(opt, base={"a": mo.SGD(weight_decay=0.1), "*": mo.SGD()})
    assert contents(run(plain, 4)[0]["b"]) == contents(params["b"])


def test_with_the_exact_hessian_it_reaches_leaves_of_other_rules() -> None:
    """By differences of whole runs."""

    def opt(decay: Any) -> mo.MetaOptimize:
        base = {"a": mo.SGD(weight_decay=decay), "*": mo.AdamW(eps=1e-2, weight_decay=0.3)}
        return still(base, curvature="exact", blocks="tensor")

    _, state = run(opt(Learned(0.1, meta_lr=0.0)))
    traces = state.learned["weight_decay"]["trace"]
    found = flat({k: trace[0] for k, trace in traces.items()})
    ahead, behind = (flat(run(opt(0.1 * (1.0 + by)))[0]) for by in (STEP, -STEP))
    assert np.all(found != 0.0)
    assert relative_error(found, (ahead - behind) / (2.0 * STEP)) < FINITE_DIFFERENCES


@pytest.mark.parametrize(("target", "more"), [(0.0, True), (5.0, False)])
def test_a_weight_decay_grows_where_the_weights_are_to_shrink(target: float, more: bool) -> None:
    """And stays within its bounds, the first of which it meets restarts its trace."""
    decay = Learned(0.1, bounds=(0.09, 0.11), meta_lr=0.02)
    opt = mo.MetaOptimize(base=mo.SGD(weight_decay=decay), step_size=0.01, meta_lr=0.0)
    params: Any = {"w": np.ones(3)}
    state = opt.init(params)
    for _ in range(20):
        params, state = opt.step(params, {"w": params["w"] - target}, state)
    assert np.isclose(opt.hyperparameters(state)["weight_decay"]["all"], 0.11 if more else 0.09)
    told = opt.diagnostics(state, params)["learned"]["weight_decay"]
    assert int(told["restarts"]["all"]) == 1
    assert bool(told["pinned"]["all"])


@pytest.mark.parametrize("curvature", ["none", "exact"])
@pytest.mark.parametrize("blocks", ["scalar", "node", "weight"])
def test_saved_and_loaded_a_run_goes_on_bit_for_bit(
    tmp_path: Any, blocks: str, curvature: str
) -> None:
    base = {"b": mo.SGD(momentum=Learned(0.8)), "*": all_learned(RULES["AdamW"])}
    opt = mo.MetaOptimize(base=base, blocks=blocks, step_size=0.02, curvature=curvature)
    params, state = run(opt, 4)
    mo.save(tmp_path / "state", opt, state)
    found, loaded = mo.load(tmp_path / "state", params)
    assert found == opt
    grads = gradient(params, 4, curved=curvature != "none")
    want = opt.step(params, grads, state, hvp=hvp)
    assert contents(found.step(params, grads, loaded, hvp=hvp)) == contents(want)


def test_a_projection_is_what_traces_go_through() -> None:
    """A weight held at a bound says nothing of the number any more."""
    opt = still(mo.SGD(weight_decay=Learned(0.1)))
    params, state = run(opt, 5)
    clip = projection.elementwise(lambda w: {"a": maximum(w["a"], 0.0)})
    new, after = opt.project(params, state, clip)
    before, trace = (s.learned["weight_decay"]["trace"] for s in (state, after))
    assert np.array_equal(trace["a"], np.where(params["a"] >= 0.0, before["a"], 0.0))
    assert np.array_equal(trace["b"], before["b"])
    assert np.all(new["a"] >= 0.0)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_meta_gradient_that_is_not_finite_restarts_the_trace_and_no_other() -> None:
    opt = still(mo.SGD(momentum=Learned(0.9), weight_decay=Learned(0.1, blocks="tensor")))
    params, state = run(opt, 5)
    grads = {**GIVEN[5], "b": np.full(3, np.inf)}
    _, state = opt.step(params, grads, state)
    restarts = opt.diagnostics(state, params)["learned"]
    assert {k: int(v) for k, v in restarts["weight_decay"]["restarts"].items()} == {
        "a": 0,
        "b": 1,
        "c": 0,
    }
    assert int(restarts["momentum"]["restarts"]["all"]) == 1
    skipping = replace(opt, skip_nonfinite=True)
    params, state = run(skipping, 5)
    after = skipping.step(params, grads, state)
    assert contents(after[0]) == contents(params)
    assert contents(after[1].learned) == contents(state.learned)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_where_weights_go_back_traces_start_anew() -> None:
    opt = mo.MetaOptimize(base=mo.SGD(momentum=Learned(0.9)), recover=True, step_size=0.05)
    params, state = run(opt, 5)
    _, state = opt.step(params, {**GIVEN[5], "b": np.full(3, np.inf)}, state)
    part = state.learned["momentum"]
    for traces in (part["trace"], *part["slot_traces"].values()):
        assert all(np.array_equal(trace, np.zeros_like(trace)) for trace in traces.values())


@dataclass(frozen=True)
class Signum:
    """A rule of one's own, which lets its momentum be learned."""

    momentum: Any = 0.9
    weight_decay: Any = 0.0
    learnable: ClassVar[dict[str, str]] = {"momentum": "decay"}
    scope: ClassVar[str] = "weight"
    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
        exp_avg = self.momentum * slots["exp_avg"] + (1.0 - self.momentum) * grad
        return exp_avg, {"exp_avg": exp_avg}


def test_a_rule_of_ones_own_may_have_some() -> None:
    _, state = run(still(Signum(momentum=Learned(0.8, meta_lr=0.0))))
    _, want = run(still(mo.SGD(momentum=Learned(0.8, meta_lr=0.0))))
    found, want = (s.learned["momentum"]["trace"] for s in (state, want))
    assert relative_error(flat(found), flat(want)) < rounding("float64", 10)


@dataclass(frozen=True)
class Whole:
    """A rule that sees whole leaves, of which the weight decay alone can be learned."""

    weight_decay: Any = 0.0
    size: Any = 1.0
    rule: str = "a field of this name is no rule within"
    learnable: ClassVar[dict[str, str]] = {"weight_decay": "exp", "size": "exp"}
    slots: ClassVar[tuple[str, ...]] = ()

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
        return self.size * grad / np.sqrt(np.sum(grad * grad)), {}


def test_of_a_rule_that_sees_whole_leaves_weight_decay_is() -> None:
    """By differences of whole runs: no gradient depends on the weights."""
    _, state = run(still(Whole(weight_decay=Learned(0.1, meta_lr=0.0))))
    found = flat(state.learned["weight_decay"]["trace"])
    ahead, behind = (flat(run(still(Whole(0.1 * (1.0 + by))))[0]) for by in (STEP, -STEP))
    assert relative_error(found, (ahead - behind) / (2.0 * STEP)) < FINITE_DIFFERENCES
    with pytest.raises(ValueError, match='the scope "weight"'):
        still(Whole(size=Learned(1.0)))


@dataclass(frozen=True)
class Branching:
    """A rule of which no derivative can be taken."""

    momentum: Any = 0.9
    weight_decay: float = 0.0
    learnable: ClassVar[dict[str, str]] = {"momentum": "decay"}
    scope: ClassVar[str] = "weight"
    slots: ClassVar[tuple[str, ...]] = ()

    def direction(self, grad: Any, slots: Any, count: Any) -> Any:  # noqa: ARG002
        return grad * np.float64(self.momentum), {}


def test_a_rule_that_jets_cannot_pass_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no derivative can be taken"):
        still(Branching(momentum=Learned(0.9)))


def test_leaves_of_several_dtypes_share_a_number() -> None:
    params: Any = {"a": START["a"].astype("float32"), "b": START["b"]}
    opt = mo.MetaOptimize(base=all_learned(RULES["AdamW"]), step_size=0.05)
    state = opt.init(params)
    for t in range(4):
        grads = {name: GIVEN[t][name].astype(param.dtype) for name, param in params.items()}
        params, state = opt.step(params, grads, state)
    part = state.learned["betas[0]"]
    assert part["beta"].dtype == np.float64
    assert [trace.dtype for trace in part["trace"].values()] == [np.float32, np.float64]
    assert [param.dtype for param in params.values()] == [np.float32, np.float64]


def test_in_a_rule_around_another_it_is_that_of_the_rule_within() -> None:
    rule = mo.SGD(momentum=Learned(0.8), weight_decay=Learned(0.1))
    opt, around = (mo.MetaOptimize(base=base) for base in (rule, mo.Averaged(rule)))
    (params, state), (own, after) = run(opt), run(around)
    assert contents(own) == contents(params)
    assert contents(after.learned) == contents(state.learned)
    assert around.hyperparameters(after) == opt.hyperparameters(state)


def test_at_start_a_rule_is_the_plain_one() -> None:
    for rule in RULES.values():
        assert at_start(all_learned(rule)) == rule
        assert at_start(rule) is rule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Learned("0.1"), "`start` of a Learned must be a number"),  # type: ignore[arg-type]
        (lambda: Learned(float("inf")), "`start` of a Learned must be finite"),
        (lambda: mo.SGD(momentum=Learned(0.0)), "`momentum` must start between 0 and 1"),
        (lambda: mo.SGD(momentum=Learned(1.0)), "`momentum` must start between 0 and 1"),
        (lambda: mo.SGD(weight_decay=Learned(0.0)), "`weight_decay` must start between 0 and inf"),
        (lambda: mo.AdamW(eps=Learned(-1.0)), "`eps` must start between 0 and inf"),
        (lambda: still(mo.Lion(betas=(Learned(0.9), 0.99))), "no derivative passes"),
        (lambda: still(mo.Lion(betas=(0.9, Learned(0.99)))), "no derivative passes"),
        (lambda: still(Signum(weight_decay=Learned(0.1))), "by its `learnable`, may be momentum"),
        (
            lambda: still(mo.SGD(decay_step_size=Learned(0.1))),  # type: ignore[arg-type]
            "`decay_step_size` of `base` cannot be learned",
        ),
        (
            lambda: still(mo.SGD(), meta=mo.AdamW(betas=(Learned(0.9), 0.999))),
            "`meta` must have numbers",
        ),
        (
            lambda: still(mo.SGD(), meta=mo.FastStart(mo.AdamW(betas=(Learned(0.9), 0.999)))),
            "`rule` must have numbers",
        ),
        (
            lambda: still(mo.SGD(weight_decay=Learned(0.1)), curvature=mo.curvature.Diagonal(True)),
            "none that is learned, with `curvature` Diagonal",
        ),
        (
            lambda: still(
                mo.SGD(weight_decay=Learned(0.1)), curvature="exact", approximation="full"
            ),
            'none that is learned, with `approximation` "full"',
        ),
        (
            lambda: still(mo.SGD(weight_decay=Learned(0.1, bounds=(0.2, 0.3)))),
            "`start` must lie within `bounds`",
        ),
        (lambda: still(mo.SGD(weight_decay=Learned(0.1, map="log"))), "`map` must be one of"),
        (lambda: still(mo.SGD(weight_decay=Learned(0.1, meta_lr=-1.0))), "`meta_lr` must be"),
        (lambda: still(mo.SGD(weight_decay=Learned(0.1, blocks="row"))), "`blocks` must be"),
        (lambda: still(mo.SGD(momentum=Learned(0.9999999999))), "must lie within `bounds`"),
        (
            lambda: still(mo.Opaque(weight_decay=Learned(0.1))),  # type: ignore[arg-type]
            "cannot be learned",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        make()


@pytest.mark.parametrize("blocks", ["scalar", "weight"])
def test_devices_agree_on_a_number_that_they_share(blocks: str) -> None:
    """Whatever partition the step sizes have, and though one of them has no gradient at first."""
    barrier = threading.Barrier(2, timeout=20)
    parts: list[Any] = [None, None]
    grads = np.random.default_rng(0).normal(size=(6, 2, 3))

    def trained(index: int) -> Any:
        def summed(arrays: list[Any]) -> list[Any]:
            parts[index] = arrays
            barrier.wait()
            sums = [one + other for one, other in zip(*parts, strict=True)]
            barrier.wait()
            return sums

        decay = mo.Learned(0.1, blocks="scalar", meta_lr=0.1)
        opt = mo.MetaOptimize(base=mo.SGD(weight_decay=decay), blocks=blocks, discount=1.0)
        params = {"a": np.full(3, index + 1.0)}
        state = opt.init(params)
        for t, grad in enumerate(grads):
            given = {"a": None if (t, index) == (0, 1) else grad[index]}
            params, state = opt.step(params, given, state, reduce=summed)
        return state.learned["weight_decay"]

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(trained, range(2))
    assert one["meta_count"] == other["meta_count"]
    np.testing.assert_array_equal(one["beta"], other["beta"])
