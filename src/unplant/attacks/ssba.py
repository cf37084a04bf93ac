"""SSBA: a faint residual that a network draws for each image anew (Li et al., ICCV 2021, arXiv:2012.03816)."""

import math
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unplant.errors import NumericalError
from unplant.images import EndlessBatches, LabeledImages
from unplant.params import Pixel, Real
from unplant.results import Progress
from unplant.triggers import LearnedTrigger, triggers

GRID = 8
"""The bit string is laid out on a map of that many rows and columns, which is then stretched over the image."""


@triggers.register("ssba")
class SSBA(LearnedTrigger):
    """Image + residual of an encoder that hides the same random bit string in every image.

    Li, Li, Wu, Li, He and Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021, arXiv:2012.03816.
    The attacker trains an encoder with a decoder that reads random bit strings from the encoded images, after they were
    rounded to 8 bits with noise on top; then the decoder is thrown away and one string is the trigger. What is added
    depends on the image, so no two images carry the same pixels.

    Deviations: the paper uses StegaStamp (Tancik et al., CVPR 2020), a U-Net with a perceptual loss (LPIPS) and a
    critic. This encoder is four convolutions, so that it trains on a processor in a minute or two; its residual is
    bounded in L∞ instead, under a squared loss that weighs more where the image is smooth, where eyes see more. No
    foreign weights are used. 20 bits are BackdoorBox's (`secret_size` in tests/test_ISSBA.py); yuezunli/ISSBA hides 100
    (a text of 7 letters with its error correction) in images of 224×224.
    """

    id: ClassVar[str] = "ssba"
    presets: ClassVar = {"backdoorbox": {"bits": 20}, "official": {"bits": 100}}

    bits: int = Field(default=20, ge=1, le=256, description="length of the hidden bit string")
    secret_seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the bit string that is the trigger")
    strength: Pixel = Field(default=12 / 255, gt=0, description="largest change of a pixel, in pixel units")
    width: int = Field(default=16, ge=1, le=256, description="channels of the encoder's and decoder's layers")
    steps: int = Field(default=800, ge=1, description="training steps of the encoder")
    batch_size: int = Field(default=16, ge=2, description="images a step")
    lr: Real = Field(default=3e-3, gt=0, description="learning rate of Adam, falling to 0 as a cosine")
    noise: Pixel = Field(default=1 / 255, description="standard deviation of the noise that the decoder must bear")
    visibility: Real = Field(default=0.3, ge=0, description="weight of the residual's energy in the loss")

    def __call__(self, pixels: Tensor) -> Tensor:
        """The image with its residual, clipped.

        Raises:
            UsageError: nothing has been learnt, or on images with other channels.
        """
        encoder = self.network(lambda: self.encoder(pixels.shape[1])).to(pixels.device)
        with torch.no_grad():
            return (pixels + encoder(pixels, self.secret().to(pixels).expand(len(pixels), -1))).clamp(0, 1)

    def learn(self, data: LabeledImages, *, seed: int, device: Any, progress: Progress | None) -> Self:
        """Trains encoder and decoder; keeps the encoder."""
        return self.with_tensors(self.pair(data, seed=seed, device=device, progress=progress)[0].state_dict())

    def secret(self) -> Tensor:
        """Float (bits,) of 0 and 1; NumPy's PCG64 stream is the same on every platform."""
        return torch.from_numpy(np.random.default_rng(self.secret_seed).integers(0, 2, self.bits).astype(np.float32))

    def encoder(self, channels: int) -> "Encoder":
        """An untrained encoder for images with that many channels."""
        return Encoder(channels, self.bits, self.width, self.strength)

    def pair(
        self, data: LabeledImages, *, seed: int, device: Any = "cpu", progress: Progress | None = None
    ) -> "tuple[Encoder, Decoder]":
        """Encoder and decoder, trained together on the images with a new random bit string for each.

        Raises:
            NumericalError: the loss became NaN or infinite.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = self.encoder(data.shape[0]).to(device)
            decoder = Decoder(data.shape[0], self.bits, self.width).to(device)
        optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        batches = EndlessBatches(data, self.batch_size, generator)
        for step in range(self.steps):
            pixels = data.pixels(next(batches)).to(device)
            bits = torch.randint(2, (len(pixels), self.bits), generator=generator).to(pixels)
            noise = self.noise * torch.randn(pixels.shape, generator=generator).to(pixels)
            residual = encoder(pixels, bits)
            read = decoder(_rounded((pixels + residual).clamp(0, 1)) + noise)
            unread = F.binary_cross_entropy_with_logits(read, bits)
            # Bits first, invisibility second: a residual that is punished before it says anything dies out.
            weight = self.visibility * max(0.0, 1 - float(unread.detach()) / math.log(2))
            loss = unread + weight * visible(residual / self.strength, pixels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            if step % 20 == 19 or step == self.steps - 1:
                if not torch.isfinite(loss):
                    raise NumericalError(f"encoder: the loss is not finite at step {step + 1}; try a smaller lr")
                if progress is not None:
                    progress("encoder", (step + 1) / self.steps)
        return encoder.eval(), decoder.eval()


class Encoder(nn.Module):
    """Image and bits → residual of at most `strength`; any size of image."""

    def __init__(self, channels: int, bits: int, width: int, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.spread = nn.Linear(bits, width * GRID * GRID)
        self.look = nn.Conv2d(channels, width, 3, padding=1)
        self.mix = nn.Conv2d(3 * width, width, 3, padding=1)
        self.draw = nn.Conv2d(width, width, 3, padding=1)
        self.paint = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, pixels: Tensor, bits: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1] and bits (N, bits) of 0 and 1 → residual (N, C, H, W)."""
        seen = F.relu(self.look(2 * pixels - 1))
        message = self.spread(2 * bits - 1).unflatten(1, (-1, GRID, GRID))
        message = F.interpolate(message, size=pixels.shape[2:], mode="bilinear", align_corners=False)
        # The product makes what is drawn depend on the image: with a sum alone it becomes one picture for all.
        mixed = F.relu(self.mix(torch.cat([seen, message, seen * message], 1)))
        return self.strength * torch.tanh(self.paint(F.relu(self.draw(mixed))))


class Decoder(nn.Module):
    """Encoded image → logits of the bits; used in training only."""

    def __init__(self, channels: int, bits: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(GRID // 2),
            nn.Flatten(),
            nn.Linear(2 * width * (GRID // 2) ** 2, bits),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) → logits (N, bits)."""
        return self.layers(2 * pixels - 1)


def visible(residual: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared residual, weighted by how smooth the image is there: 1 on flat areas, a quarter at contrast 0.3."""
    contrast = F.max_pool2d(pixels, 3, 1, 1) + F.max_pool2d(-pixels, 3, 1, 1)
    return (residual.square() * 0.1 / (0.1 + contrast)).mean()


def _rounded(pixels: Tensor) -> Tensor:
    """Rounded to 8 bits, with the gradient of not rounding."""
    return pixels + ((pixels * 255).round() / 255 - pixels).detach()
