"""The one table of what is shipped: rules and step-size maps.

Translation, cases, laws, parametrized tests and the check of the documentation take theirs from
here; docs/contributing.md says how to add a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import metaopt as mo
from metaopt.step_sizes import step_size_map
from metaopt_conformance import sigmas
from metaopt_conformance.updates import Update

__all__ = [
    "BASES",
    "DELAYABLE",
    "FORMS",
    "MAPS",
    "METAS",
    "RULES",
    "SCALE_FREE",
    "SIGMAS",
    "MapRow",
    "RuleRow",
    "Use",
    "counterpart",
    "has",
    "sigma_of",
    "signs",
    "update_of",
]


class Use(NamedTuple):
    """A rule as runs have it in a role, and the step size or meta learning rate that suits it.

    Its moments change within a dozen steps, and `eps` is large enough that rounding is not
    amplified where a gradient is small.
    """

    rule: Any
    rate: float


@dataclass(frozen=True, kw_only=True)
class RuleRow:
    """A shipped rule.

    Parameters
    ----------
    kind : type
    update : callable
        From the rule to the options of the oracle's `Update`, but for `eps`, `weight_decay` and
        `delayed`.
    forms : tuple of rule
        Every form of the formula, for tests of that alone; not delayed.
    bases, metas : mapping of name to Use
        What runs are made with. A rule that is no meta update has no `metas`.
    usual : mapping, optional
        The decay rates that are used, in place of those of a `Use`.
    scale_free : bool, default False
        Whether a multiple of all gradients changes nothing, with `eps=0` if there is one.
    own : mapping of "torch" or "optax" to callable
        From a rule to the name and the options of the library's own optimizer, or None where that
        is another update.
    """

    kind: type[Any]
    update: Callable[[Any], dict[str, Any]]
    forms: tuple[Any, ...]
    bases: Mapping[str, Use]
    metas: Mapping[str, Use]
    usual: Mapping[str, Any] = field(default_factory=dict)
    scale_free: bool = False
    own: Mapping[str, Callable[[Any], tuple[str, dict[str, Any]] | None]] = field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True)
class MapRow:
    """A shipped step-size map.

    Parameters
    ----------
    name : str
    sigma : str or StepSizeMap
        The option of `metaopt.MetaOptimize` in runs.
    kind : type
    oracle : callable
        From the map to the oracle's.
    additive : bool, default False
        Whether step sizes change by differences, for which meta learning rates are smaller.
    """

    name: str
    sigma: Any
    kind: type[Any]
    oracle: Callable[[Any], sigmas.Sigma]
    additive: bool = False


def _of_adam(rule: Any) -> dict[str, Any]:
    """Return optax's options of a rule with Adam's two moments."""
    beta1, beta2 = rule.betas
    return {"b1": beta1, "b2": beta2, "eps": rule.eps, "weight_decay": rule.weight_decay}


RULES = (
    RuleRow(
        kind=mo.SGD,
        update=lambda rule: {"kind": "sgd", "rho": rule.momentum},
        forms=(mo.SGD(), mo.SGD(momentum=0.9)),
        bases={
            "SGD": Use(mo.SGD(weight_decay=0.1), 0.15),
            "SGDm": Use(mo.SGD(momentum=0.9, weight_decay=0.1), 0.2),
        },
        metas={"SGD": Use(mo.SGD(), 0.1)},
        own={
            "torch": lambda rule: (
                None
                if rule.weight_decay
                else ("SGD", {"momentum": rule.momentum, "dampening": rule.momentum})
            ),
            "optax": lambda rule: None if rule.weight_decay or rule.momentum else ("sgd", {}),
        },
    ),
    RuleRow(
        kind=mo.RMSprop,
        update=lambda rule: {
            "kind": "rmsprop",
            "decay_sq": rule.beta2,
            "bias_correction": rule.bias_correction,
        },
        forms=(
            mo.RMSprop(beta2=0.9, eps=0.01),
            mo.RMSprop(beta2=0.9, eps=0.01, bias_correction=False),
            mo.RMSprop(beta2=0.9, eps=0.0),
        ),
        bases={"RMSprop": Use(mo.RMSprop(beta2=0.8, eps=1e-2, weight_decay=0.1), 0.05)},
        metas={"RMSprop": Use(mo.RMSprop(beta2=0.8, eps=1e-2), 0.1)},
        usual={"beta2": 0.999},
        scale_free=True,
        own={
            "torch": lambda rule: (
                None
                if rule.weight_decay or rule.bias_correction
                else ("RMSprop", {"alpha": rule.beta2, "eps": rule.eps})
            ),
        },
    ),
    RuleRow(
        kind=mo.AdamW,
        update=lambda rule: {"kind": "adamw", "rho": rule.betas[0], "decay_sq": rule.betas[1]},
        forms=(
            mo.AdamW(betas=(0.7, 0.9), eps=0.01),
            mo.AdamW(betas=(0.7, 0.9), eps=0.0),
            mo.AdamW(betas=(0.0, 0.9), eps=0.01),
        ),
        bases={"AdamW": Use(mo.AdamW(betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1), 0.05)},
        metas={"Adam": Use(mo.AdamW(betas=(0.8, 0.9), eps=1e-2), 0.15)},
        usual={"betas": (0.9, 0.999)},
        scale_free=True,
        own={
            "torch": lambda rule: (
                "AdamW",
                {"betas": rule.betas, "eps": rule.eps, "weight_decay": rule.weight_decay},
            ),
            "optax": lambda rule: ("adamw", _of_adam(rule)),
        },
    ),
    RuleRow(
        kind=mo.NAdamW,
        update=lambda rule: {"kind": "nadamw", "rho": rule.betas[0], "decay_sq": rule.betas[1]},
        forms=(
            mo.NAdamW(betas=(0.7, 0.9), eps=0.01),
            mo.NAdamW(betas=(0.7, 0.9), eps=0.0),
            mo.NAdamW(betas=(0.0, 0.9), eps=0.01),
        ),
        bases={"NAdamW": Use(mo.NAdamW(betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1), 0.05)},
        metas={"NAdam": Use(mo.NAdamW(betas=(0.8, 0.9), eps=1e-2), 0.15)},
        usual={"betas": (0.9, 0.999)},
        scale_free=True,
        own={
            "optax": lambda rule: ("nadamw", _of_adam(rule)),
        },
    ),
    RuleRow(
        kind=mo.Lion,
        update=lambda rule: {
            "kind": "lion",
            "interpolation": rule.betas[0],
            "rho": rule.betas[1],
        },
        forms=(mo.Lion(),),
        bases={"Lion": Use(mo.Lion(betas=(0.8, 0.9), weight_decay=0.1), 0.05)},
        metas={"Lion": Use(mo.Lion(betas=(0.8, 0.9)), 0.05)},
        usual={"betas": (0.9, 0.99)},
        scale_free=True,
        own={
            "optax": lambda rule: (
                "lion",
                {"b1": rule.betas[0], "b2": rule.betas[1], "weight_decay": rule.weight_decay},
            ),
        },
    ),
)

MAPS = (
    MapRow(name="exp", sigma="exp", kind=mo.Exp, oracle=lambda _: sigmas.Exp()),
    MapRow(
        name="identity",
        sigma="identity",
        kind=mo.Identity,
        oracle=lambda _: sigmas.Identity(),
        additive=True,
    ),
    MapRow(name="softplus", sigma="softplus", kind=mo.Softplus, oracle=lambda _: sigmas.Softplus()),
    MapRow(
        name="sigmoid",
        sigma=mo.Sigmoid(3e-4, 0.5),
        kind=mo.Sigmoid,
        oracle=lambda sigma: sigmas.Sigmoid(sigma.lo, sigma.hi),
    ),
)


def has(rule: Any, option: str) -> bool:
    """Say whether a rule, or a kind of them, has an option, and a moment if it is `delayed`."""
    options = {found.name for found in fields(rule)}
    return option in options and (option != "delayed" or bool(rule.slots))


def signs(rule: Any) -> bool:
    """Say whether the direction of a shipped rule is a sign."""
    return update_of(rule).signs


def update_of(rule: Any) -> Update:
    """Return a rule of the library as the oracle's."""
    if isinstance(rule, mo.FastStart):
        return replace(
            update_of(rule.rule),
            factor=rule.factor,
            patience=rule.patience,
            retreat=rule.retreat or 0.0,
        )
    return Update(
        eps=getattr(rule, "eps", 0.0),  # a number, as the rule has its role
        weight_decay=rule.weight_decay,
        decay_step_size=getattr(rule, "decay_step_size", None),
        delayed=getattr(rule, "delayed", False),
        **_row_of(rule).update(rule),
    )


def counterpart(library: str, rule: Any) -> tuple[str, dict[str, Any]] | None:
    """Return name and options of the optimizer of "torch" or "optax" that is this rule, or None."""
    own, apart = _row_of(rule).own.get(library), rule.decay_step_size is not None
    return None if own is None or apart or getattr(rule, "delayed", False) else own(rule)


def sigma_of(sigma: Any) -> sigmas.Sigma:
    """Return a step-size map of the library, or its name, as the oracle's."""
    found = step_size_map(sigma)
    if isinstance(found, mo.Decay):  # of numbers that are learned alone
        return sigmas.Decay()
    return next(row for row in MAPS if row.kind is type(found)).oracle(found)


def _row_of(rule: Any) -> RuleRow:
    for row in RULES:
        if row.kind is type(rule):
            return row
    msg = f"`rule` must be one of metaopt's own; got {rule!r}."
    raise TypeError(msg)


#: What runs are made with, by name.
BASES: dict[str, Any] = {name: use.rule for row in RULES for name, use in row.bases.items()}
METAS: dict[str, Any] = {name: use.rule for row in RULES for name, use in row.metas.items()}
SIGMAS: dict[str, Any] = {row.name: row.sigma for row in MAPS}
#: The forms of formulas: with the moments from before the step too, where a rule has the option.
DELAYABLE: tuple[Any, ...] = tuple(
    rule for row in RULES for rule in row.forms if has(rule, "delayed")
)
FORMS: tuple[Any, ...] = (
    *(rule for row in RULES for rule in row.forms),
    *(replace(rule, delayed=True) for rule in DELAYABLE),
)
#: Rules that no multiple of the loss makes a difference to, by the names of their classes.
SCALE_FREE: dict[str, Any] = {
    row.kind.__name__: row.kind(eps=0.0) if has(row.kind, "eps") else row.kind()
    for row in RULES
    if row.scale_free
}
