"""Steps of an optimizer that learns no more: at the values learned, without a trace."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.jets import Jet
from metaopt.leaf import taken, with_lr
from metaopt.plan import Plan
from metaopt.rules import Averaged
from metaopt.rules.learned import bound
from metaopt.step import sizes_of, values_of_leaf
from metaopt_torch.build import Built
from metaopt_torch.core_step import reduction
from metaopt_torch.groups import multiplier_of
from metaopt_torch.leaf import Leaf
from metaopt_torch.passes import Kind, stepped
from metaopt_torch.shards import local
from metaopt_torch.state_keys import learned_key

__all__ = ["all_finite", "check_averages_kept", "frozen_step"]


def frozen_step(
    built: Built,
    grads: Mapping[str, Tensor],
    rounding: str,
    unit_steps: Mapping[str, Tensor] | None = None,
) -> None:
    """Move the leaves that have a gradient, in place, each by itself.

    For what passes over buckets do not take: several values of what is learned in one parameter.
    `unit_steps` are those of wrapped optimizers, as `MetaOptimize.step` takes them.
    """
    config, leaves = built.config, built.leaves
    plan = config.plan({name: local(leaf.param).detach() for name, leaf in leaves.items()})
    accepted = all_finite(built, grads) if config.skip_nonfinite else None
    sizes = sizes_of(config.sigma_map, _beta(built, plan, "beta")).value
    numbers = {
        name: config.learned[name].values_of(_beta(built, number, learned_key(name, "beta")))
        for name, number in plan.learned.items()
    }
    for name, grad in grads.items():
        leaf = leaves[name]
        lr = multiplier_of(leaf.group)
        lr = lr.to(leaf.device, leaf.dtype) if isinstance(lr, Tensor) else lr
        size = values_of_leaf(plan, sizes, name).to(leaf.device)
        found = {
            number.place: values_of_leaf(number, numbers[key], name).to(leaf.device)
            for key, number in plan.learned.items()
            if name in number.placed
        }
        arrays = {"param": local(leaf.param).detach(), "grad": local(grad)}
        arrays |= {key: local(leaf.state[key]) for key in leaf.buffered}
        arrays |= {
            "count": leaf.state["step"],
            "alpha": taken(Jet(size, size), lr, leaf.dtype).value,
        }
        if accepted is not None:
            arrays["accepted"] = accepted.to(leaf.device)
        if unit_steps is not None:
            arrays["unit_step"] = unit_steps[name].to(leaf.dtype)
        stepped(_kind(leaf, rounding))(with_lr(bound(plan.rules[name], found), lr), arrays)
    built.count(list(grads), accepted)


def all_finite(built: Built, grads: Mapping[str, Tensor]) -> Tensor:
    """Return whether all gradients are finite, on all devices; shape (), bool."""
    device = built.block_state["step"].device
    lost = torch.zeros((), device=device)
    for grad in grads.values():
        lost = lost + (~torch.isfinite(local(grad))).any().to(lost)
    reduce = reduction(built.leaves)
    if reduce is not None:
        (lost,) = reduce([lost])
    return lost == 0.0


def check_averages_kept(built: Built) -> None:
    """Raise ValueError where averages of the weights have ended with learning."""
    if built.frozen and not all(isinstance(rule, Averaged) for rule in built.plan.rules.values()):
        msg = (
            "averaged weights come with the traces, which `freeze` has freed. Take them before, by "
            "`averaged_params(copy=True)`, or give `Averaged(...)` as `base`, whose average is its "
            f"own and goes on; got {built.config.base!r}."
        )
        raise ValueError(msg)


def _kind(leaf: Leaf, rounding: str) -> Kind:
    rounding = rounding if leaf.param.dtype != leaf.dtype else "nearest"
    return Kind(bool(leaf.group["maximize"]), rounding, None)


def _beta(built: Built, plan: Plan, key: str) -> Any:
    """Return beta, or that of a learned number: values per block, at weight level by leaf."""
    if not plan.blocks.partition.per_leaf:
        return built.block_state[key]
    leaves = built.leaves.items()
    return {name: local(leaf.state[key]) for name, leaf in leaves if key in leaf.state}
