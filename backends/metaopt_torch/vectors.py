"""The state of blocks: vectors, of which every parameter group holds the part of its own blocks.

What lies in parameter groups is kept by `state_dict`, by torch.distributed.checkpoint and by
`load_state_dict` in its own dtype. A block belongs to the first group that has a leaf in it.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.passes import COMPENSATION, PEAK, RECOVERIES, SCALE
from metaopt.plan import Plan
from metaopt.rules import Rule
from metaopt_torch.changes import Index, moved
from metaopt_torch.memory import address, stored
from metaopt_torch.sharing import joined, shared

__all__ = ["Vectors", "name_of_trace", "names_of_vectors"]

Group = dict[str, Any]


class Vectors:
    """The state of blocks, by name.

    "beta", "meta_count", "meta_grad", "meta_<slot>" and "beta_trace<_slot>" have an entry per block
    along their last axis, and so has "restarts"; "step" and "skipped" are single numbers. At weight
    level what belongs to blocks lies with the parameters instead.

    Parameters
    ----------
    plan : Plan
    owners : mapping of leaf name to int
        Index of each leaf's group.
    groups : int
        Number of groups, which may be without leaves.
    device : device
    """

    def __init__(
        self,
        plan: Plan,
        owners: Mapping[str, int],
        groups: int,
        device: torch.device,
    ) -> None:
        blocks = plan.blocks
        self.per_leaf = blocks.partition.per_leaf
        owner_of: dict[str, int] = {}
        for name, key in blocks.family_of.items():
            owner_of.setdefault(key, owners[name])
        sizes = {"family": [0] * groups, "block": [0] * groups, "one": [1] + [0] * (groups - 1)}
        for key, family in blocks.families.items():
            sizes["family"][owner_of[key]] += 1
            sizes["block"][owner_of[key]] += family.size
        self._sizes = sizes
        self._kinds = {"restarts": "family" if self.per_leaf else "block"}
        self._kinds |= {"step": "one", "skipped": "one"}
        shapes: dict[str, Any] = {}
        self._slots: tuple[str, ...] = () if self.per_leaf else tuple(plan.state["meta_slots"])
        self._feeding: tuple[str, ...] = () if self.per_leaf else plan.beta_feeding
        if not self.per_leaf:
            shapes |= {name: plan.state[name] for name in ("beta", "meta_count", "meta_grad")}
            shapes |= {f"meta_{slot}": plan.state["meta_slots"][slot] for slot in self._slots}
            shapes |= {name_of_trace(key): plan.state["beta_trace"][key] for key in self._feeding}
        shapes |= {name: plan.state[name] for name in self._kinds}
        for name in shapes:
            self._kinds.setdefault(name, "block")
        self._held = {
            name: torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            for name, spec in shapes.items()
        }
        #: What groups were given, and where it lies: what else they hold someone else put there.
        self._shared: list[tuple[Tensor, int]] = []

    def __getitem__(self, name: str) -> Tensor:
        """Return a vector, the memory of which the groups have views."""
        return self._held[name]

    def names(self) -> list[str]:
        """Return the names of all vectors."""
        return list(self._held)

    @property
    def slots(self) -> "OrderedDict[str, Tensor]":
        """The moments of the meta update."""
        return OrderedDict((slot, self[f"meta_{slot}"]) for slot in self._slots)

    @property
    def traces(self) -> "OrderedDict[str, Tensor]":
        """`State.beta_trace`."""
        return OrderedDict((key, self[name_of_trace(key)]) for key in self._feeding)

    def fill(self, name: str, values: Tensor) -> None:
        """Write a vector, or what there is of its beginning."""
        held = self._held[name]
        held[tuple(slice(None, length) for length in values.shape)].copy_(values)

    def mismatch(self, groups: Sequence[Group]) -> str | None:
        """Return what groups hold that does not fit, None if everything does."""
        for index, group in enumerate(groups):
            for name, expected in self._parts(index):
                found = group.get(name)
                if found is None and name in ("beta", "meta_count"):
                    return f"no {name!r} in group {index}"
                if found is not None and not isinstance(found, Tensor):
                    return f"{name!r} of group {index} is no tensor; got {found!r}"
                if found is not None and tuple(found.shape) != tuple(expected.shape):
                    return (
                        f"{name!r} of group {index} has shape {tuple(found.shape)}; "
                        f"expected {tuple(expected.shape)}"
                    )
        return None

    def carry(self, before: "Vectors", by_block: Index, by_family: Index) -> None:
        """Take from earlier vectors what blocks and families continue there."""
        for name in self._held.keys() & before._held.keys():
            old, new, kind = before[name], self[name], self._kinds[name]
            if kind == "one":
                new.copy_(old)
            else:
                index = by_block if kind == "block" else by_family
                moved(old, new, index, range(new.dim()))

    def read(self, groups: Sequence[Group], before: "Vectors | None" = None) -> None:
        """Take the values that groups hold, where they hold any, unless `before` gave them these.

        Raises
        ------
        ValueError
            If one has another shape than its blocks.
        """
        given = {} if before is None else {id(part): at for part, at in before._shared}
        for index, group in enumerate(groups):
            for name, part in self._parts(index):
                value = group.get(name)
                if value is None or (id(value) in given and given[id(value)] == address(value)):
                    continue
                fits = isinstance(value, Tensor) and value.shape == part.shape and stored(value)
                if not fits:
                    got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
                    msg = (
                        f"`{name}` of group {index} must be a tensor of shape {tuple(part.shape)}, "
                        f"one entry for each block that is the group's; got {got}."
                    )
                    raise ValueError(msg)
                part.copy_(value)

    def stay(self, groups: Sequence[Group]) -> None:
        """Take the memory of what groups hold for these vectors, where other processes have it too.

        Raises
        ------
        ValueError
            If it is in pieces.
        """
        for name, vector in self._held.items():
            parts = [group.get(name) for group in groups]
            if not any(map(shared, parts)):
                continue
            sizes = self._sizes[self._kinds[name]]
            starts = [sum(sizes[:index]) for index in range(len(groups))]
            pairs = zip(parts, starts, strict=True)
            whole = joined([(part, at) for part, at in pairs if part is not None], vector)
            if whole is None:
                msg = (
                    f"`{name}` of the groups is in shared memory, but in pieces or of other "
                    "groups: call `share_memory` of the optimizer, and change no groups then."
                )
                raise ValueError(msg)
            self._held[name] = whole

    def share(self, groups: Sequence[Group]) -> None:
        """Make what groups hold views of these vectors."""
        for index, group in enumerate(groups):
            parts = self._parts(index)
            group.update(parts)
            self._shared += [(part, address(part)) for _, part in parts]

    def _parts(self, index: int) -> list[tuple[str, Tensor]]:
        """Return a group's part of every vector."""
        parts = []
        for name, vector in self._held.items():
            sizes = self._sizes[self._kinds[name]]
            if self._kinds[name] == "one":
                if index == 0:
                    parts.append((name, vector))
                continue
            start = sum(sizes[:index])
            parts.append((name, vector[..., start : start + sizes[index]]))
        return parts


def names_of_vectors(meta: Rule) -> set[str]:
    """Return all names under which groups may hold vectors with this meta update."""
    always = {"beta", "meta_grad", "meta_count", "restarts", "step", "skipped"}
    traces = {name_of_trace(key) for key in ("beta", *meta.slots)}
    slots = (*meta.slots, COMPENSATION, PEAK, SCALE, RECOVERIES)
    return always | traces | {f"meta_{slot}" for slot in slots}


def name_of_trace(key: str) -> str:
    """Return under which name the trace of beta, or of a slot of the meta update, is held."""
    return "beta_trace" if key == "beta" else f"beta_trace_{key}"
