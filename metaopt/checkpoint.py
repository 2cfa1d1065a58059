"""Saving and loading a state with its configuration, as one safetensors file.

The arrays are tensors of the file; the configuration and the order of the leaves are JSON in its
metadata. Nothing in a file is executed.
"""

import contextlib
import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from metaopt import blocks as partitions
from metaopt import curvature, rules, step_sizes
from metaopt.arrays import at_hand, device, namespace, per_leaf, to_numpy
from metaopt.metaoptimize import MetaOptimize
from metaopt.rules.learned import Learned
from metaopt.state import State

__all__ = ["decode", "encode", "load", "save"]

_FORMAT = "metaopt.state"
_VERSION = 1
_CONFIG = "config/"  # begins the keys of the configuration's arrays
#: What a configuration may consist of; only these are ever made from a file.
_TYPES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        *rules.SHIPPED,
        *(getattr(step_sizes, name) for name in step_sizes.__all__ if name != "StepSizeMap"),
        *(partitions.Scalar, partitions.Tensor, partitions.Node, partitions.Weight),
        *(Learned, partitions.Named, curvature.Curvature, curvature.Diagonal),
    )
}


def save(path: str | os.PathLike[str], opt: MetaOptimize, state: State) -> None:
    """Write `state` and the configuration of `opt` to a safetensors file.

    The file is written beside `path` and then moved there in one step: a write that fails or is
    killed leaves a previous file as it was.

    Parameters
    ----------
    path : path
    opt : MetaOptimize
    state : State
        Of arrays of any library and device.

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError, TypeError
        If `state` is not one of `opt`.
    """
    opt.plan_of(state)
    config, arrays = _config(opt)
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "leaves": list(state.count),
        "config": config,
    }
    tensors = {key: to_numpy(array) for key, array in _flat(vars(state))} | arrays
    # the format is of arrays in C order, and safetensors takes what memory holds for it
    tensors = {key: np.asarray(array, order="C") for key, array in tensors.items()}
    data = to_bytes(tensors, metadata={"metaopt": json.dumps(header)})
    target = Path(path).resolve()  # a link keeps pointing to what it names
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    file = temporary.open("xb")
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def load(
    path: str | os.PathLike[str], params: Mapping[str, Any], opt: MetaOptimize | None = None
) -> tuple[MetaOptimize, State]:
    """Return the configuration and the state that `save` wrote.

    Parameters
    ----------
    path : path
    params : mapping of leaf name to array
        The parameters the state belongs to: of any library and device, on which its arrays are
        placed, and in any order. Where they are of another dtype than at `save`, and traces are
        kept in place of averages or the reverse, these are made of the values of the parameters.
    opt : MetaOptimize, optional
        The configuration expected. Needed where it holds a class of your own; refused where it
        differs from the file's. To go on with other settings, load without it and change the
        result by `dataclasses.replace(opt, meta_lr=...)`.

    Returns
    -------
    opt : MetaOptimize
    state : State

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is truncated or not a file of `save`, or does not fit `params` or `opt`; the message
        says how.
    """
    header, tensors = _read(path)
    arrays = {key: tensors.pop(key) for key in list(tensors) if key.startswith(_CONFIG)}
    if opt is None:
        opt = _build(path, header["config"], arrays)
    else:
        _compare(path, header["config"], arrays, opt)
    saved, given = set(header["leaves"]), set(params)
    if saved != given:
        which = sorted(saved ^ given)[0]
        where = (
            "in the file but not in `params`"
            if which in saved
            else "in `params` but not in the file"
        )
        msg = f"{path} belongs to other parameters: leaf {which!r} is {where}."
        raise ValueError(msg)
    try:
        fresh = opt.init(per_leaf((name, params[name]) for name in header["leaves"]))
    except ValueError as error:
        msg = f"{path} does not fit `params`: {error}"
        raise ValueError(msg) from error
    template = dict(_flat(vars(fresh)))
    _exchange(tensors, template, params)
    if template.keys() != tensors.keys():
        which = sorted(template.keys() ^ tensors.keys())[0]
        how = "missing" if which in template else "unknown"
        msg = f"{path} does not fit its configuration: {which!r} is {how}."
        raise ValueError(msg)

    def placed(key: str, like: Any) -> Any:
        array, expected = tensors[key], to_numpy(like)
        if array.shape != expected.shape or array.dtype != expected.dtype:
            msg = (
                f"{path} does not fit `params`: {key!r} is {array.dtype} of shape {array.shape}; "
                f"these parameters need {expected.dtype} of shape {expected.shape}."
            )
            raise ValueError(msg)
        return namespace(like).asarray(array, dtype=like.dtype, device=device(like))

    return opt, State(
        **{name: _rebuild(name, value, placed) for name, value in vars(fresh).items()}
    )


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            header = _header(path, file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        msg = f"{path} is truncated or not a safetensors file of metaopt.save: {error}."
        raise ValueError(msg) from error
    return header, tensors


def _header(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the header, of the right format and version, with the fields that it must have."""
    try:
        header = json.loads(metadata.get("metaopt", "null"))
    except (ValueError, RecursionError) as error:
        msg = f"{path} has metadata that cannot be read: {error}."
        raise ValueError(msg) from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        msg = f"{path} is a safetensors file, but not one that metaopt.save wrote."
        raise ValueError(msg)
    if header.get("version") != _VERSION:
        msg = f"{path} has version {header.get('version')!r}; this metaopt reads {_VERSION}."
        raise ValueError(msg)
    leaves = header.get("leaves")
    if (
        not isinstance(leaves, list)
        or not leaves
        or not all(isinstance(leaf, str) for leaf in leaves)
    ):
        msg = f"{path} is damaged: its list of leaves is {leaves!r}."
        raise ValueError(msg)
    if not isinstance(header.get("config"), dict):
        msg = f"{path} has a configuration that cannot be rebuilt: {header.get('config')!r}."
        raise ValueError(msg)
    return header


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _rebuild(key: str, value: Any, placed: Any) -> Any:
    if isinstance(value, Mapping):
        return per_leaf(
            (name, _rebuild(f"{key}/{name}", item, placed)) for name, item in value.items()
        )
    return placed(key, value)


def _exchange(
    tensors: dict[str, Any], template: Mapping[str, Any], params: Mapping[str, Any]
) -> None:
    """Make of traces the averages that they are the distances to, or the reverse, as needed."""
    for old, new in (("trace", "average"), ("average", "trace")):
        for name, param in params.items():
            kept = tensors.get(f"{old}/{name}")
            wanted = template.get(f"{new}/{name}")
            if kept is None or wanted is None or kept.shape != tuple(wanted.shape):
                continue
            weights = to_numpy(param).astype(kept.dtype)
            moved = tensors.get(f"count/{name}", 1) > 0  # before the first step the trace is 0
            tensors[f"{new}/{name}"] = np.where(moved, weights - kept, np.zeros_like(kept))
            del tensors[f"{old}/{name}"]


def _config(opt: MetaOptimize) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Return the configuration as JSON can hold it, and its arrays by key of the file."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    config = {
        option.name: encode(getattr(opt, option.name), f"{_CONFIG}{option.name}", arrays)
        for option in dataclasses.fields(MetaOptimize)
        if option.init
    }
    return config, arrays


def encode(
    value: Any,
    key: str,
    arrays: dict[str, np.ndarray[Any, Any]],
    foreign: Callable[[Any], Any] | None = None,
) -> Any:
    """Return a part of a configuration as JSON can hold it.

    Parameters
    ----------
    value : object
        An option of `metaopt.MetaOptimize`.
    key : str
        What its arrays are called.
    arrays : dict
        Takes them.
    foreign : callable, optional
        From an object of an unknown class to what JSON can hold, a dict with the key "foreign"; by
        default its name and repr.
    """

    def inner(item: Any, name: Any) -> Any:
        return encode(item, f"{key}/{name}", arrays, foreign)

    if isinstance(value, Mapping):
        return {"mapping": [[name, inner(item, name)] for name, item in value.items()]}
    if isinstance(value, tuple | list):
        return [inner(item, index) for index, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if type(value) is _TYPES.get(type(value).__name__):
        own = [option.name for option in dataclasses.fields(value) if option.init]
        options = {name: inner(getattr(value, name), name) for name in own}
        return {"type": type(value).__name__, "options": options}
    if isinstance(value, np.ndarray):
        arrays[key] = value
        return {"array": key}
    if hasattr(value, "dtype") and getattr(value, "shape", None) == () and at_hand(value):
        return float(to_numpy(value))  # a hyperparameter that is an array of another library
    return _shown(value) if foreign is None else foreign(value)


def _shown(value: Any) -> dict[str, str]:
    """Return the name and the repr of an object of an unknown class."""
    cls: Any = type(value)
    # the default repr holds an address, which no other process has
    shown = cls.__qualname__ if cls.__repr__ is object.__repr__ else repr(value)
    return {"foreign": f"{cls.__module__}.{cls.__qualname__}", "repr": shown}


def decode(
    value: Any,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    foreign: Callable[[Mapping[str, Any]], Any] | None = None,
) -> Any:
    """Return what `encode` was given; by default an error for objects of unknown classes.

    Parameters
    ----------
    value : object
        What `encode` returned.
    arrays : mapping of key to array
    foreign : callable, optional
        The inverse of that of `encode`.

    Raises
    ------
    ValueError, KeyError, TypeError, AttributeError
        If it is nothing that `encode` returns.
    """
    if isinstance(value, list):
        return tuple(decode(item, arrays, foreign) for item in value)
    if not isinstance(value, dict):
        return value
    if "mapping" in value:
        return {name: decode(item, arrays, foreign) for name, item in value["mapping"]}
    if "array" in value:
        return arrays[value["array"]]
    if "foreign" in value:
        if foreign is not None:
            return foreign(value)
        msg = f"holds {value['repr']} of the class {value['foreign']}; pass `opt` to load it"
        raise ValueError(msg)
    cls = _TYPES[value["type"]]
    options = value["options"].items()
    return cls(**{name: decode(item, arrays, foreign) for name, item in options})


def _build(
    path: str | os.PathLike[str], config: Any, arrays: Mapping[str, np.ndarray[Any, Any]]
) -> MetaOptimize:
    try:
        options = {name: decode(value, arrays) for name, value in config.items()}
        _check_made(options)
        return MetaOptimize(**options)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        msg = f"{path} has a configuration that cannot be rebuilt: {error}."
        raise ValueError(msg) from error


def _check_made(options: Mapping[str, Any]) -> None:
    """Raise where a rule is given by name: what a file names must never be imported."""
    for option in ("base", "meta"):
        given = options.get(option)
        for rule in given.values() if isinstance(given, Mapping) else (given,):
            if not isinstance(rule, rules.SHIPPED):
                msg = f"`{option}` must be a rule of metaopt; got {rule!r}"
                raise ValueError(msg)


def _compare(
    path: str | os.PathLike[str],
    saved: Mapping[str, Any],
    saved_arrays: Mapping[str, np.ndarray[Any, Any]],
    opt: MetaOptimize,
) -> None:
    """Raise unless the file was saved with the configuration `opt`."""
    given, arrays = _config(opt)
    for name, value in json.loads(json.dumps(given)).items():
        keys = {key for key in arrays if f"{key}/".startswith(f"{_CONFIG}{name}/")}
        if saved.get(name) != value or not all(
            np.array_equal(arrays[key], saved_arrays.get(key, np.zeros(0))) for key in keys
        ):
            msg = (
                f"{path} was saved with another `{name}`: {_show(saved.get(name))}; "
                f"`opt` has {_show(value)}."
            )
            raise ValueError(msg)


def _show(value: Any) -> str:
    """Return an encoded value much as a user would write it."""
    if isinstance(value, list):
        return f"({', '.join(map(_show, value))})"
    if not isinstance(value, dict):
        return repr(value)
    try:
        if "mapping" in value:
            inner = (f"{name!r}: {_show(item)}" for name, item in value["mapping"])
            return "{" + ", ".join(inner) + "}"
        if "type" in value:
            options = (f"{name}={_show(item)}" for name, item in value["options"].items())
            return f"{value['type']}({', '.join(options)})"
        return str(value["repr"] if "repr" in value else value["array"])
    except (AttributeError, KeyError, TypeError, ValueError):  # a damaged file
        return json.dumps(value)
