"""metaopt_torch as the suite sees an adapter: with parameters and a state of its own."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from metaopt_torch import MetaOptimizer

import metaopt as mo

__all__ = ["Optimizer"]


class Optimizer:
    """An optimizer of torch's and its parameters, each in a group of its own.

    Steps are run one operation at a time; what compiles them has tests of its own.

    Parameters
    ----------
    opt : metaopt.MetaOptimize
    params : mapping of name to tensor
    """

    def __init__(self, opt: mo.MetaOptimize, params: Mapping[str, Any]) -> None:
        options = {option.name: getattr(opt, option.name) for option in fields(opt) if option.init}
        self.own = {name: torch.nn.Parameter(param.clone()) for name, param in params.items()}
        groups = [{"params": [(name, param)]} for name, param in self.own.items()]
        self.optimizer = MetaOptimizer(groups, compile=False, **options)

    def step(
        self, grads: Any, lr: Any, hvp: Any, third: Any = None, hessian_diagonal: Any = None
    ) -> None:
        """Take what `metaopt.MetaOptimize.step` takes, for the parameters and state at hand."""
        for group, (name, param) in zip(self.optimizer.param_groups, self.own.items(), strict=True):
            param.grad = grads[name]
            group["lr"] = lr[name] if isinstance(lr, Mapping) else lr
        self.optimizer.step(hvp=hvp, third=third, hessian_diagonal=hessian_diagonal)

    def params(self) -> dict[str, Any]:
        """Return the parameters."""
        return {name: param.detach().clone() for name, param in self.own.items()}

    def state(self) -> mo.State:
        """Return the state as the core has it."""
        return self.optimizer.core_state()
