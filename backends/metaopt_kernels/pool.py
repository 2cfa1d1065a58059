"""A step in one pass: which leaves a kernel steps together, and what it is told.

Leaves of one rule and dtype share a kernel, called once for all of them. What belongs to the
optimizer lies where it lay in the step before, and its addresses are handed over once; gradients,
and arrays of the blocks, come anew with every step.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import metaopt as mo
from metaopt.arrays import Leaves, cast, map_leaves, namespace, per_leaf, solid, to_numpy
from metaopt.jets import Jet
from metaopt.leaf import Leaf, one_pass
from metaopt.meta import carried
from metaopt.plan import Plan
from metaopt.rules.rule import scope_of
from metaopt.step import each_horizon, sizes_of
from metaopt.tracer import UntraceableError
from metaopt_kernels.chunks import cut, lies_per_weight
from metaopt_kernels.memory import Occupied, address, contiguous
from metaopt_kernels.programs import ROW, Spec, trace

__all__ = ["Group", "Pool"]


@dataclass
class Group:
    """Leaves that one kernel steps, a row of its tables each.

    Parameters
    ----------
    names : list of str
    weights : int
        Of all its leaves.
    spec : Spec
    fixed : integers (arrays, leaves)
        Addresses of the leaves' parameters, slots, and traces or averages, and of where their
        products go where step sizes differ from weight to weight; of these, one for each discount.
    counts : int32 (leaves,)
        `State.count` is views of it.
    chunks : integers (chunks, 4)
        Row, start, stop and first block of every chunk.
    ends : integers (leaves,)
        How many chunks there are up to each row, on the host.
    blocks : object
        Which meta-gradient each chunk is part of, as the engine wants to have it.
    sums : float64 (chunks, discounts)
        Sums of products; kernels write them.
    own, sizes, starts : integers (leaves,)
        On the host: the address of the parameter, its size, and its first block.
    kernels : dict of str to kernel
        By the gradient's dtype.
    """

    names: list[str]
    weights: int
    spec: Spec
    fixed: Any
    counts: Any
    chunks: Any
    ends: Any
    blocks: Any
    sums: Any
    own: Any
    sizes: Any
    starts: Any
    kernels: dict[str, Any] = field(default_factory=dict)


class Pool:
    """All leaves of an optimizer, and how each is stepped.

    Parameters
    ----------
    config : MetaOptimize
    plan : Plan
    params : mapping of leaf to array
    state : State
        Of contiguous arrays; they change in place, and `count` is replaced by views.
    engine : Cpu or Gpu

    Attributes
    ----------
    unfused : dict of leaf to str
        Why leaves are stepped by the core instead.
    """

    def __init__(
        self,
        config: mo.MetaOptimize,
        plan: Plan,
        params: Mapping[str, Any],
        state: mo.State,
        engine: Any,
    ) -> None:
        self._config, self._plan, self._params, self._engine = config, plan, params, engine
        self._xp = namespace(state.step)
        self.unfused: dict[str, str] = {}
        self._buffers: dict[str, Any] = {}  # of parameters that are not contiguous
        self._products: dict[str, Any] = {}
        self._discounts = np.array([float(to_numpy(each)) for each in config.discounts])
        members: dict[Any, tuple[Spec, list[str]]] = {}
        for name, rule in plan.rules.items():
            spec = self._spec(name, rule)
            if spec is None:
                continue
            # by identity: a rule of a user's own need not be hashable, nor its equality a bool
            key = (id(rule), spec.param, spec.compute, spec.per_weight)
            members.setdefault(key, (spec, []))[1].append(name)
        counts: dict[str, Any] = {}
        self._groups: list[Group] = []
        for spec, names in members.values():
            try:
                kernel = self._compiled(spec)
            except UntraceableError as error:
                reason = f"{spec.rule!r} cannot be traced: {error}"
            except Exception as error:  # of whatever kind a compiler raises
                shown = textwrap.shorten(str(error), 300)
                reason = f"{spec.rule!r} cannot be compiled: {type(error).__name__}: {shown}"
            else:
                group = self._group(spec, names, state, counts)
                group.kernels[spec.grad] = kernel
                self._groups.append(group)
                continue
            self.unfused |= dict.fromkeys(names, reason)
        self.state = replace(
            state, count=per_leaf((name, counts.get(name, state.count[name])) for name in params)
        )
        self._occupied = Occupied(params)
        # dry-run the rest of a step, so that errors surface at construction
        config.meta_step(plan, self.state, self._summed({}), params)

    def _spec(self, name: str, rule: Any) -> Spec | None:
        """Return what the kernel of a leaf depends on; None where there can be none."""
        if scope_of(rule) == "leaf":
            said = 'has the `scope` "leaf"' if hasattr(rule, "scope") else "says no `scope`"
            self.unfused[name] = f"{rule!r} {said}, and sees whole leaves"
            return None
        param, plan = self._params[name], self._plan
        kinds = {getattr(self._xp, kind): kind for kind in self._engine.dtypes}
        kind = next((kind for dtype, kind in kinds.items() if param.dtype == dtype), None)
        if kind is None or not getattr(param.dtype, "isnative", True):
            self.unfused[name] = f"no kernels for {param.dtype}"
            return None
        wide = {self._xp.float32: "float32", self._xp.float64: "float64"}
        return Spec(
            rule=rule,
            param=kind,
            grad=kind,
            compute=wide[plan.dtypes[name]],
            beta=wide[plan.beta_dtype],
            per_weight=plan.blocks.partition.per_leaf
            or lies_per_weight(plan.shapes[name], plan.blocks.views[name]),
            kept="average" if name in plan.averaged else "trace",
            horizons=len(self._discounts),
        )

    def _group(
        self,
        spec: Spec,
        names: list[str],
        state: mo.State,
        counts: dict[str, Any],
    ) -> Group:
        plan, engine, xp = self._plan, self._engine, self._xp
        vector = xp.stack([state.count[name] for name in names])
        fixed, chunks, ends, blocks, starts = [], [], [], [], []
        for row, name in enumerate(names):
            counts[name] = xp.reshape(vector[row : row + 1], ())
            param = self._params[name]
            if not contiguous(param):
                param = self._buffers[name] = xp.empty_like(param, order="C")
            slots = state.slots[name].values()
            kept = getattr(state, spec.kept)[name]
            if spec.per_weight:
                self._products[name] = xp.zeros_like(kept)
            by_horizon = [kept, *([self._products[name]] if spec.per_weight else [])]
            fixed.append(
                [address(array) for array in (param, *slots)]
                + [at for array in by_horizon for at in _parts(array, spec.horizons)]
            )
            family = plan.blocks.families[plan.blocks.family_of[name]]
            view = plan.blocks.views[name]
            pieces = cut(plan.shapes[name], view, engine.chunk, per_weight=spec.per_weight)
            chunks.append(np.insert(pieces, 0, row, axis=1))
            ends.append(len(pieces))
            blocks.append(pieces[:, 2] + family.start)
            starts.append(family.start)
        table, addresses = np.concatenate(chunks), np.asarray(fixed, dtype=np.int64).T
        return Group(
            names=names,
            weights=sum(self._params[name].size for name in names),
            spec=spec,
            fixed=engine.table(np.ascontiguousarray(addresses)),
            counts=vector,
            chunks=engine.table(table),
            ends=np.cumsum(ends),
            blocks=engine.blocks(np.concatenate(blocks), plan.blocks.size),
            sums=xp.zeros((len(table), spec.horizons), dtype=xp.float64),
            own=addresses[0].copy(),
            sizes=np.array([self._params[name].size for name in names]),
            starts=np.array(starts),
        )

    def step(self, grads: Mapping[str, Any], lrs: Leaves[Any]) -> None:
        """Step all leaves and the meta-parameters, in place.

        Parameters
        ----------
        grads : mapping of leaf to array or None
            Of the library and shapes of the parameters.
        lrs : mapping of leaf to multiplier
            As `metaopt.inputs.multipliers` returns them; arrays of the parameters' library.
        """
        plan, state = self._plan, self.state
        lrs = _rounded(lrs, plan.dtypes)
        sizes = sizes_of(self._config.sigma_map, state.beta)
        value, rate = (map_leaves(solid, part) for part in (sizes.value, sizes.first))
        mask = map_leaves(lambda *z: solid(carried(*z)), state.meta_grad, state.meta_count)
        of_blocks = {"value": value, "rate": rate, "mask": mask}
        work = [self._work(group, grads, lrs, of_blocks) for group in self._groups]
        loose = {
            name: self._by_core(name, grads[name], lrs[name], of_blocks)
            for name in self.unfused
            if grads[name] is not None
        }  # before anything is written
        for group, (kernel, given, _) in zip(self._groups, work, strict=True):
            buffered = [name for name in group.names if name in self._buffers]
            for name in buffered:
                self._buffers[name][...] = self._params[name]
            self._engine.run(kernel, group, given, self._discounts)
            for name in buffered:
                self._params[name][...] = self._buffers[name]
        products = {name: self._written(name, *found) for name, found in loose.items()} | {
            name: product for name, product in self._products.items() if grads[name] is not None
        }
        self.state = self._config.meta_step(
            plan,
            state,
            self._summed(products),
            [n for n, grad in grads.items() if grad is not None],
        )

    def _summed(self, products: Mapping[str, Any]) -> Any:
        """Return the meta-gradient, of the sums of chunks and of products that leaves have."""
        plan, z = self._plan, None

        def by_block(products: Mapping[str, Any]) -> Any:
            dtype = plan.beta_dtype
            return plan.blocks.gather(
                {name: plan.blocks.partial(array, name, dtype) for name, array in products.items()}
            )

        if not plan.blocks.partition.per_leaf:
            sizes = len(self._discounts), plan.blocks.size
            sums = self._engine.gathered(self._groups, *sizes, plan.beta_dtype)
            z = self._xp.reshape(sums, self.state.meta_grad.shape)
        if products:
            rest = each_horizon(plan, by_block, products)
            z = rest if z is None else z + rest
        return map_leaves(self._xp.zeros_like, self.state.meta_grad) if z is None else z

    def _work(
        self, group: Group, grads: Mapping[str, Any], lrs: Leaves[Any], of_blocks: dict[str, Any]
    ) -> tuple[Any, Any, list[Any]]:
        """Return the kernel, what it is told, and the arrays that have to live until it ran."""
        given = np.zeros(len(group.names), dtype=ROW)
        grad, arrays = self._readable(group, [grads[name] for name in group.names])
        # an empty array may lie nowhere
        begin = np.array([0 if array is None else address(array) or 1 for array in arrays])
        end = begin + group.sizes * np.dtype(grad).itemsize
        # one that lies in its own parameter, entry by entry, is read before that is written
        own = (begin == group.own) & (grad == group.spec.param)
        inside = (begin != 0) & ~own & self._occupied.holds(begin, end)
        for row in np.nonzero(inside)[0].tolist():
            arrays[row] = self._xp.array(arrays[row], copy=True)
            begin[row] = address(arrays[row])
        given["grad"] = begin
        for part, values in of_blocks.items():
            if isinstance(values, Mapping):
                given[part] = [address(values[name]) for name in group.names]
            else:
                given[part] = address(values) + group.starts * values.dtype.itemsize
        own_lrs = [lrs[name] for name in group.names]
        given["lr"] = [lr if isinstance(lr, float) else 0.0 for lr in own_lrs]
        given["lr_at"] = [0 if isinstance(lr, float) else address(lr) for lr in own_lrs]
        return self._kernel(group, grad), given, arrays

    def _readable(self, group: Group, grads: list[Any]) -> tuple[str, list[Any]]:
        """Return gradients as one kernel can read them: their dtype, and contiguous arrays."""
        spec = group.spec
        own = getattr(self._xp, spec.param)
        kind = spec.param
        if any(grad is not None and grad.dtype != own for grad in grads):
            kind = spec.compute
        dtype = getattr(self._xp, kind)
        return kind, [
            grad
            if grad is None or (grad.dtype == dtype and contiguous(grad))
            else self._xp.asarray(grad, dtype=dtype, order="C")
            for grad in grads
        ]

    def _kernel(self, group: Group, grad: str) -> Any:
        """Return the kernel of a group for gradients of a dtype, compiled."""
        if grad not in group.kernels:
            group.kernels[grad] = self._compiled(replace(group.spec, grad=grad))
        return group.kernels[grad]

    def _compiled(self, spec: Spec) -> Any:
        return self._engine.kernel(trace(spec), spec.compute, per_weight=spec.per_weight)

    def _by_core(
        self, name: str, grad: Any, lr: Any, of_blocks: dict[str, Any]
    ) -> tuple[Any, Leaf]:
        """Return what the core's function on arrays returns for a leaf: products and next row."""
        plan, state, xp = self._plan, self.state, self._xp
        dtype, param = plan.dtypes[name], self._params[name]
        value, rate, mask = (
            plan.blocks.expand_leaf(values, name, param.ndim) for values in of_blocks.values()
        )
        column = (*plan.horizons, *(1 for _ in param.shape)) if plan.horizons else ()
        leaf = Leaf.of(
            param,
            state.slots[name],
            state.count[name],
            trace=state.trace.get(name),
            average=state.average.get(name),
        )
        product, _, leaf = one_pass(
            plan.rules[name],
            leaf,
            grad,
            Jet(value, rate),
            lr=xp.asarray(lr, dtype=dtype),
            mask=mask,
            discount=xp.reshape(xp.asarray(self._discounts, dtype=dtype), column),
        )
        return product, leaf

    def _written(self, name: str, product: Any, leaf: Leaf) -> Any:
        """Write the next row of a leaf; return its products."""
        state, param = self.state, self._params[name]
        param[...] = cast(leaf.param.value, param.dtype)
        for kept, new in ((state.trace, leaf.param.first), (state.average, leaf.average)):
            if name in kept:
                kept[name][...] = new
        for slot, array in state.slots[name].items():
            array[...] = leaf.slots[slot].value
        state.count[name][...] += 1
        return product


def _parts(array: Any, number: int) -> list[int]:
    """Return where equal parts of a contiguous array lie, one after another."""
    return [address(array) + part * (array.nbytes // number) for part in range(number)]


def _rounded(lrs: Leaves[Any], dtypes: Leaves[Any]) -> Leaves[Any]:
    """Return multipliers in the leaves' compute dtypes; an array of several leaves is cast once."""
    known: dict[Any, Any] = {}
    rounded = per_leaf(lrs.items())
    for name, lr in lrs.items():
        if not isinstance(lr, float):
            key = id(lr), dtypes[name]
            if key not in known:
                known[key] = cast(lr, dtypes[name])
            rounded[name] = known[key]
    return rounded
