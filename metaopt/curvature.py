"""Where Hessian-vector products come from.

The curvature option of `MetaOptimize` says how much of the Hessian the traces follow:
docs/mathematics.md section 4. The functions here make what it needs from gradients alone.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metaopt.arrays import Array, Leaves, cast, compute_dtype, is_real_floating, namespace

__all__ = ["Curvature", "Diagonal", "central_difference", "hutchinson"]


@dataclass(frozen=True, slots=True)
class Curvature:
    """How much of the Hessian the traces follow.

    Parameters
    ----------
    kind : {"none", "diagonal", "exact"}
        As `MetaOptimize` takes it by name.
    """

    kind: str


@dataclass(frozen=True, slots=True)
class Diagonal(Curvature):
    """The diagonal of the Hessian, given to `step` as `hessian_diagonal`.

    Parameters
    ----------
    rectified : bool, default False
        Cap the diagonal so that the factor on the trace is never negative, as in IDBD (section
        12). For SGD without momentum only.
    """

    kind: str = field(init=False, default="diagonal", repr=False)
    rectified: bool = False


NAMED = {"none": Curvature("none"), "diagonal": Diagonal(), "exact": Curvature("exact")}


def curvature(value: Any) -> Curvature:
    """Return the curvature that `value` names or is; raise ValueError for anything else."""
    if isinstance(value, Diagonal):
        return value
    if isinstance(value, Curvature) and value.kind in NAMED:
        return NAMED[value.kind]
    if isinstance(value, str) and value in NAMED:
        return NAMED[value]
    msg = (
        f"`curvature` must be one of {', '.join(map(repr, NAMED))} or a "
        f"metaopt.curvature.Diagonal; got {value!r}."
    )
    raise ValueError(msg)


def central_difference(
    grad_fn: Callable[[dict[str, Any]], Mapping[str, Any]],
    params: Mapping[str, Array],
    *,
    reduce: Callable[[list[Any]], Sequence[Any]] | None = None,
) -> Callable[[Mapping[str, Array]], Leaves[Any]]:
    r"""Return an `hvp` made of gradients alone, for wherever second derivatives are not to be had.

    .. math::
        \nabla^2 f(w)\, v \approx \frac{\nabla f(w + \epsilon v) - \nabla f(w - \epsilon v)}
            {2 \epsilon}

    Two gradients a tangent. With :math:`\epsilon` the cube root of the coarsest leaf's precision,
    times :math:`(1 + |w|) / |v|`, the error is about 1e-10 of the product in float64 and 1e-4 in
    float32. It is one displacement for all leaves: where they differ by orders of magnitude, those
    of small numbers lose digits, and products by automatic differentiation are better.

    Parameters
    ----------
    grad_fn : callable
        From a mapping of params to a mapping of gradients of the same names, of the loss of this
        very step: same data, same random numbers. A gradient may be None.
    params : mapping of leaf name to array
        Where to differentiate: the params handed to `step`.
    reduce : callable, optional
        As `MetaOptimize.step` takes it, where these are one device's parts of the leaves.

    Returns
    -------
    callable
        As `MetaOptimize.step` takes it: from a mapping of tangents, each with one leading axis,
        to a mapping of products of the same shapes, or None where the gradient is None.
    """

    def hvp(tangents: Mapping[str, Array]) -> Leaves[Any]:
        xp = namespace(next(iter(params.values())))
        coarsest = max(float(xp.finfo(param.dtype).eps) for param in params.values())
        step = coarsest ** (1.0 / 3.0)
        scale = 1.0 + _norm(xp, params.values(), reduce)
        columns: list[Mapping[str, Any]] = []
        for column in range(next(iter(tangents.values())).shape[0]):
            tangent = {name: values[column, ...] for name, values in tangents.items()}
            length = _norm(xp, tangent.values(), reduce)
            # a zero tangent is stepped along by nothing; its product is then exactly zero
            eps = step * scale / xp.where(length == 0.0, 1.0, length)
            ahead, behind = (
                grad_fn(
                    {
                        name: cast(
                            cast(param, tangent[name].dtype)
                            + cast(sign * eps, tangent[name].dtype) * tangent[name],
                            param.dtype,
                        )
                        for name, param in params.items()
                    }
                )
                for sign in (1.0, -1.0)
            )
            columns.append({name: _slope(ahead, behind, eps, tangent, name) for name in params})
        return OrderedDict(
            (
                name,
                None
                if any(column[name] is None for column in columns)
                else xp.stack([column[name] for column in columns]),
            )
            for name in params
        )

    return hvp


def _slope(ahead: Any, behind: Any, eps: Any, tangent: Any, name: str) -> Any:
    if ahead[name] is None or behind[name] is None:
        return None
    dtype = tangent[name].dtype
    change = cast(ahead[name], dtype) - cast(behind[name], dtype)
    return change / cast(2.0 * eps, dtype)


def _norm(xp: Any, arrays: Any, reduce: Any) -> Any:
    """Return the norm of all arrays together, in float32 or wider."""
    total = None
    for array in arrays:
        wide = cast(array, compute_dtype(array.dtype, xp))
        square = xp.sum(wide * wide)
        total = square if total is None else total + square
    return xp.sqrt(total if reduce is None else reduce([total])[0])


def hutchinson(
    hvp: Callable[[Mapping[str, Array]], Mapping[str, Any]], probes: Mapping[str, Array]
) -> Leaves[Any]:
    """Return Hutchinson's estimate of the Hessian's diagonal, for `hessian_diagonal`.

    The mean over probes p of p times the Hessian times p; unbiased for entries that are
    independent, of mean 0 and variance 1, such as random signs, and exact with random signs where
    the Hessian is diagonal.

    Parameters
    ----------
    hvp : callable
        As `MetaOptimize.step` takes it.
    probes : mapping of leaf name to array of shape `(k, *shape)`
        k probes, of one floating dtype; draw new ones for every step.

    Returns
    -------
    mapping of leaf name to array, None where `hvp` returns None

    Raises
    ------
    ValueError
        If a probe is not real and floating, or `hvp` returns nothing for it.
    """
    for name, probe in probes.items():
        if not is_real_floating(probe.dtype, namespace(probe)):
            msg = f"`probes[{name!r}]` must be real and floating; got dtype {probe.dtype}."
            raise ValueError(msg)
    products = hvp(probes)
    for name in probes:
        if name not in products:
            msg = f"`hvp` must return for {name!r} an array or None; got nothing."
            raise ValueError(msg)
    return OrderedDict(
        (
            name,
            None
            if products[name] is None
            else namespace(probe).mean(probe * products[name], axis=0),
        )
        for name, probe in probes.items()
    )
