"""The programs of docs/watch.md run, and callbacks of trainers log what optimizers say."""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import metaopt as mo
from tests.trainers import (
    ABOUT_THEMSELVES,
    QUIET,
    lightning_module,
    network,
    transformers_trainer,
)

PAGE = (Path(__file__).parents[1] / "docs" / "watch.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

pytestmark = [
    *ABOUT_THEMSELVES,
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
]


class Recorder:
    """Stands in for the module of a logger, with the signature of its function."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, float], int | None]] = []

    def log(self, data: dict[str, float], step: int | None = None) -> None:
        """As `wandb.log`."""
        self.seen.append((data, step))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """As `mlflow.log_metrics`, which looks at names."""
        for name in metrics:
            assert re.fullmatch(r"[\w\-. /]+", name, re.ASCII), name
        self.seen.append((metrics, step))


def only(word: str) -> str:
    (found,) = [block for block in BLOCKS if word in block]
    return found


@pytest.mark.parametrize("module", ["metaopt_torch", "metaopt_jax"])
def test_loops_write_a_page(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch" if module == "metaopt_torch" else "jax")
    if module == "metaopt_torch":
        monkeypatch.setattr("metaopt_torch.base.chosen", lambda *_: False)  # nothing is compiled
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(only(module).replace("300", "40"), names)
    assert [entry["step"] for entry in names["log"].entries] == [0, 10, 20, 30]
    assert "<h2>Step sizes</h2>" in (tmp_path / "run.html").read_text(encoding="utf-8")


def a_run() -> dict[str, Any]:
    """Return what a loop has at hand."""
    opt = SimpleNamespace(config=mo.MetaOptimize(discount=1.0))
    ones = {"all": np.ones(())}
    opt.step_sizes = lambda: {"all": np.asarray(0.25)}
    opt.hyperparameters = lambda: {"betas[0]": {"all": np.asarray(0.9)}}
    opt.diagnostics = lambda: dict.fromkeys(
        ("restarts", "pinned", "collapsed", "asleep", "meta_grad", "trace_norm"), ones
    )
    return {"opt": opt, "log": mo.Log(), "loss": 0.5, "step": 7}


@pytest.mark.parametrize("module", ["wandb", "mlflow"])
def test_other_loggers_take_what_add_returns(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, module, recorder)
    exec(only(f"import {module}"), a_run())
    ((found, step),) = recorder.seen
    assert step == 7
    assert found["loss"] == 0.5
    assert found["step_size/all"] == 0.25
    assert all(isinstance(value, float) for value in found.values())


def test_tensorboard_takes_what_add_returns(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    torch_writer = pytest.importorskip("torch.utils.tensorboard")
    writer = torch_writer.SummaryWriter(str(tmp_path))
    exec(only("add_scalar"), a_run() | {"writer": writer})
    writer.close()
    events = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(tmp_path))
    events.Reload()
    (found,) = events.Scalars("step_size/all")
    assert (found.step, found.value) == (7, 0.25)


# --- callbacks


def test_lightning_logs_and_goes_on_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    lightning = pytest.importorskip("lightning.pytorch")
    callbacks = importlib.import_module("metaopt_torch.lightning")
    adapter = importlib.import_module("metaopt_torch")
    monkeypatch.chdir(tmp_path)

    class Logger(lightning.loggers.CSVLogger):  # type: ignore[misc, name-defined]
        seen: list[Any]

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            self.seen.append((metrics, step))

    class Module(lightning_module(examples=24)):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return adapter.MetaOptimizer(self.net.named_parameters(), lr=0.5, compile=False)

    def fitted(callback: Any, steps: int, start: str | None = None) -> Any:
        logger = Logger(str(tmp_path))
        logger.seen = []
        trainer = lightning.Trainer(max_steps=steps, logger=logger, callbacks=[callback], **QUIET)
        trainer.fit(Module(), ckpt_path=start)
        return trainer, logger

    first = callbacks.LogCallback(tmp_path / "run.html", every=2)
    trainer, logger = fitted(first, 5)
    assert [entry["step"] for entry in first.run_log.entries] == [2, 4]
    assert "<svg" in (tmp_path / "run.html").read_text(encoding="utf-8")
    seen = [(found, step) for found, step in logger.seen if "step_size/all" in found]
    assert [step for _, step in seen] == [2, 4]
    for found, _ in seen:
        assert found["effective_lr/all"] == pytest.approx(0.5 * found["step_size/all"])
        assert found["loss"] > 0.0
    trainer.save_checkpoint("run.ckpt")
    second = callbacks.LogCallback(every=2)
    fitted(second, 8, "run.ckpt")
    assert [entry["step"] for entry in second.run_log.entries] == [2, 4, 6, 8]
    with pytest.raises(ValueError, match="`every` must be at least 1; got 0"):
        callbacks.LogCallback(every=0)
    with pytest.raises(ValueError, match="must have one optimizer of metaopt_torch; it has 0"):
        second.on_train_batch_end(
            SimpleNamespace(global_step=10, optimizers=[]), None, None, None, 0
        )


def test_the_trainer_of_transformers_logs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    callbacks = importlib.import_module("metaopt_torch.transformers")
    adapter = importlib.import_module("metaopt_torch")

    callback = callbacks.LogCallback(tmp_path / "run.html")
    optimizer = adapter.MetaOptimizer, {"compile": False}
    trainer = transformers_trainer(tmp_path, optimizer, callback, max_steps=6, logging_steps=2)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [2, 4, 6]
    for entry, logged in zip(callback.run_log.entries, history, strict=True):
        assert entry["step"] == logged["step"]
        assert entry["loss"] == logged["loss"]
        size = next(iter(entry["step_sizes"].values()))[1]
        assert size in [v for name, v in logged.items() if name.startswith("step_size/")]
    assert "<svg" in (tmp_path / "run.html").read_text(encoding="utf-8")
    with pytest.raises(TypeError, match=r"must be one of metaopt_torch.*got SGD"):
        callback.on_log(
            None,
            SimpleNamespace(global_step=9),
            None,
            {"loss": 1.0},
            torch.optim.SGD(network().parameters(), lr=0.1),
        )
