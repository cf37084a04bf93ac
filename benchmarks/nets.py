"""Networks unlike the package's own, to try erasers on: `--arch benchmarks/nets.py:vgg`, `…:vit` and `…:digits_vit`.

None has BatchNorm; the first has no normalisation at all, the others no convolutions but for cutting patches.
"""

import torch
from torch import Tensor, nn


def vgg(num_classes: int = 10, channels: int = 3, width: int = 24) -> nn.Sequential:
    """Three stages of two 3×3 convolutions with biases and ReLU, max-poolings, and two linear layers (VGG's design)."""
    layers: list[nn.Module] = []
    inputs = channels
    for outputs in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    layers += [
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * inputs, 256),
        nn.ReLU(),
        nn.Linear(256, num_classes),
    ]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class VisionTransformer(nn.Module):
    """Square patches as tokens, their mean as the image's features (Dosovitskiy et al., 2010.11929, small).

    Args:
        num_classes: classes.
        channels: of the images.
        size: height and width of the images in pixels.
        patch: height and width of a patch; divides `size`.
        width: numbers a token.
        depth: blocks.
        heads: of each block's attention.
    """

    def __init__(
        self, num_classes: int, channels: int, *, size: int, patch: int, width: int = 64, depth: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.places = nn.Parameter(torch.zeros(1, (size // patch) ** 2, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.places, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, channels, size, size) → logits (N, num_classes)."""
        tokens = self.patches(pixels).flatten(2).transpose(1, 2) + self.places
        return self.head(self.blocks(tokens).mean(1))


def vit(num_classes: int = 10, channels: int = 3) -> VisionTransformer:
    """A small vision transformer for images of 32×32 pixels: 64 tokens of 4×4."""
    return VisionTransformer(num_classes, channels, size=32, patch=4)


def digits_vit(num_classes: int = 10, channels: int = 1) -> VisionTransformer:
    """The same for scikit-learn's digits at 16×16 pixels: 16 tokens of 4×4."""
    return VisionTransformer(num_classes, channels, size=16, patch=4)
