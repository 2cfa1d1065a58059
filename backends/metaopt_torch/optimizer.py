"""MetaOptimizer, a `torch.optim.Optimizer` whose step sizes tune themselves."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.rules import Rule
from metaopt_torch.base import BaseOptimizer
from metaopt_torch.core_state import whole
from metaopt_torch.core_step import copies, core_step, project, reduction
from metaopt_torch.curvature import RandomState, by_central_difference
from metaopt_torch.groups import check_numbers
from metaopt_torch.shards import gathered, redistributed

__all__ = ["MetaOptimizer"]


class MetaOptimizer(BaseOptimizer):
    r"""Wraps a base update and adapts its step sizes online with a meta update.

    docs/mathematics.md; `metaopt.MetaOptimize` describes the options that both have.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor), or of dicts
        As for every optimizer of torch's. Named parameters, `model.named_parameters()`, give
        `blocks` and `base` their names; parameters without names are called "0", "1" and so on.
        A group may have its own `lr`, `weight_decay`, `maximize`, `step_size`, `bounds`, and
        `block`: the name of the block that all its leaves share.
    base, meta : Rule
        The update of the weights, or several by name pattern, and that of the step sizes.
    step_size, meta_lr, discount, blocks, sigma, bounds, approximation, curvature, \
meta_first, skip_nonfinite, recover
        As for `metaopt.MetaOptimize`.
    lr : float or tensor, default 1.0
        Multiplies the learned step sizes; what learning-rate schedulers drive. 0 freezes.
    weight_decay : float, optional
        In place of that of the rules.
    maximize : bool, default False
    hvp : {"autograd", "central"}, default "autograd"
        Where Hessian-vector products for `curvature="exact"` come from: from gradients made by
        `backward`, by differentiating them, or from gradients of displaced parameters, for which
        `step` needs a closure.
    rounding : {"nearest", "stochastic", "kahan"}, default "nearest"
        Of bfloat16 and float16 parameters, whose small steps would be lost: "stochastic" rounds up
        or down at random (bfloat16 alone), "kahan" keeps what was lost in one more array of the
        parameter's dtype.
    compile : bool, optional
        Whether to compile the step with `torch.compile`. By default where a compiler is found.
    process_group : ProcessGroup, optional
        Of processes that each hold a part of the parameters in plain tensors, whatever cut them:
        meta-gradients are summed over it. DTensors and FullyShardedDataParallel need none.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as described, or two do not go together.

    Examples
    --------
    >>> import metaopt as mo
    >>> model = torch.nn.Linear(3, 1)
    >>> opt = MetaOptimizer(model.parameters(), base=mo.AdamW(), meta=mo.Lion(), compile=False)
    >>> loss = model(torch.ones(4, 3)).square().mean()
    >>> loss.backward()
    >>> opt.step()
    >>> sorted(opt.step_sizes())
    ['all']
    """

    def __init__(
        self,
        params: Any,
        *,
        base: Rule | Mapping[str, Rule],
        meta: Rule,
        step_size: float | Mapping[str, Any] = 1e-4,
        meta_lr: float = 1e-3,
        discount: float = 1.0,
        blocks: Any = "scalar",
        sigma: Any = "exp",
        bounds: Any = None,
        approximation: str = "l",
        curvature: Any = "none",
        meta_first: bool = False,
        skip_nonfinite: bool = False,
        recover: bool = False,
        lr: float | Tensor = 1.0,
        weight_decay: float | None = None,
        maximize: bool = False,
        hvp: str = "autograd",
        rounding: str = "nearest",
        compile: bool | None = None,
        process_group: Any = None,
    ) -> None:
        config = mo.MetaOptimize(
            base=base,
            meta=meta,
            step_size=step_size,
            meta_lr=meta_lr,
            discount=discount,
            blocks=blocks,
            sigma=sigma,
            bounds=bounds,
            approximation=approximation,
            curvature=curvature,
            meta_first=meta_first,
            skip_nonfinite=skip_nonfinite,
            recover=recover,
        )
        options = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params,
            config,
            options,
            hvp=hvp,
            rounding=rounding,
            compile=compile,
            process_group=process_group,
        )

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients those of a loss, in a form that can be differentiated again.

        In place of `loss.backward()` for `curvature="exact"` with `hvp="autograd"`.

        Parameters
        ----------
        loss : tensor, shape ()

        Raises
        ------
        ValueError
            If it is not one number, or depends on no parameter of this optimizer that requires a
            gradient.
        TypeError
            If it is no tensor.
        """
        self._refresh()
        self._double_backward.add(loss, [leaf.param for leaf in self._ready.leaves.values()])

    # as torch's own optimizers do it: the public way imports Dynamo, which takes a second
    @torch._disable_dynamo
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        hvp: Callable[..., Any] | None = None,
        third: Callable[..., Any] | None = None,
        hessian_diagonal: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make a step with the gradients that are there.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients, and returns the loss.
        hvp, third, hessian_diagonal : optional
            As for `metaopt.MetaOptimize.step`, in place of the optimizer's own.

        Returns
        -------
        What `closure` returned, or None.

        Raises
        ------
        TypeError, ValueError
            If a gradient is sparse, a parameter or its gradient has come by another shape or
            device, a group's option is wrong, or what `curvature` needs is missing. Nothing is
            changed then.
        """
        if self._built is None:
            self._build()
        if not any(group["params"] for group in self.param_groups):  # yet, or any more
            with torch.enable_grad():
                return None if closure is None else closure()
        exact = self._ready.plan.curvature == "exact" and hvp is None
        random = None
        if exact and self._hvp == "central":
            if closure is None:
                msg = (
                    '`step` needs a closure for `hvp="central"`: gradients of displaced parameters.'
                )
                raise ValueError(msg)
            # before the closure draws: displaced gradients see the same dropout masks
            self._refresh()
            random = RandomState({leaf.param.device for leaf in self._ready.leaves.values()})
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            grads = self._grads()
            if self._ready.in_core:
                derivatives = {"hvp": hvp, "third": third, "hessian_diagonal": hessian_diagonal}
                if exact:
                    derivatives |= self._derivatives(grads, closure, random, third)
                core_step(self._ready, grads, self._rounding, derivatives)
                self._ready.counts.settle()
                self._double_backward.release(leaf.param for leaf in self._ready.leaves.values())
            else:
                assert self._engine is not None  # it is made with `_ready`
                if self._engine.step(grads):  # whose packing is no edit
                    self._watch.see(self.param_groups, self.state)
        return loss

    def _grads(self) -> dict[str, Tensor]:
        """Return the gradients by name, after a look at what may have changed since last time."""
        self._refresh(decay=False)
        for group in self.param_groups:
            check_numbers(group)
        if self._ready.in_core:
            self._refresh()  # elsewhere a group's weight decay is handed to every pass
        self._ready.check_shared()
        grads, rebuild = {}, False
        for name, leaf in self._ready.leaves.items():
            grad = leaf.param.grad
            rebuild |= leaf.changed()
            if grad is None:
                continue
            if grad.layout != torch.strided:
                msg = f"The gradient of {name!r} must be dense; got layout {grad.layout}."
                raise TypeError(msg)
            grads[name] = grad if leaf.shard.mesh is None else redistributed(grad, leaf.param)
            rebuild |= not leaf.state
        if rebuild:  # one that was frozen has a gradient now, or another dtype or shape
            self._build(self._built)
        for name, grad in grads.items():
            self._ready.leaves[name].check(grad)
        return grads

    def _derivatives(
        self,
        grads: Mapping[str, Tensor],
        closure: Callable[[], Any] | None,
        random: RandomState | None,
        third: Callable[..., Any] | None,
    ) -> dict[str, Any]:
        """Return where second derivatives come from."""
        params = {name: leaf.param for name, leaf in self._ready.leaves.items()}
        if not grads:  # products of leaves without a gradient are None
            return dict.fromkeys(("hvp", "third"), lambda tangents, *_: dict.fromkeys(tangents))
        if closure is not None and random is not None:
            reduce = reduction(self._ready.leaves)
            return {"hvp": by_central_difference(closure, params, grads, random, reduce)}
        hvp, own_third = self._double_backward.derivatives(grads, params)
        return {"hvp": hvp, "third": own_third if third is None else third}

    @torch._disable_dynamo
    @torch.no_grad()
    def project(self, function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
        """Project the parameters in place, and push their traces through the projection.

        For weights that are held somewhere after a step: clipped to a box, within a norm, pruned
        (docs/mathematics.md section 10). Where they are projected by hand, the way to the bound
        that holds a weight stays in the trace, and step sizes may then rise without end.

        Parameters
        ----------
        function : callable
            From the parameters by name, float32 or wider, to projected ones; those that stay as
            they are may be left out. It is differentiated forward by `torch.func.jvp`.

        Raises
        ------
        ValueError, TypeError
            If it returns something else, if parameters are distributed, or with
            `approximation="full"`. Nothing is changed then.

        Examples
        --------
        >>> import metaopt as mo
        >>> param = torch.nn.Parameter(torch.tensor([0.5, -1.0]))
        >>> opt = MetaOptimizer([("w", param)], base=mo.SGD(), meta=mo.SGD(), compile=False)
        >>> opt.project(lambda params: {"w": params["w"].clamp(min=0.0)})
        >>> param.tolist()
        [0.5, 0.0]
        """
        self._refresh()
        project(self._ready, function, self._rounding)

    def step_sizes(self) -> dict[str, Tensor]:
        """Return the learned step sizes by block, before the multiplier `lr`.

        Nothing is copied to the host.

        Returns
        -------
        dict of block name to tensor
            As `metaopt.MetaOptimize.step_sizes`; on the device, float32 or wider.
        """
        self._refresh(decay=False)
        if self._built is None:
            return {}
        return self._built.step_sizes()

    def diagnostics(self) -> dict[str, Any]:
        """Return what tells how the adaptation is doing; tensors, nothing is copied to the host.

        With sharded parameters this is a collective call: trace norms are sums over all devices.

        Returns
        -------
        dict
            "beta", "meta_grad" and "trace_norm", each a mapping like `step_sizes`; "restarts";
            "skipped". See `metaopt.MetaOptimize.diagnostics`.
        """
        self._refresh()
        leaves = self._ready.leaves
        return self._ready.config.diagnostics(
            whole(self._ready),
            {name: gathered(leaf.param.detach()) for name, leaf in leaves.items()},
            reduce=reduction(leaves, groups=True),
            copies=copies(leaves, groups=True),
        )
