"""MetaOptimizer in the Trainer of Hugging Face's transformers.

    pip install "transformers[torch]" && python examples/torch/trainer.py

The trainer wants a scheduler beside the optimizer; any will do, for the optimizer needs none.
"""

import tempfile
from typing import Any

import torch
from metaopt_torch import MetaOptimizer
from metaopt_torch.transformers import LogCallback
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

import metaopt as mo


class Regression(torch.nn.Module):
    """A small network that computes its own loss, as the trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss and the outputs."""
        out = self.net(x)
        return {"loss": torch.nn.functional.mse_loss(out, labels), "logits": out}


class Data(Dataset):  # type: ignore[type-arg]
    """Inputs and targets for so many batches of 64."""

    def __init__(self, steps: int) -> None:
        self.x = torch.randn(64 * steps, 8, generator=torch.Generator().manual_seed(1))
        self.y = torch.sin(self.x[:, :1]) + self.x[:, 1:2]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a sample."""
        return {"x": self.x[index], "labels": self.y[index]}


class InOrder(Trainer):
    """The trainer that does not shuffle."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def main(steps: int = 300) -> tuple[torch.nn.Module, MetaOptimizer, list[dict[str, Any]]]:
    """Train; return the network, its optimizer and what was logged."""
    model = Regression()
    opt = MetaOptimizer(
        model.named_parameters(),
        base=mo.AdamW(),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=64,
            max_steps=steps,
            logging_steps=10,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            max_grad_norm=0.0,
            disable_tqdm=True,
        )
        trainer = InOrder(
            model,
            arguments,
            train_dataset=Data(steps),
            optimizers=(opt, schedule),
            callbacks=[LogCallback()],  # the trainer's own "learning_rate" is the multiplier
        )
        trainer.train()
    return model.net, opt, trainer.state.log_history


if __name__ == "__main__":
    main()
