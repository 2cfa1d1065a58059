"""Parameters of which several devices hold parts.

With `jax.jit` and its shardings XLA adds over devices where the core adds over weights; within
`jax.shard_map` the core's sums are to be added here.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from metaopt.plan import Plan
from metaopt.rules.rule import scope_of

__all__ = ["by_compiler", "by_types", "in_types", "on_each", "spelled_out", "sums_over"]

Reduce = Callable[[list[Any]], list[Any]]


def sums_over(
    axis_name: str | tuple[str, ...] | None, params: Mapping[str, Any], plan: Plan
) -> tuple[Reduce | None, dict[str, int]]:
    """Return the core's `reduce` over mesh axes and its `copies`, for leaves not sharded over all.

    Raises
    ------
    ValueError
        If there is an axis over which no leaf varies, or a sharded leaf has several blocks, of
        which a device may have some alone, or a rule that has to see it whole.
    """
    if axis_name is None:
        return None, {}
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    varying = {name: _varies_over(leaf) for name, leaf in params.items()}
    for axis in axes:
        if not any(axis in over for over in varying.values()):
            msg = (
                f"`axis_name` has {axis!r}, over which no parameter is sharded. Leave it out where "
                "parameters are replicated, and call jax.shard_map with check_vma=True, which "
                "tells the ones from the others."
            )
            raise ValueError(msg)
    for name, over in varying.items():
        parts = (plan, *plan.learned.values())
        views = [part.blocks.views[name] for part in parts if name in part.blocks.views]
        if over.intersection(axes) and scope_of(plan.rules[name]) == "leaf":
            msg = (
                f"{name!r} is sharded within jax.shard_map, but {plan.rules[name]!r} has the scope "
                '"leaf": it has to see leaves whole. Use jax.jit with shardings, or, where the '
                'rule is elementwise, say `scope = "weight"`.'
            )
            raise ValueError(msg)
        several = [view for view in views if math.prod(view) > 1]
        if over.intersection(axes) and several:
            msg = (
                f"`blocks` divides {name!r}, of which devices have parts, into blocks of the shape "
                f"{several[0]}. With `axis_name` a block must hold whole leaves; use "
                "jax.jit with shardings."
            )
            raise ValueError(msg)
    copies = {
        name: math.prod(jax.lax.axis_size(axis) for axis in axes if axis not in over)
        for name, over in varying.items()
    }
    return lambda arrays: jax.lax.psum(arrays, axes), copies


def _varies_over(leaf: Any) -> frozenset[str]:
    """Return the mesh axes along which devices have values of their own, by the leaf's type."""
    kind = jax.typeof(leaf)
    manual = getattr(kind, "manual_axis_type", None)  # of JAX 0.10; `vma` before
    return kind.vma if manual is None else manual.varying


def in_types(params: Iterable[Any]) -> bool:
    """Say whether shardings are part of the parameters' types: on meshes with explicit axes."""
    return any(AxisType.Explicit in jax.typeof(param).sharding.mesh.axis_types for param in params)


def by_compiler(step: Callable[..., Any], grads: Any, state: Any, params: Any, options: Any) -> Any:
    """Return `step(grads, state, params, options)` with shardings inside left to the compiler.

    Where they are part of the types, JAX refuses to join or multiply arrays of different ones. What
    comes out is sharded like the parameters and the state that went in.
    """
    tree: Any  # JAX has no static type for it
    leaves, tree = jax.tree.flatten(options)
    arrays = [leaf if isinstance(leaf, jax.Array) else None for leaf in leaves]

    def shardings(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, tree)

    def run(grads: Any, state: Any, params: Any, arrays: list[Any]) -> Any:
        found = [
            leaf if array is None else array for leaf, array in zip(leaves, arrays, strict=True)
        ]
        return step(grads, state, params, tree.unflatten(found))

    kinds = (shardings(params), shardings(state))
    return jax.sharding.auto_axes(run, out_sharding=kinds)(grads, state, params, arrays)


def on_each(values: Any) -> Any:
    """Return values that each device is to have whole, where the mesh is known.

    Left to itself XLA may spread a vector with an entry for each unit of a layer as it does the
    layer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return values
    return jax.lax.with_sharding_constraint(values, PartitionSpec())


def spelled_out(tree: Any) -> Any:
    """Return arrays with shardings of explicit axes spelled as `jax.jit` spells those it returns.

    P() and P(None) are the same, but not to its cache.
    """

    def spelled(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf.sharding, NamedSharding):
            return leaf
        mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
        full = PartitionSpec(*spec, *(None,) * (leaf.ndim - len(spec)))
        if jax.typeof(leaf).sharding.spec != full:  # some axes in it are not explicit
            return leaf
        kind = leaf.sharding.memory_kind
        return jax.device_put(leaf, NamedSharding(mesh, full, memory_kind=kind))

    return jax.tree.map(spelled, tree) if in_types(jax.tree.leaves(tree)) else tree


def by_types(function: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """Return a function of pytrees like `params` that `by_compiler` runs, with shardings in types.

    A user's function: what it closes over has them, too.
    """
    like = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, params)
    meshes = {sharding.mesh for sharding in jax.tree.leaves(like)}
    explicit = {
        name
        for mesh in meshes
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }

    def call(*trees: Any) -> Any:
        typed = jax.sharding.explicit_axes(
            function, axes=tuple(sorted(explicit)), in_sharding=(like,) * len(trees)
        )
        return typed(*trees)

    return call
