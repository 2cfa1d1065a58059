"""What a run is configured by, checked once, and what it means for given parameters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from metaopt import inputs
from metaopt.arrays import Array, Leaves, at_hand, filled, namespace, per_leaf, to_numpy
from metaopt.blocks import Blocks, Partition, partition
from metaopt.curvature import Curvature, Diagonal, curvature
from metaopt.plan import Following, Plan, following, make_plan, rules_by_leaf
from metaopt.rules.rule import Rule, in_role
from metaopt.rules.sgd import SGD
from metaopt.state import State
from metaopt.step_sizes import StepSizeMap, is_exponential, step_size_map

__all__ = ["Configuration"]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The options of `metaopt.MetaOptimize`, where they are described."""

    base: Rule | Mapping[str, Rule]
    meta: Rule
    step_size: float | Mapping[str, Any] = 1e-4
    meta_lr: float = 1e-3
    discount: float = 1.0
    blocks: str | Mapping[str, Any] | Partition = "scalar"
    sigma: str | StepSizeMap = "exp"
    bounds: tuple[float, float] | Mapping[str, Any] | None = None
    approximation: str = "l"
    curvature: str | Curvature = "none"
    meta_first: bool = False
    skip_nonfinite: bool = False
    recover: bool = False

    _partition: Partition = field(init=False, repr=False, compare=False)
    _sigma: StepSizeMap = field(init=False, repr=False, compare=False)
    _curvature: Curvature = field(init=False, repr=False, compare=False)
    _beta_bounds: Any = field(init=False, repr=False, compare=False)
    _plans: dict[Any, Plan] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        inputs.check_rules(self.base, self.meta)
        meta_lr = inputs.hyperparameter("meta_lr", self.meta_lr, 0.0)
        discount = inputs.hyperparameter("discount", self.discount, 0.0, 1.0)
        inputs.check_choice("approximation", self.approximation, ("l", "2x2", "full"))
        inputs.check_flag("meta_first", self.meta_first)
        inputs.check_flag("skip_nonfinite", self.skip_nonfinite)
        inputs.check_flag("recover", self.recover)
        sigma, kind = step_size_map(self.sigma), curvature(self.curvature)
        inputs.check_bounds(self.bounds, sigma.range)
        sizes = self.step_size
        for key, size in sizes.items() if isinstance(sizes, Mapping) else [(None, sizes)]:
            name = "step_size" if key is None else f"step_size[{key!r}]"
            inputs.check_step_size(name, size, sigma.range, self._bounds_of(key))
            _check_reached(name, size, sigma)
        self._check_together(sigma, kind)
        self._settle(sigma, kind, meta_lr=meta_lr, discount=discount)

    def _check_together(self, sigma: StepSizeMap, kind: Curvature) -> None:
        """Raise where two options do not go together."""
        if self.recover:
            for option, fits in (
                ('`curvature` "none"', kind.kind == "none"),
                ('`sigma` "exp"', is_exponential(sigma)),
                ("`skip_nonfinite` False", not self.skip_nonfinite),
            ):
                if not fits:
                    name = option.split("`")[1]
                    msg = f"`recover` needs {option}; got {getattr(self, name)!r}."
                    raise ValueError(msg)
        if self.approximation == "full" and (kind.kind != "exact" or self.meta_first):
            what = (
                f'`curvature` "exact"; got {self.curvature!r}'
                if kind.kind != "exact"
                else "`meta_first` False; got True"
            )
            msg = f'`approximation="full"` needs {what}.'
            raise ValueError(msg)
        if kind.kind != "none":
            inputs.check_derivatives(self.base, None if self.approximation == "l" else self.meta)
        if isinstance(kind, Diagonal) and kind.rectified:
            for rule in self._rules():
                if not isinstance(rule, SGD) or rule.slots:
                    msg = (
                        "`curvature` Diagonal(rectified=True) needs SGD without momentum as "
                        f"`base`; got {rule!r}."
                    )
                    raise ValueError(msg)

    def _settle(self, sigma: StepSizeMap, kind: Curvature, **numbers: Any) -> None:
        """Set the fields as they are kept: numbers as floats, rules in their roles."""
        sizes = self.step_size
        flags = ("meta_first", "skip_nonfinite", "recover")  # NumPy's cannot be saved
        settled = numbers | {flag: bool(getattr(self, flag)) for flag in flags}
        settled |= {
            "base": _in_base_role(self.base),
            "meta": in_role(self.meta, "meta"),
            "step_size": {key: _size(size) for key, size in sizes.items()}
            if isinstance(sizes, Mapping)
            else _size(sizes),
            "bounds": _floats(self.bounds),
            "blocks": {
                group: tuple(patterns) if isinstance(patterns, list) else patterns
                for group, patterns in self.blocks.items()
            }
            if isinstance(self.blocks, Mapping)
            else self.blocks,
            "_partition": partition(self.blocks),
            "_sigma": sigma,
            "_curvature": kind,
            "_beta_bounds": {key: _bounds_of_beta(sigma, pair) for key, pair in self.bounds.items()}
            if isinstance(self.bounds, Mapping)
            else _bounds_of_beta(sigma, self.bounds),
            "_plans": {},
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        """Return whether the other is the same configuration; step sizes may be arrays."""
        if not isinstance(other, Configuration):
            return NotImplemented
        return all(
            _equal(getattr(self, option.name), getattr(other, option.name))
            for option in fields(self)
            if option.init
        )

    def _bounds_of(self, key: str | None) -> dict[str, Any]:
        """Return the bounds by name that hold for a block; for all blocks where `key` is None."""
        if not isinstance(self.bounds, Mapping):
            return {"bounds": self.bounds}
        return {
            f"bounds[{name!r}]": pair
            for name, pair in self.bounds.items()
            if key is None or key == name
        }

    def limits(self, blocks: Blocks, beta: Any) -> tuple[Any, Any]:
        """Return the bounds on beta, values per block, as `metaopt.meta.meta_step` takes them."""
        if not isinstance(self._beta_bounds, Mapping):
            return self._beta_bounds
        like = next(iter(beta.values())) if isinstance(beta, Mapping) else beta
        return tuple(
            blocks.from_names(
                {
                    key: filled(like, (), self._beta_bounds.get(key, self._sigma.beta_range)[end])
                    for key in blocks.families
                }
            )
            for end in (0, 1)
        )

    @property
    def sigma_map(self) -> StepSizeMap:
        """The map that `sigma` names or is."""
        return self._sigma

    @property
    def rectified(self) -> bool:
        """Whether the diagonal of the Hessian is capped as in IDBD."""
        return isinstance(self._curvature, Diagonal) and self._curvature.rectified

    def _rules(self) -> list[Rule]:
        return list(self.base.values()) if isinstance(self.base, Mapping) else [self.base]

    def plan(self, params: Mapping[str, Array], traced: Iterable[str] = ()) -> Plan:
        """Return what this configuration means for `params`: their rules, blocks and dtypes.

        Only names, shapes and dtypes are looked at; the result is kept for the next call.

        Parameters
        ----------
        params : mapping of leaf name to array
        traced : iterable of str, default none
            Leaves of which a state has traces even where averages could stand for them: that of
            narrower weights, which are handed over in the compute dtype.

        Raises
        ------
        ValueError
            If patterns or a partition do not fit, or dense traces would be too large.
        TypeError
            If `params` are not arrays of one library.
        """
        return self._plan(
            inputs.library(params),
            per_leaf((name, tuple(param.shape)) for name, param in params.items()),
            per_leaf((name, param.dtype) for name, param in params.items()),
            frozenset(traced),
        )

    def _plan(
        self, xp: Any, shapes: Leaves[Any], dtypes: Leaves[Any], traced: frozenset[str]
    ) -> Plan:
        leaves = (xp.__name__, tuple(shapes.items()), tuple(dtypes.values()))
        key = (*leaves, traced)
        if key not in self._plans:
            rules = rules_by_leaf(self.base, shapes)
            plan = make_plan(
                xp,
                shapes,
                dtypes,
                rules=rules,
                meta=self.meta,
                partition=self._partition,
                follow=self._following(rules),
                traced=traced,
                recover=self.recover,
            )
            if self.recover and len(plan.averaged) < len(shapes):
                name = next(name for name in shapes if name not in plan.averaged)
                msg = (
                    f"`recover` needs parameters of float32 or wider; got `params[{name!r}]` of "
                    f"{dtypes[name]}, or a state that has its trace."
                )
                raise ValueError(msg)
            inputs.check_blocks("bounds", self.bounds, plan.blocks.families)
            self._plans[key] = plan
            # also as the plan of its own states, which `step` looks for, maybe while it is compiled
            self._plans[*leaves, frozenset(plan.state["trace"])] = plan
        return self._plans[key]

    def _following(self, rules: Leaves[Rule]) -> Following:
        return following(
            rules,
            self.meta,
            self._curvature,
            self.approximation,
            self.discount,
            whole=is_exponential(self._sigma),
        )

    def plan_of(self, state: State) -> Plan:
        """Return the plan of the params that `state` belongs to, or raise if it is not of this.

        Parameters
        ----------
        state : State

        Raises
        ------
        ValueError, TypeError
            If it is a state of another configuration, or none.
        """
        inputs.check_is_state(state)
        kept = inputs.averages_and_traces(state)
        columns = self._following(rules_by_leaf(self.base, kept)).curvature == "exact"
        shapes = per_leaf((name, tuple(array.shape[columns:])) for name, array in kept.items())
        dtypes = per_leaf((name, array.dtype) for name, array in kept.items())
        plan = self._plan(namespace(state.step), shapes, dtypes, frozenset(state.trace))
        inputs.check_state(state, plan)
        return plan


def _size(size: Any) -> Any:
    """Return a step size as a float, several as a NumPy array; as it is without a value yet."""
    if not at_hand(size):
        return size
    sizes = to_numpy(size).astype(np.float64)
    return float(sizes) if sizes.ndim == 0 else sizes


def _in_base_role(base: Any) -> Any:
    """Return rules as they act on weights; what was one object is one."""
    if not isinstance(base, Mapping):
        return in_role(base, "base")
    made = {id(rule): in_role(rule, "base") for rule in base.values()}
    return {pattern: made[id(rule)] for pattern, rule in base.items()}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


def _bounds_of_beta(
    sigma: StepSizeMap, bounds: tuple[float, float] | None
) -> tuple[float | None, float | None]:
    """Return the closer of the bounds and the map's own on beta."""
    lo, hi = (
        own if bound == end else _float(sigma.inverse(np.asarray(bound, dtype=np.float64)))
        for bound, end, own in zip(
            sigma.range if bounds is None else bounds, sigma.range, sigma.beta_range, strict=True
        )
    )
    lo, hi = max(lo, sigma.beta_range[0]), min(hi, sigma.beta_range[1])
    if lo >= hi:
        msg = f"`bounds` must leave step sizes between {_reach(sigma)}; got {bounds!r}."
        raise ValueError(msg)
    return lo, hi


def _reach(sigma: StepSizeMap) -> str:
    """Return in words between which step sizes beta is kept."""
    least, largest = (float(sigma.value(np.asarray(end))) for end in sigma.beta_range)
    return f"{least:.3g} and {largest:.3g}"


def _check_reached(name: str, size: Any, sigma: StepSizeMap) -> None:
    """Raise where step sizes lie so far out that beta is not kept there (section 8)."""
    if at_hand(size):
        beta: Any = sigma.inverse(to_numpy(size).astype(np.float64))
        lo, hi = sigma.beta_range
        slack = 1e-6 * np.abs(beta)
        if not np.all((beta >= lo - slack) & (beta <= hi + slack)):
            msg = f"`{name}` must lie between {_reach(sigma)}; got {size!r}."
            raise ValueError(msg)


def _float(value: Any) -> float:
    return float(value)


def _floats(bounds: Any) -> Any:
    """Return a pair of numbers, or a mapping of them, as floats."""
    if isinstance(bounds, Mapping):
        return {key: _floats(pair) for key, pair in bounds.items()}
    return None if bounds is None else tuple(map(float, bounds))
