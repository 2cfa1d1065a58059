"""From the library's configurations and states to the oracle's: the one place that knows both."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

import metaopt as mo
from metaopt.arrays import map_leaves, to_numpy
from metaopt.jets import Jet
from metaopt_conformance.oracle import Config, Matrix, State
from metaopt_conformance.table import sigma_of, update_of
from metaopt_conformance.updates import Vector

__all__ = [
    "Shapes",
    "block_index",
    "config_of",
    "contents",
    "dense",
    "expected",
    "flat",
    "from_dense",
    "slices",
    "traces",
    "tree",
    "values_of",
    "with_traces",
]

Shapes = Mapping[str, tuple[int, ...]]


def slices(shapes: Shapes) -> dict[str, slice]:
    """Return where each leaf lies in the vector of all weights."""
    stops = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    starts = [0, *stops[:-1]]
    return {
        name: slice(int(start), int(stop))
        for name, start, stop in zip(shapes, starts, stops, strict=True)
    }


def tree(vector: Vector, shapes: Shapes) -> dict[str, Vector]:
    """Return a vector of all weights, or (..., weights), as arrays by leaf."""
    return {
        name: np.reshape(vector[..., at], (*vector.shape[:-1], *shapes[name]))
        for name, at in slices(shapes).items()
    }


def flat(arrays: Mapping[str, Any], shapes: Shapes, to_numpy: Any = to_numpy) -> Vector:
    """Return arrays by leaf as one in float64, (..., weights); the inverse of `tree`."""
    parts = []
    for name, shape in shapes.items():
        array = to_numpy(arrays[name]).astype(np.float64)
        parts.append(array.reshape(*array.shape[: array.ndim - len(shape)], -1))
    return np.concatenate(parts, axis=-1)


def contents(tree: Any, to_numpy: Any = to_numpy) -> Any:
    """Return names, order, dtypes, shapes and bits of all arrays, to compare with `==`.

    Of states, jets, mappings and sequences of arrays, numbers and None.
    """
    if isinstance(tree, mo.State):
        return contents(vars(tree), to_numpy)
    if isinstance(tree, Jet):
        return contents([tree.value, tree.first, tree.second], to_numpy)
    if isinstance(tree, Mapping):
        return [(name, contents(value, to_numpy)) for name, value in tree.items()]
    if isinstance(tree, list | tuple):
        return [contents(value, to_numpy) for value in tree]
    if tree is None or isinstance(tree, float):
        return tree
    array = to_numpy(tree)
    return (array.dtype.str, array.shape, array.tobytes())


def values_of(state: mo.State) -> dict[str, Any]:
    """Return the parts of a state but for what rounding took from beta, which is rounding alone."""
    slots = {slot: v for slot, v in state.meta_slots.items() if slot != "compensation"}
    return vars(state) | {"meta_slots": slots}


def block_index(blocks: Any, shapes: Shapes) -> tuple[Any, list[str]]:
    """Return the block of every weight, numbered by first appearance, and their names (section 9).

    Blocks of one leaf have its name in common.
    """
    axis = 0 if blocks == "node" else getattr(blocks, "axis", None)
    index: list[int] = []
    seen: dict[tuple[str, int], int] = {}
    for name, shape in shapes.items():
        if blocks == "scalar":
            keys = np.full(shape, 0)
            label = "all"
        elif blocks == "weight":
            keys, label = np.arange(int(np.prod(shape))).reshape(shape), name
        elif axis is not None and len(shape) > 1:
            keys, label = np.indices(shape)[axis], name
        elif isinstance(blocks, Mapping):
            keys = np.full(shape, 0)
            label = next(group for group, patterns in blocks.items() if _matches(name, patterns))
        else:
            keys, label = np.full(shape, 0), name
        for key in keys.reshape(-1):
            index.append(seen.setdefault((label, int(key)), len(seen)))
    return np.array(index), [label for label, _ in seen]


def _bounds(bounds: Any, names: list[str]) -> tuple[Vector, Vector]:
    """Return least and largest step sizes by block; without a bound they are infinite."""
    free = (-np.inf, np.inf)
    pairs = bounds if isinstance(bounds, Mapping) else dict.fromkeys(names, bounds)
    lo, hi = np.array([pairs.get(name) or free for name in names]).T
    return lo, hi


def _matches(name: str, patterns: Any) -> bool:
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def config_of(opt: mo.MetaOptimize, shapes: Shapes, largest: float = 2.0**511) -> Config:
    """Return a configuration of the library as the oracle's."""
    block_of, names = block_index(opt.blocks, shapes)
    sizes = opt.step_size

    def rule_of(name: str) -> Any:
        if not isinstance(opt.base, Mapping):
            return opt.base
        return next(rule for pattern, rule in opt.base.items() if fnmatchcase(name, pattern))

    kind: Any = opt.curvature
    return Config(
        base=tuple((update_of(rule_of(name)), at) for name, at in slices(shapes).items()),
        meta=update_of(opt.meta),
        block_of=block_of,
        step_size=np.concatenate([np.ravel(sizes[name]) for name in dict.fromkeys(names)])
        if isinstance(sizes, Mapping)
        else np.full(len(names), sizes, dtype=np.float64),
        meta_lr=opt.meta_lr,
        discount=opt.discount,
        sigma=sigma_of(opt.sigma),
        bounds=None if opt.bounds is None else _bounds(opt.bounds, names),
        approximation=opt.approximation,
        curvature=getattr(kind, "kind", kind),
        rectified=getattr(kind, "rectified", False),
        meta_first=opt.meta_first,
        skip_nonfinite=opt.skip_nonfinite,
        largest=largest,
    )


def dense(
    params: Mapping[str, Any],
    state: mo.State,
    config: Config,
    shapes: Shapes,
    to_numpy: Any = to_numpy,
) -> dict[str, Vector]:
    """Return params and state under the oracle's names, each as far as the library keeps it.

    "m", "v", "M" and "V" come by leaf ("m/weight"), for the leaves that have the slot or its trace;
    `expected` returns the oracle's value of a key. Nothing here is the state's own memory.
    """
    m, block_of = config.blocks, config.block_of
    of_weights = traces(params, state, to_numpy)
    state = mo.State(
        **{
            name: map_leaves(lambda array: np.array(to_numpy(array)), value)
            for name, value in vars(state).items()
        }
    )
    found: dict[str, Any] = {
        "step": state.step,
        "skipped": state.skipped,
        "w": flat(params, shapes, to_numpy),
        "beta": _blocks(state.beta),
        "z": _blocks(state.meta_grad),
        "count": np.concatenate(
            [np.full(int(np.prod(shapes[name])), state.count[name]) for name in shapes]
        ),
        "H": np.concatenate(
            [
                _columns(of_weights[name], shapes[name], block_of[at], m)
                for name, at in slices(shapes).items()
            ]
        ),
    }
    for slot, values, trace in (("exp_avg", "m", "M"), ("exp_avg_sq", "v", "V")):
        for name, at in slices(shapes).items():
            if slot in state.slots[name]:
                found[f"{values}/{name}"] = state.slots[name][slot].reshape(-1)
            if slot in state.slot_traces.get(name, {}):
                found[f"{trace}/{name}"] = _columns(
                    state.slot_traces[name][slot], shapes[name], block_of[at], m
                )
    if "exp_avg" in state.meta_slots:
        found["meta_m"] = _blocks(state.meta_slots["exp_avg"])
    if "exp_avg" in state.beta_trace:
        found["Bm"] = _matrix(state.beta_trace["exp_avg"], m)
    if "exp_avg_rms" in state.meta_slots:
        root = _blocks(state.meta_slots["exp_avg_rms"]).astype(np.float64)
        found["meta_v"] = root**2
        if "exp_avg_rms" in state.beta_trace:
            found["Bv"] = 2.0 * root[:, None] * _matrix(state.beta_trace["exp_avg_rms"], m)
    for slot in ("against", "peak"):
        if slot in state.meta_slots:
            found[slot] = _blocks(state.meta_slots[slot])
    if state.third_trace:
        thirds = [state.third_trace[name].reshape(m, m, -1).transpose(2, 1, 0) for name in shapes]
        found["Z"] = np.concatenate(thirds)
    if "beta" in state.beta_trace:
        found["B"] = _matrix(state.beta_trace["beta"], m)
    found["meta_count"] = _blocks(state.meta_count)
    if len(state.restarts) == m:
        found["restarts"] = state.restarts
    else:  # by leaf, of which every weight is a block
        found |= {
            f"restarts/{name}": count for name, count in zip(shapes, state.restarts, strict=True)
        }
    return found


def traces(
    params: Mapping[str, Any], state: mo.State, to_numpy: Any = to_numpy
) -> dict[str, Vector]:
    """Return the traces of the weights; where an average is kept they are the distance to it."""

    def trace(name: str) -> Vector:
        if name in state.trace:
            return np.array(to_numpy(state.trace[name]))
        weights, average = (
            to_numpy(array).astype(np.float64) for array in (params[name], state.average[name])
        )
        return np.where(to_numpy(state.count[name]) > 0, weights - average, 0.0)

    return {name: trace(name) for name in state.count}


def with_traces(
    params: Mapping[str, Any],
    state: mo.State,
    traces: Mapping[str, Any],
    asarray: Any = np.asarray,
    to_numpy: Any = to_numpy,
) -> mo.State:
    """Return the state with these traces of some leaves, in its own dtypes: see `traces`."""
    own, averages = state.trace.copy(), state.average.copy()
    for name, trace in traces.items():
        if name in own:
            own[name] = asarray(np.asarray(trace, to_numpy(own[name]).dtype))
        else:
            average = to_numpy(params[name]).astype(np.float64) - trace
            averages[name] = asarray(average.astype(to_numpy(averages[name]).dtype))
    return replace(state, trace=own, average=averages)


def expected(state: State, key: str, shapes: Shapes) -> Any:
    """Return the oracle's value of an entry of `dense`."""
    name, _, leaf = key.partition("/")
    value = getattr(state, name)
    if not leaf:
        return value
    own = value[slices(shapes)[leaf]]
    return np.sum(own) if name == "restarts" else own


def from_dense(found: Mapping[str, Any], start: State, shapes: Shapes) -> State:
    """Return as a state of the oracle's what `dense` found, the rest as it is in `start`."""
    parts: dict[str, Any] = {name: np.array(value) for name, value in vars(start).items()}
    for key, value in found.items():
        name, _, leaf = key.partition("/")
        if not leaf:
            parts[name] = np.asarray(value, dtype=np.float64)
        elif name == "restarts":
            parts[name][slices(shapes)[leaf].start] = value  # which block's is not known
        else:
            parts[name][slices(shapes)[leaf]] = value
    return State(**parts)


def _blocks(values: Any) -> Vector:
    if isinstance(values, Mapping):
        return np.concatenate([value.reshape(-1) for value in values.values()])
    return values


def _columns(trace: Any, shape: tuple[int, ...], block_of: Any, m: int) -> Matrix:
    """Return a leaf's trace as rows of weights by columns of blocks."""
    if trace.ndim == len(shape):  # condensed: every weight has the column of its block alone
        rows = np.zeros((trace.size, m))
        rows[np.arange(trace.size), block_of] = trace.reshape(-1)
        return rows
    return trace.reshape(m, -1).T


def _matrix(values: Any, m: int) -> Matrix:
    """Return a trace of the meta state as rows of blocks by columns of blocks."""
    pieces = list(values.values()) if isinstance(values, Mapping) else [values]
    if sum(piece.size for piece in pieces) == m * m and m > 1:
        return np.concatenate([piece.reshape(m, -1) for piece in pieces], axis=1).T
    vector = np.concatenate([piece.reshape(-1) for piece in pieces])
    return np.diag(vector)
