"""Compiled steps of the torch adapter against the oracle: rules, options, partitions, dtypes."""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from metaopt_conformance import torch_adapter  # noqa: E402
from metaopt_conformance.against_oracle import single_steps  # noqa: E402
from metaopt_conformance.backends import find  # noqa: E402
from metaopt_conformance.cases import OPTIONS, Case, pairs  # noqa: E402
from metaopt_conformance.covering import covering  # noqa: E402
from metaopt_conformance.runs import Under  # noqa: E402
from metaopt_conformance.table import BASES, METAS, SIGMAS  # noqa: E402
from metaopt_torch import MetaOptimizer, buckets  # noqa: E402

import metaopt as mo  # noqa: E402
from metaopt.arrays import per_leaf  # noqa: E402
from metaopt.plan import rules_by_leaf  # noqa: E402
from tests.on_demand import slow_but  # noqa: E402

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    # the compiler's own deprecations
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


#: Options of steps that the core makes, not compiled ones.
IN_THE_CORE = ("curvature", "approximation")


@dataclass(frozen=True, kw_only=True)
class Compiled(Case):
    """A case with what the adapter alone has; without what is not done in compiled passes.

    Parameters
    ----------
    maximize : bool
        Of the loss with its sign turned.
    decay : {"rules", "groups"}
        Where weight decay is said.
    groups : {"each", "one"}
        A group for each leaf, or one for all.
    packed : bool
        Whether leaves of a group are stepped in one buffer.
    """

    maximize: bool = False
    decay: str = "rules"
    groups: str = "each"
    packed: bool = True

    def refusal(self) -> str | None:
        """Return what is amiss with a combination that is not possible, else None."""
        if self.groups == "one" and (self.lr in ("by name", "arrays") or self.mixed):
            return "one group has one lr, and here one rule"
        if self.faulty != "nothing" and not (self.meta_first or self.skip_nonfinite):
            return "one pass may restart a trace a step later"
        return super().refusal()


PAIRS: Mapping[str, Sequence[Any]] = {"base": tuple(BASES), "meta": tuple(METAS)}
OF_THE_ADAPTER: Mapping[str, Sequence[Any]] = {
    "dtype": ("float32", "float64", "bfloat16"),
    "maximize": (False, True),
    "decay": ("rules", "groups"),
    "groups": ("each", "one"),
    "packed": (True, False),
}
#: Of options that change a compiled pass, the values that do; each pass takes a second to compile.
FEW: Mapping[str, Sequence[Any]] = {
    "blocks": ("scalar", "tensor", "node", "weight", "groups"),
    "sigma": tuple(name for name, sigma in SIGMAS.items() if sigma == name),
    "discount": (1.0, 0.9),
    "meta_first": (False, True),
    "step_size": ("one", "each"),
    "bounds": ("none", "all", "one"),
    "lr": ("schedule", "by name", "arrays"),
    "missing": (False, True),
    "faulty": ("nothing", "gradient"),
    "skip_nonfinite": (False, True),
    "mixed": (False, True),
    "decay_apart": (False, True),
    **OF_THE_ADAPTER,
}
MANY: Mapping[str, Sequence[Any]] = {
    **{name: values for name, values in OPTIONS.items() if name not in IN_THE_CORE},
    "first_leaf": ("same", "float32"),
    **OF_THE_ADAPTER,
}


class Optimizer(torch_adapter.Optimizer):
    """The adapter as the suite sees it, compiled.

    Parameters
    ----------
    case : Compiled
    opt : metaopt.MetaOptimize
    params : mapping of name to tensor
    """

    def __init__(self, case: Compiled, opt: mo.MetaOptimize, params: Mapping[str, Any]) -> None:
        self.case = case
        options = {option.name: getattr(opt, option.name) for option in fields(opt) if option.init}
        self.own = {name: torch.nn.Parameter(param.clone()) for name, param in params.items()}
        decays: dict[str, Any] = dict.fromkeys(params)
        if case.decay == "groups":
            rules = rules_by_leaf(opt.base, per_leaf(params.items()))
            decays = {name: rule.weight_decay for name, rule in rules.items()}
            options["base"] = _without_decay(opt.base)
        groups = [
            {"params": [(name, param)], "weight_decay": decays[name]}
            for name, param in self.own.items()
        ]
        if case.groups == "one":
            whole = [entry for group in groups for entry in group["params"]]
            groups = [{"params": whole, "weight_decay": next(iter(decays.values()))}]
        self.optimizer = MetaOptimizer(groups, compile=True, maximize=case.maximize, **options)

    def step(self, grads: Any, lr: Any, *_: Any, **__: Any) -> None:
        """Take what `metaopt.MetaOptimize.step` takes, for the parameters and state at hand."""
        for name, param in self.own.items():
            grad = grads[name]
            param.grad = -grad if self.case.maximize and grad is not None else grad
        for group in self.optimizer.param_groups:
            name = group["param_names"][0]
            group["lr"] = lr[name] if isinstance(lr, Mapping) else lr
        self.optimizer.step()


def _without_decay(base: Any) -> Any:
    if isinstance(base, Mapping):
        return {pattern: _without_decay(rule) for pattern, rule in base.items()}
    return replace(base, weight_decay=0.0)


def compared(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(case, Compiled)
    monkeypatch.setitem(buckets.SMALL, "cpu", 2**16 if case.packed else 0)
    under = Under(replace(find("torch"), optimizer=partial(Optimizer, case)), subject="adapter")
    with warnings.catch_warnings():
        if case.faulty != "nothing":
            warnings.simplefilter("ignore")
        single_steps(under, case)


CASES = list(covering(Compiled(steps=4), {**PAIRS, **FEW}))


@pytest.mark.parametrize("case", slow_but(CASES[::3], CASES), ids=str)
def test_compiled_steps_are_the_oracles(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `-m slow` any two values of two options, and every pair of rules, meet in a case."""
    compared(case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "meta"), list(pairs()))
def test_compiled_steps_of_a_pair_of_rules_are_the_oracles(
    base: str, meta: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any two values of two options meet for the pair."""
    for case in covering(Compiled(base=base, meta=meta, steps=4), MANY):
        compared(case, monkeypatch)
