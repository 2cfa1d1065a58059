"""A small model for the trainers of others: Lightning, and the Trainer of transformers."""

import importlib
from pathlib import Path
from typing import Any

import pytest

#: Warnings of these frameworks about themselves.
ABOUT_THEMSELVES = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::ImportWarning"),
]
#: What a Trainer of Lightning is to leave out.
QUIET = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def network() -> Any:
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1)


def lightning_module(examples: int) -> Any:
    """Return a class of Lightning's, which makes no optimizer."""
    torch, lightning = map(importlib.import_module, ("torch", "lightning.pytorch"))

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.net(batch).square().mean()

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(examples, 3), batch_size=4)

    return Module


def transformers_trainer(folder: Path, optimizer: Any, *callbacks: Any, **arguments: Any) -> Any:
    """Return a Trainer of transformers; `optimizer` is a class and its options."""
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))

    class Regression(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            return {"loss": (self.net(x) - labels).square().mean()}

    return transformers.Trainer(
        Regression(),
        transformers.TrainingArguments(
            output_dir=str(folder),
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=[{"x": torch.ones(3), "labels": torch.ones(1)} for _ in range(8)],
        optimizer_cls_and_kwargs=optimizer,
        callbacks=list(callbacks),
    )
