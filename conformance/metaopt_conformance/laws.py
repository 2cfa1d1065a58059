"""Laws that hold for every input, on inputs that hypothesis draws."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import metaopt as mo
from metaopt_conformance import tolerances
from metaopt_conformance.runs import Under

__all__ = ["LAWS"]

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=4).map(tuple), min_size=1, max_size=4).map(
    lambda shapes: {f"leaf{i}": shape for i, shape in enumerate(shapes)}
)
KINDS = st.sampled_from(["scalar", "tensor", "node", "weight", {"head": "leaf0", "rest": "*"}])
RULES = st.sampled_from(
    [
        mo.SGD(momentum=0.8, weight_decay=0.1),
        mo.RMSprop(beta2=0.8, eps=1e-2),
        mo.AdamW(betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1),
        mo.Lion(betas=(0.8, 0.9)),
    ]
)
METAS = st.sampled_from([mo.SGD(), mo.AdamW(betas=(0.8, 0.9), eps=1e-2), mo.Lion()])
SCALE_FREE = st.sampled_from([mo.Lion(), mo.AdamW(eps=0.0)])
STEPS = 8
#: Every law compares float64 runs of 8 steps of 60 operations on sums of at most a dozen terms.
ALLOWED = tolerances.rounding("float64", operations=60 * 12, steps=STEPS)


def adjoint(under: Under, examples: int) -> float:
    """See that <expand(b), x> = <b, reduce(x)> for every partition."""

    def law(shapes: dict[str, Any], kind: Any, seed: int) -> float:
        if isinstance(kind, dict) and len(shapes) == 1:
            kind = "scalar"
        rng = np.random.default_rng(seed)
        blocks = mo.blocks.partition(kind).bind(shapes)
        x = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        b = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        flat = rng.normal(size=blocks.size)
        values: Any = b if kind == "weight" else flat
        mine = _arrays(under, b) if kind == "weight" else under.backend.asarray(flat, under.device)
        expanded, reduced = blocks.expand(mine), blocks.reduce(_arrays(under, x))
        left = sum(np.sum(_numpy(under, expanded[name]) * x[name]) for name in shapes)
        if kind == "weight":
            right = sum(np.sum(_numpy(under, reduced[name]) * values[name]) for name in shapes)
        else:
            right = np.sum(_numpy(under, reduced) * values)
        size = sum(np.sum(np.abs(_numpy(under, expanded[name]) * x[name])) for name in shapes)
        return abs(left - right) / max(float(size), 1e-300)

    return _hold(law, examples, shapes=SHAPES, kind=KINDS, seed=SEEDS)


def permuted(under: Under, examples: int) -> float:
    """See that the order of leaves changes nothing beyond rounding."""

    def law(base: Any, meta: Any, seed: int) -> float:
        names = ["a", "b", "c"]
        order = list(np.random.default_rng(seed).permutation(names))
        opt = mo.MetaOptimize(base=base, meta=meta, step_size=0.05, meta_lr=0.1)
        one = _run(under, opt, _leaves(seed, names))
        start = _leaves(seed, names)
        other = _run(under, opt, {str(name): start[str(name)] for name in order})
        return max(tolerances.relative_error(other[name], one[name]) for name in one)

    return _hold(law, examples, base=RULES, meta=METAS, seed=SEEDS)


def split(under: Under, examples: int) -> float:
    """See that a leaf in two parts of the same block is the leaf."""

    def law(base: Any, meta: Any, seed: int) -> float:
        opt = mo.MetaOptimize(base=base, meta=meta, step_size=0.05, meta_lr=0.1)
        start = _leaves(seed, ["a"])["a"]
        one = _run(under, opt, {"a": start})
        parts = _run(under, opt, {"head": start[:2], "tail": start[2:]})
        joined = np.concatenate([parts["head"], parts["tail"]])
        sizes = tolerances.relative_error(parts["step size"], one["step size"])
        return max(sizes, tolerances.relative_error(joined, one["a"]))

    return _hold(law, examples, base=RULES, meta=METAS, seed=SEEDS)


def merged(under: Under, examples: int) -> float:
    """See that copies may share a step size or have one each, if the meta update is scale-free."""

    def law(base: Any, meta: Any, seed: int) -> float:
        start = _leaves(seed, ["a"])["a"]
        copies = {"a": start, "b": start}
        runs = [
            _run(
                under,
                mo.MetaOptimize(base=base, meta=meta, step_size=0.05, meta_lr=0.1, blocks=blocks),
                copies,
            )
            for blocks in ("scalar", "tensor")
        ]
        return tolerances.relative_error(runs[1]["a"], runs[0]["a"])

    return _hold(law, examples, base=RULES, meta=SCALE_FREE, seed=SEEDS)


def scaled(under: Under, examples: int) -> float:
    """See that a scale-free pair does not notice a factor on the loss."""

    def law(base: Any, meta: Any, seed: int, power: int) -> float:
        opt = mo.MetaOptimize(base=base, meta=meta, step_size=0.05, meta_lr=0.1, blocks="tensor")
        start = _leaves(seed, ["a", "b"])
        one, other = (_run(under, opt, start, scale) for scale in (1.0, 2.0**power))
        return max(tolerances.relative_error(other[name], one[name]) for name in one)

    powers = st.integers(-20, 20)
    return _hold(law, examples, base=SCALE_FREE, meta=SCALE_FREE, seed=SEEDS, power=powers)


def saved(under: Under, examples: int) -> float:
    """See that a run saved and loaded in the middle is the run itself, to the last bit."""

    def law(base: Any, meta: Any, seed: int, blocks: str) -> float:
        opt = mo.MetaOptimize(base=base, meta=meta, step_size=0.05, meta_lr=0.1, blocks=blocks)
        start = _leaves(seed, ["a", "b"])
        one, other = (_run(under, opt, start, interrupted=flag) for flag in (False, True))
        return 0.0 if all(np.array_equal(one[name], other[name]) for name in one) else 1.0

    kinds = st.sampled_from(["scalar", "tensor", "node", "weight"])
    return _hold(law, examples, base=RULES, meta=METAS, seed=SEEDS, blocks=kinds)


def _hold(law: Callable[..., float], examples: int, **strategies: Any) -> float:
    """Return the worst error of a law over what is allowed, and raise where it is more."""
    worst = [0.0]

    def trial(**values: Any) -> None:
        share = law(**values) / ALLOWED
        worst[0] = max(worst[0], share)
        assert share <= 1.0, f"error {share * ALLOWED:.1e}, allowed {ALLOWED:.1e}, for {values}"

    options = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    options(given(**strategies)(trial))()
    return worst[0]


def _leaves(seed: int, names: list[str]) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(4, 2)) for name in names}


def _arrays(under: Under, arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: under.backend.asarray(array, under.device) for name, array in arrays.items()}


def _numpy(under: Under, array: Any) -> Any:
    return under.backend.to_numpy(array)


def _run(
    under: Under,
    opt: mo.MetaOptimize,
    start: dict[str, Any],
    scale: float = 1.0,
    *,
    interrupted: bool = False,
) -> dict[str, Any]:
    """Return the leaves, and one step size, after steps on a sum of log cosh over all weights."""
    params = _arrays(under, start)
    state = opt.init(params)
    for t in range(STEPS):
        if interrupted and t == STEPS // 2:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "state.safetensors"
                mo.save(path, opt, state)
                opt, state = mo.load(path, params)
        grads = {
            name: np.tanh(2.0 * _numpy(under, param) - np.cos(t)) * scale
            for name, param in params.items()
        }
        params, state = under.backend.settle(opt.step(params, _arrays(under, grads), state))
    sizes = opt.step_sizes(state).values()
    found = {name: _numpy(under, param) for name, param in params.items()}
    return found | {"step size": _numpy(under, next(iter(sizes)))}


LAWS: dict[str, Callable[[Under, int], float]] = {
    "expand and reduce are adjoint": adjoint,
    "leaves in another order": permuted,
    "a leaf in two parts": split,
    "blocks that merge": merged,
    "a multiple of the loss": scaled,
    "saved and loaded": saved,
}
