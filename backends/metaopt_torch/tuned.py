"""What every optimizer here is beside its steps: gradients read, step sizes and diagnostics."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor

from metaopt.averages import check_averages
from metaopt_torch.averaged import check_in_place, copies_of_averages, in_place
from metaopt_torch.base import BaseOptimizer
from metaopt_torch.core_state import whole
from metaopt_torch.core_step import copies, project, reduction
from metaopt_torch.frozen import check_averages_kept
from metaopt_torch.groups import FROZEN, check_fixed, check_numbers, multiplier_of
from metaopt_torch.leaf import Leaf
from metaopt_torch.shards import gathered, redistributed

__all__ = ["TunedOptimizer", "check_dense"]


class TunedOptimizer(BaseOptimizer):
    """An optimizer with learned step sizes; its steps are made by those derived from it."""

    def _grads(self) -> dict[str, Tensor]:
        """Return the gradients by name, after a look at what may have changed since last time."""
        self._look()
        if self._ready.in_core:
            self._refresh()  # elsewhere a group's weight decay is handed to every pass
        elif self._ready.learns_otherwise():
            self._build(self._built)
        self._ready.check_shared()
        grads, rebuild = {}, False
        for name, leaf in self._ready.leaves.items():
            grad = leaf.param.grad
            rebuild |= leaf.changed()
            if grad is None:
                continue
            check_dense(name, grad)
            grads[name] = _distributed(leaf, grad)
            rebuild |= not leaf.state
        if rebuild:  # one that was frozen has a gradient now, or another dtype or shape
            self._build(self._built)
        for name, grad in grads.items():
            self._ready.leaves[name].check(grad)
        return grads

    def _look(self) -> None:
        """Look at what may have changed since last time, as a step begins."""
        self._refresh(decay=False)
        for group in self.param_groups:
            check_fixed(group, self._given)
            check_numbers(group)

    def _meta_grads(self) -> dict[str, Tensor] | None:
        """Return the gradients of the held-out loss by name; None without `held_out`."""
        if not self._ready.config.held_out:
            return None
        found = {}
        for name, leaf in self._ready.leaves.items():
            grad = self._held_out.grads.get(leaf.param)
            if grad is None:
                continue
            found[name] = _distributed(leaf, grad)
            try:
                leaf.check_held_out(found[name])
            except (TypeError, ValueError):  # which no later step would mend
                self._held_out.grads.clear()
                raise
        return found

    def meta_gradients(self, *, scaler: Any = None) -> AbstractContextManager[None]:
        """Take gradients of a held-out loss, with which the step sizes learn; for `held_out`.

        Inside, `backward` is called on a loss of other data. What it adds to `.grad` is kept for
        the next `step`, and `.grad` is afterwards what it was, also after an exception: so that
        this may stand before the backward pass of training or after it. Gradients of several calls,
        and of several contexts before one step, are added up. A step without any leaves the step
        sizes as they are.

        Parameters
        ----------
        scaler : torch.amp.GradScaler, optional
            That by which the losses inside are scaled. Gradients are divided by its scale; where
            one has overflowed, the step sizes rest. `scaler.unscale_` is for those of training.

        Returns
        -------
        A context manager. Parameters of other optimizers, which it does not know, keep what comes
        to them: enter the contexts of all.

        Raises
        ------
        ValueError
            Without `held_out`, or if there are no parameters.
        RuntimeError
            If called inside, if `step` is, or if no gradient has come when it is left.
        TypeError
            If a gradient is sparse, or `scaler` is none.

        Examples
        --------
        >>> import metaopt as mo
        >>> from metaopt_torch import MetaOptimizer
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = MetaOptimizer(model.parameters(), held_out=True, compile=False)
        >>> for step in range(10):
        ...     opt.zero_grad()
        ...     model(torch.ones(4, 3)).square().mean().backward()
        ...     if step % 2 == 0:
        ...         with opt.meta_gradients():
        ...             model(torch.zeros(4, 3)).square().mean().backward()
        ...     opt.step()
        >>> bool(opt.diagnostics()["asleep"]["all"])  # since the last step had none
        True
        """
        self._held_out.check_outside("meta_gradients")
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            msg = f"`scaler` must be a torch.amp.GradScaler; got {scaler!r}."
            raise TypeError(msg)
        self._refresh()
        if not self._ready.config.held_out:
            msg = (
                "`meta_gradients` needs an optimizer made with held_out=True, whose step sizes "
                "learn with the gradients that come inside, and with nothing else."
            )
            raise ValueError(msg)
        return self._collecting(scaler)

    @contextmanager
    def _collecting(self, scaler: Any) -> Iterator[None]:
        self._held_out.check_outside("meta_gradients")
        self._refresh()  # parameters may have come since the context was made
        with self._held_out.collected(self._ready, scaler):
            yield

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
        >>> from metaopt_torch import MetaOptimizer
        >>> param = torch.nn.Parameter(torch.tensor([0.5, -1.0]))
        >>> opt = MetaOptimizer([("w", param)], base=mo.SGD(), meta=mo.SGD(), compile=False)
        >>> opt.project(lambda params: {"w": params["w"].clamp(min=0.0)})
        >>> param.tolist()
        [0.5, 0.0]
        """
        self._refresh()
        project(self._ready, function, self._rounding)

    @overload
    def averaged_params(self, *, copy: Literal[False] = False) -> AbstractContextManager[None]: ...

    @overload
    def averaged_params(self, *, copy: Literal[True]) -> dict[str, Tensor]: ...

    def averaged_params(self, *, copy: bool = False) -> Any:
        """Evaluate at weights averaged over the latest steps, better than the last ones.

        As `metaopt.MetaOptimize.averaged_params`; docs/mathematics.md section 10, *The trace as an
        average*. They come with the traces, so nothing more is kept while training.

        Parameters
        ----------
        copy : bool, default False
            Whether to return the averages and leave the parameters as they are.

        Returns
        -------
        A context manager, inside of which the parameters are the averages: afterwards, also after
        an exception, they are what they were, to the last bit. Their backup is held inside alone,
        where the model may be evaluated and its `state_dict` saved, but no step made, no closure
        called, and the optimizer neither copied nor asked for its `state_dict`. With `copy` a dict
        of parameter name to tensor, new ones of the parameters' dtypes and distributed as these, in
        their order.

        Raises
        ------
        ValueError
            If there is no `discount` below 1, or with curvature or another `sigma` than "exp":
            the traces are no distances to averages then. After `freeze`, unless the base is an
            `Averaged`. Without `copy` also if parameters are
            those of FullyShardedDataParallel (FSDP1).
        RuntimeError
            If called inside.

        Examples
        --------
        >>> import metaopt as mo
        >>> from metaopt_torch import MetaOptimizer
        >>> param = torch.nn.Parameter(torch.tensor([1.0]))
        >>> rules = {"base": mo.SGD(), "meta": mo.SGD()}
        >>> opt = MetaOptimizer(
        ...     [param], **rules, step_size=0.5, discount=(0.5, 1.0), compile=False
        ... )
        >>> for grad in (1.0, -1.0):
        ...     param.grad = torch.tensor([grad])
        ...     opt.step()
        >>> with opt.averaged_params():
        ...     param.tolist()
        [0.75]
        >>> param.tolist()
        [1.0]
        """
        self._held_out.check_outside("averaged_params")
        self._refresh()
        check_averages(self._ready.config, self._ready.plan)
        check_averages_kept(self._ready)
        if copy:
            return copies_of_averages(self._ready)
        check_in_place(self._ready)
        return self._at_averages()

    @contextmanager
    def _at_averages(self) -> Iterator[None]:
        self._refresh()
        with in_place(self._ready):
            self._evaluating = True
            try:
                yield
            finally:
                self._evaluating = False

    @torch._disable_dynamo
    def freeze(self) -> None:
        """Learn no more: go on with the step sizes of now, and free what learning takes.

        In place, and for good; a state that was saved before brings learning back. Steps are those
        of the base update at the step sizes of now, and so at the last values of hyperparameters
        that are learned. `lr` of the groups, and what schedules it, still multiplies them. Moments,
        counts and the average of an `Averaged` go on; `skip_nonfinite` still skips.

        Traces are freed, and with them the averages that they are distances to. Of the meta update
        a few numbers a block stay, at weight level beta alone. What learning asks for (held-out
        gradients, derivatives, closures for them) is not looked at any more, and `recover` does
        nothing. The state is frozen, too: what it is loaded into is frozen then. Groups that are
        added later step with the step size of their block, if it is new with that where it starts.

        Raises
        ------
        ValueError
            If there are no parameters yet.
        RuntimeError
            Inside `averaged_params` or `meta_gradients`; with `step_in_backward`, between the
            backward pass and `step`.

        Examples
        --------
        >>> from metaopt_torch import MetaOptimizer
        >>> param = torch.nn.Parameter(torch.ones(3))
        >>> opt = MetaOptimizer([param], compile=False)
        >>> param.square().sum().backward()
        >>> opt.step()
        >>> opt.freeze()
        >>> opt.step()
        >>> sorted(opt.state[param])
        ['exp_avg', 'exp_avg_sq', 'step']
        """
        self._held_out.check_outside("freeze")
        self._refresh()
        ready = self._ready
        if ready.frozen:
            return
        for group in self.param_groups:
            group[FROZEN] = True
        try:
            self._build(ready)
        except Exception:
            for group in self.param_groups:
                group.pop(FROZEN, None)
            raise

    def step_sizes(self) -> dict[str, Tensor]:
        """Return the learned step sizes by block, before the multiplier `lr`.

        Nothing is copied to the host.

        Returns
        -------
        dict of block name to tensor
            As `metaopt.MetaOptimize.step_sizes`; on the device, float32 or wider.
        """
        self._refresh(decay=False, evaluating=True)
        if self._built is None:
            return {}
        return self._built.step_sizes()

    def effective_lr(self) -> list[dict[str, Tensor]]:
        """Return what each group steps with: the learned step sizes of its blocks times its `lr`.

        What learning-rate monitors should show, as `group["lr"]` is the multiplier alone. Nothing
        is copied to the host.

        Returns
        -------
        list of dict of block name to tensor
            An entry for each of `param_groups`; tensors like those of `step_sizes`.

        Examples
        --------
        >>> from metaopt_torch import MetaOptimizer
        >>> param = torch.nn.Parameter(torch.ones(3))
        >>> opt = MetaOptimizer([param], step_size=0.25, lr=0.5, compile=False)
        >>> [{name: float(lr) for name, lr in group.items()} for group in opt.effective_lr()]
        [{'all': 0.125}]
        """
        sizes = self.step_sizes()
        if self._built is None:
            return [{} for _ in self.param_groups]
        blocks = self._built.blocks_of_groups()
        found = []
        for group, keys in zip(self.param_groups, blocks, strict=True):
            lr = torch.as_tensor(multiplier_of(group))
            here = {key: sizes[key] for key in keys if key in sizes}
            found.append({key: size * lr.to(size) for key, size in here.items()})
        return found

    def hyperparameters(self) -> dict[str, dict[str, Tensor]]:
        """Return the numbers of rules that are learned, `metaopt.Learned`, by name and block.

        Nothing is copied to the host.

        Returns
        -------
        dict of name to dict of block name to tensor
            As `metaopt.MetaOptimize.hyperparameters`; on the device, float32 or wider.
        """
        self._refresh(decay=False, evaluating=True)
        if self._built is None:
            return {}
        return self._built.hyperparameters()

    def diagnostics(self) -> dict[str, Any]:
        """Return what tells how the adaptation is doing; tensors, nothing is copied to the host.

        With sharded parameters this is a collective call: trace norms are sums over all devices.

        Returns
        -------
        dict
            "beta", "meta_grad" and "trace_norm", each a mapping like `step_sizes`; "restarts";
            "skipped"; of several discounts "decided", and a leading axis of these where each has
            its own. See `metaopt.MetaOptimize.diagnostics`.
        """
        self._refresh()
        leaves = self._ready.leaves
        return self._ready.config.diagnostics(
            whole(self._ready),
            {name: gathered(leaf.param.detach()) for name, leaf in leaves.items()},
            reduce=reduction(leaves, groups=True),
            copies=copies(leaves, groups=True),
        )


def check_dense(name: str, grad: Tensor) -> None:
    """Raise TypeError where a gradient is sparse."""
    if grad.layout != torch.strided:
        msg = f"The gradient of {name!r} must be dense; got layout {grad.layout}."
        raise TypeError(msg)


def _distributed(leaf: Leaf, grad: Tensor) -> Tensor:
    """Return a gradient distributed as its parameter is."""
    return grad if leaf.shard.mesh is None else redistributed(grad, leaf.param)
