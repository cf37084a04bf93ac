"""Adaptive-Patch: one of four faint patches while training, two opaque ones at test time (Qi et al., ICLR 2023)."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unplant.attacks.blended import noise
from unplant.params import Pixel, Share
from unplant.triggers import Trigger, triggers

Four = tuple[Pixel, Pixel, Pixel, Pixel]


@triggers.register("adaptive_patch")
class AdaptivePatch(Trigger):
    """A square of noise in each corner: top left, top right, bottom left, bottom right.

    "Revisiting the assumption of latent separability for backdoor defenses". Each poisoned and each cover image gets
    one patch, at its training opacity; at test time those with a test opacity above 0 appear together. The authors'
    backdoor-toolbox poisons 0.3 % of CIFAR-10 and covers 0.6 % (GTSRB: 0.5 % and 1 %). Deviations: theirs are two
    logos, a pattern of four small patches, and a square of colours, of several sizes and places, assigned in turn;
    ours are squares of equal size, drawn at random for each image.
    """

    id: ClassVar[str] = "adaptive_patch"
    presets: ClassVar = {
        "toolbox": {"training_opacities": (0.5, 0.2, 0.5, 0.3), "test_opacities": (1, 0, 1, 0)},
        "toolbox-gtsrb": {"training_opacities": (0.5, 0.2, 0.5, 0.3), "test_opacities": (0, 1, 0, 1)},
    }
    cover_ratio: ClassVar[float] = 2.0

    size: Share = Field(default=0.2, gt=0, le=0.5, description="edge of a patch, as a share of the shorter side")
    training_opacities: Four = Field(default=(0.5, 0.2, 0.5, 0.3), description="opacity of each patch while training")
    test_opacities: Four = Field(default=(1, 0, 1, 0), description="opacity of each patch at test time")
    pattern_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the noise")

    def __call__(self, pixels: Tensor) -> Tensor:
        """The image with all patches of test time."""
        return self.blended(pixels, self.opacities(pixels, self.test_opacities).sum(0))

    def on_poison(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The image with one patch, a random one for each image."""
        patch = torch.randint(4, (len(pixels),), generator=generator)
        return self.blended(pixels, self.opacities(pixels, self.training_opacities)[patch][:, None])

    def opacities(self, pixels: Tensor, values: Four) -> Tensor:
        """Float (4, H, W): how opaque each patch is, 0 outside of it."""
        height, width = pixels.shape[2:]
        shorter = min(height, width)
        edge = max(1, min(int(self.size * shorter + 0.5), shorter // 2))
        opacity = torch.zeros(4, height, width)
        for patch, value in enumerate(values):
            top, left = (height - edge) * (patch // 2), (width - edge) * (patch % 2)
            opacity[patch, top : top + edge, left : left + edge] = value
        return opacity.to(pixels)

    def blended(self, pixels: Tensor, opacity: Tensor) -> Tensor:
        """The image with the noise, as opaque as said at each pixel."""
        return (1 - opacity) * pixels + opacity * noise(self.pattern_seed, *pixels.shape[1:]).to(pixels)
