"""What an optimizer learns in TensorBoard, by two lines.

    python examples/torch/tensorboard_logging.py && tensorboard --logdir runs

`add` copies what it logs to the host, which waits for the device: log now and then.
"""

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
        blocks="tensor",
    )
    writer, log = SummaryWriter(logdir), mo.Log()
    for step in range(steps):
        x = torch.randn(64, 8)
        opt.zero_grad()
        loss = (net(x) - x.sum(dim=1, keepdim=True)).square().mean()
        loss.backward()
        opt.step()
        if step % 10 == 9:
            for name, value in log.add(opt, loss=loss, step=step).items():
                writer.add_scalar(name, value, step)
    writer.close()
    return net, opt


if __name__ == "__main__":
    main()
