"""metaopt_torch as the suite sees an adapter: with parameters and a state of its own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from metaopt_torch import from_config, wrap

import metaopt as mo
from metaopt.arrays import per_leaf
from metaopt.plan import rules_by_leaf
from metaopt_conformance.table import counterpart
from metaopt_conformance.verdicts import Skip
from metaopt_conformance.wrapping import options_of, slots_of

__all__ = ["Optimizer", "Wrapped"]

#: Moments of torch's optimizers by the slots of the rules that they are.
MOMENTS = {"exp_avg": ("exp_avg", "momentum_buffer"), "exp_avg_sq": ("exp_avg_sq", "square_avg")}


class Optimizer:
    """An optimizer of torch's and its parameters, each in a group of its own.

    Steps are run one operation at a time; what compiles them has tests of its own.

    Parameters
    ----------
    opt : metaopt.MetaOptimize
    params : mapping of name to tensor
    """

    def __init__(self, opt: mo.MetaOptimize, params: Mapping[str, Any]) -> None:
        self.own = {name: torch.nn.Parameter(param.clone()) for name, param in params.items()}
        groups = [{"params": [(name, param)]} for name, param in self.own.items()]
        self.optimizer: Any = from_config(opt, groups, compile=False)

    def step(
        self,
        grads: Any,
        lr: Any,
        hvp: Any,
        third: Any = None,
        hessian_diagonal: Any = None,
        meta_grads: Any = None,
    ) -> None:
        """Take what `metaopt.MetaOptimize.step` takes, for the parameters and state at hand."""
        self._set(grads, lr, meta_grads)
        self.optimizer.step(hvp=hvp, third=third, hessian_diagonal=hessian_diagonal)

    def _set(self, grads: Any, lr: Any, meta_grads: Any) -> None:
        """Put gradients and multipliers where an optimizer of torch's looks for them."""
        for group, (name, param) in zip(self.optimizer.param_groups, self.own.items(), strict=True):
            param.grad = grads[name]
            group["lr"] = lr[name] if isinstance(lr, Mapping) else lr
        if meta_grads is not None:
            with self.optimizer.meta_gradients():
                for name, param in self.own.items():
                    param.grad = meta_grads[name]

    def params(self) -> dict[str, Any]:
        """Return the parameters."""
        return {name: param.detach().clone() for name, param in self.own.items()}

    def state(self) -> mo.State:
        """Return the state as the core has it."""
        return self.optimizer.core_state()


class Wrapped(Optimizer):
    """Optimizers of torch's that are wrapped, one for all parameters or for each.

    Parameters
    ----------
    opt : metaopt.MetaOptimize
    params : mapping of name to tensor

    Raises
    ------
    Skip
        If torch has no such optimizer, or something is asked that needs a formula.
    """

    def __init__(self, opt: mo.MetaOptimize, params: Mapping[str, Any]) -> None:
        plan = opt.plan(params)
        several = plan.blocks.partition.per_leaf or any(plan.blocks.views.values())
        for needed, fits in (
            ("curvature", opt.curvature == "none"),
            (f"sigma {opt.sigma}", opt.sigma == "exp"),
            ("skip_nonfinite and a step size a unit", not (opt.skip_nonfinite and several)),
        ):
            if not fits:
                msg = f"what is wrapped has no {needed}"
                raise Skip(msg)
        for param in params.values():
            if param.dtype not in (torch.float32, torch.float64):
                msg = "what is wrapped has moments as narrow as its parameters"
                raise Skip(msg)
        self.own = {name: torch.nn.Parameter(param.clone()) for name, param in params.items()}
        self.rules = rules_by_leaf(opt.base, per_leaf(params.items()))
        groups = {name: {"params": [(name, param)]} for name, param in self.own.items()}
        if len(set(self.rules.values())) == 1:
            inner = [_made(next(iter(self.rules.values())), list(groups.values()))]
        else:
            inner = [_made(self.rules[name], [group]) for name, group in groups.items()]
        self.optimizer = wrap(inner, compile=False, **options_of(opt, wrap))

    def step(self, grads: Any, lr: Any, *_: Any, meta_grads: Any = None, **__: Any) -> None:
        """Take what `metaopt.MetaOptimize.step` takes, for the parameters and state at hand."""
        self._set(grads, lr, meta_grads)
        self.optimizer.step()

    def state(self) -> mo.State:
        """Return the state as the core has it, with the moments of what is wrapped."""
        kept: dict[Any, dict[str, Any]] = {}
        for inner in self.optimizer.inner:
            kept |= inner.state

        def moment(name: str, slot: str) -> Any:
            found = kept.get(self.own[name], {})
            own = [found[key] for key in MOMENTS[slot] if key in found]
            return own[0].clone() if own else torch.zeros_like(self.own[name])

        return replace(super().state(), slots=slots_of(self.rules, moment))


def _made(rule: Any, groups: Any) -> Any:
    """Return torch's optimizer that is a rule, but perhaps for its decay, with an lr of 1."""
    found = counterpart("torch", rule)
    kind: Any = getattr(torch.optim, found[0]) if found is not None else None
    if found is None:
        found = counterpart("torch", replace(rule, weight_decay=0.0))
        if found is None:
            msg = f"the library has no {type(rule).__name__} of this form"
            raise Skip(msg)
        kind = _decoupled(getattr(torch.optim, found[0]), rule.weight_decay)
    optimizer = kind(groups, lr=1.0, **found[1])
    for group in optimizer.param_groups if found[1].get("momentum") else ():
        for param in group["params"]:  # else torch starts it with the whole first gradient
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return optimizer


def _decoupled(kind: Any, decay: float) -> Any:
    """Return a class of torch's, which has its decay in the gradient, with a decoupled one."""

    class Decoupled(kind):  # type: ignore[misc]
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)
            for group in self.param_groups:
                group.update(weight_decay=decay, decoupled_weight_decay=True)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.mul_(1 - group["lr"] * decay)
                group["weight_decay"] = 0.0
            try:
                return super().step(closure)
            finally:
                for group in self.param_groups:
                    group["weight_decay"] = decay

    return Decoupled
