"""A training loop in plain PyTorch, with warm-up and cosine decay on top of the learned step sizes.

    python examples/torch/plain_loop.py

`lr` is a multiplier, 1 by default. Any scheduler of torch's drives it; the step taken is `lr` times
what the optimizer has learned.
"""

from collections.abc import Iterator

import torch
from metaopt_torch import MetaOptimizer
from torch.nn.functional import mse_loss

import metaopt as mo


def model() -> torch.nn.Module:
    """Return a small network."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


def batches(steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(64, 8, generator=generator)
        yield x, torch.sin(x[:, :1]) + x[:, 1:2]


def main(steps: int = 1000) -> tuple[torch.nn.Module, MetaOptimizer]:
    """Train and return the network and its optimizer."""
    net = model()
    opt = MetaOptimizer(
        net.named_parameters(),  # names, so that step sizes have names too
        base=mo.AdamW(weight_decay=0.01),
        step_size=1e-5,  # where they start; too small on purpose
        blocks="tensor",
    )
    warmup = torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.1, total_iters=steps // 20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=steps - steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(opt, [warmup, cosine], [steps // 20])

    for step, (x, y) in enumerate(batches(steps)):
        opt.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        schedule.step()
        if step % 100 == 0:
            sizes = ", ".join(f"{name} {float(s):.1e}" for name, s in opt.step_sizes().items())
            print(f"{step:5} loss {loss.item():.4f}  step sizes: {sizes}")
    return net, opt


if __name__ == "__main__":
    main()
