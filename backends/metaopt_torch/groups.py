"""From parameter groups to the core's configuration: names, rules, blocks, step sizes, bounds."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

import metaopt as mo
from metaopt.arrays import per_leaf
from metaopt.blocks import Blocks, Partition
from metaopt.inputs import multiplier
from metaopt.plan import rules_by_leaf
from metaopt.rules import Rule

__all__ = [
    "MADE_WITH",
    "ByGroup",
    "check_groups",
    "check_numbers",
    "check_rounding",
    "configured",
    "multiplier_of",
    "named",
]

Group = dict[str, Any]

#: Key of a group for the rules and the map that its state belongs to.
MADE_WITH = "made_with"


@dataclass(frozen=True)
class ByGroup(Partition):
    """Leaves of groups with a block name in the block of that name, the others as `rest` says.

    Parameters
    ----------
    named : tuple of (leaf name, block name)
    rest : Partition
    """

    named: tuple[tuple[str, str], ...]
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


def named(groups: Sequence[Group]) -> list[tuple[str, Tensor, Group]]:
    """Return all parameters with their names and groups; without a name they are numbered."""
    found: list[tuple[str, Tensor, Group]] = []
    for group in groups:
        names = group.get("param_names")
        for index, param in enumerate(group["params"]):
            found.append((str(len(found)) if names is None else names[index], param, group))
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
        if _expanded(param):
            msg = f"`params[{name!r}]` is expanded, one number for many; copy it by `.clone()`."
            raise ValueError(msg)
        if param.is_neg():
            msg = f"`params[{name!r}]` is negated by a bit alone; copy it by `.resolve_neg()`."
            raise ValueError(msg)
        if param.layout != torch.strided or not param.is_floating_point():
            got = param.dtype if param.layout == torch.strided else param.layout
            msg = f"`params[{name!r}]` must be dense, real and floating; got {got}."
            raise TypeError(msg)
    for group in groups:
        check_numbers(group)
        block, lr = group["block"], group["lr"]
        if type(lr) is Tensor and lr.device.type == "cpu" and not bool(torch.all(lr >= 0.0)):
            msg = f"`lr` must not be negative; got {lr}."
            raise ValueError(msg)
        if not isinstance(group["maximize"], bool):
            msg = f"`maximize` must be True or False; got {group['maximize']!r}."
            raise TypeError(msg)
        if block is not None and not isinstance(block, str):
            msg = f"`block` must be the name of a block, or None; got {block!r}."
            raise TypeError(msg)


def _expanded(param: Tensor) -> bool:
    """Say whether one number in memory stands for many."""
    if param.layout != torch.strided:
        return False
    return any(n > 1 and step == 0 for n, step in zip(param.shape, param.stride(), strict=True))


def check_numbers(group: Group) -> None:
    """Raise unless `lr` and `weight_decay`, which schedules change, are what they may be."""
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            msg = f"`lr` must be a number or a tensor of one; got shape {tuple(lr.shape)}."
            raise ValueError(msg)
    elif not isinstance(lr, Real) or not 0.0 <= float(lr) < float("inf"):
        msg = f"`lr` must be a finite number, not negative; got {lr!r}."
        raise ValueError(msg)
    if decay is not None and not (isinstance(decay, Real) and 0.0 <= float(decay) < float("inf")):
        msg = f"`weight_decay` must be a finite number, not negative; got {decay!r}."
        raise ValueError(msg)


def multiplier_of(group: Group) -> Any:
    """Return what step sizes are multiplied by: a float, or a tensor of shape ()."""
    lr = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else multiplier("lr", float(lr))


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


def decayed(rule: Rule, weight_decay: float | None, made: dict[Any, Rule]) -> Rule:
    """Return a rule with a group's weight decay; equal ones are one object, which `made` keeps."""
    if weight_decay is None or weight_decay == rule.weight_decay:
        return rule
    key = (id(rule), weight_decay)
    if key not in made:
        made[key] = replace(rule, weight_decay=weight_decay)  # type: ignore[type-var]
    return made[key]


def configured(config: mo.MetaOptimize, groups: Sequence[Group]) -> mo.MetaOptimize:
    """Return what the groups make of the configuration given to the optimizer.

    Raises
    ------
    ValueError
        If groups that share a block disagree on its step size or bounds.
    """
    leaves = named(groups)
    if not leaves:
        msg = (
            f"`params` must hold a parameter; got {len(groups)} empty groups. Step sizes are "
            "made for parameters, on their device: begin with one, and add others by "
            "`add_param_group`."
        )
        raise ValueError(msg)
    made: dict[Any, Rule] = {}
    of_base = rules_by_leaf(config.base, per_leaf((name, param) for name, param, _ in leaves))
    of_leaf = {
        name: decayed(of_base[name], group["weight_decay"], made) for name, _, group in leaves
    }
    base: Any = config.base
    if any(of_leaf[name] is not of_base[name] for name in of_leaf):
        base = {glob.escape(name): rule for name, rule in of_leaf.items()}
    blocks: Any = config.blocks
    by_group = tuple(
        (name, group["block"]) for name, _, group in leaves if group["block"] is not None
    )
    if len(by_group) == len(leaves):  # by names alone, which files of the core can hold
        blocks = {}
        for name, block in by_group:
            blocks.setdefault(block, []).append(glob.escape(name))
    elif by_group:
        blocks = ByGroup(by_group, mo.blocks.partition(config.blocks))
    plain = replace(config, base=base, blocks=blocks, bounds=None)
    family_of = plain.plan({name: param for name, param, _ in leaves}).blocks.family_of
    return replace(
        plain,
        step_size=_by_block("step_size", config.step_size, leaves, family_of),
        bounds=_by_block("bounds", config.bounds, leaves, family_of),
    )


def _by_block(
    option: str,
    default: Any,
    leaves: Sequence[tuple[str, Tensor, Group]],
    family_of: Mapping[str, str],
) -> Any:
    """Return an option of groups, None being the default, as one value or by block."""
    for key in default if isinstance(default, Mapping) else ():
        if key not in family_of.values():
            known = ", ".join(dict.fromkeys(family_of.values()))
            msg = f"`{option}` has unknown block {key!r}; expected any of: {known}."
            raise ValueError(msg)
    found: dict[str, Any] = {}
    for name, _, group in leaves:
        key, value = family_of[name], group[option]
        if value is None:
            value = default.get(key) if isinstance(default, Mapping) else default
        if key in found and not _same(found[key], value):
            msg = (
                f"`{option}` of block {key!r} is {found[key]!r} in one group and {value!r} in "
                "another; groups that share a block must agree."
            )
            raise ValueError(msg)
        found[key] = value
    values = list(found.values())
    return values[0] if all(_same(value, values[0]) for value in values) else found


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return np.shape(one) == np.shape(other) and bool(np.all(np.asarray(one == other)))
