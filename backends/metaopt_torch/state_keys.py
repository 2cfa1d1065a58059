"""Under which keys an optimizer of torch's holds what is where in a `metaopt.State`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metaopt.plan import Plan, Spec

__all__ = [
    "Path",
    "Place",
    "horizon_keys",
    "learned_key",
    "learned_specs",
    "needed",
    "places",
    "trace_key",
]

#: Keys of nested mappings, from the field of the state on.
Path: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """An array of a state, and where it is held.

    Parameters
    ----------
    path : tuple of str
        In the core's state.
    leaf : str or None
        Whose state it belongs to, None for the blocks'.
    keys : tuple of str
        One; where a leaf has something of each of several discounts, one for each, so that what is
        held there is always laid out and distributed like the parameter.
    spec : Spec
        Of what each key holds.
    split : bool
        Whether the core has what the keys hold together, along a leading axis.
    """

    path: Path
    leaf: str | None
    keys: tuple[str, ...]
    spec: Spec
    split: bool = False

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the core's array of what the keys hold; unless split the very tensor."""
        return torch.stack(list(parts)) if self.split else parts[0]

    def parts(self, array: Tensor) -> Sequence[Tensor]:
        """Return what the keys hold of the core's array."""
        return array.unbind() if self.split else (array,)


def places(plan: Plan, *, per_leaf: bool) -> dict[Path, Place]:
    """Return the places of all arrays of a plan's state, by path.

    At weight level (`per_leaf`) what belongs to blocks is held by leaves.
    """
    found = {}
    for path, spec in _walk(plan.state):
        leaf, key = _key_in(plan, path, per_leaf=per_leaf)
        # all but the rule's own slots, whose shapes may be any
        split = bool(plan.horizons and leaf is not None and path[0] not in ("slots", "learned"))
        split = split and len(spec.shape) > len(plan.shapes[leaf or ""])
        keys = horizon_keys(key, plan.horizons if split else ())
        one = Spec(spec.shape[1:], spec.dtype) if split else spec
        found[path] = Place(path, leaf, keys, one, split)
    return found


def needed(place: Place) -> bool:
    """Say whether steps need an array of a leaf's state where nothing is learned any more."""
    field = place.path[2] if place.path[0] == "learned" else place.path[0]
    return field in ("count", "slots", "beta")


def learned_specs(plan: Plan) -> dict[str, tuple[str, Spec]]:
    """Return what belongs to the blocks of learned numbers: by key, whose it is and its spec."""
    found = places(plan, per_leaf=plan.blocks.partition.per_leaf)
    return {
        place.keys[0]: (place.path[1], place.spec)
        for place in found.values()
        if place.path[0] == "learned" and place.leaf is None
    }


def horizon_keys(key: str, horizons: tuple[int, ...]) -> tuple[str, ...]:
    """Return the keys of what each discount has of its own: for a single number the one."""
    return tuple(f"{key}_{index}" for index in range(*horizons)) if horizons else (key,)


def trace_key(key: str) -> str:
    """Return the key of the trace of beta, or of that of a slot of the meta update."""
    return "beta_trace" if key == "beta" else f"beta_trace_{key}"


def _walk(state: Mapping[str, Any], begin: Path = ()) -> Iterator[tuple[Path, Spec]]:
    """Yield the path and the spec of every array of a state, from `Plan.state`."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _walk(value, (*begin, key))
        else:
            yield (*begin, key), value


def learned_key(name: str, key: str) -> str:
    """Return the key of what a number that is learned has of its own."""
    return f"{name}.{key}"


def _key_in(plan: Plan, path: Path, *, per_leaf: bool) -> tuple[str | None, str]:
    """Return the leaf, None for the blocks, and the key of an array, also of a learned number."""
    if path[0] != "learned":
        return _key(path, per_leaf=per_leaf)
    _, name, *rest = path
    leaf, key = _key(tuple(rest), per_leaf=plan.learned[name].blocks.partition.per_leaf)
    return leaf, learned_key(name, key)


def _key(path: Path, *, per_leaf: bool) -> tuple[str | None, str]:
    """Return the leaf whose state an array belongs to, None for the blocks', and its key there."""
    field, *rest = path
    if field == "count":
        return rest[0], "step"
    if field == "slots":
        return rest[0], rest[1]
    if field == "slot_traces":
        return rest[0], f"{rest[1]}_trace"
    if field in ("trace", "average", "third_trace"):
        return rest[0], field
    if field in ("meta_slots", "beta_trace"):
        key = f"meta_{rest[0]}" if field == "meta_slots" else trace_key(rest[0])
        return (rest[1] if per_leaf else None), key
    return (rest[0] if rest else None), field
