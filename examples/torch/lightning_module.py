"""MetaOptimizer in Lightning: nothing but `configure_optimizers`.

pip install lightning && python examples/torch/lightning_module.py
"""

from typing import Any

import lightning
import torch
from metaopt_torch import MetaOptimizer
from torch.utils.data import DataLoader, TensorDataset

import metaopt as mo


class Regression(lightning.LightningModule):
    """A small network that logs its step sizes."""

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
        self.log_dict({f"step size/{k}": v for k, v in self.optimizers().step_sizes().items()})
        return torch.nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer, and a multiplier on its step sizes."""
        opt = MetaOptimizer(
            self.net.named_parameters(),
            base=mo.AdamW(),
            meta=mo.FastStart(mo.AdamW()),
            step_size=1e-3,
            meta_lr=1e-2,
        )
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=self.steps)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def data(steps: int) -> TensorDataset:
    """Return inputs and targets for so many batches of 64."""
    x = torch.randn(64 * steps, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, torch.sin(x[:, :1]) + x[:, 1:2])


def main(steps: int = 300) -> tuple[torch.nn.Module, MetaOptimizer]:
    """Train and return the network and its optimizer."""
    module = Regression(steps)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, DataLoader(data(steps), batch_size=64))
    return module.net, trainer.optimizers[0]


if __name__ == "__main__":
    main()
