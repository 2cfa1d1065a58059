"""A state dict that is loaded: brought into an optimizer's order by names, and checked."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.blocks import Blocks
from metaopt.plan import Plan
from metaopt_torch.block_state import BlockState
from metaopt_torch.changes import Continued, Index, blocks_of, copy_entries
from metaopt_torch.groups import MADE_WITH, check_groups, check_rounding, configured, named
from metaopt_torch.leaf import Group, Leaf
from metaopt_torch.shards import local
from metaopt_torch.state_keys import places

__all__ = ["aligned", "check_fits"]


def aligned(
    state_dict: Mapping[str, Any],
    groups: Sequence[Group],
    config: mo.MetaOptimize,
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a state dict whose parameters, groups and blocks are in the order of these groups.

    By name where both have names, and the same ones; else by position, as they are. Names of the
    result are those of `groups`. `config` is as it was given to the optimizer, `defaults` are
    options that older groups may lack. ValueError is raised where names say that parameters stand
    elsewhere, and where cannot be told.
    """
    given = state_dict["param_groups"]
    ours: list[Any] = [group.get("param_names") for group in groups]
    theirs: list[Any] = [group.get("param_names") for group in given]
    if any(names is None for names in (*ours, *theirs)) or ours == theirs:
        return {**state_dict, "param_groups": _renamed(given, ours)}
    sets = [frozenset(names) for names in theirs]
    if set(sets) != {frozenset(names) for names in ours}:
        _check_positions(ours, theirs)
        return {**state_dict, "param_groups": _renamed(given, ours)}
    new_groups = []
    for names in ours:
        group = given[sets.index(frozenset(names))]
        number_of = dict(zip(group["param_names"], group["params"], strict=True))
        new_groups.append({**group, "params": [number_of[name] for name in names]})
    params = {name: param for name, param, _ in named(groups)}
    former, before = _block_state(given, theirs, params, config, defaults)
    plan, after = _block_state(new_groups, ours, params, config, defaults)
    before.read(given)
    kept = _order(former.blocks, plan.blocks)
    numbers = {
        name: _order(former.learned[name].blocks, number.blocks)
        for name, number in plan.learned.items()
    }
    after.carry(before, kept, numbers)
    new_groups = _renamed(new_groups, ours)
    after.hand_out(new_groups)
    state = dict(state_dict["state"])
    for group in given:
        for number, name in zip(group["params"], group["param_names"], strict=True):
            if number in state:
                state[number] = {
                    key: _reordered(value, params[name], blocks_of(key, kept, numbers))
                    for key, value in state[number].items()
                }
    return {**state_dict, "param_groups": new_groups, "state": state}


def _renamed(groups: Sequence[Group], names: Sequence[Sequence[str] | None]) -> list[Group]:
    """Return copies of groups with these names, or without."""
    result = []
    for index, group in enumerate(groups):
        new = {key: value for key, value in group.items() if key != "param_names"}
        # that there are fewer or more groups, torch says itself
        own = names[index] if index < len(names) else None
        result.append(new if own is None else {**new, "param_names": list(own)})
    return result


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


def _block_state(
    groups: Sequence[Group],
    names: Sequence[Sequence[str]],
    params: Mapping[str, Tensor],
    config: mo.MetaOptimize,
    defaults: Mapping[str, Any],
) -> tuple[Plan, BlockState]:
    """Return the plan, and blocks' state yet to be read, of groups with parameters so named."""
    full: list[Group] = [
        {**defaults, **group, "params": [params[name] for name in own], "param_names": own}
        for group, own in zip(groups, names, strict=True)
    ]
    members = {name: param for name, param, _ in named(full)}
    plan = configured(config, full).config.plan(members)
    owners = {name: index for index, own in enumerate(names) for name in own}
    device = next(iter(members.values())).device
    return plan, BlockState(plan, owners, len(full), device)


def _order(before: Blocks, after: Blocks) -> Continued:
    """Return where the blocks, and the families of blocks, stood before."""
    place = {key: number for number, key in enumerate(before.families)}
    blocks: Index = []
    for key in after.families:
        family = before.families[key]
        blocks += range(family.start, family.start + family.size)
    return Continued({}, blocks, [place[key] for key in after.families])


def _reordered(value: Any, param: Tensor, blocks: Index) -> Any:
    """Return a leaf's array with its columns, if it has any, in the order of the blocks."""
    lead = value.dim() - param.dim() if isinstance(value, Tensor) and value.dim() else 0
    if lead <= 0 or blocks == list(range(len(blocks))):
        return value
    new = torch.zeros_like(value)
    copy_entries(local(value), local(new), blocks, range(lead))
    return new


def check_fits(
    state_dict: Mapping[str, Any],
    leaves: Sequence[Leaf],
    groups: Sequence[Group],
    config: mo.MetaOptimize,
    rounding: str,
    defaults: Mapping[str, Any],
) -> None:
    """Raise where a state's groups, or the shapes of its arrays, are not those of these leaves.

    What is learned, and so what there has to be, is as the groups that are loaded say.
    """
    given = state_dict["param_groups"]
    if [len(group["params"]) for group in given] != [len(group["params"]) for group in groups]:
        return  # torch says so
    for own, group in zip(groups, given, strict=True):
        kept, expected = group.get(MADE_WITH), own[MADE_WITH]
        if kept is not None and kept != expected:
            made_with = f"it was made with {kept}; expected {expected}"
            raise _misfit(made_with)
    full = [
        {**defaults, **group, "params": own["params"]}
        for group, own in zip(given, groups, strict=True)
    ]
    check_groups(full)
    check_rounding(rounding, full)
    members = named(full)
    names = [[name for name, _, of in members if of is group] for group in full]
    params = {name: param for name, param, _ in members}
    plan, block_state = _block_state(given, names, params, config, defaults)
    specs: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for place in places(plan, per_leaf=block_state.per_leaf).values():
        specs[place.leaf or ""] |= dict.fromkeys(place.keys, place.spec.shape)
    numbers = [number for group in given for number in group["params"]]
    found = (
        leaf.mismatch(state_dict["state"].get(number, {}), specs[leaf.name])
        for number, leaf in zip(numbers, leaves, strict=True)
    )
    mismatch = next((one for one in found if one is not None), block_state.mismatch(given))
    if mismatch is not None:
        raise _misfit(mismatch)


def _misfit(why: str) -> ValueError:
    return ValueError(f"`state_dict` does not fit this optimizer: {why}.")
