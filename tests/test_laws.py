"""Laws a run obeys whatever the numbers: symmetries, limits and equal configurations."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metaopt_conformance import table
from metaopt_conformance.tolerances import relative_error, rounding
from metaopt_conformance.translate import traces, with_traces

import metaopt as mo

SETTINGS = settings(
    deadline=None,
    max_examples=5,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SEEDS = st.integers(0, 2**32 - 1)

BASES: dict[str, Any] = {
    **table.BASES,
    **{
        f"{name} delayed": replace(rule, delayed=True)
        for name, rule in table.BASES.items()
        if table.has(rule, "delayed")
    },
}
METAS: dict[str, Any] = {**table.METAS, "SGDm": mo.SGD(momentum=0.5)}
STEPS = 10
#: a step has some 50 operations, on sums over at most 12 weights; rounding along such a run grows
#: no faster than that
ALLOWED = rounding("float64", operations=50 * 12, steps=STEPS)


class Quadratic:
    """f(w) = w.A w / 2 - b.w over the leaves of a mapping together, with a full or diagonal A."""

    def __init__(self, seed: int, size: int, *, diagonal: bool = False) -> None:
        rng = np.random.default_rng(seed)
        square = rng.normal(size=(size, size)) / np.sqrt(size)
        self.matrix = square @ square.T + 0.5 * np.eye(size)
        if diagonal:
            self.matrix = np.diag(np.diag(self.matrix))
        self.linear = rng.normal(size=size)
        self.start = rng.normal(size=size) * 2.0

    def split(self, vector: Any, where: dict[str, Any]) -> dict[str, Any]:
        return {name: vector[..., index] for name, index in where.items()}

    def joined(self, tree: Any, where: dict[str, Any]) -> Any:
        some = np.asarray(next(iter(tree.values())))
        first = next(iter(where.values()))
        lead = some.shape[: some.ndim - np.ndim(first)]
        vector = np.empty((*lead, self.linear.size))
        for name, index in where.items():
            vector[..., index] = tree[name]
        return vector

    def run(
        self, opt: mo.MetaOptimize, where: dict[str, Any], steps: int = STEPS, scale: float = 1.0
    ) -> list[Any]:
        """Run with the entries of w dealt to leaves, `where` giving indices of each leaf.

        Return for each step all weights, and the learned step sizes by block.
        """
        params: Any = {
            name: np.array(value) for name, value in self.split(self.start, where).items()
        }
        state, record = opt.init(params), []
        for _ in range(steps):
            gradient = self.matrix @ self.joined(params, where) - self.linear
            params, state = opt.step(
                params,
                self.split(scale * gradient, where),
                state,
                hvp=lambda t: self.split(scale * self.joined(t, where) @ self.matrix, where),
                hessian_diagonal=self.split(scale * np.diag(self.matrix), where),
            )
            record.append((self.joined(params, where), opt.step_sizes(state), state))
        return record


def dealt(*sizes: int) -> dict[str, Any]:
    ends = np.cumsum(sizes)
    return {
        f"w{i}": np.arange(end - size, end)
        for i, (end, size) in enumerate(zip(ends, sizes, strict=True))
    }


def configured(base: str = "AdamW", meta: str = "Adam", **options: Any) -> mo.MetaOptimize:
    defaults: dict[str, Any] = {"step_size": 0.05, "meta_lr": 0.05, "discount": 0.95}
    return mo.MetaOptimize(base=BASES[base], meta=METAS[meta], **(defaults | options))


def assert_same(got: list[Any], want: list[Any], allowed: float = ALLOWED) -> None:
    """Compare weights and step sizes step by step; with 0, bit by bit."""
    for (weights, sizes, _), (other_weights, other_sizes, _) in zip(got, want, strict=True):
        assert sizes.keys() == other_sizes.keys()
        pairs = [(weights, other_weights), *((sizes[key], other_sizes[key]) for key in sizes)]
        for ours, theirs in pairs:
            assert np.all(np.isfinite(theirs))
            if allowed == 0.0:
                np.testing.assert_array_equal(ours, theirs)
            else:
                assert relative_error(ours, theirs) < allowed


LEVELS: dict[str, Any] = {
    "scalar": "scalar",
    "tensor": "tensor",
    "node": "node",
    "weight": "weight",
    "named": {"one": ("w0", "w2"), "other": "*"},
}
CURVATURES = [
    ("none", "l"),
    ("diagonal", "l"),
    ("diagonal", "2x2"),
    ("exact", "l"),
    ("exact", "2x2"),
]


@pytest.mark.parametrize(("curvature", "approximation"), CURVATURES)
@pytest.mark.parametrize("level", LEVELS)
@SETTINGS
@given(seed=SEEDS, order=st.permutations(["w0", "w1", "w2", "w3"]))
def test_the_order_of_leaves_does_not_matter(
    level: str, curvature: str, approximation: str, seed: int, order: list[str]
) -> None:
    problem, where = Quadratic(seed, 8), dealt(3, 1, 2, 2)
    where["w3"] = where["w3"].reshape(2, 1)
    opt = configured(
        blocks=LEVELS[level], curvature=curvature, approximation=approximation, meta_lr=0.02
    )
    permuted = {name: where[name] for name in order}
    assert_same(problem.run(opt, permuted), problem.run(opt, where))


@pytest.mark.parametrize(("curvature", "approximation"), CURVATURES)
@pytest.mark.parametrize("blocks", ["scalar", {"one": "w*"}], ids=["scalar", "named"])
@SETTINGS
@given(seed=SEEDS, cut=st.integers(1, 7))
def test_splitting_a_leaf_within_its_block_changes_nothing(
    blocks: Any, curvature: str, approximation: str, seed: int, cut: int
) -> None:
    problem = Quadratic(seed, 8)
    opt = configured(blocks=blocks, curvature=curvature, approximation=approximation, meta_lr=0.02)
    assert_same(problem.run(opt, dealt(cut, 8 - cut)), problem.run(opt, dealt(8)))


@pytest.mark.parametrize("copies", [2, 3, 4])
@pytest.mark.parametrize("meta", ["Lion", "Adam"])
@pytest.mark.parametrize("base", BASES)
def test_copies_share_a_step_size_or_have_one_each(base: str, meta: str, copies: int) -> None:
    """A scale-free meta update does not see that z is summed over copies, section 6."""
    metas = {"Lion": METAS["Lion"], "Adam": mo.AdamW(betas=(0.5, 0.9), eps=0.0)}
    problem = Quadratic(3, 4)
    common: dict[str, Any] = {"step_size": 0.05, "meta_lr": 0.02, "discount": 0.95}
    runs: dict[str, list[Any]] = {}
    for blocks in ("scalar", "tensor"):
        opt = mo.MetaOptimize(base=BASES[base], meta=metas[meta], blocks=blocks, **common)
        params = {f"w{i}": problem.start for i in range(copies)}
        state, runs[blocks] = opt.init(params), []
        for _ in range(STEPS):
            grads = {name: problem.matrix @ w - problem.linear for name, w in params.items()}
            params, state = opt.step(params, grads, state)
            runs[blocks].append((params, opt.step_sizes(state)))
    for (together, sizes), (apart, each) in zip(runs["scalar"], runs["tensor"], strict=True):
        for name, weights in apart.items():
            # summing a power of two copies does not round
            allowed = ALLOWED if copies == 3 else 0.0
            assert relative_error(together[name], weights) <= allowed
            assert relative_error(sizes["all"], each[name]) <= allowed
    start, end = runs["tensor"][0][1]["w0"], runs["tensor"][-1][1]["w0"]
    assert abs(np.log(end) - np.log(start)) > 0.02  # there was something to see


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("meta", table.SCALE_FREE)
@pytest.mark.parametrize("base", [*table.SCALE_FREE, "AdamW delayed"])
@SETTINGS
@given(seed=SEEDS, power=st.integers(-40, 40))
def test_scale_free_pairs_do_not_see_the_scale_of_the_loss(
    base: str, meta: str, level: str, seed: int, power: int
) -> None:
    """All gradients times a power of two: not a bit of the run changes."""
    opt = mo.MetaOptimize(
        base=(table.SCALE_FREE | {"AdamW delayed": mo.AdamW(eps=0.0, delayed=True)})[base],
        meta=table.SCALE_FREE[meta],
        step_size=0.05,
        meta_lr=0.02,
        discount=0.95,
        blocks=LEVELS[level],
    )
    problem, where = Quadratic(seed, 6), dealt(3, 1, 2)
    scaled = problem.run(opt, where, scale=2.0**power)
    assert_same(scaled, problem.run(opt, where), allowed=0.0)


@pytest.mark.parametrize(("curvature", "approximation"), CURVATURES)
@pytest.mark.parametrize("meta", METAS)
@pytest.mark.parametrize("level", LEVELS)
def test_without_meta_lr_the_step_sizes_stay(
    level: str, meta: str, curvature: str, approximation: str
) -> None:
    opt = configured(
        meta=meta,
        blocks=LEVELS[level],
        curvature=curvature,
        approximation=approximation,
        meta_lr=0.0,
    )
    plain = configured(meta="SGD", meta_lr=0.0)
    problem, where = Quadratic(0, 6), dealt(3, 1, 2)
    run = problem.run(opt, where)
    first = opt.step_sizes(opt.init(problem.split(problem.start, where)))
    for _, sizes, _ in run:
        for key, size in sizes.items():
            np.testing.assert_array_equal(size, first[key])
    reference = problem.run(plain, where)
    for (weights, _, _), (others, _, _) in zip(run, reference, strict=True):
        np.testing.assert_array_equal(weights, others)


@pytest.mark.parametrize("approximation", ["l", "2x2"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("base", BASES)
def test_exact_curvature_that_is_zero_equals_none(
    base: str, level: str, approximation: str
) -> None:
    """Section 4: all that is left is Hessian-free, for l and 2x2 alike."""
    common: dict[str, Any] = {"base": base, "blocks": LEVELS[level], "approximation": approximation}
    problem, where = Quadratic(1, 6), dealt(3, 1, 2)
    want = problem.run(configured(**common), where)
    for curvature in ("exact", "diagonal"):
        opt = configured(**common, curvature=curvature)
        params: Any = problem.split(problem.start, where)
        state = opt.init(params)
        for weights, sizes, _ in want:
            gradient = problem.matrix @ problem.joined(params, where) - problem.linear
            params, state = opt.step(
                params,
                problem.split(gradient, where),
                state,
                hvp=lambda t: {name: 0.0 * value for name, value in t.items()},
                hessian_diagonal=problem.split(np.zeros(6), where),
            )
            assert relative_error(problem.joined(params, where), weights) < ALLOWED
            got = opt.step_sizes(state)
            for key, size in sizes.items():
                assert relative_error(got[key], size) < ALLOWED


@pytest.mark.parametrize("approximation", ["l", "2x2"])
@pytest.mark.parametrize("level", ["scalar", "node", "named"])
@pytest.mark.parametrize("meta", METAS)
@pytest.mark.parametrize("base", BASES)
def test_diagonal_curvature_equals_exact_with_a_diagonal_hessian(
    base: str, meta: str, level: str, approximation: str
) -> None:
    """The condensed layout against the dense one, section 4."""
    common: dict[str, Any] = {"blocks": LEVELS[level], "approximation": approximation}
    problem, where = Quadratic(2, 6, diagonal=True), dealt(3, 1, 2)
    where["w0"] = where["w0"].reshape(3, 1)
    runs = [
        problem.run(configured(base, meta, **common, curvature=curvature), where)
        for curvature in ("diagonal", "exact")
    ]
    assert_same(runs[0], runs[1])
    (_, _, condensed), (_, _, dense) = runs[0][-1], runs[1][-1]
    through_beta = approximation == "2x2" and not table.signs(METAS[meta])
    follows = through_beta or not table.signs(BASES[base])
    for name, trace in (condensed.trace or condensed.average).items():
        kept = (dense.trace or dense.average)[name]
        assert np.ndim(kept) == np.ndim(trace) + follows
        columns = kept.sum(axis=0) if follows else kept
        assert relative_error(columns, trace) < ALLOWED


@pytest.mark.parametrize("curvature", ["diagonal", "exact"])
@pytest.mark.parametrize("level", ["scalar", "tensor", "weight"])
@pytest.mark.parametrize("base", BASES)
def test_2x2_equals_l_where_term_a_has_no_effect(base: str, level: str, curvature: str) -> None:
    """Section 3: at discount 0, and with Lion as meta update."""
    problem, where = Quadratic(4, 6), dealt(3, 1, 2)
    for meta, discount in (("Lion", 0.95), ("Lion", 1.0), ("Adam", 0.0), ("SGD", 0.0)):
        both = [
            configured(
                base,
                meta,
                blocks=LEVELS[level],
                curvature=curvature,
                approximation=approximation,
                discount=discount,
            )
            for approximation in ("l", "2x2")
        ]
        first, second = (problem.run(opt, where) for opt in both)
        assert_same(first, second, allowed=0.0)


@pytest.mark.parametrize("base", BASES)
def test_2x2_differs_from_l_where_it_has_one(base: str) -> None:
    """The tests above would pass on a 2x2 that is l; this one would not."""
    problem, where = Quadratic(4, 6), dealt(3, 1, 2)
    ends = [
        problem.run(configured(base, "SGD", curvature="exact", approximation=a), where)[-1][1][
            "all"
        ]
        for a in ("l", "2x2")
    ]
    assert relative_error(*ends) > 1e3 * ALLOWED


def test_discount_zero_asks_for_no_hessian() -> None:
    for curvature in ("exact", "diagonal"):
        opt = configured(discount=0.0, curvature=curvature)
        params = {"w": np.ones(3)}
        state = opt.init(params)
        assert state.average["w"].shape == (3,)
        opt.step(params, params, state)


@pytest.mark.parametrize("base", BASES)
def test_lion_and_discount_one_make_no_difference_to_what_rests(base: str) -> None:
    """Lion as base asks for no Hessian under `l`; any other base does."""
    opt = configured(base, curvature="exact")
    params = {"w": np.ones(3)}
    if table.signs(BASES[base]):
        opt.step(params, params, opt.init(params))
    else:
        with pytest.raises(ValueError, match="`hvp` is needed"):
            opt.step(params, params, opt.init(params))


# --- purity -------------------------------------------------------------------------------------


def arrays_of(tree: Any) -> list[Any]:
    if isinstance(tree, mo.State):
        return [array for value in vars(tree).values() for array in arrays_of(value)]
    if hasattr(tree, "items"):
        return [array for value in tree.values() for array in arrays_of(value)]
    return [] if tree is None else [tree]


PURE: dict[str, dict[str, Any]] = {
    "scalar": {},
    "tensor": {"blocks": "tensor"},
    "node": {"blocks": "node", "base": mo.Lion(weight_decay=0.1)},
    "weight": {"blocks": "weight", "bounds": (1e-3, 1.0), "base": mo.SGD()},
    "momentum": {"base": mo.SGD(momentum=0.9), "meta": mo.SGD(), "discount": 0.0},
    "one step, no decay": {
        "base": mo.SGD(),
        "meta": mo.SGD(),
        "sigma": "identity",
        "discount": 1.0,
    },
    "skip": {"skip_nonfinite": True},
    "meta first": {"meta_first": True, "base": mo.RMSprop()},
    "diagonal": {"curvature": "diagonal", "approximation": "2x2"},
    "rectified": {"curvature": mo.curvature.Diagonal(rectified=True), "base": mo.SGD()},
    "exact": {"curvature": "exact", "approximation": "2x2", "blocks": "tensor"},
    "exact, weight": {"curvature": "exact", "approximation": "2x2", "blocks": "weight"},
}


#: JAX's arrays and Dask's cannot be changed in place, and are slow to run step by step
QUICK = ["numpy", "strict", "torch"]


@pytest.mark.parametrize(
    ("backend", "name"),
    [(library, name) for library in QUICK for name in PURE] + [("jax", "node"), ("dask", "node")],
    indirect=["backend"],
)
def test_no_input_is_modified(backend: Any, name: str) -> None:
    """Bytes before and after, and NumPy's arrays not even writeable."""
    options: dict[str, Any] = {
        "base": mo.AdamW(weight_decay=0.1),
        "meta": mo.AdamW(),
        "discount": 1.0,
    }
    options["step_size"] = 0.1
    opt = mo.MetaOptimize(**(options | PURE[name]))
    rng = np.random.default_rng(0)
    params = backend.tree({"w": rng.normal(size=(3, 2)), "b": rng.normal(size=3)})
    state = opt.init(params)
    for step in range(4):
        grads = backend.tree({"w": rng.normal(size=(3, 2)), "b": rng.normal(size=3)})
        diagonal = backend.tree({"w": np.ones((3, 2)), "b": np.ones(3)})
        lr = {"w": backend.asarray(np.asarray(0.0 if step == 2 else 0.5)), "b": 1.0}
        given_arrays = [*arrays_of(params), *arrays_of(grads), *arrays_of(state)]
        given_arrays += [*arrays_of(diagonal), lr["w"]]
        before = [backend.to_numpy(array).tobytes() for array in given_arrays]
        if backend.name == "numpy":
            for array in given_arrays:
                array.flags.writeable = False
        names, state_before = list(params), state
        params, state = opt.step(
            params, grads, state, lr=lr, hvp=lambda t: t, hessian_diagonal=diagonal
        )
        assert [backend.to_numpy(array).tobytes() for array in given_arrays] == before
        assert list(params) == names
        assert state is not state_before


def test_params_in_another_order_give_the_same() -> None:
    """The order of blocks is that of `init`; a mapping handed to `step` may have any."""
    for options in PURE.values():
        defaults: dict[str, Any] = {
            "base": mo.AdamW(),
            "meta": mo.AdamW(),
            "step_size": 0.1,
            "discount": 1.0,
        }
        opt = mo.MetaOptimize(**(defaults | options))
        rng = np.random.default_rng(0)
        start = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=3), "a": rng.normal(size=())}
        start = {name: np.asarray(value) for name, value in start.items()}

        def ordered(tree: Any, turned: bool) -> Any:
            return dict(reversed(tree.items())) if turned else dict(tree)

        def run(turned: bool, opt: Any = opt, start: Any = start) -> Any:
            params, state = ordered(start, turned), opt.init(start)
            for _ in range(4):
                grads = ordered({name: np.sin(value) for name, value in params.items()}, not turned)
                params, state = opt.step(
                    params,
                    grads,
                    state,
                    lr={name: 0.5 for name in reversed(params)},
                    hvp=lambda t: {name: 0.5 * t[name] for name in sorted(t)},
                    hessian_diagonal={name: np.cos(params[name]) for name in sorted(params)},
                )
                assert list(params) == list(ordered(start, turned))
                assert list(state.trace or state.average) == list(start)
            return params, state

        (params, state), (turned, turned_state) = run(False), run(True)
        for name, value in params.items():
            np.testing.assert_array_equal(turned[name], value)
        for ours, theirs in zip(arrays_of(turned_state), arrays_of(state), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_kind_of_mapping_is_kept() -> None:
    opt = configured()
    for kind in (dict, OrderedDict):
        params: Any = kind(w=np.ones(2), b=np.ones(()))
        new, _ = opt.step(params, params, opt.init(params))
        assert type(new) is kind
    assert all(isinstance(value, np.ndarray) for value in new.values())


# --- diagnostics --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "level", "curvature"),
    [
        *((library, level, c) for library in QUICK for level in LEVELS for c in ("none", "exact")),
        ("jax", "named", "none"),
        ("dask", "weight", "none"),
    ],
    indirect=["backend"],
)
def test_diagnostics_say_what_the_state_holds(backend: Any, level: str, curvature: str) -> None:
    opt = configured("SGD", "SGD", blocks=LEVELS[level], curvature=curvature)
    rng = np.random.default_rng(0)
    shapes = {"w0": (2, 3), "w1": (2,), "w2": ()}
    params = backend.tree({n: np.asarray(rng.normal(size=s)) for n, s in shapes.items()})
    state = opt.init(params)
    for _ in range(3):
        previous, at = state, params
        params, state = opt.step(params, params, state, hvp=lambda t: t)
    told = opt.diagnostics(state, params)
    assert list(told) == [
        *("beta", "meta_grad", "trace_norm", "pinned", "collapsed", "asleep"),
        *("restarts", "skipped"),
    ]
    sizes = backend.to_numpy(opt.step_sizes(state))
    for part in ("beta", "meta_grad", "trace_norm"):
        assert list(told[part]) == list(sizes)
        assert {k: v.shape for k, v in told[part].items()} == {k: v.shape for k, v in sizes.items()}
    for key, beta in backend.to_numpy(told["beta"]).items():
        assert relative_error(np.exp(beta), sizes[key]) < rounding("float64", 4)

    def by_hand(entries: Any) -> dict[str, Any]:
        """Sum entries, per weight and in dense layout per column, by block."""
        if curvature == "exact":
            columns = sum(
                value.reshape(value.shape[0], -1).sum(axis=1) for value in entries.values()
            )
            start, result = 0, {}
            for key, size in sizes.items():
                result[key] = np.reshape(columns[start : start + size.size], size.shape)
                start += size.size
            return result
        total = sum(value.sum() for value in entries.values())
        sums: dict[str, Any] = {
            "scalar": lambda: {"all": total},
            "tensor": lambda: {name: value.sum() for name, value in entries.items()},
            "node": lambda: {
                n: v.sum(axis=1) if v.ndim > 1 else v.sum() for n, v in entries.items()
            },
            "weight": lambda: entries,
            "named": lambda: {
                "one": entries["w0"].sum() + entries["w2"].sum(),
                "other": entries["w1"].sum(),
            },
        }
        return sums[level]()

    values = backend.to_numpy(at)
    squares = {name: trace**2 for name, trace in traces(params, state).items()}
    products = {name: trace * values[name] for name, trace in traces(at, previous).items()}
    for part, want in (
        ("trace_norm", {k: np.sqrt(v) for k, v in by_hand(squares).items()}),
        ("meta_grad", by_hand(products)),
    ):
        for key, value in backend.to_numpy(told[part]).items():
            assert relative_error(value, want[key]) < rounding("float64", 40)
    for part in ("restarts", "pinned", "collapsed", "asleep"):
        found = backend.to_numpy(told[part])
        assert list(found) == list(sizes)
        assert all(not np.any(value) for value in found.values())
    assert int(backend.to_numpy(told["skipped"])) == 0


@pytest.mark.parametrize("level", LEVELS)
def test_diagnostics_count_restarts_and_skipped_steps(level: str) -> None:
    params = {name: np.ones((2, 2)) for name in ("w0", "w1", "w2")}
    bad = params | {"w0": np.array([[np.inf, 1.0], [1.0, 1.0]])}
    opt = configured("Lion", "Lion", blocks=LEVELS[level])
    _, state = opt.step(params, params, opt.init(params))
    state = with_traces(params, state, {"w0": np.full((2, 2), np.nan)})
    _, state = opt.step(params, params, state)
    told = opt.diagnostics(state, params)["restarts"]
    want = {
        "scalar": {"all": 1},
        "tensor": {"w0": 1, "w1": 0, "w2": 0},
        "node": {"w0": [1, 1], "w1": [0, 0], "w2": [0, 0]},
        "weight": {"w0": 4, "w1": 0, "w2": 0},
        "named": {"one": 1, "other": 0},
    }[level]
    assert {key: np.asarray(value).tolist() for key, value in told.items()} == want
    opt = configured("Lion", "Lion", blocks=LEVELS[level], skip_nonfinite=True)
    now, state = params, opt.init(params)
    for grads in (params, bad, bad, params):
        now, state = opt.step(now, grads, state)
    told = opt.diagnostics(state, now)
    assert int(told["skipped"]) == 2
    assert int(state.step) == 2
    assert all(not np.any(value) for value in told["restarts"].values())


@pytest.mark.parametrize("blocks", ["scalar", "tensor"])
def test_diagnostics_of_parts_are_those_of_the_whole(blocks: str) -> None:
    """Two devices have halves of one leaf each, and both the whole of the other."""
    rng = np.random.default_rng(0)
    params = {"cut": rng.normal(size=6), "copied": rng.normal(size=3)}
    opt = configured("SGD", "SGD", blocks=blocks)
    state = opt.init(params)
    for _ in range(3):
        params, state = opt.step(params, params, state)
    halves = []
    for part in (slice(0, 2), slice(2, 6)):
        own = params | {"cut": params["cut"][part]}
        average = state.average | {"cut": state.average["cut"][part]}
        halves.append((replace(opt.init(own), average=average, count=state.count), own))
    sums: list[Any] = []

    def told(half: Any, reduce: Any) -> Any:
        return opt.diagnostics(*half, reduce=reduce, copies={"copied": 2})["trace_norm"]

    def seen(arrays: Any) -> Any:
        sums.append(arrays[0])
        return arrays

    for half in halves:
        told(half, seen)
    want = opt.diagnostics(state, params)["trace_norm"]
    for half in halves:
        for key, norm in told(half, lambda arrays: [sum(sums)]).items():  # noqa: ARG005
            assert relative_error(norm, want[key]) <= rounding(norm.dtype, 20)
    with pytest.raises(ValueError, match=r"`copies` has unknown leaf 'other'"):
        opt.diagnostics(state, params, copies={"other": 2})
