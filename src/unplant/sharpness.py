"""Sharpness-aware minimisation (SAM): gradients are taken where a small step in the weights hurts most.

Foret et al., ICLR 2021, arXiv:2010.01412, equation 2; the step is measured in shares of each weight, as in ASAM (Kwon
et al., ICML 2021, arXiv:2102.11600). As a way to erase backdoors: FT-SAM (Zhu et al., ICCV 2023, arXiv:2304.11823), as
the neurons that a backdoor hangs on often have large weights, and these are moved furthest.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def sharpest(model: nn.Module, radius: float) -> Iterator[None]:
    """Within, the model's weights w are where the loss grows most, to first order: at w + ρ w² g / ‖w g‖.

    The gradients g that lie in the parameters are used up: a backward pass within leaves those at the moved weights.
    Afterwards weights and buffers are as they were, bit for bit, so that BatchNorm counts a batch once.

    Args:
        model: parameters with a gradient are moved.
        radius: ρ, the length of the step in shares of the weights; at least 0.
    """
    with torch.no_grad():
        moved = [(weight, weight * weight.grad) for weight in model.parameters() if weight.grad is not None]
        kept = [(tensor, tensor.clone()) for tensor in (*(weight for weight, _ in moved), *model.buffers())]
        length = torch.stack([slope.norm() for _, slope in moved]).norm().clamp(min=1e-12) if moved else 1.0
        for weight, slope in moved:
            weight.add_(weight * slope * (radius / length))
            weight.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
