"""Blocks: which parameters share a step size.

docs/mathematics.md section 9. A partition is a pair of linear maps: `expand` hands every leaf the
meta-parameters of its blocks, and its adjoint `reduce` sums each leaf's contribution per block.

Every partition here comes from one question, asked of each leaf: to which *family* of blocks does
it belong, and along which of its axes do the blocks of the family lie?
"""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from metaopt.arrays import Array, Leaves, Namespace, Shape, cast, full, namespace

__all__ = [
    "Blocks",
    "Named",
    "Partition",
    "first_match",
    "named",
    "node",
    "partition",
    "scalar",
    "tensor",
    "weight",
]


class Partition(ABC):
    """Which weights share a step size; subclass it for a partition of your own."""

    #: Keep beta as one array per leaf rather than one vector: where every weight is a block of
    #: its own, and `assign` returns (name, shape).
    per_leaf: ClassVar[bool] = False

    @abstractmethod
    def assign(self, name: str, shape: Shape) -> tuple[str, Shape]:
        """Return the family of a leaf and the shape in which its blocks lie along the leaf.

        Parameters
        ----------
        name : str
            Name of the leaf.
        shape : tuple of int
            Its shape.

        Returns
        -------
        family : str
            Key of the family, as in `step_sizes`. Leaves may share one.
        blocks : tuple of int
            Shape broadcastable to `shape`: `()` for one block, else of as many axes as the leaf,
            each of the leaf's length or 1. Leaves of one family have equally many blocks.
        """

    def bind(self, shapes: Mapping[str, Shape]) -> "Blocks":
        """Return the blocks of leaves with these shapes.

        Raises
        ------
        ValueError
            If a leaf does not fit.
        """
        families: OrderedDict[str, Family] = OrderedDict()
        views: Leaves[Shape] = OrderedDict()
        family_of: Leaves[str] = OrderedDict()
        start = 0
        for name, shape in shapes.items():
            key, view = self.assign(name, tuple(shape))
            size = math.prod(view)
            if view != () and not (
                len(view) == len(shape)
                and all(blocks in (1, length) for blocks, length in zip(view, shape, strict=True))
            ):
                msg = (
                    f"`blocks` gives leaf {name!r} blocks of shape {view}, which must be () or "
                    f"have, for each axis of {tuple(shape)}, its length or 1."
                )
                raise ValueError(msg)
            if self.per_leaf and (key, view) != (name, tuple(shape)):
                msg = (
                    f"`blocks` with `per_leaf` must give leaf {name!r} its own name and shape "
                    f"{tuple(shape)}; got {key!r} and {view}."
                )
                raise ValueError(msg)
            if key not in families:
                families[key] = Family(start, size, view == ())
                start += size
            elif (families[key].size, families[key].single) != (size, view == ()):
                msg = (
                    f"`blocks` gives leaf {name!r} {size} blocks in family {key!r}, which has "
                    f"{families[key].size} by its first leaf; these must be equal, and all or none "
                    "of shape ()."
                )
                raise ValueError(msg)
            views[name], family_of[name] = view, key
        return Blocks(
            self,
            families,
            family_of,
            views,
            start,
        )


@dataclass(frozen=True, slots=True)
class Family:
    """Blocks that rest together: entries `start` to `start + size` of beta."""

    start: int
    size: int
    single: bool


@dataclass(frozen=True, slots=True)
class Blocks:
    """A partition bound to leaves of known names and shapes.

    Made by `Partition.bind`. Where the partition has `per_leaf`, a value per block is a mapping of
    leaf name to array of the leaf's shape; elsewhere it is one vector of length `size`. Both may
    have a leading axis more, an entry per column of a dense trace.

    Parameters
    ----------
    partition : Partition
    families : mapping of key to Family
        In order of first appearance; the keys are those of `step_sizes`.
    family_of : mapping of leaf name to key
    views : mapping of leaf name to tuple of int
        Shape in which the leaf's blocks lie along it, see `Partition.assign`.
    size : int
        Number m of all blocks.
    """

    partition: Partition
    families: "OrderedDict[str, Family]"
    family_of: Leaves[str]
    views: Leaves[Shape]
    size: int

    def expand(self, values: Any) -> Leaves[Any]:
        """Return for each leaf its blocks' values, in a shape broadcastable to the leaf."""
        return OrderedDict((name, self.expand_leaf(values, name)) for name in self.views)

    def expand_leaf(self, values: Any, name: str, ndim: int | None = None) -> Any:
        """Return one leaf's part of `expand`.

        Parameters
        ----------
        values : vector (size,) or mapping, or the same with leading axes
        name : str
        ndim : int, optional
            Axes of the leaf, needed where there are leading axes.
        """
        if self.partition.per_leaf:
            return values[name]
        family, view = self.families[self.family_of[name]], self.views[name]
        if values.ndim == 1:
            if view == ():
                return values[family.start]
            return namespace(values).reshape(self._segment(values, family), view)
        aligned = view if view != () else (1,) * (ndim or 0)
        segment = self._segment(values, family)
        return namespace(values).reshape(segment, (*values.shape[:-1], *aligned))

    def _segment(self, values: Any, family: Family) -> Any:
        if family.size == self.size:
            return values
        return values[..., family.start : family.start + family.size]

    def reduce(self, products: Mapping[str, Array], dtype: Any = None) -> Any:
        """Return the sum of each block's part of the leaves: the adjoint of `expand`.

        Parameters
        ----------
        products : mapping of leaf name to array of the leaf's shape
            A leaf that is absent contributes nothing.
        dtype : optional
            Dtype in which to sum and of the result; that of `products` by default.

        Returns
        -------
        vector (size,), or with `per_leaf` mapping of leaf name to array

        Raises
        ------
        ValueError
            If `products` is empty: there is no array to make zeros from.
        """
        if not products:
            msg = "`products` must hold at least one leaf; got none."
            raise ValueError(msg)
        dtype = next(iter(products.values())).dtype if dtype is None else dtype
        return self.gather({name: self.partial(products[name], name, dtype) for name in products})

    def partial(self, product: Array, name: str, dtype: Any) -> Array:
        """Return one leaf's sums over its blocks, in the shape of its blocks, in `dtype`."""
        if self.partition.per_leaf:
            return cast(product, dtype)
        xp, view = namespace(product), self.views[name]
        if view == ():
            return xp.sum(product, dtype=dtype)
        axes = tuple(axis for axis, length in enumerate(view) if length == 1)
        return xp.sum(product, axis=axes, dtype=dtype) if axes else cast(product, dtype)

    def gather(self, partials: Mapping[str, Array]) -> Any:
        """Return the values per block from the `partial` sums of some of the leaves, at least one.

        The entries of leaves that are absent are 0.
        """
        some = next(iter(partials.values()))
        if self.partition.per_leaf:
            return OrderedDict(
                (name, partials[name] if name in partials else full(some, shape, 0))
                for name, shape in self.views.items()
            )
        xp = namespace(some)
        sums: dict[str, Array] = {}
        for name, part in partials.items():
            key = self.family_of[name]
            flat = xp.reshape(part, (-1,))
            sums[key] = sums[key] + flat if key in sums else flat
        segments = [
            sums[key] if key in sums else full(some, (family.size,), 0)
            for key, family in self.families.items()
        ]
        return segments[0] if len(segments) == 1 else xp.concat(segments)

    def by_name(self, values: Any) -> dict[str, Any]:
        """Return the values of each family under its key: 0-d for one block, else one each."""
        if self.partition.per_leaf:
            return dict(values)
        return {
            key: values[family.start]
            if family.single
            else values[family.start : family.start + family.size]
            for key, family in self.families.items()
        }

    def from_names(self, values: Mapping[str, Any]) -> Any:
        """Return values per block from one array for each family, 0-d or one entry per block."""
        if self.partition.per_leaf:
            return OrderedDict((name, values[name]) for name in self.views)
        xp = namespace(next(iter(values.values())))
        return xp.concat(
            [
                xp.reshape(xp.broadcast_to(values[key], (family.size,)), (-1,))
                for key, family in self.families.items()
            ]
        )

    def total(self, flags: Any) -> Array:
        """Return how many blocks are flagged, an int32 vector: of each, at weight level by leaf."""
        if not self.partition.per_leaf:
            return namespace(flags).astype(flags, namespace(flags).int32)
        xp = namespace(next(iter(flags.values())))
        return xp.stack([_count(xp, flags[name]) for name in self.views])

    def split(self, values: Any) -> Any:
        """Return values per block from a vector (size,) or a matrix (columns, size)."""
        if not self.partition.per_leaf:
            return values
        xp = namespace(values)
        return OrderedDict(
            (
                name,
                xp.reshape(
                    self._segment(values, self.families[name]), (*values.shape[:-1], *shape)
                ),
            )
            for name, shape in self.views.items()
        )

    def join(self, values: Any) -> Any:
        """Return a vector (size,) from values per block: the inverse of `split`."""
        if not self.partition.per_leaf:
            return values
        xp = namespace(next(iter(values.values())))
        return xp.concat([xp.reshape(values[name], (-1,)) for name in self.views])


def _count(xp: Namespace, flags: Array) -> Array:
    return xp.sum(xp.astype(flags, xp.int32), dtype=xp.int32)


@dataclass(frozen=True, slots=True)
class Scalar(Partition):
    """One step size for all weights, under the key "all"."""

    def assign(self, name: str, shape: Shape) -> tuple[str, Shape]:  # noqa: ARG002
        return "all", ()


@dataclass(frozen=True, slots=True)
class Tensor(Partition):
    """One step size per leaf, under the leaf's name."""

    def assign(self, name: str, shape: Shape) -> tuple[str, Shape]:  # noqa: ARG002
        return name, ()


@dataclass(frozen=True, slots=True)
class Node(Partition):
    """One step size per output unit of a leaf, one per leaf of fewer than two axes."""

    axis: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.axis, int) or isinstance(self.axis, bool):
            msg = f"`axis` of the node partition must be an integer; got {self.axis!r}."
            raise TypeError(msg)

    def assign(self, name: str, shape: Shape) -> tuple[str, Shape]:
        if len(shape) < 2:
            return name, ()
        if not -len(shape) <= self.axis < len(shape):
            msg = f"`axis` of the node partition is {self.axis}, but {name!r} has shape {shape}."
            raise ValueError(msg)
        axis = self.axis % len(shape)
        return name, tuple(n if i == axis else 1 for i, n in enumerate(shape))


@dataclass(frozen=True, slots=True)
class Weight(Partition):
    """One step size per weight, under the leaf's name, in its shape."""

    per_leaf: ClassVar[bool] = True

    def assign(self, name: str, shape: Shape) -> tuple[str, Shape]:
        return name, shape


@dataclass(frozen=True, slots=True)
class Named(Partition):
    """One step size per group of leaves, under the group's name; the first match wins.

    Parameters
    ----------
    groups : tuple of (group name, tuple of patterns)
    """

    groups: tuple[tuple[str, tuple[str, ...]], ...]

    def assign(self, name: str, shape: Shape) -> tuple[str, Shape]:  # noqa: ARG002, D102
        for group, patterns in self.groups:
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                return group, ()
        msg = (
            f"`blocks` has no pattern that matches leaf {name!r}; "
            'add one, or a last group with the pattern "*".'
        )
        raise ValueError(msg)

    def bind(self, shapes: Mapping[str, Shape]) -> Blocks:  # noqa: D102
        flat = [(group, pattern) for group, patterns in self.groups for pattern in patterns]
        won = {first_match(name, [pattern for _, pattern in flat]) for name in shapes}
        for index, (group, pattern) in enumerate(flat):
            if index not in won:
                msg = (
                    f"`blocks` pattern {pattern!r} of group {group!r} is the first match of no "
                    f"leaf; leaves: {', '.join(shapes)}."
                )
                raise ValueError(msg)
        return super(Named, self).bind(shapes)


def first_match(name: str, patterns: list[str]) -> int | None:
    """Return the index of the first glob that matches a name, or None.

    Parameters
    ----------
    name : str
    patterns : list of str
    """
    for index, pattern in enumerate(patterns):
        if fnmatchcase(name, pattern):
            return index
    return None


def scalar() -> Partition:
    """Return the partition with one step size for all weights."""
    return Scalar()


def tensor() -> Partition:
    """Return the partition with one step size per leaf."""
    return Tensor()


def node(axis: int = 0) -> Partition:
    """Return the partition with one step size per output unit.

    Parameters
    ----------
    axis : int, default 0
        Where a leaf of two or more axes has its output units: 0 in PyTorch, -1 in Flax kernels.

    Raises
    ------
    TypeError
        If it is no integer.
    """
    return Node(axis)


def weight() -> Partition:
    """Return the partition with one step size per weight."""
    return Weight()


def named(groups: Mapping[str, Any]) -> Partition:
    """Return the partition with one step size per named group of leaves.

    Parameters
    ----------
    groups : mapping of group name to pattern, or tuple of patterns
        `fnmatch` globs on the full leaf name, such as `{"head": "fc.*", "rest": "*"}`. The first
        match wins. Checked at `init`: every leaf must match, every pattern must win a leaf.

    Raises
    ------
    ValueError
        If there is no group or no pattern, or a name or pattern is no string.
    """
    pairs = tuple(
        (group, tuple(patterns) if isinstance(patterns, tuple | list) else (patterns,))
        for group, patterns in groups.items()
    )
    if not pairs or not all(
        isinstance(group, str)
        and patterns
        and all(isinstance(pattern, str) for pattern in patterns)
        for group, patterns in pairs
    ):
        msg = f"`blocks` must name one group or more, each with a pattern or more; got {groups!r}."
        raise ValueError(msg)
    return Named(pairs)


def partition(blocks: Any) -> Partition:
    """Return the partition that `blocks` names, lists or is.

    Parameters
    ----------
    blocks : {"scalar", "tensor", "node", "weight"}, mapping or Partition
        As `MetaOptimize` takes it.

    Raises
    ------
    ValueError
        If it is anything else.
    """
    short = {"scalar": scalar, "tensor": tensor, "node": node, "weight": weight}
    if isinstance(blocks, Partition):
        return blocks
    if isinstance(blocks, Mapping):
        return named(blocks)
    if isinstance(blocks, str) and blocks in short:
        return short[blocks]()
    msg = (
        f"`blocks` must be one of {', '.join(map(repr, short))}, a mapping of group name to "
        f"patterns, or a metaopt.blocks.Partition; got {blocks!r}."
    )
    raise ValueError(msg)
