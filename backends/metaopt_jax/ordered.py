"""The order in which XLA is to compute an update on a CPU, so that it copies nothing.

There XLA makes one loop for every array that comes out, and may let a loop overwrite an array only
where it can see that no later loop reads the old one; else it copies. An order that needs no copies
is: first all that reads old moments, which are replaced; then the traces, from the new moments;
then the steps, from the new moments once more, for the caller to add to the parameters.

Nothing here knows what is computed: the stages are cut out of the jaxpr of the whole update.
docs/jax.md says what it saves.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxpr_as_fun

from metaopt_jax.scalars import on_vectors
from metaopt_jax.state import MetaOptimizeState

__all__ = ["helps", "in_order"]

Update = Callable[[Any, MetaOptimizeState, Any], tuple[Any, MetaOptimizeState]]
Values = dict[Var, Any]


def helps(params: Iterable[Any]) -> bool:
    """Say whether the order matters: for what is being compiled for one CPU."""
    return jax.default_backend() == "cpu" and all(
        isinstance(param, jax.core.Tracer) and jax.typeof(param).sharding.mesh.empty
        for param in params
    )


def in_order(
    update: Update, grads: Any, state: MetaOptimizeState, params: Any, *, vectors: bool
) -> Any:
    """Return `update(grads, state, params)`, in an order in which XLA copies nothing.

    With `vectors`, leaves' own numbers are computed on vectors: see `metaopt_jax.scalars`.
    An update with effects, such as a rule that prints, keeps the order that it has.
    """
    tree: Any  # JAX has no static type for it
    inputs, tree = jax.tree.flatten((grads, state, params))
    closed, shape = jax.make_jaxpr(lambda *flat: update(*tree.unflatten(flat)), return_shape=True)(
        *inputs
    )
    outcome: Any = jax.tree.structure(shape)
    if closed.jaxpr.effects:
        return outcome.unflatten(jaxpr_as_fun(closed)(*inputs))
    _, before, _ = tree.unflatten(closed.jaxpr.invars)
    jaxpr, entries = _each_once(closed.jaxpr), dict[Var, tuple[Var, ...]]()
    if vectors:
        jaxpr, entries = on_vectors(jaxpr, before.count)
    outputs = outcome.unflatten(jaxpr.outvars)
    steps, after = outputs
    traces, moments = _variables(after.trace_or_average), _replaceable(jaxpr, before, after, steps)
    late = {*traces, *_variables(after.slots)} - moments

    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *inputs], strict=True))
    counts = [v for v, vectors in entries.items() if vectors == (before.leaf_counts,)]
    early = [v for v in _variables(after) if v not in late]
    values = _finished(jaxpr, values, [*early, *counts])
    values = _finished(jaxpr, values, traces, _variables(outputs))
    never = values[before.count] == -1  # no update has this number, but that only we know
    sizes = _variables((before.beta, after.beta, after.learned_step_sizes))
    tied = values | _after(values, traces, never, sizes)
    rest = [v for v in _variables(outputs) if v not in values]
    values |= dict(zip(rest, _computed(jaxpr, tied, rest), strict=True))
    return jax.tree.map(lambda v: values[v] if isinstance(v, Var) else v.val, outputs)


def _each_once(jaxpr: Jaxpr) -> Jaxpr:
    """Return a jaxpr that computes nothing twice: a new moment, say, that a trace takes again."""
    first, found, equations = dict[Var, Var](), dict[Any, list[Var]](), []

    def renamed(v: Any) -> Any:
        return first.get(v, v) if isinstance(v, Var) else v

    for equation in jaxpr.eqns:
        equation = equation.replace(invars=[renamed(v) for v in equation.invars])
        read = tuple(
            v if isinstance(v, Var) else (v.aval, np.asarray(v.val).tobytes())
            for v in equation.invars
        )
        key = (equation.primitive, read, tuple(equation.params.items()))
        earlier = equation.outvars
        with contextlib.suppress(TypeError):  # of a parameter that cannot be compared
            if all(type(v) is Var for v in earlier):  # some may be read nowhere
                earlier = found.setdefault(key, earlier)
        if earlier is equation.outvars:
            equations.append(equation)
        else:
            first.update(zip(equation.outvars, earlier, strict=True))
    return jaxpr.replace(eqns=equations, outvars=[renamed(v) for v in jaxpr.outvars])


def _variables(tree: Any) -> list[Var]:
    """Return the variables of a tree of a jaxpr's inputs or outputs; some may be constants."""
    return [v for v in jax.tree.leaves(tree) if isinstance(v, Var)]


def _replaceable(
    jaxpr: Jaxpr, before: MetaOptimizeState, after: MetaOptimizeState, steps: Any
) -> set[Var]:
    """Return the new moments that may overwrite the old: traces and steps read but the new."""
    pairs = zip(jax.tree.leaves(before.slots), jax.tree.leaves(after.slots), strict=True)
    old = {new: old for old, new in pairs if isinstance(new, Var)}
    found = set(old)
    while True:
        _, read = _path(jaxpr, found, [*_variables(after.trace_or_average), *_variables(steps)])
        still = {new for new in found if old[new] not in read}
        if still == found:
            return found
        found = still


def _path(jaxpr: Jaxpr, known: Iterable[Var], wanted: list[Var]) -> tuple[list[JaxprEqn], set[Var]]:
    """Return the equations that lead from known variables to wanted ones, and what they read."""
    known, equations, read = set(known), [], set[Var]()
    missing = set(wanted) - known
    for equation in reversed(jaxpr.eqns):
        if not missing.isdisjoint(equation.outvars):
            equations.append(equation)
            read.update(_variables(equation.invars))
            missing.update(v for v in _variables(equation.invars) if v not in known)
    return equations[::-1], read


def _computed(jaxpr: Jaxpr, values: Values, wanted: list[Var]) -> list[Any]:
    """Return the values of wanted variables, from values of others."""
    equations, _ = _path(jaxpr, values, wanted)
    part = jaxpr.replace(constvars=[], invars=list(values), outvars=wanted, eqns=equations)
    return jaxpr_as_fun(ClosedJaxpr(part, ()))(*values.values())


def _finished(
    jaxpr: Jaxpr, values: Values, wanted: list[Var], rest: list[Var] | None = None
) -> Values:
    """Return values and wanted ones, and see to it that none of them is computed again.

    With `rest`, those alone that it is still to be computed of: each one takes time to compile.
    """
    values = values | dict(zip(wanted, _computed(jaxpr, values, wanted), strict=True))
    read = set(values) if rest is None else _path(jaxpr, values, rest)[1].union(wanted)
    held = {v: value for v, value in values.items() if v in read}
    return values | dict(zip(held, jax.lax.optimization_barrier(list(held.values())), strict=True))


def _after(values: Values, traces: list[Var], never: Any, variables: list[Var]) -> Values:
    """Return the values of `variables` as ones that XLA takes to depend on the traces.

    When XLA looks for what to copy, the barriers are gone; what shows it then that the traces come
    before the steps is that the steps read something that was computed from the traces.
    """
    entries = [
        jax.lax.slice(values[v], (0,) * values[v].ndim, (1,) * values[v].ndim).reshape(())
        for v in traces
        if values[v].size
    ]
    changed = never & jnp.any(jnp.stack(entries) > 0.0) if entries else never
    return {v: jnp.where(changed, jnp.zeros_like(values[v]), values[v]) for v in variables}
