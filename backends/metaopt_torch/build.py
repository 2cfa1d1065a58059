"""From parameter groups and what state there is to all that a step needs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

import metaopt as mo
from metaopt.arrays import per_leaf
from metaopt.blocks import Blocks
from metaopt.plan import Plan, Spec, rules_by_leaf
from metaopt.rules import Rule
from metaopt.rules.rule import scope_of
from metaopt_torch.changes import Index, index_of, moved, predecessors
from metaopt_torch.containers import Containers
from metaopt_torch.groups import MADE_WITH, configured, named, narrowed, same, started, starts
from metaopt_torch.hyperparameters import agreed, hyperparameters, overrides
from metaopt_torch.memory import address, stored
from metaopt_torch.places import paths, place
from metaopt_torch.runs import KEPT, Leaf, order_of
from metaopt_torch.shards import Part, local, part_of, window
from metaopt_torch.sharing import shared
from metaopt_torch.vectors import Vectors

__all__ = ["Built", "Counts", "build"]

Group = dict[str, Any]


class Counts:
    """How many steps each leaf has made, a vector for each device, so that it advances at once.

    Parameters
    ----------
    leaves : sequence of Leaf
        Those with a state, whose "step" becomes an entry.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._vectors: list[tuple[Tensor, list[str]]] = []
        self._masks: dict[Any, list[Tensor]] = {}
        self._entries: dict[str, Tensor] = {}
        self._versions: list[int] = []
        self._addresses: dict[str, int] = {}
        by_device: dict[torch.device, list[Leaf]] = defaultdict(list)
        for leaf in leaves:
            by_device[local(leaf.param).device].append(leaf)
        for device, members in by_device.items():
            if any(shared(leaf.state["step"]) for leaf in members):
                for leaf in members:  # an entry by itself, where it is
                    step = self._entries[leaf.name] = leaf.state["step"]
                    self._vectors.append((step.reshape(1), [leaf.name]))
                continue
            vector = torch.stack(
                [
                    torch.as_tensor(leaf.state["step"]).to(device, torch.int32).reshape(())
                    for leaf in members
                ]
            )
            for leaf, entry in zip(members, vector.unbind(), strict=True):
                leaf.state["step"] = self._entries[leaf.name] = entry
            self._vectors.append((vector, [leaf.name for leaf in members]))
        self._addresses = {name: address(entry) for name, entry in self._entries.items()}
        self.settle()

    def settle(self) -> None:
        """Take what the counts are now for what they should be."""
        self._versions = [vector._version for vector, _ in self._vectors]

    def edited(self) -> bool:
        """Say whether someone else has written to a count since."""
        return self._versions != [vector._version for vector, _ in self._vectors]

    def holds(self, leaf: Leaf, step: Any) -> bool:
        """Say whether the number of steps of a leaf is still the entry that it was given."""
        own = step is not None and self._entries.get(leaf.name) is step
        return own and address(step) == self._addresses[leaf.name]

    def advance(self, names: Sequence[str], accepted: Tensor | None) -> None:
        """Count a step of these leaves, if it is accepted."""
        key = tuple(names)
        if key not in self._masks:
            if len(self._masks) > 100:  # leaves that rest at random make new ones without end
                self._masks.clear()
            moving = set(names)
            self._masks[key] = [
                torch.tensor(
                    [name in moving for name in members], dtype=torch.int32, device=vector.device
                )
                for vector, members in self._vectors
            ]
        for (vector, _), mask in zip(self._vectors, self._masks[key], strict=True):
            vector.add_(
                mask if accepted is None else torch.where(accepted.to(mask.device), mask, 0)
            )
        self.settle()


@dataclass(frozen=True)
class Built:
    """What a step needs.

    Parameters
    ----------
    config : MetaOptimize
        The optimizer's own, with what the groups say.
    plan : Plan
    leaves : mapping of name to Leaf
    vectors : Vectors
    counts : Counts
    said : sequence of (rule, group, dict)
        The hyperparameters of rules for which groups have other values in `config`.
    starts : mapping of block name to float or array
        Step sizes with which blocks start, as the groups say.
    owners : sequence of (group, str or None)
        The groups, and their `block`.
    """

    config: mo.MetaOptimize
    plan: Plan
    leaves: dict[str, Leaf]
    vectors: Vectors
    counts: Counts
    said: list[tuple[Rule, Group, dict[str, Any]]]
    starts: dict[str, Any]
    owners: list[tuple[Group, str | None]]

    def outdated(self) -> bool:
        """Say whether groups have other hyperparameters than in `config`."""
        return any(
            overrides(hyperparameters(rule), group) != kept for rule, group, kept in self.said
        )


def build(
    given: mo.MetaOptimize,
    groups: Sequence[Group],
    states: MutableMapping[Tensor, dict[str, Any]],
    *,
    kahan: bool,
    containers: Containers,
    before: Built | None = None,
) -> Built:
    """Return what a step needs, and complete the state of parameters that require a gradient.

    What state there is is kept, in the dtype it should have. Nothing is changed where it raises.

    Parameters
    ----------
    given : MetaOptimize
    groups : sequence of dict
    states : mapping of parameter to dict
        The optimizer's `state`.
    kahan : bool
        Whether narrow parameters keep what rounding loses.
    containers : Containers
        Who may have sharded parameters.
    before : Built, optional
        What steps were made with until now. Blocks keep what they have learned, whichever group
        has it now, and the numbers of steps are known.

    Raises
    ------
    ValueError, TypeError
        If groups say what cannot be, or what cannot change any more, or if an array of the state
        does not fit its parameter.
    """
    config, members = configured(given, groups), named(groups)
    if started(groups):
        given = narrowed(given, members)
    params = {name: param for name, param, _ in members}
    plan = config.plan(params)
    # without the hyperparameters of groups, which passes take as arguments
    rules = rules_by_leaf(given.base, per_leaf((name, param) for name, param, _ in members))
    leaves = {
        name: _leaf(name, param, group, plan, rules[name], states, containers)
        for name, param, group in members
    }
    number = {id(group): index for index, group in enumerate(groups)}
    owners = {name: number[id(group)] for name, _, group in members}
    _check_units(plan, leaves)
    begin_at = starts(given, members, plan.blocks.family_of)
    continued: dict[str, Leaf] = {}
    by_block: Index = []
    by_family: Index = []
    if before is not None:
        continued = predecessors(list(leaves), groups, before.leaves)
        by_block, by_family = index_of(plan.blocks, before.plan.blocks, continued)
        _check_blocks(before, groups)
        _check_starts(before, plan.blocks, by_family, begin_at, owners)
    vectors = Vectors(plan, owners, len(groups), members[0][1].device)
    start = _start(config, plan, params)
    if not vectors.per_leaf:
        for key, values in start.items():
            vectors.fill(key, values)
        start = {}
    if before is not None:
        vectors.carry(before.vectors, by_block, by_family)
    vectors.read(groups, None if before is None else before.vectors)
    vectors.stay(groups)

    specs: dict[str, list[tuple[str, Spec]]] = defaultdict(list)
    for path, spec in paths(plan.state):
        name, key = place(path, per_leaf=vectors.per_leaf)
        if name is not None:
            specs[name].append((key, spec))
    for leaf in leaves.values():
        _check_state(leaf, [key for key, _ in specs[leaf.name]])
    fresh = {name for name, leaf in leaves.items() if "step" not in leaf.state}

    for name, leaf in leaves.items():
        if leaf.state or _moves(leaf.param):
            if states.get(leaf.param) is not leaf.state:
                states[leaf.param] = leaf.state
            begin = {key: window(values[name], leaf.part) for key, values in start.items()}
            narrow = kahan and leaf.param.dtype != leaf.dtype
            _complete(leaf, specs[name], begin, kahan=narrow, columns=by_block)
            if before is not None and _is_another(leaf, continued.get(name)):
                _begin_zeros(leaf, specs[name], begin)
    if before is not None:
        _forget(before, leaves, states)
        _bound(config, plan, vectors, leaves)
    vectors.share(groups)
    _fill(groups, rules, owners)
    _mark(given, groups, rules, owners)
    for name in leaves.keys() - fresh:  # whose counts are 0, which no device need be asked for
        _remember(leaves[name], before, continued.get(name))
    return Built(
        config=config,
        plan=plan,
        leaves=leaves,
        vectors=vectors,
        counts=Counts([leaf for leaf in leaves.values() if leaf.state]),
        said=_said(leaves.values()),
        starts=begin_at,
        owners=[(group, group["block"]) for group in groups],
    )


def _start(config: mo.MetaOptimize, plan: Plan, params: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what does not begin at 0, by block or, at weight level, by leaf."""
    beta = config.initial_beta(params)
    return {"beta": beta} | ({"beta_trace": plan.layout.start(beta)} if plan.beta_feeding else {})


def _leaf(
    name: str,
    param: Tensor,
    group: Group,
    plan: Plan,
    rule: Rule,
    states: Mapping[Tensor, Any],
    containers: Containers,
) -> Leaf:
    view = () if plan.blocks.partition.per_leaf else plan.blocks.views[name]
    part = part_of(param, containers.group_of(name, param))
    _check_whole(name, rule, part)
    return Leaf(
        name=name,
        param=param,
        group=group,
        rule=rule,
        dtype=plan.dtypes[name],
        part=part,
        view=view,
        order=order_of(local(param), view),
        blocks=_blocks(plan, name, view, part),
        state={} if _idle(states.get(param, {}), part) else states.get(param, {}),
    )


def _idle(state: Mapping[str, Any], part: Part) -> bool:
    """Say whether a state is of steps that were never made, before the parameter was cut.

    FullyShardedDataParallel may wrap a model whose optimizer exists already.
    """
    arrays = [value for key, value in state.items() if key != "step"]
    if part.group is None or all(tuple(array.shape) == part.shape for array in arrays):
        return False
    return int(state.get("step", 0)) == 0


def _mark(
    given: mo.MetaOptimize,
    groups: Sequence[Group],
    rules: Mapping[str, Rule],
    owners: Mapping[str, int],
) -> None:
    """Write into every group which rules and map its state belongs to."""
    kinds: list[set[str]] = [set() for _ in groups]
    for name, rule in rules.items():
        kinds[owners[name]].add(type(rule).__name__)
    meta = type(given.meta).__name__
    if isinstance(given.meta, mo.FastStart):
        meta = f"{meta} of {type(given.meta.rule).__name__}"
    sigma = given.sigma if isinstance(given.sigma, str) else repr(given.sigma)
    for group, bases in zip(groups, kinds, strict=True):
        group[MADE_WITH] = f"{' and '.join(sorted(bases))}, {meta}, {sigma}"
        if isinstance(group["bounds"], list):
            group["bounds"] = tuple(group["bounds"])  # cannot be edited unnoticed


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
    by_family: Index,
    begin_at: Mapping[str, Any],
    owners: Mapping[str, int],
) -> None:
    """Raise where groups say of blocks that have long started where they start."""
    former = list(before.plan.blocks.families)
    for key, was in zip(blocks.families, by_family, strict=True):
        if was is None or same(begin_at[key], before.starts[former[was]]):
            continue
        index = next(owners[name] for name, family in blocks.family_of.items() if family == key)
        msg = (
            f"`step_size` of group {index}, where the step size of block {key!r} starts, was "
            f"{before.starts[former[was]]!r} and cannot become {begin_at[key]!r} in mid-run. Put "
            "it back; what sets the step size that is learned is writing to `beta` of the group, "
            'which is its logarithm with the map "exp".'
        )
        raise ValueError(msg)


def _check_state(leaf: Leaf, keys: Iterable[str]) -> None:
    """Raise where what a leaf's state has under these keys cannot be gone on with."""
    state = leaf.state
    for key in state.keys() & {*keys, "compensation"}:
        value, what = state[key], f"`state[...][{key!r}]` of parameter {leaf.name!r}"
        if isinstance(value, Tensor):
            value = local(value)
            if value.layout != torch.strided or not stored(value):
                msg = f"{what} must be dense and lie in its storage; got one that does not."
                raise ValueError(msg)
        single = isinstance(value, Tensor) and tuple(value.shape) in ((), (1,))
        if key == "step" and not single and not isinstance(value, Real):
            msg = f"{what} must be the number of its steps; got {value!r}."
            raise ValueError(msg)
        if key in leaf.rule.slots:
            shape = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            if shape != leaf.shape_of(key):
                msg = (
                    f"{what} must be a tensor of shape {leaf.shape_of(key)} on this device; got "
                    f"{shape}. Change it as the parameter was changed, or give the parameter an "
                    "empty state, to start afresh."
                )
                raise ValueError(msg)
    lacking = [key for key in leaf.rule.slots if key not in state]
    if "step" in state and lacking:
        msg = (
            f"`state` of parameter {leaf.name!r} has the number of its steps, but no "
            f"{lacking[0]!r}: a moment that starts afresh goes with a count that does. Put it "
            "back, or give the parameter an empty state."
        )
        raise ValueError(msg)


def _forget(
    before: Built, leaves: Mapping[str, Leaf], states: MutableMapping[Tensor, dict[str, Any]]
) -> None:
    """Drop the state of parameters that have left without a step; others may come back."""
    here = {id(leaf.param) for leaf in leaves.values()}
    for leaf in before.leaves.values():
        if id(leaf.param) not in here and int(leaf.state.get("step", 0)) == 0:
            states.pop(leaf.param, None)


def _bound(
    config: mo.MetaOptimize, plan: Plan, vectors: Vectors, leaves: Mapping[str, Leaf]
) -> None:
    """Hold step sizes to bounds, which may be new."""
    betas = (
        {"": vectors["beta"]}
        if not vectors.per_leaf
        else {name: local(leaf.state["beta"]) for name, leaf in leaves.items() if leaf.state}
    )
    if config.bounds is None or not betas:
        return
    limits = config.limits(plan.blocks, next(iter(betas.values())))
    for name, beta in betas.items():
        beta.clamp_(*(end[name] if isinstance(end, Mapping) else end for end in limits))


def _said(leaves: Iterable[Leaf]) -> list[tuple[Rule, Group, dict[str, Any]]]:
    """Return what groups say of hyperparameters, once for each rule and group."""
    pairs = {(id(leaf.rule), id(leaf.group)): leaf for leaf in leaves}
    return [
        (leaf.rule, leaf.group, overrides(hyperparameters(leaf.rule), leaf.group))
        for leaf in pairs.values()
    ]


def _fill(groups: Sequence[Group], rules: Mapping[str, Rule], owners: Mapping[str, int]) -> None:
    """Have groups hold the hyperparameters that the rules of their leaves agree on."""
    members: list[list[Rule]] = [[] for _ in groups]
    for name, rule in rules.items():
        members[owners[name]].append(rule)
    for group, of_group in zip(groups, members, strict=True):
        for name, value in agreed(of_group).items():
            if group.get(name) is None:
                group[name] = value


def _check_units(plan: Plan, leaves: Mapping[str, Leaf]) -> None:
    """Raise where units of a group's parts would have step sizes: which ones, no shape says."""
    partition = plan.blocks.partition
    for name, leaf in leaves.items():
        if leaf.part.group is None or partition.per_leaf:
            continue
        if partition.assign(name, (2, 2))[1] != ():
            msg = (
                f"`blocks` gives {name!r} a step size for every unit, but of it this process has a "
                'part that keeps no shape; use "tensor" or names, or `fully_shard`.'
            )
            raise ValueError(msg)


def _check_whole(name: str, rule: Rule, part: Part) -> None:
    """Raise ValueError where a rule has to see a leaf whole of which this device holds a part."""
    if scope_of(rule) == "leaf" and not part.whole:
        msg = (
            f"`params[{name!r}]` is sharded, but {rule!r} has the scope "
            '"leaf": it has to see leaves whole. Replicate the parameter, give it an elementwise '
            "rule such as metaopt.AdamW() by a mapping as `base`, or, where the rule is "
            'elementwise, say `scope = "weight"`.'
        )
        raise ValueError(msg)


def _remember(leaf: Leaf, before: Built | None, former: Leaf | None) -> None:
    """Set a leaf's history to that of the leaf it continues, or else to its count."""
    step = leaf.state["step"]
    counts = None if before is None or before.counts.edited() else before.counts
    known = counts is not None and former is not None and counts.holds(former, step)
    leaf.history = former.history if former is not None and known else int(step)


def _moves(param: Tensor) -> bool:
    """Say whether a step may find a gradient of this parameter."""
    return param.requires_grad or param.grad is not None


def _blocks(plan: Plan, name: str, view: tuple[int, ...], part: Part) -> Any:
    """Return the block of each row of a part, as a NumPy array."""
    if plan.blocks.partition.per_leaf:
        return np.zeros(1, dtype=np.int64)
    family = plan.blocks.families[plan.blocks.family_of[name]]
    index = np.arange(family.start, family.start + family.size)
    return index if view == () else window(index.reshape(view), part).reshape(-1)


def _complete(
    leaf: Leaf,
    specs: Sequence[tuple[str, Spec]],
    begin: Mapping[str, Tensor],
    *,
    kahan: bool,
    columns: Index,
) -> None:
    """Add to a leaf's state what it lacks; new numbers are zero where nothing else is said.

    What has not the shape of the parameter starts afresh: those who replace parameters do not know
    of all that there is. Dense traces have their columns in the order of the blocks.
    """
    memory = local(leaf.param)
    _exchange(leaf, [key for key, _ in specs])
    old = leaf.state.get("compensation")
    if kahan and not _fits(old, memory.dtype, leaf.part.shape, memory.device):
        zeros = torch.zeros_like(memory, memory_format=torch.preserve_format)
        leaf.state["compensation"] = leaf.part.wrap(zeros, leaf.param.shape, leaf.param.stride())
    for key, spec in specs:
        if key == "step":
            leaf.state.setdefault(key, torch.zeros((), dtype=spec.dtype, device=memory.device))
            continue
        own = leaf.own_shape(key)
        lead = () if own else spec.shape[: len(spec.shape) - leaf.param.dim()]
        shape = spec.shape if own else (*lead, *leaf.part.shape)
        old = leaf.state.get(key)
        turned = bool(lead) and columns != list(range(len(columns)))
        if _fits(old, spec.dtype, shape, memory.device) and not turned:
            continue
        new = torch.zeros_like(memory, dtype=spec.dtype, memory_format=torch.preserve_format)
        if lead or own:
            new = torch.zeros(shape, dtype=spec.dtype, device=memory.device)
        if key in begin:
            new.copy_(begin[key])
        elif key == "average":  # the trace begins at 0
            new.copy_(memory)
        if isinstance(old, Tensor) and local(old).shape[len(lead) :] == shape[len(lead) :]:
            if lead:
                moved(local(old), new, columns, range(len(lead)))
            else:
                new.copy_(local(old))
        whole = torch.empty(spec.shape, device="meta")
        stride = whole.stride() if lead or own else leaf.param.stride()
        leaf.state[key] = leaf.part.wrap(new, spec.shape, stride)


def _is_another(leaf: Leaf, former: Leaf | None) -> bool:
    """Say whether a parameter is new, or of another shape than it was."""
    if former is None or former.param is not leaf.param:
        return True
    return former.part.shape != leaf.part.shape


def _begin_zeros(
    leaf: Leaf, specs: Sequence[tuple[str, Spec]], begin: Mapping[str, Tensor]
) -> None:
    """Have entries whose state is zero throughout start as those of new parameters do.

    Scripts that add rows to a parameter fill its state with zeros, whatever it holds.
    """
    first = dict(begin)
    if "average" in leaf.state:
        first["average"] = local(leaf.param)
    held = {key: local(leaf.state[key]) for key, _ in specs if key != "step"}
    held = {key: value for key, value in held.items() if value.shape == leaf.part.shape}
    if not first.keys() & held.keys():
        return
    new = torch.stack([value == 0 for value in held.values()]).all(dim=0)
    for key in first.keys() & held.keys():
        held[key].copy_(torch.where(new, first[key].to(held[key].dtype), held[key]))


def _fits(value: Any, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> bool:
    """Say whether this is a tensor as a step needs it."""
    if not isinstance(value, Tensor):
        return False
    part = local(value)
    return part.dtype == dtype and tuple(part.shape) == shape and part.device == device


def _exchange(leaf: Leaf, keys: Sequence[str]) -> None:
    """Make of a trace the average that it is the distance to, or the reverse, where keys say so.

    What is kept depends on the dtype of a parameter, which may have changed.
    """
    for old, new in (KEPT, KEPT[::-1]):
        if old in leaf.state and old not in keys and new in keys:
            kept = leaf.state.pop(old)
            fits = isinstance(kept, Tensor) and local(kept).shape == leaf.part.shape
            if fits and int(leaf.state.get("step", 0)):  # before the first step the trace is 0
                weights = local(leaf.param).detach().to(kept.dtype)
                whole = torch.empty(leaf.param.shape, device="meta")
                leaf.state[new] = leaf.part.wrap(
                    weights - local(kept), whole.shape, leaf.param.stride()
                )
