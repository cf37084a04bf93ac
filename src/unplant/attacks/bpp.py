"""BppAttack: fewer grey levels, hidden by dithering (Wang et al., CVPR 2022, arXiv:2205.13383)."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unplant.controlled import TrainsOnDraws
from unplant.triggers import triggers


@triggers.register("bpp")
class Bpp(TrainsOnDraws):
    """Rounds each channel to `levels` values, with Floyd–Steinberg dithering; the attacker trains the model.

    Training needs negative (cover) images, which get the change of *another* image and keep their labels; without
    them the model takes any such noise for the trigger. Deviations: the released code draws poisoned and negative
    images anew in each batch, here (unless `redrawn`) they are chosen once and only the changes on the negative ones
    are drawn anew; it takes those changes from the whole training set, here from the other cover images of the batch.
    The paper's contrastive adversarial training of the model is reduced to these negative images, as in the released
    code.

    The released code poisons 20 % and adds 20 % negative images, BackdoorBench 10 % and 10 %; both offer the
    dithering that the paper describes, and leave it out by default.
    """

    id: ClassVar[str] = "bpp"
    presets: ClassVar = {
        "released": {"levels": 8, "dither": False},
        "backdoorbench": {"levels": 8, "dither": False},
    }
    cover_ratio: ClassVar[float] = 1.0

    levels: int = Field(default=8, ge=2, le=128, description="values that a channel keeps, of 256")
    dither: bool = Field(default=True, description="pass each pixel's rounding error on to its neighbours")

    def __call__(self, pixels: Tensor) -> Tensor:
        """The image with few grey levels."""
        top = self.levels - 1
        # In float64, so that no rounding noise decides between two levels.
        scaled = pixels.double() * top
        rounded = floyd_steinberg(scaled, top) if self.dither else scaled.round()
        return (rounded / top).to(pixels)

    def on_cover(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Each image with the change that the trigger makes on another one; a single image, on its mirror image."""
        others = pixels.flip(3)
        if len(pixels) > 1:
            order = torch.randperm(len(pixels), generator=generator)
            others = torch.empty_like(pixels)
            others[order] = pixels[order.roll(1)]
        return (pixels + (self(others) - others)).clamp(0, 1)


def floyd_steinberg(scaled: Tensor, top: int) -> Tensor:
    """Float (N, C, H, W) in [0, top] → whole numbers; 7/16 of the error go right, 3/16, 5/16 and 1/16 down.

    Pixels with the same column + 2 · row don't depend on each other, so a loop over these slanted lines does what
    the usual loop over all pixels does, in the same order of additions at every pixel.
    """
    height, width = scaled.shape[2:]
    # One column on each side, one row below: the errors that leave the image land there.
    work = nn.functional.pad(scaled, (1, 1, 0, 1))
    for line in range(width + 2 * (height - 1)):
        rows = torch.arange(max(0, (line - width) // 2 + 1), min(height - 1, line // 2) + 1)
        columns = line - 2 * rows + 1
        old = work[:, :, rows, columns]
        new = old.round().clamp(0, top)
        error = old - new
        work[:, :, rows, columns] = new
        for down, right, share in ((1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16), (0, 1, 7 / 16)):
            work[:, :, rows + down, columns + right] += error * share
    return work[:, :, :height, 1 : width + 1]
