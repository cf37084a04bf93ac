"""Trigger inversion: perturbations shared by many images that pull them to a class, as a trigger does.

Per-image examples (`unplant.adversarial`) spend each image's own weak spots; a trigger works on all images alike.
A model that holds a backdoor gives in to a small shared perturbation towards its target sooner than to others.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unplant.classifier import frozen
from unplant.errors import UsageError

MEMORY = 0.9
"""What each further image leaves of the running mean that `rates` are."""


USUAL_AREA = 0.02
"""Share of the pixels that patches cover at most, where images aren't too small for it."""


class Shared(ABC):
    """Perturbations of which each class has one, for all images."""

    rates: Tensor
    """(K,): share of the images lately pulled to each class that went there; 1 before any was."""

    learnt: ClassVar[tuple[str, ...]]
    """The tensors that are learnt."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that was learnt."""
        return {name: getattr(self, name) for name in self.learnt}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes back to that."""
        for name in self.learnt:
            setattr(self, name, state[name])

    @abstractmethod
    def apply(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1], each with the perturbation of its target; a new tensor in [0, 1]."""

    @abstractmethod
    def improve(self, model: nn.Module, pixels: Tensor, targets: Tensor, *, steps: int, step_size: float) -> None:
        """Gradient steps that make each target likelier on the images that have it, and their part of `rates`.

        The perturbations of other classes stay as they are; so does the model.

        Args:
            model: pixels in [0, 1] → logits.
            pixels: (N, C, H, W) in [0, 1].
            targets: int64 (N,), the class that each image is pulled to.
            steps: each costs one forward and one backward pass an image.
            step_size: length of a step, as a share of the perturbation's range in a pixel.
        """


@dataclass
class Patches(Shared):
    """Sparse perturbations: `(1 - mask) * x + mask * pattern`, with at most `area` of the pixels covered.

    The parametrisation is that of Neural Cleanse (Wang et al., IEEE S&P 2019, eq. 2). The size of a mask is a limit
    here, not a penalty, so that no class's perturbation grows until it draws the class itself; and mask gradients are
    averaged over 3×3 pixels, so that masks are spots rather than dust.

    Attributes:
        masks: (K, 1, H, W) in [0, 1], each with a mean of at most `area`.
        patterns: (K, C, H, W) in [0, 1].
        rates: see `Shared`.
        area: largest share of the pixels, in (0, 1].
    """

    learnt = ("masks", "patterns", "rates")
    masks: Tensor
    patterns: Tensor
    rates: Tensor
    area: float

    @classmethod
    def new(cls, classes: int, shape: tuple[int, int, int], area: float, generator: torch.Generator) -> "Patches":
        """Random patterns under thin, even masks, on the generator's device.

        Raises:
            UsageError: `area` is not in (0, 1].
        """
        if not 0 < area <= 1:
            raise UsageError(f"the area of a patch must be in (0, 1], got {area:g}")
        channels, height, width = shape
        patterns = torch.rand((classes, channels, height, width), generator=generator)
        return cls(torch.full((classes, 1, height, width), area), patterns, torch.ones(classes), area)

    def apply(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """See `Shared`."""
        mask, pattern = self.masks.to(pixels.device)[targets], self.patterns.to(pixels.device)[targets]
        return (1 - mask) * pixels + mask * pattern

    def improve(self, model: nn.Module, pixels: Tensor, targets: Tensor, *, steps: int, step_size: float) -> None:
        """See `Shared`. Patterns move by signs, masks by gradients scaled to a largest entry of 1."""
        for _ in range(steps):
            by_mask, by_pattern = _towards(model, pixels, targets, self, (self.masks, self.patterns))
            by_mask = F.avg_pool2d(by_mask, 3, 1, 1)
            largest = by_mask.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
            self.masks = within_area(self.masks + step_size * by_mask / largest, self.area)
            self.patterns = (self.patterns + step_size * by_pattern.sign()).clamp(0, 1)


@dataclass
class Shifts(Shared):
    """Universal L∞ perturbations: `clip(x + shift)` (Moosavi-Dezfooli et al., CVPR 2017, arXiv:1610.08401).

    Attributes:
        shifts: (K, C, H, W), entries in [-eps, eps].
        rates: see `Shared`.
        eps: radius of the L∞ ball, in pixel units.
    """

    learnt = ("shifts", "rates")
    shifts: Tensor
    rates: Tensor
    eps: float

    @classmethod
    def new(cls, classes: int, shape: tuple[int, int, int], eps: float, generator: torch.Generator) -> "Shifts":
        """Uniform points of the ball, on the generator's device.

        Raises:
            UsageError: `eps` is not in [0, 1].
        """
        if not 0 <= eps <= 1:
            raise UsageError(f"eps of a universal perturbation must be in [0, 1], got {eps:g}")
        start = torch.rand((classes, *shape), generator=generator) * 2 - 1
        return cls(start * eps, torch.ones(classes), eps)

    def apply(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """See `Shared`."""
        return (pixels + self.shifts.to(pixels.device)[targets]).clamp(0, 1)

    def improve(self, model: nn.Module, pixels: Tensor, targets: Tensor, *, steps: int, step_size: float) -> None:
        """See `Shared`. Shifts move by signs."""
        for _ in range(steps):
            (by_shift,) = _towards(model, pixels, targets, self, (self.shifts,))
            self.shifts = (self.shifts + 2 * self.eps * step_size * by_shift.sign()).clamp(-self.eps, self.eps)


@dataclass
class Warps(Shared):
    """Smooth displacements: each pixel is read a little to the side, as a control grid says.

    The family that WaNet's trigger is of (Nguyen and Tran, ICLR 2021, arXiv:2102.10369, equations 3 to 5).

    Attributes:
        flows: (K, 2, G, G), how far to the right and down a pixel is read, in pixels, entries in [-reach, reach];
            bicubic between the control points.
        rates: see `Shared`.
        reach: longest displacement along either axis, in pixels.
    """

    learnt = ("flows", "rates")
    flows: Tensor
    rates: Tensor
    reach: float

    @classmethod
    def new(cls, classes: int, reach: float, generator: torch.Generator, *, grid: int = 5) -> "Warps":
        """Random displacements of at most half the reach, on the generator's device.

        Raises:
            UsageError: `reach` is negative or not finite.
        """
        if not 0 <= reach < float("inf"):
            raise UsageError(f"the reach of a warp must be a length in pixels, got {reach:g}")
        start = torch.rand((classes, 2, grid, grid), generator=generator) - 0.5
        return cls(start * reach, torch.ones(classes), reach)

    def apply(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """See `Shared`. Bilinear between pixels; beyond the edge lies the edge."""
        height, width = pixels.shape[2:]
        moved = F.interpolate(self.flows.to(pixels), size=(height, width), mode="bicubic", align_corners=True)
        down, right = (torch.arange(size).to(pixels) for size in (height, width))
        column, row = right + moved[:, 0], down[:, None] + moved[:, 1]
        places = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], 3)
        warped = F.grid_sample(pixels, places[targets], padding_mode="border", align_corners=False)
        return warped.clamp(0, 1)  # interpolation weights may add up to 1 + 1e-7

    def improve(self, model: nn.Module, pixels: Tensor, targets: Tensor, *, steps: int, step_size: float) -> None:
        """See `Shared`. Displacements move by signs."""
        for _ in range(steps):
            (by_flow,) = _towards(model, pixels, targets, self, (self.flows,))
            self.flows = (self.flows + 2 * self.reach * step_size * by_flow.sign()).clamp(-self.reach, self.reach)


def new_perturbations(
    kinds: Sequence[str],
    classes: int,
    shape: tuple[int, int, int],
    *,
    area: float,
    eps: float,
    reach: float,
    generator: torch.Generator,
) -> dict[str, Shared]:
    """Perturbations of each kind that is named: `patch`, `universal`, `warp`, in this order."""
    made: dict[str, Shared] = {}
    if "patch" in kinds:
        made["patch"] = Patches.new(classes, shape, area, generator)
    if "universal" in kinds:
        made["universal"] = Shifts.new(classes, shape, eps, generator)
    if "warp" in kinds:
        made["warp"] = Warps.new(classes, reach, generator)
    return made


def choose_targets(
    rates: Tensor,
    labels: Tensor,
    focus: float,
    generator: torch.Generator,
    known: Sequence[int] = (),
    aim: float = 0.0,
) -> Tensor:
    """For each image another class than its own, int64 (N,), drawn in proportion to (rate + 0.03) ** focus.

    Classes whose perturbation works are what a backdoor may hide behind; the small addend keeps trying the others.
    A focus of 0 draws evenly. The share `aim` goes to the `known` classes first, in the same proportion among them:
    a class whose perturbation has ceased to work would hardly be tried otherwise.
    """
    weights = ((rates + 0.03) ** focus).expand(len(labels), -1).scatter(1, labels[:, None].cpu(), 0.0)
    if known and aim:
        among = torch.zeros_like(weights)
        among[:, list(known)] = weights[:, list(known)]
        weights, among = (part / part.sum(1, keepdim=True).clamp(min=1e-12) for part in (weights, among))
        weights = (1 - aim) * weights + aim * among
        weights[weights.sum(1) == 0] = 1  # an image of the only known class, at an aim of 1
        weights.scatter_(1, labels[:, None].cpu(), 0.0)
    return torch.multinomial(weights, 1, generator=generator).flatten().to(labels.device)


def within_area(masks: Tensor, area: float) -> Tensor:
    """The nearest masks (K, 1, H, W) with entries in [0, 1] and a mean of at most `area`.

    One constant is taken off all entries of a mask that is too large, before they are clipped; bisection finds it.

    >>> within_area(torch.tensor([[[[3.0, 0.5], [0.75, -1.0]]]]), 0.375).round(decimals=4).tolist()
    [[[[1.0, 0.125], [0.375, 0.0]]]]
    """
    high = masks.amax((1, 2, 3), keepdim=True).clamp(min=0)
    high = torch.where(_mean(masks) <= area, torch.zeros_like(high), high)
    low = torch.zeros_like(high)
    for _ in range(30):
        middle = (low + high) / 2
        fits = _mean(masks - middle) <= area
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return (masks - high).clamp(0, 1)


def _mean(masks: Tensor) -> Tensor:
    return masks.clamp(0, 1).mean((1, 2, 3), keepdim=True)


def _towards(
    model: nn.Module, pixels: Tensor, targets: Tensor, shared: Shared, variables: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of the targets' log-likelihood by the perturbations; brings `rates` up to date."""
    for variable in variables:
        variable.requires_grad_(True)
    with frozen(model), torch.enable_grad():
        out = model(shared.apply(pixels, targets)).float()
        gradients = torch.autograd.grad(-F.cross_entropy(out, targets, reduction="sum"), variables)
    for variable in variables:
        variable.requires_grad_(False)
    went = (out.detach().argmax(1) == targets).float().cpu()
    zeros = torch.zeros_like(shared.rates)
    count = zeros.index_add(0, targets.cpu(), torch.ones_like(went))
    kept = MEMORY**count
    mean = zeros.index_add(0, targets.cpu(), went) / count.clamp(min=1)
    shared.rates = kept * shared.rates + (1 - kept) * mean
    return gradients
