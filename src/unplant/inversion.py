"""Trigger inversion: perturbations shared by many images that pull them to a class, as a trigger does.

Per-image examples (`unplant.adversarial`) spend each image's own weak spots; a trigger works on all images alike.
A model that holds a backdoor gives in to a small shared perturbation towards its target sooner than other models do.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unplant.classifier import frozen
from unplant.errors import UsageError


@dataclass
class Patches:
    """Sparse perturbations, one a class: `(1 - mask) * x + mask * pattern`, with at most `area` of the pixels covered.

    The parametrisation is that of Neural Cleanse (Wang et al., IEEE S&P 2019, eq. 2); the size of a mask is a limit
    here, not a penalty, so that no class's perturbation grows until it draws the class itself.

    Attributes:
        masks: (K, 1, H, W) in [0, 1], each with a sum of at most `area` * H * W.
        patterns: (K, C, H, W) in [0, 1].
        area: largest share of the pixels, in (0, 1].
    """

    masks: Tensor
    patterns: Tensor
    area: float

    @classmethod
    def new(cls, classes: int, shape: tuple[int, int, int], area: float, generator: torch.Generator) -> "Patches":
        """Random patterns under thin, even masks, on the CPU.

        Raises:
            UsageError: `area` is not in (0, 1].
        """
        if not 0 < area <= 1:
            raise UsageError(f"the area of a patch must be in (0, 1], got {area:g}")
        channels, height, width = shape
        patterns = torch.rand((classes, channels, height, width), generator=generator)
        return cls(torch.full((classes, 1, height, width), area), patterns, area)

    def apply(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1], each with the patch of its target; a new tensor in [0, 1]."""
        mask, pattern = self.masks[targets], self.patterns[targets]
        return (1 - mask) * pixels + mask * pattern

    def improve(self, model: nn.Module, pixels: Tensor, targets: Tensor, *, steps: int, step_size: float) -> None:
        """Gradient steps that make each target likelier on the images that have it; other patches stay as they are.

        Patterns move by signs, masks by gradients scaled to a largest entry of 1 (the sizes say which pixels matter).
        The model is left as it was.

        Args:
            model: pixels in [0, 1] → logits.
            pixels: (N, C, H, W) in [0, 1].
            targets: int64 (N,), the class that each image is pulled to.
            steps: each costs one forward and one backward pass an image.
            step_size: length of a step, in pixel units and as a share of a whole mask entry.
        """
        for _ in range(steps):
            by_mask, by_pattern = _towards(model, pixels, targets, self.apply, (self.masks, self.patterns))
            largest = by_mask.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
            self.masks = within_area(self.masks + step_size * by_mask / largest, self.area)
            self.patterns = (self.patterns + step_size * by_pattern.sign()).clamp(0, 1)


def within_area(masks: Tensor, area: float) -> Tensor:
    """The nearest masks (K, 1, H, W) with entries in [0, 1] and a mean of at most `area`, found by bisection.

    >>> within_area(torch.tensor([[[[3.0, 0.5], [0.5, -1.0]]]]), 0.25).tolist()
    [[[[1.0, 0.0], [0.0, 0.0]]]]
    """
    low = torch.zeros_like(masks[:, :1, :1, :1])
    high = masks.amax((1, 2, 3), keepdim=True).clamp(min=0)
    fits = masks.clamp(0, 1).mean((1, 2, 3), keepdim=True) <= area
    for _ in range(30):
        middle = (low + high) / 2
        small = (masks - middle).clamp(0, 1).mean((1, 2, 3), keepdim=True) <= area
        low, high = torch.where(small, low, middle), torch.where(small, middle, high)
    return (masks - torch.where(fits, torch.zeros_like(high), high)).clamp(0, 1)


@dataclass
class Shifts:
    """Universal L∞ perturbations, one a class: `clip(x + shift)` (Moosavi-Dezfooli et al., CVPR 2017).

    Attributes:
        shifts: (K, C, H, W), entries in [-eps, eps].
        eps: radius of the L∞ ball, in pixel units.
    """

    shifts: Tensor
    eps: float

    @classmethod
    def new(cls, classes: int, shape: tuple[int, int, int], eps: float, generator: torch.Generator) -> "Shifts":
        """Uniform points of the ball, on the CPU.

        Raises:
            UsageError: `eps` is not in [0, 1].
        """
        if not 0 <= eps <= 1:
            raise UsageError(f"eps of a universal perturbation must be in [0, 1], got {eps:g}")
        return cls((torch.rand((classes, *shape), generator=generator) * 2 - 1) * eps, eps)

    def apply(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1], each with the shift of its target; a new tensor in [0, 1]."""
        return (pixels + self.shifts[targets]).clamp(0, 1)

    def improve(self, model: nn.Module, pixels: Tensor, targets: Tensor, *, steps: int, step_size: float) -> None:
        """Sign steps, of `step_size` * eps each, that make each target likelier; see `Patches.improve`."""
        for _ in range(steps):
            (by_shift,) = _towards(model, pixels, targets, self.apply, (self.shifts,))
            self.shifts = (self.shifts + step_size * self.eps * by_shift.sign()).clamp(-self.eps, self.eps)


def _towards(
    model: nn.Module,
    pixels: Tensor,
    targets: Tensor,
    apply: Callable[[Tensor, Tensor], Tensor],
    variables: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Gradients of the targets' log-likelihood, by the variables that `apply` reads."""
    for variable in variables:
        variable.requires_grad_(True)
    with frozen(model), torch.enable_grad():
        gain = -F.cross_entropy(model(apply(pixels, targets)).float(), targets, reduction="sum")
        gradients = torch.autograd.grad(gain, variables)
    for variable in variables:
        variable.requires_grad_(False)
    return gradients
