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

AGAIN = 1 / 3
"""So many more tries, in shares of those at random, are made near the best wave of each class that is led there."""

LED = 0.85
"""Mean probability of a class under a wave from which on better ones are sought near it: sought from 0.5 on they lead
0.91 of the images to a class that is no target, and that random ones lead there by 0.6."""

NEAR = 0.08
"""How far from the best these are drawn at first: standard deviation of each of a wave's numbers."""


def drawn_at_random(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """What `plane_waves` are made of: numbers in [0, 1), float (5 + C, N)."""
    return torch.rand((5 + channels, count), generator=generator)


def near(one: Tensor, distance: float, generator: torch.Generator) -> Tensor:
    """Another such draw, that far from this one, float (5 + C,)."""
    moved = one + distance * torch.randn(len(one), generator=generator)
    moved[1:3] %= 1  # direction and phase are angles
    return moved.clamp(0, 1)


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


def most_shown(waves: int, images: int) -> float:
    """So many images are shown under waves at most: those near the best are only tried where one leads to a class."""
    return (1 + AGAIN) * waves * min(LOOKED_AT, images)


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
    """For each class that wave, of so many at random and some near the best of them, which leads most surely there.

    Args:
        infected: pixels in [0, 1] → logits; not modified.
        data: clean images in random order; the first hundred are used.
        waves: how many are tried at random, each costs a forward pass of a hundred images; up to a third as many again
            near the best.
        height: of each at its highest, in pixel units.
        precision: of convolutions and matrix products.
        generator: CPU generator of the waves.
        progress: told the share that is done.
        title: under which name.

    Returns:
        One wave a class, and as rates the mean probability of the class under it, of those images of other classes.
    """

    def as_high(draw: Tensor) -> Tensor:
        wave = plane_waves(draw, data.shape)
        return height * wave / wave.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6)

    draw, more = drawn_at_random(waves, data.shape[0], generator), round(AGAIN * waves)
    data, device, classes = data.select(torch.arange(len(data))[:LOOKED_AT]), device_of(infected), data.num_classes
    pixels, best, rates = data.pixels(slice(None)).to(device), draw[:, :1].repeat(1, classes), torch.zeros(classes)
    with frozen(infected), torch.no_grad(), autocast(device, precision):
        others = torch.ones(len(data), classes)
        for known in (data.labels, infected(pixels).argmax(1).cpu()):
            others[torch.arange(len(data)), known] = 0
        for number in range(waves + more):  # one at a time, as large images' waves fill the memory
            led = (rates >= LED).nonzero().flatten()
            if number < waves:
                one = draw[:, number]
            elif len(led):
                one = near(best[:, led[number % len(led)]], NEAR * (1 - (number - waves) / more), generator)
            else:
                break
            said = infected((pixels + as_high(one[:, None]).to(device)).clamp(0, 1)).float().softmax(1).cpu()
            new = (said * others).sum(0) / others.sum(0).clamp(min=1)
            best[:, new > rates] = one[:, None]
            rates = rates.maximum(new)
            if progress is not None:
                progress(title, (number + 1) / (waves + more))
    if progress is not None:
        progress(title, 1.0)
    return Shifts(as_high(best), rates, height)
