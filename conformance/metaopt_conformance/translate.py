"""From the library's configurations and states to the oracle's: the one place that knows both."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

import metaopt as mo
from metaopt.arrays import map_leaves, to_numpy
from metaopt.jets import Jet
from metaopt.rules.learned import at_start, learned_in
from metaopt_conformance import sigmas
from metaopt_conformance.learned import Number
from metaopt_conformance.oracle import Config, Matrix, State
from metaopt_conformance.table import sigma_of, update_of
from metaopt_conformance.updates import Vector

__all__ = [
    "Shapes",
    "block_index",
    "config_of",
    "contents",
    "dense",
    "dense_number",
    "expected",
    "flat",
    "from_dense",
    "numbers_of",
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
            return at_start(opt.base)
        rules = opt.base.items()
        return at_start(next(rule for pattern, rule in rules if fnmatchcase(name, pattern)))

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


#: What the oracle calls numbers of rules.
FIELDS = {"betas[0]": "rho", "betas[1]": "decay_sq", "momentum": "rho", "beta2": "decay_sq"}


def numbers_of(
    opt: mo.MetaOptimize, shapes: Shapes, largest: float = 2.0**511
) -> dict[str, Number]:
    """Return the numbers that are learned as the oracle's, by name."""
    plain, found = config_of(opt, shapes, largest), {}
    base: Any = opt.base if isinstance(opt.base, Mapping) else {"*": opt.base}
    rules = {leaf: next(base[p] for p in base if fnmatchcase(leaf, p)) for leaf in shapes}
    learned = {place: one for rule in rules.values() for place, one in learned_in(rule).items()}
    for place, one in learned.items():
        own = {leaf: s for leaf, s in shapes.items() if place in learned_in(rules[leaf])}
        index, names = block_index(opt.blocks if one.blocks is None else one.blocks, own)
        has = [np.full(at.stop - at.start, leaf in own) for leaf, at in slices(shapes).items()]
        block_of = np.full(len(plain.block_of), -1)
        block_of[np.concatenate(has)] = index
        lo, hi = one.bounds or (0.0, np.inf)
        decay = place in FIELDS
        number = replace(
            plain,
            meta=replace(plain.meta, factor=1.0, patience=1, retreat=0.0),
            block_of=block_of,
            step_size=np.full(len(names), one.start),
            meta_lr=one.meta_lr,
            discount=float(np.max(opt.discount)),
            sigma=sigmas.Decay() if decay else sigma_of(one.map or "exp"),
            bounds=_bounds((max(lo, 2.0**-20), min(hi, 1.0 - 2.0**-22)), names)
            if decay
            else _bounds((lo, hi), names),
        )
        found[place] = Number(field=FIELDS.get(place, place), config=number)
    return found


def dense_number(
    part: Mapping[str, Any], number: Number, shapes: Shapes, to_numpy: Any = to_numpy
) -> dict[str, Vector]:
    """Return the state of a learned number under the oracle's names, as far as it is kept."""
    part = map_leaves(lambda array: np.array(to_numpy(array)), part)
    m, block_of = number.config.blocks, np.asarray(number.config.block_of)

    def rows(traces: Mapping[str, Any], name: str, at: slice) -> Matrix:
        if name not in traces:
            return np.zeros((at.stop - at.start, m))
        return _columns(traces[name], shapes[name], block_of[at], m)

    found: dict[str, Any] = {
        key: _blocks(part[name])
        for key, name in (("beta", "beta"), ("z", "meta_grad"), ("meta_count", "meta_count"))
    }
    parts = slices(shapes).items()
    found["H"] = np.concatenate([rows(part["trace"], name, at) for name, at in parts])
    for slot, trace in (("exp_avg", "M"), ("exp_avg_sq", "V")):
        for name, at in parts:
            if slot in part["slot_traces"].get(name, {}):
                found[f"{trace}/{name}"] = rows({name: part["slot_traces"][name][slot]}, name, at)
    for slot, key in (("exp_avg", "meta_m"), ("peak", "peak")):
        if slot in part["meta_slots"]:
            found[key] = _blocks(part["meta_slots"][slot])
    if "exp_avg_rms" in part["meta_slots"]:
        found["meta_v"] = _blocks(part["meta_slots"]["exp_avg_rms"]).astype(np.float64) ** 2
    if "beta" in part["beta_trace"]:
        found["B"] = _matrix(part["beta_trace"]["beta"], m)
    if len(part["restarts"]) == m:
        found["restarts"] = part["restarts"]
    return found


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
    m, block_of, several = config.blocks, config.block_of, config.horizons
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
        "z": _blocks(state.meta_grad, several),
        "count": np.concatenate(
            [np.full(int(np.prod(shapes[name])), state.count[name]) for name in shapes]
        ),
        "H": np.concatenate(
            [
                _columns(of_weights[name], shapes[name], block_of[at], m, several)
                for name, at in slices(shapes).items()
            ],
            axis=-2,
        ),
    }
    for slot, values, trace in (("exp_avg", "m", "M"), ("exp_avg_sq", "v", "V")):
        for name, at in slices(shapes).items():
            if slot in state.slots[name]:
                found[f"{values}/{name}"] = state.slots[name][slot].reshape(-1)
            if slot in state.slot_traces.get(name, {}):
                found[f"{trace}/{name}"] = _columns(
                    state.slot_traces[name][slot], shapes[name], block_of[at], m, several
                )
    if "exp_avg" in state.meta_slots:
        found["meta_m"] = _blocks(state.meta_slots["exp_avg"], several)
    if "exp_avg" in state.beta_trace:
        found["Bm"] = _matrix(state.beta_trace["exp_avg"], m)
    if "exp_avg_rms" in state.meta_slots:
        root = _blocks(state.meta_slots["exp_avg_rms"], several).astype(np.float64)
        found["meta_v"] = root**2
        if "exp_avg_rms" in state.beta_trace:
            found["Bv"] = 2.0 * root[:, None] * _matrix(state.beta_trace["exp_avg_rms"], m)
    for slot, axes in (("against", several), ("decided", several), ("peak", ())):
        if slot in state.meta_slots:
            found[slot] = _blocks(state.meta_slots[slot], axes)
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
    own = value[_rows_of(name, slices(shapes)[leaf])]
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
            parts[name][_rows_of(name, slices(shapes)[leaf])] = value
    return State(**parts)


def _rows_of(name: str, leaf: slice) -> Any:
    """Return the index of a leaf's rows in a part of the oracle's state."""
    return (..., leaf, slice(None)) if name in ("M", "V") else leaf


def _blocks(values: Any, axes: tuple[int, ...] = ()) -> Vector:
    """Return values by block as one array, (..., blocks), with leading axes of discounts."""
    if isinstance(values, Mapping):
        return np.concatenate([value.reshape(*axes, -1) for value in values.values()], axis=-1)
    return values


def _columns(
    trace: Any, shape: tuple[int, ...], block_of: Any, m: int, several: tuple[int, ...] = ()
) -> Matrix:
    """Return a leaf's trace as rows of weights by columns of blocks, of each discount."""
    if several:
        return np.stack([_columns(one, shape, block_of, m) for one in trace])
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
