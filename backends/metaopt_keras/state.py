"""The core's state in variables of Keras, and leaves by the paths of theirs."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras

import metaopt as mo
from metaopt.state import arrays_of

__all__ = ["assign", "check_alike", "names_of", "value_of"]

NUMBER = r"_\d+$"


def names_of(variables: Sequence[Any], earlier: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the paths of variables; of those that share one, the later ones have a number more.

    `earlier` are the names before a model was written to a file, which stay: there Keras leaves out
    the name of a `Sequential`.
    """
    paths = [variable.path for variable in variables]
    if len(earlier) == len(paths) and all(map(_fits, earlier, paths)):
        return tuple(earlier)
    names: dict[str, None] = {}
    for path in paths:
        name, number = path, 0
        while name in names:
            number += 1
            name = f"{path}_{number}"
        names[name] = None
    return tuple(names)


def _fits(name: str, path: str) -> bool:
    """Say whether one of a name and a path is the end of the other, numbers of layers aside."""
    whole = (f"/{re.sub(NUMBER, '', name)}", f"/{name}")
    return any(one.endswith(f"/{path}") or f"/{path}".endswith(one) for one in whole)


def value_of(variable: Any) -> Any:
    """Return the array that a variable, or an array itself, holds: of torch, without a graph."""
    value = keras.ops.convert_to_tensor(variable)
    return value.detach() if hasattr(value, "detach") else value


def check_alike(state: mo.State, held: mo.State) -> None:
    """Raise ValueError unless a state has the leaves and arrays of that which variables hold."""
    if list(state.count) != list(held.count):
        msg = (
            f"`state` must be of the parameters {', '.join(held.count)}, in this order; got "
            f"{', '.join(state.count)}."
        )
        raise ValueError(msg)
    found, expected = arrays_of(state), arrays_of(held)
    for path in [*expected, *found]:
        kinds = [_kind(arrays.get(path)) for arrays in (expected, found)]
        if kinds[0] != kinds[1]:
            msg = (
                f"`state` must have {kinds[0]} as {'.'.join(path)!r}; got {kinds[1]}. It belongs "
                "to other parameters or to another configuration."
            )
            raise ValueError(msg)


def _kind(array: Any) -> str:
    if array is None:
        return "nothing"
    return f"{keras.backend.standardize_dtype(array.dtype)} of shape {tuple(array.shape)}"


def assign(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Set variables to values, some of which may lie in the memory of other variables."""
    pairs = list(pairs)
    if keras.backend.backend() == "torch":  # which writes into that memory
        owner = {_memory(variable.value): variable for variable, _ in pairs}
        pairs = [
            (variable, value if owner.get(_memory(value), variable) is variable else value.clone())
            for variable, value in pairs
        ]
    for variable, value in pairs:
        variable.assign(value)


def _memory(tensor: Any) -> int:
    return tensor.untyped_storage().data_ptr()
