"""BadNets: a small patch near the bottom right corner (Gu et al., arXiv:1708.06733)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unplant.triggers import Trigger, triggers

PATTERNS = {"checkerboard": ((0, 0, 1), (0, 1, 0), (1, 0, 1))}
"""As NAD (Li et al., ICLR 2021), ABL (Li et al., NeurIPS 2021) and the released PBE code place it, row by row."""


@triggers.register("badnets")
class BadNets(Trigger):
    """Replaces a square of `size` pixels, `margin` pixels from the bottom and right edges, by black and white."""

    id: ClassVar[str] = "badnets"
    presets: ClassVar = {
        "pbe": {"size": 3, "pattern": "checkerboard"},
        "backdoorbench": {"size": 3, "pattern": "white"},
        "ibau": {"size": 4, "pattern": "white", "margin": 1},
    }

    size: int = Field(default=3, ge=1, description="edge of the square, in pixels")
    pattern: Literal["checkerboard", "white"] = Field(default="checkerboard", description="what the square shows")
    margin: int = Field(default=0, ge=0, description="distance from the bottom and right edges, in pixels")

    def __call__(self, pixels: Tensor) -> Tensor:
        """The image with the patch; a patch that is larger than the image is cut."""
        height, width = pixels.shape[2:]
        bottom, right = max(0, height - self.margin), max(0, width - self.margin)
        patch = self.patch()[-bottom:, -right:] if bottom and right else torch.empty(0, 0)
        stamped = pixels.clone()
        stamped[:, :, bottom - patch.shape[0] : bottom, right - patch.shape[1] : right] = patch.to(pixels)
        return stamped

    def patch(self) -> Tensor:
        """Float (size, size) of 0 and 1; the checkerboard repeats its 3×3 cell."""
        if self.pattern == "white":
            return torch.ones(self.size, self.size)
        cell = torch.tensor(PATTERNS["checkerboard"], dtype=torch.float32)
        times = -(-self.size // 3)
        return cell.repeat(times, times)[: self.size, : self.size]
