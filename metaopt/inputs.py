"""Checks of what a user hands in: the error comes at the call that made it."""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from metaopt.arrays import (
    Leaves,
    Namespace,
    at_hand,
    is_number,
    is_real_floating,
    is_sparse,
    lacking,
    namespace,
    per_leaf,
    to_numpy,
)
from metaopt.meta import COMPENSATION, PEAK, RECOVERIES, SCALE
from metaopt.numerics import SMALLEST
from metaopt.plan import Plan
from metaopt.rules.elementwise import check_elementwise
from metaopt.rules.fast_start import FastStart
from metaopt.rules.learned import at_start, field_of, layers, learned_in
from metaopt.rules.rule import (
    Rule,
    check_rule,
    decay_step_size,
    fed_by,
    follows_weights,
    is_opaque,
    learnable,
    not_negative,
    optional,
    scope_of,
    uses_param,
)
from metaopt.state import State

__all__ = [
    "check_bounds",
    "check_formulas",
    "check_grads",
    "check_meta_grads",
    "multiplier",
    "multipliers",
    "namespace_of",
    "taken_for_step_size",
]

#: A multiplier that is below this from the start was probably meant as a step size.
USUAL_MULTIPLIER = 0.1
#: How far below 0 a schedule of multipliers about 1 can end by rounding, in float32 too.
ROUNDING = 2.0**-20


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        msg = f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}."
        raise ValueError(msg)


def check_number(name: str, value: Any, lo: float, hi: float = math.inf) -> None:
    """Raise unless `value` is a finite number in [lo, hi]."""
    if not _is_number(value) or not math.isfinite(value) or not lo <= value <= hi:
        where = f"in [{lo:g}, {hi:g}]" if hi < math.inf else f"and at least {lo:g}"
        msg = f"`{name}` must be a finite number {where}; got {value!r}."
        raise ValueError(msg)


def hyperparameter(name: str, value: Any, lo: float, hi: float = math.inf) -> Any:
    """Return a number, also one of NumPy, as a float, and an array of shape () as it is.

    An array stays one even where its value is known: what a state consists of must not depend on
    whether it is.

    Raises
    ------
    ValueError, TypeError
        If it is neither, or does not lie in [lo, hi].
    """
    number = value
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        check_real(name, value)
        if not at_hand(value):
            return value
        number = to_numpy(value)[()]
    check_number(name, number, lo, hi)
    ours = value is number or isinstance(value, np.ndarray | np.generic)
    return float(number) if ours else value


def discount(value: Any) -> Any:
    """Return one discount, or a tuple of several, as `hyperparameter` returns numbers.

    Raises
    ------
    ValueError, TypeError
        If one does not lie in [0, 1], there is none, or each is not larger than the one before.
    """
    if not isinstance(value, tuple | list):
        return hyperparameter("discount", value, 0.0, 1.0)
    several = tuple(
        hyperparameter(f"discount[{index}]", one, 0.0, 1.0) for index, one in enumerate(value)
    )
    known = [float(to_numpy(one)) for one in several if at_hand(one)]
    if not several or any(one >= other for one, other in pairwise(known)):
        msg = f"`discount` must be a number, or several from the least to the largest; got {value}."
        raise ValueError(msg)
    return several


def _is_number(value: Any) -> bool:
    """Say whether `value` is a real number that fits a float."""
    if isinstance(value, bool) or not is_number(value):
        return False
    return not isinstance(value, int) or abs(value) < 2**1023


def check_params(params: Any) -> Namespace:
    """Return the namespace of `params`, or raise for what cannot be optimized."""
    if not isinstance(params, Mapping) or not params:
        msg = f"`params` must be a mapping of name to array with at least one; got {params!r}."
        raise TypeError(msg)
    for name, param in params.items():
        if not isinstance(name, str):
            msg = f"`params` must have strings as names; got {name!r}."
            raise TypeError(msg)
        check_array(f"params[{name!r}]", param)
    xp = library(params)
    lack = lacking(xp)
    if lack:
        msg = (
            "`params` must be arrays of a library that follows the array API standard; "
            f"{xp.__name__} does not: {lack}"
        )
        raise TypeError(msg)
    return xp


def library(params: Mapping[str, Any]) -> Namespace:
    """Return the namespace of all `params`, or raise where they have more than one."""
    spaces = {}
    for name, param in params.items():
        xp = namespace_of(f"params[{name!r}]", param)
        spaces[xp.__name__] = xp
    if len(spaces) > 1:
        msg = f"`params` must all be arrays of one library; got {', '.join(sorted(spaces))}."
        raise TypeError(msg)
    return next(iter(spaces.values()))


def check_array(name: str, array: Any) -> None:
    """Raise TypeError unless `array` is dense, real and floating, of at most 64 bits."""
    if is_sparse(array):
        msg = f"`{name}` must be a dense array; got a sparse {type(array).__name__}."
        raise TypeError(msg)
    xp = namespace_of(name, array)
    if not is_real_floating(array.dtype, xp):
        msg = f"`{name}` must be real and floating; got dtype {array.dtype}."
        if "float" in str(array.dtype):
            msg = f"`{name}` must be of float64 or narrower; got dtype {array.dtype}."
        raise TypeError(msg)


def namespace_of(name: str, array: Any) -> Namespace:
    """Return the namespace of an array, which messages call `name`.

    Raises
    ------
    TypeError
        If it is no array as the array API standard has it: a matrix, say, or a masked array.
    """
    try:
        return namespace(array)
    except TypeError:
        msg = (
            f"`{name}` must be an array of a library that follows the array API standard; "
            f"got {type(array).__name__}."
        )
        raise TypeError(msg) from None


def check_real(name: str, array: Any) -> None:
    """Raise unless `array` is an array of real numbers."""
    namespace_of(name, array)
    if any(kind in str(array.dtype) for kind in ("complex", "bool", "<U", "object")):
        msg = f"`{name}` must be of real numbers; got dtype {array.dtype}."
        raise TypeError(msg)


def check_names(name: str, mapping: Any, expected: Mapping[str, Any], what: str = "leaf") -> None:
    """Raise unless `mapping` has exactly the keys of `expected`."""
    if not isinstance(mapping, Mapping):
        msg = (
            f"`{name}` must be a mapping with the names of `params`; got {type(mapping).__name__}."
        )
        raise TypeError(msg)
    if mapping.keys() != expected.keys():
        missing = [key for key in expected if key not in mapping]
        unknown = [key for key in mapping if key not in expected]
        parts = [f"lacks {what} {missing[0]!r}"] if missing else []
        parts += [f"has unknown {what} {unknown[0]!r}"] if unknown else []
        msg = f"`{name}` {' and '.join(parts)}; expected exactly: {', '.join(expected)}."
        raise ValueError(msg)


def check_blocks(name: str, mapping: Any, blocks: Mapping[str, Any]) -> None:
    """Raise where a mapping, if it is one, has a key that is no block's name."""
    for key in mapping if isinstance(mapping, Mapping) else ():
        if key not in blocks:
            msg = f"`{name}` has unknown block {key!r}; expected any of: {', '.join(blocks)}."
            raise ValueError(msg)


def check_leaves(
    name: str, mapping: Mapping[str, Any], like: Mapping[str, Any], shapes: Leaves[tuple[int, ...]]
) -> None:
    """Raise unless the values that are not None are arrays that fit those of `like`."""
    for key, shape in shapes.items():
        if mapping[key] is not None:
            check_leaf(f"{name}[{key!r}]", mapping[key], like[key], shape)


def check_leaf(name: str, array: Any, like: Any, shape: tuple[int, ...]) -> None:
    """Raise unless `array` is dense, real, of the library of `like` and of this shape."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        msg = f"`{name}` must be an array; got {type(array).__name__}."
        raise TypeError(msg)
    if tuple(array.shape) != shape:
        msg = f"`{name}` has shape {tuple(array.shape)}; expected {shape}."
        raise ValueError(msg)
    if array.dtype != like.dtype or is_sparse(array):
        check_array(name, array)
    if namespace_of(name, array) is not namespace(like):
        msg = (
            f"`{name}` must be an array of {namespace(like).__name__}, like its parameter; "
            f"got {type(array).__module__}.{type(array).__name__}."
        )
        raise TypeError(msg)


def check_grads(grads: Any, params: Mapping[str, Any], shapes: Leaves[tuple[int, ...]]) -> None:
    """Raise unless `grads` holds for every leaf None or a gradient of its shape."""
    check_names("grads", grads, shapes)
    check_leaves("grads", grads, params, shapes)


def check_products(
    source: str, products: Any, tangents: Mapping[str, Any], grads: Mapping[str, Any]
) -> None:
    """Raise unless `hvp`, or `third`, returned an array like the tangents where it has to."""
    for name, tangent in tangents.items():
        if grads[name] is None:
            continue
        product = products.get(name) if isinstance(products, Mapping) else products
        shape, found = tuple(tangent.shape), getattr(product, "shape", None)
        if found is None or tuple(found) != shape:
            got = "nothing" if product is None else type(product).__name__
            got = got if found is None else f"shape {tuple(found)}"
            msg = f"`{source}` must return for {name!r} an array of shape {shape}, " + (
                f"a product per tangent of {shape[1:]}; got {got}."
                if source == "hvp"
                else f"a product per pair of tangents of {shape[2:]}; got {got}."
            )
            raise ValueError(msg)
        check_leaf(f"{source}(...)[{name!r}]", product, tangent, shape)


def check_unit_steps(
    unit_steps: Any, grads: Mapping[str, Any], params: Mapping[str, Any], plan: Plan
) -> None:
    """Raise unless `unit_steps` holds the steps of the leaves that have theirs made elsewhere."""
    given = {} if unit_steps is None else unit_steps
    if not isinstance(given, Mapping):
        msg = f"`unit_steps` must be a mapping of leaf to array; got {unit_steps!r}."
        raise TypeError(msg)
    for name, rule in plan.rules.items():
        if is_opaque(rule) and grads[name] is not None:
            if given.get(name) is None:
                msg = (
                    f"`unit_steps[{name!r}]` is needed by base {rule!r}: what its optimizer would "
                    "take from the weights in this step at step size 1."
                )
                raise ValueError(msg)
            check_leaf(f"unit_steps[{name!r}]", given[name], params[name], plan.shapes[name])
    for name in given:
        if name not in plan.rules or not is_opaque(plan.rules[name]):
            whose = "an unknown leaf" if name not in plan.rules else repr(plan.rules[name])
            msg = f"`unit_steps[{name!r}]` is of {whose}; steps are taken for base `Opaque` alone."
            raise ValueError(msg)


def check_meta_grads(
    meta_grads: Any,
    params: Mapping[str, Any],
    shapes: Leaves[tuple[int, ...]],
    *,
    held_out: bool,
) -> None:
    """Raise unless `meta_grads` holds gradients of leaves, and these are asked for."""
    if meta_grads is None:
        return
    if not held_out:
        msg = (
            "`meta_grads` must be left out without `held_out`, by which meta-gradients are made "
            "with them in every step that is given some, and with nothing else: make the "
            "optimizer with held_out=True."
        )
        raise ValueError(msg)
    if not isinstance(meta_grads, Mapping):
        msg = f"`meta_grads` must be a mapping of leaf to array; got {type(meta_grads).__name__}."
        raise TypeError(msg)
    for name, grad in meta_grads.items():
        if name not in shapes:
            msg = f"`meta_grads` has unknown leaf {name!r}; expected any of: {', '.join(shapes)}."
            raise ValueError(msg)
        if grad is not None:
            check_leaf(f"meta_grads[{name!r}]", grad, params[name], shapes[name])


def check_copies(copies: Mapping[str, int], names: Mapping[str, Any]) -> None:
    """Raise unless `copies` has positive integers for some of the leaves."""
    if not isinstance(copies, Mapping):
        msg = f"`copies` must be a mapping of leaf to integer; got {copies!r}."
        raise TypeError(msg)
    for name, number in copies.items():
        if name not in names:
            msg = f"`copies` has unknown leaf {name!r}; expected any of: {', '.join(names)}."
            raise ValueError(msg)
        if not isinstance(number, int | np.integer) or number < 1:
            msg = f"`copies[{name!r}]` must be a positive integer; got {number!r}."
            raise ValueError(msg)


def multipliers(lr: Any, names: Leaves[Any]) -> Leaves[Any]:
    """Return for every leaf its multiplier, see `multiplier`.

    Raises
    ------
    ValueError
        If a number is negative or not finite, an array is not 0-d, or a name is amiss.
    """
    if isinstance(lr, Mapping):
        check_names("lr", lr, names)
        known: dict[int, Any] = {}  # an array of several leaves is one array
        for name in names:
            if id(lr[name]) not in known:
                known[id(lr[name])] = multiplier(f"lr[{name!r}]", lr[name])
        return per_leaf((name, known[id(lr[name])]) for name in names)
    value = multiplier("lr", lr)
    return per_leaf((name, value) for name in names)


def multiplier(name: str, lr: Any) -> Any:
    """Return a multiplier, which messages call `name`: a float or an array of shape ().

    One below the least normal float32 is 0: there a step would be rounded to none, and whether the
    leaf rests must not depend on who rounds. A schedule that ends at 0 may end below it by
    rounding, so the like is 0 too. What is further below is an error, but of an array, at which
    nothing looks here, since that would wait for a device: there it is 0.
    """
    if isinstance(lr, np.ndarray) and lr.shape == () and is_number(lr[()]):
        lr = lr[()]
    if is_number(lr):
        check_number(name, lr if lr < -ROUNDING else abs(lr), 0.0)
        return float(lr) if lr >= SMALLEST else 0.0
    if getattr(lr, "shape", None) != ():
        msg = f"`{name}` must be a number or an array of shape (); got {lr!r}."
        raise ValueError(msg)
    check_real(name, lr)
    xp = namespace(lr)
    least = SMALLEST if is_real_floating(lr.dtype, xp) else 1
    return xp.where(lr < least, xp.zeros_like(lr), lr)


def taken_for_step_size(multipliers: Iterable[Any], whose: str = "`lr`") -> str | None:
    """Return a warning where the multipliers of all leaves look like step sizes; else None.

    For adapters, at construction: frameworks hand over learning rates of their own there. Later,
    in a warm-up say, any multiplier is as good as another, and 0 freezes.

    Parameters
    ----------
    multipliers : iterable of float, array or schedule
        At what is no number nothing is looked.
    whose : str
        What the message calls them.
    """
    given = list(multipliers)
    largest = max(given) if given and all(map(is_number, given)) else 0.0
    if not 0.0 < largest < USUAL_MULTIPLIER:
        return None
    return (
        f"{whose} is {largest:g}, which multiplies the learned step sizes and is no step size. To "
        f"start with that one, write `step_size={largest:g}` and leave `lr` at 1.0; give a trainer "
        "that passes a learning rate 1.0."
    )


def check_bounds(bounds: Any, span: tuple[float, float]) -> None:
    """Raise unless `bounds` is None, or pairs lo < hi within the range of the step-size map."""
    pairs = bounds if isinstance(bounds, Mapping) else {None: bounds}
    for key, pair in pairs.items():
        name = "bounds" if key is None else f"bounds[{key!r}]"
        if pair is None:
            continue
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            msg = f"`{name}` must be None or a pair (lo, hi); got {pair!r}."
            raise ValueError(msg)
        lo, hi = pair
        if not all(map(_is_bound, pair)) or not span[0] <= lo < hi <= span[1]:
            msg = f"`{name}` must satisfy {span[0]:g} <= lo < hi <= {span[1]:g}; got {pair!r}."
            raise ValueError(msg)


def _is_bound(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, float) and math.isinf(value))


def check_step_size(
    name: str, value: Any, span: tuple[float, float], bounds: Mapping[str, Any]
) -> None:
    """Raise unless all numbers of `value` lie inside the map's range and the bounds, by name."""
    if not _is_number(value) and not hasattr(value, "dtype"):
        msg = f"`{name}` must be a number, or a mapping of block to number or array; got {value!r}."
        raise TypeError(msg)
    if hasattr(value, "dtype"):
        check_real(name, value)
    if not at_hand(value):
        return
    values = to_numpy(value).astype(np.float64)
    inside = (values > span[0]) & (values < span[1])
    if not np.all(inside):
        msg = f"`{name}` must lie between {span[0]:g} and {span[1]:g}, exclusively; got {value!r}."
        raise ValueError(msg)
    for key, pair in bounds.items():
        if pair is not None and not np.all((values >= pair[0]) & (values <= pair[1])):
            msg = f"`{name}` must lie within `{key}` {tuple(pair)}; got {value!r}."
            raise ValueError(msg)


def check_rules(base: Any, meta: Any) -> None:
    """Raise unless `base` is a rule or a mapping of them and `meta` a rule without decay."""
    if isinstance(base, Mapping) and not base:
        msg = "`base` must be a rule or a mapping of pattern to rule; got an empty mapping."
        raise ValueError(msg)
    for key in base if isinstance(base, Mapping) else ():
        if not isinstance(key, str):
            msg = f"`base` must have patterns, strings, as keys; got {key!r}."
            raise TypeError(msg)
    for name, rule in (by_argument(base) | {"meta": meta}).items():
        check_rule(name, rule)
        check_elementwise(name, rule)
        not_negative(f"{name}.weight_decay", rule.weight_decay)
        optional(f"{name}.decay_step_size", decay_step_size(rule))
        if is_opaque(rule) and name == "meta":
            msg = f"`meta` must have a formula, and `Opaque` has none; got {rule!r}."
            raise ValueError(msg)
        if name != "meta" and any(isinstance(one, FastStart) for one in layers(rule)):
            msg = f"`{name}` must be an update of weights, and `FastStart` is none; got {rule!r}."
            raise ValueError(msg)
    uses = any(map(uses_param, layers(meta)))
    if uses or hasattr(meta, "slot_shapes"):
        what = "`uses_param`" if uses else "`slot_shapes`"
        msg = f"`meta` must have no {what}, which is for updates of weights; got {meta!r}."
        raise ValueError(msg)
    for slot in (COMPENSATION, PEAK, SCALE, RECOVERIES):
        if slot in meta.slots:
            msg = f"`meta` must have no slot {slot!r}, which blocks have already; got {meta!r}."
            raise ValueError(msg)
    if meta.weight_decay != 0.0:
        msg = (
            "`meta` must have weight_decay 0, for it would pull the step sizes towards 1; "
            f"got {meta.weight_decay}."
        )
        raise ValueError(msg)


def check_learned(base: Any, meta: Any) -> None:
    """Raise unless what is learned of the rules are numbers that they let be learned."""
    if learned_in(meta):
        place = next(iter(learned_in(meta)))
        msg = f"`meta` must have numbers, and none that is learned; got {place} of {meta!r}."
        raise ValueError(msg)
    for name, rule in by_argument(base).items():
        for place, learned in learned_in(rule).items():
            fields = learnable(rule)
            if field_of(place) not in fields:
                those = f"may be {', '.join(fields)}" if fields else "is nothing"
                msg = (
                    f"`{place}` of `{name}` cannot be learned: what can be of {rule!r}, by its "
                    f"`learnable`, {those}."
                )
                raise ValueError(msg)
            plain = at_start(rule)
            if scope_of(plain) == "leaf" and place != "weight_decay":
                msg = (
                    f"`{place}` of `{name}` cannot be learned: a rule has to have the scope "
                    f'"weight" for that, as jets are pushed through it; got {rule!r}.'
                )
                raise ValueError(msg)
            try:
                reaches = any(fed_by(plain, place, learned.start))
            except Exception as error:  # whatever a rule does that jets cannot
                msg = (
                    f"`{place}` of `{name}` cannot be learned, as no derivative can be taken of "
                    f"the direction: {error} Write it with operators and the functions of "
                    f"metaopt.numerics; got {rule!r}."
                )
                raise ValueError(msg) from error
            if place != "weight_decay" and not reaches:
                msg = (
                    f"`{place}` of `{name}` cannot be learned: no derivative passes from it to the "
                    f"direction; got {rule!r}."
                )
                raise ValueError(msg)


def check_formulas(base: Any, instead: str) -> None:
    """Raise ValueError where a rule of `base` has no formula.

    Parameters
    ----------
    base : Rule, or mapping of pattern to Rule
    instead : str
        What to do then, in the message.
    """
    for name, rule in by_argument(base).items():
        if is_opaque(rule):
            msg = f"`{name}` must have a formula, and {rule!r} has none: {instead}"
            raise ValueError(msg)


def check_derivatives(base: Any, meta: Rule | None) -> None:
    """Raise unless derivatives can be pushed through the rules; of `meta` unless it is None."""
    for name, rule in (by_argument(base) | ({} if meta is None else {"meta": meta})).items():
        if scope_of(rule) == "leaf":
            msg = (
                f'`curvature` other than "none" needs rules of the scope "weight", but `{name}` '
                f'sees whole leaves. If it is elementwise, say `scope = "weight"`; got {rule!r}.'
            )
            raise ValueError(msg)
        try:
            follows_weights(rule)
        except Exception as error:  # whatever a rule does that jets cannot
            msg = (
                f"`{name}` has a direction of which no derivative can be taken: {error} Write it "
                "with operators and the functions of metaopt.numerics, or use "
                f'`curvature="none"`; got {rule!r}.'
            )
            raise ValueError(msg) from error


def by_argument(base: Any) -> dict[str, Any]:
    """Return base updates by what messages call them."""
    if not isinstance(base, Mapping):
        return {"base": base}
    return {f"base[{key!r}]": rule for key, rule in base.items()}


def check_flag(name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        msg = f"`{name}` must be True or False; got {value!r}."
        raise TypeError(msg)


def check_callable(name: str, value: Any) -> None:
    """Raise unless `value` can be called."""
    if not callable(value):
        msg = f"`{name}` must be callable; got {value!r}."
        raise TypeError(msg)


def check_is_state(state: Any) -> None:
    """Raise unless `state` is a State."""
    if not isinstance(state, State):
        msg = f"`state` must be the State that `init` made; got {type(state).__name__}."
        raise TypeError(msg)


def check_library(params: Mapping[str, Any], state: State) -> None:
    """Raise unless the state's arrays are of the one library of `params`."""
    ours, theirs = namespace(next(iter(params.values()))), namespace(state.step)
    if ours is not theirs:
        msg = f"`params` are arrays of {ours.__name__}, but `state` of {theirs.__name__}."
        raise TypeError(msg)


def averages_and_traces(state: State) -> Leaves[Any]:
    """Return for each leaf its average or its trace, or raise ValueError where it has neither."""
    for name in state.count:
        if name not in state.average and name not in state.trace:
            msg = f"`state` must have a `trace` or an `average` of leaf {name!r}; got neither."
            raise ValueError(msg)
    return per_leaf(
        (name, state.average[name] if name in state.average else state.trace[name])
        for name in state.count
    )


def check_state(state: State, plan: Plan) -> None:
    """Raise unless `state` is what `init` makes for leaves and a configuration like these."""
    for name, spec in plan.state.items():
        mismatch = _mismatch(getattr(state, name), spec)
        if mismatch is not None:
            msg = (
                f"`state.{name}{mismatch}. Pass the state that `init` of this configuration made "
                "for these params."
            )
            raise ValueError(msg)


def _mismatch(value: Any, spec: Any) -> str | None:
    """Return where `value` differs from its specification and how, from "]`" on; None if not."""
    if not isinstance(spec, Mapping):
        if isinstance(value, Mapping):
            return f"` holds {sorted(value)}; expected an array of shape {spec.shape}"
        if tuple(value.shape) != spec.shape:
            return f"` has shape {tuple(value.shape)}; expected {spec.shape}"
        if value.dtype != spec.dtype:
            return f"` has dtype {value.dtype}; expected {spec.dtype}"
        return None
    if not isinstance(value, Mapping) or value.keys() != spec.keys():
        got = sorted(value) if isinstance(value, Mapping) else f"an array of shape {value.shape}"
        return f"` holds {got}; expected {sorted(spec)}"
    for key, part in spec.items():
        mismatch = _mismatch(value[key], part)
        if mismatch is not None:
            return f"[{key!r}]{mismatch}"
    return None


def check_curvature(
    hvp: Any,
    third: Any,
    hessian_diagonal: Any,
    grads: Mapping[str, Any],
    params: Mapping[str, Any],
    plan: Plan,
) -> None:
    """Raise unless what the curvature needs is given."""
    if plan.curvature == "exact" and not callable(hvp):
        msg = (
            f'`hvp` is needed by `curvature="exact"`; got {hvp!r}. Pass a callable from tangents '
            "(name -> array with one leading axis) to Hessian-vector products: with JAX, "
            "jax.vmap over jax.jvp of the gradient; with torch, torch.func.vmap over the function "
            "that torch.func.vjp of torch.func.grad returns (the Hessian is symmetric); from "
            "gradients alone, "
            "metaopt.curvature.central_difference(grad_fn, params)."
        )
        raise ValueError(msg)
    if plan.third and not callable(third):
        msg = (
            f'`third` is needed by `approximation="full"`; got {third!r}. Pass a callable from two '
            "mappings of tangents U and V (name -> array with one leading axis) to the third "
            "derivative of the loss, entry [j, k] of each array that along U[j] and V[k]: the "
            "derivative of a Hessian-vector product, by jax.jvp or torch.func.jvp of it; zeros "
            "where the loss is quadratic."
        )
        raise ValueError(msg)
    if plan.curvature == "diagonal":
        if hessian_diagonal is None:
            msg = (
                '`hessian_diagonal` is needed by `curvature="diagonal"`: a mapping of name to the '
                "diagonal of the Hessian, known in closed form for a linear model, or estimated by "
                "metaopt.curvature.hutchinson(hvp, probes)."
            )
            raise ValueError(msg)
        check_names("hessian_diagonal", hessian_diagonal, plan.shapes)
        check_leaves("hessian_diagonal", hessian_diagonal, params, plan.shapes)
        for name, grad in grads.items():
            if grad is not None and hessian_diagonal[name] is None:
                msg = (
                    f"`hessian_diagonal[{name!r}]` must be an array, as its gradient is; got None."
                )
                raise ValueError(msg)
