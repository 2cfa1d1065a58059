"""MetaOptimize: a base update, and a meta update that tunes its step sizes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from metaopt import inputs, start
from metaopt import step as parts
from metaopt.arrays import (
    Array,
    Leaves,
    cast,
    full,
    kind_of,
    map_leaves,
    namespace,
    per_leaf,
    solid,
)
from metaopt.averages import averaged_params
from metaopt.configuration import Configuration
from metaopt.diagnostics import diagnostics, named
from metaopt.leaf import Leaf
from metaopt.meta import begun
from metaopt.plan import Plan
from metaopt.projection import JVP, pushed
from metaopt.recovery import recovered
from metaopt.state import State

__all__ = ["MetaOptimize", "check_config"]


#: So that errors of the constructor name this class. By a name, as mypy would else give fields that
#: are inherited the type that they take, not that which they hold.
_named = dataclass(frozen=True, kw_only=True, eq=False)


@_named
class MetaOptimize(Configuration):
    r"""Wraps a base update and adapts its step sizes online with a meta update.

    docs/mathematics.md sections 2 to 11. An instance is a configuration; what changes is in the
    :class:`State` that `init` makes and `step` returns. Everything is pure: no input is changed.

    Weights may be edited between steps (clipped, masked, restored) where an average of them is kept
    in place of the trace: without curvature, with "exp" and parameters of float32
    or wider. Elsewhere edits are not followed (section 10).

    Parameters
    ----------
    base : Rule, name of one, or mapping of pattern to these, default AdamW()
        The update of the weights. With a mapping, every leaf takes the rule of the first
        `fnmatch` pattern that matches its name. A name may come with options, as a file holds
        them: `"adamw"`, `{"name": "adamw", "betas": [0.9, 0.99]}`, or in place of the name the
        dotted path of a class of your own. Numbers of a rule may be `metaopt.Learned` (section
        15).
    meta : Rule, or name of one, default FastStart(AdamW())
        The update of the meta-parameters; without weight decay. By name as `base`, `"adam"` or
        `{"name": "fast_start", "rule": "adam"}`.
    step_size : float, or mapping of block name to float or array, default 1e-4
        Initial learned step size :math:`\alpha_0`. A mapping has exactly the keys of `step_sizes`.
    meta_lr : float, default 1e-2
        Step size :math:`\eta` of the meta update. With 0 this is `base` at a fixed step size.
    discount : float or tuple of float, optional
        Discount :math:`\gamma` of future losses, in [0, 1]. Of several, from the least to the
        largest, each has its own traces and moments of `meta`, and beta moves along the direction
        that asks for the largest step size (section 10, *Several horizons*); for `approximation`
        "l". By default (0.99, 1.0), and 1.0 with another `approximation`. These, `meta_lr` and
        `step_size` may be arrays of shape (), and where JAX traces them their values are not
        looked at.
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
    held_out : bool, default False
        Make meta-gradients with the gradients of a held-out batch that a step is given as
        `meta_grads`, and not with those of training; in steps without them the step sizes rest
        (section 2, *Another loss*). For `approximation` "l".
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
    >>> import numpy as np, metaopt as mo
    >>> opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), step_size=0.1, meta_lr=0.01)
    >>> params = {"w": np.array([3.0, -2.0])}
    >>> state = opt.init(params)
    >>> for _ in range(100):
    ...     grads = {"w": params["w"]}  # of half the squared norm
    ...     params, state = opt.step(params, grads, state)
    >>> bool(abs(params["w"]).max() < 1e-3)
    True
    """

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
        return start.state(self, self.plan(params), params)

    def initial_beta(self, params: Mapping[str, Array]) -> Any:
        """Return beta at the start of a run, values per block; like `init` in all else."""
        return start.beta(self, self.plan(params), params)

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
        unit_steps: Mapping[str, Any] | None = None,
        meta_grads: Mapping[str, Any] | None = None,
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
        unit_steps : mapping of leaf name to array, needed by base `Opaque`
            What the optimizer that `Opaque` stands for would take from the weights in this step at
            step size 1, weight decay and all; of its leaves alone. Where a leaf has no gradient it
            may be None, or left out.
        meta_grads : mapping of leaf name to array or None, for `held_out` alone
            Gradient at `params` of the loss that step sizes are to lower, such as that of a
            held-out batch: meta-gradients are made with it. Leaves that are None or left out add
            nothing, nor do those that rest. Without it the step sizes rest in this step, and
            traces go on.
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
            If names, shapes or dtypes do not fit, `lr` is negative, what `curvature` needs is not
            given, or `meta_grads` are without `held_out`. Nothing is changed then, nor ever.
        """
        derivatives, across = (hvp, third, hessian_diagonal), parts.Across(reduce, copies or {})
        plan, given = self._given(
            params, grads, state, lr, derivatives, unit_steps, meta_grads, across
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
            active = given.active
            moves = {name: active[name] for name in given.present}
            new_params, new_state = recovered(plan, moves, *pair)
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
        unit_steps: Mapping[str, Any] | None = None,
        meta_grads: Mapping[str, Any] | None = None,
        reduce: parts.Reduce | None = None,
        copies: Mapping[str, int] | None = None,
    ) -> tuple[Leaves[Any], State]:
        r"""Return what a step takes from the parameters, and the state after it; sections 2 to 11.

        For adapters of frameworks that apply updates themselves: `step` is this and the
        subtraction, so that what it takes is not rounded to the parameters' precision first.

        Parameters
        ----------
        params, grads, state, lr, hvp, third, hessian_diagonal
            As `step` takes them.
        unit_steps, meta_grads, reduce, copies
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
        derivatives, across = (hvp, third, hessian_diagonal), parts.Across(reduce, copies or {})
        plan, given = self._given(
            params, grads, state, lr, derivatives, unit_steps, meta_grads, across
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
        derivatives: tuple[Any, Any, Any],
        unit_steps: Mapping[str, Any] | None,
        meta_grads: Mapping[str, Any] | None,
        across: parts.Across,
    ) -> tuple[Plan, parts.Given]:
        """Return the plan and what a step is handed, or raise where these do not fit."""
        plan = self._plan_for(params, state)
        inputs.check_grads(grads, params, plan.shapes)
        inputs.check_curvature(*derivatives, grads, params, plan)
        inputs.check_unit_steps(unit_steps, grads, params, plan)
        inputs.check_meta_grads(meta_grads, params, plan.shapes, held_out=self.held_out)
        inputs.check_copies(across.copies, plan.shapes)
        if across.reduce is not None:
            inputs.check_callable("reduce", across.reduce)
        xp = namespace(state.step)
        lrs = per_leaf(
            (name, lr if isinstance(lr, float) else cast(xp.asarray(lr), plan.dtypes[name]))
            for name, lr in inputs.multipliers(lr, plan.shapes).items()
        )
        deciding = (meta_grads or {}) if self.held_out else grads
        return plan, parts.Given(
            params, grads, lrs, *derivatives, unit_steps or {}, deciding, across
        )

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
        >>> import numpy as np, metaopt as mo
        >>> from metaopt import numerics, projection
        >>> opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), step_size=0.1, meta_lr=0.01)
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
        inputs.check_callable("jvp", jvp)
        plan = self._plan_for(params, state)
        if plan.third:
            msg = (
                '`project` does not go with `approximation="full"`, whose third trace would need '
                'second derivatives of the projection; use "2x2".'
            )
            raise ValueError(msg)
        weights = per_leaf((name, cast(params[name], plan.dtypes[name])) for name in plan.shapes)
        traces = parts.traces_now(plan, weights, state)
        new, pushed_traces = pushed(jvp, plan, weights, traces)
        learned = {
            name: part
            | {"trace": _pushed_again(jvp, _with_traces_of(plan, name), weights, part["trace"])}
            for name, part in state.learned.items()
        }
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
            learned=per_leaf(learned.items()) if learned else state.learned,
        )

    def averaged_params(self, state: State, params: Mapping[str, Array]) -> dict[str, Any]:
        r"""Return weights averaged over the latest steps, better to evaluate than the last ones.

        They come with the trace of the shortest horizon, :math:`w - h` (section 10): a moving
        average of decay :math:`\gamma (1 - \kappa \alpha)`, some :math:`1 / (1 - \gamma)` steps
        long. Of leaves whose rule is `metaopt.Averaged` they are its own. Training goes on from
        `params`.

        Parameters
        ----------
        state : State
        params : mapping of leaf name to array
            As `step` returned them.

        Returns
        -------
        params : mapping of leaf name to array, dtypes of `params`
            A leaf that has made no step is as it is.

        Raises
        ------
        ValueError
            If a leaf has no average of its own, and there is no `discount` below 1, or with
            curvature or another `sigma` than "exp", where the traces are no distances to averages;
            if names or shapes do not fit.
        TypeError
            If `state` is none, or arrays are of another library.

        Examples
        --------
        >>> import numpy as np, metaopt as mo
        >>> opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), step_size=0.5, discount=(0.5, 1.0))
        >>> params = {"w": np.array([1.0])}
        >>> params, state = opt.step(params, {"w": np.array([1.0])}, opt.init(params))
        >>> params, state = opt.step(params, {"w": np.array([-1.0])}, state)
        >>> params["w"].tolist(), opt.averaged_params(state, params)["w"].tolist()
        ([1.0], [0.75])
        """
        return averaged_params(self, self._plan_for(params, state), params, state)

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
        blocks = self.plan_of(state).blocks
        return named(blocks, map_leaves(self.sigma_map.value, state.beta))

    def hyperparameters(self, state: State) -> dict[str, dict[str, Any]]:
        """Return the numbers of rules that are learned, `metaopt.Learned`, by name and block.

        Returns
        -------
        mapping of name to mapping of block name to array
            The name is where the number stands, as "weight_decay" or "betas[0]"; where rules of
            several patterns have different ones there, after the pattern, as
            `"*.bias: weight_decay"`. Values are as `step_sizes` has them. Empty where nothing is
            learned but step sizes.
        """
        plan = self.plan_of(state)

        return {
            name: named(plan.learned[name].blocks, config.values_of(state.learned[name]["beta"]))
            for name, config in self.learned.items()
        }

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
            "recoveries", how often each block has gone back. Of several discounts "meta_grad" and
            "trace_norm" have a leading axis of these, as has "decided", in how many meta updates
            the direction of each was the least; equal ones count for each. With `metaopt.Learned`
            numbers, "learned", by name the like of each.

        Raises
        ------
        ValueError, TypeError
            If `state` is not one of this configuration, or `params` are not its leaves.
        """
        return diagnostics(self, state, params, parts.Across(reduce, copies or {}))


def _with_traces_of(plan: Plan, name: str) -> Plan:
    """Return the plan of all leaves with traces as a learned number has them."""
    return replace(plan, layout=plan.learned[name].layout, horizons=())


def _pushed_again(jvp: JVP, plan: Plan, weights: Leaves[Any], traces: Leaves[Any]) -> Leaves[Any]:
    """Return the traces of a learned number, pushed through a projection of all weights."""
    columns = plan.layout.leading

    def tangent(name: str, weight: Any) -> Any:
        if name in traces:
            return traces[name]
        return full(weight, columns + tuple(weight.shape), 0.0)

    tangents = per_leaf((name, tangent(name, weight)) for name, weight in weights.items())
    _, found = pushed(jvp, plan, weights, tangents)
    return per_leaf((name, solid(found.get(name, trace))) for name, trace in traces.items())


def check_config(config: Any) -> None:
    """Raise TypeError unless `config`, of which an adapter is to make an optimizer, is one."""
    if not isinstance(config, MetaOptimize):
        msg = f"`config` must be a metaopt.MetaOptimize, such as a preset; got {config!r}."
        raise TypeError(msg)
