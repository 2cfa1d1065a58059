"""What a run is configured by, checked once, and what it means for given parameters."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import numpy as np

from metaopt import inputs
from metaopt.arrays import (
    Array,
    Leaves,
    at_hand,
    full,
    map_leaves,
    namespace,
    per_leaf,
    to_numpy,
)
from metaopt.blocks import Blocks, Partition, partition
from metaopt.curvature import Curvature, Diagonal, curvature
from metaopt.names import base_of, plain, rule_of
from metaopt.plan import (
    Following,
    LearnedNumber,
    Plan,
    following,
    make_plan,
    patterns_by_leaf,
    rules_by_leaf,
    with_learned,
)
from metaopt.rules.fast_start import FastStart
from metaopt.rules.learned import Learned, at_start, bound, field_of, learned_in
from metaopt.rules.rule import Rule, in_role, is_opaque, learnable
from metaopt.rules.sgd import SGD
from metaopt.state import State
from metaopt.step_sizes import Decay, StepSizeMap, is_exponential, step_size_map

__all__ = ["BASE", "META", "META_LR", "STEP_SIZE", "Configuration", "RuleLike"]

T_co = TypeVar("T_co", covariant=True)

#: A rule, its name, or a mapping of its name and options; as `base` also these by pattern.
RuleLike: TypeAlias = Rule | str | Mapping[str, Any]

if TYPE_CHECKING:

    class _Takes(Generic[T_co]):
        """Tells type checkers that a field takes more than it holds: rules by name as well."""

        def __get__(self, instance: object, owner: Any) -> T_co: ...

        def __set__(self, instance: object, value: RuleLike) -> None: ...

    _Base: TypeAlias = _Takes[Rule | Mapping[str, Rule]]
    _Meta: TypeAlias = _Takes[Rule]
else:
    _Base = _Meta = RuleLike

#: What is taken where nothing is given, here and in adapters.
BASE, META = "adamw", "fast_start"
STEP_SIZE, META_LR = 1e-4, 1e-2
#: Step size of the meta update of numbers that are learned.
LEARNED_META_LR = 1e-3
#: What a rule says of such a number, and between which values it then has to stay: a decay rate of
#: 0 has no logarithm, and closer to 1 a float32 has few digits of the distance.
SPANS = {"decay": (2.0**-20, 1.0 - 2.0**-22), "exp": (0.0, math.inf)}
#: The discounts where none is given: steps of the last hundred, and of the whole run.
HORIZONS = (0.99, 1.0)
#: Options that are True or False.
FLAGS = ("held_out", "meta_first", "skip_nonfinite", "recover")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The options of `metaopt.MetaOptimize`, where they are described."""

    base: _Base = BASE  # type: ignore[assignment]
    meta: _Meta = META  # type: ignore[assignment]
    step_size: float | Mapping[str, Any] = STEP_SIZE
    meta_lr: float = META_LR
    discount: Any = None
    blocks: str | Mapping[str, Any] | Partition = "scalar"
    sigma: str | StepSizeMap = "exp"
    bounds: tuple[float, float] | Mapping[str, Any] | None = None
    approximation: str = "l"
    curvature: str | Curvature = "none"
    held_out: bool = False
    meta_first: bool = False
    skip_nonfinite: bool = False
    recover: bool = False

    _partition: Partition = field(init=False, repr=False, compare=False)
    _sigma: StepSizeMap = field(init=False, repr=False, compare=False)
    _curvature: Curvature = field(init=False, repr=False, compare=False)
    _beta_bounds: Any = field(init=False, repr=False, compare=False)
    #: Of the numbers that are learned, by name: the patterns of `base` and the place, and what the
    #: value is the step size of.
    _learned: dict[str, tuple[list[str | None], str, "Configuration"]] = field(
        init=False, repr=False, compare=False
    )
    #: The rules, with what these numbers start from in their places.
    _rules_at_start: Any = field(init=False, repr=False, compare=False)
    _plans: dict[Any, Plan] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", base_of(self.base))
        object.__setattr__(self, "meta", rule_of("meta", self.meta))
        for option in ("discount", "blocks", "bounds"):
            object.__setattr__(self, option, plain(getattr(self, option)))
        inputs.check_learned(self.base, self.meta)
        object.__setattr__(self, "_rules_at_start", _each_rule(self.base, at_start))
        inputs.check_rules(self._rules_at_start, self.meta)
        meta_lr = inputs.hyperparameter("meta_lr", self.meta_lr, 0.0)
        inputs.check_choice("approximation", self.approximation, ("l", "2x2", "full"))
        usual = HORIZONS if self.approximation == "l" else 1.0
        discount = inputs.discount(usual if self.discount is None else self.discount)
        for flag in FLAGS:
            inputs.check_flag(flag, getattr(self, flag))
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
        if any(map(is_opaque, self._rules())):
            for option, fits in (("curvature", kind.kind == "none"), ("recover", not self.recover)):
                if not fits:
                    msg = (
                        f"`{option}` must be left out where `base` is `Opaque`, whose directions "
                        f"and moments nobody can change; got {getattr(self, option)!r}."
                    )
                    raise ValueError(msg)
        if self.recover:
            for option, fits in (
                ('`curvature` "none"', kind.kind == "none"),
                ('`sigma` "exp"', is_exponential(sigma)),
                ("`skip_nonfinite` False", not self.skip_nonfinite),
                ("`held_out` False", not self.held_out),
            ):
                if not fits:
                    name = option.split("`")[1]
                    msg = f"`recover` needs {option}; got {getattr(self, name)!r}."
                    raise ValueError(msg)
        if self.held_out and self.approximation != "l":
            msg = (
                '`held_out` needs `approximation` "l": the others follow how the meta-gradient '
                "changes with the weights, by the Hessian of the training loss; got "
                f"{self.approximation!r}."
            )
            raise ValueError(msg)
        if self.approximation == "full" and (kind.kind != "exact" or self.meta_first):
            what = (
                f'`curvature` "exact"; got {self.curvature!r}'
                if kind.kind != "exact"
                else "`meta_first` False; got True"
            )
            msg = f'`approximation="full"` needs {what}.'
            raise ValueError(msg)
        if self.approximation != "l" and isinstance(self.discount, tuple | list):
            msg = (
                f"`approximation` {self.approximation!r} needs one `discount`, as `discount=1.0`: "
                "it follows how beta depends on past ones, and the least of several directions has "
                f"no such derivative; got {self.discount!r}."
            )
            raise ValueError(msg)
        for option, stands in (
            ('`approximation` "full"', self.approximation == "full"),
            ("`curvature` Diagonal(rectified=True)", isinstance(kind, Diagonal) and kind.rectified),
        ):
            if stands and any(map(learned_in, inputs.by_argument(self.base).values())):
                msg = f"`base` must have numbers, and none that is learned, with {option}."
                raise ValueError(msg)
        if kind.kind != "none":
            inputs.check_derivatives(
                self._rules_at_start, None if self.approximation == "l" else self.meta
            )
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
        # NumPy's cannot be saved
        settled = numbers | {flag: bool(getattr(self, flag)) for flag in FLAGS}
        settled |= {
            "base": _each_rule(self.base, _in_base_role),
            "meta": in_role(self.meta, "meta"),
            "step_size": {key: _size(size) for key, size in sizes.items()}
            if isinstance(sizes, Mapping)
            else _size(sizes),
            "bounds": _floats(self.bounds),
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
        object.__setattr__(self, "_rules_at_start", _each_rule(self.base, at_start))
        object.__setattr__(self, "_learned", self._numbers())

    def __eq__(self, other: object) -> bool:
        """Return whether the other is the same configuration; step sizes may be arrays."""
        if not isinstance(other, Configuration):
            return NotImplemented
        return all(
            _equal(getattr(self, option.name), getattr(other, option.name))
            for option in fields(self)
            if option.init
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle consists of; plans are made anew."""
        # they hold dtypes, and those of MLX cannot be copied
        return self.__dict__ | {"_plans": {}}

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
                    key: full(like, (), self._beta_bounds.get(key, self._sigma.beta_range)[end])
                    for key in blocks.families
                }
            )
            for end in (0, 1)
        )

    def _numbers(self) -> dict[str, tuple[list[str | None], str, "Configuration"]]:
        """Return the numbers that are learned: see `_learned`."""
        rules = self.base if isinstance(self.base, Mapping) else {None: self.base}
        found: list[tuple[tuple[str, str], Learned, list[str | None], Configuration]] = []
        for pattern, rule in rules.items():
            for place, learned in learned_in(rule).items():
                kind = learnable(rule)[field_of(place)]
                where = place, kind
                same = [n for n in found if n[0] == where and _equal(n[1], learned)]
                if same:
                    same[0][2].append(pattern)
                    continue
                try:
                    config = self._config_of(learned, kind, at_start(rule))
                except (TypeError, ValueError) as error:
                    said = str(error).replace("`step_size`", "`start`").replace("`sigma`", "`map`")
                    of_whom = "base" if pattern is None else f"base[{pattern!r}]"
                    msg = f"`{of_whom}` cannot have {learned!r} as `{place}`: {said}"
                    raise type(error)(msg) from error
                found.append((where, learned, [pattern], config))
        places = [place for (place, _), *_ in found]
        numbers: dict[str, tuple[list[str | None], str, Configuration]] = {}
        for (place, _), learned, patterns, config in found:
            usual = place if places.count(place) == 1 else f"{patterns[0]}: {place}"
            name = usual if learned.name is None else learned.name
            if name in numbers:
                msg = (
                    f"`base` has two numbers called {name!r}, as `{numbers[name][1]}` and as "
                    f"`{place}`; they must differ in their `name`, or be equal in one place."
                )
                raise ValueError(msg)
            numbers[name] = (patterns, place, config)
        return numbers

    @property
    def base_with_names(self) -> Any:
        """The base with what learned numbers are called, where that comes from its patterns.

        So they are called in every base that is made of its rules.
        """
        if not isinstance(self.base, Mapping):
            return self.base
        names = {
            (pattern, place): name
            for name, (patterns, place, _) in self._learned.items()
            for pattern in patterns
            if name != place
        }
        made: dict[int, Any] = {}
        for pattern, rule in self.base.items():
            own = {
                place: replace(learned, name=names[pattern, place])
                for place, learned in learned_in(rule).items()
                if (pattern, place) in names
            }
            made.setdefault(id(rule), bound(rule, own))
        return {pattern: made[id(rule)] for pattern, rule in self.base.items()}

    def _config_of(self, learned: Learned, kind: str, rule: Rule) -> "Configuration":
        """Return the configuration in which the value of a learned number is the step size."""
        sigma = kind if learned.map is None else learned.map
        sigma = Decay() if sigma == "decay" else step_size_map(sigma)
        inputs.check_bounds(learned.bounds, sigma.range)
        lo, hi = sigma.range if learned.bounds is None else learned.bounds
        least, largest = SPANS[kind]
        meta_lr = LEARNED_META_LR if learned.meta_lr is None else learned.meta_lr
        return Configuration(
            base=rule,
            # it starts from what has proved good, not from what is far too small
            meta=self.meta.rule if isinstance(self.meta, FastStart) else self.meta,
            step_size=learned.start,
            meta_lr=meta_lr,
            discount=self.discounts[-1],
            blocks=self.blocks if learned.blocks is None else learned.blocks,
            sigma=sigma,
            bounds=(max(lo, least), min(hi, largest)),
            approximation=self.approximation,
            curvature=self.curvature,
            meta_first=self.meta_first,
            skip_nonfinite=self.skip_nonfinite,
        )

    def _numbers_of(self, shapes: Leaves[Any]) -> dict[str, LearnedNumber]:
        """Return the numbers that are learned, for leaves of these shapes."""
        if not self._learned:
            return {}
        found: Any = None
        if isinstance(self.base, Mapping):
            found = patterns_by_leaf(self.base, shapes)
        return {
            name: LearnedNumber(
                place=place,
                start=config.start,
                placed=frozenset(
                    leaf for leaf in shapes if found is None or found[leaf] in patterns
                ),
                partition=config._partition,
                meta=config.meta,
            )
            for name, (patterns, place, config) in self._learned.items()
        }

    @property
    def start(self) -> float:
        """The one step size of all blocks, where it is a number."""
        assert isinstance(self.step_size, float)
        return self.step_size

    @property
    def fixed(self) -> bool:
        """Whether beta is known to stay where it is."""
        return isinstance(self.meta_lr, float) and self.meta_lr == 0.0

    def values_of(self, beta: Any) -> Any:
        """Return what is learned at `beta`, values per block; its start where it is fixed."""

        def value(beta: Any) -> Any:
            return full(beta, beta.shape, self.start) if self.fixed else self._sigma.value(beta)

        return map_leaves(value, beta)

    @property
    def learned(self) -> dict[str, "Configuration"]:
        """Of the numbers of rules that are learned, what each one's value is the step size of."""
        return {name: config for name, (_, _, config) in self._learned.items()}

    @property
    def sigma_map(self) -> StepSizeMap:
        """The map that `sigma` names or is."""
        return self._sigma

    @property
    def rectified(self) -> bool:
        """Whether the diagonal of the Hessian is capped as in IDBD."""
        return isinstance(self._curvature, Diagonal) and self._curvature.rectified

    @property
    def discounts(self) -> tuple[Any, ...]:
        """All discounts, that of the shortest horizon first."""
        return self.discount if isinstance(self.discount, tuple) else (self.discount,)

    @property
    def horizons(self) -> tuple[int, ...]:
        """The leading axis of what each discount has its own of; none for a single number."""
        return (len(self.discount),) if isinstance(self.discount, tuple) else ()

    def _rules(self) -> list[Rule]:
        rules = self._rules_at_start
        return list(rules.values()) if isinstance(rules, Mapping) else [rules]

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
            rules = rules_by_leaf(self._rules_at_start, shapes)
            plan = make_plan(
                xp,
                shapes,
                dtypes,
                rules=rules,
                meta=self.meta,
                partition=self._partition,
                follow=self._following(rules),
                traced=traced,
                horizons=self.horizons,
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
            plan = with_learned(plan, self._numbers_of(shapes))
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
        rules = rules_by_leaf(self._rules_at_start, kept)
        dense = self._following(rules).curvature == "exact"
        columns = len(self.horizons) + dense
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


def _in_base_role(rule: Any) -> Any:
    """Return a rule as it acts on weights."""
    return in_role(rule, "base")


def _each_rule(base: Any, function: Callable[[Any], Any]) -> Any:
    """Return a function of a rule, or of each; what was one object is one."""
    if not isinstance(base, Mapping):
        return function(base)
    made = {id(rule): function(rule) for rule in base.values()}
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
