"""What stays of names, blocks and traces when parameters come, go or are replaced.

Parameters that stay are known by their identity. One that stands where another stood, which is in
no group any more, continues it: it has its name, and its block has what was learned there.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from metaopt.blocks import Blocks
from metaopt_torch.leaf import Group, Leaf

__all__ = ["Continued", "Index", "blocks_of", "continued", "copy_entries", "renamed"]

#: For each entry of a new vector that of the old one which it continues, None for a new one.
Index: TypeAlias = list[int | None]


class Continued(NamedTuple):
    """Which leaves, blocks and families of blocks continue earlier ones."""

    leaves: dict[str, Leaf]  # the earlier leaf, by the name that its successor has now
    blocks: Index  # empty at weight level, where there are families alone
    families: Index


def _by_group(leaves: Mapping[str, Leaf]) -> dict[int, list[Leaf]]:
    """Return the leaves of each group, by its id, in their order."""
    found: dict[int, list[Leaf]] = {}
    for leaf in leaves.values():
        found.setdefault(id(leaf.group), []).append(leaf)
    return found


def _matched(
    groups: Sequence[Group], before: Mapping[str, Leaf]
) -> Iterator[tuple[Group, list[Leaf | None]]]:
    """Yield for each group the leaves that its parameters continue, None for a new one."""
    known = {id(leaf.param): leaf for leaf in before.values()}
    here = {id(param) for group in groups for param in group["params"]}
    by_group = _by_group(before)
    for group in groups:
        stood = by_group.get(id(group), [])
        found = []
        for index, param in enumerate(group["params"]):
            leaf = known.get(id(param))
            if leaf is None and index < len(stood) and id(stood[index].param) not in here:
                leaf = stood[index]
            found.append(leaf)
        yield group, found


def renamed(groups: Sequence[Group], before: Mapping[str, Leaf]) -> list[list[str] | None]:
    """Return the names of each group's parameters as they should be, None where there are none.

    A list of names that was edited along with the parameters is right as it stands; ValueError is
    raised where such a list has more or fewer entries than there are parameters.
    """
    by_group, matched = _by_group(before), list(_matched(groups, before))
    taken = {leaf.name for _, leaves in matched for leaf in leaves if leaf is not None}
    result: list[list[str] | None] = []
    for index, (group, leaves) in enumerate(matched):
        names = group.get("param_names")
        if names is not None and names != [leaf.name for leaf in by_group.get(id(group), [])]:
            if len(names) != len(leaves):
                msg = (
                    f"`param_names` of group {index} has {len(names)} entries for {len(leaves)} "
                    "parameters; give each a name, or leave the list as it was."
                )
                raise ValueError(msg)
            taken |= set(names)
        elif names is not None:
            names = []
            for leaf in leaves:
                numbers = map(str, count(len(taken)))
                unused = (name for name in numbers if name not in taken)
                names.append(next(unused) if leaf is None else leaf.name)
                taken.add(names[-1])
        result.append(names)
    return result


def continued(
    names: Sequence[str],
    groups: Sequence[Group],
    blocks: Blocks,
    leaves_before: Mapping[str, Leaf],
    blocks_before: Blocks,
) -> Continued:
    """Return what parameters called `names`, all of the groups in their order, continue.

    A family that is called as its leaf follows the leaf; others are known by their names.
    """
    leaves = [leaf for _, some in _matched(groups, leaves_before) for leaf in some]
    former = {name: leaf for name, leaf in zip(names, leaves, strict=True) if leaf is not None}
    order = {key: number for number, key in enumerate(blocks_before.families)}
    result = Continued(former, [], [])
    for key, family in blocks.families.items():
        was: str | None = key
        if blocks.family_of.get(key) == key:
            was = former[key].name if key in former else None
            was = was if was is not None and blocks_before.family_of.get(was) == was else None
        old = None if was is None else blocks_before.families.get(was)
        if old is not None and old.size != family.size and not blocks.partition.per_leaf:
            old = None
        result.families.append(None if was is None or old is None else order[was])
        if not blocks.partition.per_leaf:
            start = None if old is None else old.start
            result.blocks.extend(None if start is None else start + i for i in range(family.size))
    return result


def blocks_of(key: str, kept: Continued, numbers: Mapping[str, Continued]) -> Index:
    """Return what the blocks continue that the columns of an array of a leaf's state are of.

    `numbers` say it of learned numbers, by name; `kept` of step sizes.
    """
    return numbers.get(key.rpartition(".")[0], kept).blocks


def copy_entries(old: Tensor, new: Tensor, index: Index, axes: Sequence[int]) -> None:
    """Write into `new` what `index` takes from `old` along leading or trailing axes."""
    now = torch.tensor([i for i, was in enumerate(index) if was is not None], dtype=torch.long)
    was = torch.tensor([i for i in index if i is not None], dtype=torch.long, device=old.device)
    for axis in axes:
        old = old.index_select(axis, was)
    at: list[slice | Tensor] = [slice(None)] * new.dim()
    for axis in axes:
        # with one index tensor for each axis, their outer product is written
        at[axis] = now.view([-1 if axis == other else 1 for other in axes]).to(new.device)
    new[tuple(at)] = old.to(new.device, new.dtype)
