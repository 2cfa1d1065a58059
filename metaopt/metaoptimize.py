"""MetaOptimize: a base update, and a meta update that tunes its step sizes."""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from metaopt import inputs
from metaopt import step as parts
from metaopt.arrays import (
    Array,
    Leaves,
    at_hand,
    cast,
    filled,
    home,
    kind_of,
    map_leaves,
    namespace,
    per_leaf,
    solid,
    to_numpy,
)
from metaopt.blocks import Blocks, Partition, partition
from metaopt.curvature import Curvature, Diagonal, curvature
from metaopt.leaf import Leaf, has_average
from metaopt.meta import COLLAPSE, PEAK, RECOVERIES, begun, pinned
from metaopt.plan import Following, Plan, following, make_plan, rules_by_leaf
from metaopt.projection import JVP, pushed
from metaopt.recovery import recovered
from metaopt.rules.rule import Rule, in_role
from metaopt.rules.sgd import SGD
from metaopt.state import State
from metaopt.step_sizes import StepSizeMap, is_exponential, step_size_map

__all__ = ["MetaOptimize"]


@dataclass(frozen=True, kw_only=True)
class MetaOptimize:
    r"""Wraps a base update and adapts its step sizes online with a meta update.

    docs/mathematics.md sections 2 to 11. An instance is a configuration; what changes is in the
    :class:`State` that `init` makes and `step` returns. Everything is pure: no input is changed.

    Weights may be edited between steps (clipped, masked, restored) where an average of them is kept
    in place of the trace: without curvature, with "exp" and parameters of float32
    or wider. Elsewhere edits are not followed (section 10).

    Parameters
    ----------
    base : Rule, or mapping of pattern to Rule
        The update of the weights. With a mapping, every leaf takes the rule of the first
        `fnmatch` pattern that matches its name.
    meta : Rule
        The update of the meta-parameters; without weight decay.
    step_size : float, or mapping of block name to float or array, default 1e-4
        Initial learned step size :math:`\alpha_0`. A mapping has exactly the keys of `step_sizes`.
    meta_lr : float, default 1e-3
        Step size :math:`\eta` of the meta update. With 0 this is `base` at a fixed step size.
    discount : float, default 1.0
        Discount :math:`\gamma` of future losses, in [0, 1]. This, `meta_lr` and `step_size` may be
        arrays of shape (), and where JAX traces them their values are not looked at.
    blocks : {"scalar", "tensor", "node", "weight"}, mapping or Partition, default "scalar"
        Which weights share a step size; a mapping gives named groups by pattern. See
        `metaopt.blocks`.
    sigma : str or StepSizeMap, default "exp"
        From meta-parameters to step sizes, a name or a map of docs/mathematics.md section 8.
    bounds : (float, float) or mapping of block name to (float, float), optional
        Least and largest step size, before the multiplier `lr`; held to rounding. Of a mapping,
        blocks that are left out have none.
    approximation : {"l", "2x2", "full"}, default "l"
        Which derivatives the traces follow, section 4. "full" is for study and small problems: it
        needs `curvature="exact"` and is refused with `meta_first`.
    curvature : {"none", "diagonal", "exact"} or metaopt.curvature.Diagonal, default "none"
        How much of the Hessian they follow; "none" is Hessian-free.
    meta_first : bool, default False
        Update the meta-parameters before the weights of the same step.
    skip_nonfinite : bool, default False
        Leave everything as it is in steps whose gradients hold inf or NaN.
    recover : bool, default False
        Have blocks that diverge go back: where a meta-gradient is not finite the weights become
        their average, moments and traces start anew, and the step size is a third of what it was
        (section 11). It needs what an average is kept for, see above.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described, or two do not go together.

    Examples
    --------
    >>> import numpy as np
    >>> opt = MetaOptimize(base=SGD(), meta=SGD(), step_size=0.1, meta_lr=0.01)
    >>> params = {"w": np.array([3.0, -2.0])}
    >>> state = opt.init(params)
    >>> for _ in range(100):
    ...     grads = {"w": params["w"]}  # of half the squared norm
    ...     params, state = opt.step(params, grads, state)
    >>> bool(abs(params["w"]).max() < 1e-3)
    True
    """

    base: Rule | Mapping[str, Rule]
    meta: Rule
    step_size: float | Mapping[str, Any] = 1e-4
    meta_lr: float = 1e-3
    discount: float = 1.0
    blocks: str | Mapping[str, Any] | Partition = "scalar"
    sigma: str | StepSizeMap = "exp"
    bounds: tuple[float, float] | Mapping[str, Any] | None = None
    approximation: str = "l"
    curvature: str | Curvature = "none"
    meta_first: bool = False
    skip_nonfinite: bool = False
    recover: bool = False

    _partition: Partition = field(init=False, repr=False, compare=False)
    _sigma: StepSizeMap = field(init=False, repr=False, compare=False)
    _curvature: Curvature = field(init=False, repr=False, compare=False)
    _beta_bounds: Any = field(init=False, repr=False, compare=False)
    _plans: dict[Any, Plan] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        inputs.check_rules(self.base, self.meta)
        meta_lr = inputs.hyperparameter("meta_lr", self.meta_lr, 0.0)
        discount = inputs.hyperparameter("discount", self.discount, 0.0, 1.0)
        inputs.check_choice("approximation", self.approximation, ("l", "2x2", "full"))
        inputs.check_flag("meta_first", self.meta_first)
        inputs.check_flag("skip_nonfinite", self.skip_nonfinite)
        inputs.check_flag("recover", self.recover)
        sigma, kind = step_size_map(self.sigma), curvature(self.curvature)
        inputs.check_bounds(self.bounds, sigma.range)
        sizes = self.step_size
        for key, size in sizes.items() if isinstance(sizes, Mapping) else [(None, sizes)]:
            name = "step_size" if key is None else f"step_size[{key!r}]"
            inputs.check_step_size(name, size, sigma.range, self._bounds_of(key))
        if self.recover:
            for option, fits in (
                ('`curvature` "none"', kind.kind == "none"),
                ('`sigma` "exp"', is_exponential(sigma)),
                ("`skip_nonfinite` False", not self.skip_nonfinite),
            ):
                if not fits:
                    name = option.split("`")[1]
                    msg = f"`recover` needs {option}; got {getattr(self, name)!r}."
                    raise ValueError(msg)
        if self.approximation == "full" and (kind.kind != "exact" or self.meta_first):
            what = (
                f'`curvature` "exact"; got {self.curvature!r}'
                if kind.kind != "exact"
                else "`meta_first` False; got True"
            )
            msg = f'`approximation="full"` needs {what}.'
            raise ValueError(msg)
        if kind.kind != "none":
            inputs.check_derivatives(self.base, None if self.approximation == "l" else self.meta)
        if isinstance(kind, Diagonal) and kind.rectified:
            for rule in self._rules():
                if not isinstance(rule, SGD) or rule.slots:
                    msg = (
                        "`curvature` Diagonal(rectified=True) needs SGD without momentum as "
                        f"`base`; got {rule!r}."
                    )
                    raise ValueError(msg)
        settled = {
            "base": _in_base_role(self.base),
            "meta": in_role(self.meta, "meta"),
            "step_size": {key: _size(size) for key, size in sizes.items()}
            if isinstance(sizes, Mapping)
            else _size(sizes),
            "bounds": _floats(self.bounds),
            "blocks": {
                group: tuple(patterns) if isinstance(patterns, list) else patterns
                for group, patterns in self.blocks.items()
            }
            if isinstance(self.blocks, Mapping)
            else self.blocks,
            "meta_lr": meta_lr,
            "discount": discount,
            "_partition": partition(self.blocks),
            "_sigma": sigma,
            "_curvature": kind,
            "_beta_bounds": {key: _bounds_of_beta(sigma, pair) for key, pair in self.bounds.items()}
            if isinstance(self.bounds, Mapping)
            else _bounds_of_beta(sigma, self.bounds),
            "_plans": {},
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        """Return whether the other is the same configuration; step sizes may be arrays."""
        if not isinstance(other, MetaOptimize):
            return NotImplemented
        return all(
            _equal(getattr(self, option.name), getattr(other, option.name))
            for option in fields(self)
            if option.init
        )

    def _bounds_of(self, key: str | None) -> dict[str, Any]:
        """Return the bounds by name that hold for a block; for all blocks where `key` is None."""
        if not isinstance(self.bounds, Mapping):
            return {"bounds": self.bounds}
        return {
            f"bounds[{name!r}]": pair
            for name, pair in self.bounds.items()
            if key is None or key == name
        }

    def limits(self, blocks: Blocks, beta: Any) -> tuple[Any, Any]:
        """Return the bounds on beta, values per block, as `metaopt.meta.meta_step` takes them."""
        if not isinstance(self._beta_bounds, Mapping):
            return self._beta_bounds
        like = next(iter(beta.values())) if isinstance(beta, Mapping) else beta
        return tuple(
            blocks.from_names(
                {
                    key: filled(like, (), self._beta_bounds.get(key, self._sigma.beta_range)[end])
                    for key in blocks.families
                }
            )
            for end in (0, 1)
        )

    def _pinned(self, blocks: Blocks, beta: Any) -> Any:
        lo, hi = self.limits(blocks, beta)
        if not isinstance(beta, Mapping):
            return pinned(beta, lo, hi)
        return {
            name: pinned(
                piece, *(end[name] if isinstance(end, Mapping) else end for end in (lo, hi))
            )
            for name, piece in beta.items()
        }

    @property
    def sigma_map(self) -> StepSizeMap:
        """The map that `sigma` names or is."""
        return self._sigma

    @property
    def rectified(self) -> bool:
        """Whether the diagonal of the Hessian is capped as in IDBD."""
        return isinstance(self._curvature, Diagonal) and self._curvature.rectified

    def slopes(self, beta: Any) -> tuple[Any, Any]:
        """Return the step sizes and their derivative at `beta`, values per block (section 8).

        The second is the very object of the first where the two are equal.
        """
        sizes = parts.sizes_of(self._sigma, beta)
        return sizes.value, sizes.first

    def _rules(self) -> list[Rule]:
        return list(self.base.values()) if isinstance(self.base, Mapping) else [self.base]

    def plan(self, params: Mapping[str, Array], traced: Iterable[str] = ()) -> Plan:
        """Return what this configuration means for `params`: their rules, blocks and dtypes.

        Only names, shapes and dtypes are looked at; the result is kept for the next call.

        Parameters
        ----------
        params : mapping of leaf name to array
        traced : iterable of str, default none
            Leaves of which a state has traces even where averages could stand for them: that of
            narrower weights, which are handed over in the compute dtype.

        Raises
        ------
        ValueError
            If patterns or a partition do not fit, or dense traces would be too large.
        TypeError
            If `params` are not arrays of one library.
        """
        return self._plan(
            inputs.library(params),
            per_leaf((name, tuple(param.shape)) for name, param in params.items()),
            per_leaf((name, param.dtype) for name, param in params.items()),
            frozenset(traced),
        )

    def _plan(
        self, xp: Any, shapes: Leaves[Any], dtypes: Leaves[Any], traced: frozenset[str]
    ) -> Plan:
        leaves = (xp.__name__, tuple(shapes.items()), tuple(dtypes.values()))
        key = (*leaves, traced)
        if key not in self._plans:
            rules = rules_by_leaf(self.base, shapes)
            plan = make_plan(
                xp,
                shapes,
                dtypes,
                rules=rules,
                meta=self.meta,
                partition=self._partition,
                follow=self._following(rules),
                traced=traced,
                recover=self.recover,
            )
            if self.recover and len(plan.averaged) < len(shapes):
                name = next(name for name in shapes if name not in plan.averaged)
                msg = (
                    f"`recover` needs parameters of float32 or wider; got `params[{name!r}]` of "
                    f"{dtypes[name]}, or a state that has its trace."
                )
                raise ValueError(msg)
            inputs.check_blocks("bounds", self.bounds, plan.blocks.families)
            self._plans[key] = plan
            # also as the plan of its own states, which `step` looks for, maybe while it is compiled
            self._plans[*leaves, frozenset(plan.state["trace"])] = plan
        return self._plans[key]

    def _following(self, rules: Leaves[Rule]) -> Following:
        return following(
            rules,
            self.meta,
            self._curvature,
            self.approximation,
            self.discount,
            whole=is_exponential(self._sigma),
        )

    def _plan_of(self, state: State) -> Plan:
        """Return the plan of the params that `state` belongs to, or raise if it is not of this."""
        inputs.check_is_state(state)
        kept = inputs.averages_and_traces(state)
        columns = self._following(rules_by_leaf(self.base, kept)).curvature == "exact"
        shapes = per_leaf((name, tuple(array.shape[columns:])) for name, array in kept.items())
        dtypes = per_leaf((name, array.dtype) for name, array in kept.items())
        plan = self._plan(namespace(state.step), shapes, dtypes, frozenset(state.trace))
        inputs.check_state(state, plan)
        return plan

    def init(self, params: Mapping[str, Array]) -> State:
        """Return the state at the start of a run.

        Parameters
        ----------
        params : mapping of leaf name to array
            Of any one array library, real and floating. Their order is that of the blocks.

        Raises
        ------
        TypeError
            If a parameter is not a dense, real floating array.
        ValueError
            If patterns, blocks or `step_size` do not fit the names or shapes.
        """
        inputs.check_params(params)
        plan = self.plan(params)
        like = next(iter(params.values()))
        parts = {name: _zeros(spec, like, params) for name, spec in plan.state.items()}
        parts["beta"] = self.initial_beta(params)
        if plan.beta_feeding:
            parts["beta_trace"]["beta"] = plan.layout.start(parts["beta"])
        return State(**parts)

    def initial_beta(self, params: Mapping[str, Array]) -> Any:
        """Return beta at the start of a run, values per block; like `init` in all else."""
        plan = self.plan(params)
        blocks, xp = plan.blocks, namespace(next(iter(params.values())))
        keys = blocks.families
        sizes = self.step_size
        if isinstance(sizes, Mapping):
            inputs.check_names("step_size", sizes, keys, "block")
        values = {}
        for key, family in keys.items():
            size = sizes[key] if isinstance(sizes, Mapping) else sizes
            known = at_hand(size)
            size = to_numpy(size).astype(np.float64) if known else cast(size, plan.beta_dtype)
            shape = plan.shapes[key] if blocks.partition.per_leaf else (family.size,)
            if size.shape not in ((), shape):
                msg = f"`step_size[{key!r}]` has shape {size.shape}; expected () or {shape}."
                raise ValueError(msg)
            like = params[key] if blocks.partition.per_leaf else next(iter(params.values()))
            zeros = (
                xp.zeros_like(like, dtype=plan.beta_dtype)
                if blocks.partition.per_leaf
                else filled(like, shape, 0.0, plan.beta_dtype)
            )
            beta: Any = self._sigma.inverse(size)
            if known:  # a number is sent nowhere, an array to the device
                beta = float(beta) if beta.ndim == 0 else beta
            if not isinstance(beta, float):
                beta = xp.asarray(beta, dtype=plan.beta_dtype, device=home(like))
            values[key] = solid(zeros + beta)
        return blocks.from_names(values)

    def step(
        self,
        params: Mapping[str, Array],
        grads: Mapping[str, Any],
        state: State,
        *,
        lr: Any = 1.0,
        hvp: Callable[[Mapping[str, Array]], Mapping[str, Any]] | None = None,
        third: Callable[[Mapping[str, Array], Mapping[str, Array]], Mapping[str, Any]]
        | None = None,
        hessian_diagonal: Mapping[str, Any] | None = None,
        reduce: parts.Reduce | None = None,
        copies: Mapping[str, int] | None = None,
    ) -> tuple[dict[str, Any], State]:
        r"""Return the parameters and the state after one step; sections 2 to 11.

        Parameters
        ----------
        params : mapping of leaf name to array
            The leaves given to `init`. Torch tensors that require a gradient are to be detached,
            or the call made under `torch.no_grad()`: else every step adds to one endless graph.
        grads : mapping of leaf name to array or None
            Gradient of this step's loss at `params`, of their shapes, any floating dtype. A leaf
            with None rests: it and all its state stay as they are.
        state : State
        lr : float, array of shape () or mapping of leaf name to these, default 1.0
            Multiplies the learned step sizes: schedules, warm-up, groups. Where it is 0 the leaf
            stays where it is, and blocks whose leaves all rest do not learn. What is below the
            least normal float32 is 0. A number below 0 by more than rounding is an error; an array
            is not looked at.
        hvp : callable, needed by `curvature="exact"`
            From tangents, a mapping of leaf name to array (k, \*shape), to the Hessian at `params`
            times each of the k tangents; None is allowed for leaves without gradient.
        third : callable, needed by `approximation="full"`
            From two mappings U, V of tangents as above, to the third derivative of the loss along
            each pair: arrays (k, k, \*shape) with entry [i, j] that along U[i] and V[j].
        hessian_diagonal : mapping of leaf name to array, needed by `curvature="diagonal"`
            Diagonal of the Hessian at `params`; None is allowed for leaves without gradient.
        reduce : callable, optional
            Where `params` are one device's parts of leaves that several hold: from a list of
            arrays, sums of products over these parts, to the list of their sums over all devices.
            It is called once a step, once more for `approximation` "2x2" and "full" with curvature,
            and at weight level once more with `skip_nonfinite`. No block but at weight level may
            be a part of a leaf.
        copies : mapping of leaf name to int, optional
            Of how many devices that `reduce` sums over each has the same part of the leaf, so that
            it counts once; 1 for leaves left out.

        Returns
        -------
        params : mapping of leaf name to array, dtypes of `params`
        state : State

        Raises
        ------
        ValueError, TypeError
            If names, shapes or dtypes do not fit, `lr` is negative, or what `curvature` needs is
            not given. Nothing is changed then, nor ever.
        """
        plan, given = self._given(
            params, grads, state, lr, hvp, third, hessian_diagonal, reduce, copies
        )
        _, moved, new_state, finite = parts.make_step(self, plan, state, given)

        def after(param: Any, leaf: Leaf | None) -> Any:
            if leaf is None:
                return param
            new = cast(leaf.param.value, param.dtype)
            return solid(new if finite is None else namespace(finite).where(finite, new, param))

        new_params = {name: after(param, moved[name]) for name, param in params.items()}
        new_state = parts.accepted(state, new_state, finite)
        if self.recover:
            pair = (params, state), (new_params, new_state)
            new_params, new_state = recovered(plan, given.active, *pair)
        return kind_of(params)(
            (name, solid(param)) for name, param in new_params.items()
        ), new_state

    def update(
        self,
        params: Mapping[str, Array],
        grads: Mapping[str, Any],
        state: State,
        *,
        lr: Any = 1.0,
        hvp: Callable[[Mapping[str, Array]], Mapping[str, Any]] | None = None,
        third: Callable[[Mapping[str, Array], Mapping[str, Array]], Mapping[str, Any]]
        | None = None,
        hessian_diagonal: Mapping[str, Any] | None = None,
        reduce: parts.Reduce | None = None,
        copies: Mapping[str, int] | None = None,
    ) -> tuple[Leaves[Any], State]:
        r"""Return what a step takes from the parameters, and the state after it; sections 2 to 11.

        For adapters of frameworks that apply updates themselves: `step` is this and the
        subtraction, so that what it takes is not rounded to the parameters' precision first.

        Parameters
        ----------
        params, grads, state, lr, hvp, third, hessian_diagonal, reduce, copies
            As `step` takes them.

        Returns
        -------
        deltas : mapping of leaf name to array or None
            :math:`w_t - w_{t+1}`, in the leaf's compute dtype; None where there is no gradient.
        state : State

        Raises
        ------
        ValueError, TypeError
            As `step` does; with `recover`, as weights that have diverged cannot be given by what is
            to be taken from them.
        """
        if self.recover:
            msg = (
                "`update` does not go with `recover`: what is taken from weights of 1e90 cannot "
                "bring them back to 1. Call `step`."
            )
            raise ValueError(msg)
        plan, given = self._given(
            params, grads, state, lr, hvp, third, hessian_diagonal, reduce, copies
        )
        deltas, _, new_state, finite = parts.make_step(self, plan, state, given)
        if finite is not None:
            xp = namespace(finite)
            deltas = per_leaf(
                (name, None if delta is None else xp.where(finite, delta, 0.0))
                for name, delta in deltas.items()
            )
        return per_leaf((name, solid(delta)) for name, delta in deltas.items()), parts.accepted(
            state, new_state, finite
        )

    def _given(
        self,
        params: Mapping[str, Any],
        grads: Mapping[str, Any],
        state: State,
        lr: Any,
        hvp: Any,
        third: Any,
        hessian_diagonal: Any,
        reduce: parts.Reduce | None,
        copies: Mapping[str, int] | None,
    ) -> tuple[Plan, parts.Given]:
        """Return the plan and what a step is handed, or raise where these do not fit."""
        plan = self._plan_for(params, state)
        inputs.check_grads(grads, params, plan.shapes)
        inputs.check_curvature(hvp, third, hessian_diagonal, grads, params, plan)
        inputs.check_copies(copies or {}, plan.shapes)
        xp = namespace(state.step)
        lrs = per_leaf(
            (name, lr if isinstance(lr, float) else cast(xp.asarray(lr), plan.dtypes[name]))
            for name, lr in inputs.multipliers(lr, plan.shapes).items()
        )
        across = parts.Across(reduce, copies or {})
        return plan, parts.Given(params, grads, lrs, hvp, third, hessian_diagonal, across)

    def _plan_for(self, params: Mapping[str, Array], state: State) -> Plan:
        """Return the plan of `params`, or raise where they and `state` do not belong together."""
        inputs.check_is_state(state)
        inputs.check_names("params", params, state.count)
        params_in_order = per_leaf((name, params[name]) for name in state.count)
        plan = self.plan(params_in_order, traced=state.trace)
        for name, param in params.items():
            if param.dtype != plan.dtypes[name]:  # those of the state are right, below
                inputs.check_array(f"params[{name!r}]", param)
        inputs.check_library(params_in_order, state)
        inputs.check_state(state, plan)
        return plan

    def project(
        self, params: Mapping[str, Array], state: State, jvp: JVP
    ) -> tuple[dict[str, Any], State]:
        """Return projected parameters, and the state whose traces went through the projection.

        For weights that are held somewhere after a step: clipped to a box, within a norm, pruned
        (section 10). A projection that is made without it leaves in the trace the way to the bound
        that holds a weight, and step sizes may then rise without end.

        Parameters
        ----------
        params : mapping of leaf name to array
            As `step` returned them.
        state : State
        jvp : callable
            From weights and tangents, mappings of leaf name to array in the compute dtype, to the
            projected weights and the derivative of the projection along the tangents, of the same
            shapes. Leaves that stay as they are may be left out of both.
            `metaopt.projection.elementwise` makes it from a projection that acts on every weight by
            itself. With `curvature="exact"` it is called once per block.

        Returns
        -------
        params : mapping of leaf name to array, dtypes of `params`
        state : State

        Raises
        ------
        ValueError, TypeError
            If names or shapes do not fit, or with `approximation="full"` where the third trace is
            kept, for which it would take second derivatives. Nothing is changed, then nor ever.

        Examples
        --------
        >>> import numpy as np
        >>> from metaopt import numerics, projection
        >>> opt = MetaOptimize(base=SGD(), meta=SGD(), step_size=0.1, meta_lr=0.01)
        >>> params = {"w": np.array([0.2, 1.0])}
        >>> state = opt.init(params)
        >>> positive = projection.elementwise(
        ...     lambda w: {"w": numerics.maximum(w["w"], 0.0)}
        ... )
        >>> for _ in range(5):
        ...     params, state = opt.step(params, {"w": np.ones(2)}, state)
        ...     params, state = opt.project(params, state, positive)
        >>> float(params["w"][0])
        0.0
        """
        plan = self._plan_for(params, state)
        if plan.third:
            msg = (
                '`project` does not go with `approximation="full"`, whose third trace would need '
                'second derivatives of the projection; use "2x2".'
            )
            raise ValueError(msg)
        names = list(plan.shapes)
        weights = per_leaf((name, cast(params[name], plan.dtypes[name])) for name in names)
        table = parts.rows(plan, weights, state, names)
        traces = per_leaf((name, leaf.param.first) for name, leaf in table.items())
        for name in plan.averaged:
            kept = has_average(state.count[name])
            traces[name] = namespace(kept).where(kept, traces[name], 0.0)
        new, pushed_traces = pushed(jvp, plan, weights, traces)
        new_params = kind_of(params)(
            (name, solid(cast(new[name], param.dtype)) if name in new else param)
            for name, param in params.items()
        )
        trace = {name: pushed_traces.get(name, array) for name, array in state.trace.items()}
        average = {
            name: new[name] - pushed_traces[name] if name in new else array
            for name, array in state.average.items()
        }
        return new_params, replace(
            state,
            trace=per_leaf((name, solid(array)) for name, array in trace.items()),
            average=per_leaf((name, solid(array)) for name, array in average.items()),
        )

    def meta_step(self, plan: Plan, state: State, z: Any, names: Iterable[str]) -> State:
        """Return `state` after the meta update of a step without curvature.

        For adapters that step the leaves themselves, by `metaopt.leaf.one_pass`: all but the
        leaves' own state (`count`, `slots`, `trace` and `average`) is that of the next step.

        Parameters
        ----------
        plan : Plan
        state : State
        z : blocks
            Meta-gradient: the sums of the leaves' products.
        names : iterable of str
            The leaves that have a gradient.
        """
        z = map_leaves(begun, z, state.meta_count)
        present = parts.blocks_present(plan, names, state.step)
        new, _ = parts.move_blocks(self, plan, state, z, present=present)
        changed = {"step": state.step + 1, "meta_grad": z, **new}
        return replace(state, **{name: map_leaves(solid, part) for name, part in changed.items()})

    def step_sizes(self, state: State) -> dict[str, Any]:
        """Return the learned step sizes sigma(beta) by block, before the multiplier `lr`.

        Returns
        -------
        mapping of block name to array
            "all" for one block; the leaf's name at tensor, node (one per unit) and weight (in its
            shape) level; the group's name for named groups. In the dtype of beta.
        """
        blocks = self._plan_of(state).blocks
        return _solid(blocks.by_name(map_leaves(self._sigma.value, state.beta)))

    def diagnostics(
        self,
        state: State,
        params: Mapping[str, Array],
        *,
        reduce: parts.Reduce | None = None,
        copies: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Return what tells how the adaptation is doing; arrays, nothing is copied to the host.

        Parameters
        ----------
        state : State
        params : mapping of leaf name to array
            The leaves as they are now; those that keep an average have no trace without them.
        reduce, copies : optional
            As for `step`, where several devices hold parts of the leaves.

        Returns
        -------
        dict
            "beta", "meta_grad" and "trace_norm" (root of the sum of squares of a block's trace),
            each a mapping like `step_sizes`; so are, of booleans, "pinned", where a step size is at
            a bound, "collapsed", where it is below a tenth of the largest since the trace started,
            and "asleep", where the last meta-gradient was exactly 0; "restarts" of the trace, by
            block (at weight level by leaf); "skipped", the steps left out; with `recover`,
            "recoveries", how often each block has gone back.

        Raises
        ------
        ValueError, TypeError
            If `state` is not one of this configuration, or `params` are not its leaves.
        """
        plan, xp = self._plan_of(state), namespace(state.step)
        inputs.check_copies(copies or {}, plan.shapes)
        inputs.check_names("params", params, plan.shapes)
        inputs.check_leaves("params", params, inputs.averages_and_traces(state), plan.shapes)
        blocks = plan.blocks
        table = parts.rows(plan, params, state, plan.shapes)
        traces: dict[str, Any] = {name: leaf.param.first for name, leaf in table.items()}
        squares = {
            name: plan.layout.square(trace, name, plan.beta_dtype) for name, trace in traces.items()
        }
        for name in plan.averaged:
            squares[name] = xp.where(has_average(state.count[name]), squares[name], 0.0)
        if not blocks.partition.per_leaf:
            squares = {
                name: square / (copies or {}).get(name, 1) for name, square in squares.items()
            }
        across = parts.Across(reduce, copies or {})
        total, _ = across.sums(plan, plan.layout.gather(squares), None)
        norms = map_leaves(xp.sqrt, total)
        zeros = map_leaves(xp.zeros_like, state.meta_grad)
        sizes = map_leaves(self._sigma.value, state.beta)
        collapsed = map_leaves(
            lambda size, peak: size < COLLAPSE**0.5 * peak, sizes, state.meta_slots[PEAK]
        )
        restarts = (
            {name: state.restarts[index] for index, name in enumerate(blocks.views)}
            if blocks.partition.per_leaf
            else blocks.by_name(state.restarts)
        )
        found = {
            "beta": _solid(blocks.by_name(state.beta)),
            "meta_grad": _solid(blocks.by_name(state.meta_grad)),
            "trace_norm": _solid(blocks.by_name(norms)),
            "pinned": _solid(blocks.by_name(self._pinned(blocks, state.beta))),
            "collapsed": _solid(blocks.by_name(collapsed)),
            "asleep": _solid(blocks.by_name(map_leaves(operator.eq, state.meta_grad, zeros))),
            "restarts": _solid(restarts),
            "skipped": state.skipped,
        }
        if self.recover:
            found["recoveries"] = _solid(blocks.by_name(state.meta_slots[RECOVERIES]))
        return found


def _size(size: Any) -> Any:
    """Return a step size as a float, several as a NumPy array; as it is without a value yet."""
    if not at_hand(size):
        return size
    sizes = to_numpy(size).astype(np.float64)
    return float(sizes) if sizes.ndim == 0 else sizes


def _in_base_role(base: Any) -> Any:
    """Return rules as they act on weights; what was one object is one."""
    if not isinstance(base, Mapping):
        return in_role(base, "base")
    made = {id(rule): in_role(rule, "base") for rule in base.values()}
    return {pattern: made[id(rule)] for pattern, rule in base.items()}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


def _zeros(spec: Any, like: Any, params: Mapping[str, Any], leaf: Any = None) -> Any:
    """Return zeros as specified, beside `like`; what a key says is a leaf's lies like the leaf."""
    if isinstance(spec, Mapping):
        return per_leaf(
            (key, _zeros(part, like, params, params.get(key) if leaf is None else leaf))
            for key, part in spec.items()
        )
    if leaf is None:
        return filled(like, spec.shape, 0, spec.dtype)
    columns = spec.shape[: len(spec.shape) - leaf.ndim]
    if columns + tuple(leaf.shape) != spec.shape:  # a count, or a slot of a shape of its own
        return filled(leaf, spec.shape, 0, spec.dtype)
    zeros = cast(namespace(leaf).zeros_like(leaf), spec.dtype)  # keeps order and sharding
    if columns == ():
        return zeros
    return zeros + filled(leaf, columns + (1,) * leaf.ndim, 0, spec.dtype)


def _solid(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: solid(array) for name, array in arrays.items()}


def _bounds_of_beta(
    sigma: StepSizeMap, bounds: tuple[float, float] | None
) -> tuple[float | None, float | None]:
    """Return the closer of the bounds and the map's own on beta."""
    lo, hi = (
        own if bound == end else _float(sigma.inverse(np.asarray(bound, dtype=np.float64)))
        for bound, end, own in zip(
            sigma.range if bounds is None else bounds, sigma.range, sigma.beta_range, strict=True
        )
    )
    return max(lo, sigma.beta_range[0]), min(hi, sigma.beta_range[1])


def _float(value: Any) -> float:
    return float(value)


def _floats(bounds: Any) -> Any:
    """Return a pair of numbers, or a mapping of them, as floats."""
    if isinstance(bounds, Mapping):
        return {key: _floats(pair) for key, pair in bounds.items()}
    return None if bounds is None else tuple(map(float, bounds))
