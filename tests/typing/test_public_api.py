"""What a type checker makes of the public names; the same lines hold when they are run.

`assert_type` is checked by mypy. Where a line carries `type: ignore`, mypy has to object to it:
with `warn_unused_ignores` an error that is not found is one.
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, assert_type

import numpy as np
import pytest
from numpy.typing import NDArray

import metaopt as mo
from metaopt import numerics
from metaopt.arrays import ArrayT
from metaopt.jets import Jet
from metaopt.rules import Rule
from metaopt.rules.rule import Slots
from metaopt.step_sizes import StepSizeMap

Floats: TypeAlias = NDArray[np.float64]


def ones() -> Floats:
    return np.ones(3)


def test_jets_keep_the_type_of_what_they_carry() -> None:
    jet = Jet(ones(), ones())
    assert_type(jet, Jet[Floats])
    assert_type(jet.value, Floats)
    assert_type(jet.first, Floats | None)
    assert_type(jet + 1.0, Jet[Floats])
    assert_type(1.0 - jet, Jet[Floats])
    assert_type(2.0 * jet * jet, Jet[Floats])
    assert_type(1.0 / (jet / 2.0), Jet[Floats])
    assert_type(-jet, Jet[Floats])


def test_numerics_return_what_they_are_given() -> None:
    jet, array = Jet(ones(), ones()), ones()
    assert_type(numerics.sqrt(array), Floats)
    assert_type(numerics.sqrt(jet), Jet[Floats])
    assert_type(numerics.sign(jet), Jet[Floats])
    assert_type(numerics.divide(jet, jet, 1e-8), Jet[Floats])
    assert_type(numerics.one_minus_power(0.9, array), Floats)


@pytest.mark.parametrize(
    "rule", [mo.SGD(), mo.SGD(momentum=0.9), mo.RMSprop(), mo.AdamW(), mo.Lion()]
)
def test_directions_keep_the_type_of_the_gradient(rule: Rule) -> None:
    array = ones()
    slots = {slot: ones() for slot in rule.slots}
    assert_type(rule.direction(array, slots, array), tuple[Floats, dict[str, Floats]])
    jets = {slot: Jet(ones()) for slot in rule.slots}
    direction, following = rule.direction(Jet(array, array), jets, Jet(array))
    assert_type(direction, Jet[Floats])
    assert_type(following, dict[str, Jet[Floats]])


class Plain:
    """A rule of one's own inherits from nothing."""

    slots: tuple[str, ...] = ()
    weight_decay: float = 0.0

    def direction(
        self,
        grad: ArrayT,
        slots: Slots[ArrayT],  # noqa: ARG002
        count: ArrayT,  # noqa: ARG002
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        return grad, {}


class NoRule:
    slots: tuple[str, ...] = ()
    weight_decay: float = 0.0


def test_rules_are_known_by_their_members() -> None:
    rules: list[Rule] = [mo.SGD(), mo.RMSprop(), mo.AdamW(), mo.Lion(), Plain()]
    mo.MetaOptimize(base=rules[-1], meta=mo.Lion())
    mo.MetaOptimize(base={"w": mo.SGD(), "*": Plain()}, meta=mo.Lion())
    with pytest.raises(TypeError, match="`base` must be a rule"):
        mo.MetaOptimize(base=NoRule(), meta=mo.Lion())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`meta` must be a rule"):
        mo.MetaOptimize(base=mo.SGD(), meta={"*": mo.Lion()})
    with pytest.raises(TypeError, match="positional"):
        mo.MetaOptimize(mo.SGD(), mo.Lion())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        mo.SGD(0.9)  # type: ignore[call-arg]


def test_rules_are_given_by_name_and_held_as_rules() -> None:
    opt = mo.MetaOptimize(base="adamw", meta={"name": "fast_start", "rule": "adam"})
    assert_type(opt.base, Rule | Mapping[str, Rule])
    assert_type(opt.meta, Rule)
    mo.MetaOptimize(base={"*.bias": "sgd", "*": mo.Lion()})


def test_a_run_is_typed() -> None:
    params = {"w": ones()}
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.Lion(), sigma=mo.Sigmoid(1e-5, 1.0))
    state = opt.init(params)
    assert_type(state, mo.State)
    assert_type(state.trace, OrderedDict[str, Any])
    new, after = opt.step(params, {"w": None}, state, lr=0.5)
    assert_type(new, dict[str, Any])
    assert_type(after, mo.State)
    assert_type(opt.step(params, params, state), tuple[dict[str, Any], mo.State])
    assert_type(opt.step_sizes(after), dict[str, Any])
    assert_type(opt.diagnostics(after, new), dict[str, Any])


def test_what_is_made_is_frozen() -> None:
    opt = mo.MetaOptimize(base=mo.SGD(), meta=mo.Lion())
    state = opt.init({"w": ones()})
    rule = mo.AdamW()
    with pytest.raises(AttributeError, match="cannot assign to field"):
        opt.meta_lr = 0.5  # type: ignore[misc]
    with pytest.raises(AttributeError, match="cannot assign to field"):
        state.step = 3  # type: ignore[misc]
    with pytest.raises(AttributeError, match="cannot assign to field"):
        rule.eps = 0.5  # type: ignore[misc]


def test_partitions_maps_and_presets_are_typed(tmp_path: Path) -> None:
    assert_type(mo.blocks.scalar(), mo.blocks.Partition)
    assert_type(mo.blocks.named({"head": "fc.*", "rest": ("*",)}), mo.blocks.Partition)
    assert_type(mo.blocks.node(axis=-1).bind({"w": (2, 3)}), mo.blocks.Blocks)
    maps: list[StepSizeMap] = [mo.Exp(), mo.Identity(), mo.Softplus(), mo.Sigmoid(1e-5, 1.0)]
    array = ones()
    for sigma in maps:
        assert_type(sigma.range, tuple[float, float])
        sigma.value(array)
    opt = mo.presets.hypergradient(mo.AdamW(), blocks="tensor")
    assert_type(opt, mo.MetaOptimize)
    assert_type(mo.presets.idbd(0.1, 0.01), mo.MetaOptimize)
    state = opt.init({"w": array})
    mo.save(tmp_path / "state", opt, state)
    mo.save(str(tmp_path / "state"), opt, state)
    loaded = mo.load(tmp_path / "state", {"w": array})
    assert_type(loaded, tuple[mo.MetaOptimize, mo.State])
