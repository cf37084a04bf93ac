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


def plane_waves(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Waves of any direction, length, phase and height, float (N, C, H, W) in [-1, 1]: the Fourier basis.

    Half of them are grey, the others have a height in each colour.
    """
    channels, height, width = shape
    draw = torch.rand((5 + channels, count, 1, 1, 1), generator=generator)
    side = min(height, width)
    cycles, direction, phase = min(CYCLES, side / 2) * draw[0].sqrt(), math.tau * draw[1], math.tau * draw[2]
    down, right = torch.arange(height)[:, None] / side, torch.arange(width) / side
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
    """
    drawn = plane_waves(waves, data.shape, generator)
    drawn = height * drawn / drawn.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
    data, device, classes = data.select(torch.arange(len(data))[:LOOKED_AT]), device_of(infected), data.num_classes
    pixels, rates = data.pixels(slice(None)).to(device), torch.zeros(waves, classes)
    with frozen(infected), torch.no_grad(), autocast(device, precision):
        others = torch.ones(len(data), classes, dtype=torch.bool)
        for known in (data.labels, infected(pixels).argmax(1).cpu()):
            others[torch.arange(len(data)), known] = False
        for number, wave in enumerate(drawn.to(device)):
            said = infected((pixels + wave).clamp(0, 1)).argmax(1).cpu()
            went = torch.zeros_like(others)
            went[torch.arange(len(data)), said] = True
            rates[number] = (went & others).sum(0) / others.sum(0).clamp(min=1)
            if progress is not None:
                progress(title, (number + 1) / waves)
    best = rates.max(0)
    return Shifts(drawn[best.indices], best.values, height)
