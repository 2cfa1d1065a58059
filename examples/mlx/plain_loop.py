"""A training loop in MLX, with a cosine decay on top of the learned step sizes.

pip install mlx && python examples/mlx/plain_loop.py
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from metaopt_mlx import MetaOptimizer

import metaopt as mo


def loss(model: nn.Module, x: mx.array) -> mx.array:
    """Return the mean squared error."""
    return (model(x) - mx.sin(x[:, :1]) - x[:, 1:2]).square().mean()


def main(steps: int = 300, page: str | None = None) -> tuple[nn.Module, MetaOptimizer]:
    """Train, and return the network and its optimizer; write a page of the run to `page`."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    opt = MetaOptimizer(
        base=mo.AdamW(weight_decay=0.01), blocks="tensor", lr=optim.cosine_decay(1.0, steps)
    )
    loss_and_grads, log = nn.value_and_grad(model, loss), mo.Log()
    for step in range(steps):
        value, grads = loss_and_grads(model, mx.random.normal((64, 8)))
        opt.update(model, grads)
        mx.eval(model.state, opt.state)
        if step % 10 == 0:
            log.add(opt, params=model, loss=value, step=step)
    if page is not None:
        log.write(page)
    return model, opt


if __name__ == "__main__":
    main(page="mlx_run.html")
