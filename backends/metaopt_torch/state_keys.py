"""Under which key an optimizer of torch's holds what is where in a `metaopt.State`."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from metaopt.plan import Spec

__all__ = ["Path", "state_key", "trace_key", "walk"]

#: Keys of nested mappings, from the field of the state on.
Path: TypeAlias = tuple[str, ...]


def walk(state: Mapping[str, Any], begin: Path = ()) -> Iterator[tuple[Path, Spec]]:
    """Yield the path and the spec of every array of a state, from `Plan.state`."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from walk(value, (*begin, key))
        else:
            yield (*begin, key), value


def state_key(path: Path, *, per_leaf: bool) -> tuple[str | None, str]:
    """Return the leaf whose state an array belongs to, None for the blocks', and its key there.

    At weight level (`per_leaf`) what belongs to blocks is held by leaves.
    """
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


def trace_key(key: str) -> str:
    """Return the key of the trace of beta, or of that of a slot of the meta update."""
    return "beta_trace" if key == "beta" else f"beta_trace_{key}"
