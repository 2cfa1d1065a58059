"""The suite checks itself: faults planted in a copy of the core are caught by the public command.

Each is a plausible mistake, of the mathematics or of the code, and none computes the same as the
right code. No check of the suite exists for one of them alone.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """Text of a file of the core, and what stands there in its place.

    `raises` says that leaves of other shapes make the faulty code stumble before it errs. It is
    looked for on `library`: NumPy's multipliers are numbers, those of others stay arrays.
    """

    file: str
    right: str
    wrong: str
    raises: bool = False
    library: str = "numpy"


FAULTS = {
    "wrong sign in a tangent": Fault(
        "rules/move.py",
        "change = turn if change is None else change + turn",
        "change = turn if change is None else change - turn",
    ),
    "weight decay left out of the step": Fault(
        "rules/move.py",
        "step = direction + weight_decay * param if decays else direction",
        "step = direction",
    ),
    "weight decay left out of the trace": Fault(
        "rules/move.py",
        "retain = 1.0 - weight_decay * lr if decays else 1.0",
        "retain = 1.0",
    ),
    "trace from the weights after the step": Fault(
        "rules/move.py",
        "change = delta if lr_trace is lr else lr_trace * step",
        "change = lr_trace * (step - weight_decay * delta)",
    ),
    "beta updated from the new trace": Fault(
        "metaoptimize.py",
        "        new_state = State(\n            step=state.step + 1,",
        "        ends = {n: average[n] + deltas[n] for n in average if deltas[n] is not None}\n"
        "        ends = trace | {n: params[n] - end for n, end in ends.items()}\n"
        "        late = parts.product_with_trace(plan, ends, awake, grads, copies)\n"
        "        if late is not None:\n"
        "            z = late\n"
        "            meta = self._meta(\n"
        "                plan, state, z, finite, awake, beta_trace=beta_trace,\n"
        "                held_trace=held_trace, z_trace=z_trace, reduce=reduce, copies=copies,\n"
        "            )\n"
        "        new_state = State(\n            step=state.step + 1,",
    ),
    "step size from after the meta update": Fault(
        "metaoptimize.py",
        "else parts.rates(plan, self._sigma, state.beta, beta_trace)",
        "else parts.rates(plan, self._sigma, meta.beta, beta_trace)",
    ),
    "sum in a narrower dtype": Fault(
        "blocks.py",
        "return xp.sum(product, dtype=dtype)",
        "return cast(xp.sum(cast(product, xp.float32)), dtype)",
    ),
    "start over when a larger step size is asked for": Fault(
        "rules/fast_start.py",
        "positive(grad) - 0.5 * positive(-grad)",
        "positive(-grad) - 0.5 * positive(grad)",
    ),
    "start one step too long": Fault(
        "rules/fast_start.py",
        "positive(self.patience - against)",
        "positive(self.patience - before)",
    ),
    "start that one meta-gradient ends": Fault(
        "rules/fast_start.py",
        "asked = positive(grad)",
        "asked = self.patience * positive(grad)",
    ),
    "start that counts on": Fault(
        "rules/fast_start.py",
        "asked * positive(self.patience - before)",
        "asked",
    ),
    "start that takes nothing back": Fault(
        "rules/fast_start.py",
        " - 0.5 * positive(-grad)",
        "",
    ),
    "start that saves up": Fault(
        "rules/fast_start.py",
        "against * positive(against)",
        "1.0 * against",
    ),
    "slope of the root left out": Fault(
        "numerics.py",
        "chained(x, root, 0.5 * inverse,",
        "chained(x, root, 0.0 * inverse,",
    ),
    "curvature of the root left out": Fault(
        "numerics.py",
        "-inverse * outer(first, first)",
        "0.0 * inverse * outer(first, first)",
    ),
    "old rows of Y under meta_first": Fault(
        "metaoptimize.py",
        "parts.rates(plan, self._sigma, meta.beta, meta.beta_trace)",
        "parts.rates(plan, self._sigma, meta.beta, beta_trace)",
    ),
    "discount once in the third trace": Fault(
        "step.py",
        "(name, hat(hats[name].third, leaf_discount(plan, name, moves, discount), None))",
        "(name, hats[name].third)",
    ),
    "l passed off as 2x2": Fault(
        "metaoptimize.py",
        "z_trace = parts.product_with_trace(plan, state.trace, awake, products, copies)",
        "z_trace = None",
    ),
    "2x2 passed off as full": Fault(
        "metaoptimize.py",
        "z_trace = term_b if z_trace is None else map_leaves(operator.add, z_trace, term_b)",
        "del term_b",
    ),
    "a bound differentiated": Fault(
        "passes.py",
        "{slot: xp.where(moves, new_traces[slot], held[slot]) for slot in traces}",
        "{slot: xp.where(moves & (new_beta == exact), new_traces[slot], 0.0 * held[slot])"
        " for slot in traces}",
    ),
    "no E in the discount of Y": Fault(
        "step.py",
        "factor * trace + (1.0 - factor) * target",
        "factor * trace",
    ),
    "count from 0": Fault(
        "passes.py",
        "cast(leaf.count + 1, dtype)",
        "cast(leaf.count, dtype)",
    ),
    "meta count one ahead": Fault(
        "passes.py",
        "steps = cast(count + 1, beta.dtype)",
        "steps = cast(count + 2, beta.dtype)",
    ),
    "Lion's moment before its sign": Fault(
        "rules/lion.py",
        "sign(interpolation * exp_avg + (1.0 - interpolation) * grad)",
        "sign(interpolation * (decay * exp_avg + (1.0 - decay) * grad)"
        " + (1.0 - interpolation) * grad)",
    ),
    "eps inside the root": Fault(
        "rules/second_moment.py",
        "return sqrt(moment if correction is None else moment * reciprocal(correction))",
        "return sqrt((moment if correction is None else moment * reciprocal(correction)) + 1e-2)",
    ),
    "slope of softplus taken for its value": Fault(
        "step_sizes.py",
        "        return _logistic(beta)\n\n    def second",
        "        return value\n\n    def second",
    ),
    "second derivative of the sigmoid cut short": Fault(
        "step_sizes.py",
        "return value * slope * (slope + _logistic(-beta) - _logistic(beta))",
        "return value * slope * slope",
    ),
    "discount on a leaf at rest": Fault(
        "step.py",
        "if moves is True or (isinstance(discount, float) and discount == 1.0):\n        return in",
        "if moves is not None:\n        return in",
    ),
    "leaf at rest in the meta-gradient": Fault(
        "step.py",
        "        if moves is False:\n            continue\n        array = cast(",
        "        if arrays[name] is None:\n            continue\n        moves = True\n"
        "        array = cast(",
    ),
    "outer H of term A with the hat": Fault(
        "metaoptimize.py",
        "z_trace = parts.product_with_trace(plan, state.trace, awake, products, copies)",
        "z_trace = parts.product_with_trace("
        "plan, {name: hats[name].trace for name in hats}, awake, products, copies)",
    ),
    "rectifier left out": Fault(
        "passes.py",
        "retain = namespace(param).clip(1.0 - lr * (rule.weight_decay + rectified), min=0.0)",
        "retain = 1.0 - lr * (rule.weight_decay + rectified)",
    ),
    "momentum injected as the gradient": Fault(
        "passes.py",
        "followed, _ = direction_of(plain, grad, kept, count, param)",
        "followed = direction",
    ),
    "nodes along the other axis": Fault(
        "blocks.py",
        "return name, tuple(n if i == axis else 1 for i, n in enumerate(shape))",
        "axis = len(shape) - 1 - axis if len(shape) == 4 else axis\n"
        "        return name, tuple(n if i == axis else 1 for i, n in enumerate(shape))",
    ),
    "cross terms in one order": Fault(
        "jets.py",
        "return outer(first, other) + outer(other, first)",
        "return 2.0 * outer(first, other)",
    ),
    "blocks at rest discounted in Y": Fault(
        "passes.py",
        "{slot: xp.where(moves, new_traces[slot], held[slot]) for slot in traces}",
        "{slot: xp.where(moves, new_traces[slot], traces[slot]) for slot in traces}",
    ),
    "trace of the moments without discount": Fault(
        "step.py",
        "{slot: hat(trace, factor, keep) for slot, trace in slots.items()},",
        "{slot: hat(trace, 1.0, keep) for slot, trace in slots.items()},",
    ),
    "delayed moments taken fresh": Fault(
        "rules/sgd.py",
        'return slots["exp_avg"] if self.delayed else exp_avg, {"exp_avg": exp_avg}',
        'return exp_avg, {"exp_avg": exp_avg}',
    ),
    "multiplier left out of the tangent": Fault(
        "metaoptimize.py",
        "else _times(multiplier, cast(plan.blocks.expand_leaf(rate, name, ndim), dtype))",
        "else cast(plan.blocks.expand_leaf(rate, name, ndim), dtype)",
    ),
    "an input changed": Fault(
        "metaoptimize.py",
        "            count[name] = state.count[name] + 1\n",
        "            count[name] = state.count[name] + 1\n"
        "            grads[name][...] = 0.5 * grads[name]\n",
    ),
    "moments of the meta update changed in place": Fault(
        "passes.py",
        "    return _Piece(\n        xp.where(moves, new_beta, beta),",
        "    for slot in slots:\n"
        "        slots[slot][...] = xp.where(moves, new_slots[slot], slots[slot])\n"
        "    return _Piece(\n        xp.where(moves, new_beta, beta),",
    ),
    "beta changed in place": Fault(
        "metaoptimize.py",
        "        new_state = State(\n            step=state.step + 1,",
        "        if not isinstance(state.beta, Mapping):\n"
        "            state.beta[...] = meta.beta\n"
        "        new_state = State(\n            step=state.step + 1,",
    ),
    "sums in the order of the gradients": Fault(
        "step.py",
        "    for name, moves in awake.items():\n        if moves is False:",
        "    for name in arrays:\n        moves = awake[name]\n        if moves is False:",
    ),
    "multipliers by position": Fault(
        "inputs.py",
        "return per_leaf((name, known[id(lr[name])]) for name in names)",
        "return per_leaf((name, known[id(one)]) for name, one in zip(names, lr.values()))",
    ),
    "a diagonal by position": Fault(
        "step.py",
        "else cast(hessian_diagonal[name], plan.dtypes[name]) * hats[name].trace,",
        "else cast(dict(zip(hats, hessian_diagonal.values()))[name], plan.dtypes[name])\n"
        "                * hats[name].trace,",
        raises=True,
    ),
    "Hessian products by position": Fault(
        "step.py",
        "    products = hvp(tangents)\n",
        "    products = dict(zip(tangents, hvp(tangents).values()))\n",
        raises=True,
    ),
    "leaf at rest by an array in the meta-gradient": Fault(
        "step.py",
        "            part = namespace(part).where(moves, part, 0.0)\n",
        "            pass\n",
    ),
    "discount on a leaf at rest by an array": Fault(
        "step.py",
        "where(moves, cast(discount, dtype), filled(moves, (), 1.0, dtype))",
        "asarray(discount, dtype=dtype)",
        library="strict",
    ),
    "a meta-gradient of 0 moves its block": Fault(
        "passes.py",
        "moves = finite & (z != 0.0)",
        "moves = finite",
    ),
    "an array of 0 taken for awake": Fault(
        "step.py",
        "grads[name] is not None and lr != 0.0)",
        "grads[name] is not None and (not isinstance(lr, float) or lr != 0.0))",
        library="strict",
    ),
    "rectifier without weight decay": Fault(
        "passes.py",
        "retain = namespace(param).clip(1.0 - lr * (rule.weight_decay + rectified), min=0.0)",
        "retain = namespace(param).clip(1.0 - lr * rectified, min=0.0) - lr * rule.weight_decay",
    ),
    "slope of the reciprocal": Fault(
        "numerics.py",
        "chained(x, inverse, -(inverse * inverse), bend)",
        "chained(x, inverse, -inverse, bend)",
    ),
    "curvature of the reciprocal": Fault(
        "numerics.py",
        "-inverse * crossed(x.first, first)",
        "-0.5 * inverse * crossed(x.first, first)",
    ),
    "bias always corrected": Fault(
        "rules/rmsprop.py",
        "if self.bias_correction else None",
        "if True else None",
    ),
    "infinite meta-gradients used": Fault(
        "passes.py",
        "return xp.abs(z) < (2.0**511 if z.dtype == xp.float64 else 2.0**63)",
        "return xp.abs(z) == xp.abs(z)",
    ),
    "meta-gradients used whose square overflows": Fault(
        "passes.py",
        "return xp.abs(z) < (2.0**511 if z.dtype == xp.float64 else 2.0**63)",
        "return xp.isfinite(z)",
    ),
    "no restart of the trace": Fault(
        "rules/move.py",
        "return value if keep is None else namespace(value).where(keep, value, otherwise)",
        "return value",
    ),
    "no restart of Y": Fault(
        "step.py",
        "        held[key] = map_leaves(restarted, trace, keep, target)",
        "        held[key] = trace",
    ),
    "a pair restarts with its first column alone": Fault(
        "step.py",
        "third = hat(hat(third, factor, keep), 1.0, keep[:, None, ...])",
        "third = hat(third, factor, keep)",
    ),
    "overflow of a leaf at rest in the tangents": Fault(
        "step.py",
        "    return xp.where(keep if moves is False else keep | moves, trace, 0.0)",
        "    return trace",
    ),
    "restarts not counted": Fault(
        "passes.py",
        "restarts + cast(lost, restarts.dtype)",
        "restarts + 0 * cast(lost, restarts.dtype)",
    ),
    "no step is skipped": Fault(
        "metaoptimize.py",
        "return deltas, new_state, None if lost is None else lost == 0.0",
        "return deltas, new_state, None",
    ),
    "steps counted by two": Fault(
        "metaoptimize.py",
        "            step=state.step + 1,",
        "            step=state.step + 2,",
    ),
    "narrow parameters drift": Fault(
        "metaoptimize.py",
        "return cast(cast(param, delta.dtype) - delta, param.dtype)",
        "kept = 0.998 if param.dtype == namespace(param).float16 else 1.0\n"
        "    return cast(cast(param, delta.dtype) * kept - delta, param.dtype)",
    ),
    "narrow parameters moved in their own dtype": Fault(
        "metaoptimize.py",
        "return cast(cast(param, delta.dtype) - delta, param.dtype)",
        "return param - cast(delta, param.dtype)",
    ),
    "parameters in the dtype of the first": Fault(
        "metaoptimize.py",
        "(name, solid(_less(param, deltas[name]))) for",
        "(name, cast(_less(param, deltas[name]), next(iter(params.values())).dtype)) for",
    ),
    "beta in the dtype of the first leaf": Fault(
        "plan.py",
        "beta_dtype = xp.float64 if xp.float64 in compute.values() else xp.float32",
        "beta_dtype = next(iter(compute.values()))",
    ),
    "plans kept whatever the dtypes": Fault(
        "metaoptimize.py",
        "leaves = (xp.__name__, tuple(shapes.items()), tuple(dtypes.values()))",
        "leaves = (xp.__name__, tuple(shapes.items()))",
    ),
    "literal bias correction": Fault(
        "numerics.py",
        "        return -xp.expm1(count * math.log(beta))",
        "        return 1.0 - beta**count",
    ),
    "nodes along the first axis": Fault(
        "blocks.py",
        "        axis = self.axis % len(shape)",
        "        axis = shape.index(shape[self.axis])",
    ),
    "the first step size for all blocks": Fault(
        "metaoptimize.py",
        "size = sizes[key] if isinstance(sizes, Mapping) else sizes",
        "size = to_numpy(next(iter(sizes.values())) if isinstance(sizes, Mapping) else sizes)\n"
        "            size = size.reshape(-1)[0]",
    ),
    "bounds from above ignored": Fault(
        "passes.py",
        "new_beta = xp.where(exact < lo, lo, xp.where(exact > hi, hi, exact))",
        "new_beta = xp.where(exact < lo, lo, exact)",
    ),
    "half a central difference": Fault(
        "curvature.py",
        "return change / cast(2.0 * eps, dtype)",
        "return change / cast(eps, dtype)",
    ),
    "the sum of the probes": Fault(
        "curvature.py",
        "else namespace(probe).mean(probe * products[name], axis=0),",
        "else namespace(probe).sum(probe * products[name], axis=0),",
    ),
    "a norm without its root": Fault(
        "metaoptimize.py",
        "norms = map_leaves(xp.sqrt, total)",
        "norms = total",
    ),
    "a bound that is met starts nothing anew": Fault(
        "passes.py",
        "restart = moves & (meets | collapsed)",
        "restart = moves & collapsed",
    ),
    "a block that starts anew keeps its trace": Fault(
        "passes.py",
        "return usable(z) & (meta_count > 0)",
        "return usable(z)",
    ),
    "a block that starts anew is judged by its old trace": Fault(
        "passes.py",
        "return namespace(z).where(meta_count > 0, z, 0.0)",
        "return z",
    ),
    "a block that starts anew keeps its moments": Fault(
        "passes.py",
        "xp.where(restart, 0.0, new[slot]) for slot in new}",
        "new[slot] for slot in new}",
    ),
    "a first step does not count": Fault(
        "passes.py",
        "count + cast(moves | started, count.dtype)",
        "count + cast(moves, count.dtype)",
    ),
    "meta moments that never fade": Fault(
        "rules/second_moment.py",
        "hypot(decay**0.5 * before,",
        "hypot(before,",
    ),
    "step sizes under each other's names": Fault(
        "blocks.py",
        "            key: values[family.start]\n            if family.single",
        "            key: values[self.size - 1 - family.start]\n            if family.single",
    ),
}


#: NumPy as it is found by name, but for the adapter: that is another code than the core.
PLAIN = """
from dataclasses import replace
from metaopt_conformance.backends import find

backend = replace(find("{library}"), optimizer=None)
"""


def run(folder: Path, library: str = "numpy") -> "subprocess.CompletedProcess[str]":
    """Run the quick part, up to its first failure, on the core in a folder."""
    (folder / "plain.py").write_text(PLAIN.format(library=library), encoding="utf-8")
    arguments = ["--backend", "plain:backend", "--quick", "--stop"]
    return subprocess.run(
        [sys.executable, "-m", "metaopt_conformance", *arguments],
        cwd=folder,
        env={"PYTHONPATH": f"{folder}:{ROOT / 'conformance'}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def copied(folder: Path) -> Path:
    shutil.copytree(ROOT / "metaopt", folder / "metaopt", ignore=shutil.ignore_patterns("__py*"))
    return folder / "metaopt"


def test_the_copy_without_a_fault_passes(tmp_path: Path) -> None:
    copied(tmp_path)
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    file = copied(tmp_path) / fault.file
    text = file.read_text(encoding="utf-8")
    assert text.count(fault.right) == 1, "the fault is to be planted anew: its place has changed"
    file.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
    done = run(tmp_path, fault.library)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout
    # it was the number that was wrong, and not the code that broke
    failure = next(line for line in done.stdout.splitlines() if line.startswith("FAILED"))
    assert fault.raises or "Error:" not in failure, failure


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) >= 20
    assert len({(fault.file, fault.wrong) for fault in FAULTS.values()}) == len(FAULTS)
