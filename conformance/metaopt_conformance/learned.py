r"""Numbers of rules that are learned, by hand: docs/mathematics.md section 15.

The oracle's own functions, once more for each number: its value is what the step size is there.
Only how a number reaches weights and moments is new, and each derivative is a line of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metaopt_conformance import oracle
from metaopt_conformance.oracle import Config, Flags, Matrix, State
from metaopt_conformance.updates import Update, Vector, direction, partials

__all__ = ["Number", "Run", "by_number", "init", "step"]


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number of the rules of some leaves.

    Parameters
    ----------
    field : {"weight_decay", "eps", "rho", "decay_sq"}
        That of `Update`.
    config : Config
        With the number's values as `step_size`, its map as `sigma`, blocks, meta update and one
        discount; -1 as the block of weights that it has no part in.
    """

    field: str
    config: Config

    @property
    def placed(self) -> Flags:
        """In which weights' rules it stands, shape (n,)."""
        return np.asarray(self.config.block_of) >= 0

    def of_weights(self, by_block: Vector) -> Vector:
        """Return values by block as one per weight, 0 where it has no part."""
        return np.where(self.placed, by_block[self.config.block_of], 0.0)


@dataclass(frozen=True)
class Run:
    """A state: the optimizer's, and for each number one with its own blocks and traces."""

    own: State
    numbers: Mapping[str, State]


def init(config: Config, numbers: Mapping[str, Number], w: Vector) -> Run:
    """Return the state at the start."""
    return Run(
        oracle.init(config, w),
        {name: oracle.init(number.config, w) for name, number in numbers.items()},
    )


def step(
    config: Config,
    numbers: Mapping[str, Number],
    run: Run,
    grad: Vector,
    hessian: Matrix,
    lr: Any,
    present: Any,
    source: Vector,
    counts: Any,
) -> Run:
    """Return the state after one step; arguments as `oracle.step` takes them."""
    lr, present = np.broadcast_to(lr, grad.shape), np.broadcast_to(present, grad.shape)
    grad = np.where(present, grad, 0.0)
    judge = np.where(present & counts, source, 0.0)
    moved = {
        name: _meta(number, run.numbers[name], grad, hessian, lr, present, judge, counts)
        for name, number in numbers.items()
    }
    values = {
        name: number.of_weights(number.config.sigma.value(moved[name].beta))
        for name, number in numbers.items()
    }
    config = replace(config, base=_rules(config, numbers, values))
    own = oracle.step(config, run.own, grad, hessian, lr, present, None, source, counts)
    if own.skipped != run.own.skipped:
        return Run(own, run.numbers)
    beta = own.beta if config.meta_first else run.own.beta
    alpha = lr * config.sigma.value(beta)[config.block_of]
    after = {}
    for name, number in numbers.items():
        new = _traces(config, number, run.own, moved[name], grad, alpha, lr)
        new = oracle.keep_absent(moved[name].before, new, present)
        after[name] = oracle.only_own(number.config, new)
    return Run(own, after)


@dataclass(frozen=True)
class _Moved:
    """A number after its meta update, and what its traces are taken on with."""

    before: State
    after: State
    hatted: State
    grad_trace: Matrix
    beta: Vector
    beta_trace: Matrix


def _meta(
    number: Number,
    state: State,
    grad: Vector,
    hessian: Matrix,
    lr: Vector,
    present: Flags,
    judge: Vector,
    counts: Any,
) -> _Moved:
    """Return a number after its meta update: as `oracle.step` has it of step sizes."""
    config = number.config
    awake = present & (lr != 0.0)
    starts = state.meta_count == 0
    z = np.where(starts, 0.0, oracle.meta_gradient(config, state, judge, awake & counts))
    usable = np.abs(z) < config.largest
    carried = usable & np.logical_not(starts)
    hatted = oracle.hats(config, state, awake, carried)
    grad_trace = oracle.curvature_term(config, hessian, hatted.H)
    moves = usable & (z != 0.0)
    begins = starts & np.isin(np.arange(config.blocks), config.block_of[present])
    after, restarts = oracle.meta_update(
        config, state, hatted, np.where(moves, z, 0.0), moves, begins
    )
    after = oracle.meta_traces(
        config, state, hatted, after, grad, z, carried, moves, restarts, awake, grad_trace
    )
    after = replace(after, z=z, restarts=state.restarts + (restarts | np.logical_not(usable)))
    beta, beta_trace = (after.beta, after.B) if config.meta_first else (state.beta, hatted.B)
    return _Moved(state, after, hatted, grad_trace, beta, beta_trace)


def _rules(
    config: Config, numbers: Mapping[str, Number], values: Mapping[str, Vector]
) -> tuple[tuple[Update, slice], ...]:
    """Return the rules of the leaves with a value for each weight in the place of numbers."""

    def rule(update: Update, at: slice) -> Update:
        changes: dict[str, Any] = {
            number.field: values[name][at]
            for name, number in numbers.items()
            if np.any(number.placed[at])
        }
        return replace(update, **changes)

    return tuple((rule(update, at), at) for update, at in config.base)


def _traces(
    config: Config,
    number: Number,
    own: State,
    moved: _Moved,
    grad: Vector,
    alpha: Vector,
    lr: Vector,
) -> State:
    """Return the traces after a step: those of the weights, H, and of the moments, M and V."""
    parts = [
        (
            direction(rule, grad[at], own.m[at], own.v[at], own.count[at] + 1)[0],
            partials(rule, grad[at], own.m[at], own.v[at], own.count[at] + 1),
            by_number(rule, number.field, grad[at], own.m[at], own.v[at], own.count[at] + 1),
        )
        for rule, at in config.base
    ]

    def joined(take: Any) -> Vector:
        return np.concatenate([take(*part) for part in parts])

    rate = np.where(
        number.placed[:, None],
        number.of_weights(number.config.sigma.first(moved.beta))[:, None]
        * moved.beta_trace[number.config.block_of],
        0.0,
    )
    G, hatted = moved.grad_trace, moved.hatted
    u_g, u_m, u_v = (joined(lambda _u, d, _n, k=k: getattr(d, k)) for k in ("u_g", "u_m", "u_v"))
    m_g, m_m, v_g, v_v = (
        joined(lambda _u, d, _n, k=k: getattr(d, k)) for k in ("m_g", "m_m", "v_g", "v_v")
    )
    u_n, m_n, v_n = (joined(lambda _u, _d, n, k=k: n[k]) for k in range(3))
    decay_size = config.decay_size(lr, alpha)
    decay_n = own.w if number.field == "weight_decay" else np.zeros_like(own.w)
    retain = 1.0 - config.weight_decay * decay_size

    def term(factor: Vector, trace: Matrix) -> Matrix:
        return np.where(factor[:, None] == 0.0, 0.0, factor[:, None] * trace)

    u_trace = term(u_n, rate)
    if number.field != "weight_decay" or number.config.follows_hessian:
        u_trace = u_trace + term(u_g, G) + term(u_m, hatted.M) + term(u_v, hatted.V)
    return replace(
        moved.after,
        H=retain[:, None] * hatted.H
        - alpha[:, None] * u_trace
        - decay_size[:, None] * term(decay_n, rate),
        M=term(m_m, hatted.M) + term(m_g, G) + term(m_n, rate),
        V=term(v_v, hatted.V) + term(v_g, G) + term(v_n, rate),
    )


def by_number(
    rule: Update, field: str, g: Vector, m: Vector, v: Vector, count: Vector
) -> tuple[Vector, Vector, Vector]:
    """Return the derivatives of `direction` with respect to a number of the rule, elementwise."""
    zero = np.zeros_like(g)
    if field == "weight_decay":
        return zero, zero, zero
    m_n = m - g if field == "rho" and rule.has_m else zero
    v_n = v - g**2 if field == "decay_sq" and rule.has_v else zero
    if not rule.has_v:
        return (zero if rule.delayed else m_n), m_n, v_n
    rho, decay = np.asarray(rule.rho), np.asarray(rule.decay_sq)
    steps = count - 1.0 if rule.delayed else count
    some = steps > 0.0
    power = np.where(some, steps, 1.0)
    new_m, new_v = rho * m + (1.0 - rho) * g, decay * v + (1.0 - decay) * g**2
    # the numerator a, over 1 - rho**t, and the root s
    used_m, used_v = (m, v) if rule.delayed else (new_m, new_v)
    corrected = 1.0 - rho**power
    corrected_sq = 1.0 - decay**power if rule.bias_correction else np.ones_like(g)
    root = np.sqrt(used_v / corrected_sq)
    divisor = root + rule.eps
    if rule.kind == "rmsprop":
        a, a_n = g, zero
    elif rule.kind == "nadamw":
        ahead = 1.0 - rho ** (count + 1.0)
        a = rho * new_m / ahead + (1.0 - rho) * g / corrected
        a_n = (
            new_m / ahead
            + rho * (m - g) / ahead
            + rho * new_m * (count + 1.0) * rho**count / ahead**2
            - g / corrected
            + (1.0 - rho) * g * count * rho ** (count - 1.0) / corrected**2
        )
    else:
        a = used_m / corrected
        a_n = (zero if rule.delayed else m - g) / corrected
        a_n = a_n + used_m * power * rho ** (power - 1.0) / corrected**2
    s_n = (zero if rule.delayed else v - g**2) / corrected_sq
    if rule.bias_correction:
        s_n = s_n + used_v * power * decay ** (power - 1.0) / corrected_sq**2
    s_n = np.where(root > 0.0, s_n / (2.0 * np.where(root > 0.0, root, 1.0)), 0.0)
    u_n = {
        "eps": -a / divisor**2,
        "rho": a_n / divisor,
        "decay_sq": -a / divisor**2 * s_n,
    }[field]
    defined = some & (np.logical_not(rule.delayed and rule.kind == "rmsprop") | (used_v > 0.0))
    return np.where(defined, u_n, 0.0), m_n, v_n
