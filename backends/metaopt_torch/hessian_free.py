"""The Hessian-free step: passes over buckets of leaves, one sum for each mesh or group."""

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import metaopt as mo
from metaopt.blocks import Blocks
from metaopt.jets import Jet
from metaopt.leaf import usable
from metaopt.meta import BlockRow, begun, carried, meta_step
from metaopt.rules import Rule
from metaopt_torch.buckets import Bucket, Buckets
from metaopt_torch.build import Built
from metaopt_torch.compiler import Compiled, Eager, Once, in_chunks, placement
from metaopt_torch.meta_gradient import MetaGradient, Partial
from metaopt_torch.pass_inputs import PassInputs
from metaopt_torch.passes import Arrays, Kind, Pass, fused, moved, products

__all__ = ["HessianFree"]

#: Process-wide step counter, used in the histories of leaves.
_steps = itertools.count()

#: Gives each bucket what passes take beside its buffers.
Inputs = Callable[[Bucket], dict[str, Tensor]]


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
        self._config, self._block_state = built.config, built.block_state
        self._passes: dict[Any, Compiled | Eager] = {} if before is None else before._passes
        self._warning: Once = Once() if before is None else before._warning
        self._inputs = PassInputs(built.config, built.leaves.values())
        self._meta_gradient = MetaGradient(built)
        self._all_buckets = Buckets()
        #: Those of the leaves that have gradients, and all that they and their kernels depend on.
        self._buckets: list[Bucket] = []
        self._signature: Hashable = None
        #: Which blocks have a leaf with a gradient.
        self._present = torch.ones((), dtype=torch.bool)
        meta = _meta(self._config, built.plan.blocks, tuple(self._block_state.slots))
        self._meta_update = self._runner(meta, meta)
        if before is not None and _same_meta(before._built, built):
            self._meta_update = before._meta_update

    def step(self, grads: Mapping[str, Tensor]) -> bool:
        """Make a step of the leaves that have a gradient.

        Returns whether leaves have been packed anew, so that their state lies elsewhere.
        """
        leaves = [self._built.leaves[name] for name in grads]
        options = torch.get_num_threads(), self._inputs.read_groups()
        signature = options, tuple([(leaf, leaf.layouts) for leaf in leaves])
        packed = signature != self._signature  # most steps: all is ready since the last one
        if packed:
            self._signature = None  # until all of it is ready
            for leaf, grad in zip(leaves, grads.values(), strict=True):
                leaf.grad_dtype = grad.dtype
            self._meta_gradient.repacked()
            self._buckets = self._all_buckets.of(leaves)
            self._present = self._meta_gradient.present(grads)
            self._prepare(grads, options)
            self._signature = signature
        accepted = None
        if self._built.z_first:
            accepted = self._in_two_passes(grads)
        else:
            self._in_one_pass(grads)
        self._built.counts.advance(list(grads), accepted)
        mark = next(_steps)
        for leaf in leaves:
            # of steps that may be refused the host does not know how many were made
            leaf.history = leaf.history + 1 if accepted is None else hash((leaf.history, mark))
        step, skipped = self._block_state["step"], self._block_state["skipped"]
        one = torch.ones_like(step) if accepted is None else accepted.to(torch.int32)
        step.add_(one)
        skipped.add_(1 - one)
        return packed

    def _prepare(self, grads: Mapping[str, Tensor], options: Hashable) -> None:
        """Compile what a step of these leaves needs, before any of it writes.

        Buckets that are ready for such gradients, under the same options, are passed over.
        """
        beta = self._block_state["beta"]
        inputs = self._inputs.of_step(self._config.slopes(beta), usable(beta))
        refused = None
        if self._config.skip_nonfinite:
            refused = torch.ones((), dtype=torch.bool, device=beta.device)
        # a pass that fails to compile raises here, while parameters and state are as they were
        for bucket in self._buckets:
            ready = options, [leaf.layouts for leaf in bucket.leaves]
            if bucket.ready == ready:
                continue
            bucket.ready, bucket.kernels = None, {}
            param, grad = self._buffers(bucket, grads)
            if self._built.z_first:
                self._kernel(products, bucket, _of_product(bucket, param, grad))
            arrays = _of_move(bucket, param, grad, inputs, refused)
            self._kernel(moved if self._built.z_first else fused, bucket, arrays)
            bucket.ready = ready
        self._meta_update.prepared(
            self._config.meta, self._of_blocks(torch.zeros_like(beta), refused)
        )

    def _in_one_pass(self, grads: Mapping[str, Tensor]) -> None:
        state, partials = self._block_state, []
        # z is not known before the traces are written: they restart by that of the last step
        keep = carried(state["meta_grad"], state["meta_count"])
        inputs = self._inputs.of_step(self._config.slopes(state["beta"]), keep)
        for bucket in self._buckets:
            param, grad = self._buffers(bucket, grads)
            arrays = _of_move(bucket, param, grad, inputs, None)
            product = self._kernel(fused, bucket, arrays)(*arrays.values())
            partials.append(Partial(bucket, product, self._inputs.active(bucket)))
            bucket.written(param)
        z = self._meta_gradient.total(grads, partials, count_lost=False)
        self._move_beta(begun(z, state["meta_count"]), None)

    def _in_two_passes(self, grads: Mapping[str, Tensor]) -> Tensor | None:
        """Make a step whose passes need z; return whether it was accepted, None if all are."""
        state, partials, skips = self._block_state, [], self._config.skip_nonfinite
        # of a copy, for with sigma="identity" step sizes are beta itself
        sizes = self._config.slopes(state["beta"].clone())
        for bucket in self._buckets:
            arrays = _of_product(bucket, *self._buffers(bucket, grads))
            product, lost = self._kernel(products, bucket, arrays)(*arrays.values())
            active = self._inputs.active(bucket)
            partials.append(Partial(bucket, product, active, lost if skips else None))
        total = self._meta_gradient.total(grads, partials, count_lost=skips)
        accepted = total[-1] == 0.0 if skips else None
        z = begun(total[:-1] if skips else total, state["meta_count"])
        keep = carried(z, state["meta_count"])
        self._move_beta(z, accepted)
        if self._config.meta_first:
            sizes = self._config.slopes(state["beta"])
        inputs = self._inputs.of_step(sizes, keep)
        for bucket in self._buckets:
            param, grad = self._buffers(bucket, grads)
            arrays = _of_move(bucket, param, grad, inputs, accepted)
            self._kernel(moved, bucket, arrays)(*arrays.values())
            bucket.written(param)
        return accepted

    def _buffers(self, bucket: Bucket, grads: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return bucket.buffers([grads[leaf.name] for leaf in bucket.leaves])

    def _kernel(
        self, make: Callable[[Kind], Pass], bucket: Bucket, arrays: Arrays
    ) -> Callable[..., Any]:
        """Return what is called with the values of `arrays`.

        It is looked up once for a bucket, whose arrays are laid out alike in all steps of one
        signature; on a GPU, once for all ways in which they are aligned.
        """
        key: Any = make if bucket.device.type == "cpu" else (make, placement(arrays))
        known = bucket.kernels.get(key)
        if known is None:
            leaf = bucket.leaves[0]
            rounding = self._rounding if leaf.param.dtype != leaf.dtype else "nearest"
            maximize = bool(leaf.group["maximize"])
            kind = Kind(maximize, rounding, bucket.summed_axes, bucket.whole)
            if (make, kind) not in self._passes:
                function = make(kind)
                eager = function if bucket.whole else in_chunks(function)
                self._passes[make, kind] = self._runner(function, eager)
            known = bucket.kernels[key] = self._passes[make, kind].prepared(leaf.rule, arrays)
        return known

    def _runner(self, function: Pass, eager: Pass) -> Compiled | Eager:
        otherwise = Eager(eager)
        if self._compile is False:
            return otherwise
        return Compiled(function, otherwise if self._compile is None else None, self._warning)

    def _move_beta(self, z: Tensor, accepted: Tensor | None) -> None:
        arrays = self._of_blocks(z, accepted)
        self._meta_update.prepared(self._config.meta, arrays)(*arrays.values())

    def _of_blocks(self, z: Tensor, accepted: Tensor | None) -> dict[str, Tensor]:
        """Return what the meta update takes."""
        names = ("beta", "meta_count", "restarts", "meta_grad")
        arrays = {"z": z, "present": self._present}
        arrays |= {name: self._block_state[name] for name in names} | self._block_state.slots
        if accepted is not None:
            arrays["accepted"] = accepted
        return arrays


def _of_move(
    bucket: Bucket, param: Tensor, grad: Tensor, inputs: Inputs, accepted: Tensor | None
) -> dict[str, Tensor]:
    """Return what the passes `fused` and `moved` take."""
    count = bucket.leaves[0].state["step"]
    arrays = {"param": param, "grad": grad, "count": count, **bucket.state, **inputs(bucket)}
    if accepted is not None:
        arrays["accepted"] = accepted.to(bucket.device)
    return arrays


def _of_product(bucket: Bucket, param: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return what the pass `products` takes."""
    if "trace" in bucket.state:
        return {"grad": grad, "trace": bucket.state["trace"]}
    count = bucket.leaves[0].state["step"]
    return {"grad": grad, "param": param, "average": bucket.state["average"], "count": count}


def _meta(config: mo.MetaOptimize, blocks: Blocks, slots: Sequence[str]) -> Pass:
    """Return what writes the meta update of all blocks, where the step is accepted.

    It outlives the optimizer's state, so it holds none of it.
    """

    def run(rule: Rule, arrays: Arrays) -> None:
        z, beta = arrays["z"], arrays["beta"]
        row = BlockRow(Jet(beta), {slot: Jet(arrays[slot]) for slot in slots}, arrays["meta_count"])
        row, restarts = meta_step(
            rule,
            config.sigma_map,
            row,
            Jet(z),
            meta_lr=config.meta_lr,
            bounds=config.limits(blocks, beta),
            present=arrays["present"],
        )
        written = {
            "beta": row.beta.value,
            "meta_count": row.count,
            "restarts": arrays["restarts"] + restarts,
            "meta_grad": z,
        }
        written |= {slot: jet.value for slot, jet in row.slots.items()}
        accepted = arrays.get("accepted")
        for name, new in written.items():
            old = arrays[name]
            old.copy_(new if accepted is None else torch.where(accepted, new, old))

    return run


def _same_meta(one: Built, other: Built) -> bool:
    """Return whether the meta updates of two optimizers are one function."""
    return (
        one.plan.blocks == other.plan.blocks
        and one.config.meta is other.config.meta
        and one.config.bounds == other.config.bounds
    )
