"""Partitions: expand and reduce are adjoint, and keys, shapes and order are as documented."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metaopt_conformance.tolerances import relative_error, rounding

import metaopt as mo
from metaopt.blocks import Partition, named, node, partition, scalar, tensor, weight

# the fixture holds nothing that an example could change
SETTINGS = settings(
    deadline=None,
    max_examples=6,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass(frozen=True, slots=True)
class Columns(Partition):
    """One step size per column, shared by all leaves with as many columns."""

    def assign(self, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:  # noqa: ARG002
        if not shape:
            return "numbers", ()
        return f"columns {shape[-1]}", (1,) * (len(shape) - 1) + shape[-1:]


@dataclass(frozen=True, slots=True)
class Frame(Partition):
    """One step size per entry of the first and last axis of a leaf."""

    def assign(self, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        last = len(shape) - 1
        return name, tuple(n if axis in (0, last) else 1 for axis, n in enumerate(shape))


GROUPS = {"even": ("w0", "w2"), "rest": "*"}
KINDS: dict[str, Any] = {
    "scalar": scalar(),
    "tensor": tensor(),
    "node": node(),
    "node, last axis": node(-1),
    "weight": weight(),
    "named": None,  # patterns depend on the leaves there are
    "custom, shared": Columns(),
    "custom, two axes": Frame(),
}


def partition_of(kind: str, leaves: dict[str, Any]) -> Partition:
    if kind != "named":
        return KINDS[kind]
    return named({"even": "w0", "rest": "*"} if len(leaves) > 1 else {"rest": "*"})


def shapes_of_leaves(least: int = 1) -> Any:
    shape = st.lists(st.integers(least, 3), min_size=0, max_size=4).map(tuple)
    return st.lists(shape, min_size=1, max_size=4).map(
        lambda shapes: {f"w{index}": shape for index, shape in enumerate(shapes)}
    )


def values_like(shapes: dict[str, Any], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def inner(ours: Any, theirs: Any) -> tuple[float, float]:
    """Return the inner product, and the sum of its terms' sizes, which bounds its rounding."""
    if isinstance(ours, dict):
        pairs = [
            (np.broadcast_to(ours[name], np.shape(theirs[name])), theirs[name]) for name in ours
        ]
    else:
        pairs = [(ours, theirs)]
    return (
        float(sum(np.sum(a * b) for a, b in pairs)),
        float(sum(np.sum(np.abs(a * b)) for a, b in pairs)),
    )


@pytest.mark.parametrize("kind", KINDS)
@SETTINGS
@given(shapes=shapes_of_leaves(), seed=st.integers(0, 2**32 - 1))
def test_reduce_is_the_adjoint_of_expand(
    backend: Any, kind: str, shapes: dict[str, Any], seed: int
) -> None:
    """<expand(b), x> = <b, reduce(x)>, section 9."""
    blocks = partition_of(kind, shapes).bind(shapes)
    x = values_like(shapes, seed)
    rng = np.random.default_rng(seed + 1)
    per_leaf = blocks.partition.per_leaf
    b = values_like(shapes, seed + 2) if per_leaf else rng.normal(size=blocks.size)
    b_there = backend.tree(b) if per_leaf else backend.asarray(b)
    expanded = backend.to_numpy(blocks.expand(b_there))
    reduced = backend.to_numpy(blocks.reduce(backend.tree(x)))
    assert list(expanded) == list(shapes)
    for name, shape in shapes.items():
        assert np.broadcast_shapes(expanded[name].shape, shape) == shape
    if per_leaf:
        assert {name: value.shape for name, value in reduced.items()} == shapes
    else:
        assert reduced.shape == (blocks.size,)
    left, size = inner(expanded, x)
    right, _ = inner(b, reduced)
    operations = sum(math.prod(shape) for shape in shapes.values())
    assert abs(left - right) <= rounding("float64", operations) * size


@SETTINGS
@given(shapes=shapes_of_leaves(), seed=st.integers(0, 2**32 - 1))
def test_a_leaf_that_is_absent_contributes_zero(
    backend: Any, shapes: dict[str, Any], seed: int
) -> None:
    for kind in KINDS:
        blocks = partition_of(kind, shapes).bind(shapes)
        x = values_like(shapes, seed)
        absent = next(reversed(x))
        zero = x | {absent: np.zeros_like(x[absent])}
        some = {name: value for name, value in x.items() if name != absent}
        if not some:
            continue
        got = backend.to_numpy(blocks.reduce(backend.tree(some)))
        want = backend.to_numpy(blocks.reduce(backend.tree(zero)))
        np.testing.assert_equal(got, want)


def test_reduce_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one leaf"):
        scalar().bind({"w": (2,)}).reduce({})


@SETTINGS
@given(shapes=shapes_of_leaves(), seed=st.integers(0, 2**32 - 1))
def test_total_split_and_join_agree(backend: Any, shapes: dict[str, Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for kind in KINDS:
        blocks = partition_of(kind, shapes).bind(shapes)
        assert blocks.size == sum(family.size for family in blocks.families.values())

        vector = rng.normal(size=blocks.size)
        split = blocks.split(backend.asarray(vector))
        np.testing.assert_array_equal(backend.to_numpy(blocks.join(split)), vector)
        columns = rng.normal(size=(3, blocks.size))
        split = backend.to_numpy(blocks.split(backend.asarray(columns)))
        if blocks.partition.per_leaf:
            assert {name: value.shape for name, value in split.items()} == {
                name: (3, *shape) for name, shape in shapes.items()
            }
            split = np.concatenate([value.reshape(3, -1) for value in split.values()], axis=1)
        np.testing.assert_array_equal(split, columns)

        raised = rng.random(blocks.size) < 0.4
        flags = blocks.split(backend.asarray(raised))
        want = raised
        if blocks.partition.per_leaf:
            stops = np.cumsum([math.prod(shape) for shape in shapes.values()])
            want = np.array([np.sum(part) for part in np.split(raised, stops[:-1])])
        total = backend.to_numpy(blocks.total(flags))
        assert total.dtype == np.int32
        np.testing.assert_array_equal(total, want)


SHAPES = {"fc.w": (3, 2), "fc.b": (3,), "conv.w": (2, 3, 1, 1), "scale": ()}


def expected_keys(kind: str) -> dict[str, tuple[int, ...]]:
    keys: dict[str, dict[str, tuple[int, ...]]] = {
        "scalar": {"all": ()},
        "tensor": dict.fromkeys(SHAPES, ()),
        "node": {"fc.w": (3,), "fc.b": (), "conv.w": (2,), "scale": ()},
        "node, last axis": {"fc.w": (2,), "fc.b": (), "conv.w": (1,), "scale": ()},
        "weight": SHAPES,
        "custom, shared": {"columns 2": (2,), "columns 3": (3,), "columns 1": (1,), "numbers": ()},
        "custom, two axes": {"fc.w": (6,), "fc.b": (3,), "conv.w": (2,), "scale": ()},
        "named": {"head": (), "rest": ()},
    }
    return keys[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_shapes_of_step_sizes(backend: Any, kind: str) -> None:
    blocks = {"head": "fc.*", "rest": "*"} if kind == "named" else KINDS[kind]
    opt = mo.MetaOptimize(
        base=mo.SGD(), meta=mo.Lion(), blocks=blocks, step_size=0.25, discount=1.0
    )
    state = opt.init(backend.tree(values_like(SHAPES, 0)))
    sizes = backend.to_numpy(opt.step_sizes(state))
    shapes = {key: value.shape for key, value in sizes.items()}
    assert shapes == expected_keys(kind)
    assert list(shapes) == list(expected_keys(kind))
    for value in sizes.values():
        assert relative_error(value, np.full(value.shape, 0.25)) < rounding("float64", 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_of_step_sizes_reaches_its_blocks(backend: Any, kind: str) -> None:
    blocks = {"head": "fc.*", "rest": "*"} if kind == "named" else KINDS[kind]
    rng = np.random.default_rng(0)
    wanted = {key: rng.uniform(0.1, 1.0, size=s) for key, s in expected_keys(kind).items()}
    opt = mo.MetaOptimize(
        base=mo.SGD(),
        meta=mo.Lion(),
        blocks=blocks,
        step_size=dict(reversed(wanted.items())),
        discount=1.0,  # a mapping: its order says nothing
    )
    sizes = backend.to_numpy(opt.step_sizes(opt.init(backend.tree(values_like(SHAPES, 0)))))
    for key, value in wanted.items():
        assert relative_error(sizes[key], value) < rounding("float64", 8)


def test_beta_is_in_order_of_first_appearance() -> None:
    shapes = {"z": (2,), "head.a": (2,), "b": (), "head.c": (3, 1)}
    blocks = named({"head": "head.*", "rest": "*"}).bind(shapes)
    assert list(blocks.families) == ["rest", "head"]
    assert [family.start for family in blocks.families.values()] == [0, 1]
    assert list(tensor().bind(shapes).families) == list(shapes)
    assert [f.start for f in node().bind(shapes).families.values()] == [0, 1, 2, 3]
    opt = mo.MetaOptimize(
        base=mo.SGD(),
        meta=mo.SGD(),
        sigma="identity",
        blocks={"head": "head.*", "rest": "*"},
        step_size={"head": 0.5, "rest": 0.25},
        discount=1.0,
    )
    state = opt.init({name: np.zeros(shape) for name, shape in shapes.items()})
    np.testing.assert_array_equal(state.beta, [0.25, 0.5])


def test_the_first_pattern_wins() -> None:
    shapes = {"a.w": (1,), "a.b": (1,), "c.w": (1,), "c.b": (1,)}
    blocks = named({"first": "a.*", "weights": "*.w", "others": ("*.x", "*")})
    with pytest.raises(ValueError, match=r"'\*\.x' of group 'others' is the first match of no"):
        blocks.bind(shapes)
    bound = named({"first": "a.*", "weights": "*.w", "others": ("c.b", "*")})
    with pytest.raises(ValueError, match=r"pattern '\*' of group 'others'"):
        bound.bind(shapes)
    bound = named({"first": "a.*", "weights": "*.w", "others": "*"})
    assert dict(bound.bind(shapes).family_of) == {
        "a.w": "first",
        "a.b": "first",
        "c.w": "weights",
        "c.b": "others",
    }
    with pytest.raises(ValueError, match=r"no pattern that matches leaf 'c\.w'"):
        named({"first": "a.*"}).bind(shapes)


def test_reduce_sums_over_all_leaves_of_a_family(backend: Any) -> None:
    shapes = {"v": (2, 3), "b": (3,), "n": ()}
    blocks = Columns().bind(shapes)
    x = values_like(shapes, 3)
    got = backend.to_numpy(blocks.reduce(backend.tree(x)))
    want = np.append(x["v"].sum(axis=0) + x["b"], x["n"])
    assert relative_error(got, want) < rounding("float64", 3)


class Wrong(Partition):
    def __init__(self, family: str, view: tuple[int, ...]) -> None:
        self.family, self.view = family, view

    def assign(self, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:  # noqa: ARG002
        return self.family, self.view


class WrongPerLeaf(Wrong):
    per_leaf = True


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Wrong("all", (2,)), r"blocks of shape \(2,\), which must be \(\)"),
        (Wrong("all", (2, 2)), r"blocks of shape \(2, 2\)"),
        (WrongPerLeaf("all", (2, 3)), "its own name and shape"),
        (WrongPerLeaf("w", ()), "its own name and shape"),
        (node(2), r"`axis` of the node partition is 2, but 'w' has shape \(2, 3\)"),
        (node(-3), r"`axis` of the node partition is -3"),
    ],
)
def test_a_partition_that_does_not_fit_is_refused(wrong: Partition, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong.bind({"w": (2, 3)})


def test_leaves_of_a_family_have_equally_many_blocks() -> None:
    class Rows(Partition):
        def assign(self, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:  # noqa: ARG002
            return "rows", (shape[0], 1)

    assert Rows().bind({"a": (2, 3), "b": (2, 1)}).size == 2
    with pytest.raises(ValueError, match="gives leaf 'b' 3 blocks in family 'rows'"):
        Rows().bind({"a": (2, 3), "b": (3, 3)})


def test_what_is_no_partition_is_refused() -> None:
    for wrong in ("layer", 3, None):
        with pytest.raises(ValueError, match="`blocks` must be one of 'scalar', 'tensor'"):
            partition(wrong)
    for empty in ({}, {"head": ()}):
        with pytest.raises(ValueError, match="must name one group or more"):
            partition(empty)


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_without_entries_take_part(kind: str) -> None:
    """An axis may have length 0: nothing to move, nothing to say, nothing goes wrong."""
    shapes = OrderedDict(w0=(0, 3), w1=(2, 0), w2=(2, 3))
    blocks: Any = {"even": "w0", "rest": "*"} if kind == "named" else KINDS[kind]
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.SGD(), blocks=blocks, step_size=0.25, discount=1.0)
    alone = mo.MetaOptimize(
        base=mo.SGD(),
        meta=mo.SGD(),
        blocks={"rest": "*"} if kind == "named" else KINDS[kind],
        step_size=0.25,
        discount=1.0,
    )
    params = values_like(shapes, 0)
    only = {"w2": params["w2"]}
    state, other = opt.init(params), alone.init(only)
    for _ in range(3):
        params, state = opt.step(params, params, state)
        only, other = alone.step(only, only, other)
    np.testing.assert_array_equal(params["w2"], only["w2"])


def test_an_empty_leaf_at_rest_does_not_stop_the_blocks_of_another() -> None:
    opt = mo.MetaOptimize(
        base=mo.SGD(), meta=mo.AdamW(), step_size=0.1, meta_lr=0.01, blocks="node", discount=1.0
    )
    params: dict[str, Any] = {"a": np.zeros((0, 3)), "b": np.ones((2, 3))}
    state = opt.init(params)
    for _ in range(5):
        params, state = opt.step(params, {"a": None, "b": params["b"]}, state)
    sizes = opt.step_sizes(state)["b"]
    assert sizes[0] == sizes[1] > 0.101
