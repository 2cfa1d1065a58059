"""Special cases in the form their authors gave them; docs/mathematics.md section 12."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np

import metaopt as mo
from metaopt_conformance.cases import Case
from metaopt_conformance.runs import Under
from metaopt_conformance.verdicts import Skip

__all__ = ["FORMS", "Form"]

#: From the library under test and a case to the weights and step sizes of every step, the
#: library's and the literature's.
Form = Callable[[Under, Case], Iterator[tuple[Any, Any]]]


def idbd(under: Under, case: Case) -> Iterator[tuple[Any, Any]]:
    """Sutton (1992): per-weight step sizes for a linear predictor, with the rectifier at work."""
    rng, n = np.random.default_rng(0), case.subject.size
    opt = mo.presets.idbd(step_size=0.02, meta_lr=0.005)
    w, h, beta = np.zeros(n), np.zeros(n), np.full(n, np.log(0.02))
    target, rectified = rng.normal(size=n), 0
    params = under.arrays(w, case)
    state = opt.init(params)
    for _ in range(case.steps):
        target = target + 0.02 * rng.normal(size=n)
        a = rng.normal(size=n) * np.where(rng.random(n) < 0.01, 6.0, 1.0)
        g = (a @ w - a @ target) * a
        params, state = under.backend.settle(
            opt.step(
                params,
                under.arrays((a @ under.vector(params, case) - a @ target) * a, case),
                state,
                hessian_diagonal=under.arrays(a * a, case),
            )
        )
        beta = beta - 0.005 * h * g
        alpha = np.exp(beta)
        w = w - alpha * g
        rectified += int(np.sum(1.0 - alpha * a * a < 0.0))
        h = np.maximum(0.0, 1.0 - alpha * a * a) * h - alpha * g
        yield _found(under, case, opt, params, state), (w, alpha)
    if not rectified:
        msg = "the rectifier was never at work: nothing is shown"
        raise Skip(msg)


def idbd_nonlinear(under: Under, case: Case) -> Iterator[tuple[Any, Any]]:
    """Xu, van Hasselt and Silver (2018): the same with the Hessian of a nonlinear loss."""
    problem, n = case.subject, case.subject.size
    opt = mo.presets.idbd_nonlinear(step_size=0.1, meta_lr=0.05)
    w, H, beta = problem.start(), np.zeros((n, n)), np.full(n, np.log(0.1))
    for t, found in enumerate(_run(under, case, opt)):
        g, hessian = problem.grad(t, w), problem.hessian(t, w)
        beta = beta - 0.05 * H.T @ g
        alpha = np.exp(beta)
        H = (np.eye(n) - alpha[:, None] * hessian) @ H - np.diag(alpha * g)
        w = w - alpha * g
        yield found, (w, alpha)


def hypergradient(under: Under, case: Case) -> Iterator[tuple[Any, Any]]:
    """Baydin et al. (2017), additive and multiplicative, for SGD and Adam."""
    problem, multiplicative = case.subject, case.sigma == "exp"
    base: Any = mo.SGD() if case.base == "SGD" else mo.AdamW(betas=(0.9, 0.99), eps=1e-3)
    eta = 0.02 if multiplicative else 1e-4
    opt = mo.presets.hypergradient(base, multiplicative=multiplicative, step_size=0.01, meta_lr=eta)
    w, last = problem.start(), np.zeros(problem.size)
    alpha: Any = 0.01
    m, v = np.zeros(problem.size), np.zeros(problem.size)
    for t, found in enumerate(_run(under, case, opt)):
        g = problem.grad(t, w)
        if multiplicative:
            alpha = alpha * np.exp(eta * alpha * (g @ last))
        else:
            alpha = alpha + eta * g @ last
        last = g
        if case.base != "SGD":
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            correction, root = 1.0 - 0.9 ** (t + 1), np.sqrt(v / (1.0 - 0.99 ** (t + 1)))
            last = m / correction / (root + 1e-3)
        w = w - alpha * last
        yield found, (w, np.full(1, alpha))


def algorithm2(under: Under, case: Case) -> Iterator[tuple[Any, Any]]:
    """Algorithm 2 of the MetaOptimize paper, as corrected: one step size, exact Hessian."""
    problem, gamma, eta = case.subject, 0.95, 0.05
    opt = mo.presets.algorithm2(
        approximation=case.approximation, step_size=0.1, meta_lr=eta, discount=gamma
    )
    w, h = problem.start(), np.zeros(problem.size)
    y: Any = 1.0
    beta: Any = np.log(0.1)
    for t, found in enumerate(_run(under, case, opt)):
        g, hessian, alpha = problem.grad(t, w), problem.hessian(t, w), np.exp(beta)
        beta = beta - eta * h @ g
        carried = gamma * y + (1.0 - gamma) if case.approximation == "2x2" else 1.0
        if case.approximation == "2x2":
            y = carried - eta * h @ hessian @ (gamma * h)
        h = gamma * (h - alpha * hessian @ h) - alpha * carried * g
        w = w - alpha * g
        yield found, (w, np.full(1, np.exp(beta)))


def _run(under: Under, case: Case, opt: mo.MetaOptimize) -> Iterator[Any]:
    """Yield weights and step sizes after each step on the case's problem."""
    for params, state in islice(under.steps(case, opt), 1, None):
        yield _found(under, case, opt, params, state)


def _found(under: Under, case: Case, opt: mo.MetaOptimize, params: Any, state: Any) -> Any:
    sizes = [under.backend.to_numpy(size).reshape(-1) for size in opt.step_sizes(state).values()]
    return under.vector(params, case), np.concatenate(sizes)


FORMS: dict[str, tuple[Form, list[Case]]] = {
    "IDBD": (idbd, [Case(name="IDBD", steps=300)]),
    "nonlinear IDBD": (
        idbd_nonlinear,
        [Case(name="nonlinear IDBD", problem="logistic", steps=40)],
    ),
    "hypergradient": (
        hypergradient,
        [
            Case(name="hypergradient", base=base, sigma=sigma, steps=40)
            for base in ("SGD", "AdamW")
            for sigma in ("exp", "identity")
        ],
    ),
    "Algorithm 2": (
        algorithm2,
        [Case(name="Algorithm 2", approximation=kind, steps=40) for kind in ("l", "2x2")],
    ),
}
