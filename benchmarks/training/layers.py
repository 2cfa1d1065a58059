"""Layers of several networks side by side: every array has a leading axis of runs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["BatchNorm", "Linear", "convolved", "drawn", "rows"]


def drawn(seeds: Sequence[int], shape: Sequence[int], bound: float, salt: int) -> nn.Parameter:
    """Return initial weights, uniform in [-bound, bound]; a seed's are the same in all runs.

    Parameters
    ----------
    seeds : sequence of int
        One for each run.
    shape : sequence of int
        Of one run.
    bound : float
    salt : int
        What tells the arrays of a network apart.
    """
    made = {}
    for seed in dict.fromkeys(seeds):
        generator = torch.Generator().manual_seed(1_000_003 * seed + salt)
        made[seed] = bound * (2 * torch.rand(tuple(shape), generator=generator) - 1)
    return nn.Parameter(torch.stack([made[seed] for seed in seeds]))


class Linear(nn.Module):
    """Affine maps, initialized as `torch.nn.Linear` is.

    Parameters
    ----------
    seeds : sequence of int
    inputs, outputs : int
    salt : int
        Different in each layer.
    """

    def __init__(self, seeds: Sequence[int], inputs: int, outputs: int, salt: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = drawn(seeds, (outputs, inputs), bound, 2 * salt)
        self.bias = drawn(seeds, (outputs,), bound, 2 * salt + 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (runs, n, outputs) from (runs, n, inputs)."""
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))


def convolved(layer: Linear, x: Tensor, size: int, stride: int = 1) -> Tensor:
    """Return a convolution with padding `size // 2`.

    Parameters
    ----------
    layer : Linear
        Of channels * size**2 inputs.
    x : tensor (runs, n, channels, height, width)
    size, stride : int
        Of the kernel.
    """
    runs, _, channels = x.shape[:3]
    outputs = nn.functional.conv2d(
        x.transpose(0, 1).flatten(1, 2),
        layer.weight.reshape(-1, channels, size, size),
        layer.bias.flatten(),
        stride=stride,
        padding=size // 2,
        groups=runs,
    )
    return outputs.unflatten(1, (runs, -1)).transpose(0, 1)


class BatchNorm(nn.Module):
    """Batch normalization; in evaluation by the statistics of the last batch seen in training.

    Parameters
    ----------
    seeds : sequence of int
    channels : int
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, seeds: Sequence[int], channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(len(seeds), channels))
        self.bias = nn.Parameter(torch.zeros(len(seeds), channels))
        for name in ("mean", "variance"):
            statistics = torch.zeros(len(seeds) * channels)
            self.register_buffer(name, statistics, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of inputs (runs, n, channels, height, width)."""
        normed = nn.functional.batch_norm(
            x.transpose(0, 1).flatten(1, 2),
            self.mean,
            self.variance,
            self.gain.flatten(),
            self.bias.flatten(),
            training=self.training,
            momentum=1.0,
        )
        return normed.unflatten(1, (len(x), -1)).transpose(0, 1)


def rows(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross entropy and accuracy of each run.

    Parameters
    ----------
    values : tensor (runs, n, classes)
    labels : integer tensor (runs, n)
    """
    entropy = nn.functional.cross_entropy(values.transpose(1, 2), labels, reduction="none")
    with torch.no_grad():
        hits = (values.argmax(2) == labels).to(values.dtype)
    return entropy.mean(1), hits.mean(1)
