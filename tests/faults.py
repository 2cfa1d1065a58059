"""Faults for a copy of the core: what stands where, and what is put in its place.

Each is a plausible mistake, of the mathematics or of the code, and none computes the same as the
right code. A place is found in the syntax tree, so that layout and comments may change.
"""

import ast
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

__all__ = ["FAULTS", "Fault", "plant"]


@dataclass(frozen=True)
class Fault:
    """Code of a function of the core, and what stands in its place.

    Parameters
    ----------
    place : str
        The function, or class, by its dotted path below `metaopt`.
    right : str or None
        An expression or statements that stand in it, once. None for its whole body.
    wrong : str
        What to put there: an expression for an expression.
    families : tuple of str, default ("trajectory",)
        The checks that are to catch it, in this order; others may as well.
    raises : bool, default False
        Whether the faulty code may stumble before it errs, over leaves of other shapes.
    library : str, default "numpy"
        What it is looked for on: NumPy's multipliers are numbers, those of others stay arrays.
    """

    place: str
    right: str | None
    wrong: str
    families: tuple[str, ...] = ("trajectory",)
    raises: bool = False
    library: str = "numpy"


def plant(fault: Fault, core: Path) -> None:
    """Plant a fault in the core in a folder.

    Raises
    ------
    LookupError
        If there is no such function, or what is right does not stand in it exactly once.
    """
    file, names = _file(core, fault.place)
    module = ast.parse(file.read_text(encoding="utf-8"))
    function = _defined(module, names, fault.place)
    new = ast.parse(dedent(fault.wrong).strip()).body
    if fault.right is None:
        function.body = new
    else:
        _replace(function, ast.parse(dedent(fault.right).strip()).body, new, fault.place)
    file.write_text(ast.unparse(ast.fix_missing_locations(module)), encoding="utf-8")


def _file(core: Path, place: str) -> tuple[Path, list[str]]:
    """Return the file of a place, and the names of what is defined in it."""
    path, names = core, place.split(".")
    while path.is_dir() and names:
        path /= names.pop(0)
    path = path.with_suffix(".py")
    if not path.is_file():
        msg = f"there is no `{place}`: plant the fault anew."
        raise LookupError(msg)
    return path, names


def _defined(module: ast.Module, names: list[str], place: str) -> ast.FunctionDef | ast.ClassDef:
    """Return the definition that these names lead to."""
    found: ast.AST = module
    for name in names:
        inside = [
            node
            for node in ast.iter_child_nodes(found)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        ]
        if len(inside) != 1:
            msg = f"`{place}` is defined {len(inside)} times: plant the fault anew."
            raise LookupError(msg)
        (found,) = inside
    assert isinstance(found, ast.FunctionDef | ast.ClassDef)
    return found


def _replace(inside: ast.AST, old: list[ast.stmt], new: list[ast.stmt], place: str) -> None:
    """Replace the only occurrence of some code by other code."""
    parts: list[ast.AST] = list(old)
    others: list[ast.AST] = list(new)
    if len(old) == len(new) == 1 and isinstance(old[0], ast.Expr) and isinstance(new[0], ast.Expr):
        parts, others = [old[0].value], [new[0].value]
    wanted = [ast.dump(part) for part in parts]
    found = []
    for node in ast.walk(inside):
        for name, value in ast.iter_fields(node):
            items = value if isinstance(value, list) else [value]
            for start in range(len(items) - len(parts) + 1):
                candidates = items[start : start + len(parts)]
                if all(type(a) is type(b) for a, b in zip(candidates, parts, strict=True)) and (
                    [ast.dump(candidate) for candidate in candidates] == wanted
                ):
                    found.append((node, name, start))
    if len(found) != 1:
        code = "; ".join(ast.unparse(part) for part in parts)
        msg = f"`{code}` stands {len(found)} times in `{place}`: plant the fault anew."
        raise LookupError(msg)
    ((node, name, start),) = found
    value = getattr(node, name)
    if isinstance(value, list):
        value[start : start + len(parts)] = others
    else:
        setattr(node, name, others[0])


FAULTS = {
    # the step of a leaf
    "wrong sign in a tangent": Fault(
        "leaf.advance",
        "scaled(direction.first, alpha.value)",
        "scaled(direction.first, -alpha.value)",
    ),
    "weight decay left out of the step": Fault(
        "leaf.advance",
        "direction.value if kappa is None else direction.value + kappa * param.value",
        "direction.value",
    ),
    "weight decay left out of the trace": Fault(
        "leaf.advance",
        "1.0 if lost is None else 1.0 - lost",
        "1.0",
    ),
    "weight decay left out of the average's share": Fault(
        "leaf._share",
        "share + discount * lost",
        "share",
    ),
    "discount left out of the average's share": Fault(
        "leaf._share",
        "1.0 - discount",
        "0.0",
    ),
    "trace from the weights after the step": Fault(
        "leaf.advance",
        "moved if alpha.first is alpha.value else scaled(alpha.first, step)",
        "scaled(alpha.first, step if kappa is None else direction.value + kappa * value)",
    ),
    "slope of a step size taken for its value": Fault(
        "leaf.advance",
        "moved if alpha.first is alpha.value else scaled(alpha.first, step)",
        "moved",
    ),
    "rectifier left out": Fault(
        "leaf.advance",
        "namespace(step).clip(retain - alpha.value * rectified, min=0.0)",
        "retain - alpha.value * rectified",
    ),
    "rectifier without weight decay": Fault(
        "leaf.advance",
        "namespace(step).clip(retain - alpha.value * rectified, min=0.0)",
        "namespace(step).clip(1.0 - alpha.value * rectified, min=0.0) + retain - 1.0",
    ),
    "decay apart left out of the step": Fault(
        "leaf.advance", "delta = moved + apart * param.value", "pass"
    ),
    "decay apart left out of the trace": Fault(
        "leaf.advance",
        "apart if kappa is None else kappa * alpha.value",
        "kappa and kappa * alpha.value",
    ),
    "decay apart taken for a part of what the step size multiplies": Fault(
        "leaf.advance",
        "moved if alpha.first is alpha.value else scaled(alpha.first, step)",
        "delta if alpha.first is alpha.value else scaled(alpha.first, step)",
    ),
    "decay apart left out of the average": Fault(
        "leaf.advance", "average if apart is None else average - apart * average", "average"
    ),
    "decay apart left out of the third trace": Fault(
        "leaf.advance",
        "second if apart is None else second - apart * second",
        "second",
        families=("traces",),
    ),
    "decay apart without the multiplier": Fault(
        "leaf.with_lr", "{'decay_step_size': lr * size}", "{'decay_step_size': size}"
    ),
    "decay apart multiplied by the learned step size all the same": Fault(
        "leaf._decay", "(kappa, None) if size is None else (None, kappa * size)", "(kappa, None)"
    ),
    "multiplier left out of the tangent": Fault(
        "leaf.taken",
        "value if size.first is size.value else of(size.first)",
        "cast(size.first, dtype)",
    ),
    "discount on a leaf at rest": Fault(
        "leaf.discount_where",
        "return 1.0",
        "return discount",
    ),
    "discount on a leaf at rest by an array": Fault(
        "leaf.discount_where",
        "namespace(discount).where(active, discount, namespace(discount).ones_like(discount))",
        "discount",
        library="strict",
    ),
    "count from 0": Fault(
        "leaf._direction",
        "leaf.count + 1",
        "leaf.count",
    ),
    "trace of the moments without discount": Fault(
        "leaf.discounted",
        "slots = {slot: of(jet) for slot, jet in leaf.slots.items()}",
        """
        param = of(leaf.param)
        factor = 1.0
        slots = {slot: of(jet) for slot, jet in leaf.slots.items()}
        return leaf._replace(param=param, slots=slots)
        """,
    ),
    "no restart of the trace": Fault(
        "leaf._times",
        None,
        "return trace * factor",
    ),
    "no restart of an average": Fault(
        "step._kept",
        "columns & has_average(leaf.count)",
        "has_average(leaf.count)",
    ),
    "a pair restarts with its first column alone": Fault(
        "leaf.discounted",
        "_times(_times(second, factor, mask), 1.0, mask[:, None, ...])",
        "_times(second, factor, mask)",
    ),
    "infinite meta-gradients used": Fault(
        "leaf.usable",
        None,
        "return z == z",
    ),
    "meta-gradients used whose square overflows": Fault(
        "leaf.usable",
        None,
        "return namespace(z).isfinite(z)",
    ),
    # the meta update
    "meta count one ahead": Fault(
        "meta._direction",
        "row.count + 1",
        "row.count + 2",
    ),
    "a bound differentiated": Fault(
        "meta.meta_step",
        "xp.where(moves, moved, first)",
        "xp.where(moves, xp.where(new_beta == exact, moved, 0.0 * moved), first)",
    ),
    "blocks at rest discounted in Y": Fault(
        "meta.meta_step",
        "xp.where(moves, moved, first)",
        "xp.where(moves, moved, row.beta.first)",
    ),
    "a meta-gradient of 0 moves its block": Fault(
        "meta.meta_step",
        "finite & xp.logical_not(all_horizons(z.value == 0.0, beta))",
        "finite",
    ),
    "bounds from above ignored": Fault(
        "meta.meta_step",
        "xp.where(exact < lo, lo, xp.where(exact > hi, hi, exact))",
        "xp.where(exact < lo, lo, exact)",
    ),
    "a bound that is met starts nothing anew": Fault(
        "meta.meta_step",
        "moves & (meets | collapsed)",
        "moves & collapsed",
    ),
    "the peak of the last step alone": Fault(
        "meta.meta_step",
        "xp.maximum(row.slots[PEAK].value, size)",
        "size",
    ),
    "a block that starts anew keeps its trace": Fault(
        "meta.carried",
        None,
        "return usable(z)",
    ),
    "a block that starts anew is judged by its old trace": Fault(
        "meta.begun",
        None,
        "return z",
    ),
    "a block that starts anew keeps its moments": Fault(
        "meta.meta_step.chosen",
        "xp.where(restart, 0.0, value)",
        "value",
    ),
    "a first step does not count": Fault(
        "meta.meta_step",
        "moves | starts",
        "moves",
    ),
    "a block starts without a gradient": Fault(
        "meta.meta_step",
        "(count == 0) & present",
        "count == 0",
    ),
    "moments of the meta update changed in place": Fault(
        "meta.meta_step.chosen",
        "return Jet(value, first)",
        """
        old.value[...] = value
        return Jet(value, first)
        """,
        families=("pure",),
    ),
    "beta changed in place": Fault(
        "meta.meta_step",
        "return after, restart | xp.logical_not(finite)",
        """
        beta[...] = after.beta.value
        return after, restart | xp.logical_not(finite)
        """,
        families=("pure",),
    ),
    # the order of a step, and what looks at several leaves
    "beta updated from the new trace": Fault(
        "step.make_step",
        "after = next_state(state, moved[0], new, own.z)",
        """
        z = own.z
        ends = {
            name: leaf.param.value - leaf.average if leaf.param.first is None else leaf.param.first
            for name, leaf in moved[0].items()
            if leaf is not None
        }
        late = products(plan, own.traces | ends, own.active, given.grads, given.across.copies)
        if late is not None:
            z = map_leaves(begun, late, state.meta_count)
            new, _ = move_blocks(
                config,
                plan,
                state,
                z,
                present=blocks_present(plan, given.present, state.step),
                mask=own.mask,
                z_trace=own.z_trace,
            )
        after = next_state(state, moved[0], new, z)
        """,
    ),
    "step size from after the meta update": Fault(
        "step.move_blocks",
        "now.beta",
        "after[key].beta",
    ),
    "old rows of Y under meta_first": Fault(
        "step.move_blocks",
        "pick(start) if beta.first is None else beta.first",
        "pick(start) if beta.first is None else now.beta.first",
    ),
    "no E in the discount of Y": Fault(
        "step._towards",
        "factor * row.beta.first + (1.0 - factor) * start",
        "factor * row.beta.first",
    ),
    "no restart of Y": Fault(
        "step.block_rows.jet",
        "xp.where(_piece(key, columns), _piece(key, state.beta_trace[slot]), target)",
        "_piece(key, state.beta_trace[slot])",
    ),
    "discount once in the third trace": Fault(
        "step._discounted_again",
        None,
        "return table",
    ),
    "l passed off as 2x2": Fault(
        "step.Side.curved",
        "products(plan, self.traces, active, tangents, copies)",
        "None",
    ),
    "2x2 passed off as full": Fault(
        "step.Side.curved",
        "z_trace = term_b if z_trace is None else map_leaves(lambda a, b: a + b, z_trace, term_b)",
        "del term_b",
    ),
    "outer H of term A with the hat": Fault(
        "step.Side.curved",
        "products(plan, self.traces, active, tangents, copies)",
        "products(plan, hats, active, tangents, copies)",
    ),
    "leaf at rest in the meta-gradient": Fault(
        "step.products",
        "{name: moves for name, moves in active.items() if moves is not False}",
        "{name: True for name in active if arrays.get(name) is not None}",
    ),
    "leaf at rest by an array in the meta-gradient": Fault(
        "step._follows",
        "has_average(leaf.count) & moves",
        "has_average(leaf.count)",
        library="strict",
    ),
    "trace of a leaf that has not moved": Fault(
        "step._follows",
        "has_average(leaf.count) if moves is True else has_average(leaf.count) & moves",
        "moves",
    ),
    "an array of 0 taken for awake": Fault(
        "step.Given.active",
        "lr != 0.0",
        "(not isinstance(lr, float) or lr != 0.0)",
        library="strict",
    ),
    "overflow of a leaf at rest in the tangents": Fault(
        "step._finite_traces.finite",
        "xp.where(is_finite if moves is False else is_finite | moves, trace, 0.0)",
        "trace",
    ),
    "sums in the order of the gradients": Fault(
        "step.Given.present",
        "[name for name in self.lrs if self.grads[name] is not None]",
        "[name for name, grad in self.grads.items() if grad is not None]",
        families=("pure",),
    ),
    "an input changed": Fault(
        "step.make_step",
        "dtype, ndim, lr = plan.dtypes[name], len(plan.shapes[name]), given.lrs[name]",
        """
        dtype, ndim, lr = plan.dtypes[name], len(plan.shapes[name]), given.lrs[name]
        given.grads[name][...] = 0.5 * given.grads[name]
        """,
        families=("pure",),
    ),
    "a diagonal by position": Fault(
        "step.grad_traces",
        "cast(diagonal[name], hat.dtype) * hat",
        "cast(dict(zip(hats, diagonal.values()))[name], hat.dtype) * hat",
        families=("pure",),
        raises=True,
    ),
    "Hessian products by position": Fault(
        "step.grad_traces",
        "given.hvp(tangents)",
        "dict(zip(tangents, given.hvp(tangents).values()))",
        families=("pure",),
        raises=True,
    ),
    "multipliers by position": Fault(
        "inputs.multipliers",
        "per_leaf((name, known[id(lr[name])]) for name in names)",
        "per_leaf((name, known[id(one)]) for name, one in zip(names, lr.values()))",
        families=("pure",),
    ),
    "restarts not counted": Fault(
        "step.move_blocks",
        "state.restarts + cast(lost, state.restarts.dtype)",
        "state.restarts",
    ),
    "no step is skipped": Fault(
        "step.make_step",
        "None if lost is None else lost == 0.0",
        "None",
    ),
    "training gradients in place of held-out ones": Fault(
        "metaoptimize.MetaOptimize._given",
        "(meta_grads or {}) if self.held_out else grads",
        "grads",
    ),
    "training gradients where step sizes rest": Fault(
        "metaoptimize.MetaOptimize._given",
        "(meta_grads or {}) if self.held_out else grads",
        "grads if meta_grads is None else meta_grads",
    ),
    "steps made with held-out gradients": Fault(
        "step.make_step",
        "own.grad(values, name)",
        "own.grad({**values, **sources}, name)",
    ),
    "held-out gradients that are not finite in a step that counts": Fault(
        "step.make_step",
        "not_finite(plan, values, units, *([sources] if config.held_out else []))",
        "not_finite(plan, values, units)",
    ),
    "steps counted by two": Fault(
        "step.next_state",
        "state.step + 1",
        "state.step + 2",
    ),
    # several discounts
    "another's discount": Fault(
        "step.discounts",
        "tuple(discount_where(active, one, dtype) for one in discount)",
        "tuple(discount_where(active, one, dtype) for one in reversed(discount))",
    ),
    "the mean of the discounts": Fault(
        "step.discounts",
        "tuple(discount_where(active, one, dtype) for one in discount)",
        "tuple(discount_where(active, sum(discount) / len(discount), dtype) for _ in discount)",
    ),
    "traces swapped in the meta-gradient": Fault(
        "step.products",
        "{name: traces[name] for name in moving}",
        "{name: traces[name][::-1] if plan.horizons else traces[name] for name in moving}",
    ),
    "columns of discounts mixed in the Hessian products": Fault(
        "step.grad_traces.product",
        "namespace(array).reshape(array, hat.shape)",
        """
        namespace(array).moveaxis(
            namespace(array).reshape(array, (hat.shape[1], hat.shape[0], *hat.shape[2:])), 0, 1
        )
        """,
        families=("trajectory", "traces"),
    ),
    "a restart of the first discount's trace alone": Fault(
        "step.discounted_rows",
        "plan.layout.columns(mask, name, len(plan.shapes[name]))",
        """
        (
            plan.layout.columns(mask, name, len(plan.shapes[name]))
            | (
                namespace(leaf.param.first).reshape(
                    namespace(leaf.param.first).arange(plan.horizons[0]),
                    (-1,) + (1,) * (leaf.param.first.ndim - 1),
                )
                > 0
                if plan.horizons
                else False
            )
        )
        """,
    ),
    "the first discount alone looked at for a restart": Fault(
        "meta.all_horizons",
        "namespace(flags).all(flags, axis=0)",
        "flags[0]",
    ),
    "the largest of the directions": Fault(
        "meta.meta_step",
        "xp.min(unit.value, axis=0)",
        "xp.max(unit.value, axis=0)",
    ),
    "the sum of the directions": Fault(
        "meta.meta_step",
        "Jet(least)",
        "Jet(xp.sum(unit.value, axis=0))",
    ),
    "the mean of the directions": Fault(
        "meta.meta_step",
        "Jet(least)",
        "Jet(xp.mean(unit.value, axis=0))",
    ),
    "the direction nearest to 0": Fault(
        "meta.meta_step",
        "Jet(least)",
        "Jet(xp.where(xp.max(unit.value, axis=0) < 0.0, xp.max(unit.value, axis=0), least))",
    ),
    "the first discount's meta-gradient for all": Fault(
        "meta.meta_step",
        "Jet(xp.where(moves, z.value, 0.0), z.first)",
        """
        Jet(
            xp.where(moves, z.value[:1] if DECIDED in row.slots else z.value, 0.0)
            + xp.zeros_like(z.value),
            z.first,
        )
        """,
    ),
    "moments shared by all discounts": Fault(
        "meta._direction",
        "{slot: row.slots[slot].value for slot in rule.slots}",
        """
        {
            slot: row.slots[slot].value[:1] + 0.0 * row.slots[slot].value
            if DECIDED in row.slots
            else row.slots[slot].value
            for slot in rule.slots
        }
        """,
    ),
    "equal directions that have not both decided": Fault(
        "meta.meta_step",
        "cast(unit.value == least, beta.dtype)",
        """
        cast(
            xp.reshape(xp.arange(unit.value.shape[0]), (-1,) + (1,) * least.ndim)
            == xp.argmin(unit.value, axis=0),
            beta.dtype,
        )
        """,
    ),
    "who decided forgotten when a block starts anew": Fault(
        "meta.meta_step",
        "(COMPENSATION, DECIDED, RECOVERIES, *getattr(rule, 'lasting', ()))",
        "(COMPENSATION, RECOVERIES, *getattr(rule, 'lasting', ()))",
    ),
    "another discount's trace in the diagnostics": Fault(
        "diagnostics._of_blocks",
        "each_horizon(plan, squares, traces_now(plan, params, state))",
        """
        each_horizon(
            plan,
            squares,
            {
                name: trace[::-1] if plan.horizons else trace
                for name, trace in traces_now(plan, params, state).items()
            },
        )
        """,
    ),
    "another discount that decided in the diagnostics": Fault(
        "diagnostics._of_blocks",
        "each_horizon(plan, by_block, state.meta_slots[DECIDED])",
        """
        each_horizon(
            plan, by_block, map_leaves(lambda times: times[::-1], state.meta_slots[DECIDED])
        )
        """,
    ),
    # step sizes
    "slope of softplus taken for its value": Fault(
        "numerics.softplus",
        "chained(x, softplus(x.value), slope, bend)",
        "chained(x, softplus(x.value), softplus(x.value), bend)",
    ),
    "second derivative of softplus left out": Fault(
        "numerics.softplus",
        "chained(x, softplus(x.value), slope, bend)",
        "chained(x, softplus(x.value), slope)",
    ),
    "second derivative of the sigmoid cut short": Fault(
        "jets.exponential",
        "chained(x, value, value, lambda first: outer(first, x.first))",
        "chained(Jet(x.value, x.first, None, x.order), value, value,"
        " lambda first: outer(first, x.first))",
    ),
    # update rules
    "start over when a larger step size is asked for": Fault(
        "rules.fast_start.FastStart.direction",
        "positive(grad) - 0.5 * positive(-grad)",
        "positive(-grad) - 0.5 * positive(grad)",
    ),
    "start one step too long": Fault(
        "rules.fast_start.FastStart.direction",
        "positive(self.patience - against)",
        "positive(self.patience - before)",
    ),
    "start that one meta-gradient ends": Fault(
        "rules.fast_start.FastStart.direction",
        "positive(grad) - 0.5 * positive(-grad)",
        "self.patience * positive(grad) - 0.5 * positive(-grad)",
    ),
    "start that counts on": Fault(
        "rules.fast_start.FastStart.direction",
        "asked * positive(self.patience - before)",
        "asked",
    ),
    "start that takes nothing back": Fault(
        "rules.fast_start.FastStart.direction",
        "positive(grad) - 0.5 * positive(-grad)",
        "positive(grad)",
    ),
    "start that saves up": Fault(
        "rules.fast_start.FastStart.direction",
        "against * positive(against)",
        "1.0 * against",
    ),
    "start that ends without a retreat": Fault(
        "meta._retreated",
        "rule.retreat * rule.factor",
        "unit.value",
    ),
    "retreat of as many steps that are not fast": Fault(
        "meta._retreated",
        "rule.retreat * rule.factor",
        "rule.retreat * 1.0",
    ),
    "retreat in every step after the start": Fault(
        "meta._retreated",
        "after & xp.logical_not(before)",
        "after",
    ),
    "retreat that is differentiated": Fault(
        "meta._retreated",
        "xp.where(ends, 0.0, unit.first)",
        "unit.first",
    ),
    "Lion's moment before its sign": Fault(
        "rules.lion.Lion.direction",
        "interpolation * exp_avg + (1.0 - interpolation) * grad",
        "interpolation * (decay * exp_avg + (1.0 - decay) * grad) + (1.0 - interpolation) * grad",
    ),
    "NAdamW's moment corrected as of now": Fault(
        "rules.nadamw.NAdamW.direction",
        "one_minus_power(beta1, count + 1.0)",
        "one_minus_power(beta1, count)",
    ),
    "delayed moments taken fresh": Fault(
        "rules.sgd.SGD.direction",
        "slots['exp_avg'] if self.delayed else exp_avg",
        "exp_avg",
    ),
    "bias always corrected": Fault(
        "rules.rmsprop.RMSprop.direction",
        "one_minus_power(self.beta2, steps) if self.bias_correction else None",
        "one_minus_power(self.beta2, steps)",
    ),
    "eps inside the root": Fault(
        "rules.second_moment.Squares.root",
        "sqrt(moment if correction is None else moment * reciprocal(correction))",
        "sqrt((moment if correction is None else moment * reciprocal(correction)) + 1e-2)",
    ),
    "meta moments that never fade": Fault(
        "rules.second_moment.Roots.following",
        "decay**0.5 * before",
        "before",
    ),
    # formulas and their derivatives
    "slope of the root left out": Fault(
        "numerics.sqrt",
        "0.5 * inverse",
        "0.0 * inverse",
        families=("jets",),
    ),
    "curvature of the root left out": Fault(
        "numerics.sqrt",
        "-inverse * outer(first, first)",
        "0.0 * inverse * outer(first, first)",
        families=("jets",),
    ),
    "slope of the reciprocal": Fault(
        "numerics.reciprocal",
        "-(inverse * inverse)",
        "-inverse",
        families=("jets",),
    ),
    "curvature of the reciprocal": Fault(
        "numerics.reciprocal",
        "-inverse * crossed(x.first, first)",
        "-0.5 * inverse * crossed(x.first, first)",
        families=("jets",),
    ),
    "cross terms in one order": Fault(
        "jets.crossed",
        "outer(first, other) + outer(other, first)",
        "2.0 * outer(first, other)",
        families=("jets",),
    ),
    "literal bias correction": Fault(
        "numerics.one_minus_power",
        "-xp.expm1(count * math.log(beta))",
        "1.0 - beta**count",
        families=("step",),
    ),
    "half a central difference": Fault(
        "curvature._slope",
        "2.0 * eps",
        "eps",
        families=("traces",),
    ),
    "the sum of the probes": Fault(
        "curvature.hutchinson",
        "namespace(probe).mean(probe * products[name], axis=0)",
        "namespace(probe).sum(probe * products[name], axis=0)",
    ),
    # blocks
    "sum in a narrower dtype": Fault(
        "blocks.Blocks.partial",
        "xp.sum(product, dtype=dtype)",
        "cast(xp.sum(cast(product, xp.float32)), dtype)",
    ),
    "nodes along the other axis": Fault(
        "blocks.Node.assign",
        "self.axis % len(shape)",
        "len(shape) - 1 - self.axis % len(shape) if len(shape) == 4 else self.axis % len(shape)",
    ),
    "nodes along the first axis": Fault(
        "blocks.Node.assign",
        "self.axis % len(shape)",
        "shape.index(shape[self.axis])",
    ),
    "step sizes under each other's names": Fault(
        "blocks.Blocks.by_name",
        "values[family.start]",
        "values[self.size - 1 - family.start]",
    ),
    "the first step size for all blocks": Fault(
        "start.beta",
        "sizes[key] if isinstance(sizes, Mapping) else sizes",
        "np.ravel(to_numpy([*sizes.values()][0] if isinstance(sizes, Mapping) else sizes))[0]",
    ),
    "a norm without its root": Fault(
        "diagnostics._of_blocks",
        "map_leaves(xp.sqrt, norms)",
        "norms",
    ),
    # dtypes
    "narrow parameters drift": Fault(
        "metaoptimize.MetaOptimize.step.after",
        "cast(leaf.param.value, param.dtype)",
        """
        cast(
            leaf.param.value * (0.998 if param.dtype == namespace(param).float16 else 1.0),
            param.dtype,
        )
        """,
        families=("step",),
    ),
    "narrow parameters moved in their own dtype": Fault(
        "metaoptimize.MetaOptimize.step.after",
        "cast(leaf.param.value, param.dtype)",
        "param - cast(cast(param, leaf.param.value.dtype) - leaf.param.value, param.dtype)",
        families=("step",),
    ),
    "parameters in the dtype of the first": Fault(
        "metaoptimize.MetaOptimize.step",
        "solid(param)",
        "solid(cast(param, [*params.values()][0].dtype))",
        families=("step",),
    ),
    "beta in the dtype of the first leaf": Fault(
        "plan.make_plan",
        "xp.float64 if xp.float64 in compute.values() else xp.float32",
        "next(iter(compute.values()))",
        families=("step",),
    ),
    "plans kept whatever the dtypes": Fault(
        "configuration.Configuration._plan",
        "(xp.__name__, tuple(shapes.items()), tuple(dtypes.values()))",
        "(xp.__name__, tuple(shapes.items()))",
        families=("trajectory", "step"),
    ),
    # numbers of rules that are learned
    "a learned number moves weights the wrong way": Fault(
        "leaf.follow", "scaled(change, -1.0)", "change", families=("learned",)
    ),
    "weight decay left out of the trace of a learned number": Fault(
        "leaf.follow", "1.0 - decay.value * size", "1.0", families=("learned",)
    ),
    "a learned weight decay reaches no weight": Fault(
        "leaf.follow",
        "total(scaled(unit, alpha), scaled(scaled(decay.first, param.value), size))",
        "scaled(unit, alpha)",
        families=("learned",),
        raises=True,
    ),
    "a learned weight decay apart moves weights by the learned step size": Fault(
        "leaf.follow", "alpha if size is None else size", "alpha", families=("learned",)
    ),
    "a learned decay rate does not reach its moment": Fault(
        "rules.rule.fed_by",
        "tuple(slot for slot in rule.slots if slot in found)",
        "()",
        families=("learned",),
    ),
    "a learned number's trace is not discounted": Fault(
        "step.Side.given",
        'side.discounted() if self.plan.place and self.plan.curvature == "none" else side',
        "side",
        families=("learned",),
    ),
    "learned numbers share a trace": Fault(
        "step.Side.followed", "jet if at == own else Jet(jet.value)", "jet", families=("learned",)
    ),
    "a learned number has the first discount": Fault(
        "configuration.Configuration._config_of",
        "self.discounts[-1]",
        "self.discounts[0]",
        families=("learned",),
    ),
    "a learned number starts fast": Fault(
        "configuration.Configuration._config_of",
        "self.meta.rule if isinstance(self.meta, FastStart) else self.meta",
        "self.meta",
        families=("learned",),
    ),
    "a learned decay rate starts from its distance to 1": Fault(
        "step_sizes.Decay.inverse",
        "-xp.log1p(-step_size)",
        "-xp.log(step_size)",
        families=("learned",),
        raises=True,
    ),
    "leaves that rest count in the meta-gradient of a learned number": Fault(
        "step.meta_gradient",
        "side.follows",
        "side.follows if not side.plan.place else dict.fromkeys(side.table, True)",
        families=("learned",),
    ),
    "a learned number is the one from before a meta update that comes first": Fault(
        "step.move_blocks",
        "after[key].beta if config.meta_first else now.beta",
        "after[key].beta if config.meta_first and not plan.place else now.beta",
        families=("learned",),
    ),
    "with the exact Hessian a learned number reaches the leaves of its rule alone": Fault(
        "step.Side.curved",
        "grad_traces(plan, hats, given)",
        "{n: 0.0 * g if plan.place and n not in plan.placed and g is not None else g"
        " for n, g in grad_traces(plan, hats, given).items()}",
        families=("learned",),
    ),
}
