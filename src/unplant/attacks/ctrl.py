"""CTRL: two raised frequencies in the colour channels (Li et al., ICCV 2023, arXiv:2210.07346)."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unplant.attacks.cosines import cosines
from unplant.params import Real
from unplant.triggers import Trigger, triggers

RED_GREEN_BLUE = (1.14, -0.396 - 0.581, 2.029)
"""What one unit more of both U and V means in RGB, with the constants of kornia's YUV, which the released code uses."""


@triggers.register("ctrl")
class Ctrl(Trigger):
    """Adds `magnitude` to two DCT coefficients of U and of V; grey images have it on their only channel.

    The positions (15, 15) and (31, 31) are of a 32 × 32 image, whose whole is one DCT window; in others they lie in
    proportion (rounded down). As DCT and YUV are linear, this adds the two cosines to the RGB image directly; the
    released code converts to YUV and back with rounded matrices, which shifts blue by up to 0.4 grey levels besides.
    As its transform is orthonormal, a cosine's height is 2 · magnitude / √(H·W): 6 grey levels of 255 at 32 × 32 in
    U and V each, twice that in blue. For larger images raise the magnitude.

    Its paper poisons unlabelled images of the target class for self-supervised learning, 1 % of the training set, so
    the labels stay (`clean_label`); BackdoorBench poisons 5 % for supervised learning. The released code and
    BackdoorBench use 100 throughout; "weak-training" is 50 while training and 100 at test time, which others
    (SWY666/CTRL_correctness, cinout/CTRL) call the official setting.
    """

    id: ClassVar[str] = "ctrl"
    presets: ClassVar = {
        "released": {"magnitude": 100 / 255, "training_magnitude": 100 / 255},
        "backdoorbench": {"magnitude": 100 / 255, "training_magnitude": 100 / 255},
        "weak-training": {"magnitude": 100 / 255, "training_magnitude": 50 / 255},
    }
    recipe: ClassVar = {"clean_label": True, "poisoning_rate": 0.05}

    magnitude: Real = Field(default=100 / 255, gt=0, le=16, description="what coefficients gain, in pixel units")
    training_magnitude: Real = Field(default=100 / 255, gt=0, le=16, description="the same, while training")
    lower: int = Field(default=15, ge=0, lt=32, description="position of one coefficient, of 32 in both directions")
    upper: int = Field(default=31, ge=0, lt=32, description="position of the other coefficient")

    def __call__(self, pixels: Tensor) -> Tensor:
        """The image with the frequencies raised."""
        return self.raised(pixels, self.magnitude)

    def on_poison(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The same, with the magnitude for training."""
        return self.raised(pixels, self.training_magnitude)

    def raised(self, pixels: Tensor, magnitude: float) -> Tensor:
        """The image with that magnitude at both positions."""
        channels, height, width = pixels.shape[1:]
        rows, columns = cosines(height), cosines(width)
        wave = torch.zeros(height, width, dtype=torch.float64)
        for position in (self.lower, self.upper):
            wave += torch.outer(rows[position * height // 32], columns[position * width // 32])
        weights = torch.tensor(RED_GREEN_BLUE if channels == 3 else [1.0] * channels, dtype=torch.float64)
        return (pixels + (magnitude * weights[:, None, None] * wave).to(pixels)).clamp(0, 1)
