"""A configuration of the core in plain values, as Keras writes it to files, and back."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import keras
import numpy as np

import metaopt as mo
from metaopt.checkpoint import decode, encode

__all__ = ["options_of", "to_options"]

#: The option under which arrays stand, of step sizes for each weight.
ARRAYS = "arrays"
NAMES = tuple(one.name for one in fields(mo.MetaOptimize) if one.init)


def options_of(config: mo.MetaOptimize) -> dict[str, Any]:
    """Return the options of a configuration as what JSON can hold, and arrays of NumPy."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def foreign(value: Any) -> Any:
        if not is_dataclass(value):
            msg = (
                f"{value!r} must be a dataclass to be written to a file: its fields are what it is "
                "made of again."
            )
            raise TypeError(msg)
        own = {one.name: getattr(value, one.name) for one in fields(value) if one.init}
        name = keras.saving.get_registered_name(type(value))
        return {"foreign": name, "options": encode(own, name, arrays, foreign)["mapping"]}

    found = {name: encode(getattr(config, name), name, arrays, foreign) for name in NAMES}
    return found | ({ARRAYS: arrays} if arrays else {})


def to_options(config: Mapping[str, Any], custom_objects: Any) -> dict[str, Any]:
    """Return the options that a mapping of plain values holds; others as they are.

    Raises
    ------
    ValueError
        If it names a class that Keras does not know, or is damaged.
    """
    given = dict(config)
    arrays = {key: _array(value) for key, value in given.pop(ARRAYS, {}).items()}

    def foreign(value: Mapping[str, Any]) -> Any:
        cls = keras.saving.get_registered_object(value["foreign"], custom_objects=custom_objects)
        if cls is None:
            msg = (
                f"`config` has an object of the class {value['foreign']!r}, which Keras does not "
                f"know: pass it in `custom_objects`, as {{{value['foreign']!r}: ...}}."
            )
            raise ValueError(msg)
        if not (isinstance(cls, type) and is_dataclass(cls)):
            msg = f"`config` must have dataclasses alone as objects; got one of {cls!r}."
            raise ValueError(msg)
        return cls(**decode({"mapping": value["options"]}, arrays, foreign))

    for name in NAMES:
        if name in given:
            try:
                given[name] = decode(given[name], arrays, foreign)
            except (AttributeError, KeyError, TypeError) as error:
                msg = f"`config[{name!r}]` must be what `get_config` returns; got {given[name]!r}."
                raise ValueError(msg) from error
    for name in ("base", "meta"):
        _check_no_path(name, given.get(name))
    return given


def _array(value: Any) -> Any:
    found = keras.saving.deserialize_keras_object(value) if isinstance(value, dict) else value
    return np.asarray(found)


def _check_no_path(name: str, given: Any) -> None:
    """Raise where a rule, or one within it, is named by the path of a class, which is imported.

    Nothing that a file names may be.
    """
    if isinstance(given, Mapping):
        for key, part in given.items():
            _check_no_path(f"{name}[{key!r}]", part)
    elif isinstance(given, list | tuple):
        for index, part in enumerate(given):
            _check_no_path(f"{name}[{index}]", part)
    elif isinstance(given, str) and "." in given:
        msg = (
            f"`{name}` must not name a class to import, {given!r}: make the optimizer with it, and "
            "take its `get_config`."
        )
        raise ValueError(msg)
