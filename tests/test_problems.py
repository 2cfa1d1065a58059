"""The derivatives of the suite's problems, which everything there leans on."""

from typing import Any

import numpy as np
import pytest
from metaopt_conformance.problems import PROBLEMS, Problem
from metaopt_conformance.tolerances import FORMULA, relative_error, rounding
from metaopt_conformance.translate import tree

H = float(np.finfo(float).eps) ** (1 / 3)


def directions(problem: Problem) -> Any:
    rng = np.random.default_rng(0)
    return rng.normal(size=(problem.size, 2)), rng.normal(size=(problem.size, 3))


@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives_equal_central_differences(name: str) -> None:
    problem, t = PROBLEMS[name], 2
    w, (u, v) = problem.start(), directions(problem)
    for j in range(u.shape[1]):
        slope = (problem.loss(t, w + H * u[:, j]) - problem.loss(t, w - H * u[:, j])) / (2 * H)
        assert abs(problem.grad(t, w) @ u[:, j] - slope) < FORMULA * max(abs(slope), 1.0)
        bend = (problem.grad(t, w + H * u[:, j]) - problem.grad(t, w - H * u[:, j])) / (2 * H)
        assert relative_error(problem.hessian(t, w) @ u[:, j], bend) < FORMULA
    third = problem.third(t, w, u, v)
    for k in range(v.shape[1]):
        ahead, behind = (problem.hessian(t, w + s * H * v[:, k]) @ u for s in (1, -1))
        error = np.max(np.abs(third[:, :, k] - (ahead - behind) / (2 * H)))
        assert error < FORMULA * max(np.max(np.abs(third)), 1.0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_array_code_is_the_same_loss(name: str) -> None:
    problem, t = PROBLEMS[name], 2
    w = problem.start()
    value = problem.loss_of(np, tree(w, problem.shapes), *problem.data(t))
    assert relative_error(value, problem.loss(t, w)) < rounding("float64", operations=40)


def test_problems_are_what_they_are_chosen_for() -> None:
    dead = PROBLEMS["dead"]
    assert not np.any(dead.grad(0, dead.start())[-4:])
    scaled = PROBLEMS["badly scaled"].data(0)[0]
    assert np.std(scaled[:, 0]) > 300 * np.std(scaled[:, -1])
    axes = {len(shape) for problem in PROBLEMS.values() for shape in problem.shapes.values()}
    assert axes == {0, 1, 2, 4}
