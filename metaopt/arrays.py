"""What is asked of an array, and how its namespace is found.

The core is written against the Python array API standard (version 2024.12): the operators below,
and the functions of the namespace an array belongs to.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, Self, TypeAlias, TypeVar

import numpy as np
from array_api_compat import array_namespace, is_cupy_array, is_torch_array

__all__ = [
    "Arithmetic",
    "Array",
    "ArrayT",
    "Leaves",
    "Namespace",
    "Shape",
    "at_hand",
    "cast",
    "compute_dtype",
    "device",
    "full",
    "home",
    "is_narrow",
    "is_number",
    "is_real_floating",
    "is_sparse",
    "kind_of",
    "lacking",
    "map_leaves",
    "namespace",
    "per_leaf",
    "solid",
    "to_numpy",
]


class Arithmetic(Protocol):
    """The operators that update rules use; arrays and jets both have them."""

    def __add__(self, other: Any, /) -> Self: ...
    def __radd__(self, other: Any, /) -> Self: ...
    def __sub__(self, other: Any, /) -> Self: ...
    def __rsub__(self, other: Any, /) -> Self: ...
    def __mul__(self, other: Any, /) -> Self: ...
    def __rmul__(self, other: Any, /) -> Self: ...
    def __truediv__(self, other: Any, /) -> Self: ...
    def __rtruediv__(self, other: Any, /) -> Self: ...
    def __neg__(self) -> Self: ...


class Array(Arithmetic, Protocol):
    """An array of any library that follows the standard."""

    @property
    def dtype(self) -> Any: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def ndim(self) -> int: ...  # noqa: D102
    def __getitem__(self, key: Any, /) -> Self: ...
    def __pow__(self, other: Any, /) -> Self: ...


ArrayT = TypeVar("ArrayT", bound=Arithmetic)
ValueT = TypeVar("ValueT")
ResultT = TypeVar("ResultT")

#: The standard has no static type for a namespace.
Namespace: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]

#: One value per leaf (a leaf is one named parameter array), in the order of the parameters at
#: `init`. Ordered explicitly because JAX sorts the keys of a plain dict wherever it
#: rebuilds one, and the blocks of a state must not change places under jit.
Leaves: TypeAlias = OrderedDict[str, ValueT]

_namespaces: dict[type, Namespace] = {}


class _Mlx:
    """MLX's namespace, with what it lacks of the standard: devices, and some keywords."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self.bool = xp.bool_

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)

    # arrays lie in one memory, and devices are those of operations

    def full(self, shape: Shape, value: Any, *, dtype: Any, device: Any = None) -> Any:
        del device
        return self._xp.full(shape, value, dtype=dtype)

    def eye(self, size: int, *, dtype: Any, device: Any = None) -> Any:
        del device
        return self._xp.eye(size, dtype=dtype)

    def asarray(self, value: Any, *, dtype: Any = None, device: Any = None) -> Any:
        del device
        return self._xp.array(value, dtype=dtype)

    def sum(self, array: Any, *, dtype: Any = None, **options: Any) -> Any:
        return self._xp.sum(array if dtype is None else array.astype(dtype), **options)

    def clip(self, array: Any, *, min: Any = None, max: Any = None) -> Any:
        return self._xp.clip(array, min, max)


def namespace(array: Any) -> Namespace:
    """Return the namespace of `array`, looked up once per array type.

    A plain dict rather than `functools.cache`: torch.compile traces through it.

    Raises
    ------
    TypeError
        If it has none, or operators of another meaning than the standard's: matrices and masked
        arrays.
    """
    kind = type(array)
    if kind not in _namespaces:
        if issubclass(kind, np.matrix | np.ma.MaskedArray):
            msg = f"the operators of a {kind.__name__} are not those of the array API standard"
            raise TypeError(msg)
        found = array_namespace(array)
        _namespaces[kind] = _Mlx(found) if kind.__module__ == "mlx.core" else found
    return _namespaces[kind]


def cast(array: Any, dtype: Any) -> Any:
    """Return `array` in `dtype`, itself where it has that dtype already."""
    if array.dtype == dtype:
        return array
    return namespace(array).astype(solid(array), dtype)


def compute_dtype(dtype: Any, xp: Namespace) -> Any:
    """Return float64 for a floating `dtype` as wide, in whatever byte order; else float32."""
    wide = is_real_floating(dtype, xp) and xp.finfo(dtype).bits > 32
    return xp.float64 if wide else xp.float32


def is_narrow(dtype: Any, xp: Namespace) -> bool:
    """Say whether a floating `dtype` is narrower than float32, in which steps are computed."""
    return is_real_floating(dtype, xp) and xp.finfo(dtype).bits < 32


def lacking(xp: Namespace) -> str:
    """Return what fails of the calls that libraries close to the standard lack; "" for nothing."""
    try:
        flat = xp.reshape(xp.full((1,), 0.0, dtype=xp.float32, device=None), (-1,))
        xp.sum(flat, dtype=xp.float32)
    except Exception as error:  # of whatever kind a library raises
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


def device(array: Any) -> Any:
    """Return the device of `array`; None, the default one, where it says none.

    Traced JAX arrays and Dask's say none. Not array_api_compat's function: torch.compile warns of
    the caches inside, and this is called within a step.
    """
    return getattr(array, "device", None)


def home(array: Any) -> Any:
    """Return where an array of another shape belongs beside `array`: its device.

    Where several devices hold parts of it, as JAX's shardings say, all of them, each the whole.
    None, the default device, for JAX's arrays that no one has put on a device: they go where others
    are, and are compiled for anew once they lie beside those that somebody has.
    """
    found = device(array)
    if found is None or not getattr(array, "committed", True):
        return None
    spec = getattr(found, "spec", None)
    return found if spec is None else type(found)(found.mesh, type(spec)())


def full(like: Any, shape: Shape, value: float, dtype: Any = None) -> Any:
    """Return an array of one value, on the device of `like` and by default in its dtype."""
    dtype = like.dtype if dtype is None else dtype
    return namespace(like).full(shape, value, dtype=dtype, device=home(like))


def to_numpy(array: Any) -> np.ndarray[Any, Any]:
    """Copy an array of any library and device, or a number, to host memory."""
    if is_torch_array(array):
        xp, host = namespace(array), array.detach().cpu()
        # NumPy has no bfloat16
        return np.array((host.to(xp.float32) if host.dtype == xp.bfloat16 else host).numpy())
    if is_cupy_array(array):
        return np.array(array.get())
    return np.array(array)


def at_hand(value: Any) -> bool:
    """Say whether a number or array has a value to look at; one that JAX is tracing has none."""
    try:
        to_numpy(value)
    except TypeError:  # jax.errors.TracerArrayConversionError
        return False
    return True


def map_leaves(function: Callable[..., ResultT], *trees: Any) -> Any:
    """Apply `function` to arrays in parallel: to each value of mappings, or to the trees.

    What is no mapping, where the first tree is one, goes with each of its values.
    """
    first = trees[0]
    if not isinstance(first, Mapping):
        return function(*trees)

    def at(key: Any) -> Iterator[Any]:
        return (tree[key] if isinstance(tree, Mapping) else tree for tree in trees)

    return OrderedDict((key, map_leaves(function, *at(key))) for key in first)


def solid(array: Any) -> Any:
    """Return `array` as an array: NumPy's operators turn 0-d arrays into scalars."""
    return np.asarray(array) if isinstance(array, np.generic) else array


def per_leaf(items: Iterable[tuple[str, ValueT]]) -> Leaves[ValueT]:
    """Collect (leaf name, value) pairs in order."""
    return OrderedDict(items)


def is_number(value: Any) -> bool:
    """Say whether `value` is a real number of Python or NumPy, and no array."""
    return isinstance(value, int | float | np.integer | np.floating)


def kind_of(mapping: Mapping[str, Any]) -> Callable[[Iterable[tuple[str, Any]]], Any]:
    """Return the kind of mapping to make for whoever handed in `mapping`: ordered, or a dict."""
    return OrderedDict if isinstance(mapping, OrderedDict) else dict


def is_real_floating(dtype: Any, xp: Namespace) -> bool:
    """Say whether `dtype` is a real floating dtype of `xp`, no wider than float64."""
    try:
        return bool(xp.isdtype(dtype, "real floating")) and xp.finfo(dtype).bits <= 64
    except (TypeError, ValueError):  # an extension dtype that the namespace does not know
        return False


def is_sparse(array: Any) -> bool:
    """Say whether `array` is sparse: torch's layouts, pydata's arrays and SciPy's matrices."""
    if type(array).__module__.startswith(("sparse.", "scipy.sparse", "jax.experimental.sparse")):
        return True
    layout = getattr(array, "layout", None)
    return layout is not None and layout != getattr(namespace(array), "strided", layout)
