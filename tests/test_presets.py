"""Special cases against their literature forms, written out; sections 12 and 14."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from metaopt_conformance.tolerances import LITERATURE, relative_error
from metaopt_conformance.translate import traces

import metaopt as mo
from metaopt import presets


class Meta:
    """The meta updates of section 6, written out: beta moves by -eta times what `take` returns."""

    def __init__(self, name: str) -> None:
        self.name, self.m, self.v, self.t = name, 0.0, 0.0, 0

    def take(self, z: Any) -> Any:
        self.t += 1
        if self.name == "sgd":
            return z
        if self.name == "lion":
            direction = np.sign(0.9 * self.m + 0.1 * z)
            self.m = 0.99 * self.m + 0.01 * z
            return direction
        self.v = 0.999 * self.v + 0.001 * z * z
        root = np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8
        if self.name == "rmsprop":
            return z / root
        self.m = 0.9 * self.m + 0.1 * z
        return self.m / (1 - 0.9**self.t) / root


class Base:
    """The base directions of section 5, written out."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.t = name, 0
        self.m, self.v = np.zeros(size), np.zeros(size)

    def take(self, g: Any) -> Any:
        self.t += 1
        if self.name == "sgd":
            return g
        if self.name == "sgdm":
            self.m = 0.9 * self.m + 0.1 * g
            return self.m
        if self.name == "lion":
            direction = np.sign(0.9 * self.m + 0.1 * g)
            self.m = 0.99 * self.m + 0.01 * g
            return direction
        self.v = 0.999 * self.v + 0.001 * g**2
        root = np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8
        if self.name == "rmsprop":
            return g / root
        self.m = 0.9 * self.m + 0.1 * g
        return self.m / (1 - 0.9**self.t) / root


BASES: dict[str, Any] = {
    "sgd": mo.SGD(),
    "sgdm": mo.SGD(momentum=0.9),
    "adamw": mo.AdamW(betas=(0.9, 0.999), eps=1e-8),
    "lion": mo.Lion(betas=(0.9, 0.99)),
    "rmsprop": mo.RMSprop(beta2=0.999, eps=1e-8),
}
METAS: dict[str, Any] = {
    "sgd": mo.SGD(),
    "adam": mo.AdamW(betas=(0.9, 0.999), eps=1e-8),
    "lion": mo.Lion(betas=(0.9, 0.99)),
    "rmsprop": mo.RMSprop(beta2=0.999, eps=1e-8),
}


def assert_run(got: list[Any], want: list[Any]) -> None:
    """Compare rows of weights, step sizes and traces, step by step."""
    assert len(got) == len(want)
    for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert np.all(np.isfinite(other))
            assert relative_error(mine, other) < LITERATURE, (step, index)


# --- IDBD ---------------------------------------------------------------------------------------


def drifting_regression(steps: int) -> Any:
    """Yield 20 inputs and a target: five weights matter, and one of them flips at times."""
    rng = np.random.default_rng(1992)
    target = np.zeros(20)
    target[:5] = np.sign(rng.normal(size=5))
    for step in range(steps):
        if step % 20 == 0:
            target[rng.integers(5)] *= -1
        yield (a := rng.normal(size=20)), float(a @ target)


def idbd_written_out(
    examples: list[Any], step_size: float, eta: float, *, rectified: bool = True
) -> tuple[list[Any], int]:
    """Sutton (1992), figure 2, in the notation of section 12; and how often the max acted."""
    w, h, beta = np.zeros(20), np.zeros(20), np.full(20, math.log(step_size))
    rows, active = [], 0
    for a, b in examples:
        g = -(b - a @ w) * a
        beta = beta - eta * h * g
        alpha = np.exp(beta)
        w = w - alpha * g
        factor = 1 - alpha * a**2
        active += int(np.sum(factor < 0))
        h = (np.maximum(0.0, factor) if rectified else factor) * h - alpha * g
        rows.append((w, alpha, h))
    return rows, active


def test_idbd() -> None:
    """2000 steps on a drifting regression, the rectifier at work now and then."""
    examples = list(drifting_regression(2000))
    want, active = idbd_written_out(examples, 0.05, 0.01)
    assert active > 0
    opt = presets.idbd(step_size=0.05, meta_lr=0.01)
    params, got = {"w": np.zeros(20)}, []
    state = opt.init(params)
    for a, b in examples:
        gradient = {"w": -(b - a @ params["w"]) * a}
        params, state = opt.step(params, gradient, state, hessian_diagonal={"w": a**2})
        got.append((params["w"], opt.step_sizes(state)["w"], state.trace["w"]))
    assert_run(got, want)
    # IDBD at work: relevant inputs have learned larger step sizes than the others
    assert np.min(want[-1][1][:5]) > np.max(want[-1][1][5:])
    # and the rectifier matters beyond what the comparison allows
    without, _ = idbd_written_out(examples, 0.05, 0.01, rectified=False)
    assert relative_error(without[-1][0], want[-1][0]) > 1e-4


def test_the_rectifier_survives_a_step_size_of_zero() -> None:
    """Section 12: a minimum, never a cap that divides by the step size; at rest h' = h."""
    opt = presets.idbd(step_size=0.05, meta_lr=0.01)
    params = {"w": np.ones(3)}
    _, state = opt.step(params, params, opt.init(params), hessian_diagonal=params)
    new, after = opt.step(params, params, state, lr=0.0, hessian_diagonal={"w": 1e6 * np.ones(3)})
    np.testing.assert_array_equal(new["w"], params["w"])
    np.testing.assert_array_equal(after.trace["w"], state.trace["w"])


@pytest.mark.parametrize("kappa", [0.0, 0.3])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_rectifier_with_weight_decay_and_discount(kappa: float, gamma: float) -> None:
    """The factor on the hatted h is max(0, 1 - kappa alpha - alpha d)."""
    opt = mo.MetaOptimize(
        base=mo.SGD(weight_decay=kappa),
        meta=mo.SGD(),
        step_size=0.3,
        meta_lr=0.01,
        discount=gamma,
        blocks="weight",
        curvature=mo.curvature.Diagonal(rectified=True),
    )
    rng, w, h = np.random.default_rng(3), np.ones(6), np.zeros(6)
    beta = np.full(6, math.log(0.3))
    params, got, want, active = {"w": w}, [], [], 0
    state = opt.init(params)
    for _ in range(40):
        a = rng.normal(size=6)
        g, d = (a @ w - 1.0) * a, a**2
        params, state = opt.step(
            params, {"w": (a @ params["w"] - 1.0) * a}, state, hessian_diagonal={"w": d}
        )
        alpha, z = np.exp(beta), h * g
        factor = 1 - kappa * alpha - alpha * d
        active += int(np.sum(factor < 0))
        p = g + kappa * w
        h = np.maximum(0.0, factor) * gamma * h - alpha * p
        w = w - alpha * p
        beta = beta - 0.01 * z
        want.append((w, np.exp(beta), h))
        got.append((params["w"], opt.step_sizes(state)["w"], state.trace["w"]))
    assert active > 0
    assert_run(got, want)


def logistic_regression() -> Any:
    """Return gradient and Hessian of a small logistic regression at a step and at weights."""
    rng = np.random.default_rng(2018)
    inputs = rng.normal(size=(60, 8, 5))
    labels = (inputs @ np.array([2.0, -1.0, 0.0, 0.5, 0.0]) > 0).astype(float)

    def at(step: int, w: Any) -> tuple[Any, Any]:
        a, b = inputs[step], labels[step]
        p = 1 / (1 + np.exp(-(a @ w)))
        return a.T @ (p - b) / len(b), (a.T * (p * (1 - p))) @ a / len(b)

    return at


def products_with(hessian: Any) -> Any:
    return lambda tangents: {"w": tangents["w"] @ hessian}


def test_nonlinear_idbd() -> None:
    """Xu, van Hasselt and Silver (2018): H' = (I - [alpha] Hessian) H - [alpha g]."""
    at, eta, steps = logistic_regression(), 0.05, 60
    w, trace, beta, want = np.zeros(5), np.zeros((5, 5)), np.full(5, math.log(0.3)), []
    for step in range(steps):
        g, hessian = at(step, w)
        beta = beta - eta * trace.T @ g
        alpha = np.exp(beta)
        w = w - alpha * g
        trace = (np.eye(5) - np.diag(alpha) @ hessian) @ trace - np.diag(alpha * g)
        want.append((w, alpha, trace))
    opt = presets.idbd_nonlinear(step_size=0.3, meta_lr=eta)
    params, got = {"w": np.zeros(5)}, []
    state = opt.init(params)
    for step in range(steps):
        g, hessian = at(step, params["w"])
        params, state = opt.step(params, {"w": g}, state, hvp=products_with(hessian))
        got.append((params["w"], opt.step_sizes(state)["w"], state.trace["w"].T))
    assert_run(got, want)
    assert np.max(np.abs(np.log(want[-1][1] / 0.3))) > 0.02  # the step sizes did move


# --- hypergradient descent ----------------------------------------------------------------------


def quadratic() -> Any:
    rng = np.random.default_rng(2017)
    square = rng.normal(size=(6, 6))
    matrix = square @ square.T / 6 + 0.2 * np.eye(6)

    def gradient(step: int, w: Any) -> Any:
        return matrix @ w + 0.3 * np.random.default_rng(step).normal(size=6)

    return gradient, matrix


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("multiplicative", [False, True], ids=["additive", "multiplicative"])
def test_hypergradient_descent(base: str, multiplicative: bool) -> None:
    """Baydin et al. (2017), algorithms 4 and 5: the new step size is the one used with g."""
    gradient, _ = quadratic()
    alpha, eta = 0.02, 1e-3 if not multiplicative else 0.05
    w, previous, rule, want = np.ones(6), np.zeros(6), Base(base, 6), []
    for step in range(100):
        g = gradient(step, w)
        if multiplicative:
            alpha = alpha * math.exp(eta * alpha * (previous @ g))
        else:
            alpha = alpha + eta * (previous @ g)
        u = rule.take(g)
        w = w - alpha * u
        previous = u
        want.append((w, np.asarray(alpha)))
    opt = presets.hypergradient(
        BASES[base], multiplicative=multiplicative, step_size=0.02, meta_lr=eta
    )
    params, got = {"w": np.ones(6)}, []
    state = opt.init(params)
    for step in range(100):
        params, state = opt.step(params, {"w": gradient(step, params["w"])}, state)
        got.append((params["w"], opt.step_sizes(state)["all"]))
    assert_run(got, want)
    assert abs(alpha / 0.02 - 1) > 1e-3


def test_hypergradient_descent_per_tensor_and_by_default() -> None:
    """With a step size for each leaf, each is the scalar form on its own."""
    opt = presets.hypergradient(mo.SGD(), step_size=0.05, meta_lr=0.01, blocks="tensor")
    alone = presets.hypergradient(mo.SGD(), step_size=0.05, meta_lr=0.01)
    params = {"a": np.array([1.0, -2.0]), "b": np.array([3.0])}
    ones = {name: {name: value} for name, value in params.items()}
    state = opt.init(params)
    states = {name: alone.init(one) for name, one in ones.items()}
    for _ in range(10):
        params, state = opt.step(params, params, state)
        for name in params:
            ones[name], states[name] = alone.step(ones[name], ones[name], states[name])
            assert relative_error(params[name], ones[name][name]) < LITERATURE
    plain = presets.hypergradient(mo.SGD())
    assert (plain.step_size, plain.meta_lr, plain.discount) == (1e-3, 1e-6, 0.0)
    assert (plain.sigma, plain.blocks, plain.meta_first) == ("identity", "scalar", True)


# --- algorithms 2 and 3 -------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.95, 0.0])
@pytest.mark.parametrize("approximation", ["l", "2x2"])
def test_algorithm_2(approximation: str, gamma: float) -> None:
    gradient, hessian = quadratic()
    w, h, y, beta, eta, want = np.ones(6), np.zeros(6), 1.0, math.log(0.02), 0.01, []
    for step in range(60):
        alpha, g = math.exp(beta), gradient(step, w)
        z = h @ g
        y_hat = gamma * y + 1 - gamma
        v = hessian @ h
        w = w - alpha * g
        y_new = y_hat - gamma * eta * (h @ v) if approximation == "2x2" else 1.0
        h = gamma * (h - alpha * v) - alpha * y_hat * g
        y = y_new
        beta = beta - eta * z
        want.append((w, np.asarray(math.exp(beta)), h, np.asarray(y)))
    opt = presets.algorithm2(
        approximation=approximation, step_size=0.02, meta_lr=eta, discount=gamma
    )
    params, got = {"w": np.ones(6)}, []
    state = opt.init(params)
    for step in range(60):
        params, state = opt.step(
            params, {"w": gradient(step, params["w"])}, state, hvp=products_with(hessian)
        )
        trace = traces(params, state)["w"].reshape(6)
        rows = state.beta_trace.get("beta", np.ones((1, 1))).reshape(())
        if gamma == 0.0:  # Y is 1 then, and is not kept
            assert not state.beta_trace
        got.append((params["w"], opt.step_sizes(state)["all"], trace, rows))
    assert_run(got, want)
    if approximation == "2x2" and gamma > 0:
        assert abs(y - 1) > 1e-3
    assert abs(beta - math.log(0.02)) > 1e-3


@pytest.mark.parametrize("meta", METAS)
@pytest.mark.parametrize("base", ["sgdm", "adamw", "lion", "rmsprop", "sgd"])
def test_algorithm_3(base: str, meta: str) -> None:
    """Hessian-free, for every pair of the paper and those between; scalar and per block."""
    gradient, _ = quadratic()
    kappa, eta = 0.1, 1e-2
    for gamma in (1.0, 0.99):
        for sizes in ((6,), (2, 3, 1)):
            ends = np.cumsum(sizes)
            where = {
                f"w{i}": slice(e - n, e) for i, (n, e) in enumerate(zip(sizes, ends, strict=True))
            }
            block = np.repeat(np.arange(len(sizes)), sizes)

            w, h, beta, want = np.ones(6), np.zeros(6), np.full(len(sizes), math.log(1e-2)), []
            rule, meta_rule = Base(base, 6), Meta(meta)
            for step in range(80):
                g = gradient(step, w)
                alpha = np.exp(beta)[block]
                z = np.bincount(block, h * g)
                u = rule.take(g)
                w, h = (
                    w - alpha * (u + kappa * w),
                    gamma * (1 - kappa * alpha) * h - alpha * (u + kappa * w),
                )
                beta = beta - eta * meta_rule.take(z)
                want.append((w, np.exp(beta), h))

            opt = mo.MetaOptimize(
                base=replace(BASES[base], weight_decay=kappa),
                meta=METAS[meta],
                step_size=1e-2,
                meta_lr=eta,
                discount=gamma,
                blocks="tensor",
            )
            params: Any = {name: np.ones(6)[index] for name, index in where.items()}
            state, got = opt.init(params), []
            for step in range(80):
                whole = gradient(step, np.concatenate(list(params.values())))
                grads = {name: whole[index] for name, index in where.items()}
                params, state = opt.step(params, grads, state)
                got.append(
                    (
                        np.concatenate(list(params.values())),
                        np.stack(list(opt.step_sizes(state).values())),
                        np.concatenate(list(traces(params, state).values())),
                    )
                )
            assert_run(got, want)
            assert np.max(np.abs(beta - math.log(1e-2))) > 1e-3


# --- the paper's settings -----------------------------------------------------------------------

PAPER_BASES: dict[str, Any] = {
    "adamw": mo.AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
    "lion": mo.Lion(betas=(0.9, 0.99), weight_decay=0.1),
    "rmsprop": mo.RMSprop(beta2=0.999, eps=1e-8, weight_decay=0.1),
    "sgdm": mo.SGD(momentum=0.9, weight_decay=0.1),
}
PAPER_METAS: dict[str, Any] = {
    "adam": mo.AdamW(betas=(0.9, 0.999), eps=0.0),
    "lion": mo.Lion(betas=(0.9, 0.99)),
}
PAPER = [
    ("cifar10", "adamw", "adam"),
    ("cifar10", "lion", "lion"),
    ("cifar10", "rmsprop", "adam"),
    ("cifar10", "sgdm", "adam"),
    ("continual-cifar100", "adamw", "adam"),
    ("imagenet", "adamw", "lion"),
    ("imagenet", "lion", "lion"),
    ("imagenet", "sgdm", "lion"),
    ("tinystories", "adamw", "lion"),
    ("tinystories", "adamw", "adam"),
    ("tinystories", "lion", "lion"),
]


@pytest.mark.parametrize(("experiment", "base", "meta"), PAPER)
def test_settings_of_the_paper(experiment: str, base: str, meta: str) -> None:
    opt = presets.paper(base, meta, experiment)
    assert opt.base == PAPER_BASES[base]
    assert opt.meta == PAPER_METAS[meta]
    continual = experiment == "continual-cifar100"
    assert opt.step_size == (1e-4 if continual else 1e-6)
    assert opt.discount == (0.999 if continual else 1.0)
    assert opt.meta_lr == 1e-3
    assert opt == mo.MetaOptimize(
        base=PAPER_BASES[base],
        meta=PAPER_METAS[meta],
        step_size=opt.step_size,
        meta_lr=1e-3,
        discount=opt.discount,
    )
    grouped = presets.paper(base, meta, experiment, blocks={"head": "fc.*", "rest": "*"})
    params = {"fc.w": np.ones((2, 2)), "conv": np.ones(3)}
    assert list(grouped.step_sizes(grouped.init(params))) == ["head", "rest"]


def test_pairs_that_the_paper_does_not_report_are_refused() -> None:
    reported = set(PAPER)
    for experiment in ("cifar10", "continual-cifar100", "imagenet", "tinystories"):
        for base in PAPER_BASES:
            for meta in ("adam", "lion"):
                if (experiment, base, meta) in reported:
                    continue
                with pytest.raises(ValueError, match=f"of '{experiment}' must be one of .*got"):
                    presets.paper(base, meta, experiment)
    with pytest.raises(ValueError, match=r"`experiment` must be one of 'cifar10'.*got 'mnist'"):
        presets.paper("adamw", "adam", "mnist")
    with pytest.raises(ValueError, match=r"got \('sgd', 'adam'\)"):
        presets.paper("sgd", "adam", "cifar10")


def test_every_preset_says_what_it_needs() -> None:
    params = {"w": np.ones(3)}
    for opt, needed in (
        (presets.idbd(0.1, 0.1), "`hessian_diagonal` is needed"),
        (presets.idbd_nonlinear(0.1, 0.1), "`hvp` is needed"),
        (presets.algorithm2(), "`hvp` is needed"),
    ):
        with pytest.raises(ValueError, match=needed):
            opt.step(params, params, opt.init(params))
