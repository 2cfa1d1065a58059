r"""The traces by central differences of whole trajectories.

docs/mathematics.md section 4. A run is recorded; then every past beta is moved a little, the run
repeated from there with what the approximation holds fixed at its recorded values, and the
changes of the last state are combined with the weights of section 3, those of each discount. No
derivative takes part, but for "full": there the trace H is itself a part of what is run again, and
its recursion has the first partial derivatives in it (the differences then give the second).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from metaopt_conformance.oracle import Config, Matrix, State, counted_against, retreated, speed
from metaopt_conformance.problems import Problem
from metaopt_conformance.tolerances import STEP
from metaopt_conformance.updates import Vector, direction, partials

__all__ = ["ROWS", "rerun", "traces"]

#: The parts of a state that depend on past meta-parameters, and the names of their traces.
ROWS = {"w": "H", "m": "M", "v": "V", "beta": "B", "meta_m": "Bm", "meta_v": "Bv"}


def traces(config: Config, problem: Problem, run: Sequence[State]) -> dict[str, Matrix]:
    """Return X and Y after a run by their rows' names, "H", "M", "V", "B", "Bm", "Bv", and Z.

    Of several discounts X, with a leading axis of them: nothing depends on Y.

    Parameters
    ----------
    config : Config
        Without bounds; with "full" without `meta_first`.
    problem : Problem
    run : sequence of State
        The states before each step and after the last.
    """
    end, gamma = len(run) - 1, np.asarray(config.discount)
    rows = ROWS | ({"H": "Z"} if config.follows_third else {})
    if config.horizons:
        rows = {row: rows[row] for row in ("w", "m", "v")}
    total = {trace: np.zeros_like(getattr(run[0], trace)) for trace in rows.values()}
    for tau in range(end):
        weight = (1.0 - gamma) * gamma ** (end - 1 - tau) + (gamma**end if tau == 0 else 0.0)
        if np.all(weight == 0.0):
            continue
        for j in range(config.blocks):
            nudge = np.where(np.arange(config.blocks) == j, STEP, 0.0)
            ahead = rerun(config, problem, run, tau, nudge)
            behind = rerun(config, problem, run, tau, -nudge)
            for row, trace in rows.items():
                change = getattr(ahead, row) - getattr(behind, row)
                total[trace][..., j] += np.multiply.outer(weight, change) / (2.0 * STEP)
    return total


def rerun(config: Config, problem: Problem, run: Sequence[State], tau: int, nudge: Vector) -> State:
    """Return the last state of the run repeated from step `tau` with beta moved by `nudge`.

    With "l" every z is held at its recorded value, with "2x2" every H, with "full" what the
    recursion of h reads of B and of the moments' traces.
    """
    state = replace(run[tau], beta=run[tau].beta + nudge)
    for t in range(tau, len(run) - 1):
        grad = problem.grad(t, state.w)
        held = state if config.follows_third else run[t]
        z = run[t + 1].z if config.approximation == "l" else held.H.T @ grad
        after = _meta(config, state, z)
        H = _trace(config, problem, state, run[t], t, grad) if config.follows_third else state.H
        state = _base(config, after, grad, after.beta if config.meta_first else state.beta)
        state = replace(state, H=H)
    return state


def _trace(
    config: Config, problem: Problem, state: State, recorded: State, t: int, grad: Vector
) -> Matrix:
    """Return H' with everything live but the hatted B and the moments' traces."""
    gamma: Any = config.discount
    new = np.empty_like(state.H)
    beta_trace = gamma * recorded.B + (1.0 - gamma) * np.eye(config.blocks)
    rate = config.sigma.first(state.beta)[:, None] * beta_trace
    alpha = config.sigma.value(state.beta)[config.block_of]
    grad_trace = problem.hessian(t, state.w) @ (gamma * state.H)
    for rule, at in config.base:
        moments = grad[at], state.m[at], state.v[at], state.count[at] + 1
        u, d, own = direction(rule, *moments)[0], partials(rule, *moments), rule.decay_step_size
        kappa = rule.weight_decay if own is None else 0.0
        decayed = rule.weight_decay * (alpha[at] if own is None else np.full(len(u), own))
        u_trace = (
            d.u_g[:, None] * grad_trace[at]
            + d.u_m[:, None] * (gamma * recorded.M[at])
            + d.u_v[:, None] * (gamma * recorded.V[at])
        )
        new[at] = (
            (1.0 - decayed)[:, None] * (gamma * state.H[at])
            - alpha[at][:, None] * u_trace
            - (u + kappa * state.w[at])[:, None] * rate[config.block_of[at]]
        )
    return new


def _base(config: Config, state: State, grad: Vector, beta: Vector) -> State:
    alpha = config.sigma.value(beta)[config.block_of]
    w, m, v = state.w.copy(), state.m.copy(), state.v.copy()
    for rule, at in config.base:
        u, m[at], v[at] = direction(rule, grad[at], state.m[at], state.v[at], state.count[at] + 1)
        size = alpha[at] if rule.decay_step_size is None else rule.decay_step_size
        w[at] = state.w[at] - alpha[at] * u - size * rule.weight_decay * state.w[at]
    return replace(state, w=w, m=m, v=v, count=state.count + 1)


def _meta(config: Config, state: State, z: Vector) -> State:
    count = state.meta_count + 1
    u, m, v = direction(config.meta, z, state.meta_m, state.meta_v, count)
    against = counted_against(config, state.against, z)
    asked = speed(config, against) * u
    asked = np.min(asked, axis=0) if config.horizons else asked
    beta = state.beta - config.meta_lr * retreated(config, state.against, against, asked)
    return replace(state, beta=beta, meta_m=m, meta_v=v, against=against, meta_count=count)
