"""Weights whose length means nothing, and steps that don't depend on it.

A filter that is followed by BatchNorm may be of any length: the net's answers are the same. Gradient descent isn't
indifferent. Its step, in shares of the filter, falls with the square of the filter's length (van Laarhoven, 2017,
arXiv:1706.05350; Hoffer et al., NeurIPS 2018, arXiv:1803.01814). So whoever multiplies the filters of an infected model
by ten makes it a hundred times harder to purify, unseen, and models that were trained without weight decay are like
that by themselves.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FRESH = 2.0
"""Squared length of a row as it is initialised for ReLU nets (He et al., ICCV 2015, arXiv:1502.01852)."""

RIGHT_ANGLE = 3e-3
"""Mean cosine between rows and their gradients that counts as zero. Rows that aren't free in length have at least 0.005
by chance alone, up to 20,000 numbers a row."""


def stretches(model: nn.Module, pixels: Tensor, labels: Tensor) -> dict[nn.Parameter, Tensor]:
    """By how much to multiply the gradients of rows that are longer than fresh ones, and free in their length.

    A row (one output channel) has length² / 2, so that a step is as large, in shares of the row, as if it were as long
    as it was when training began; shorter rows have 1. What is free in its length is seen by the gradients in training
    mode: they are at right angles to each row of a tensor that a BatchNorm follows, and to all convolutions taken
    together where branches are added up before they are normalised (pre-activation residual nets). Weights before a
    LayerNorm or GroupNorm aren't found otherwise.

    Args:
        model: pixels → logits. Left as it was: weights, buffers, gradients, mode, and the random state of the CPU.
        pixels: float (N, C, H, W) in [0, 1], on the model's device.
        labels: int64 (N,).

    Returns:
        Factors (rows, 1, …), at least 1, for each tensor of which a row is too long; usually empty.
    """
    tensors = [weight for weight in model.parameters() if weight.requires_grad and weight.dim() > 1]
    long = {weight: _rows(weight).square().sum(1) > FRESH for weight in tensors}
    if not any(rows.any() for rows in long.values()):
        return {}
    gradients = _gradients(model, tensors, pixels, labels)
    felt = {weight: slope for weight, slope in zip(tensors, gradients, strict=True) if slope is not None}
    convolutions = [weight for weight in felt if weight.dim() > 2]
    together = torch.cat([_rows(weight).flatten() for weight in convolutions] or [torch.ones(1)])
    slope = torch.cat([felt[weight].flatten().double() for weight in convolutions] or [torch.ones(1)])
    jointly = bool(F.cosine_similarity(together, slope.to(together), dim=0).abs() < RIGHT_ANGLE)
    found = {}
    for weight, slope in felt.items():
        if not long[weight].any():
            continue
        cosines = F.cosine_similarity(_rows(weight), slope.flatten(1).double(), dim=1)
        if cosines[long[weight]].abs().mean() < RIGHT_ANGLE or (jointly and weight.dim() > 2):
            factors = (_rows(weight).square().sum(1) / FRESH).clamp(min=1).to(weight)
            found[weight] = factors.view(-1, *[1] * (weight.dim() - 1))
    return found


def _rows(weight: Tensor) -> Tensor:
    """One line for each output channel, float64."""
    return weight.detach().flatten(1).double()


def _gradients(
    model: nn.Module, weights: list[nn.Parameter], pixels: Tensor, labels: Tensor
) -> tuple[Tensor | None, ...]:
    """Of the loss in training mode, float32; the model is left as it was."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            loss = F.cross_entropy(model.train()(pixels).float(), labels)
            return torch.autograd.grad(loss, weights, allow_unused=True)
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
