"""Adaptive-Blend: parts of a faint picture while training, the whole at test time (Qi et al., ICLR 2023)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unplant.attacks.blended import Blended
from unplant.params import Pixel, Share
from unplant.triggers import triggers


@triggers.register("adaptive_blend")
class AdaptiveBlend(Blended):
    """Blended, with a random half of the pattern's pieces, and fainter, on each poisoned and each cover image.

    "Revisiting the assumption of latent separability for backdoor defenses". The cover images carry such halves under
    their true labels, so that poisoned and clean images don't separate within the model. The authors' backdoor-toolbox
    poisons 0.3 % of the images and covers 0.3 %. Deviation: the pattern is the noise of Blended, theirs a cartoon.
    """

    id: ClassVar[str] = "adaptive_blend"
    presets: ClassVar = {"toolbox": {"alpha": 0.2, "training_alpha": 0.15, "pieces": 16, "hidden": 0.5}}
    cover_ratio: ClassVar[float] = 1.0

    training_alpha: Pixel = Field(default=0.15, gt=0, description="opacity of the pattern while training")
    pieces: Literal[4, 9, 16, 25, 36, 49, 64] = Field(default=16, description="pieces of the pattern, in a square grid")
    hidden: Share = Field(default=0.5, le=0.9, description="share of the pieces that a training image doesn't show")

    def on_poison(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The image with a random choice of pieces, another one for each image."""
        shown = self.pieces - round(self.hidden * self.pieces)
        rank = torch.rand(len(pixels), self.pieces, generator=generator).argsort(dim=1).argsort(dim=1)
        visible = (rank < shown)[:, self.grid(*pixels.shape[2:])][:, None].to(pixels.device)
        return torch.where(visible, self.but(alpha=self.training_alpha)(pixels), pixels)

    def grid(self, height: int, width: int) -> Tensor:
        """Int64 (H, W): the piece in which each pixel lies, row by row, of nearly equal sizes."""
        side = round(self.pieces**0.5)
        rows, columns = torch.arange(height) * side // height, torch.arange(width) * side // width
        return rows[:, None] * side + columns
