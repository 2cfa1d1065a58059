"""A state dict brought into the order that an optimizer has its parameters in, by their names."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.blocks import Blocks
from metaopt_torch.changes import Index, moved
from metaopt_torch.groups import configured, named
from metaopt_torch.shards import local
from metaopt_torch.vectors import Vectors

__all__ = ["aligned"]

Group = dict[str, Any]


def aligned(
    state_dict: Mapping[str, Any],
    groups: Sequence[Group],
    config: mo.MetaOptimize,
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a state dict whose parameters, groups and blocks are in the order of these groups.

    By name where both have names, and the same ones; else by position, as they are. Names of the
    result are those of `groups`.

    Parameters
    ----------
    state_dict : dict
    groups : sequence of dict
        Those of the optimizer.
    config : MetaOptimize
        As it was given to the optimizer.
    defaults : mapping
        Options that older groups may lack.

    Raises
    ------
    ValueError
        If names say that parameters stand elsewhere, and where cannot be told; or if a vector of a
        group has not the shape of its blocks.
    """
    given = state_dict["param_groups"]
    ours: list[Any] = [group.get("param_names") for group in groups]
    theirs: list[Any] = [group.get("param_names") for group in given]
    if any(names is None for names in (*ours, *theirs)) or ours == theirs:
        return {**state_dict, "param_groups": _renamed(given, ours)}
    if {frozenset(names) for names in ours} != {frozenset(names) for names in theirs}:
        _check_positions(ours, theirs)
        return {**state_dict, "param_groups": _renamed(given, ours)}
    sets = [set(names) for names in theirs]
    taken = [given[sets.index(set(names))] for names in ours]
    new_groups = []
    for group, names in zip(taken, ours, strict=True):
        number_of = dict(zip(group["param_names"], group["params"], strict=True))
        new_groups.append({**group, "params": [number_of[name] for name in names]})
    params = {name: param for name, param, _ in named(groups)}
    before = _vectors(given, params, config, defaults)
    after = _vectors(new_groups, params, config, defaults, names=ours)
    before[1].read(given)
    by_block, by_family = _order(before[0], after[0])
    after[1].carry(before[1], by_block, by_family)
    new_groups = _renamed(new_groups, ours)
    after[1].share(new_groups)
    of_param = {number: name for group in given for number, name in _numbered(group)}
    state = {
        number: {
            key: _columns(value, params[of_param[number]], by_block) for key, value in entry.items()
        }
        if number in of_param
        else entry
        for number, entry in state_dict["state"].items()
    }
    return {**state_dict, "param_groups": new_groups, "state": state}


def _renamed(groups: Sequence[Group], names: Sequence[Sequence[str] | None]) -> list[Group]:
    """Return copies of groups with these names, or without."""
    plain = [
        {key: value for key, value in group.items() if key != "param_names"} for group in groups
    ]
    # that there are fewer or more groups is for torch to say
    pairs = zip(plain, [*names, *[None] * len(plain)], strict=False)
    return [
        group if some is None else {**group, "param_names": list(some)} for group, some in pairs
    ]


def _check_positions(ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]) -> None:
    """Raise where a name stands on both sides, but not in one place."""
    here, there = (
        {name: (i, j) for i, names in enumerate(some) for j, name in enumerate(names)}
        for some in (ours, theirs)
    )
    for name, place in here.items():
        if there.get(name, place) != place:
            other = next((name for name in there if name not in here), None)
            why = "its groups hold other parameters" if other is None else f"it has {other!r} too"
            msg = (
                f"`state_dict` has parameter {name!r} in another place than this optimizer, and "
                f"cannot be aligned by names, for {why}. Make the optimizer with the groups and "
                "names of the run that was saved."
            )
            raise ValueError(msg)


def _vectors(
    groups: Sequence[Group],
    params: Mapping[str, Tensor],
    config: mo.MetaOptimize,
    defaults: Mapping[str, Any],
    names: Sequence[Sequence[str]] | None = None,
) -> tuple[Blocks, Vectors]:
    """Return the blocks, and the vectors yet to be read, of groups in the order of their names."""
    full: list[Group] = []
    for index, group in enumerate(groups):
        own = group["param_names"] if names is None else names[index]
        full.append(
            {**defaults, **group, "params": [params[name] for name in own], "param_names": own}
        )
    members = named(full)
    found = configured(config, full)
    plan = found.plan({name: param for name, param, _ in members})
    number = {id(group): index for index, group in enumerate(full)}
    owners = {name: number[id(group)] for name, _, group in members}
    return plan.blocks, Vectors(plan, owners, len(full), members[0][1].device)


def _order(before: Blocks, after: Blocks) -> tuple[Index, Index]:
    """Return where the blocks, and the families of blocks, stood before."""
    place = {key: number for number, key in enumerate(before.families)}
    by_block: Index = []
    for key in after.families:
        family = before.families[key]
        by_block += range(family.start, family.start + family.size)
    return by_block, [place[key] for key in after.families]


def _numbered(group: Group) -> list[tuple[int, str]]:
    return list(zip(group["params"], group["param_names"], strict=True))


def _columns(value: Any, param: Tensor, by_block: Index) -> Any:
    """Return a leaf's array with its columns, if it has any, in the order of the blocks."""
    lead = value.dim() - param.dim() if isinstance(value, Tensor) and value.dim() else 0
    if lead <= 0 or by_block == list(range(len(by_block))):
        return value
    new = torch.zeros_like(value)
    moved(local(value), local(new), by_block, range(lead))
    return new
