"""The programs of docs/migration.md run, one after the other."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_programs_for_torch_train(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("metaopt_torch.base.chosen", lambda *_: False)  # nothing is compiled
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    found: list[float] = []

    def loss_of(model: Any, batch: Any) -> Any:
        return (model(batch) - batch.sum(dim=1, keepdim=True)).square().mean()

    batches = [torch.randn(16, 4) for _ in range(20)]
    names: dict[str, Any] = {
        "model": net,
        "loader": batches,
        "loss_of": loss_of,
        "evaluate": lambda model: found.append(loss_of(model, batches[0]).item()),
    }
    ours = [block for block in BLOCKS if "metaopt_torch" in block]
    for block in ours[:-1]:
        exec(block, dict(names))
    assert len(found) == sum("evaluate(model)" in block for block in ours) > 0
    exec(ours[-1], names)
    loss_of(net, batches[0]).backward()
    names["opt"].step()


def test_programs_for_jax_make_updates() -> None:
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    params = {"w": jax.numpy.ones((3, 2)), "b": jax.numpy.ones(2)}
    names: dict[str, Any] = {"params": params}
    blocks = [block for block in BLOCKS if "metaopt_jax" in block or "averaged_params(tx" in block]
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
        tx = names["tx"]
        updates, _ = tx.update(params, tx.init(params), params)
        moved = optax.apply_updates(params, updates)
        assert jax.tree.all(
            jax.tree.map(lambda one, other: bool((one != other).any()), moved, params)
        )
    assert jax.tree.structure(names["averaged"]) == jax.tree.structure(params)
