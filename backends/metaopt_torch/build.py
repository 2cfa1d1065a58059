"""From parameter groups and what state there is to all that a step needs."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import metaopt as mo
from metaopt import start
from metaopt.arrays import map_leaves, per_leaf
from metaopt.blocks import Blocks
from metaopt.plan import Plan, Spec
from metaopt.rules import Rule
from metaopt.rules.learned import field_of, learned_in, within
from metaopt.rules.rule import is_opaque, scope_of
from metaopt.step import sizes_of
from metaopt_torch.block_state import BlockState
from metaopt_torch.changes import Continued, Index, blocks_of, continued
from metaopt_torch.containers import Containers
from metaopt_torch.counts import Counts
from metaopt_torch.groups import FROZEN, MADE_WITH, configured, named, same
from metaopt_torch.hyperparameters import Number, agreed, hyperparameters, misplaced, overrides
from metaopt_torch.leaf import Followed, Group, Leaf
from metaopt_torch.leaf_state import check_state, complete, is_stale, restart_rows
from metaopt_torch.memory import shared
from metaopt_torch.shards import local, shard_of, sliced
from metaopt_torch.state_keys import Path, Place, learned_key, needed, places, trace_key

__all__ = ["Built", "build"]

States = MutableMapping[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Built:
    """What a step needs."""

    config: mo.MetaOptimize  # the optimizer's own, with what the groups say
    plan: Plan
    leaves: dict[str, Leaf]
    places: dict[Path, Place]
    block_state: BlockState
    counts: Counts
    #: Hyperparameters of rules for which groups have other values in `config`.
    overrides: list[tuple[Rule, Group, dict[str, Number]]]
    #: Step sizes with which blocks start, as the groups say.
    starts: dict[str, Any]
    #: The groups, and their `block`.
    owners: list[tuple[Group, str | None]]
    #: Whether nothing is learned any more, so that leaves have no traces.
    frozen: bool

    @cached_property
    def in_core(self) -> bool:
        """Whether steps are the core's own.

        With curvature, a step size a weight, recovery, or where a parameter has several values of a
        number that is learned. What traces are needed for does not count once nothing is learned.

        So they are where others make the steps of parameters that have several step sizes.
        """
        traced = self.plan.curvature != "none" or self.config.recover
        return (
            (traced and not self.frozen)
            or self.block_state.per_leaf
            or any(_several(number) for number in self.plan.learned.values())
            or any(is_opaque(leaf.rule) and leaf.blocks.ndim for leaf in self.leaves.values())
        )

    @cached_property
    def z_first(self) -> bool:
        """Whether steps need the meta-gradient before they write a trace or a parameter."""
        config = self.config
        first = config.meta_first or config.skip_nonfinite or config.held_out
        return self.in_core or first or bool(self.plan.learned)

    def step_sizes(self) -> dict[str, Tensor]:
        """Return the learned step sizes by block; copies, as some maps return beta itself."""
        leaves = [leaf for leaf in self.leaves.values() if leaf.state]
        if self.block_state.per_leaf:
            betas = per_leaf((leaf.name, leaf.state["beta"].clone()) for leaf in leaves)
            return dict(sizes_of(self.config.sigma_map, betas).value)
        sizes = sizes_of(self.config.sigma_map, self.block_state["beta"].clone())
        return dict(self.plan.blocks.by_name(sizes.value))

    def count(self, names: Sequence[str], accepted: Tensor | None) -> None:
        """Count a step of these leaves, if it is accepted."""
        self.counts.advance(names, accepted)
        step, skipped = self.block_state["step"], self.block_state["skipped"]
        if accepted is None:
            step.add_(1)
            return
        one = accepted.to(torch.int32)
        step.add_(one)
        skipped.add_(1 - one)

    def blocks_of_groups(self) -> list[list[str]]:
        """Return the blocks of each group, in order of appearance."""
        found: dict[int, dict[str, None]] = {id(group): {} for group, _ in self.owners}
        for name, key in self.plan.blocks.family_of.items():
            found[id(self.leaves[name].group)][key] = None
        return [list(keys) for keys in found.values()]

    def hyperparameters(self) -> dict[str, dict[str, Tensor]]:
        """Return the numbers that are learned, by name and block; copies."""
        found = {}
        for name, config in self.config.learned.items():
            blocks, key = self.plan.learned[name].blocks, learned_key(name, "beta")
            beta: Any = None
            if blocks.partition.per_leaf:
                leaves = (leaf for leaf in self.leaves.values() if key in leaf.state)
                beta = per_leaf((leaf.name, leaf.state[key].clone()) for leaf in leaves)
            else:
                beta = self.block_state[key].clone()
            found[name] = dict(blocks.by_name(config.values_of(beta)))
        return found

    def blocks_by_group(self) -> list[list[str]]:
        """Return the blocks of each group, those that others before it have apart."""
        seen: set[str] = set()
        found = []
        for keys in self.blocks_of_groups():
            found.append([key for key in keys if key not in seen])
            seen |= set(keys)
        return found

    def check_shared(self) -> None:
        """Raise where processes share the state of parameters, but not that of blocks."""
        leaf = next((leaf for leaf in self.leaves.values() if leaf.state), None)
        if leaf is not None and leaf.shared and not shared(self.block_state["step"]):
            msg = (
                f"`state` of {leaf.name!r} is in shared memory, the step sizes in `param_groups` "
                "are not: call `share_memory` of the optimizer, before the processes are started."
            )
            raise ValueError(msg)

    def outdated(self) -> bool:
        """Return whether groups have other hyperparameters than in `config`, or none they may."""
        return any(
            overrides(hyperparameters(rule), group) != kept or misplaced(rule, group)
            for rule, group, kept in self.overrides
        )

    def learns_otherwise(self) -> bool:
        """Return whether groups say, or no longer say, in the place of what is learned.

        Or what has no place in their rule, of which a rebuild tells.
        """
        for rule, group, kept in self.overrides:
            names = set(map(field_of, learned_in(rule)))
            said = group.get("weight_decay") is not None
            if misplaced(rule, group):
                return True
            if "weight_decay" in names and said != ("weight_decay" in kept):
                return True
        return False


def build(
    given: mo.MetaOptimize,
    groups: Sequence[Group],
    states: States,
    *,
    kahan: bool,
    containers: Containers,
    before: Built | None = None,
) -> Built:
    """Return what a step needs, and complete the state of parameters that require a gradient.

    What state there is is kept, in the dtype it should have. Nothing is changed where it raises.

    With `kahan`, parameters narrower than their state keep what rounding loses. `before` is what
    steps were made with until now: blocks keep what they have learned, whichever group has it now.

    Raises
    ------
    ValueError, TypeError
        If groups say what cannot be, or what cannot change any more, or if an array of the state
        does not fit its parameter.
    """
    (config, rules, starts), members = configured(given, groups), named(groups)
    params = {name: param for name, param, _ in members}
    plan = config.plan(params)
    leaves = {
        name: _leaf(
            config, name, param, group, plan, rules[name], states.get(param, {}), containers
        )
        for name, param, group in members
    }
    number = {id(group): index for index, group in enumerate(groups)}
    owners = {name: number[id(group)] for name, _, group in members}
    kept = Continued({}, list(range(plan.blocks.size)), [])
    numbers = {
        key: Continued({}, list(range(one.blocks.size)), []) for key, one in plan.learned.items()
    }
    if before is not None:
        kept = continued(list(leaves), groups, plan.blocks, before.leaves, before.plan.blocks)
        numbers = _continued_numbers(plan, list(leaves), groups, before)
        _check_blocks(before, groups)
        _check_starts(before, plan.blocks, kept.families, starts, owners)
    # what does not begin at 0, by block or, at weight level, by leaf
    begin = _first(config, plan, params)
    block_state = BlockState(plan, owners, len(groups), members[0][1].device)
    for key in [key for key, values in begin.items() if not isinstance(values, Mapping)]:
        block_state[key].copy_(begin.pop(key))
    if before is not None:
        block_state.carry(before.block_state, kept, numbers)
    block_state.read(groups, None if before is None else before.block_state)
    block_state.adopt_shared(groups)
    frozen = any(group.get(FROZEN) for group in groups)
    specs: dict[str, dict[str, Spec]] = defaultdict(dict)
    held = places(plan, per_leaf=block_state.per_leaf)
    ended: dict[str, list[str]] = defaultdict(list)
    for place in held.values():
        if place.leaf is None:
            continue
        if frozen and not needed(place):
            ended[place.leaf] += place.keys
        else:
            specs[place.leaf] |= dict.fromkeys(place.keys, place.spec)
    for name, leaf in leaves.items():
        check_state(leaf, specs[name])
    # from here on nothing raises, and groups and states are written to
    for owner, keys in ended.items():
        for key in keys:
            leaves[owner].state.pop(key, None)
    for key in block_state.keys() if frozen else []:
        if key.rpartition(".")[2] == "meta_grad":
            block_state[key].zero_()
    for name, leaf in leaves.items():
        first = {key: values[name] for key, values in begin.items() if name in values}
        _complete(leaf, specs[name], first, states, kept, numbers, before, kahan=kahan)
    if before is not None:
        _forget(before, leaves.values(), states)
        _clamp(config, plan.blocks, block_state, leaves)
    if before is not None:  # of numbers that are learned no more, as groups say them
        for key in set(before.block_state.keys()) - set(block_state.keys()):
            for group in groups:
                group.pop(key, None)
    block_state.hand_out(groups)
    _write_options(given, groups, leaves.values())
    for group in groups if frozen else ():
        group[FROZEN] = True
    pairs = {(id(leaf.rule), id(leaf.group)): (leaf.rule, leaf.group) for leaf in leaves.values()}
    return Built(
        config=config,
        plan=plan,
        leaves=leaves,
        places=held,
        block_state=block_state,
        counts=Counts([leaf for leaf in leaves.values() if leaf.state]),
        overrides=[
            (rule, group, overrides(hyperparameters(rule), group)) for rule, group in pairs.values()
        ],
        starts=starts,
        owners=[(group, group["block"]) for group in groups],
        frozen=frozen,
    )


def _several(number: Plan) -> bool:
    """Say whether a parameter has several values of a learned number."""
    blocks = number.blocks
    return blocks.partition.per_leaf or any(math.prod(view) > 1 for view in blocks.views.values())


def _numbers(config: mo.MetaOptimize, plan: Plan, name: str) -> tuple[tuple[Followed, int], ...]:
    """Return the numbers of a leaf's rule that are learned, and its first block of each."""
    found = []
    for key, number in plan.learned.items():
        if name in number.placed and not number.blocks.partition.per_leaf:
            own = config.learned[key]
            followed = Followed(
                name=key,
                place=number.place,
                slots=number.feeding[name],
                in_direction=number.in_direction,
                fixed=own.start if own.fixed else None,
            )
            blocks = number.blocks
            found.append((followed, blocks.families[blocks.family_of[name]].start))
    return tuple(found)


def _first(config: mo.MetaOptimize, plan: Plan, params: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what does not begin at 0, by key: values per block, or, at weight level, per leaf."""
    sides: list[tuple[str, Any, Plan]] = [("", config, plan)]
    sides += [(name, config.learned[name], number) for name, number in plan.learned.items()]
    found: dict[str, Any] = {}
    for name, own, part in sides:
        prefix = learned_key(name, "") if name else ""
        beta = start.beta(own, part, params)
        found[f"{prefix}beta"] = beta
        if part.beta_feeding:
            found[prefix + trace_key("beta")] = part.layout.start(beta)
    return found


def _continued_numbers(
    plan: Plan, names: Sequence[str], groups: Sequence[Group], before: Built
) -> dict[str, Continued]:
    """Return what the blocks of learned numbers continue, by the numbers' names."""
    found = {}
    for name, number in plan.learned.items():
        if name in before.plan.learned:
            old = before.plan.learned[name].blocks
            found[name] = continued(names, groups, number.blocks, before.leaves, old)
        else:
            found[name] = Continued({}, [None] * number.blocks.size, [])
    return found


def _leaf(
    config: mo.MetaOptimize,
    name: str,
    param: Tensor,
    group: Group,
    plan: Plan,
    rule: Rule,
    state: dict[str, Any],
    containers: Containers,
) -> Leaf:
    shard = shard_of(param, containers.group_of(name, param))
    blocks: np.ndarray[Any, Any] = np.zeros((), dtype=np.int64)
    if not plan.blocks.partition.per_leaf:
        family = plan.blocks.families[plan.blocks.family_of[name]]
        blocks = np.arange(family.start, family.start + family.size)
        blocks = blocks.reshape(plan.blocks.views[name])
        blocks = sliced(blocks, shard) if blocks.shape else blocks
        if shard.group is not None and plan.blocks.partition.assign(name, (2, 2))[1] != ():
            msg = (
                f"`blocks` gives {name!r} a step size for every unit, but of it this process has a "
                'part that keeps no shape; use "tensor" or names, or `fully_shard`.'
            )
            raise ValueError(msg)
    if scope_of(rule) == "leaf" and not shard.whole:
        msg = (
            f"`params[{name!r}]` is sharded, but {rule!r} has the scope "
            '"leaf": it has to see leaves whole. Replicate the parameter, give it an elementwise '
            "rule such as metaopt.AdamW() by a mapping as `base`, or, where the rule is "
            'elementwise, say `scope = "weight"`.'
        )
        raise ValueError(msg)
    return Leaf(
        name=name,
        param=param,
        group=group,
        rule=rule,
        dtype=plan.dtypes[name],
        shard=shard,
        blocks=blocks,
        state={} if is_stale(state, shard) else state,
        horizons=plan.horizons,
        numbers=_numbers(config, plan, name),
    )


def _check_blocks(before: Built, groups: Sequence[Group]) -> None:
    """Raise where a group has come by another block."""
    blocks = {id(group): block for group, block in before.owners}
    for index, group in enumerate(groups):
        block = blocks.get(id(group), group["block"])
        if block != group["block"]:
            msg = (
                f"`block` of group {index} was {block!r} and cannot become {group['block']!r} in "
                "mid-run. Put it back, or put another group in the place of this one, whose block "
                "starts afresh."
            )
            raise ValueError(msg)


def _check_starts(
    before: Built,
    blocks: Blocks,
    families: Index,
    starts: Mapping[str, Any],
    owners: Mapping[str, int],
) -> None:
    """Raise where groups say of blocks that have long started where they start."""
    former = list(before.plan.blocks.families)
    for key, was in zip(blocks.families, families, strict=True):
        if was is None or same(starts[key], before.starts[former[was]]):
            continue
        index = next(owners[name] for name, family in blocks.family_of.items() if family == key)
        msg = (
            f"`step_size` of group {index}, where the step size of block {key!r} starts, was "
            f"{before.starts[former[was]]!r} and cannot become {starts[key]!r} in mid-run. Put "
            "it back; what sets the step size that is learned is writing to `beta` of the group, "
            'which is its logarithm with the map "exp".'
        )
        raise ValueError(msg)


def _complete(
    leaf: Leaf,
    specs: Mapping[str, Spec],
    begin: Mapping[str, Tensor],
    states: States,
    kept: Continued,
    numbers: Mapping[str, Continued],
    before: Built | None,
    *,
    kahan: bool,
) -> None:
    """Complete the state of a leaf that may come by a gradient, and set its history."""
    former, fresh = kept.leaves.get(leaf.name), "step" not in leaf.state
    if leaf.state or leaf.param.requires_grad or leaf.param.grad is not None:
        states[leaf.param] = leaf.state
        first = {key: sliced(values, leaf.shard) for key, values in begin.items()}
        narrow = kahan and leaf.param.dtype != leaf.dtype
        columns = partial(blocks_of, kept=kept, numbers=numbers)
        complete(leaf, specs, first, kahan=narrow, columns=columns)
        if before is not None and (
            former is None
            or former.param is not leaf.param
            or former.shard.shape != leaf.shard.shape
        ):
            restart_rows(leaf, specs, first)
    if fresh:  # a new count is 0, which no device need be asked for
        return
    step = leaf.state["step"]
    counts = None if before is None or before.counts.edited() else before.counts
    if counts is not None and former is not None and counts.holds(former, step):
        leaf.history = former.history
    else:
        leaf.history = int(step)


def _forget(before: Built, leaves: Iterable[Leaf], states: States) -> None:
    """Drop the state of parameters that have left without a step; others may come back."""
    here = {id(leaf.param) for leaf in leaves}
    for leaf in before.leaves.values():
        if id(leaf.param) not in here and int(leaf.state.get("step", 0)) == 0:
            states.pop(leaf.param, None)


def _clamp(
    config: mo.MetaOptimize, blocks: Blocks, block_state: BlockState, leaves: Mapping[str, Leaf]
) -> None:
    """Hold step sizes to bounds, which may be new."""
    if block_state.per_leaf:
        betas = {name: local(leaf.state["beta"]) for name, leaf in leaves.items() if leaf.state}
    else:
        betas = {"": block_state["beta"]}
    if config.bounds is None or not betas:
        return
    map_leaves(Tensor.clamp_, betas, *config.limits(blocks, next(iter(betas.values()))))


def _kind(rule: Any) -> str:
    """Return the name of a rule's class, and of the one that it is around."""
    name = type(rule).__name__
    return name if within(rule) is None else f"{name} of {_kind(within(rule))}"


def _write_options(given: mo.MetaOptimize, groups: Sequence[Group], leaves: Iterable[Leaf]) -> None:
    """Write into groups what their rules agree on, and which rules their state belongs to."""
    rules: dict[int, list[Rule]] = {id(group): [] for group in groups}
    for leaf in leaves:
        rules[id(leaf.group)].append(leaf.rule)
    meta = _kind(given.meta)
    sigma = given.sigma if isinstance(given.sigma, str) else repr(given.sigma)
    several = "".join(f", {count} discounts" for count in given.horizons)
    learned = "".join(f", {name} by {own.sigma!r}" for name, own in given.learned.items())
    for group in groups:
        for name, value in agreed(rules[id(group)]).items():
            if group.get(name) is None:
                group[name] = value
        bases = " and ".join(sorted({_kind(rule) for rule in rules[id(group)]}))
        group[MADE_WITH] = f"{bases}, {meta}, {sigma}{several}{learned}"
        if isinstance(group["bounds"], list):
            group["bounds"] = tuple(group["bounds"])  # cannot be edited unnoticed
