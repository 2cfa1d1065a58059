"""MetaOptimizer, a `torch.optim.Optimizer` whose step sizes tune themselves."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.configuration import BASE, META, META_LR, STEP_SIZE, RuleLike
from metaopt.inputs import check_formulas
from metaopt.metaoptimize import check_config
from metaopt_torch.base import check_training
from metaopt_torch.core_step import core_step, reduction
from metaopt_torch.curvature import RandomState, by_central_difference
from metaopt_torch.frozen import frozen_step
from metaopt_torch.in_backward import InBackward, check_in_backward
from metaopt_torch.plain import plain
from metaopt_torch.tuned import TunedOptimizer, check_dense

__all__ = ["MetaOptimizer", "from_config"]


class MetaOptimizer(TunedOptimizer):
    r"""Wraps a base update and adapts its step sizes online with a meta update.

    docs/mathematics.md; `metaopt.MetaOptimize` describes the options that both have.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor), or of dicts
        As for every optimizer of torch's. Named parameters, `model.named_parameters()`, give
        `blocks` and `base` their names; parameters without names are called "0", "1" and so on.
        A group may have its own `lr`, `weight_decay`, `maximize`, `step_size`, `bounds`, and
        `block`: the name of the block that all its leaves share.
    base, meta : Rule, or name of one
        The update of the weights, or several by name pattern, and that of the step sizes.
    step_size, meta_lr, discount, blocks, sigma, bounds
        As for `metaopt.MetaOptimize`.
    approximation, curvature, held_out, meta_first, skip_nonfinite, recover
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
        base: RuleLike = BASE,
        meta: RuleLike = META,
        step_size: float | Mapping[str, Any] = STEP_SIZE,
        meta_lr: float = META_LR,
        discount: float | tuple[float, ...] | None = None,
        blocks: Any = "scalar",
        sigma: Any = "exp",
        bounds: Any = None,
        approximation: str = "l",
        curvature: Any = "none",
        held_out: bool = False,
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
            held_out=held_out,
            meta_first=meta_first,
            skip_nonfinite=skip_nonfinite,
            recover=recover,
        )
        check_formulas(
            config.base,
            "an optimizer that is to be known by its steps alone is handed to "
            "`metaopt_torch.wrap`.",
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
        RuntimeError
            Inside `meta_gradients`, where the loss's own `backward` is called.
        """
        self._held_out.check_outside("backward")
        self._refresh()
        if self._ready.frozen:
            loss.backward()
            return
        self._double_backward.add(loss, [leaf.param for leaf in self._ready.leaves.values()])

    def step_in_backward(self) -> InBackward:
        """Step each parameter in the backward pass, as soon as its gradient is there.

        A large one is then freed at once, so that not all gradients are held at the same time;
        small ones are stepped together. `step` makes the rest of the step, and is to be called
        after each backward pass: step sizes move there. The numbers are those of a step after the
        backward pass, as a step is made with the step sizes from before it.

        Nothing can be done to the gradients, as they are gone: no clipping, no accumulation over
        several backward passes, no GradScaler. DistributedDataParallel adds gradients up later.

        Returns
        -------
        handle
            Its `remove` undoes it. Parameters that are added later step in `step`.

        Raises
        ------
        ValueError
            With `skip_nonfinite`, `meta_first`, `held_out`, `recover`, `curvature`,
            `blocks="weight"`, numbers that are learned or parameters that are sharded: there
            something is needed before the first parameter moves that comes with the last gradient.
        RuntimeError
            If it has been called before, and its handle has not been removed.

        Examples
        --------
        >>> import metaopt as mo
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = MetaOptimizer(model.parameters(), compile=False)
        >>> handle = opt.step_in_backward()
        >>> for _ in range(2):
        ...     model(torch.ones(4, 3)).square().mean().backward()
        ...     opt.step()
        >>> model.weight.grad is None
        True
        """
        self._refresh()
        check_in_backward(self._ready)
        if self._in_backward is not None and self._in_backward.active:
            msg = (
                "`step_in_backward` has been called before: `remove` the handle that it returned, "
                "to have hooks at parameters that have come since."
            )
            raise RuntimeError(msg)
        params = [leaf.param for leaf in self._ready.leaves.values()]
        self._in_backward = InBackward(self, params)
        return self._in_backward

    def _arrived(self, param: Tensor) -> None:
        """Step a parameter whose gradient has come, if all that steps with it are there."""
        opened = self._opened
        if opened is None:
            self._look()
            leaves = self._ready.leaves.values()
            if (
                any(leaf.changed() or not leaf.state for leaf in leaves if leaf.param.requires_grad)
                or self._ready.learns_otherwise()
            ):
                self._build(self._built)
            check_in_backward(self._ready)  # groups may say what they did not
            assert self._engine is not None  # it is made with `_ready`
            expected = [leaf for leaf in self._ready.leaves.values() if leaf.param.requires_grad]
            opened = self._opened = self._engine.opened(expected)
        leaf, grad = opened.leaves.get(id(param)), param.grad
        if leaf is None or grad is None:  # it has left, or another hook took the gradient
            return
        check_dense(leaf.name, grad)
        leaf.check(grad)
        for stepped in opened.arrived(leaf, grad):
            stepped.param.grad = None

    def _close(self) -> None:
        """Make the rest of a step that has begun in the backward pass."""
        opened, leaves = self._opened, self._ready.leaves
        assert opened is not None
        for leaf in leaves.values():  # of parameters without a hook
            if leaf.param.grad is not None and not opened.holds(leaf):
                self._arrived(leaf.param)
        opened.close(leaves)
        for name in opened.stepped:
            leaves[name].param.grad = None
        self._opened = None
        self._watch.see(self.param_groups, self.state)  # packing is no edit

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
        check_training(self._evaluating)  # before the closure adds to gradients
        self._held_out.check_outside("step")
        if self._built is None:
            self._build()
        if not any(group["params"] for group in self.param_groups):  # yet, or any more
            with torch.enable_grad():
                return None if closure is None else closure()
        exact = self._ready.plan.curvature == "exact" and hvp is None and not self._ready.frozen
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
            if self._opened is not None:
                self._close()
                return loss
            grads, meta_grads = self._grads(), self._meta_grads()
            if self._ready.in_core and self._ready.frozen:
                frozen_step(self._ready, grads, self._rounding)
            elif self._ready.in_core:
                derivatives = {"hvp": hvp, "third": third, "hessian_diagonal": hessian_diagonal}
                if exact:
                    derivatives |= self._derivatives(grads, closure, random, third)
                core_step(self._ready, grads, self._rounding, derivatives, meta_grads)
                self._ready.counts.settle()
                self._double_backward.release(leaf.param for leaf in self._ready.leaves.values())
            else:
                assert self._engine is not None  # it is made with `_ready`
                if self._engine.step(grads, meta_grads):  # whose packing is no edit
                    self._watch.see(self.param_groups, self.state)
        self._held_out.grads.clear()
        return loss

    def to_plain(self) -> torch.optim.Optimizer:
        """Return a plain optimizer of torch's that goes on from here, at the step sizes of now.

        Nothing is learned any more. It has a group for each block of each group here, with the
        step size times `lr` as its `lr`, the moments and their counts, in tensors of their own: so
        that traces and all else that learning takes are freed with this optimizer. What else groups
        hold, keys of your own, is in its groups too. Schedulers are made anew, for the plain one.

        Returns
        -------
        torch.optim.Optimizer
            `torch.optim.AdamW` for `metaopt.AdamW`. `torch.optim.SGD` for `metaopt.SGD`, with
            `dampening` equal to `momentum`, and without `weight_decay` where there is momentum.
            `torch.optim.RMSprop` for `metaopt.RMSprop(bias_correction=False)` without
            `weight_decay`. Weight decay with a `decay_step_size` becomes as strong by the `lr` of
            its group.

        Raises
        ------
        ValueError
            If torch has no such optimizer, or rules are of several; if a parameter has several
            step sizes, or a number of a rule is learned.
        RuntimeError
            Inside `averaged_params` or `meta_gradients`; with `step_in_backward`, between the
            backward pass and `step`.

        Examples
        --------
        >>> from metaopt_torch import MetaOptimizer
        >>> param = torch.nn.Parameter(torch.ones(3))
        >>> opt = MetaOptimizer([param], step_size=0.25, lr=0.5, compile=False)
        >>> plain = opt.to_plain()
        >>> type(plain).__name__, plain.param_groups[0]["lr"]
        ('AdamW', 0.125)
        """
        self._held_out.check_outside("to_plain")
        self._refresh()
        made = plain(self._ready)
        if self._in_backward is not None:  # whose hooks would take the gradients
            self._in_backward.remove()
        return made

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


def from_config(
    config: mo.MetaOptimize,
    params: Any,
    *,
    lr: float | Tensor = 1.0,
    weight_decay: float | None = None,
    maximize: bool = False,
    hvp: str = "autograd",
    rounding: str = "nearest",
    compile: bool | None = None,
    process_group: Any = None,
) -> MetaOptimizer:
    """Return an optimizer with a configuration of the core, such as one of `metaopt.presets`.

    Parameters
    ----------
    config : metaopt.MetaOptimize
    params, lr, weight_decay, maximize, hvp, rounding, compile, process_group
        As `MetaOptimizer` takes them.

    Raises
    ------
    ValueError, TypeError
        As `MetaOptimizer` does.

    Examples
    --------
    >>> import metaopt as mo
    >>> model = torch.nn.Linear(3, 1)
    >>> config = mo.presets.paper("adamw", "adam", "tinystories")
    >>> opt = from_config(config, model.named_parameters(), compile=False)
    >>> opt.config.meta_lr
    0.001
    """
    check_config(config)
    options = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    return MetaOptimizer(
        params,
        **options,
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        hvp=hvp,
        rounding=rounding,
        compile=compile,
        process_group=process_group,
    )
