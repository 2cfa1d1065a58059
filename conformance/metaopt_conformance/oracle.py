r"""MetaOptimize as docs/mathematics.md writes it: dense, literal, in float64 NumPy.

All weights are one vector of length n, all blocks one of length m, and every trace is a full
matrix: rows are weights or meta-parameters, columns the blocks whose past values they depend on.
What each of several discounts has its own of, section 10, has a leading axis of them throughout.
One function an equation. Meant to be read beside the mathematics, and to be compared with.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metaopt_conformance.sigmas import Exp, Sigma
from metaopt_conformance.updates import (
    Bends,
    Partials,
    Update,
    Vector,
    bends,
    direction,
    partials,
)

__all__ = [
    "Config",
    "Matrix",
    "State",
    "init",
    "step",
]

Matrix = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A configuration for n weights in m blocks.

    Parameters
    ----------
    base : tuple of (Update, slice)
        The rule of each leaf, and which weights are the leaf's.
    meta : Update
    block_of : integers, shape (n,)
        The block of each weight.
    step_size : array (m,)
        Initial step sizes.
    meta_lr : float
    discount : float or tuple of float
        Several with "l" alone.
    sigma : Sigma
    bounds : pair of arrays (m,), or None
    approximation : {"l", "2x2", "full"}
    curvature : {"none", "diagonal", "exact"}
    rectified : bool
    meta_first, skip_nonfinite : bool
    largest : float
        Meta-gradients from here on count as not finite (section 11).
    """

    base: tuple[tuple[Update, slice], ...]
    meta: Update
    block_of: Any
    step_size: Vector
    meta_lr: float
    discount: float | tuple[float, ...] = 1.0
    sigma: Sigma = Exp()  # noqa: RUF009
    bounds: tuple[Vector, Vector] | None = None
    approximation: str = "l"
    curvature: str = "none"
    rectified: bool = False
    meta_first: bool = False
    skip_nonfinite: bool = False
    largest: float = 2.0**511

    @property
    def blocks(self) -> int:
        """The number m of blocks."""
        return len(self.step_size)

    @property
    def horizons(self) -> tuple[int, ...]:
        """The leading axis of what each of several discounts has its own of; none of one."""
        return np.shape(self.discount)

    @property
    def changes(self) -> bool:
        """Whether a gradient depends on the past: there is curvature, and a past."""
        return self.curvature != "none" and bool(np.any(np.asarray(self.discount) > 0.0))

    @property
    def follows_beta(self) -> bool:
        """Whether Y can feed back: z changes with the weights, and a direction with z."""
        return self.changes and self.approximation != "l" and not self.meta.signs

    @property
    def follows_third(self) -> bool:
        """Whether Z can feed back: it reaches z, and z the derivative of a direction."""
        return self.follows_beta and self.approximation == "full"

    @property
    def follows_hessian(self) -> bool:
        """Whether anything that feeds back changes with the gradient."""
        feeds = self.follows_beta or any(not rule.signs for rule, _ in self.base)
        return self.changes and feeds

    @property
    def own(self) -> Flags:
        """Where weights (rows) can depend on blocks: on their own alone, or on all (section 4)."""
        if self.curvature == "exact" and self.follows_hessian:
            return np.ones((len(self.block_of), self.blocks), dtype=bool)
        return np.asarray(self.block_of)[:, None] == np.arange(self.blocks)

    @property
    def weight_decay(self) -> Vector:
        """The weight decay of every weight, shape (n,)."""
        return _by_leaf(self, lambda rule, part: np.full(_length(part), rule.weight_decay))

    @property
    def coupled(self) -> Vector:
        """The weight decay in what alpha multiplies: 0 where decay has its own step size."""
        apart = [rule.decay_step_size is not None for rule, _ in self.base]
        parts = zip(self.base, apart, strict=True)
        own = np.concatenate([np.full(_length(part), alone) for (_, part), alone in parts])
        return np.where(own, 0.0, self.weight_decay)

    def decay_size(self, lr: Vector, alpha: Vector) -> Vector:
        """Return the step size of weight decay: alpha, or lr times its own (section 5)."""

        def size(rule: Update, part: slice) -> Vector:
            own = rule.decay_step_size
            return alpha[part] if own is None else lr[part] * own

        return _by_leaf(self, size)


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything carried from step to step.

    `w`, `m`, `v`, `count` have a value per weight; `beta`, `meta_m`, `meta_v`, `meta_count`, `z`,
    `restarts` one per block, as have `against`, the count of a fast start, and `peak`, the largest
    step size since the trace started; `step` and `skipped` are numbers. `H`, `M`, `V` are the rows
    of w, m and v of the trace X (n by m); `B`, `Bm`, `Bv` the rows of beta and the meta moments of
    Y (m by m). `Z[k, i, j]` is how entry (k, i) of H depends on block j (n by m by m).

    Of K discounts there are K times `H`, `M`, `V`, `z`, `meta_m`, `meta_v`, `against` and
    `decided`, the count of meta updates in which none asked for a larger step size.
    """

    w: Vector
    m: Vector
    v: Vector
    count: Vector
    beta: Vector
    meta_m: Vector
    meta_v: Vector
    against: Vector
    decided: Vector
    peak: Vector
    meta_count: Vector
    H: Matrix
    M: Matrix
    V: Matrix
    B: Matrix
    Bm: Matrix
    Bv: Matrix
    Z: Any
    z: Vector
    restarts: Vector
    step: Any = 0
    skipped: Any = 0


def init(config: Config, w: Vector) -> State:
    """Return the state at the start: Y = E, X = 0 (section 3)."""
    n, m, several = len(w), config.blocks, config.horizons
    return State(
        w=w,
        m=np.zeros(n),
        v=np.zeros(n),
        count=np.zeros(n),
        beta=config.sigma.inverse(config.step_size),
        meta_m=np.zeros((*several, m)),
        meta_v=np.zeros((*several, m)),
        against=np.zeros((*several, m)),
        decided=np.zeros((*several, m)),
        peak=np.zeros(m),
        meta_count=np.zeros(m),
        H=np.zeros((*several, n, m)),
        M=np.zeros((*several, n, m)),
        V=np.zeros((*several, n, m)),
        B=np.eye(m),
        Bm=np.zeros((m, m)),
        Bv=np.zeros((m, m)),
        Z=np.zeros((n, m, m)),
        z=np.zeros((*several, m)),
        restarts=np.zeros(m),
    )


def step(
    config: Config,
    state: State,
    grad: Vector,
    hessian: Matrix,
    lr: Any = 1.0,
    present: Any = True,
    third: Any = None,
    source: Vector | None = None,
    counts: Any = True,
) -> State:
    """Return the state after one step (section 2).

    Parameters
    ----------
    grad : array (n,)
    hessian : array (n, n)
        Of which the curvature takes all, the diagonal or nothing.
    lr : float or array (n,)
        Multiplier.
    present : bool or array (n,) of bool
        Where there is a gradient at all.
    third : callable, needed by "full"
        From U and V (n by m) to the third derivative along their columns, (n, m, m).
    source : array (n,), optional
        What z is made with in place of `grad`, the gradient of another loss (section 2).
    counts : bool or array (n,) of bool
        Where there is any of it.
    """
    lr, present = np.broadcast_to(lr, grad.shape), np.broadcast_to(present, grad.shape)
    grad = np.where(present, grad, 0.0)
    awake = present & (lr != 0.0)
    starts = state.meta_count == 0
    source = grad if source is None else np.where(present & counts, source, 0.0)
    z = np.where(starts, 0.0, meta_gradient(config, state, source, awake & counts))
    usable = np.all(_by_horizon(np.abs(z) < config.largest), axis=0)

    carried = usable & np.logical_not(starts)
    hatted = hats(config, state, awake, carried)
    grad_trace = curvature_term(config, hessian, hatted.H)
    finite = np.isfinite(grad)[:, None] & np.isfinite(source)[:, None] & np.isfinite(grad_trace)
    if config.skip_nonfinite and not np.all(finite[..., present, :]):
        return replace(state, skipped=state.skipped + 1)
    moves = usable & np.any(_by_horizon(z != 0.0), axis=0)
    begins = starts & np.isin(np.arange(config.blocks), config.block_of[present])
    z_used = np.where(moves, z, 0.0)
    after_meta, restarts = meta_update(config, state, hatted, z_used, moves, begins)
    after_meta = meta_traces(
        config, state, hatted, after_meta, grad, z, carried, moves, restarts, awake, grad_trace
    )

    beta, B = (after_meta.beta, after_meta.B) if config.meta_first else (state.beta, hatted.B)
    after_base = base_update(config, state, after_meta, grad, lr, beta)
    after_base = base_traces(
        config, state, hatted, after_base, grad, lr, beta, B, grad_trace, hessian
    )
    if config.follows_third:
        Z = third_trace(config, state, hatted, grad, lr, awake, grad_trace, hessian, third)
        after_base = replace(after_base, Z=Z)
    after_base = only_own(config, keep_absent(state, after_base, present))
    return replace(
        after_base,
        z=z,
        restarts=state.restarts + (restarts | np.logical_not(usable)),
        step=state.step + 1,
    )


def meta_gradient(config: Config, state: State, grad: Vector, awake: Flags) -> Vector:
    """Return z = H^T g, summed over the weights that move (sections 2, 4 and 7)."""
    return np.sum(np.where(awake[:, None] & config.own, state.H * grad[:, None], 0.0), axis=-2)


def hats(config: Config, state: State, awake: Flags, carried: Flags) -> State:
    """Return the traces as gamma (Y, X) + (1 - gamma) (E, 0) (section 3).

    Gamma acts as 1 on the rows of weights that rest (section 7), and the columns of blocks that are
    not carried on start anew, as do, with curvature, numbers that are not finite of
    weights that rest (section 11). Where Y is not followed it stays E.
    """
    gamma, eye = _of_matrices(config.discount), np.eye(config.blocks)
    rows = np.where(awake[:, None], gamma, 1.0)

    def x(trace: Matrix) -> Matrix:
        return np.where(carried & _finite(config, trace, awake[:, None]), rows * trace, 0.0)

    def y(trace: Matrix, start: Any) -> Matrix:
        if not config.follows_beta:
            return trace
        return np.where(carried, gamma * trace + (1.0 - gamma) * start, start)

    return replace(
        state,
        H=x(state.H),
        M=x(state.M),
        V=x(state.V),
        B=y(state.B, eye),
        Bm=y(state.Bm, 0.0),
        Bv=y(state.Bv, 0.0),
        Z=hat_of_third(config, state, awake, carried),
    )


def hat_of_third(config: Config, state: State, awake: Flags, carried: Flags) -> Any:
    """Return gamma Z; a pair of columns restarts with either of the two (section 11)."""
    if not config.follows_third:
        return state.Z
    rows = np.where(awake, config.discount, 1.0)[:, None, None]
    keep = carried[:, None] & carried[None, :] & _finite(config, state.Z, awake[:, None, None])
    return np.where(keep, rows * state.Z, 0.0)


def _finite(config: Config, trace: Any, awake: Flags) -> Flags:
    """Say which numbers of a trace may enter the tangents (section 11)."""
    return awake | np.isfinite(trace) | (not config.follows_hessian)


def curvature_term(config: Config, hessian: Matrix, H: Matrix) -> Matrix:
    """Return how the gradient depends on the past: Hessian times H (sections 3 and 4).

    Where nothing feeds back there is none: without a future, say, even of weights that rest.
    """
    if not config.follows_hessian:
        return np.zeros_like(H)
    if config.curvature == "exact":
        return hessian @ H
    return np.where(config.own, np.diag(hessian)[:, None] * H, 0.0)


def only_own(config: Config, state: State) -> State:
    """Return the state with zeros where no Hessian mixes the blocks (section 4, *Layouts*)."""
    rows = config.own
    columns = np.eye(config.blocks, dtype=bool) | np.all(rows)
    return replace(
        state,
        **{name: np.where(rows, getattr(state, name), 0.0) for name in ("H", "M", "V")},
        **{name: np.where(columns, getattr(state, name), 0.0) for name in ("B", "Bm", "Bv")},
    )


def base_update(
    config: Config, state: State, into: State, grad: Vector, lr: Vector, beta: Vector
) -> State:
    """Return the weights and moments after w' = w - alpha u - alpha_kappa kappa w (section 5)."""
    u, m, v = _directions(config, state, grad)
    alpha = lr * config.sigma.value(beta)[config.block_of]
    w = state.w - alpha * u - config.decay_size(lr, alpha) * config.weight_decay * state.w
    return replace(into, w=w, m=m, v=v, count=state.count + 1)


def base_traces(
    config: Config,
    state: State,
    hatted: State,
    into: State,
    grad: Vector,
    lr: Vector,
    beta: Vector,
    B: Matrix,
    grad_trace: Matrix,
    hessian: Matrix,
) -> State:
    """Return X' = Phi_x X + Phi_g (Hess H) + Phi_alpha lr sigma' B (section 3)."""
    d = _derivatives(Partials, partials, config, state, grad)
    alpha = lr * config.sigma.value(beta)[config.block_of]
    alpha_trace = (lr * config.sigma.first(beta)[config.block_of])[:, None] * B[config.block_of]
    followed = _directions(config, state, grad)[0] + config.coupled * state.w
    retain = 1.0 - config.weight_decay * config.decay_size(lr, alpha)
    u_trace = _chain((d.u_g, grad_trace), (d.u_m, hatted.M), (d.u_v, hatted.V))
    if config.rectified:  # the diagonal is capped: min(alpha d, 1 - kappa alpha), section 12
        retain = np.maximum(0.0, retain - alpha * np.diag(hessian))
        u_trace = np.zeros_like(u_trace)
    return replace(
        into,
        H=_rows(retain, hatted.H) - _rows(alpha, u_trace) - _rows(followed, alpha_trace),
        M=_rows(d.m_m, hatted.M) + _rows(d.m_g, grad_trace),
        V=_rows(d.v_v, hatted.V) + _rows(d.v_g, grad_trace),
    )


def third_trace(
    config: Config,
    state: State,
    hatted: State,
    grad: Vector,
    lr: Vector,
    awake: Flags,
    grad_trace: Matrix,
    hessian: Matrix,
    third: Any,
) -> Any:
    """Return Z', the derivative of h' by (beta, x, h) (section 3, *Z*).

    Of h'_j = (1 - kappa alpha) h_j - alpha (u_g g_j + u_m m_j + u_v v_j) - (u + kappa w) alpha_j,
    with the hatted tangents h_j, m_j, v_j, g_j = Hess h_j and alpha_j of column j, along the
    tangents of column k. Those of m and v, and beta's in alpha_j, are held. Decay with a step size
    of its own has it in the first term in alpha's place, and is not in the last.
    """
    d = _derivatives(Partials, partials, config, state, grad)
    b = _derivatives(Bends, bends, config, state, grad)
    kappa = config.coupled
    u = _directions(config, state, grad)[0]
    block_of, beta = config.block_of, state.beta
    alpha = lr * config.sigma.value(beta)[block_of]
    B = hatted.B[block_of]
    alpha_trace = (lr * config.sigma.first(beta)[block_of])[:, None] * B
    alpha_bend = _pairs((lr * config.sigma.second(beta)[block_of])[:, None] * B, B)
    # once for the h in the formula's own discount, once for the trace of h
    w_bend = np.where(awake, config.discount, 1.0)[:, None, None] * hatted.Z
    g_bend = third(hatted.H, hatted.H) + np.einsum("ab,bij->aij", hessian, w_bend)
    G, M, V = grad_trace, hatted.M, hatted.V

    u_trace = _chain((d.u_g, G), (d.u_m, M), (d.u_v, V))
    u_bend = _chain(
        (d.u_g, g_bend),
        (b.u_gg, _pairs(G, G)),
        (b.u_gm, _pairs(G, M) + _pairs(M, G)),
        (b.u_gv, _pairs(G, V) + _pairs(V, G)),
        (b.u_mv, _pairs(M, V) + _pairs(V, M)),
        (b.u_vv, _pairs(V, V)),
        columns=2,
    )
    moved = u_trace + _rows(kappa, hatted.H)
    return (
        _all(1.0 - config.weight_decay * config.decay_size(lr, alpha)) * w_bend
        - _all(alpha) * u_bend
        - _pairs(alpha_trace, moved)
        - _pairs(moved, alpha_trace)
        - _all(u + kappa * state.w) * alpha_bend
    )


def meta_update(
    config: Config, state: State, into: State, z: Vector, moves: Flags, begins: Flags
) -> tuple[State, Flags]:
    """Return the meta-parameters after beta' = beta - eta u, and the meta moments (section 6).

    Of several discounts u is the least of their directions, of which each has its own moments and
    its own fast start (section 10).

    Blocks that do not move keep theirs, but that the step in which a trace begins counts, which
    `begins` says. Bounds project sigma(beta), section 8. Second comes which blocks start anew, with
    moments and a count of 0: those whose step size has collapsed or met a bound (section 11).
    """
    count = state.meta_count + 1
    u, m, v = direction(config.meta, z, state.meta_m, state.meta_v, count)
    against = counted_against(config, state.against, z)
    u = speed(config, against) * u
    least = np.min(_by_horizon(u), axis=0)
    beta = state.beta - config.meta_lr * retreated(config, state.against, against, least)
    limited = np.clip(beta, *config.sigma.beta_range)
    if config.bounds is not None:
        lo, hi = config.bounds
        sizes = np.clip(config.sigma.value(limited), lo, hi)
        inside = sizes == config.sigma.value(limited)
        limited = np.where(inside, limited, config.sigma.inverse(sizes))
    arrives = at_bound(config, limited) & np.logical_not(at_bound(config, state.beta))
    sizes = config.sigma.value(limited)
    peak = np.maximum(state.peak, sizes)
    collapsed = (sizes > 0.0) & (sizes < 0.01 * peak)
    restarts = moves & (arrives | collapsed)

    def moved(new: Vector, old: Vector) -> Vector:
        return np.where(restarts, 0.0, np.where(moves, new, old))

    after = replace(
        into,
        beta=np.where(moves, limited, state.beta),
        meta_m=moved(m, state.meta_m),
        meta_v=moved(v, state.meta_v),
        against=np.where(moves, against, state.against),
        decided=np.where(moves & (u == least), state.decided + 1, state.decided),
        peak=moved(peak, state.peak),
        meta_count=moved(count, state.meta_count + begins),
    )
    return after, restarts


def at_bound(config: Config, beta: Vector) -> Flags:
    """Say which blocks are at a bound, to 1e-5 (section 11)."""
    bounds = [np.full(len(beta), bound) for bound in config.sigma.beta_range]
    if config.bounds is not None:
        with np.errstate(all="ignore"):  # the inverse of what no step size can be
            bounds += [config.sigma.inverse(bound) for bound in config.bounds]
    return np.any([np.abs(beta - bound) <= 1e-5 * np.abs(beta) for bound in bounds], axis=0)


def counted_against(config: Config, against: Vector, z: Vector) -> Vector:
    """Return the count that ends a fast start: 1 up, a half down to 0, until enough (section 6)."""
    counted = np.maximum(against + np.where(z > 0.0, 1.0, np.where(z < 0.0, -0.5, 0.0)), 0.0)
    return np.where(against >= config.meta.patience, against, counted)


def speed(config: Config, against: Vector) -> Vector:
    """Return how many times faster than its rule the meta update of each block is (section 6)."""
    return np.where(against >= config.meta.patience, 1.0, config.meta.factor)


def retreated(config: Config, before: Vector, after: Vector, u: Vector) -> Vector:
    """Return the directions, where the last fast start ends `retreat` fast steps back (section 6).

    `before` and `after` count against the start.
    """
    back = config.meta.retreat * config.meta.factor
    return np.where(start_ends(config, before, after), back, u)


def start_ends(config: Config, before: Vector, after: Vector) -> Flags:
    """Say in which blocks the last fast start ends, and beta goes back (section 6)."""
    fast_before, fast_after = (
        np.any(_by_horizon(against) < config.meta.patience, axis=0) for against in (before, after)
    )
    return fast_before & np.logical_not(fast_after) & (config.meta.retreat > 0.0)


def meta_traces(
    config: Config,
    state: State,
    hatted: State,
    into: State,
    grad: Vector,
    z: Vector,
    carried: Flags,
    moves: Flags,
    restarts: Flags,
    awake: Flags,
    grad_trace: Matrix,
) -> State:
    """Return Y' = Psi_y Y + Psi_z (term A + term B) (section 3); E where it is not followed."""
    if not config.follows_beta:
        eye = np.eye(config.blocks)
        return replace(into, B=eye, Bm=np.zeros_like(eye), Bv=np.zeros_like(eye))
    held = hats(replace(config, discount=1.0), state, awake, carried)
    z, count = np.where(moves, z, 0.0), state.meta_count + 1
    d = partials(config.meta, z, state.meta_m, state.meta_v, count)
    term_a = np.where(awake[:, None], state.H, 0.0).T @ np.where(awake[:, None], grad_trace, 0.0)
    z_trace = term_a
    if config.follows_third:  # term B
        z_trace = term_a + np.einsum("k,kij->ij", np.where(awake, grad, 0.0), hatted.Z)
    u_trace = _chain((d.u_g, z_trace), (d.u_m, hatted.Bm), (d.u_v, hatted.Bv))
    u_trace = _rows(speed(config, into.against), u_trace)
    u_trace = np.where(start_ends(config, state.against, into.against)[:, None], 0.0, u_trace)
    # rows of blocks that rest are left as they were, but for columns that start anew
    stays, new = np.logical_not(moves)[:, None], restarts[:, None]
    Bm = np.where(stays, held.Bm, _rows(d.m_m, hatted.Bm) + _rows(d.m_g, z_trace))
    Bv = np.where(stays, held.Bv, _rows(d.v_v, hatted.Bv) + _rows(d.v_g, z_trace))
    return replace(
        into,
        B=np.where(stays, held.B, hatted.B - config.meta_lr * u_trace),
        Bm=np.where(new, 0.0, Bm),
        Bv=np.where(new, 0.0, Bv),
    )


def keep_absent(before: State, after: State, present: Flags) -> State:
    """Return `after`, with everything of weights without a gradient as it was (section 7)."""
    rows = present[:, None]
    return replace(
        after,
        w=np.where(present, after.w, before.w),
        m=np.where(present, after.m, before.m),
        v=np.where(present, after.v, before.v),
        count=np.where(present, after.count, before.count),
        H=np.where(rows, after.H, before.H),
        M=np.where(rows, after.M, before.M),
        V=np.where(rows, after.V, before.V),
        Z=np.where(rows[:, :, None], after.Z, before.Z),
    )


def _directions(config: Config, state: State, grad: Vector) -> tuple[Vector, Vector, Vector]:
    parts = [
        direction(rule, grad[at], state.m[at], state.v[at], state.count[at] + 1)
        for rule, at in config.base
    ]
    u, m, v = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    return u, m, v


def _derivatives(kind: Any, of: Any, config: Config, state: State, grad: Vector) -> Any:
    """Return the derivatives `of` each leaf's rule as one `kind` for all weights."""
    parts = [
        of(rule, grad[at], state.m[at], state.v[at], state.count[at] + 1)
        for rule, at in config.base
    ]
    return kind(
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in kind.__dataclass_fields__
        }
    )


def _by_leaf(config: Config, of: Any) -> Vector:
    return np.concatenate([of(rule, part) for rule, part in config.base])


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _rows(factor: Vector, trace: Matrix) -> Matrix:
    """Multiply every column of a trace by an elementwise factor."""
    return factor[:, None] * trace


def _chain(*terms: tuple[Vector, Any], columns: int = 1) -> Any:
    """Return the sum of partial derivatives times traces; what a partial of 0 keeps out is out.

    The last axes of a trace are its rows and `columns` axes of columns.
    """

    def term(partial: Vector, trace: Any) -> Any:
        factor = partial.reshape(-1, *(1,) * columns)
        return np.where(factor == 0.0, 0.0, factor * trace)

    return sum(term(*pair) for pair in terms)


def _by_horizon(values: Any) -> Any:
    """Return values by block with a leading axis of discounts, also where there is one."""
    return np.reshape(values, (-1, np.shape(values)[-1]))


def _of_matrices(values: Any) -> Any:
    """Return a value for each discount, or for the one, as factors of matrices."""
    return np.asarray(values)[..., None, None]


def _all(factor: Vector) -> Any:
    """Return an elementwise factor of a third trace."""
    return factor[:, None, None]


def _pairs(one: Matrix, other: Matrix) -> Any:
    """Return the products of every column of the one with every column of the other."""
    return one[:, :, None] * other[:, None, :]
