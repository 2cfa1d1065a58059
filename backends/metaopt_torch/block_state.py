"""The state of blocks, of which every parameter group holds the slices of its own blocks.

What lies in parameter groups is kept by `state_dict`, by torch.distributed.checkpoint and by
`load_state_dict` in its own dtype. A block belongs to the first group that has a leaf in it.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from metaopt.meta import COMPENSATION, DECIDED, PEAK, RECOVERIES, SCALE
from metaopt.plan import Plan, Spec
from metaopt.rules import Rule
from metaopt_torch.changes import Continued, copy_entries
from metaopt_torch.leaf import Group
from metaopt_torch.memory import address, joined, shared, stored
from metaopt_torch.state_keys import learned_specs, trace_key

__all__ = ["BlockState", "block_state_keys"]


class BlockState:
    """The state of blocks, vectors by key.

    "beta", "meta_count", "meta_grad", "meta_<slot>" and "beta_trace<_slot>" have an entry per block
    along their last axis, and so has "restarts"; "step" and "skipped" are single numbers. At weight
    level what belongs to blocks lies with the parameters instead, and "restarts" has an entry per
    family. What numbers of rules that are learned have of this, under keys with their names before
    it, is the first group's, as are single numbers.

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
        self, plan: Plan, owners: Mapping[str, int], groups: int, device: torch.device
    ) -> None:
        blocks = plan.blocks
        self.per_leaf = blocks.partition.per_leaf
        self._several = bool(plan.horizons)
        specs: dict[str, Spec] = {}
        self._slots: tuple[str, ...] = ()
        if not self.per_leaf:
            self._slots = tuple(plan.state["meta_slots"])
            specs |= {key: plan.state[key] for key in ("beta", "meta_count", "meta_grad")}
            specs |= {f"meta_{slot}": plan.state["meta_slots"][slot] for slot in self._slots}
            specs |= {trace_key(key): plan.state["beta_trace"][key] for key in plan.beta_feeding}
        specs |= {key: plan.state[key] for key in ("restarts", "step", "skipped")}
        #: Whose a key is that belongs to a learned number.
        self._learned = {key: name for key, (name, _) in learned_specs(plan).items()}
        specs |= {key: spec for key, (_, spec) in learned_specs(plan).items()}
        self._whole = {"step", "skipped", *self._learned}
        self._held = {
            key: torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            for key, spec in specs.items()
        }
        owner_of: dict[str, int] = {}
        for name, key in blocks.family_of.items():
            owner_of.setdefault(key, owners[name])
        sizes = [0] * groups
        for key, family in blocks.families.items():
            sizes[owner_of[key]] += 1 if self.per_leaf else family.size
        #: Where the blocks of each group begin, and the end of all.
        self._bounds = list(accumulate(sizes, initial=0))
        #: What groups were given, and where it lies: what else they hold someone else put there.
        self._shared: list[tuple[Tensor, int]] = []

    def __getitem__(self, key: str) -> Tensor:
        """Return a vector, the memory of which the groups have views."""
        return self._held[key]

    def keys(self) -> list[str]:
        """Return the keys of all vectors."""
        return list(self._held)

    @property
    def slots(self) -> "OrderedDict[str, Tensor]":
        """The moments of the meta update."""
        return OrderedDict((slot, self[f"meta_{slot}"]) for slot in self._slots)

    def mismatch(self, groups: Sequence[Group]) -> str | None:
        """Return what groups hold that does not fit, None if everything does."""
        for index, group in enumerate(groups):
            for key, part in self._slices(index):
                found, expected = group.get(key), tuple(part.shape)
                if found is None and key.rpartition(".")[2] in ("beta", "meta_count"):
                    return f"no {key!r} in group {index}"
                if found is not None and not isinstance(found, Tensor):
                    return f"{key!r} of group {index} is no tensor; got {found!r}"
                if found is not None and tuple(found.shape) != expected:
                    got = tuple(found.shape)
                    return f"{key!r} of group {index} has shape {got}; expected {expected}"
        return None

    def carry(
        self, before: "BlockState", continued: Continued, numbers: Mapping[str, Continued]
    ) -> None:
        """Take from the state before what blocks and families continue there.

        `numbers` say what those of learned numbers continue.
        """
        for key in self._held.keys() & before._held.keys():
            old, new = before[key], self[key]
            if key in ("step", "skipped"):
                new.copy_(old)
            elif key in self._learned:
                own = numbers[self._learned[key]]
                entries = own.blocks if len(own.blocks) == new.shape[-1] else own.families
                copy_entries(old, new, entries, range(new.dim()))
            else:
                index = continued.families if self.per_leaf else continued.blocks
                # of the traces of beta all axes are those of blocks, of which several discounts
                # have none
                axes = [new.dim() - 1] if self._several else range(new.dim())
                copy_entries(old, new, index, axes)

    def read(self, groups: Sequence[Group], before: "BlockState | None" = None) -> None:
        """Take the values that groups hold, where they hold any, unless `before` gave them these.

        ValueError is raised where one has another shape than its blocks.
        """
        given = {} if before is None else {id(part): at for part, at in before._shared}
        for index, group in enumerate(groups):
            for key, part in self._slices(index):
                value = group.get(key)
                if value is None or (id(value) in given and given[id(value)] == address(value)):
                    continue
                fits = isinstance(value, Tensor) and value.shape == part.shape and stored(value)
                if not fits:
                    got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
                    msg = (
                        f"`{key}` of group {index} must be a tensor of shape {tuple(part.shape)}, "
                        f"one entry for each block that is the group's; got {got}."
                    )
                    raise ValueError(msg)
                part.copy_(value)

    def adopt_shared(self, groups: Sequence[Group]) -> None:
        """Take the memory of what groups hold for these vectors, where other processes have it too.

        ValueError is raised where it is in pieces.
        """
        for key, vector in self._held.items():
            parts = [group.get(key) for group in groups]
            if not any(map(shared, parts)):
                continue
            pairs = zip(parts, self._bounds, strict=False)
            whole = joined([(part, at) for part, at in pairs if part is not None], vector)
            if whole is None:
                msg = (
                    f"`{key}` of the groups is in shared memory, but in pieces or of other "
                    "groups: call `share_memory` of the optimizer, and change no groups then."
                )
                raise ValueError(msg)
            self._held[key] = whole

    def hand_out(self, groups: Sequence[Group]) -> None:
        """Make what groups hold views of these vectors."""
        for index, group in enumerate(groups):
            parts = self._slices(index)
            group.update(parts)
            self._shared += [(part, address(part)) for _, part in parts]

    def _slices(self, index: int) -> list[tuple[str, Tensor]]:
        """Return a group's slice of every vector; single numbers are the first group's."""
        start, end = self._bounds[index : index + 2]
        return [
            (key, vector if key in self._whole else vector[..., start:end])
            for key, vector in self._held.items()
            if index == 0 or key not in self._whole
        ]


def block_state_keys(meta: Rule) -> set[str]:
    """Return all keys under which groups may hold state of blocks with this meta update."""
    always = {"beta", "meta_grad", "meta_count", "restarts", "step", "skipped"}
    traces = {trace_key(key) for key in ("beta", *meta.slots)}
    slots = (*meta.slots, COMPENSATION, DECIDED, PEAK, SCALE, RECOVERIES)
    return always | traces | {f"meta_{slot}" for slot in slots}
