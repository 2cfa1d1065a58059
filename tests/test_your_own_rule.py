"""The rules of docs/your_own_rule.md: in every adapter what a plain transcription makes of them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from metaopt_conformance.tolerances import FINITE_DIFFERENCES, STEP, relative_error, rounding

import metaopt as mo
from metaopt import numerics
from metaopt.arrays import to_numpy
from tests.test_scope import ADAPTERS, STEPS, by_core, grads_of, start

PAGE = Path(__file__).parents[1] / "docs" / "your_own_rule.md"
#: The page's own names, of which several blocks make one program.
NAMES: dict[str, Any] = {}
exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)), NAMES)

STEP_SIZE = 0.02
Moments = dict[str, Any]


def sign_momentum(w: Any, g: Any, s: Moments, t: int) -> Any:  # noqa: ARG001
    s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * g
    return np.sign(s["m"])


def adabelief(w: Any, g: Any, s: Moments, t: int) -> Any:  # noqa: ARG001
    s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * g
    s["s"] = 0.999 * s.get("s", 0.0) + 0.001 * (g - s["m"]) ** 2 + 1e-8
    return s["m"] / (1 - 0.9**t) / (np.sqrt(s["s"] / (1 - 0.999**t)) + 1e-8)


def adan(w: Any, g: Any, s: Moments, t: int) -> Any:  # noqa: ARG001
    d = g - s.get("g", g)
    s["g"] = g
    s["m"] = 0.98 * s.get("m", 0.0) + 0.02 * g
    s["v"] = 0.92 * s.get("v", 0.0) + 0.08 * d
    s["n"] = 0.99 * s.get("n", 0.0) + 0.01 * (g + 0.92 * d) ** 2
    step = s["m"] / (1 - 0.98**t) + 0.92 * s["v"] / (1 - 0.92**t)
    return step / (np.sqrt(s["n"] / (1 - 0.99**t)) + 1e-8)


def muon(w: Any, g: Any, s: Moments, t: int) -> Any:  # noqa: ARG001
    if g.ndim != 2:
        return g
    s["m"] = 0.95 * s.get("m", 0.0) + 0.05 * g
    x = 0.95 * s["m"] + 0.05 * g
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):  # on the left or the right, it is the same
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x * max(1.0, g.shape[0] / g.shape[1]) ** 0.5


def adafactor(w: Any, g: Any, s: Moments, t: int) -> Any:
    decay = 1.0 - t**-0.8
    if g.ndim < 2:
        s["v"] = decay * s.get("v", 0.0) + (1 - decay) * (g**2 + 1e-30)
        v = s["v"]
    else:
        s["r"] = decay * s.get("r", 0.0) + (1 - decay) * (g**2 + 1e-30).sum(1)
        s["c"] = decay * s.get("c", 0.0) + (1 - decay) * (g**2 + 1e-30).sum(0)
        v = np.outer(s["r"], s["c"]) / s["r"].sum()
    u = g / np.sqrt(v)
    u = u / max(1.0, np.sqrt(np.mean(u**2)))
    return u * max(1e-3, np.sqrt(np.mean(w**2)))


RULES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "sign": (NAMES["SignMomentum"](), sign_momentum),
    "AdaBelief": (NAMES["AdaBelief"](), adabelief),
    "Adan": (NAMES["Adan"](), adan),
    "Muon": ({"[wv]": NAMES["Muon"](), "*": mo.SGD()}, muon),
    "Adafactor": (NAMES["Adafactor"](), adafactor),
}


def transcribed(direction: Callable[..., Any]) -> Any:
    params = start("float64")
    states: dict[str, Moments] = {name: {} for name in params}
    for t in range(1, STEPS + 1):
        for name, grad in grads_of(params).items():
            params[name] = params[name] - STEP_SIZE * direction(params[name], grad, states[name], t)
    return params


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("adapter", ["core", *ADAPTERS])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_rule_of_the_page_equals_its_transcription(adapter: str, name: str) -> None:
    rule, direction = RULES[name]
    run = by_core if adapter == "core" else ADAPTERS[adapter]
    options = {
        "base": rule,
        "meta": mo.AdamW(),
        "meta_lr": 0.0,
        "step_size": STEP_SIZE,
        "discount": 1.0,
    }
    got, _ = run(start("float64"), **options)
    for leaf, want in transcribed(direction).items():
        allowed = rounding("float64", operations=400, steps=STEPS)
        assert relative_error(to_numpy(got[leaf]), want) < allowed, leaf


@pytest.mark.parametrize("name", ["sign", "AdaBelief", "Adan"])
def test_elementwise_rules_of_the_page_are_meta_updates_and_carry_derivatives(name: str) -> None:
    rule = RULES[name][0]
    options = {"base": rule, "step_size": STEP_SIZE, "curvature": "diagonal"}
    params = start("float64")
    for meta in (mo.FastStart(rule), rule):
        opt = mo.MetaOptimize(meta=meta, approximation="2x2", **options)
        curved = {key: np.cos(p) for key, p in params.items()}
        new, _ = opt.step(params, params, opt.init(params), hessian_diagonal=curved)
        assert all(np.all(np.isfinite(p)) for p in new.values())


@dataclass(frozen=True)
class Pulled:
    """An elementwise rule that uses the weights, and a moment of what they do to it."""

    weight_decay: float = 0.1

    scope: ClassVar[str] = "weight"
    uses_param: ClassVar[bool] = True
    slots: ClassVar[tuple[str, ...]] = ("mean",)

    def direction(self, grad: Any, slots: Any, count: Any, param: Any) -> Any:
        mean = 0.5 * slots["mean"] + 0.5 * numerics.exp(-numerics.abs(param)) * grad
        return grad * param**2 + mean / count, {"mean": mean}


@pytest.mark.parametrize("kind", ["diagonal", "exact"])
def test_traces_follow_the_weights_through_a_rule_that_uses_them(kind: str) -> None:
    """The trace is the derivative of the weights by beta: central differences of whole runs."""

    rule: Any = Pulled()

    def run(beta: float) -> Any:
        opt = mo.MetaOptimize(
            base=rule,
            meta=mo.SGD(),
            step_size=np.exp(beta),
            meta_lr=0.0,
            curvature=kind,
            discount=1.0,
        )
        params = start("float64")
        state = opt.init(params)
        for _ in range(STEPS):
            curved = {name: np.cos(p) for name, p in params.items()}

            def hvp(tangents: Any, curved: Any = curved) -> Any:
                return {name: curved[name] * t for name, t in tangents.items()}

            params, state = opt.step(
                params, grads_of(params), state, hvp=hvp, hessian_diagonal=curved
            )
        return params, state.trace

    beta = np.log(0.1)
    ahead, behind, (_, traces) = run(beta + STEP)[0], run(beta - STEP)[0], run(beta)
    for name, trace in traces.items():
        slope = (ahead[name] - behind[name]) / (2 * STEP)
        assert relative_error(np.reshape(trace, slope.shape), slope) < FINITE_DIFFERENCES, name
