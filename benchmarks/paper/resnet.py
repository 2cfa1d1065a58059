"""ResNet-18 (He et al., 2016), for small images and for large ones."""

import torch
from torch import Tensor, nn

__all__ = ["GROUPS", "ResNet18"]

#: The paper's six blocks: stem, four stages, final layer; 3, 12, 15, 15, 15 and 2 parameters.
GROUPS: dict[str, tuple[str, ...]] = {
    "stem": ("network.stem.*",),
    **{f"stage {n}": (f"network.stages.{n}.*",) for n in range(4)},
    "last layer": ("network.last.*",),
}


class Block(nn.Module):
    """Two 3 by 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 3, stride)
        self.second = _convolution(outputs, outputs, 3, 1)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's outputs."""
        return (self.second(self.first(x).relu()) + self.shortcut(x)).relu()


class ResNet18(nn.Module):
    """ResNet-18.

    Parameters
    ----------
    classes : int
    large : bool
        A stem of stride 4 for ImageNet in place of one of stride 1.
    width : int, default 64
        Channels of the first stage.
    """

    def __init__(self, classes: int, *, large: bool, width: int = 64) -> None:
        super().__init__()
        stem = _convolution(3, width, 7, 2) if large else _convolution(3, width, 3, 1)
        self.stem = stem
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        widths = [width * 2**stage for stage in range(4)]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    Block(inputs, outputs, 1 if outputs == width else 2), Block(outputs, outputs, 1)
                )
                for inputs, outputs in zip([width, *widths], widths, strict=False)
            )
        )
        self.last = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the values of the classes, (n, classes) from (n, 3, height, width)."""
        x = self.stages(self.pool(self.stem(x).relu()))
        return self.last(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)
    )
