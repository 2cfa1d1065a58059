"""From parameter groups and what state there is to all that a step needs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import metaopt as mo
from metaopt.arrays import per_leaf
from metaopt.plan import Plan, Spec, rules_by_leaf
from metaopt_torch.containers import Containers
from metaopt_torch.groups import MADE_WITH, configured, named
from metaopt_torch.places import paths, place
from metaopt_torch.runs import Leaf, order_of
from metaopt_torch.shards import Part, local, part_of, window
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
        by_device: dict[torch.device, list[Leaf]] = defaultdict(list)
        for leaf in leaves:
            by_device[local(leaf.param).device].append(leaf)
        for device, members in by_device.items():
            vector = torch.stack(
                [leaf.state["step"].to(device, torch.int32).reshape(()) for leaf in members]
            )
            for leaf, entry in zip(members, vector.unbind(), strict=True):
                leaf.state["step"] = entry
            self._vectors.append((vector, [leaf.name for leaf in members]))

    def advance(self, names: Sequence[str], accepted: Tensor | None) -> None:
        """Count a step of these leaves, if it is accepted."""
        key = tuple(names)
        if key not in self._masks:
            moving = set(names)
            self._masks = {
                key: [
                    torch.tensor(
                        [name in moving for name in members],
                        dtype=torch.int32,
                        device=vector.device,
                    )
                    for vector, members in self._vectors
                ]
            }
        for (vector, _), mask in zip(self._vectors, self._masks[key], strict=True):
            vector.add_(
                mask if accepted is None else torch.where(accepted.to(mask.device), mask, 0)
            )


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
    decays : mapping of group id to float or None
        Weight decay of the groups in `config`.
    """

    config: mo.MetaOptimize
    plan: Plan
    leaves: dict[str, Leaf]
    vectors: Vectors
    counts: Counts
    decays: dict[int, float | None]

    def outdated(self) -> bool:
        """Say whether groups have another weight decay than in `config`."""
        return any(
            leaf.group["weight_decay"] != self.decays[id(leaf.group)]
            for leaf in self.leaves.values()
        )


def build(
    given: mo.MetaOptimize,
    groups: Sequence[Group],
    states: Any,
    *,
    kahan: bool,
    known: Mapping[str, Leaf],
    containers: Containers,
) -> Built:
    """Return what a step needs, and complete the state of parameters that require a gradient.

    What state there is is kept, in the dtype it should have. Columns of dense traces, for blocks
    that are new, are added to it.

    Parameters
    ----------
    given : MetaOptimize
    groups : sequence of dict
    states : mapping of parameter to dict
        The optimizer's `state`.
    kahan : bool
        Whether narrow parameters keep what rounding loses.
    known : mapping of name to Leaf
        Those whose number of steps is known.
    containers : Containers
        Who may have sharded parameters.
    """
    config, members = configured(given, groups), named(groups)
    params = {name: param for name, param, _ in members}
    plan = config.plan(params)
    beta = config.initial_beta(params)
    number = {id(group): index for index, group in enumerate(groups)}
    owners = {name: number[id(group)] for name, _, group in members}
    vectors = Vectors(config, plan, owners, len(groups), members[0][1].device)
    if not vectors.per_leaf:
        vectors.fill("beta", beta)
        if plan.beta_feeding:
            vectors.fill("beta_trace", plan.layout.start(beta))
    start = {"beta": beta} if vectors.per_leaf else {}
    if vectors.per_leaf and plan.beta_feeding:
        start["beta_trace"] = plan.layout.start(beta)
    vectors.read(groups)
    vectors.share(groups)

    specs: dict[str, list[tuple[str, Spec]]] = defaultdict(list)
    for path, spec in paths(plan.state):
        name, key = place(path, per_leaf=vectors.per_leaf)
        if name is not None:
            specs[name].append((key, spec))
    # without the weight decay of groups, which passes take as an argument
    rules = rules_by_leaf(given.base, per_leaf((name, param) for name, param, _ in members))
    leaves = {}
    for name, param, group in members:
        view = () if vectors.per_leaf else plan.blocks.views[name]
        part = part_of(param, containers.group_of(name, param))
        leaf = Leaf(
            name=name,
            param=param,
            group=group,
            rule=rules[name],
            dtype=plan.dtypes[name],
            part=part,
            order=order_of(local(param), view),
            blocks=_blocks(plan, name, view, part),
            state=states[param] if param in states or _moves(param) else {},
            history=known[name].history if name in known else 0,
        )
        if "step" in leaf.state and name not in known:
            leaf.history = int(leaf.state["step"])  # a state that was loaded
        if leaf.state or _moves(param):
            begin = {key: window(values[name], part) for key, values in start.items()}
            _complete(leaf, specs[name], begin, kahan=kahan and param.dtype != leaf.dtype)
        leaves[name] = leaf
    _check_units(plan, leaves)
    kinds: list[set[str]] = [set() for _ in groups]
    for name, rule in rules.items():
        kinds[owners[name]].add(type(rule).__name__)
    meta = type(given.meta).__name__
    if isinstance(given.meta, mo.FastStart):
        meta = f"{meta} of {type(given.meta.rule).__name__}"
    sigma = given.sigma if isinstance(given.sigma, str) else repr(given.sigma)
    for group, bases in zip(groups, kinds, strict=True):
        group[MADE_WITH] = f"{' and '.join(sorted(bases))}, {meta}, {sigma}"
    counts = Counts([leaf for leaf in leaves.values() if leaf.state])
    decays = {id(group): group["weight_decay"] for group in groups}
    return Built(config, plan, leaves, vectors, counts, decays)


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
    leaf: Leaf, specs: Sequence[tuple[str, Spec]], begin: Mapping[str, Tensor], *, kahan: bool
) -> None:
    """Add to a leaf's state what it lacks; new numbers are zero where nothing else is said."""
    memory = local(leaf.param)
    if kahan and "compensation" not in leaf.state:
        zeros = torch.zeros_like(memory, memory_format=torch.preserve_format)
        leaf.state["compensation"] = leaf.part.wrap(zeros, leaf.param.shape, leaf.param.stride())
    for key, spec in specs:
        if key == "step":
            leaf.state.setdefault(key, torch.zeros((), dtype=spec.dtype, device=memory.device))
            continue
        lead = spec.shape[: len(spec.shape) - leaf.param.dim()]
        shape = (*lead, *leaf.part.shape)
        old = leaf.state.get(key)
        if old is not None and old.dtype == spec.dtype and tuple(local(old).shape) == shape:
            continue
        new = torch.zeros_like(memory, dtype=spec.dtype, memory_format=torch.preserve_format)
        if lead:
            new = torch.zeros(shape, dtype=spec.dtype, device=memory.device)
        if key in begin:
            new.copy_(begin[key])
        if old is not None:
            new[tuple(slice(None, length) for length in local(old).shape)].copy_(local(old))
        whole = torch.empty(spec.shape, device="meta")
        stride = whole.stride() if lead else leaf.param.stride()
        leaf.state[key] = leaf.part.wrap(new, spec.shape, stride)
