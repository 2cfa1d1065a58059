"""The Hessian-free step: passes over buckets of leaves, one sum for each mesh or group."""

import itertools
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.leaf import usable
from metaopt.meta import begun, carried
from metaopt.rules.rule import is_opaque
from metaopt_torch.block_update import BlockUpdate
from metaopt_torch.buckets import Bucket, Buckets
from metaopt_torch.build import Built
from metaopt_torch.compiler import Compiled, Eager, Once, in_chunks, placement
from metaopt_torch.frozen import all_finite
from metaopt_torch.leaf import Leaf
from metaopt_torch.meta_gradient import Partial
from metaopt_torch.pass_inputs import PassInputs
from metaopt_torch.passes import Arrays, Kind, Pass, fused, moved, products, stepped

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
        self._blocks = BlockUpdate.of_step_sizes(built)
        self._numbers = {name: BlockUpdate.of_number(built, name) for name in built.plan.learned}
        self._all_buckets = Buckets()
        #: Those of the leaves that have gradients, and all that they and their kernels depend on.
        self._buckets: list[Bucket] = []
        self._signature: Hashable = None
        for name, blocks in (("", self._blocks), *self._numbers.items()):
            known = None if before is None else before._all_blocks.get(name)
            if known is not None and blocks.same(known):
                blocks.update = known.update
            else:
                blocks.update = self._runner(blocks.meta, blocks.meta)

    @property
    def _all_blocks(self) -> dict[str, "BlockUpdate"]:
        return {"": self._blocks, **self._numbers}

    def step(
        self, grads: Mapping[str, Tensor], meta_grads: Mapping[str, Tensor] | None = None
    ) -> bool:
        """Make a step of the leaves that have a gradient.

        Returns whether leaves have been packed anew, so that their state lies elsewhere.
        `meta_grads` are what z is made with, None for the gradients themselves.
        """
        leaves = [self._built.leaves[name] for name in grads]
        options = torch.get_num_threads(), self._inputs.read_groups()
        signature = options, tuple([(leaf, leaf.layouts) for leaf in leaves])
        packed = signature != self._signature  # most steps: all is ready since the last one
        if packed:
            self._signature = None  # until all of it is ready
            for leaf, grad in zip(leaves, grads.values(), strict=True):
                leaf.grad_dtype = grad.dtype
            self._buckets = self._all_buckets.of(leaves)
            for blocks in self._all_blocks.values():
                blocks.meta_gradient.repacked()
                blocks.present = blocks.meta_gradient.present(grads)
            self._prepare(grads, options)
            self._signature = signature
        accepted = None
        if self._built.frozen:
            accepted = self._as_learned(grads)
        elif self._built.z_first:
            accepted = self._in_two_passes(grads, meta_grads)
        else:
            self._in_one_pass(grads)
        self._count(leaves, accepted)
        return packed

    def opened(self, leaves: Sequence[Leaf]) -> "Opened":
        """Begin a step of some of these leaves, whose gradients come one after the other.

        Not where z comes first; `Opened.close` makes the rest of the step.
        """
        self._signature = None  # it packs leaves in its own way
        return Opened(self, leaves)

    def _count(self, leaves: Sequence[Leaf], accepted: Tensor | None) -> None:
        """Count a step of these leaves, if it is accepted."""
        self._built.count([leaf.name for leaf in leaves], accepted)
        mark = next(_steps)
        for leaf in leaves:
            # of steps that may be refused the host does not know how many were made
            leaf.history = leaf.history + 1 if accepted is None else hash((leaf.history, mark))

    def _prepare(self, grads: Mapping[str, Tensor], options: Hashable) -> None:
        """Compile what a step of these leaves needs, before any of it writes.

        Buckets that are ready for such gradients, under the same options, are passed over.
        """
        inputs = self._inputs_as_learned()
        refused = None
        if self._config.skip_nonfinite:
            refused = torch.ones((), dtype=torch.bool, device=self._block_state["beta"].device)
        # a pass that fails to compile raises here, while parameters and state are as they were
        for bucket in self._buckets:
            self._prepare_bucket(bucket, grads, options, inputs, refused)
        for blocks in () if self._built.frozen else self._all_blocks.values():
            blocks.prepared(torch.zeros_like(blocks["meta_grad"]), refused)

    def _prepare_bucket(
        self,
        bucket: Bucket,
        grads: Mapping[str, Tensor],
        options: Hashable,
        inputs: Inputs,
        refused: Tensor | None,
    ) -> None:
        ready = options, [leaf.layouts for leaf in bucket.leaves]
        if bucket.ready == ready or self._left_to_others(bucket):
            return
        bucket.ready, bucket.kernels = None, {}
        param, grad = self._buffers(bucket, grads)
        if self._built.z_first and not self._built.frozen:
            self._kernel(products, bucket, _of_product(bucket, param, grad))
        arrays = _of_move(bucket, param, grad, inputs, refused)
        self._kernel(self._mover, bucket, arrays)
        bucket.ready = ready

    @property
    def _mover(self) -> Callable[[Kind], Pass]:
        """What makes the pass that moves the parameters."""
        if self._built.frozen:
            return stepped
        return moved if self._built.z_first else fused

    def _left_to_others(self, bucket: Bucket) -> bool:
        """Say whether a step has nothing to do here: others step, and no average is kept."""
        return self._built.frozen and is_opaque(bucket.leaves[0].rule)

    def _inputs_as_learned(self) -> Inputs:
        """Return the inputs at the values that are learned, with every trace going on."""
        numbers = {
            name: number.inputs(number.sizes(), usable(number["beta"]))
            for name, number in self._numbers.items()
        }
        mask = usable(self._block_state["beta"])
        return self._inputs.of_step(self._blocks.sizes(), mask, numbers)

    def _as_learned(self, grads: Mapping[str, Tensor]) -> Tensor | None:
        """Make a step in which nothing is learned; return whether it was accepted, as above."""
        accepted = None
        if self._config.skip_nonfinite:
            accepted = all_finite(self._built, grads)
        inputs = self._inputs_as_learned()
        for bucket in self._buckets:
            if not self._left_to_others(bucket):
                self._pass(bucket, grads, inputs, accepted)
        return accepted

    def _in_one_pass(self, grads: Mapping[str, Tensor]) -> None:
        inputs = self._inputs_of_one_pass()
        self._learn(grads, [self._pass(bucket, grads, inputs) for bucket in self._buckets])

    def _inputs_of_one_pass(self) -> Inputs:
        state = self._block_state
        # z is not known before the traces are written: they restart by that of the last step
        mask = carried(state["meta_grad"], state["meta_count"])
        return self._inputs.of_step(self._blocks.sizes(), mask)

    def _pass(
        self,
        bucket: Bucket,
        grads: Mapping[str, Tensor],
        inputs: Inputs,
        accepted: Tensor | None = None,
    ) -> Partial:
        """Step a bucket, and return what it has for z."""
        param, grad = self._buffers(bucket, grads)
        arrays = _of_move(bucket, param, grad, inputs, accepted)
        sums = self._kernel(self._mover, bucket, arrays)(*arrays.values())
        bucket.written(param)
        return Partial(bucket, sums or (), self._inputs.active(bucket))

    def _learn(self, grads: Container[str], partials: Sequence[Partial]) -> None:
        """Move the step sizes by what buckets have for z, while they are learned."""
        if self._built.frozen:
            return
        (z,), _ = self._blocks.meta_gradient.total(grads, partials)
        self._blocks.move(begun(z, self._block_state["meta_count"]), None)

    def _in_two_passes(
        self, grads: Mapping[str, Tensor], meta_grads: Mapping[str, Tensor] | None
    ) -> Tensor | None:
        """Make a step whose passes need z; return whether it was accepted, None if all are."""
        skips = self._config.skip_nonfinite
        partials, of_numbers = self._partials(grads if meta_grads is None else meta_grads, grads)
        if meta_grads is not None and skips:  # these are to be finite as well, but count no more
            partials += [p._replace(active=False) for p in self._partials(grads, grads)[0]]
        others = [(self._numbers[name].meta_gradient, of_numbers[name]) for name in self._numbers]
        (z, *zs), lost = self._blocks.meta_gradient.total(grads, partials, others, count_lost=skips)
        accepted = None if lost is None else lost == 0.0
        sizes, mask = self._blocks.moved(z, accepted)
        numbers = {
            name: number.inputs(*number.moved(own, accepted))
            for (name, number), own in zip(self._numbers.items(), zs, strict=True)
        }
        inputs = self._inputs.of_step(sizes, mask, numbers)
        for bucket in self._buckets:
            param, grad = self._buffers(bucket, grads)
            arrays = _of_move(bucket, param, grad, inputs, accepted)
            self._kernel(moved, bucket, arrays)(*arrays.values())
            bucket.written(param)
        return accepted

    def _partials(
        self, sources: Mapping[str, Tensor], grads: Mapping[str, Tensor]
    ) -> tuple[list[Partial], dict[str, list[Partial]]]:
        """Return the sums of the buckets that have any source, and those of learned numbers.

        What z is made with is laid out as the gradients are.
        """
        partials: list[Partial] = []
        of_numbers: dict[str, list[Partial]] = {name: [] for name in self._numbers}
        for bucket in self._buckets:
            names = [leaf.name for leaf in bucket.leaves]
            if not any(name in sources for name in names):
                continue
            own = {name: _like(grads[name], sources.get(name)) for name in names}
            arrays = _of_product(bucket, *self._buffers(bucket, own))
            *sums, lost = self._kernel(products, bucket, arrays)(*arrays.values())
            skips = self._config.skip_nonfinite
            active = self._inputs.active(bucket)
            split = len(sums) - len(bucket.numbers)
            partials.append(Partial(bucket, sums[:split], active, lost if skips else None))
            for (number, _), total in zip(bucket.numbers, sums[split:], strict=True):
                of_numbers[number.name].append(Partial(bucket, [total], active))
        return partials, of_numbers

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
            horizons = self._built.plan.horizons
            numbers = tuple(number for number, _ in bucket.numbers)
            kind = Kind(maximize, rounding, bucket.summed_axes, bucket.whole, horizons, numbers)
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


class Opened:
    """A step whose gradients come one after the other; it is made in place.

    A bucket is stepped once the gradients of all its leaves have come. The numbers are those of
    `HessianFree.step`.

    Attributes
    ----------
    leaves : mapping of the id of a parameter to leaf
        Those of which gradients are expected.
    stepped : mapping of name to leaf
        Those that have made their step.
    """

    def __init__(self, engine: HessianFree, leaves: Sequence[Leaf]) -> None:
        self._engine = engine
        self._options = torch.get_num_threads(), engine._inputs.read_groups()
        self._inputs = engine._inputs_of_one_pass()
        for leaf in leaves:
            if leaf.grad_dtype is None:
                leaf.grad_dtype = leaf.param.dtype
        buckets = engine._all_buckets.of(leaves)
        self._bucket_of = {leaf: bucket for bucket in buckets for leaf in bucket.leaves}
        self._waiting: dict[Bucket | None, dict[str, Tensor]] = {}
        self._partials: list[Partial] = []
        self.stepped: dict[str, Leaf] = {}
        self.leaves = {id(leaf.param): leaf for leaf in leaves}

    def holds(self, leaf: Leaf) -> bool:
        """Return whether the gradient of a leaf has come."""
        bucket = self._bucket_of.get(leaf)
        return leaf.name in self.stepped or leaf.name in self._waiting.get(bucket, ())

    def arrived(self, leaf: Leaf, grad: Tensor) -> Sequence[Leaf]:
        """Take a leaf's gradient, and return the leaves that have been stepped for it.

        Raises
        ------
        TypeError
            If it has another dtype than those before.
        RuntimeError
            If one has come before, in this step.
        """
        if self.holds(leaf):
            msg = (
                f"A second gradient of {leaf.name!r} has come since the last `step`, which has to "
                "be called after each backward pass where parameters step in it."
            )
            raise RuntimeError(msg)
        if grad.dtype != leaf.grad_dtype:
            msg = (
                f"The gradient of {leaf.name!r} must be {leaf.grad_dtype} where parameters step in "
                f"the backward pass; got {grad.dtype}."
            )
            raise TypeError(msg)
        bucket = self._bucket_of.get(leaf)
        if bucket is None:  # it has no numbers
            return self._step([leaf], {})
        waiting = self._waiting.setdefault(bucket, {})
        waiting[leaf.name] = grad
        return self._step(bucket.leaves, waiting) if len(waiting) == len(bucket.leaves) else ()

    def close(self, order: Mapping[str, Leaf]) -> None:
        """Step the leaves whose buckets have not come to an end, and move the step sizes.

        `order` has all leaves, in the order in which a step takes them.
        """
        engine = self._engine
        waiting = {name: grad for some in self._waiting.values() for name, grad in some.items()}
        rest = [leaf for name, leaf in order.items() if name in waiting]
        buckets = engine._all_buckets.of(rest)
        self._bucket_of |= {leaf: bucket for bucket in buckets for leaf in bucket.leaves}
        for bucket in buckets:
            self._step(bucket.leaves, waiting)
        place = {name: index for index, name in enumerate(order)}

        def first(partial: Partial) -> int:
            return min(place[leaf.name] for leaf in partial.bucket.leaves)

        partials = sorted(self._partials, key=first)  # sums are to be those of a step at once
        leaves = [leaf for name, leaf in order.items() if name in self.stepped]
        packed = [partial.bucket for partial in partials]
        if packed != engine._buckets:
            engine._blocks.meta_gradient.repacked()
            engine._buckets = packed
        engine._blocks.present = engine._blocks.meta_gradient.present(self.stepped)
        engine._learn(self.stepped, partials)
        engine._count(leaves, None)

    def _step(self, leaves: Sequence[Leaf], grads: Mapping[str, Tensor]) -> Sequence[Leaf]:
        bucket = self._bucket_of.get(leaves[0])
        if bucket is not None:
            engine = self._engine
            engine._prepare_bucket(bucket, grads, self._options, self._inputs, None)
            self._partials.append(engine._pass(bucket, grads, self._inputs))
            self._waiting.pop(bucket, None)
        self.stepped |= {leaf.name: leaf for leaf in leaves}
        return leaves


def _like(grad: Tensor, source: Tensor | None) -> Tensor:
    """Return what z is made with in the gradient's dtype, 0 where there is none."""
    return torch.zeros_like(grad) if source is None else source.to(grad.dtype)


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
    leaf = bucket.leaves[0]
    traces = [number.key("trace") for number, _ in bucket.numbers]
    kept = {key: bucket.state[key] for key in (*leaf.exchanged, *traces) if key in bucket.state}
    if kept.keys().isdisjoint(leaf.averages):
        return {"grad": grad, **kept}
    return {"grad": grad, "param": param, "count": leaf.state["step"], **kept}
