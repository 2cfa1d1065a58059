"""From a `MetaOptimizer` to a plain optimizer of torch's, at the step sizes that it has learned."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.rules import Rule
from metaopt.rules.rule import decay_step_size, weight_decay_at
from metaopt_torch.build import Built
from metaopt_torch.groups import FROZEN, MADE_WITH, OPTIONS, multiplier_of
from metaopt_torch.hyperparameters import hyperparameters
from metaopt_torch.leaf import Group, Leaf

__all__ = ["plain"]

#: The slots of our rules, and what torch's optimizers call them.
SLOTS: Mapping[type[torch.optim.Optimizer], Mapping[str, str]] = {
    torch.optim.AdamW: {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    torch.optim.RMSprop: {"exp_avg_sq": "square_avg"},
    torch.optim.SGD: {"exp_avg": "momentum_buffer"},
}
#: Key under which schedulers remember the multiplier; new ones would begin with it.
OF_SCHEDULERS = "initial_lr"


def plain(built: Built) -> torch.optim.Optimizer:
    """Return what `MetaOptimizer.to_plain` does."""
    _check(built)
    sizes = {name: float(size) for name, size in built.step_sizes().items()}
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    sources: dict[tuple[int, str], Group] = {}
    kinds: dict[str, type[torch.optim.Optimizer]] = {}
    for name, leaf in built.leaves.items():
        block, rule = built.plan.blocks.family_of[name], built.plan.rules[name]
        kinds[name], options = _counterpart(name, rule)
        sources[id(leaf.group), block] = leaf.group
        known = groups.setdefault((id(leaf.group), block), {"params": []})
        known["params"].append((name, leaf.param))
        known |= options
        known["maximize"] = bool(leaf.group["maximize"])
        known["lr"] = float(multiplier_of(leaf.group)) * sizes[block]
        if sizes[block] == 0.0 and decay_step_size(rule) is not None:
            msg = (
                f"the step size of block {block!r} must not be 0 where weight decay has a "
                "`decay_step_size`: no weight decay of a plain optimizer does as much; got 0.0."
            )
            raise ValueError(msg)
        known["weight_decay"] = weight_decay_at(rule, sizes[block])
    if len(set(kinds.values())) > 1:
        one, other = list(dict.fromkeys(kinds.values()))[:2]
        msg = (
            "`base` must be one kind of rule for a plain optimizer, which is of one kind; got "
            f"those of {one.__name__} and {other.__name__}."
        )
        raise ValueError(msg)
    kind: Any = next(iter(kinds.values()))
    optimizer: torch.optim.Optimizer = kind(list(groups.values()), lr=0.0)
    ours = {*OPTIONS, *built.block_state.keys(), MADE_WITH, FROZEN, OF_SCHEDULERS}
    ours |= {option for rule in built.plan.rules.values() for option in hyperparameters(rule)}
    for group, source in zip(optimizer.param_groups, sources.values(), strict=True):
        for key, value in source.items():
            if key not in ours:  # the user's own
                group.setdefault(key, value)
    for leaf in built.leaves.values():
        if leaf.state and int(leaf.state["step"]):
            optimizer.state[leaf.param] = _state(leaf, SLOTS[kind])
        elif kind is torch.optim.SGD and leaf.rule.slots:
            # without one, torch's first step has the gradient whole, whatever its dampening
            optimizer.state[leaf.param] = {"momentum_buffer": torch.zeros_like(leaf.param)}
    return optimizer


def _check(built: Built) -> None:
    """Raise where a parameter has several step sizes, or a number of a rule is learned."""
    if any(built.plan.blocks.views.values()) or built.block_state.per_leaf:
        msg = (
            "`blocks` must give each parameter one step size for a plain optimizer, whose groups "
            f"have one; got {built.config.blocks!r}."
        )
        raise ValueError(msg)
    if built.plan.learned:
        msg = (
            "`base` must have numbers for a plain optimizer, and none that is learned; got "
            f"{next(iter(built.plan.learned))!r}."
        )
        raise ValueError(msg)


def _counterpart(name: str, rule: Rule) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the optimizer of torch's that a rule is at a fixed step size, and its options."""
    decays = rule.weight_decay != 0.0
    if not getattr(rule, "delayed", False):
        if type(rule) is mo.AdamW:
            return torch.optim.AdamW, {"betas": rule.betas, "eps": rule.eps}
        # torch's SGD and RMSprop add weight decay to the gradient, so it passes through the moments
        if type(rule) is mo.SGD and not (decays and rule.slots):
            return torch.optim.SGD, {"momentum": rule.momentum, "dampening": rule.momentum}
        if type(rule) is mo.RMSprop and not rule.bias_correction and not decays:
            return torch.optim.RMSprop, {"alpha": rule.beta2, "eps": rule.eps}
    msg = (
        f"`base` must be a rule that torch has an optimizer for, as metaopt.AdamW(); got {rule!r} "
        f"for {name!r}. `effective_lr` says what each group steps with."
    )
    raise ValueError(msg)


def _state(leaf: Leaf, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the state of a parameter in torch's optimizer, copied."""
    state: dict[str, Any] = {"step": torch.tensor(float(leaf.state["step"]))}
    for slot in leaf.rule.slots:
        held: Tensor = leaf.state[slot]
        state[names[slot]] = held.detach().to(leaf.param.dtype, copy=True)
    return state
