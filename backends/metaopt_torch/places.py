"""Where a `metaopt.State` lies in an optimizer of torch's: with parameters, or with blocks."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from metaopt.plan import Spec
from metaopt_torch.vectors import name_of_trace

__all__ = ["Path", "paths", "place"]

#: Keys of nested mappings, from the field of the state on.
Path: TypeAlias = tuple[str, ...]


def paths(state: Mapping[str, Any], begin: Path = ()) -> Iterator[tuple[Path, Spec]]:
    """Yield where every array of a state stands, and what it is like, from `Plan.state`."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from paths(value, (*begin, key))
        else:
            yield (*begin, key), value


def place(path: Path, *, per_leaf: bool) -> tuple[str | None, str]:
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
        key = f"meta_{rest[0]}" if field == "meta_slots" else name_of_trace(rest[0])
        return (rest[1] if per_leaf else None), key
    return (rest[0] if rest else None), field
