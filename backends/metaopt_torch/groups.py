"""From parameter groups to the core's configuration: names, rules, blocks, step sizes, bounds."""

import glob
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import metaopt as mo
from metaopt.arrays import per_leaf
from metaopt.blocks import Blocks, Named, Partition, first_match
from metaopt.inputs import check_bounds, multiplier, taken_for_step_size
from metaopt.plan import rules_by_leaf
from metaopt.rules import Rule
from metaopt.warning import warn
from metaopt_torch.hyperparameters import adjusted, check_not_learned
from metaopt_torch.leaf import Group
from metaopt_torch.memory import check_memory

__all__ = [
    "FROZEN",
    "MADE_WITH",
    "OPTIONS",
    "Configured",
    "Member",
    "check_fixed",
    "check_groups",
    "check_numbers",
    "check_options",
    "check_rounding",
    "configured",
    "multiplier_of",
    "named",
    "same",
    "take_keys",
    "warn_of_small_lr",
    "warn_of_unused_decay",
]

#: What a parameter group may say of its own, beside the hyperparameters of its rules.
OPTIONS = ("lr", "weight_decay", "maximize", "block", "step_size", "bounds")
#: Key of a group for the rules and the maps that its state belongs to.
MADE_WITH = "made_with"
#: Key of a group for that nothing is learned any more; there where that is so.
FROZEN = "step_sizes_frozen"
#: Numbers of the whole optimizer that a group cannot change in mid-training.
FIXED = ("meta_lr", "discount")


@dataclass(frozen=True)
class ByGroup(Partition):
    """Leaves of groups with a block name in the block of that name, the others as `rest` says."""

    named: tuple[tuple[str, str], ...]  # leaf and block
    rest: Partition

    def assign(self, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Return the block of a leaf; see `metaopt.blocks.Partition`."""
        block = dict(self.named).get(name)
        return self.rest.assign(name, shape) if block is None else (block, ())

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> Blocks:
        """Return the blocks of leaves with these shapes."""
        others = {name: shape for name, shape in shapes.items() if name not in dict(self.named)}
        if others:
            self.rest.bind(others)  # whose patterns have to fit these
        return super().bind(shapes)


class Member(NamedTuple):
    """A parameter with its name and its group."""

    name: str
    param: Tensor
    group: Group


def named(groups: Sequence[Group]) -> list[Member]:
    """Return all parameters of groups; those without a name are numbered."""
    found: list[Member] = []
    for group in groups:
        names = group.get("param_names")
        for index, param in enumerate(group["params"]):
            name = str(len(found)) if names is None else names[index]
            found.append(Member(name, param, group))
    return found


def check_groups(groups: Sequence[Group]) -> None:
    """Raise where groups hold what cannot be optimized, or options that are none."""
    seen: set[str] = set()
    known: dict[int, str] = {}
    for name, param, _ in named(groups):
        if name in seen:
            msg = f"`params` has two parameters called {name!r}; names must differ."
            raise ValueError(msg)
        if id(param) in known:
            msg = f"`params` has one parameter twice, as {known[id(param)]!r} and as {name!r}."
            raise ValueError(msg)
        seen.add(name)
        known[id(param)] = name
        check_memory(name, param)
        if param.layout != torch.strided or not param.is_floating_point():
            got = param.dtype if param.layout == torch.strided else param.layout
            msg = f"`params[{name!r}]` must be dense, real and floating; got {got}."
            raise TypeError(msg)
    for group in groups:
        check_options(group)


def check_options(group: Group) -> None:
    """Raise unless what a group, or the constructor for all, says is what may be said."""
    check_numbers(group)
    block = group["block"]
    if not isinstance(group["maximize"], bool):
        msg = f"`maximize` must be True or False; got {group['maximize']!r}."
        raise TypeError(msg)
    if block is not None and not isinstance(block, str):
        msg = f"`block` must be the name of a block, or None; got {block!r}."
        raise TypeError(msg)


def take_keys(
    group: Group,
    config: mo.MetaOptimize,
    own: Mapping[str, Any],
    hyper: Iterable[str],
    state: Collection[str],
) -> None:
    """Take from a new group what is the whole optimizer's, and raise for misspelt options.

    Other keys are the user's own, and stay as they are. Wrappers that are optimizers themselves
    (SAM, ZeroRedundancyOptimizer) copy all arguments of the constructor into the groups.

    `config` is as it was given to the optimizer, `own` are the constructor's other arguments,
    `hyper` the names of the rules' hyperparameters, `state` those of what groups hold of the state.
    ValueError is raised for a key that is misspelt, or the optimizer's with another value that it
    could have, or the name of its state.
    """
    own = {field.name: getattr(config, field.name) for field in fields(config)} | dict(own)
    options = {*OPTIONS, *hyper}
    for key in list(group):  # from which keys are deleted
        if key in own and same(_as_held(config, key, group[key]), own[key]):
            del group[key]
        elif key in options or not isinstance(key, str):
            continue
        elif key in own and not _could_be(config, key, group[key], own[key]):
            continue  # the same word for something else
        elif key in own:
            msg = (
                f"`params` has a group with `{key}` {group[key]!r}, which all groups have in "
                f"common; give it to the optimizer, which has {own[key]!r}."
            )
            raise ValueError(msg)
        elif key in state:
            msg = (
                f"`params` has a group with {key!r}, a name of this optimizer's state: call it "
                "otherwise, and load a state by `load_state_dict`."
            )
            raise ValueError(msg)
        elif close := get_close_matches(key, options | own.keys(), n=1, cutoff=0.85):
            msg = f"`params` has a group with the unknown option {key!r}; is it `{close[0]}`?"
            raise ValueError(msg)


def _as_held(config: mo.MetaOptimize, key: str, value: Any) -> Any:
    """Return an argument as the configuration holds it: rules act there in their roles."""
    if key not in ("base", "meta"):
        return value
    try:
        return getattr(replace(config, **{key: value}), key)
    except (TypeError, ValueError):
        return value


def _could_be(config: mo.MetaOptimize, key: str, value: Any, own: Any) -> bool:
    """Return whether an argument of the constructor could have this value in place of its own."""
    if not hasattr(config, key):
        return type(value) is type(own)
    try:
        replace(config, **{key: value})
    except (TypeError, ValueError):
        return False
    return True


def warn_of_unused_decay(base: Any, weight_decay: float | None, groups: Sequence[Group]) -> None:
    """Warn where the weight decay of a rule, or of all, is that of no parameter.

    Groups say another then; transformers' Trainer makes such groups by itself.
    """
    members = named(groups)
    rules = rules_by_leaf(base, per_leaf((name, param) for name, param, _ in members))
    meant: dict[str, bool] = {}  # as it is shown, for what is learned need not be hashable
    for name, _, group in members:
        own = rules[name].weight_decay
        expected = own if weight_decay is None else weight_decay
        if expected != 0.0:
            used = group["weight_decay"] in (None, expected)
            meant[str(expected)] = meant.get(str(expected), False) or used
    for decay, used in meant.items():
        if not used:
            of = "`base`" if weight_decay is None else "the optimizer"
            said = ", ".join(dict.fromkeys(repr(group["weight_decay"]) for group in groups))
            warn(
                f"The weight decay {decay} of {of} is that of no parameter: all groups say their "
                f"own, {said}, and what a group says is what counts. Say it in the groups; with "
                "the Trainer of transformers, in `TrainingArguments(weight_decay=...)`."
            )


def warn_of_small_lr(groups: Sequence[Group], whose: str) -> None:
    """Warn where the multipliers of all groups look like step sizes."""
    each = (group["lr"] for group in groups)
    advice = taken_for_step_size(
        (float(lr) if type(lr) is Tensor and lr.device.type == "cpu" else lr for lr in each), whose
    )
    if advice is not None:
        warn(advice)


def check_fixed(group: Group, config: mo.MetaOptimize) -> None:
    """Raise where a group says otherwise what is the whole optimizer's.

    ZeroRedundancyOptimizer writes all arguments of the constructor into the groups.
    """
    for name in FIXED:
        if name in group and not same(group[name], getattr(config, name)):
            msg = (
                f"`{name}` is the whole optimizer's and is not read from a group; got "
                f"{group[name]!r}. To go on with another, make a new optimizer with it and load "
                "this one's `state_dict`."
            )
            raise ValueError(msg)


def check_numbers(group: Group) -> None:
    """Raise unless `lr` and `weight_decay`, which schedules change, are what they may be."""
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        msg = f"`lr` must be a number or a tensor of one; got shape {tuple(lr.shape)}."
        raise ValueError(msg)
    if type(lr) is Tensor and lr.device.type == "cpu":
        multiplier("lr", float(lr))  # what lies on a device would have to be waited for
    elif not isinstance(lr, Tensor):
        multiplier("lr", lr)
    check_not_learned("weight_decay", decay)
    if decay is not None and not (isinstance(decay, Real) and 0.0 <= float(decay) < float("inf")):
        msg = f"`weight_decay` must be a finite number, not negative; got {decay!r}."
        raise ValueError(msg)


def multiplier_of(group: Group) -> Any:
    """Return what step sizes are multiplied by: a float, or a tensor of shape ()."""
    lr = group["lr"]
    return multiplier("lr", lr.reshape(()) if isinstance(lr, Tensor) else lr)


def check_rounding(rounding: str, groups: Sequence[Group]) -> None:
    """Raise where parameters cannot be rounded in this way."""
    for name, param, _ in named(groups):
        if rounding == "kahan" and param.dtype.itemsize == 1:
            msg = f'`rounding="kahan"` is for 16 bits and more; {name!r} is {param.dtype}.'
            raise ValueError(msg)
        if rounding == "stochastic" and (param.dtype.itemsize == 1 or param.dtype == torch.float16):
            other = ': use "kahan"' if param.dtype == torch.float16 else ""
            msg = f'`rounding="stochastic"` is for bfloat16; {name!r} is {param.dtype}{other}.'
            raise ValueError(msg)


def _started(groups: Sequence[Group]) -> bool:
    """Return whether groups come from a run, in which parameters may have left their names."""
    return any(MADE_WITH in group for group in groups)


def _narrowed(config: mo.MetaOptimize, members: Sequence[Member]) -> mo.MetaOptimize:
    """Return the configuration without the patterns whose parameters have left."""
    base: Any = config.base
    if isinstance(base, Mapping):
        won = _used({pattern: (pattern,) for pattern in base}, [name for name, _, _ in members])
        base = {pattern: base[pattern] for pattern in won} or base
    blocks: Any = config.blocks
    partition = mo.blocks.partition(blocks)
    if isinstance(partition, Named):
        free = [name for name, _, group in members if group["block"] is None]
        blocks = _used(dict(partition.groups), free) or blocks
    return replace(config, base=base, blocks=blocks)


def _used(patterns: Mapping[str, tuple[str, ...]], names: Sequence[str]) -> dict[str, Any]:
    """Return of some patterns under each key those that are the first match of a name."""
    flat = [(key, pattern) for key, some in patterns.items() for pattern in some]
    won = {first_match(name, [pattern for _, pattern in flat]) for name in names}
    found: dict[str, Any] = {}
    for index, (key, pattern) in enumerate(flat):
        if index in won:
            found[key] = (*found.get(key, ()), pattern)
    return found


class Configured(NamedTuple):
    """What groups make of the configuration given to the optimizer."""

    config: mo.MetaOptimize
    #: By leaf, without the hyperparameters of groups, which passes take as arguments.
    rules: dict[str, Rule]
    #: Step sizes that blocks start with, which bounds of a later time may have clipped in `config`.
    starts: dict[str, Any]


def configured(config: mo.MetaOptimize, groups: Sequence[Group]) -> Configured:
    """Return what groups make of the configuration given to the optimizer.

    ValueError is raised where groups that share a block disagree on its step size or bounds.
    """
    members, started = named(groups), _started(groups)
    if not members:
        msg = (
            f"`params` must hold a parameter; got {len(groups)} empty groups. Step sizes are "
            "made for parameters, on their device: begin with one, and add others by "
            "`add_param_group`."
        )
        raise ValueError(msg)
    given: Any = config.base
    # what is learned is called as there, whatever groups make of the rules
    config = replace(config, base=config.base_with_names)
    if started:
        config = _narrowed(config, members)
    params = {name: param for name, param, _ in members}
    rules = rules_by_leaf(config.base, per_leaf(params.items()))
    made: dict[Any, Rule] = {}
    own_rules = {name: adjusted(rules[name], group, made) for name, _, group in members}
    base: Any = config.base
    if any(own_rules[name] is not rules[name] for name in own_rules):
        base = {glob.escape(name): rule for name, rule in own_rules.items()}
    elif not isinstance(base, Mapping) or list(base) == list(given):
        base = given
    blocks: Any = config.blocks
    by_group = tuple(
        (name, group["block"]) for name, _, group in members if group["block"] is not None
    )
    if len(by_group) == len(members):  # by names alone, which files of the core can hold
        blocks = {}
        for name, block in by_group:
            blocks.setdefault(block, []).append(glob.escape(name))
    elif by_group:
        blocks = ByGroup(by_group, mo.blocks.partition(config.blocks))
    plain = replace(config, base=base, blocks=blocks, bounds=None)
    family_of = plain.plan(params).blocks.family_of
    for option in ("step_size", "bounds") if not started else ():
        _check_keys(option, getattr(config, option), family_of)
    starts = _by_block("step_size", config, members, family_of)
    bounds = _by_block("bounds", config, members, family_of)
    check_bounds(_shared(bounds), config.sigma_map.range)
    sizes = starts
    if started:  # bounds may be newer, and hold for blocks that are still to come too
        sizes = {key: _within(size, bounds[key]) for key, size in starts.items()}
    full = replace(plain, step_size=_shared(sizes), bounds=_shared(bounds))
    return Configured(full, dict(rules), starts)


def _check_keys(option: str, values: Any, family_of: Mapping[str, str]) -> None:
    """Raise ValueError where values by block name a block that is none."""
    for key in values if isinstance(values, Mapping) else ():
        if key not in family_of.values():
            known = ", ".join(dict.fromkeys(family_of.values()))
            msg = f"`{option}` has unknown block {key!r}; expected any of: {known}."
            raise ValueError(msg)


def _by_block(
    option: str,
    config: mo.MetaOptimize,
    members: Sequence[Member],
    family_of: Mapping[str, str],
) -> dict[str, Any]:
    """Return an option of groups by block; where they say None, that of the configuration."""
    default = getattr(config, option)
    found: dict[str, Any] = {}
    for name, _, group in members:
        key, value = family_of[name], group[option]
        if value is None:
            value = default.get(key) if isinstance(default, Mapping) else default
        if key in found and not same(found[key], value):
            msg = (
                f"`{option}` of block {key!r} is {found[key]!r} in one group and {value!r} in "
                "another; groups that share a block must agree."
            )
            raise ValueError(msg)
        found[key] = value
    return found


def _shared(found: Mapping[str, Any]) -> Any:
    """Return the one value of all blocks, or the values by block."""
    values = list(found.values())
    return values[0] if all(same(value, values[0]) for value in values) else found


def _within(size: Any, pair: Any) -> Any:
    """Return a step size, or the nearest within bounds."""
    if pair is None or not all(isinstance(end, Real) for end in pair):
        return size
    return min(max(size, pair[0]), pair[1]) if isinstance(size, Real) else np.clip(size, *pair)


def same(one: Any, other: Any) -> bool:
    """Return whether two values of an option are equal; they may be arrays."""
    if one is other:
        return True
    return np.shape(one) == np.shape(other) and bool(np.all(np.asarray(one == other)))
