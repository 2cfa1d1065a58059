"""Laws that hold for every input, on inputs that hypothesis draws."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import metaopt as mo
from metaopt_conformance import table, tolerances
from metaopt_conformance.runs import Under
from metaopt_conformance.translate import contents
from metaopt_conformance.verdicts import Failure

__all__ = ["LAWS"]

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=4).map(tuple), min_size=1, max_size=4).map(
    lambda shapes: {f"leaf{i}": shape for i, shape in enumerate(shapes)}
)
KINDS = st.sampled_from(
    [
        "scalar",
        "tensor",
        "node",
        mo.blocks.node(axis=-1),
        "weight",
        {"head": "leaf0", "rest": "*"},
    ]
)
RULES = st.sampled_from(list(table.BASES.values()))
METAS = st.sampled_from(list(table.METAS.values()))
SCALE_FREE = st.sampled_from(list(table.SCALE_FREE.values()))
BLOCKS = st.sampled_from(["scalar", "tensor", "node", "weight"])
SEVERAL = (0.5, 0.9, 1.0)
DISCOUNTS = st.sampled_from([1.0, (0.9, 1.0), SEVERAL])
FOLLOWED: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {"curvature": "none"},
        {"curvature": "none", "discount": (0.9, 1.0)},
        {"curvature": "diagonal", "approximation": "2x2"},
        {"curvature": "exact"},
        {"curvature": "exact", "discount": SEVERAL},
        {"curvature": "exact", "approximation": "2x2"},
        {"curvature": "exact", "approximation": "full"},
    ]
)
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
        return float(abs(left - right)) / max(float(size), 1e-300)

    return _hold(law, examples, shapes=SHAPES, kind=KINDS, seed=SEEDS)


def permuted(under: Under, examples: int) -> float:
    """See that the order of leaves changes nothing beyond rounding."""

    def law(base: Any, meta: Any, blocks: str, discount: Any, seed: int) -> float:
        opt = _configured(base, meta, blocks=blocks, discount=discount)
        start = _leaves(seed, ["a", "b", "c"])
        order = [str(name) for name in np.random.default_rng(seed).permutation(list(start))]
        one, other = (
            _run(under, opt, start),
            _run(under, opt, {name: start[name] for name in order}),
        )
        return tolerances.worst(
            _difference(one.params, other.params), _difference(one.sizes, other.sizes)
        )

    options = {"blocks": BLOCKS, "discount": DISCOUNTS}
    return _hold(law, examples, base=RULES, meta=METAS, seed=SEEDS, **options)


def split(under: Under, examples: int) -> float:
    """See that a leaf in two parts of the same block is the leaf."""

    def law(base: Any, meta: Any, discount: Any, seed: int) -> float:
        opt = _configured(base, meta, discount=discount)
        start = _leaves(seed, ["a"])["a"]
        one = _run(under, opt, {"a": start})
        parts = _run(under, opt, {"head": start[:2], "tail": start[2:]})
        joined = {"a": np.concatenate([parts.params["head"], parts.params["tail"]])}
        return tolerances.worst(
            _difference(one.params, joined), _difference(one.sizes, parts.sizes)
        )

    return _hold(law, examples, base=RULES, meta=METAS, discount=DISCOUNTS, seed=SEEDS)


def merged(under: Under, examples: int) -> float:
    """See that copies may share a step size or have one each, if the meta update is scale-free."""

    def law(base: Any, meta: Any, discount: Any, seed: int) -> float:
        start = _leaves(seed, ["a"])["a"]
        opts = (
            _configured(base, meta, blocks=blocks, discount=discount)
            for blocks in ("scalar", "tensor")
        )
        shared, each = (_run(under, opt, {"a": start, "b": start}) for opt in opts)
        sizes = dict.fromkeys(("a", "b"), shared.sizes["all"])
        return tolerances.worst(
            _difference(shared.params, each.params), _difference(sizes, each.sizes)
        )

    return _hold(law, examples, base=RULES, meta=SCALE_FREE, discount=DISCOUNTS, seed=SEEDS)


def scaled(under: Under, examples: int) -> float:
    """See that a scale-free pair does not notice a factor on the loss."""

    def law(base: Any, meta: Any, discount: Any, seed: int, power: int) -> float:
        opt = _configured(base, meta, blocks="tensor", discount=discount)
        start = _leaves(seed, ["a", "b"])
        one, other = (_run(under, opt, start, scale) for scale in (1.0, 2.0**power))
        return tolerances.worst(
            _difference(one.params, other.params), _difference(one.sizes, other.sizes)
        )

    options = {"discount": DISCOUNTS, "power": st.integers(-20, 20)}
    return _hold(law, examples, base=SCALE_FREE, meta=SCALE_FREE, seed=SEEDS, **options)


def saved(under: Under, examples: int) -> float:
    """See that a run saved and loaded in the middle is the run itself, to the last bit of state."""

    def law(base: Any, meta: Any, seed: int, blocks: str, followed: dict[str, Any]) -> float:
        opt = _configured(base, meta, blocks=blocks, **followed)
        start = _leaves(seed, ["a", "b"])
        one, other = (_run(under, opt, start, interrupted=flag) for flag in (False, True))
        return 0.0 if one.bits == other.bits else 1.0

    strategies = {"base": RULES, "meta": METAS, "blocks": BLOCKS, "followed": FOLLOWED}
    return _hold(law, examples, seed=SEEDS, **strategies)


def single(under: Under, examples: int) -> float:
    """See that a discount alone in a tuple is that discount, to the last bit."""

    def law(base: Any, meta: Any, seed: int, discount: float, **options: Any) -> float:
        start = _leaves(seed, ["a", "b"])
        one, other = (
            _run(under, _configured(base, meta, discount=value, **options), start)
            for value in (discount, (discount,))
        )
        return 0.0 if one.course == other.course else 1.0

    options = {
        "blocks": BLOCKS,
        "curvature": st.sampled_from(["none", "diagonal", "exact"]),
        "discount": st.sampled_from(SEVERAL),
    }
    return _hold(law, examples, base=RULES, meta=METAS, seed=SEEDS, **options)


def silent(under: Under, examples: int) -> float:
    """See that a discount whose direction is never the least alone has no part in a run."""

    def law(base: Any, meta: Any, seed: int, blocks: str, curvature: str) -> float:
        start = _leaves(seed, ["a", "b"])

        def run(discounts: tuple[float, ...]) -> _Run:
            opt = _configured(base, meta, blocks=blocks, curvature=curvature, discount=discounts)
            return _run(under, opt, start)

        whole = run(SEVERAL)
        decided = np.diff(whole.decided, axis=0)
        alone = np.sum(decided * (np.sum(decided, axis=1, keepdims=True) == 1.0), axis=(0, 2))
        assume(np.any(alone == 0.0))
        left = [value for k, value in enumerate(SEVERAL) if k != np.argmin(alone)]
        return 0.0 if whole.course == run(tuple(left)).course else 1.0

    options = {
        "blocks": st.sampled_from(["scalar", "tensor"]),
        "curvature": st.sampled_from(["none", "exact"]),
    }
    return _hold(law, examples, base=RULES, meta=METAS, seed=SEEDS, **options)


def _hold(law: Callable[..., float], examples: int, **strategies: Any) -> float:
    """Return the worst error of a law over what is allowed, and raise where it is more, or NaN."""
    shares = [0.0]

    def trial(**values: Any) -> None:
        share = law(**values) / ALLOWED
        if not share <= 1.0:
            msg = f"error {share * ALLOWED:.1e}, allowed {ALLOWED:.1e}, for {values}"
            raise Failure(msg)
        shares.append(share)

    options = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    options(given(**strategies)(trial))()
    return max(shares)


def _configured(base: Any, meta: Any, **options: Any) -> mo.MetaOptimize:
    return mo.MetaOptimize(base=base, meta=meta, step_size=0.05, meta_lr=0.1, **options)


def _difference(want: Mapping[str, Any], got: Mapping[str, Any]) -> float:
    """Return the worst relative error of arrays by name."""
    return tolerances.worst(*(tolerances.relative_error(got[name], want[name]) for name in want))


def _leaves(seed: int, names: list[str]) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(4, 2)) for name in names}


def _arrays(under: Under, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: under.array(array, "float64") for name, array in arrays.items()}


def _numpy(under: Under, array: Any) -> Any:
    return under.backend.to_numpy(array)


@dataclass(frozen=True)
class _Run:
    """What a run ends with: params and step sizes by name, and the bits of these and the state.

    And its course: what of each step is compared where states have other shapes, the bits of params
    and beta, and of several discounts how often each has decided, by block.
    """

    params: dict[str, Any]
    sizes: dict[str, Any]
    bits: Any
    course: list[Any]
    decided: list[Any]


def _run(
    under: Under,
    opt: mo.MetaOptimize,
    start: dict[str, Any],
    scale: float = 1.0,
    *,
    interrupted: bool = False,
) -> _Run:
    """Return the end of a run on a sum of log cosh over all weights, times `scale`."""
    params = _arrays(under, start)
    state = opt.init(params)
    course, decided = list[Any](), list[Any]()
    for t in range(STEPS):
        if interrupted and t == STEPS // 2:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "state.safetensors"
                mo.save(path, opt, state)
                opt, state = mo.load(path, params)
        slopes = {
            name: np.tanh(2.0 * _numpy(under, param) - np.cos(t)) for name, param in params.items()
        }
        bends = {name: 2.0 * (1.0 - slope**2) * scale for name, slope in slopes.items()}
        twists = {name: -4.0 * slopes[name] * bend for name, bend in bends.items()}

        def hvp(tangents: Any, bends: Any = bends) -> Any:
            return _arrays(
                under, {name: bends[name] * _numpy(under, v) for name, v in tangents.items()}
            )

        def third(us: Any, vs: Any, twists: Any = twists) -> Any:
            return _arrays(
                under,
                {
                    name: twist * _numpy(under, us[name])[:, None] * _numpy(under, vs[name])[None]
                    for name, twist in twists.items()
                },
            )

        params, state = under.backend.settle(
            opt.step(
                params,
                _arrays(under, {name: slope * scale for name, slope in slopes.items()}),
                state,
                hvp=hvp,
                third=third,
                hessian_diagonal=_arrays(under, bends),
            )
        )
        course.append(contents([params, state.beta], under.backend.to_numpy))
        if "decided" in state.meta_slots:
            decided.append(under.numbers(state.meta_slots["decided"]))
    return _Run(
        {name: _numpy(under, param) for name, param in params.items()},
        {name: _numpy(under, size) for name, size in opt.step_sizes(state).items()},
        contents([params, state], under.backend.to_numpy),
        course,
        decided,
    )


LAWS: dict[str, Callable[[Under, int], float]] = {
    "expand and reduce are adjoint": adjoint,
    "leaves in another order": permuted,
    "a leaf in two parts": split,
    "blocks that merge": merged,
    "a multiple of the loss": scaled,
    "saved and loaded": saved,
    "one discount in a tuple": single,
    "a discount that never decides": silent,
}
