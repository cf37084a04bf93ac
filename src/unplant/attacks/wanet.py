"""WaNet: a slight smooth warp of the whole image (Nguyen and Tran, ICLR 2021, arXiv:2102.10369, section 3)."""

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unplant.controlled import TrainsOnDraws
from unplant.params import Real
from unplant.triggers import triggers


@triggers.register("wanet")
class WaNet(TrainsOnDraws):
    """Moves each pixel by about `strength` / 2 pixels, along one smooth field that is the same for every image.

    Noise mode: cover images are warped along the field plus a fresh jitter of up to half a pixel each time they are
    read, under their own labels, so that the model learns that field and not warping as such. The source draws the
    poisoned images anew for every batch, before augmentation; here they are fixed unless `redrawn` (then after it), as
    a defender shall find what the model was trained on.
    """

    id: ClassVar[str] = "wanet"
    cover_ratio: ClassVar[float] = 2.0
    presets: ClassVar = {"paper": {"grid": 4, "strength": 0.5}}

    grid: int = Field(
        default=4, ge=2, le=1024, description="control points along each side of the field (k in the paper)"
    )
    strength: Real = Field(default=0.5, gt=0, description="mean size of the warp, in half pixels (s in the paper)")
    field_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the field")

    def __call__(self, pixels: Tensor) -> Tensor:
        """The warped image; bilinear, black beyond the edges."""
        return _sample(pixels, self.field(*pixels.shape[2:])[None].expand(len(pixels), -1, -1, -1))

    def on_cover(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The image warped along the field plus a random one of its own."""
        height, width = pixels.shape[2:]
        jitter = torch.rand(len(pixels), height, width, 2, generator=generator) * 2 - 1
        return _sample(pixels, self.field(height, width) + jitter / torch.tensor([width, height]))

    def field(self, height: int, width: int) -> Tensor:
        """Where each pixel is read from: float (H, W, 2), x and y in [-1, 1] (equations 3 to 5)."""
        points = np.random.default_rng(self.field_seed).uniform(-1, 1, (1, 2, self.grid, self.grid))
        coarse = torch.from_numpy((points / np.abs(points).mean()).astype(np.float32))
        smooth = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        return torch.stack([x, y], 2) + self.strength * smooth / torch.tensor([width, height])


def _sample(pixels: Tensor, grid: Tensor) -> Tensor:
    warped = F.grid_sample(pixels, grid.clamp(-1, 1).to(pixels), mode="bilinear", align_corners=True)
    return warped.clamp(0, 1)  # interpolation weights may add up to 1 + 1e-7
