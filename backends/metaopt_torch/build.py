"""From parameter groups and what state there is to all that a step needs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

import metaopt as mo
from metaopt.arrays import per_leaf
from metaopt.blocks import Blocks
from metaopt.plan import Plan, Spec
from metaopt.rules import Rule
from metaopt.rules.rule import scope_of
from metaopt_torch.block_state import BlockState
from metaopt_torch.changes import Continued, Index, continued
from metaopt_torch.containers import Containers
from metaopt_torch.counts import Counts
from metaopt_torch.groups import MADE_WITH, configured, named, same
from metaopt_torch.hyperparameters import Number, agreed, hyperparameters, overrides
from metaopt_torch.leaf import Group, Leaf
from metaopt_torch.leaf_state import check_state, complete, is_stale, restart_rows
from metaopt_torch.memory import shared
from metaopt_torch.shards import local, shard_of, sliced
from metaopt_torch.state_keys import state_key, walk

__all__ = ["Built", "build"]

States = MutableMapping[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Built:
    """What a step needs."""

    config: mo.MetaOptimize  # the optimizer's own, with what the groups say
    plan: Plan
    leaves: dict[str, Leaf]
    block_state: BlockState
    counts: Counts
    #: Hyperparameters of rules for which groups have other values in `config`.
    overrides: list[tuple[Rule, Group, dict[str, Number]]]
    #: Step sizes with which blocks start, as the groups say.
    starts: dict[str, Any]
    #: The groups, and their `block`.
    owners: list[tuple[Group, str | None]]

    @property
    def in_core(self) -> bool:
        """Whether steps are the core's own: with curvature, a step size a weight, or recovery."""
        return self.plan.curvature != "none" or self.block_state.per_leaf or self.config.recover

    @property
    def z_first(self) -> bool:
        """Whether steps need the meta-gradient before they write a trace or a parameter."""
        return self.in_core or self.config.meta_first or self.config.skip_nonfinite

    def step_sizes(self) -> dict[str, Tensor]:
        """Return the learned step sizes by block; copies, as some maps return beta itself."""
        leaves = [leaf for leaf in self.leaves.values() if leaf.state]
        if self.block_state.per_leaf:
            betas = per_leaf((leaf.name, leaf.state["beta"].clone()) for leaf in leaves)
            return dict(self.config.slopes(betas)[0])
        sizes, _ = self.config.slopes(self.block_state["beta"].clone())
        return dict(self.plan.blocks.by_name(sizes))

    def blocks_by_group(self) -> list[list[str]]:
        """Return the blocks of each group, those that others before it have apart."""
        seen: set[str] = set()
        found: dict[int, list[str]] = {id(group): [] for group, _ in self.owners}
        for name, key in self.plan.blocks.family_of.items():
            if key not in seen:
                seen.add(key)
                found[id(self.leaves[name].group)].append(key)
        return list(found.values())

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
        """Return whether groups have other hyperparameters than in `config`."""
        return any(
            overrides(hyperparameters(rule), group) != kept for rule, group, kept in self.overrides
        )


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
        name: _leaf(name, param, group, plan, rules[name], states.get(param, {}), containers)
        for name, param, group in members
    }
    number = {id(group): index for index, group in enumerate(groups)}
    owners = {name: number[id(group)] for name, _, group in members}
    kept = Continued({}, list(range(plan.blocks.size)), [])
    if before is not None:
        kept = continued(list(leaves), groups, plan.blocks, before.leaves, before.plan.blocks)
        _check_blocks(before, groups)
        _check_starts(before, plan.blocks, kept.families, starts, owners)
    # what does not begin at 0, by block or, at weight level, by leaf
    begin: dict[str, Any] = {"beta": config.initial_beta(params)}
    if plan.beta_feeding:
        begin["beta_trace"] = plan.layout.start(begin["beta"])
    block_state = BlockState(plan, owners, len(groups), members[0][1].device)
    if not block_state.per_leaf:
        for key, values in begin.items():
            block_state[key].copy_(values)
        begin = {}
    if before is not None:
        block_state.carry(before.block_state, kept)
    block_state.read(groups, None if before is None else before.block_state)
    block_state.adopt_shared(groups)
    specs: dict[str, dict[str, Spec]] = defaultdict(dict)
    for path, spec in walk(plan.state):
        leaf_name, key = state_key(path, per_leaf=block_state.per_leaf)
        if leaf_name is not None:
            specs[leaf_name][key] = spec
    for name, leaf in leaves.items():
        check_state(leaf, specs[name])
    # from here on nothing raises, and groups and states are written to
    for name, leaf in leaves.items():
        first = {key: values[name] for key, values in begin.items()}
        _complete(leaf, specs[name], first, states, kept, before, kahan=kahan)
    if before is not None:
        _forget(before, leaves.values(), states)
        _clamp(config, plan.blocks, block_state, leaves)
    block_state.hand_out(groups)
    _write_options(given, groups, leaves.values())
    pairs = {(id(leaf.rule), id(leaf.group)): (leaf.rule, leaf.group) for leaf in leaves.values()}
    return Built(
        config=config,
        plan=plan,
        leaves=leaves,
        block_state=block_state,
        counts=Counts([leaf for leaf in leaves.values() if leaf.state]),
        overrides=[
            (rule, group, overrides(hyperparameters(rule), group)) for rule, group in pairs.values()
        ],
        starts=starts,
        owners=[(group, group["block"]) for group in groups],
    )


def _leaf(
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
        complete(leaf, specs, first, kahan=narrow, columns=kept.blocks)
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
    limits = config.limits(blocks, next(iter(betas.values())))
    for name, beta in betas.items():
        beta.clamp_(*(end[name] if isinstance(end, Mapping) else end for end in limits))


def _write_options(given: mo.MetaOptimize, groups: Sequence[Group], leaves: Iterable[Leaf]) -> None:
    """Write into groups what their rules agree on, and which rules their state belongs to."""
    rules: dict[int, list[Rule]] = {id(group): [] for group in groups}
    for leaf in leaves:
        rules[id(leaf.group)].append(leaf.rule)
    meta = type(given.meta).__name__
    if isinstance(given.meta, mo.FastStart):
        meta = f"{meta} of {type(given.meta.rule).__name__}"
    sigma = given.sigma if isinstance(given.sigma, str) else repr(given.sigma)
    for group in groups:
        for name, value in agreed(rules[id(group)]).items():
            if group.get(name) is None:
                group[name] = value
        bases = " and ".join(sorted({type(rule).__name__ for rule in rules[id(group)]}))
        group[MADE_WITH] = f"{bases}, {meta}, {sigma}"
        if isinstance(group["bounds"], list):
            group["bounds"] = tuple(group["bounds"])  # cannot be edited unnoticed
