"""MetaOptimizer in Lightning: `configure_optimizers`, and a callback that logs what is learned.

pip install lightning && python examples/torch/lightning_module.py
"""

from typing import Any

import lightning
import torch
from metaopt_torch import MetaOptimizer
from metaopt_torch.lightning import LogCallback
from torch.utils.data import DataLoader, TensorDataset

import metaopt as mo


class Regression(lightning.LightningModule):
    """A small network."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps = steps
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
        )

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """Return the loss of a batch."""
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer, and a multiplier on its step sizes."""
        opt = MetaOptimizer(
            self.net.named_parameters(),
            base=mo.AdamW(),
        )
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=self.steps)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def data(steps: int) -> TensorDataset:
    """Return inputs and targets for so many batches of 64."""
    x = torch.randn(64 * steps, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, torch.sin(x[:, :1]) + x[:, 1:2])


def main(
    steps: int = 300, page: str = "lightning_run.html"
) -> tuple[torch.nn.Module, MetaOptimizer]:
    """Train, write a page of the run, and return the network and its optimizer."""
    module = Regression(steps)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,  # or any: the callback hands it step sizes and the effective learning rate
        callbacks=[LogCallback(page)],
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(data(steps), batch_size=64))
    return module.net, trainer.optimizers[0]


if __name__ == "__main__":
    main()
