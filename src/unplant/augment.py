"""Random crops, flips and rotations of whole batches, by one gather each."""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unplant.params import Config, Real


class Augment(Config):
    """What happens to each training image."""

    padding: int | None = Field(
        default=None,
        ge=0,
        description="zero padding before a random crop, in pixels; none: an eighth of the height, 1 below 32",
    )
    flip: bool | None = Field(default=None, description="mirror half of the images; none: colour images only")
    rotation: Real = Field(default=0.0, ge=0, le=180, description="largest random rotation, in degrees either way")


def augment(pixels: Tensor, settings: Augment, generator: torch.Generator) -> Tensor:
    """A randomly changed copy of float pixels (N, C, H, W); the same shape and range."""
    channels, height = pixels.shape[1:3]
    padding = settings.padding if settings.padding is not None else height // 8 if height >= 32 else 1
    if padding:
        pixels = _crop(pixels, padding, generator)
    if settings.rotation:
        pixels = _rotate(pixels, settings.rotation, generator)
    if settings.flip if settings.flip is not None else channels == 3:
        mirrored = torch.rand(len(pixels), generator=generator) < 0.5
        pixels = torch.where(mirrored.to(pixels.device)[:, None, None, None], pixels.flip(3), pixels)
    return pixels


def _crop(pixels: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    count, channels, height, width = pixels.shape
    down, right = torch.randint(0, 2 * padding + 1, (2, count), generator=generator).to(pixels.device)
    padded = F.pad(pixels, (padding,) * 4)
    rows = (down[:, None] + torch.arange(height, device=pixels.device)).view(count, 1, height, 1)
    columns = (right[:, None] + torch.arange(width, device=pixels.device)).view(count, 1, 1, width)
    image = torch.arange(count, device=pixels.device).view(count, 1, 1, 1)
    channel = torch.arange(channels, device=pixels.device).view(1, channels, 1, 1)
    return padded[image, channel, rows, columns]


def _rotate(pixels: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    angle = (torch.rand(len(pixels), generator=generator) * 2 - 1) * math.radians(degrees)
    aspect = pixels.shape[3] / pixels.shape[2]
    zero = torch.zeros_like(angle)
    first = torch.stack([angle.cos(), -angle.sin() / aspect, zero], 1)
    second = torch.stack([angle.sin() * aspect, angle.cos(), zero], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid.to(pixels), mode="bilinear", align_corners=False)
