"""Rules are given by name, as configuration files hold them; what is wrong is named."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

import metaopt as mo
from metaopt import rules
from metaopt.arrays import ArrayT
from metaopt.rules.rule import Slots


@dataclass(frozen=True)
class Halved:
    """A rule of one's own, which is named by its path."""

    share: float = 0.5
    weight_decay: float = 0.0

    scope = "weight"
    slots = ()

    def direction(
        self,
        grad: ArrayT,
        slots: Slots[ArrayT],
        count: ArrayT,  # noqa: ARG002
    ) -> tuple[ArrayT, dict[str, ArrayT]]:
        return self.share * grad, dict(slots)


#: Those that are no rule around another.
ALONE = [cls for cls in rules.SHIPPED if not hasattr(cls, "rule")]
OWN = f"{__name__}.Halved"


def base_of(given: Any) -> Any:
    return mo.MetaOptimize(base=given).base


@pytest.mark.parametrize("cls", ALONE)
def test_every_shipped_base_rule_has_a_name(cls: type) -> None:
    name = cls.__name__
    for spelled in (name, name.lower(), name.upper(), f"{name[:2]}_{name[2:]}"):
        assert base_of(spelled) == base_of(cls())


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ("adam", mo.AdamW()),
        ({"name": "sgd"}, mo.SGD()),
        ({"name": "adamw", "betas": [0.9, 0.99], "weight_decay": 0.1}, None),
        ({"*.bias": "sgd", "*": {"name": "lion"}}, {"*.bias": mo.SGD(), "*": mo.Lion()}),
        ({"*.bias": "sgd", "*": mo.Lion()}, {"*.bias": mo.SGD(), "*": mo.Lion()}),
        ({"name": mo.SGD(), "*": mo.Lion()}, {"name": mo.SGD(), "*": mo.Lion()}),
        ({"name": "averaged", "rule": "lion", "power": 3}, mo.Averaged(mo.Lion(), power=3)),
        (OWN, Halved()),
        ({"name": OWN, "share": 0.25}, Halved(share=0.25)),
    ],
)
def test_names_stand_for_rules(given: Any, rule: Any) -> None:
    want = mo.AdamW(betas=(0.9, 0.99), weight_decay=0.1) if rule is None else rule
    assert base_of(given) == base_of(want)


def test_a_configuration_of_plain_values_survives_json() -> None:
    plain = {
        "base": {"name": "adamw", "betas": [0.9, 0.99]},
        "meta": {"name": "fast_start", "rule": {"name": "adam", "eps": 1e-6}, "patience": 3},
        "step_size": 1e-5,
        "discount": [0.9, 1.0],
        "blocks": {"head": ["head.*"], "rest": "*"},
        "bounds": [1e-8, 1.0],
    }
    want = mo.MetaOptimize(
        base=mo.AdamW(betas=(0.9, 0.99)),
        meta=mo.FastStart(mo.AdamW(eps=1e-6), patience=3),
        step_size=1e-5,
        discount=(0.9, 1.0),
        blocks={"head": ("head.*",), "rest": "*"},
        bounds=(1e-8, 1.0),
    )
    assert mo.MetaOptimize(**json.loads(json.dumps(plain))) == want


@pytest.mark.parametrize(
    ("option", "given", "error", "message"),
    [
        ("base", "rmsprp", ValueError, "`base` must be .*did you mean 'rmsprop'\\?.*adamw, .*sgd"),
        ("meta", "muon", ValueError, "`meta` must be a rule or the name of one; got 'muon'"),
        (
            "base",
            {"name": "adamw", "beta": 1},
            ValueError,
            "no option 'beta'; did you mean 'betas'",
        ),
        ("base", {"name": "adamw", "betas": [0.9]}, ValueError, "`betas` must be two numbers"),
        ("base", {"*": "adamv"}, ValueError, "`base\\['\\*'\\]` must be a rule or the name"),
        ("base", "metaopt.Adamw", ValueError, "`base` must be the dotted path.*Adamw"),
        ("base", "no_such_module.Rule", ValueError, "`base` must be the dotted path.*no_such_mod"),
        ("base", "metaopt.save", TypeError, "`base` must be the dotted path of a rule's class"),
        ("base", "pathlib.Path", TypeError, "`base` must be a rule such as"),
        (
            "meta",
            {"name": "fast_start", "rule": 3},
            TypeError,
            "`meta` .fast_start. cannot be.*`rule`",
        ),
        ("meta", {"name": "fast_start", "rule": "adm"}, ValueError, "`meta.rule` must be a rule"),
        ("base", {"name": OWN, "shares": 1.0}, ValueError, "no option 'shares'; did you mean"),
    ],
)
def test_what_is_wrong_is_named(option: str, given: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        mo.MetaOptimize(**{option: given})
