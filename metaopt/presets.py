"""Methods of the literature, one expression each; docs/mathematics.md sections 12 and 14."""

from typing import Any

from metaopt.configuration import RuleLike
from metaopt.curvature import Diagonal
from metaopt.metaoptimize import MetaOptimize
from metaopt.rules import SGD, AdamW, Lion, RMSprop, Rule

__all__ = ["algorithm2", "hypergradient", "idbd", "idbd_nonlinear", "paper"]

_BASES: dict[str, Rule] = {
    "adamw": AdamW(betas=(0.9, 0.999), weight_decay=0.1),
    "lion": Lion(betas=(0.9, 0.99), weight_decay=0.1),
    "rmsprop": RMSprop(beta2=0.999, weight_decay=0.1),
    "sgdm": SGD(momentum=0.9, weight_decay=0.1),
}
_METAS: dict[str, Rule] = {"adam": AdamW(betas=(0.9, 0.999)), "lion": Lion(betas=(0.9, 0.99))}
_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "cifar10": (("adamw", "adam"), ("lion", "lion"), ("rmsprop", "adam"), ("sgdm", "adam")),
    "continual-cifar100": (("adamw", "adam"),),
    "imagenet": (("adamw", "lion"), ("lion", "lion"), ("sgdm", "lion")),
    "tinystories": (("adamw", "lion"), ("adamw", "adam"), ("lion", "lion")),
}


def idbd(step_size: float, meta_lr: float) -> MetaOptimize:
    """Return IDBD, Sutton (1992), for a linear predictor and half the squared error.

    Per-weight step sizes. `step` needs `hessian_diagonal`, the squared inputs.

    Parameters
    ----------
    step_size : float
        Initial step size of every weight.
    meta_lr : float
        Meta step size, theta in the literature.
    """
    return MetaOptimize(
        base=SGD(),
        meta=SGD(),
        step_size=step_size,
        meta_lr=meta_lr,
        discount=1.0,
        blocks="weight",
        curvature=Diagonal(rectified=True),
        meta_first=True,
    )


def idbd_nonlinear(step_size: float, meta_lr: float) -> MetaOptimize:
    """Return IDBD for nonlinear losses, Xu, van Hasselt and Silver (2018), appendix.

    The exact Hessian in place of its diagonal and no rectifier: `step` needs `hvp`, and the traces
    take the square of the number of weights, so it is for small problems.

    Parameters
    ----------
    step_size, meta_lr : float
        As in `idbd`.
    """
    return MetaOptimize(
        base=SGD(),
        meta=SGD(),
        step_size=step_size,
        meta_lr=meta_lr,
        discount=1.0,
        blocks="weight",
        curvature="exact",
        meta_first=True,
    )


def hypergradient(
    base: RuleLike,
    multiplicative: bool = False,
    *,
    step_size: float = 1e-3,
    meta_lr: float = 1e-6,
    blocks: Any = "scalar",
) -> MetaOptimize:
    """Return hypergradient descent, Baydin et al. (2017), on any base update.

    Parameters
    ----------
    base : Rule, or name of one
    multiplicative : bool, default False
        Change the logarithm of the step size rather than the step size.
    step_size, meta_lr : float, default 1e-3 and 1e-6
    blocks : default "scalar"
        As in `MetaOptimize`.
    """
    return MetaOptimize(
        base=base,
        meta=SGD(),
        step_size=step_size,
        meta_lr=meta_lr,
        discount=0.0,
        blocks=blocks,
        sigma="exp" if multiplicative else "identity",
        meta_first=True,
    )


def algorithm2(
    *,
    approximation: str = "2x2",
    step_size: float = 1e-4,
    meta_lr: float = 1e-3,
    discount: float = 1.0,
) -> MetaOptimize:
    """Return Algorithm 2 of the MetaOptimize paper: SGD on SGD, one step size, exact Hessian.

    Parameters
    ----------
    approximation : {"2x2", "l"}, default "2x2"
    step_size, meta_lr, discount : float
        As in `MetaOptimize`.
    """
    return MetaOptimize(
        base=SGD(),
        meta=SGD(),
        step_size=step_size,
        meta_lr=meta_lr,
        discount=discount,
        approximation=approximation,
        curvature="exact",
    )


def paper(base: str, meta: str, experiment: str, *, blocks: Any = "scalar") -> MetaOptimize:
    """Return a configuration of the MetaOptimize paper's experiments; section 14.

    Parameters
    ----------
    base : {"adamw", "lion", "rmsprop", "sgdm"}
    meta : {"adam", "lion"}
    experiment : {"cifar10", "continual-cifar100", "imagenet", "tinystories"}
    blocks : default "scalar"
        As in `MetaOptimize`; the paper's six blocks of ResNet-18 depend on the names of the leaves.

    Raises
    ------
    ValueError
        If the experiment is unknown or the paper does not report the pair for it.
    """
    if experiment not in _PAIRS:
        msg = f"`experiment` must be one of {', '.join(map(repr, _PAIRS))}; got {experiment!r}."
        raise ValueError(msg)
    if (base, meta) not in _PAIRS[experiment]:
        pairs = ", ".join(f"({b!r}, {m!r})" for b, m in _PAIRS[experiment])
        msg = (
            f"`base` and `meta` of {experiment!r} must be one of {pairs}; got ({base!r}, {meta!r})."
        )
        raise ValueError(msg)
    continual = experiment == "continual-cifar100"
    return MetaOptimize(
        base=_BASES[base],
        meta=_METAS[meta],
        step_size=1e-4 if continual else 1e-6,
        meta_lr=1e-3,
        discount=0.999 if continual else 1.0,
        blocks=blocks,
    )
