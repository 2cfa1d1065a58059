"""The optimizers that are wrapped: their groups, step sizes and state, seen from outside."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from metaopt_torch.base import BaseOptimizer
from metaopt_torch.build import Built
from metaopt_torch.groups import multiplier_of, named
from metaopt_torch.leaf import Group, Leaf

__all__ = [
    "Piece",
    "check_all_held",
    "check_options_kept",
    "check_schedulers",
    "check_wrapped",
    "divided",
    "mark_wrapped",
    "merged",
    "outer_group",
    "read_options",
    "separate_lrs",
    "split",
]

#: Optimizers of torch's whose steps are not proportional to their lr, and why; docs/wrap.md has
#: measurements.
NOT_LINEAR = {
    "ASGD": "its lr is in the decay of its own step size",
    "LBFGS": "its first step, its line search and its memory of steps depend on its lr",
    "Rprop": "its lr is only where its own step sizes start",
}
#: The same of pytorch_optimizer's.
NOT_LINEAR_OTHERS = {
    "AccSGD": "it weighs averages of its points by its lr",
    "AdaFactor": "it scales its steps by more than its lr",
    "AdaGO": "its steps have a least size, whatever its lr",
    "AdaMod": "it bounds its step sizes by averages of past ones",
    "Amos": "its lr is in the decay of its own step size",
    "ApolloDQN": "its lr rises in a warm-up of its own",
    "FTRL": "its lr is in its sums of gradients",
    "Fromage": "it divides the weights by a function of its lr",
    "Gravity": "its momentum is of steps and not of directions",
    "LaProp": "its momentum is of steps and not of directions",
    "MADGRAD": "it sums gradients weighted by its lr",
    "Nero": "it projects the weights after its steps",
    "SRMM": "it averages its points",
    "SWATS": "it sets its lr itself",
}
#: The same of optimizers with many versions, by what their class names contain in lower case.
NOT_LINEAR_NAMES = {
    "dadapt": "it has a step size of its own that it learns",
    "prodigy": "it has a step size of its own that it learns",
    "schedulefree": "it weighs averages of its points by its lr",
}
#: Classes, and those derived from them, whose weight decay is decoupled wherever there is any:
#: those of torch, and of pytorch_optimizer where groups do not say it.
DECOUPLED = (
    *("Adafactor", "AdamW", "Lion", "Muon"),
    *("Conda", "DASH", "Fira", "FlashAdamW", "GaLore", "SOAP", "SPAM"),
)
#: Options by which others say whether it is.
DECOUPLED_FLAGS = ("decoupled_weight_decay", "weight_decouple", "decouple_wd")
#: Those that were wrapped once: from outside they look like any other.
_WRAPPED: WeakSet[torch.optim.Optimizer] = WeakSet()
#: What the key of an array of a wrapped optimizer begins with in our state.
PREFIX = "inner."
#: Key of the options of a wrapped group, in a state dict, for the class of its optimizer.
CLASS = "class"


class Piece(NamedTuple):
    """A group of a wrapped optimizer, of which all parameters have one step size, or several."""

    group: Group
    leaves: tuple[Leaf, ...]
    block: int  # or -1, where parameters have several each

    @property
    def outer(self) -> Group:
        """The group of ours, in which all are."""
        return self.leaves[0].group

    @property
    def lr(self) -> Any:
        """The multiplier of our group."""
        return multiplier_of(self.outer)


def check_wrapped(optimizer: Any) -> None:
    """Raise unless this is an optimizer of which a step size can be learned."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        msg = f"`optimizer` must be a torch.optim.Optimizer, or several; got {optimizer!r}."
        raise TypeError(msg)
    name = type(optimizer).__name__
    if isinstance(optimizer, BaseOptimizer) or optimizer in _WRAPPED:
        what = "learns its step sizes" if isinstance(optimizer, BaseOptimizer) else "is wrapped"
        msg = (
            f"`optimizer` must be one whose lr is yours to give; this {name} {what} already. "
            "Make a new one to wrap."
        )
        raise ValueError(msg)
    check_schedulers(optimizer)
    for kind in type(optimizer).__mro__:
        lower, torchs = kind.__name__.lower(), kind.__module__.startswith("torch.optim")
        reasons = NOT_LINEAR if torchs else NOT_LINEAR_OTHERS
        why = [reasons[kind.__name__]] if kind.__name__ in reasons else []
        why += [reason for part, reason in NOT_LINEAR_NAMES.items() if part in lower]
        if why:
            msg = (
                "`optimizer` must make steps that are proportional to its lr; those of "
                f"{name} are not, for {why[0]}."
            )
            raise ValueError(msg)


def check_schedulers(optimizer: torch.optim.Optimizer) -> None:
    """Raise where a scheduler drives the lr of a wrapped optimizer, which is not its to drive."""
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):  # as torch's warning of their order has it
        msg = (
            f"`optimizer` must have no learning rate scheduler of its own; this "
            f"{type(optimizer).__name__} has one, whose lr would be overwritten. Make it of what "
            "`wrap` returns, whose lr multiplies the step sizes."
        )
        raise ValueError(msg)


def mark_wrapped(optimizers: Collection[Any]) -> None:
    """Have `check_wrapped` refuse these from now on: their lr is no multiplier any more."""
    _WRAPPED.update(optimizers)


def read_options(optimizer: Any, group: Group) -> dict[str, Any]:
    """Return decoupled weight decay and sign of a wrapped optimizer's group, as ours have them."""
    decay, flags = group.get("weight_decay"), [f for f in DECOUPLED_FLAGS if f in group]
    if flags:
        decoupled = any(group[flag] for flag in flags)
    elif type(optimizer) is torch.optim.SGD:
        decoupled = group["momentum"] == 0.0  # a decay in the gradient is one of the weights then
    else:
        decoupled = any(kind.__name__ in DECOUPLED for kind in type(optimizer).__mro__)
    return {
        "weight_decay": float(decay) if decoupled and decay is not None else 0.0,
        # pytorch_optimizer's have one for all groups
        "maximize": bool(group.get("maximize", getattr(optimizer, "maximize", None) is True)),
    }


def check_options_kept(group: Group, read: Mapping[str, Any]) -> None:
    """Raise where a group of ours says other than what was read from the wrapped one's."""
    for name, value in read.items():
        if group[name] != value:
            msg = (
                f"`{name}` in the groups of a wrapper is what the wrapped optimizer's groups say, "
                f"{value!r}, and cannot be edited there; got {group[name]!r}. Write to the groups "
                "of `inner`."
            )
            raise ValueError(msg)


def outer_group(optimizer: Any, group: Group, block: str | None) -> Group:
    """Return the group of ours that goes with a wrapped optimizer's.

    What that group says of `block`, `step_size` and `bounds` is for us.
    """
    lr, params, names = group.get("lr"), group["params"], group.get("param_names")
    if not isinstance(lr, float | int | Tensor) or isinstance(lr, bool):
        msg = (
            f"`lr` of {type(optimizer).__name__} must be a number, which the learned step size "
            f"multiplies; got {lr!r}."
        )
        raise ValueError(msg)
    own: Group = {key: group[key] for key in ("block", "step_size", "bounds") if key in group}
    return {
        "params": list(params) if names is None else list(zip(names, params, strict=True)),
        "lr": float(lr),
        "block": block,
        **own,
        **read_options(optimizer, group),
    }


def split(optimizer: Any, built: Built) -> list[Piece]:
    """Return an optimizer's groups by their step sizes, in pieces where they have several.

    Raises
    ------
    ValueError
        If it has other parameters than our groups.
    """
    leaf_of = {id(leaf.param): leaf for leaf in built.leaves.values()}
    groups: list[Group] = []
    pieces = []
    for group in optimizer.param_groups:
        places: dict[Any, list[int]] = {}
        for index, param in enumerate(group["params"]):
            if id(param) not in leaf_of:
                msg = (
                    f"`param_groups` lacks a parameter of shape {tuple(param.shape)} that the "
                    f"wrapped {type(optimizer).__name__} has. Add parameters by `add_param_group` "
                    "of the wrapper; where they are replaced, make and wrap a new optimizer."
                )
                raise ValueError(msg)
            leaf = leaf_of[id(param)]
            block = int(leaf.blocks) if leaf.blocks.ndim == 0 else -1
            places.setdefault((id(leaf.group), block), []).append(index)
        parts = [group] if len(places) < 2 else [_part(group, some) for some in places.values()]
        groups += parts
        for part, (_, block) in zip(parts, places, strict=bool(places)):
            leaves = tuple(leaf_of[id(param)] for param in part["params"])
            pieces.append(Piece(part, leaves, block))
    optimizer.param_groups[:] = groups
    return pieces


def check_all_held(built: Built, pieces: Collection[Piece]) -> None:
    """Raise ValueError where our groups have a parameter that no wrapped optimizer has."""
    held = {leaf.name for piece in pieces for leaf in piece.leaves}
    for name in built.leaves:
        if name not in held:
            msg = (
                f"`param_groups` has {name!r}, which no wrapped optimizer has any more, so nothing "
                "would step it. Put it back into a group of `inner`, or take it out of both."
            )
            raise ValueError(msg)


def separate_lrs(optimizers: Collection[Any]) -> None:
    """Give each group whose `lr` is a tensor one of its own.

    torch gives all groups that of `defaults`, where it has to stay the multiplier that was given:
    groups that are added later begin with it.
    """
    taken = {id(optimizer.defaults.get("lr")) for optimizer in optimizers}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                if id(group["lr"]) in taken:
                    group["lr"] = group["lr"].detach().clone()
                taken.add(id(group["lr"]))


def _part(group: Group, places: Sequence[int]) -> Group:
    """Return some of a group's parameters as a group with equal options."""
    part = {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()
    }
    for key in ("params", "param_names"):
        if key in group:
            part[key] = [group[key][place] for place in places]
    return part


def _entries(optimizer: Any) -> Iterator[tuple[int, Tensor]]:
    """Yield an optimizer's parameters by the numbers that `state_dict` gives them."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    number: dict[int, int] = {}
    for param in params:
        number.setdefault(id(param), len(number))
        yield number[id(param)], param


def merged(
    given: Mapping[str, Any], optimizers: Collection[Any], groups: Sequence[Group]
) -> dict[str, Any]:
    """Return our state dict with what the wrapped optimizers have of the same parameters.

    Their arrays lie with the parameter, under keys that begin with "inner.", the options of their
    groups under "inner" of the group: so what keeps a state dict by parameters and groups, as
    torch.distributed.checkpoint does, keeps them too.
    """
    number = {id(param): n for n, (_, param, _) in enumerate(named(groups))}
    owner = {id(param): index for index, group in enumerate(groups) for param in group["params"]}
    state = {n: dict(entry) for n, entry in given["state"].items()}
    new_groups = [{**group, "inner": []} for group in given["param_groups"]]
    more = []
    for optimizer in optimizers:
        own = optimizer.state_dict()
        for n, param in _entries(optimizer):
            for key, value in own["state"].get(n, {}).items():
                state.setdefault(number[id(param)], {})[PREFIX + key] = value
        for group, kept in zip(optimizer.param_groups, own["param_groups"], strict=True):
            if group["params"]:
                options = {k: v for k, v in kept.items() if k not in ("params", "param_names")}
                options[CLASS] = type(optimizer).__name__
                new_groups[owner[id(group["params"][0])]]["inner"].append(options)
        more.append({k: v for k, v in own.items() if k not in ("state", "param_groups")})
    found = {**given, "state": state, "param_groups": new_groups}
    return found | ({"inner": more} if any(more) else {})


def divided(
    given: Mapping[str, Any], optimizers: Collection[Any], groups: Sequence[Group]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return our part of a state dict that `merged` made, and those of the wrapped optimizers.

    Raises
    ------
    ValueError
        If it is another optimizer's, or the groups of the wrapped ones were others.
    """
    if [len(g["params"]) for g in given["param_groups"]] != [len(g["params"]) for g in groups]:
        return dict(given), []  # torch says so
    numbers = [n for group in given["param_groups"] for n in group["params"]]
    number = {id(param): n for n, (_, param, _) in zip(numbers, named(groups), strict=True)}
    owner = {id(param): index for index, group in enumerate(groups) for param in group["params"]}
    kept = [list(group.get("inner", ())) for group in given["param_groups"]]
    parts = []
    more = given.get("inner") or [{} for _ in optimizers]
    for optimizer, rest in zip(optimizers, more, strict=True):
        state, inner_groups = {}, []
        for n, param in _entries(optimizer):
            entry = given["state"].get(number[id(param)], {})
            own = {
                # what torch loads it does not copy
                key.removeprefix(PREFIX): copy.deepcopy(value)
                for key, value in entry.items()
                if key.startswith(PREFIX)
            }
            if own:
                state[n] = own
        first = 0
        for group in optimizer.param_groups:
            options: Mapping[str, Any] = {}
            if group["params"]:
                index = owner[id(group["params"][0])]
                if not kept[index]:
                    msg = (
                        "`state_dict` does not fit this optimizer: it has no state of a wrapped "
                        f"{type(optimizer).__name__} for group {index}."
                    )
                    raise ValueError(msg)
                options = dict(kept[index].pop(0))
                name = options.pop(CLASS, type(optimizer).__name__)
                if name != type(optimizer).__name__:
                    msg = (
                        f"`state_dict` does not fit this optimizer: of group {index} it has the "
                        f"state of a wrapped {name}; expected {type(optimizer).__name__}."
                    )
                    raise ValueError(msg)
            names = {"param_names": group["param_names"]} if "param_names" in group else {}
            places = list(range(first, first + len(group["params"])))
            first += len(places)
            inner_groups.append({**options, **names, "params": places})
        parts.append({**rest, "state": state, "param_groups": inner_groups})
    state = {
        n: {key: value for key, value in entry.items() if not key.startswith(PREFIX)}
        for n, entry in given["state"].items()
    }
    bare = [{k: v for k, v in group.items() if k != "inner"} for group in given["param_groups"]]
    own_part = {key: value for key, value in given.items() if key != "inner"}
    return {**own_part, "state": state, "param_groups": bare}, parts
