"""The programs of docs/meta_parameters.md run, and what overfits comes by more weight decay."""

import pytest

from tests.pages import run_section

VALUES = {"PyTorch": "opt.hyperparameters()", "JAX": "tx.hyperparameters(state)"}


@pytest.mark.parametrize(("title", "module"), [("PyTorch", "torch"), ("JAX", "optax")])
def test_its_programs_learn(title: str, module: str) -> None:
    check = f"""
found = {VALUES[title]}
assert list(found) == ["betas[0]", "weight_decay"]
assert float(found["weight_decay"]["all"]) > 0.15, found
assert float(found["betas[0]"]["all"]) != 0.9
"""
    run_section("meta_parameters.md", title, module, check)
