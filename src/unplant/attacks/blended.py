"""Blended: a faint picture over the whole image (Chen et al., arXiv:1712.05526, section 4.2, "blended injection")."""

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unplant.params import Pixel
from unplant.triggers import Trigger, triggers


@triggers.register("blended")
class Blended(Trigger):
    """(1 − alpha) · image + alpha · pattern; the pattern is uniform noise of our own making, the same for every image.

    The sources blend in a cartoon or a random pattern; we ship none of their pictures.
    """

    id: ClassVar[str] = "blended"
    presets: ClassVar = {"pbe": {"alpha": 0.1}, "backdoorbench": {"alpha": 0.2}}

    alpha: Pixel = Field(default=0.2, gt=0, description="opacity of the pattern")
    pattern_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the noise pattern")

    def __call__(self, pixels: Tensor) -> Tensor:
        """The image with the pattern blended in."""
        return (1 - self.alpha) * pixels + self.alpha * self.pattern(*pixels.shape[1:]).to(pixels)

    def pattern(self, channels: int, height: int, width: int) -> Tensor:
        """Float (C, H, W), uniform in [0, 1]."""
        return noise(self.pattern_seed, channels, height, width)


def noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Float (C, H, W), uniform in [0, 1]; NumPy's PCG64 stream is the same on every platform."""
    return torch.from_numpy(np.random.default_rng(seed).random((channels, height, width), dtype=np.float32))
