"""Weights in bfloat16, without a float32 copy of them.

    python examples/torch/bfloat16.py

Steps smaller than what a bfloat16 can tell apart would be lost. `rounding="stochastic"` rounds up
or down at random, right in the mean; `rounding="kahan"` keeps what was lost, two bytes a weight.
Moments, traces and step sizes are float32 in any case.
"""

import torch
from metaopt_torch import MetaOptimizer

import metaopt as mo


def main(steps: int = 500, rounding: str = "kahan") -> tuple[torch.nn.Module, MetaOptimizer]:
    """Train and return the network and its optimizer."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    net = net.to(torch.bfloat16)
    opt = MetaOptimizer(
        net.named_parameters(),
        base=mo.AdamW(),
        step_size=1e-5,
        rounding=rounding,
    )
    for step in range(steps):
        x = torch.randn(64, 8).to(torch.bfloat16)
        opt.zero_grad()
        loss = (net(x) - torch.sin(x[:, :1]) - x[:, 1:2]).float().square().mean()
        loss.backward()
        opt.step()
        if step % 100 == 0:
            print(f"{step:5} loss {loss.item():.4f}")
    return net, opt


if __name__ == "__main__":
    main()
