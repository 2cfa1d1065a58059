"""The Hessian-free step: runs of leaves, one pass over memory, one sum for each mesh of devices."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt.arrays import per_leaf
from metaopt.passes import meta_pass, usable
from metaopt.rules import Rule
from metaopt.step import awake_families
from metaopt_torch.build import Built
from metaopt_torch.compiler import Compiled, in_chunks
from metaopt_torch.passes import Arrays, Kind, Pass, fused, moved, products
from metaopt_torch.runs import Run, grouped
from metaopt_torch.shards import summed

__all__ = ["HessianFree"]


@dataclass
class Rates:
    """What the runs of a parameter group are stepped with, beside their buffers.

    Parameters
    ----------
    by_block : dict of str to tensor
        What the group's `lr` makes of the step sizes, and where z can be used.
    single : dict of str to tensor, shape ()
    awake : bool or tensor
        Whether the group's leaves move.
    """

    by_block: dict[str, Tensor]
    single: dict[str, Tensor]
    awake: Any
    _picked: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def of(self, run: Run) -> dict[str, Tensor]:
        """Return what a run of the group is stepped with."""
        if run.flat and run.index in self._picked:
            return self._picked[run.index]
        found = {name: run.pick(values) for name, values in self.by_block.items()} | self.single
        if run.flat:
            self._picked[run.index] = found
        return found


class HessianFree:
    """Makes steps of the leaves, in place.

    Parameters
    ----------
    built : Built
    rounding : {"nearest", "stochastic", "kahan"}
    compile : bool or None
        Compile passes, run them in chunks, or try the former first.
    """

    def __init__(self, built: Built, rounding: str, compile: bool | None) -> None:
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
        self._move = self._run_as(self._meta, self._meta)

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
            of_group, leaf = self._rates(run, sizes, keep, rates), run.leaves[0]
            arrays = {"param": param, "grad": grad, "count": leaf.state["step"], **run.state}
            total = self._pass(fused, run)(leaf.rule, arrays | of_group.of(run))
            sums.append((run, total, of_group.awake))
            run.written(param)
        z, _ = self._total(sums, ())
        self._move_beta(z, self._awake(grads), None)

    def _in_two_passes(self, grads: Mapping[str, Tensor]) -> Tensor | None:
        vectors, sums, lost = self._vectors, [], []
        for run in self._runs.values():
            _, grad = run.buffers([grads[leaf.name] for leaf in run.leaves])
            arrays = {"grad": grad, "trace": run.state["trace"]}
            total, flag = self._pass(products, run)(run.leaves[0].rule, arrays)
            sums.append((run, total, _awake(run.leaves[0].group)))
            lost.append((run, flag))
        z, count = self._total(sums, lost if self._config.skip_nonfinite else ())
        accepted = None if count is None else count == 0.0
        keep = usable(z)
        sizes = self._config.slopes(vectors["beta"])
        self._move_beta(z, self._awake(grads), accepted)
        if self._config.meta_first:
            sizes = self._config.slopes(vectors["beta"])
        rates: dict[Any, Rates] = {}
        for run in self._runs.values():
            param, grad = run.buffers([grads[leaf.name] for leaf in run.leaves])
            of_group, leaf = self._rates(run, sizes, keep, rates), run.leaves[0]
            arrays = {"param": param, "grad": grad, "count": leaf.state["step"], **run.state}
            if accepted is not None:
                arrays["accepted"] = accepted.to(run.device)
            self._pass(moved, run)(leaf.rule, arrays | of_group.of(run))
            run.written(param)
        return accepted

    def _rates(
        self, run: Run, sizes: tuple[Tensor, Tensor], keep: Tensor, known: dict[Any, Rates]
    ) -> Rates:
        """Return what the run's group makes of the step sizes and their slopes."""
        leaf = run.leaves[0]
        key = (id(leaf.group), leaf.dtype, run.device)
        if key in known:
            return known[key]
        lr, decay = leaf.group["lr"], leaf.group["weight_decay"]
        discount, one = (
            self._constant(value, leaf.dtype, run.device) for value in (self._config.discount, 1.0)
        )
        if isinstance(lr, Tensor):
            lr = lr.to(run.device, leaf.dtype).reshape(())
            discount = torch.where(lr != 0.0, discount, one)
        elif lr == 0.0:
            discount = one
        value, slope = (size.to(run.device, leaf.dtype) for size in sizes)
        shared = sizes[1] is sizes[0]
        if isinstance(lr, Tensor) or lr != 1.0:
            value, slope = value * lr, slope if shared else slope * lr
        by_block = {"lr": value} if shared else {"lr": value, "lr_trace": slope}
        single = {"discount": discount}
        if decay is not None:  # an argument of the pass, for it may have a schedule
            single["weight_decay"] = self._constant(float(decay), leaf.dtype, run.device)
        by_block["keep"] = keep.to(run.device)
        known[key] = Rates(by_block, single, _awake(leaf.group))
        return known[key]

    def _constant(self, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (value, dtype, device)
        if key not in self._constants:
            if len(self._constants) > 100:  # a schedule leaves one behind every step
                self._constants.clear()
            self._constants[key] = torch.full((), value, dtype=dtype, device=device)
        return self._constants[key]

    def _pass(self, make: Callable[[Kind], Pass], run: Run) -> Pass:
        leaf = run.leaves[0]
        maximize = bool(leaf.group["maximize"])
        known = run.passes.get((make, maximize))
        if known is None:
            rounding = self._rounding if leaf.param.dtype != leaf.dtype else "nearest"
            kind = Kind(self._config.trace, maximize, rounding, not run.flat)
            if (make, kind) not in self._passes:
                function = make(kind)
                self._passes[make, kind] = self._run_as(function, in_chunks(function))
            known = run.passes[make, maximize] = self._passes[make, kind]
        return known

    def _run_as(self, function: Pass, eager: Pass) -> Pass:
        if self._compile is False:
            return eager
        return Compiled(function, eager if self._compile is None else None)

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
            flags[name] = _awake(self._leaves[name].group)
        return awake_families(self._plan, flags, self._vectors["step"])

    def _move_beta(self, z: Tensor, awake: Any, accepted: Tensor | None) -> None:
        vectors = self._vectors
        names = ("beta", "meta_count", "restarts", "meta_grad")
        arrays = {"z": z} | {name: vectors[name] for name in names} | vectors.slots
        if awake is not None:
            arrays["awake"] = awake
        if accepted is not None:
            arrays["accepted"] = accepted
        self._move(self._config.meta, arrays)

    def _meta(self, rule: Rule, arrays: Arrays) -> None:
        """Write the meta update of all blocks, where the step is accepted."""
        blocks, z, beta = self._plan.blocks, arrays["z"], arrays["beta"]
        step = meta_pass(
            rule,
            blocks,
            z,
            usable(z),
            beta,
            {slot: arrays[slot] for slot in rule.slots},
            arrays["meta_count"],
            arrays["restarts"],
            meta_lr=self._config.meta_lr,
            awake=arrays.get("awake"),
            bounds=self._config.limits(blocks, beta),
            beta_trace={},
            held_trace={},
        )
        written = {
            "beta": step.beta,
            "meta_count": step.meta_count,
            "restarts": step.restarts,
            "meta_grad": z,
        }
        accepted = arrays.get("accepted")
        for name, new in (written | step.meta_slots).items():
            old = arrays[name]
            old.copy_(new if accepted is None else torch.where(accepted, new, old))


def _awake(group: Mapping[str, Any]) -> Any:
    """Say whether the leaves of a group move."""
    lr = group["lr"]
    return lr.reshape(()) != 0.0 if isinstance(lr, Tensor) else lr != 0.0
