"""The tasks of the literature: their script runs, and what is written there learns."""

from pathlib import Path

import numpy as np
import pytest

import metaopt as mo
from benchmarks import public


def test_the_script_runs(tmp_path: Path) -> None:
    lines = ("+1 1:1 3:0.5", "-1 2:1  # a comment", "", "+1 1:1", "-1 3:1")
    (tmp_path / "file").write_text("\n".join(lines), encoding="utf-8")
    public.main(["--smoke", "--a1a", str(tmp_path / "file"), "--output", str(tmp_path)])
    page = (tmp_path / "public.md").read_text(encoding="utf-8")
    assert "a1a, from `file`: 4 examples with 3 features" in page
    assert all(page.count(f"| {name} |") == 4 for name in (*public.OURS, "AdamW, no decay"))
    assert page.count("| IDBD |") == page.count("| Autostep |") == 2
    assert "nan" not in page
    assert "a1a was left out" not in page


def test_what_is_no_file_of_that_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("+1 1:1\n+1 nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"`--a1a` must be in LIBSVM's format.*line 2"):
        public.read_libsvm(tmp_path / "file")
    (tmp_path / "file").write_text("+1 1:1\n+1 2:1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"labels of two kinds; got \[1.0\]"):
        public.read_libsvm(tmp_path / "file")


def test_idbd_finds_which_inputs_matter() -> None:
    idbd = public.IDBD([0.05], (2, public.INPUTS), [0.02])
    error = public.track(idbd, range(2), 3000, 1500)
    lms = public.track(public.LMS([0.05], (2, public.INPUTS)), range(2), 3000, 1500)
    assert np.all(error < 0.7 * lms)
    alpha = np.exp(idbd.beta[0])
    assert np.min(alpha[:, : public.RELEVANT]) > 3.0 * np.max(alpha[:, public.RELEVANT :])


def test_the_library_makes_the_steps_of_idbd() -> None:
    """`presets.idbd` is checked against the paper; its step sizes are those from after a step."""
    idbd = public.IDBD([0.05], (1, public.INPUTS), [0.01])
    opt = mo.presets.idbd(step_size=0.05, meta_lr=0.01)
    params = {"w": np.zeros(public.INPUTS)}
    state = opt.init(params)
    for x, y in public.examples(range(1), 200):
        grad = (np.sum(idbd.weights * x, axis=-1) - y)[..., None] * x
        idbd.learn(grad, x)
        own = {"w": (params["w"] @ x[0] - y[0]) * x[0]}
        params, state = opt.step(params, own, state, hessian_diagonal={"w": x[0] * x[0]})
    np.testing.assert_allclose(params["w"], idbd.weights[0, 0], rtol=1e-9)


def test_autostep_learns() -> None:
    autostep = public.Autostep([0.05], (2, public.INPUTS))
    assert np.all(public.track(autostep, range(2), 3000, 1500) < 4.0)
    alpha = autostep.alpha[0]
    assert np.min(alpha[:, : public.RELEVANT]) > np.max(alpha[:, public.RELEVANT :])


def test_adam_is_the_librarys_at_a_fixed_step_size() -> None:
    shape = (1, public.INPUTS)
    adam, opt = public.Adam([0.05], shape), mo.MetaOptimize(step_size=0.05, meta_lr=0.0)
    params = {"w": np.zeros(shape)}
    state = opt.init(params)
    for x, y in public.examples(range(1), 50):
        grad = (np.sum(adam.weights * x, axis=-1) - y)[..., None] * x
        params, state = opt.step(params, {"w": grad[0]}, state)
        adam.learn(grad, x)
    np.testing.assert_allclose(params["w"], adam.weights[0], rtol=1e-12)


def test_runs_side_by_side_are_those_of_each_by_itself() -> None:
    base, blocks = public.OURS["metaopt, all defaults"]
    both = public.track(public.Ours([1e-3, 1e-2], (2, 20), base, blocks), range(2), 100, 50)
    one = public.track(public.Ours([1e-2], (1, 20), base, blocks), range(1, 2), 100, 50)
    np.testing.assert_allclose(both[1, 1], one[0, 0], rtol=1e-9)


def test_gradients_are_counted_until_they_are_small() -> None:
    x, y = public.made_up(0)
    size = 1.0 / public.smoothness(x)
    found = public.gradients_needed(lambda shape: public.LMS([size, 1e-9], shape), [(x, y)], 3000)
    assert 1 < found[0, 0] < np.inf
    assert found[1, 0] == np.inf
