"""The Hessian-free step: runs of leaves, one pass over memory, one sum for each mesh of devices."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt.arrays import per_leaf
from metaopt.passes import meta_pass, usable
from metaopt.step import awake_families
from metaopt_torch.build import Built
from metaopt_torch.compiler import compiled, in_chunks
from metaopt_torch.passes import Kind, fused, moved, products
from metaopt_torch.runs import Run, grouped
from metaopt_torch.shards import summed

__all__ = ["HessianFree"]


class Rates(NamedTuple):
    """What a group's `lr` makes of the step sizes, and whether its leaves move."""

    lr: Tensor
    lr_trace: Tensor | None
    awake: Any
    discount: Tensor


class HessianFree:
    """Makes steps of the leaves, in place.

    Parameters
    ----------
    built : Built
    rounding : {"nearest", "stochastic", "kahan"}
    compile : bool
        Compile passes, or run them in chunks.
    """

    def __init__(self, built: Built, rounding: str, compile: bool) -> None:
        self._built, self._rounding, self._compile = built, rounding, compile
        self._config, self._plan = built.config, built.plan
        self._leaves, self._vectors = built.leaves, built.vectors
        self._passes: dict[Any, Any] = {}
        self._constants: dict[Any, Tensor] = {}
        self._signature: Any = None
        self._runs: dict[Any, Run] = {}
        self._indices: dict[Any, Tensor] = {}
        #: Whether the meta-gradient has to be known before a parameter is written.
        self.two_passes = built.config.meta_first or built.config.skip_nonfinite
        self._move = compiled(self._meta) if compile else self._meta

    def step(self, grads: Mapping[str, Tensor]) -> None:
        """Make a step of the leaves that have a gradient.

        Parameters
        ----------
        grads : mapping of leaf name to tensor
        """
        signature = tuple(id(self._leaves[name]) for name in grads)
        if signature != self._signature:
            self._runs = grouped((self._leaves[name] for name in grads), self._runs)
            self._signature, self._indices = signature, {}
        accepted = None
        if self.two_passes:
            accepted = self._in_two_passes(grads)
        else:
            self._in_one_pass(grads)
        self._built.counts.advance(list(grads), accepted)
        for name in grads:
            self._leaves[name].steps += 1
        one = (
            torch.ones_like(self._vectors["step"]) if accepted is None else accepted.to(torch.int32)
        )
        self._vectors["step"].add_(one)
        self._vectors["skipped"].add_(1 - one)

    def _in_one_pass(self, grads: Mapping[str, Tensor]) -> None:
        vectors, sums = self._vectors, []
        sizes, keep = self._config.slopes(vectors["beta"]), usable(vectors["meta_grad"])
        rates: dict[Any, Rates] = {}
        for run in self._runs.values():
            param, grad = run.buffers([grads[leaf.name] for leaf in run.leaves])
            arguments, awake = self._arguments(run, param, grad, sizes, keep, rates)
            sums.append((run, self._pass(fused, run)(*arguments), awake))
            run.written(param)
        z, _ = self._total(sums, ())
        self._move_beta(z, self._awake(grads), None)

    def _in_two_passes(self, grads: Mapping[str, Tensor]) -> Tensor | None:
        vectors, sums, lost = self._vectors, [], []
        rates: dict[Any, Rates] = {}
        for run in self._runs.values():
            _, grad = run.buffers([grads[leaf.name] for leaf in run.leaves])
            total, flag = self._pass(products, run)(run.leaves[0].rule, grad, run.state["trace"])
            sums.append((run, total, self._rates(run, None, rates).awake))
            lost.append((run, flag))
        z, count = self._total(sums, lost if self._config.skip_nonfinite else ())
        accepted = None if count is None else count == 0.0
        keep = usable(z)
        sizes = self._config.slopes(vectors["beta"])
        self._move_beta(z, self._awake(grads), accepted)
        if self._config.meta_first:
            sizes = self._config.slopes(vectors["beta"])
        rates = {}
        for run in self._runs.values():
            param, grad = run.buffers([grads[leaf.name] for leaf in run.leaves])
            arguments, _ = self._arguments(run, param, grad, sizes, keep, rates)
            self._pass(moved, run)(*arguments, accepted)
            run.written(param)
        return accepted

    def _arguments(
        self,
        run: Run,
        param: Tensor,
        grad: Tensor,
        sizes: tuple[Tensor, Tensor],
        keep: Tensor,
        rates: dict[Any, Rates],
    ) -> tuple[tuple[Any, ...], Any]:
        """Return what a pass is called with, and whether the run moves."""
        of_group = self._rates(run, sizes, rates)
        leaf = run.leaves[0]
        return (
            leaf.rule,
            param,
            grad,
            {slot: run.state[slot] for slot in leaf.rule.slots},
            run.state["trace"],
            run.state.get("compensation"),
            leaf.state["step"],
            run.pick(of_group.lr),
            None if of_group.lr_trace is None else run.pick(of_group.lr_trace),
            run.pick(keep.to(run.device)),
            of_group.discount,
        ), of_group.awake

    def _rates(self, run: Run, sizes: Any, known: dict[Any, Rates]) -> Rates:
        """Return the step sizes that the group's `lr` makes of `sizes`, for each block."""
        leaf = run.leaves[0]
        lr, key = leaf.group["lr"], (id(leaf.group), leaf.dtype, run.device)
        if key in known:
            return known[key]
        discount, one = (
            self._constant(value, leaf.dtype, run.device) for value in (self._config.discount, 1.0)
        )
        awake: Any = lr != 0.0
        if isinstance(lr, Tensor):
            lr = lr.to(run.device, leaf.dtype).reshape(())
            awake = lr != 0.0
            discount = torch.where(awake, discount, one)
        elif not awake:
            discount = one
        value = slope = one
        if sizes is not None:
            value, slope = (size.to(run.device, leaf.dtype) for size in sizes)
            slope = value if sizes[1] is sizes[0] else slope
        shared = slope is value
        if isinstance(lr, Tensor) or lr != 1.0:
            value, slope = value * lr, slope if shared else slope * lr
        known[key] = Rates(value, None if shared else slope, awake, discount)
        return known[key]

    def _constant(self, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (value, dtype, device)
        if key not in self._constants:
            self._constants[key] = torch.full((), value, dtype=dtype, device=device)
        return self._constants[key]

    def _pass(self, make: Callable[[Kind], Any], run: Run) -> Any:
        group, narrow = run.leaves[0].group, run.leaves[0].param.dtype != run.leaves[0].dtype
        rounding = self._rounding if narrow else "nearest"
        kind = Kind(self._config.trace, bool(group["maximize"]), rounding, not run.flat)
        if (make, kind) not in self._passes:
            run_as = compiled if self._compile else in_chunks
            self._passes[make, kind] = run_as(make(kind))
        return self._passes[make, kind]

    def _total(
        self, sums: Sequence[tuple[Run, Tensor, Any]], lost: Sequence[tuple[Run, Tensor]]
    ) -> tuple[Tensor, Tensor | None]:
        """Return z, and in how many runs a gradient is not finite, summed over all devices."""
        vectors = []
        for mesh in dict.fromkeys(run.mesh for run in self._runs.values()):
            vector = self._vector([entry for entry in sums if entry[0].mesh is mesh], lost, mesh)
            vectors.append(vector if mesh is None else summed(vector, mesh))
        if not vectors:
            return torch.zeros_like(self._vectors["beta"]), None
        total = vectors[0]
        for vector in vectors[1:]:
            total = total + vector
        return (total[:-1], total[-1]) if lost else (total, None)

    def _vector(self, sums: Sequence[Any], lost: Sequence[Any], mesh: Any) -> Tensor:
        """Return this device's part of z, over runs of one mesh; the last entry is of `lost`."""
        beta, counted = self._vectors["beta"], []
        for run, total, awake in sums:
            if awake is False or not run.counts:
                continue
            part = total if awake is True else torch.where(awake, total, 0.0)
            counted.append((run, part.to(beta.device, beta.dtype).reshape(-1)))
        if not counted:
            z = torch.zeros_like(beta)
        elif len(beta) == 1:
            z = torch.cat([part for _, part in counted]).sum().reshape(1)
        else:
            z = torch.zeros_like(beta).index_add_(
                0,
                self._index([run for run, _ in counted]),
                torch.cat([part for _, part in counted]),
            )
        if not lost:
            return z
        flags = [flag.to(beta.device) for run, flag in lost if run.mesh is mesh]
        return torch.cat([z, torch.stack(flags).any().to(z.dtype).reshape(1)])

    def _index(self, runs: Sequence[Run]) -> Tensor:
        """Return the block of each of the runs' sums."""
        key = tuple(id(run) for run in runs)
        if key not in self._indices:
            blocks = [block for run in runs for block in run.blocks]
            self._indices[key] = torch.tensor(blocks, device=self._vectors["beta"].device)
        return self._indices[key]

    def _awake(self, grads: Mapping[str, Tensor]) -> Any:
        """Return which families move, None for all."""
        flags: Any = per_leaf((name, False) for name in self._leaves)
        for name in grads:
            lr = self._leaves[name].group["lr"]
            flags[name] = lr.reshape(()) != 0.0 if isinstance(lr, Tensor) else lr != 0.0
        return awake_families(self._plan, flags, self._vectors["step"])

    def _move_beta(self, z: Tensor, awake: Any, accepted: Tensor | None) -> None:
        vectors, slots = self._vectors, self._vectors.slots
        held = (vectors["beta"], slots, vectors["meta_count"], vectors["restarts"])
        self._move(self._config.meta, z, *held, vectors["meta_grad"], awake, accepted)

    def _meta(
        self,
        rule: Any,
        z: Tensor,
        beta: Tensor,
        slots: Mapping[str, Tensor],
        meta_count: Tensor,
        restarts: Tensor,
        meta_grad: Tensor,
        awake: Tensor | None,
        accepted: Tensor | None,
    ) -> None:
        """Write the meta update of all blocks, where the step is accepted."""
        blocks = self._plan.blocks
        step = meta_pass(
            rule,
            blocks,
            z,
            usable(z),
            beta,
            slots,
            meta_count,
            restarts,
            meta_lr=self._config.meta_lr,
            awake=awake,
            bounds=self._config.limits(blocks, beta),
            beta_trace={},
            held_trace={},
        )
        pairs = [(beta, step.beta), (meta_count, step.meta_count), (restarts, step.restarts)]
        pairs += [(meta_grad, z), *((slots[slot], step.meta_slots[slot]) for slot in slots)]
        for old, new in pairs:
            old.copy_(new if accepted is None else torch.where(accepted, new, old))
