"""SIG: a horizontal sinusoid over the whole image (Barni et al., ICIP 2019, arXiv:1902.11237, section 3.1)."""

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unplant.params import Pixel, Real
from unplant.triggers import Trigger, triggers


@triggers.register("sig")
class SIG(Trigger):
    """image + delta · sin(2π · column · frequency / width), clipped; the same in every row and channel.

    Its paper leaves the labels as they are (`clean_label`); the PBE paper uses it with changed labels.
    """

    id: ClassVar[str] = "sig"
    presets: ClassVar = {
        "pbe": {"delta": 10 / 255},
        "nad": {"delta": 20 / 255},
        "toolbox": {"delta": 30 / 255},
        "backdoorbench": {"delta": 40 / 255},
    }

    delta: Pixel = Field(default=20 / 255, gt=0, description="amplitude, in pixel units")
    frequency: Real = Field(default=6, gt=0, description="periods over the image's width")

    def __call__(self, pixels: Tensor) -> Tensor:
        """The image with the wave."""
        width = pixels.shape[3]
        wave = torch.sin(torch.arange(width, dtype=torch.float64) * (2 * math.pi * self.frequency / width))
        return (pixels + self.delta * wave.to(pixels)).clamp(0, 1)
