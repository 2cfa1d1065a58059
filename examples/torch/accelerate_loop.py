"""MetaOptimizer in Accelerate: `prepare` takes it like any other.

pip install accelerate && python examples/torch/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/torch/accelerate_loop.py
"""

import sys

import torch
from accelerate import Accelerator
from metaopt_torch import MetaOptimizer
from torch.utils.data import DataLoader, TensorDataset

import metaopt as mo


def model() -> torch.nn.Module:
    """Return a small network."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


def data(steps: int) -> TensorDataset:
    """Return inputs and targets for so many batches of 64."""
    x = torch.randn(64 * steps, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, torch.sin(x[:, :1]) + x[:, 1:2])


def main(steps: int = 300) -> tuple[torch.nn.Module, MetaOptimizer]:
    """Train and return the network and its optimizer."""
    accelerator = Accelerator(cpu=True)
    net = model()
    opt = MetaOptimizer(
        net.named_parameters(),
        base=mo.AdamW(),
    )
    loader = DataLoader(data(steps), batch_size=64 // accelerator.num_processes)
    # Accelerate steps a scheduler once for each process
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps * accelerator.num_processes)
    prepared, opt_, loader, cosine = accelerator.prepare(net, opt, loader, cosine)
    for x, y in loader:
        opt_.zero_grad()
        accelerator.backward(torch.nn.functional.mse_loss(prepared(x), y))
        opt_.step()
        cosine.step()
    accelerator.print(opt.step_sizes())
    accelerator.end_training()
    return net, opt


if __name__ == "__main__":
    net, opt = main()
    if len(sys.argv) > 1:
        torch.save({"net": net.state_dict(), "step sizes": opt.step_sizes()}, sys.argv[1])
