"""Does one wave lead the model to one class? Found by trying many, as gradients don't lead there.

Networks are easily led by single waves (Yin et al., NeurIPS 2019, arXiv:1906.08988), and triggers are made of them
(Barni et al., ICIP 2019). One forward pass of an image under a wave says something of all classes.
"""

import math

import torch
from torch import Tensor, nn

from unplant.classifier import device_of, frozen
from unplant.devices import Precision, autocast
from unplant.images import LabeledImages
from unplant.inversion import Shifts
from unplant.results import Progress

CYCLES = 8
"""Cycles of the finest wave over the shorter side; fewer where pixels can't hold so many."""

LOOKED_AT = 100
"""So many images each wave is tried on."""


def drawn_at_random(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """What `plane_waves` are made of: numbers in [0, 1), float (5 + C, N)."""
    return torch.rand((5 + channels, count), generator=generator)


def plane_waves(draw: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Waves of any direction, length, phase and height, float (N, C, H, W) in [-1, 1]: the Fourier basis.

    Half of them are grey, the others have a height in each colour. Numbers from `drawn_at_random` say which.
    """
    _, height, width = shape
    draw, side = draw[..., None, None, None], min(height, width)
    cycles, direction, phase = min(CYCLES, side / 2) * draw[0].sqrt(), math.tau * draw[1], math.tau * draw[2]
    down = torch.arange(height, device=draw.device)[:, None] / side
    right = torch.arange(width, device=draw.device) / side
    wave = torch.sin(math.tau * cycles * (direction.cos() * right + direction.sin() * down) + phase)
    colours = 2 * draw[5:, :, 0].transpose(0, 1) - 1
    return torch.where(draw[3] < 0.5, draw[4], colours) * wave


def leading_waves(
    infected: nn.Module,
    data: LabeledImages,
    *,
    waves: int,
    height: float,
    precision: Precision,
    generator: torch.Generator,
    progress: Progress | None = None,
    title: str = "looking for a wave",
) -> Shifts:
    """For each class that wave of so many at random which takes most images of other classes there.

    Args:
        infected: pixels in [0, 1] → logits; not modified.
        data: clean images in random order; the first hundred are used.
        waves: how many are tried, each costs a forward pass of a hundred images.
        height: of each at its highest, in pixel units.
        precision: of convolutions and matrix products.
        generator: CPU generator of the waves.
        progress: told the share that is done.
        title: under which name.

    Returns:
        One wave a class, and the share of those images that it took there.
    """

    def as_high(draw: Tensor) -> Tensor:
        wave = plane_waves(draw, data.shape)
        return height * wave / wave.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6)

    draw = drawn_at_random(waves, data.shape[0], generator)
    data, device, classes = data.select(torch.arange(len(data))[:LOOKED_AT]), device_of(infected), data.num_classes
    pixels, rates = data.pixels(slice(None)).to(device), torch.zeros(waves, classes)
    with frozen(infected), torch.no_grad(), autocast(device, precision):
        others = torch.ones(len(data), classes, dtype=torch.bool)
        for known in (data.labels, infected(pixels).argmax(1).cpu()):
            others[torch.arange(len(data)), known] = False
        for number in range(waves):  # one at a time, as large images' waves fill the memory
            wave = as_high(draw[:, number : number + 1]).to(device)
            said = infected((pixels + wave).clamp(0, 1)).argmax(1).cpu()
            went = torch.zeros_like(others)
            went[torch.arange(len(data)), said] = True
            rates[number] = (went & others).sum(0) / others.sum(0).clamp(min=1)
            if progress is not None:
                progress(title, (number + 1) / waves)
    best = rates.max(0)
    return Shifts(as_high(draw[:, best.indices]), best.values, height)
