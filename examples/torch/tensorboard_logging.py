"""Step sizes in TensorBoard, by a hook of one line.

    python examples/torch/tensorboard_logging.py && tensorboard --logdir runs

`step_sizes()` returns tensors on the device and copies nothing; `add_scalars` copies them to the
host, so log now and then.
"""

import itertools

import torch
from metaopt_torch import MetaOptimizer
from torch.utils.tensorboard import SummaryWriter

import metaopt as mo


def main(steps: int = 300, logdir: str = "runs/metaopt") -> tuple[torch.nn.Module, MetaOptimizer]:
    """Train, log, and return the network and its optimizer."""
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 1)
    opt = MetaOptimizer(
        net.named_parameters(),
        base=mo.AdamW(),
        meta=mo.AdamW(),
        step_size=1e-4,
        meta_lr=1e-2,
        blocks="tensor",
    )
    writer, step = SummaryWriter(logdir), itertools.count()
    opt.register_step_post_hook(
        lambda opt, *_: writer.add_scalars("step size", opt.step_sizes(), next(step))
    )
    for _ in range(steps):
        x = torch.randn(64, 8)
        opt.zero_grad()
        (net(x) - x.sum(dim=1, keepdim=True)).square().mean().backward()
        opt.step()
    writer.close()
    return net, opt


if __name__ == "__main__":
    main()
