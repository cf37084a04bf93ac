"""Pre-activation ResNet-18 for small images (He et al., ECCV 2016, arXiv:1603.05027), with a width parameter."""

import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice, beside a shortcut that is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        projected = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) → (N, outputs, H/stride, W/stride)."""
        active = F.relu(self.bn1(x))
        around = x if self.shortcut is None else self.shortcut(active)
        return around + self.conv2(F.relu(self.bn2(self.conv1(active))))


class PreActResNet18(nn.Module):
    """Four stages of two blocks, `width` to 8 × `width` channels; any image of at least 8×8 pixels.

    The published network has width 64 (11.2 million weights); width 16 has 0.7 million.
    """

    def __init__(self, num_classes: int = 10, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        blocks, inputs = [], width
        for factor, stride in ((1, 1), (2, 2), (4, 2), (8, 2)):
            blocks += [PreActBlock(inputs, factor * width, stride), PreActBlock(factor * width, factor * width, 1)]
            inputs = factor * width
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) → logits (N, num_classes)."""
        x = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def preact_resnet18(num_classes: int = 10, channels: int = 3, width: int = 64) -> PreActResNet18:
    """PreActResNet-18 with `width` channels in its first stage."""
    return PreActResNet18(num_classes, channels, width)
