"""Saving and loading a state with its configuration, as one safetensors file.

The arrays are tensors of the file; the configuration and the order of the leaves are JSON in its
metadata. Nothing in a file is executed.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from metaopt import blocks as partitions
from metaopt import curvature, rules, step_sizes
from metaopt.arrays import device, namespace, per_leaf, to_numpy
from metaopt.metaoptimize import MetaOptimize
from metaopt.state import State

__all__ = ["load", "save"]

_FORMAT = "metaopt.state"
_VERSION = 1
#: What a configuration may consist of; only these are ever made from a file.
_TYPES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        *(rules.SGD, rules.RMSprop, rules.AdamW, rules.Lion),
        *(step_sizes.Exp, step_sizes.Identity, step_sizes.Softplus, step_sizes.Sigmoid),
        *(partitions.Scalar, partitions.Tensor, partitions.Node, partitions.Weight),
        *(partitions.Named, curvature.Curvature, curvature.Diagonal),
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
    """
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "leaves": list(state.trace),
        "config": _config(opt),
    }
    tensors = {key: to_numpy(array) for key, array in _flat(vars(state))}
    data = to_bytes(tensors, metadata={"metaopt": json.dumps(header)})
    target = Path(path).resolve()  # a link keeps pointing to what it names
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
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
        placed, and in any order.
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
    if opt is None:
        opt = _build(path, header["config"])
    else:
        _compare(path, header["config"], json.loads(json.dumps(_config(opt))))
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
    fresh = opt.init(per_leaf((name, params[name]) for name in header["leaves"]))
    template = dict(_flat(vars(fresh)))
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
            metadata = file.metadata() or {}
            header = json.loads(metadata.get("metaopt", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        msg = f"{path} is truncated or not a safetensors file: {error}."
        raise ValueError(msg) from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        msg = f"{path} is a safetensors file, but not one that metaopt.save wrote."
        raise ValueError(msg)
    if header.get("version") != _VERSION:
        msg = f"{path} has version {header.get('version')!r}; this metaopt reads {_VERSION}."
        raise ValueError(msg)
    return header, tensors


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


def _config(opt: MetaOptimize) -> dict[str, Any]:
    return {field.name: _encode(getattr(opt, field.name)) for field in _fields()}


def _fields() -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(MetaOptimize) if field.init]


def _encode(value: Any) -> Any:
    """Return `value` as JSON can hold it; an object of an unknown class by its name and repr."""
    if isinstance(value, Mapping):
        return {"mapping": [[key, _encode(item)] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if type(value) is _TYPES.get(type(value).__name__):
        options = dataclasses.fields(value)
        return {
            "type": type(value).__name__,
            "options": {field.name: _encode(getattr(value, field.name)) for field in options},
        }
    if hasattr(value, "dtype"):
        return to_numpy(value).tolist()
    return {"foreign": f"{type(value).__module__}.{type(value).__qualname__}", "repr": repr(value)}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "mapping" in value:
        return {key: _decode(item) for key, item in value["mapping"]}
    if "foreign" in value:
        msg = f"holds {value['repr']} of the class {value['foreign']}; pass `opt` to load it"
        raise ValueError(msg)
    cls = _TYPES[value["type"]]
    return cls(**{name: _decode(item) for name, item in value["options"].items()})


def _build(path: str | os.PathLike[str], config: Any) -> MetaOptimize:
    try:
        return MetaOptimize(**{name: _decode(value) for name, value in config.items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        msg = f"{path} has a configuration that cannot be rebuilt: {error}."
        raise ValueError(msg) from error


def _compare(path: str | os.PathLike[str], saved: Any, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if saved.get(name) != value:
            msg = (
                f"{path} was saved with another `{name}`: {_show(saved.get(name))}; "
                f"`opt` has {_show(value)}."
            )
            raise ValueError(msg)


def _show(value: Any) -> str:
    """Return an encoded value as a user would write it, as far as that is possible."""
    try:
        return repr(_decode(value))
    except ValueError:
        return str(value["repr"])
