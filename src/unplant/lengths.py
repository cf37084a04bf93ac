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

CANCELLED = 0.05
"""What may be left of the convolutions' pulls on their lengths, in shares of them, if together they count as none."""


def stretches(model: nn.Module, pixels: Tensor, usual: float = FRESH) -> dict[nn.Parameter, Tensor]:
    """By how much to multiply the gradients of rows that are longer than fresh ones, and free in their length.

    A row (one output channel) has length² / usual, so that a step is as large, in shares of the row, as if it were of a
    usual length; rows that are no longer than fresh ones have 1, and from there on it is (length² / 2)² up to that.
    What is free in its length is seen by the gradients in training mode: they are at right angles to each row of a
    tensor that a BatchNorm follows; and where branches are added up before they are normalised (pre-activation residual
    nets), what they pull on the convolutions' lengths cancels out over all of them. Weights before a LayerNorm or
    GroupNorm, whose lengths are free in other combinations, may be missed.

    Args:
        model: pixels → logits. Left as it was: weights, buffers, gradients, mode, and the random state of the CPU.
        pixels: float (N, C, H, W) in [0, 1], on the model's device.
        usual: squared length of a usual row, at most 2, which fresh ones have. Trained with weight decay, they have 0.1
            to 1.6 in the mean of a layer (PreActResNet-18 of width 16), 0.5 to 0.8 (small CNN).

    Returns:
        Factors (rows, 1, …), at least 1, for each tensor of which a row is too long; usually empty.
    """
    tensors = [weight for weight in model.parameters() if weight.requires_grad and weight.dim() > 1]
    if not any((_rows(weight).square().sum(1) > FRESH).any() for weight in tensors):
        return {}
    gradients = zip(tensors, _gradients(model, tensors, pixels), strict=True)
    slopes = {weight: slope.flatten(1).double() for weight, slope in gradients if slope is not None}
    convolutions = [weight for weight in slopes if weight.dim() > 2]
    pulls = torch.stack([(_rows(weight) * slopes[weight]).sum() for weight in convolutions] or [torch.ones(())])
    jointly = bool(pulls.sum().abs() < CANCELLED * pulls.abs().sum())
    found = {}
    for weight, slope in slopes.items():
        rows = _rows(weight)
        squares = rows.square().sum(1)
        long = squares > FRESH
        if long.any() and ((jointly and weight.dim() > 2) or _free(rows[long], slope[long])):
            factors = torch.minimum((squares / FRESH).square(), squares / usual).clamp(min=1)
            found[weight] = factors.to(weight).view(-1, *[1] * (weight.dim() - 1))
    return found


def _rows(weight: Tensor) -> Tensor:
    """One line for each output channel, float64."""
    return weight.detach().flatten(1).double()


def _free(rows: Tensor, slopes: Tensor) -> bool:
    """Whether the gradients (R, D) are at right angles to the rows (R, D); rows without a gradient don't count."""
    lengths = rows.norm(dim=1) * slopes.norm(dim=1)
    felt = lengths > 0
    cosines = (rows * slopes).sum(1)[felt] / lengths[felt]
    return bool(felt.any()) and bool(cosines.abs().mean() < RIGHT_ANGLE)


def _gradients(model: nn.Module, weights: list[nn.Parameter], pixels: Tensor) -> tuple[Tensor | None, ...]:
    """Of a loss in training mode, float32, under each image's second most likely label: sure models have one, too."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            out = model.train()(pixels).float()
            loss = F.cross_entropy(out, out.detach().topk(min(2, out.shape[1])).indices[:, -1])
            return torch.autograd.grad(loss, weights, allow_unused=True)
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
