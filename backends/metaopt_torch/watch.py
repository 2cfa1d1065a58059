"""Notices what was done to `param_groups` and `state` between two steps."""

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from metaopt_torch.leaf import Group
from metaopt_torch.shards import local

__all__ = ["Watch"]


class Watch:
    """Remembers which objects groups and state hold, as what is built for a step relies on them.

    By identity, and by the memory of tensors, which `data` or a resized storage replaces: numbers
    that are edited in place are read where they lie. It is asked in every step, so it is two flat
    comparisons. The objects are kept alive, so that no other one gets the address.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)  # keys of a group whose values are looked at
        self._seen: list[Any] = []
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []

    def see(self, groups: Sequence[Group], states: Mapping[Tensor, Any]) -> None:
        """Take what there is for what should be."""
        self._seen = self._held(groups, states)
        values = [*chain.from_iterable(map(dict.values, states.values()))]
        values += [group.get(name) for group in groups for name in self._names]
        # a fake or sparse tensor has no address; that it was replaced shows by identity
        dense = (v for v in values if isinstance(v, Tensor) and v.layout == torch.strided)
        held = (local(value) for value in dense)
        self._tensors = [tensor for tensor in held if not is_fake(tensor)]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]

    def differs(self, groups: Sequence[Group], states: Mapping[Tensor, Any]) -> bool:
        """Return whether anything was added, taken away or replaced since it was seen."""
        held = self._held(groups, states)
        if len(held) != len(self._seen) or not all(map(is_, held, self._seen)):
            return True
        return self._addresses != [*map(Tensor.data_ptr, self._tensors)]

    def _held(self, groups: Sequence[Group], states: Mapping[Tensor, Any]) -> list[Any]:
        # without keys of `states`, each of which would be hashed in Python
        entries = states.values()
        held: list[Any] = [*groups, *entries]
        for group in groups:
            held += group["params"]
            held += map(group.get, self._names)
        held += chain.from_iterable(map(dict.values, entries))
        return held
