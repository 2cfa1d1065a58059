"""The array libraries that the core is tested on: one fixture, the same tests on each."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from metaopt_conformance import backends

from metaopt.arrays import map_leaves

os.environ.setdefault("KERAS_BACKEND", "torch")  # before anything imports Keras


@dataclass(frozen=True)
class Backend:
    """A backend of the conformance suite on its default device, for mappings of arrays too."""

    library: backends.Backend

    @property
    def name(self) -> str:
        """The library's name."""
        return self.library.name

    def asarray(self, array: Any) -> Any:
        """Return a NumPy array as one of this library, copied."""
        return self.library.asarray(np.array(array), None)

    def tree(self, arrays: Any) -> Any:
        """Return a mapping of NumPy arrays as arrays of this library, copied."""
        return {name: self.asarray(array) for name, array in arrays.items()}

    def to_numpy(self, tree: Any) -> Any:
        """Return arrays, or (nested) mappings of them, as NumPy arrays."""
        return map_leaves(self.library.to_numpy, tree)


@pytest.fixture(params=["numpy", "strict", "torch", "jax", "dask"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return every array library in turn; skip with the reason where one is missing."""
    try:
        return Backend(backends.find(request.param))
    except backends.UnavailableError as error:
        pytest.skip(str(error))
