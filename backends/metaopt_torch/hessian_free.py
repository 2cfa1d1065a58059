"""The Hessian-free step: runs of leaves, one pass over memory, one sum for each mesh or group."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.blocks import Blocks
from metaopt.passes import begun, carried, meta_pass, usable
from metaopt.rules import Rule
from metaopt.step_sizes import step_size_map
from metaopt_torch.build import Built
from metaopt_torch.compiler import Compiled, Eager, Once, in_chunks, placement
from metaopt_torch.groups import multiplier_of
from metaopt_torch.hyperparameters import adjusted, arguments, as_numbers, hyperparameters
from metaopt_torch.passes import Arrays, Kind, Pass, fused, moved, products
from metaopt_torch.runs import Leaf, Run, Runs
from metaopt_torch.shards import summed

__all__ = ["HessianFree"]

#: Process-wide step counter, used in the histories of leaves.
_steps = itertools.count()


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
    before : HessianFree, optional
        What made steps until now, and has compiled passes.
    """

    def __init__(
        self,
        built: Built,
        rounding: str,
        compile: bool | None,
        before: "HessianFree | None" = None,
    ) -> None:
        self._built, self._rounding, self._compile = built, rounding, compile
        self._config, self._plan = built.config, built.plan
        self._leaves, self._vectors = built.leaves, built.vectors
        self._passes: dict[Any, Compiled | Eager] = {} if before is None else before._passes
        self._warning: Once = Once() if before is None else before._warning
        self._constants: dict[Any, Tensor] = {}
        self._signature: Any = None
        self._groups = {id(leaf.group): leaf.group for leaf in built.leaves.values()}
        self._lr: dict[int, Any] = {}
        self._all_runs = Runs()
        #: Those of the leaves that have gradients.
        self._runs: list[Run] = []
        #: The rules and groups that go together, by identity, with the rules' hyperparameters.
        self._pairs = {
            _pair(leaf): (leaf.rule, leaf.group, hyperparameters(leaf.rule))
            for leaf in built.leaves.values()
        }
        self._handed: dict[tuple[int, int], dict[str, Any]] = {}
        self._indices: dict[Any, Tensor] = {}
        #: Which blocks have a leaf with a gradient, and what that was for families with one.
        self._present: Tensor = torch.ones((), dtype=torch.bool)
        self._present_of: dict[frozenset[str], Tensor] = {}
        #: Whether the meta-gradient has to be known before a parameter is written.
        self.two_passes = built.config.meta_first or built.config.skip_nonfinite
        meta = _meta(self._config, self._plan.blocks, tuple(self._vectors.slots))
        self._move = self._run_as(meta, meta)
        if before is not None and _same_meta(before._built, built):
            self._move = before._move

    def step(self, grads: Mapping[str, Tensor]) -> bool:
        """Make a step of the leaves that have a gradient.

        Parameters
        ----------
        grads : mapping of leaf name to tensor

        Returns
        -------
        bool
            Whether leaves have been packed anew, so that their state lies elsewhere.
        """
        self._lr = {key: multiplier_of(group) for key, group in self._groups.items()}
        self._look_at_groups()
        signature = self._signature_of(grads)
        packed = signature != self._signature
        if packed:
            self._signature = None  # until all of it is ready
            self._indices = {}
            for name, grad in grads.items():
                self._leaves[name].grad_dtype = grad.dtype
            self._runs = self._all_runs.of([self._leaves[name] for name in grads])
            self._present = self._blocks_present(grads)
            self._prepare(grads, signature[:-1])
            self._signature = signature
        accepted = None
        if self.two_passes:
            accepted = self._in_two_passes(grads)
        else:
            self._in_one_pass(grads)
        self._built.counts.advance(list(grads), accepted)
        mark = next(_steps)
        for name in grads:
            leaf = self._leaves[name]
            # of steps that may be refused the host does not know how many were made
            leaf.history = leaf.history + 1 if accepted is None else hash((leaf.history, mark))
        one = (
            torch.ones_like(self._vectors["step"]) if accepted is None else accepted.to(torch.int32)
        )
        self._vectors["step"].add_(one)
        self._vectors["skipped"].add_(1 - one)
        return packed

    def _look_at_groups(self) -> None:
        """See what groups say of hyperparameters, which schedules change."""
        handed = {key: arguments(own, group) for key, (_, group, own) in self._pairs.items()}
        if handed != self._handed:
            for rule, group, _ in self._pairs.values():
                adjusted(rule, group, {})  # which raises where that cannot be
            self._handed = handed

    def _signature_of(self, grads: Mapping[str, Tensor]) -> Any:
        """Return all that runs, and the kernels that step them, depend on."""
        options = [
            (
                None if isinstance(self._lr[key], Tensor) else self._lr[key] == 0.0,
                bool(group["maximize"]),
            )
            for key, group in self._groups.items()
        ]
        changed = [tuple(named) for named in self._handed.values()]
        leaves = [(leaf, leaf.layouts) for leaf in map(self._leaves.__getitem__, grads)]
        return torch.get_num_threads(), tuple(options), tuple(changed), tuple(leaves)

    def _prepare(self, grads: Mapping[str, Tensor], options: Any) -> None:
        """Compile what a step of these leaves needs, before any of it writes.

        Runs that are ready for such gradients, under the same options, are passed over.
        """
        beta = self._vectors["beta"]
        sizes, keep = self._config.slopes(beta), usable(beta)
        accepted = torch.ones((), dtype=torch.bool, device=beta.device)
        refused = accepted if self._config.skip_nonfinite else None
        make, rates = moved if self.two_passes else fused, dict[Any, Rates]()
        for run in self._runs:
            own = [grads[leaf.name] for leaf in run.leaves]
            ready = options, [leaf.layouts for leaf in run.leaves]
            if run.ready == ready:
                continue
            run.ready, run.kernels = None, {}
            param, grad = run.buffers(own)
            if self.two_passes:
                self._kernel(products, run, _of_product(run, param, grad))
            arrays = self._arrays(run, param, grad, self._rates(run, sizes, keep, rates), refused)
            self._kernel(make, run, arrays)
            run.ready = ready
        arrays = self._of_blocks(torch.zeros_like(beta), refused)
        self._move.prepared(self._config.meta, arrays)

    def _buffers(self, grads: Mapping[str, Tensor]) -> Iterator[tuple[Run, Tensor, Tensor]]:
        for run in self._runs:
            yield run, *run.buffers([grads[leaf.name] for leaf in run.leaves])

    def _in_one_pass(self, grads: Mapping[str, Tensor]) -> None:
        vectors, sums = self._vectors, []
        sizes, keep = self._config.slopes(vectors["beta"]), self._carried(vectors["meta_grad"])
        rates: dict[Any, Rates] = {}
        for run, param, grad in self._buffers(grads):
            of_group = self._rates(run, sizes, keep, rates)
            arrays = self._arrays(run, param, grad, of_group, None)
            total = self._kernel(fused, run, arrays)(*arrays.values())
            sums.append((run, total, of_group.awake))
            run.written(param)
        z, _ = self._total(grads, sums, None)
        self._move_beta(z, None)

    def _in_two_passes(self, grads: Mapping[str, Tensor]) -> Tensor | None:
        # of a copy, for with sigma="identity" step sizes are beta itself
        sizes = self._config.slopes(self._vectors["beta"].clone())
        sums, lost = [], []
        for run, param, grad in self._buffers(grads):
            arrays = _of_product(run, param, grad)
            total, flag = self._kernel(products, run, arrays)(*arrays.values())
            sums.append((run, total, self._moves(run.leaves[0].group)))
            lost.append((run, flag))
        z, count = self._total(grads, sums, lost if self._config.skip_nonfinite else None)
        accepted = None if count is None else count == 0.0
        keep = self._carried(z)
        self._move_beta(z, accepted)
        if self._config.meta_first:
            sizes = self._config.slopes(self._vectors["beta"])
        rates: dict[Any, Rates] = {}
        for run, param, grad in self._buffers(grads):
            of_group = self._rates(run, sizes, keep, rates)
            arrays = self._arrays(run, param, grad, of_group, accepted)
            self._kernel(moved, run, arrays)(*arrays.values())
            run.written(param)
        return accepted

    def _arrays(
        self, run: Run, param: Tensor, grad: Tensor, of_group: Rates, accepted: Tensor | None
    ) -> dict[str, Tensor]:
        """Return what the passes `fused` and `moved` take."""
        count = run.leaves[0].state["step"]
        arrays = {"param": param, "grad": grad, "count": count, **run.state, **of_group.of(run)}
        if accepted is not None:
            arrays["accepted"] = accepted.to(run.device)
        return arrays

    def _rates(
        self, run: Run, sizes: tuple[Tensor, Tensor], keep: Tensor, known: dict[Any, Rates]
    ) -> Rates:
        """Return what the run's group makes of the step sizes and their slopes."""
        leaf = run.leaves[0]
        key = (*_pair(leaf), leaf.dtype, run.device)
        if key in known:
            return known[key]
        lr = self._lr[id(leaf.group)]
        discount, one = (
            self._constant(value, leaf.dtype, run.device) for value in (self._config.discount, 1.0)
        )
        if isinstance(lr, Tensor):
            discount = torch.where((lr != 0.0).to(run.device), discount, one)
            lr = lr.to(run.device, leaf.dtype)
        elif lr == 0.0:
            discount = one
        value, slope = (size.to(run.device, leaf.dtype) for size in sizes)
        shared = sizes[1] is sizes[0]
        if isinstance(lr, Tensor) or lr != 1.0:
            value, slope = value * lr, slope if shared else slope * lr
        by_block = {"lr": value} if shared else {"lr": value, "lr_trace": slope}
        single = {"discount": discount}
        # arguments of the pass, for they may have schedules
        for name, number in as_numbers(self._handed[_pair(leaf)]).items():
            single[name] = self._constant(number, leaf.dtype, run.device)
        by_block["keep"] = keep.to(run.device)
        known[key] = Rates(by_block, single, self._moves(leaf.group))
        return known[key]

    def _constant(self, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (value, dtype, device)
        if key not in self._constants:
            if len(self._constants) > 100:  # a schedule leaves one behind every step
                self._constants.clear()
            self._constants[key] = torch.full((), value, dtype=dtype, device=device)
        return self._constants[key]

    def _kernel(self, make: Callable[[Kind], Pass], run: Run, arrays: Arrays) -> Callable[..., Any]:
        """Return what is called with the values of `arrays`.

        It is looked up once for a run, whose arrays are laid out alike in all steps of one
        signature; on a GPU, once for all ways in which they are aligned.
        """
        key: Any = make if run.device.type == "cpu" else (make, placement(arrays))
        known = run.kernels.get(key)
        if known is None:
            leaf = run.leaves[0]
            rounding = self._rounding if leaf.param.dtype != leaf.dtype else "nearest"
            maximize = bool(leaf.group["maximize"])
            kind = Kind(self._config.trace, maximize, rounding, run.summed, run.whole)
            if (make, kind) not in self._passes:
                function = make(kind)
                eager = function if run.whole else in_chunks(function)
                self._passes[make, kind] = self._run_as(function, eager)
            known = run.kernels[key] = self._passes[make, kind].prepared(leaf.rule, arrays)
        return known

    def _run_as(self, function: Pass, eager: Pass) -> Compiled | Eager:
        otherwise = Eager(eager)
        if self._compile is False:
            return otherwise
        return Compiled(function, otherwise if self._compile is None else None, self._warning)

    def _total(
        self,
        grads: Mapping[str, Tensor],
        sums: Sequence[tuple[Run, Tensor, Any]],
        lost: Sequence[tuple[Run, Tensor]] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return z, and in how many runs a gradient is not finite.

        Both are sums over all devices. These have to agree on which meshes and groups there are and
        in which order, so these come from the leaves: a device may hold nothing of some, and no
        gradient of a part of a group's.
        """
        parts: dict[Any, tuple[list[Any], list[Any]]] = {
            leaf.part.over: ([], [])
            for name, leaf in self._leaves.items()
            if name in grads or leaf.part.group is not None
        }
        for entry in sums:
            parts[entry[0].over][0].append(entry)
        for run, flag in lost or ():
            parts[run.over][1].append(flag)
        beta = self._vectors["beta"]
        size = len(beta) + (lost is not None)
        total = torch.zeros(size, dtype=beta.dtype, device=beta.device)
        for index, (over, (of_these, flags)) in enumerate(parts.items()):
            vector = self._vector(of_these, None if lost is None else flags)
            vector = vector if over is None else summed(vector, over)
            total = vector if index == 0 else total + vector
        z, count = (total, None) if lost is None else (total[:-1], total[-1])
        return begun(z, self._vectors["meta_count"]), count

    def _vector(self, sums: Sequence[Any], flags: Sequence[Tensor] | None) -> Tensor:
        """Return this device's part of z, over runs of one mesh; the last entry is of `flags`."""
        beta, counted = self._vectors["beta"], []
        for run, total, awake in sums:
            if awake is False or not run.counts:
                continue
            part = total if awake is True else torch.where(awake, total, 0.0)
            if part.dtype is not beta.dtype or run.device != beta.device:
                part = part.to(beta.device, beta.dtype)
            counted.append((run, part))
        if not counted:
            z = torch.zeros_like(beta)
        elif len(beta) == 1:
            z = torch.stack([part for _, part in counted]).sum().reshape(1)
        else:
            z = torch.zeros_like(beta).index_add_(
                0,
                self._index([run for run, _ in counted]),
                torch.cat([part.reshape(-1) for _, part in counted]),
            )
        if flags is None:
            return z
        lost = torch.zeros(1, dtype=z.dtype, device=z.device)
        if flags:
            found = torch.stack([flag.to(beta.device) for flag in flags])
            lost = found.any().to(z.dtype).reshape(1)
        return torch.cat([z, lost])

    def _index(self, runs: Sequence[Run]) -> Tensor:
        """Return the block of each of the runs' sums."""
        key = tuple(id(run) for run in runs)
        if key not in self._indices:
            device = self._vectors["beta"].device
            self._indices[key] = torch.cat([run.blocks.to(device) for run in runs])
        return self._indices[key]

    def _moves(self, group: Mapping[str, Any]) -> Any:
        """Say whether the leaves of a group move."""
        return self._lr[id(group)] != 0.0

    def _carried(self, z: Tensor) -> Tensor:
        """Say of which blocks the traces go on."""
        return carried(z, self._vectors["meta_count"])

    def _blocks_present(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Say which blocks have a leaf with a gradient.

        Where processes hold parts of leaves, one of them may lack a gradient that others have.
        """
        blocks, device = self._plan.blocks, self._vectors["beta"].device
        families = frozenset(
            blocks.family_of[name]
            for name, leaf in self._leaves.items()
            if name in grads or leaf.part.group is not None
        )
        if families not in self._present_of:
            if len(self._present_of) > 100:  # layers that are dropped at random
                self._present_of.clear()
            sizes = ((key in families, family.size) for key, family in blocks.families.items())
            flags = [flag for flag, size in sizes for _ in range(size)]
            self._present_of[families] = torch.tensor(flags, device=device)
        return self._present_of[families]

    def _move_beta(self, z: Tensor, accepted: Tensor | None) -> None:
        arrays = self._of_blocks(z, accepted)
        self._move.prepared(self._config.meta, arrays)(*arrays.values())

    def _of_blocks(self, z: Tensor, accepted: Tensor | None) -> dict[str, Tensor]:
        """Return what the meta update takes."""
        vectors = self._vectors
        names = ("beta", "meta_count", "restarts", "meta_grad")
        arrays = {"z": z, "present": self._present}
        arrays |= {name: vectors[name] for name in names} | vectors.slots
        if accepted is not None:
            arrays["accepted"] = accepted
        return arrays


def _pair(leaf: Leaf) -> tuple[int, int]:
    return id(leaf.rule), id(leaf.group)


def _of_product(run: Run, param: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return what the pass `products` takes."""
    if "trace" in run.state:
        return {"grad": grad, "trace": run.state["trace"]}
    count = run.leaves[0].state["step"]
    return {"grad": grad, "param": param, "average": run.state["average"], "count": count}


def _meta(config: mo.MetaOptimize, blocks: Blocks, slots: Sequence[str]) -> Pass:
    """Return what writes the meta update of all blocks, where the step is accepted.

    It outlives the optimizer's state, so it holds none of it.
    """

    def run(rule: Rule, arrays: Arrays) -> None:
        z, beta = arrays["z"], arrays["beta"]
        step = meta_pass(
            rule,
            blocks,
            step_size_map(config.sigma),
            z,
            beta,
            {slot: arrays[slot] for slot in slots},
            arrays["meta_count"],
            arrays["restarts"],
            meta_lr=config.meta_lr,
            bounds=config.limits(blocks, beta),
            present=arrays["present"],
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

    return run


def _same_meta(one: Built, other: Built) -> bool:
    """Say whether the meta updates of two optimizers are one function."""
    return (
        one.plan.blocks == other.plan.blocks
        and one.config.meta is other.config.meta
        and one.config.bounds == other.config.bounds
    )
