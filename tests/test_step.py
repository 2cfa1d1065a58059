"""The whole step against the dense oracle over the options, drawn together."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from metaopt_conformance import oracle
from metaopt_conformance.problems import PROBLEMS, SHAPES
from metaopt_conformance.tolerances import ORACLE, relative_error
from metaopt_conformance.translate import config_of, dense, expected, flat, slices, tree

import metaopt as mo

STEPS = 8
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
PROBLEM = PROBLEMS["logcosh"]

# eps large enough that rounding is not amplified where a gradient is small
MOMENTS = [
    mo.SGD(),
    mo.SGD(momentum=0.8),
    mo.SGD(momentum=0.8, delayed=True),
    mo.RMSprop(beta2=0.8, eps=1e-2),
    mo.RMSprop(beta2=0.8, eps=1e-2, bias_correction=False),
    mo.RMSprop(beta2=0.8, eps=1e-2, delayed=True),
    mo.AdamW(betas=(0.8, 0.9), eps=1e-2),
    mo.AdamW(betas=(0.8, 0.9), eps=1e-2, delayed=True),
    mo.Lion(betas=(0.8, 0.9)),
]
DECAYING = [
    mo.SGD(weight_decay=0.1),
    mo.AdamW(betas=(0.0, 0.9), eps=1e-2, weight_decay=0.1),
    mo.RMSprop(beta2=0.8, eps=1e-2, weight_decay=0.1),
    mo.Lion(weight_decay=0.1),
]
GROUPS = {"first": ("bias", "weight"), "second": "kernel"}


@dataclass(frozen=True)
class Run:
    """A configuration, and what happens to every leaf in every step."""

    options: dict[str, Any]
    lr: tuple[Any, ...]
    missing: tuple[frozenset[str], ...]


@st.composite
def runs(draw: st.DrawFn) -> Run:
    base: Any = draw(st.sampled_from([*MOMENTS, *DECAYING]))
    if draw(st.booleans()):
        base = {"weight": draw(st.sampled_from([*MOMENTS, *DECAYING])), "*": base}
    curvature: Any = draw(st.sampled_from(["none", "diagonal", "exact"]))
    trace = "update"
    rules = list(base.values()) if isinstance(base, dict) else [base]
    if all(isinstance(rule, mo.SGD) and not rule.slots for rule in rules) and draw(st.booleans()):
        curvature = mo.curvature.Diagonal(rectified=True)
    elif curvature == "none" and not any(
        isinstance(rule, mo.Lion) or rule.delayed for rule in rules
    ):
        trace = draw(st.sampled_from(["update", "gradient"]))
    options = {
        "base": base,
        "meta": draw(st.sampled_from(MOMENTS)),
        "step_size": 0.05,
        "meta_lr": 0.1,
        "discount": draw(st.sampled_from([0.0, 0.9, 1.0])),
        "blocks": draw(st.sampled_from(["scalar", "tensor", "node", "weight", GROUPS])),
        "sigma": draw(st.sampled_from(["exp", "identity", "softplus", mo.Sigmoid(1e-3, 0.5)])),
        "bounds": draw(st.sampled_from([None, (0.045, 0.055)])),
        "approximation": draw(st.sampled_from(["l", "2x2"])),
        "curvature": curvature,
        "trace": trace,
        "meta_first": draw(st.booleans()),
    }
    if curvature == "exact" and not options["meta_first"] and draw(st.booleans()):
        options["approximation"] = "full"
    if options["sigma"] == "identity":
        options["meta_lr"] = 0.003
    multiplier = st.sampled_from([1.0, 1.0, 0.5, 0.0])
    lr = st.one_of(multiplier, st.fixed_dictionaries(dict.fromkeys(SHAPES, multiplier)))
    leaves = st.frozensets(st.sampled_from(list(SHAPES)))
    missing = st.one_of(st.just(frozenset[str]()), leaves)
    return Run(
        options,
        tuple(draw(st.lists(lr, min_size=STEPS, max_size=STEPS))),
        tuple(draw(st.lists(missing, min_size=STEPS, max_size=STEPS))),
    )


def by_weight(values: dict[str, Any]) -> Any:
    vector = [np.full(at.stop - at.start, values[name]) for name, at in slices(SHAPES).items()]
    return np.concatenate(vector)


def columns(tangents: Any, backend: Any) -> Any:
    """Return tangents by leaf, each with a leading axis, as columns of a matrix."""
    rows = [backend.to_numpy(tangents[name]) for name in SHAPES]
    return np.concatenate([row.reshape(len(row), -1) for row in rows], axis=1).T


def check(run: Run, backend: Any) -> None:
    opt = mo.MetaOptimize(**run.options)
    config = config_of(opt, SHAPES)
    want = oracle.init(config, PROBLEM.start())
    params = backend.tree(tree(PROBLEM.start(), SHAPES))
    state = opt.init(params)
    for t, (lr, missing) in enumerate(zip(run.lr, run.missing, strict=True)):
        w = flat(params, SHAPES)
        hessian, grad = PROBLEM.hessian(t, w), PROBLEM.grad(t, w)
        present = by_weight({name: name not in missing for name in SHAPES})
        multiplier = by_weight(lr) if isinstance(lr, dict) else lr
        at_oracle = PROBLEM.grad(t, want.w), PROBLEM.hessian(t, want.w)
        third_at_oracle = partial(PROBLEM.third, t, want.w)
        want = oracle.step(config, want, *at_oracle, multiplier, present, third_at_oracle)

        def present_ones(products: Any, missing: Any = missing) -> Any:
            arrays = backend.tree(tree(products, SHAPES))
            return {name: None if name in missing else arrays[name] for name in SHAPES}

        def hvp(tangents: Any, hessian: Any = hessian, pick: Any = present_ones) -> Any:
            return pick((hessian @ columns(tangents, backend)).T)

        def third(us: Any, vs: Any, t: int = t, w: Any = w, pick: Any = present_ones) -> Any:
            products = PROBLEM.third(t, w, columns(us, backend), columns(vs, backend))
            return pick(products.transpose(1, 2, 0))

        grads = backend.tree(tree(grad, SHAPES))
        params, state = backend.settled(
            opt.step(
                params,
                {name: None if name in missing else grads[name] for name in SHAPES},
                state,
                lr=lr,
                hvp=hvp,
                third=third,
                hessian_diagonal=backend.tree(tree(np.diag(hessian), SHAPES)),
            )
        )
        for key, got in dense(params, state, config, SHAPES).items():
            error = relative_error(got, expected(want, key, SHAPES))
            assert error < ORACLE, (t, key, error)
    if config.bounds is not None:
        reached = np.isclose(oracle.sigma(config.sigma, want.beta)[:, None], config.bounds)
        event("bounds reached" if np.any(reached) else "bounds not reached")


@given(run=runs())
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("backend", ["numpy"], indirect=True)
def test_step_equals_the_oracle(backend: Any, run: Run) -> None:
    check(run, backend)


@given(run=runs())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("backend", ["strict", "torch", "jax"], indirect=True)
def test_step_equals_the_oracle_on_other_arrays(backend: Any, run: Run) -> None:
    check(run, backend)
