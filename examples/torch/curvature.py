"""The whole algorithm: traces that follow the curvature of the loss.

    python examples/torch/curvature.py

`opt.backward(loss)` in place of `loss.backward()` keeps the graph of the gradients, from which the
optimizer takes Hessian-vector products. Where second derivatives are impossible (flash attention,
compiled models, FSDP2), `hvp="central"` takes differences of gradients instead and `step` is given
a closure.
"""

import torch
from metaopt_torch import MetaOptimizer

import metaopt as mo


def main(steps: int = 300, hvp: str = "autograd") -> tuple[torch.nn.Module, MetaOptimizer]:
    """Train and return the network and its optimizer."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    opt = MetaOptimizer(
        net.named_parameters(),
        base=mo.SGD(momentum=0.9),
        meta=mo.AdamW(),
        step_size=1e-3,
        meta_lr=1e-2,
        discount=0.999,
        curvature="exact",
        approximation="2x2",
        hvp=hvp,
    )
    for step in range(steps):
        x = torch.randn(64, 8)
        y = torch.sin(x[:, :1]) + x[:, 1:2]

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            opt.zero_grad()
            loss = torch.nn.functional.mse_loss(net(x), y)
            if hvp == "autograd":
                opt.backward(loss)
            else:
                loss.backward()
            return loss.detach()

        loss = opt.step(closure)
        if step % 100 == 0:
            print(f"{step:5} loss {loss.item():.4f} step size {opt.step_sizes()['all'].item():.1e}")
    return net, opt


if __name__ == "__main__":
    main()
