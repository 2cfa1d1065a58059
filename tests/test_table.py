"""The one table of rules and maps: all that is exported is in it, and in the documentation."""

import re
from pathlib import Path
from typing import Any

import pytest
from metaopt_conformance.table import FORMS, MAPS, METAS, RULES, counterpart, has, update_of
from metaopt_conformance.updates import Update

import metaopt as mo
from metaopt import rules, step_sizes
from metaopt.rules import elementwise
from metaopt.rules.rule import scope_of

MATHEMATICS = (Path(__file__).parents[1] / "docs" / "mathematics.md").read_text(encoding="utf-8")


def section(number: int) -> str:
    found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", MATHEMATICS, re.MULTILINE | re.DOTALL)
    assert found
    return found[0]


def first_cells(text: str, head: str) -> list[str]:
    """Return what the first column of the table with this head names."""
    rows = text.partition(f"\n| {head} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`\"?(\w+)", row.split("|")[1])]


KINDS = {row.kind.__name__ for row in RULES}


def test_every_exported_rule_is_in_the_table() -> None:
    """But for those that are made of another, and `Opaque`, which has no formula."""
    others = {mo.Averaged, mo.FastStart, mo.Opaque}
    assert {*rules.SHIPPED} == {row.kind for row in RULES} | others


def test_every_exported_map_is_in_the_table() -> None:
    """But for `Decay`, of numbers that are learned alone."""
    exported = {getattr(step_sizes, name) for name in step_sizes.__all__}
    others = {step_sizes.StepSizeMap, step_sizes.Decay}
    assert exported - others == {row.kind for row in MAPS}
    assert set(step_sizes.NAMED) <= {row.name for row in MAPS}
    for row in MAPS:
        assert type(step_sizes.step_size_map(row.sigma)) is row.kind


@pytest.mark.parametrize("head", ["rule | internals", "rule | $u_g$"])
def test_the_mathematics_has_the_formulas_of_every_rule(head: str) -> None:
    assert {*first_cells(section(5), head)} == KINDS


def test_the_mathematics_has_every_meta_update() -> None:
    assert {*first_cells(section(6), "rule | $\\bar u$")} == {
        type(rule).__name__ for rule in METAS.values()
    }


def test_the_mathematics_has_every_map() -> None:
    names = {*first_cells(section(8), "`sigma`")}
    assert names == {*step_sizes.NAMED, *(type(m.sigma).__name__ for m in MAPS)} - {"str"}


def test_the_mathematics_has_every_optimizer_of_a_framework_that_is_the_same() -> None:
    table = section(5).partition("\n| rule | equals |")[2].partition("\n\n")[0]
    named = {*re.findall(r"`(?:torch\.optim|optax)\.(\w+)`", table)}
    found = [counterpart(library, rule) for library in ("torch", "optax") for rule in FORMS]
    # those of the table below where they need no saying: SGD without momentum is SGD everywhere
    assert named == {pair[0] for pair in found if pair is not None} - {"sgd"}


@pytest.mark.parametrize("rule", FORMS, ids=repr)
def test_shipped_rules_are_elementwise(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users' rules are proved to be when an optimizer is made; those shipped, here."""
    assert scope_of(rule) == "weight"
    monkeypatch.setattr(elementwise, "SHIPPED", ())
    for role in ("base", "meta"):
        elementwise.check_elementwise(role, rules.rule.in_role(rule, role))


@pytest.mark.parametrize("rule", FORMS, ids=repr)
def test_the_oracle_has_what_the_rule_has(rule: Any) -> None:
    update = update_of(rule)
    assert isinstance(update, Update)
    assert len(rule.slots) == update.has_m + update.has_v
    assert not has(rule, "eps") or update.eps == rule.eps


def test_what_is_not_shipped_is_not_in_the_table() -> None:
    class Own:
        slots, weight_decay = (), 0.0

    with pytest.raises(TypeError, match="must be one of metaopt's own"):
        update_of(Own())
