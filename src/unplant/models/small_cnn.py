"""A small convolutional net for grey 16×16 digits and quick tests: 65,000 weights at width 32."""

from torch import nn


def small_cnn(num_classes: int = 10, channels: int = 1, width: int = 32) -> nn.Sequential:
    """Four 3×3 convolutions with BatchNorm and ReLU, two max-poolings, global average, one linear layer."""
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *convolution(channels, width),
        *convolution(width, width),
        nn.MaxPool2d(2),
        *convolution(width, 2 * width),
        *convolution(2 * width, 2 * width),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )
