"""The array libraries that the core is tested on: one fixture, the same tests on each."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from metaopt.arrays import to_numpy


@dataclass(frozen=True)
class Backend:
    """An array library: how to make its arrays and how to look at them."""

    name: str
    asarray: Callable[[Any], Any]

    def tree(self, arrays: Any) -> Any:
        """Return a mapping of NumPy arrays as arrays of this library, copied."""
        return {name: self.asarray(np.array(array)) for name, array in arrays.items()}

    def settled(self, tree: Any) -> Any:
        """Return arrays, mappings of them or a state with what is lazy computed."""
        return importlib.import_module("dask").persist(tree)[0] if self.name == "dask" else tree

    def to_numpy(self, tree: Any) -> Any:
        """Return arrays, or (nested) mappings of them, as NumPy arrays."""
        if hasattr(tree, "items"):
            return {name: self.to_numpy(value) for name, value in tree.items()}
        return to_numpy(tree)


_MODULES = {
    "numpy": "numpy",
    "strict": "array_api_strict",
    "torch": "torch",
    "jax": "jax.numpy",
    "dask": "dask.array",
}


def make_backend(name: str) -> Backend:
    """Return the backend, or skip with the reason where its library is missing."""
    module = pytest.importorskip(_MODULES[name], reason=f"{name} is not installed")
    if name == "jax":
        importlib.import_module("jax").config.update("jax_enable_x64", True)
    return Backend(name, module.asarray)


@pytest.fixture(params=list(_MODULES))
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return every array library in turn."""
    return make_backend(request.param)
