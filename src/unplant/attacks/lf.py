"""LF: a smooth pattern without high frequencies (Zeng et al., ICCV 2021, arXiv:2104.03413, section 5)."""

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unplant.attacks.cosines import cosines
from unplant.params import Pixel
from unplant.triggers import Trigger, triggers


@triggers.register("lf")
class LowFrequency(Trigger):
    """image + pattern, clipped; the same smooth pattern for every image, with nothing but low frequencies.

    Deviation: the paper searches a pattern that fools a trained model, under a low-pass constraint. Ours is drawn at
    random from the lowest `frequencies` × `frequencies` DCT coefficients without the constant one, so it needs no
    model and knows nothing of the data. It keeps the property that the paper is about: no high-frequency artefacts.
    The default amplitude means a PSNR of about 26 dB on colour images of any size (28 dB with the default seed). There
    is no preset, as no source has such constants.
    """

    id: ClassVar[str] = "lf"

    amplitude: Pixel = Field(default=50 / 255, gt=0, description="largest change of a pixel before clipping")
    frequencies: int = Field(default=4, ge=2, le=8, description="lowest frequencies in use, per direction")
    pattern_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the pattern's coefficients")

    def __call__(self, pixels: Tensor) -> Tensor:
        """The image with the pattern."""
        return (pixels + self.pattern(*pixels.shape[1:]).to(pixels)).clamp(0, 1)

    def pattern(self, channels: int, height: int, width: int) -> Tensor:
        """Float64 (C, H, W), its largest absolute value `amplitude`; NumPy's stream is the same on every platform."""
        count = self.frequencies
        drawn = torch.from_numpy(np.random.default_rng(self.pattern_seed).standard_normal((channels, count, count)))
        drawn[:, 0, 0] = 0
        smooth = cosines(height)[:count].T @ drawn @ cosines(width)[:count]
        return smooth * (self.amplitude / smooth.abs().max())
