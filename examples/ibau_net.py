"""The network of the I-BAU authors' infected CIFAR-10 checkpoints (Zeng et al., ICLR 2022), for `--arch`.

    unplant evaluate ibau_badnets_8.pth --arch examples/ibau_net.py:network --test cifar10.zip/test \\
        --attack badnets:preset=ibau --target 8

Written from a description of the layers; pixels in [0, 1], no normalisation.
"""

from torch import Tensor, nn


class Network(nn.Module):
    """Three stages of two 3×3 convolutions with BatchNorm and ELU, then one linear layer."""

    def __init__(self, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for outputs, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for _ in range(2):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ELU()]
                inputs = outputs
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(128 * 4 * 4, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, channels, 32, 32) → logits (N, num_classes)."""
        return self.classifier(self.features(pixels).flatten(1))


def network(num_classes: int = 10, channels: int = 3) -> Network:
    """What `--arch examples/ibau_net.py:network` calls."""
    return Network(num_classes, channels)
