"""Adversarial examples: the stand-ins for the trigger that nobody knows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unplant.classifier import frozen
from unplant.errors import UsageError


def pgd(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    random_start: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Untargeted L∞ adversarial examples by projected gradient descent.

    Madry et al., ICLR 2018, arXiv:1706.06083; used as Mu et al., CVPR 2023, arXiv:2202.06312, do: the model in eval
    mode, its parameters without gradients. The model is left as it was.

    Args:
        model: pixels in [0, 1] → logits.
        pixels: float (N, C, H, W) in [0, 1]; not modified.
        labels: int64 (N,), the labels to get away from.
        eps: radius of the L∞ ball, in pixel units of [0, 1].
        step_size: length of one step, in the same unit.
        steps: number of gradient steps; each costs one forward and one backward pass.
        random_start: begin at a uniform point of the ball instead of at the image.
        generator: for the random start, on the CPU.

    Returns:
        float (N, C, H, W) in [0, 1], at most `eps` from `pixels` in each pixel.

    Raises:
        UsageError: `eps` is outside [0, 1], `step_size` is negative, or `steps` is below 0.
    """
    if not 0 <= eps <= 1:
        hint = f"; did you mean {eps:g}/255?" if 1 < eps <= 255 else ""
        raise UsageError(f"eps of PGD must be in [0, 1], got {eps:g}{hint}")
    if not step_size >= 0 or steps < 0:
        raise UsageError(f"PGD needs step_size >= 0 and steps >= 0, got {step_size:g} and {steps}")
    lowest, highest = (pixels - eps).clamp_(0, 1), (pixels + eps).clamp_(0, 1)
    moved = pixels.detach().clone()
    if random_start and eps > 0:
        moved += (torch.rand(pixels.shape, generator=generator) * 2 - 1).to(pixels.device) * eps
        moved = moved.clamp(lowest, highest)
    with frozen(model), torch.enable_grad():
        for _ in range(steps if eps > 0 else 0):
            moved.requires_grad_(True)
            loss = F.cross_entropy(model(moved).float(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = torch.clamp(moved.detach() + step_size * gradient.sign(), lowest, highest)
    return moved.detach()
