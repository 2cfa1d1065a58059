"""What a program computes of one leaf's own numbers, computed on the vectors of all leaves.

A state has the counts of all leaves in one vector, and the step sizes of all blocks, and each leaf
takes its own entry. Left so, XLA on a CPU makes loops of their own for the bias corrections of
every leaf. And it compiles equal loops once, but what an update makes of two leaves of one shape is
no equal loops, as the entries stand in different places. So what is computed of an entry alone is
computed here of the whole vectors, and what comes of it is put into arrays of one entry.

Nothing here knows what is computed; docs/jax.md says what it saves.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxpr_as_fun

__all__ = ["on_vectors"]

#: Entries in use below which vectors stay as they are.
FEWEST = 8
#: Parts that an array is cut into at a time.
PARTS = 8


class Entry(NamedTuple):
    """What a variable is that is computed of one entry of vectors.

    Parameters
    ----------
    kind : int
        Variables of one kind are the same function of the same vectors.
    place : int
        Where the entry stands.
    vectors : tuple of variables
    equation : JaxprEqn
        What the variable is the outcome of.
    """

    kind: int
    place: int
    vectors: tuple[Var, ...]
    equation: JaxprEqn


Entries = dict[Var, Entry]


def _aval(v: Any) -> Any:
    """Return shape and dtype of a variable, which JAX's types do not promise."""
    return v.aval


def on_vectors(jaxpr: Jaxpr, count: Var) -> tuple[Jaxpr, dict[Var, tuple[Var, ...]]]:
    """Return a program with the same outputs, and the variables that it has in place of entries.

    Parameters
    ----------
    jaxpr : Jaxpr
    count : variable, shape (), integer
        An input that is never -1, which XLA does not know.

    Returns
    -------
    jaxpr : Jaxpr
    entries : mapping of variable to variables
        The vectors that each is computed of.
    """
    entries = _entries(jaxpr.eqns)
    groups = _groups(jaxpr, entries)
    equations, renamed = list[JaxprEqn](), dict[Var, Var]()
    made: dict[Var, tuple[Var, ...]] = {}

    def name(v: Any) -> Any:
        return renamed.get(v, v) if isinstance(v, Var) else v

    def function(v: Var) -> Callable[..., Any]:
        return _function(jaxpr, entries, v)

    for equation in jaxpr.eqns:
        if _stacks_all(equation, entries):
            first: Any = equation.invars[0]
            shape = _aval(equation.outvars[0]).shape
            own, found = _spliced(partial(_all, function, first, shape), entries[first].vectors)
            equations += own
            renamed[equation.outvars[0]] = found[0]
            continue
        for v in equation.invars:
            if _is_entry(v, entries) and (group := groups.pop(entries[v].vectors, [])):
                vectors = entries[group[0]].vectors
                own, found = _spliced(partial(_apart, entries, function, group), (count, *vectors))
                equations += own
                renamed |= zip(group, found, strict=True)
                made |= dict.fromkeys(found, vectors)
        equations.append(equation.replace(invars=[name(v) for v in equation.invars]))
    return jaxpr.replace(eqns=equations, outvars=[name(v) for v in jaxpr.outvars]), made


def _is_entry(v: Any, entries: Entries) -> TypeGuard[Var]:
    return isinstance(v, Var) and v in entries


def _entries(equations: Sequence[JaxprEqn]) -> Entries:
    """Return the variables that are computed of one entry of vectors."""
    entries: Entries = {}
    kinds: dict[Any, int] = {}
    for equation in equations:
        read = [v for v in equation.invars if isinstance(v, Var)]
        if len(equation.outvars) != 1 or _aval(equation.outvars[0]).size != 1 or not read:
            continue
        key: Any
        if equation.primitive.name == "slice" and _aval(read[0]).ndim == 1 < _aval(read[0]).size:
            (place,) = equation.params["start_indices"]
            vectors, key = tuple(read), read[0]
        elif all(v in entries for v in read) and len({entries[v].place for v in read}) == 1:
            place = entries[read[0]].place
            vectors = tuple(dict.fromkeys(w for v in read for w in entries[v].vectors))
            inputs = (
                entries[v].kind if isinstance(v, Var) else (_aval(v), np.asarray(v.val).tobytes())
                for v in equation.invars
            )
            key = (equation.primitive, tuple(equation.params.items()), *inputs)
        else:
            continue
        try:
            kind = kinds.setdefault(key, len(kinds))
        except TypeError:  # a parameter that cannot be compared
            continue
        entries[equation.outvars[0]] = Entry(kind, place, vectors, equation)
    return entries


def _groups(jaxpr: Jaxpr, entries: Entries) -> dict[tuple[Var, ...], list[Var]]:
    """Return by vectors the entries that are read where more is computed than of one entry.

    Those of which there are enough, and whose bits go into integers.
    """
    found = defaultdict[int, dict[Var, None]](dict)

    def take(v: Any) -> None:
        if _is_entry(v, entries) and (_aval(v).dtype == bool or _aval(v).dtype.itemsize == 4):
            found[entries[v].kind][v] = None

    for equation in jaxpr.eqns:
        if equation.outvars[0] not in entries and not _stacks_all(equation, entries):
            for v in equation.invars:
                take(v)
    for v in jaxpr.outvars:
        take(v)
    groups = defaultdict[tuple[Var, ...], list[Var]](list)
    for variables in found.values():
        if len({entries[v].place for v in variables}) >= FEWEST:
            groups[entries[next(iter(variables))].vectors] += variables
    return groups


def _stacks_all(equation: JaxprEqn, entries: Entries) -> bool:
    """Say whether an equation puts all entries of one kind into a vector, in their order."""
    if equation.primitive.name not in ("stack", "concatenate"):
        return False
    read = [entries[v] for v in equation.invars if _is_entry(v, entries)]
    if not FEWEST <= len(read) == len(equation.invars) or _aval(equation.outvars[0]).ndim > 1:
        return False
    sizes = {_aval(v).size for v in read[0].vectors}
    places = [(entry.kind, entry.place) for entry in read]
    return sizes == {len(read)} and places == [(read[0].kind, i) for i in range(len(read))]


def _function(jaxpr: Jaxpr, entries: Entries, variable: Var) -> Callable[..., Any]:
    """Return the function of one entry of each vector, shape (1,), that a variable is."""
    equations: dict[Var, JaxprEqn] = {}
    inputs: dict[Var, Var] = {}

    def follow(v: Var) -> None:
        entry = entries[v]
        if entry.equation.primitive.name == "slice" and entry.equation.invars[0] in entry.vectors:
            inputs[entry.vectors[0]] = v
        elif v not in equations:
            for read in entry.equation.invars:
                if isinstance(read, Var):
                    follow(read)
            equations[v] = entry.equation

    follow(variable)
    invars = [inputs[v] for v in entries[variable].vectors]
    whole = jaxpr.replace(
        constvars=[], invars=invars, outvars=[variable], eqns=list(equations.values())
    )
    return lambda *parts: jaxpr_as_fun(ClosedJaxpr(whole, ()))(*parts)[0]


def _on_all(function: Callable[..., Any], vectors: Sequence[Any]) -> Any:
    """Return a function of one entry of each vector, of all their entries, as one vector."""
    fewest = min(vector.size for vector in vectors)
    columns = [vector[:fewest].reshape(fewest, 1) for vector in vectors]
    return jax.vmap(function)(*columns).reshape(fewest)


def _all(function: Any, variable: Var, shape: Any, *vectors: Any) -> list[Any]:
    """Return what stacking all entries of a variable's kind makes."""
    return [_on_all(function(variable), vectors).reshape(shape)]


def _apart(
    entries: Entries, function: Any, group: Sequence[Var], count: Any, *vectors: Any
) -> list[Any]:
    """Return the values of entries, each cut out of an array of its own.

    Dividing by a number that is 1, which XLA does not know, keeps it from cutting them out of the
    vectors in the very loops that read them: cutting it repeats there, dividing it does not.
    """
    kinds = dict[int, int]()
    columns = []
    for v in group:
        if entries[v].kind not in kinds:
            kinds[entries[v].kind] = len(kinds)
            column = _on_all(function(v), vectors)
            columns.append(
                column.astype("int32")
                if column.dtype == bool
                else jax.lax.bitcast_convert_type(column, jnp.int32)
            )
    one = jnp.where(count == -1, 2, 1).astype("int32")
    rows = _rows(jnp.stack(columns, axis=1), one)

    def value(v: Var) -> Any:
        entry = entries[v]
        number = rows[entry.place][kinds[entry.kind]]
        if _aval(v).dtype == bool:
            return (number != 0).reshape(_aval(v).shape)
        return jax.lax.bitcast_convert_type(number, _aval(v).dtype).reshape(_aval(v).shape)

    return [value(v) for v in group]


def _rows(table: Any, one: Any) -> list[Any]:
    """Return the rows of a table, cut out in parts of parts, so that few loops differ."""
    size = 1
    while size < len(table):
        size *= PARTS
    parts, rest = [jnp.pad(table, ((0, size - len(table)), (0, 0)))], len(table)
    while size > 1:
        size //= PARTS
        parts = [
            jax.lax.div(part[start : start + size], jnp.broadcast_to(one, (size, part.shape[1])))
            for part in parts
            for start in range(0, size * PARTS, size)
        ][: -(-rest // size)]
    return [part.reshape(-1) for part in parts]


def _spliced(
    function: Callable[..., Any], variables: Sequence[Var]
) -> tuple[list[JaxprEqn], list[Var]]:
    """Return the equations of a function of variables, and its outputs."""
    inputs = [jax.ShapeDtypeStruct(_aval(v).shape, _aval(v).dtype) for v in variables]
    jaxpr = jax.make_jaxpr(function)(*inputs).jaxpr
    own = dict(zip(jaxpr.invars, variables, strict=True))

    def name(v: Any) -> Any:
        return own.get(v, v) if isinstance(v, Var) else v

    equations = [e.replace(invars=[name(v) for v in e.invars]) for e in jaxpr.eqns]
    return equations, [name(v) for v in jaxpr.outvars]
