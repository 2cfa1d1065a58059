"""States of an optimizer, compared to the last bit."""

from typing import Any

import torch

__all__ = ["assert_same"]


def assert_same(got: Any, want: Any) -> None:
    """Assert that two state dicts, or parts of them, are equal in types, keys and numbers."""
    assert type(got) is type(want)
    if isinstance(got, dict):
        assert got.keys() == want.keys()
        for key, value in got.items():
            assert_same(value, want[key])
    elif isinstance(got, list):
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    elif isinstance(got, torch.Tensor):
        assert torch.equal(got, want)
    else:
        assert got == want
