"""The programs of docs/wrap.md run, and learn from step sizes that are far too small."""

import pytest

from tests.pages import run_section

CHECKS = {
    "PyTorch": "assert loss.item() < 0.2 and opt.step_sizes()['matrices'] > 1e-3",
    "JAX": "assert loss(params, jnp.eye(8)) < 0.02 and tx.step_sizes(state)['all'] > 1e-4",
    "NumPy": "assert abs(params['weight'] - [1.0, -2.0, 0.5]).max() < 0.1",
}


@pytest.mark.parametrize(
    ("title", "module"), [("PyTorch", "torch"), ("JAX", "optax"), ("NumPy", "numpy")]
)
def test_its_programs_learn(title: str, module: str) -> None:
    run_section("wrap.md", title, module, CHECKS[title])
