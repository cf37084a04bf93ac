"""The contract of a model: float pixels (N, C, H, W) in [0, 1] in, logits (N, K) out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from unplant.devices import Precision, autocast, is_out_of_memory
from unplant.errors import OutOfMemoryError
from unplant.images import LabeledImages

T = TypeVar("T")


class Classifier(nn.Module):
    """A backbone with its normalisation, so that epsilon always means pixels.

    Args:
        backbone: takes normalised images (N, C, H, W), returns logits (N, K).
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        outputs: what the backbone returns. Of probabilities p the logits are log p, as softmax(log p) = p; a p that
            has fallen to 0 counts as the smallest normal number, 1e-38.
        scale: what the logits are multiplied by.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        outputs: Literal["logits", "probabilities"] = "logits",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.outputs = outputs
        self.scale = scale
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] → logits."""
        out = self.backbone((pixels - self.mean) / self.std)
        if self.outputs == "probabilities":
            out = out.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        return out if self.scale == 1 else out * self.scale


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode with no parameter gradients, put back as it was afterwards, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in needs:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, need in needs:
            parameter.requires_grad_(need)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")


@torch.no_grad()
def logits(model: nn.Module, data: LabeledImages, batch_size: int = 128, precision: Precision = "float32") -> Tensor:
    """Logits (N, K) of all images, on the CPU, in eval mode."""
    return torch.cat(_by_batches(model, data, batch_size, precision, lambda pixels: model(pixels).float().cpu()))


def _by_batches(
    model: nn.Module, data: LabeledImages, size: int, precision: Precision, work: Callable[[Tensor], T]
) -> list[T]:
    """What `work` makes of each batch of pixels, with the model in eval mode; batches are halved if memory runs out.

    Raises:
        OutOfMemoryError: not even one image fits.
    """
    parts, place, device = [], 0, device_of(model)
    with frozen(model), autocast(device, precision):
        while place < len(data):
            try:
                parts.append(work(data.pixels(slice(place, place + size)).to(device)))
                place += size
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise OutOfMemoryError(
                        "not enough memory for one image; use smaller images (--image-size), a smaller network, "
                        "or a machine with more memory"
                    ) from error
                size //= 2
    return parts


def penultimate(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor, nn.Linear | None]:
    """Logits, penultimate features (N, D): what goes into the linear layer that runs last, and that layer.

    With their gradients. A model without linear layers gives its logits twice, and None.
    """
    seen: list[tuple[nn.Linear, Tensor]] = []

    def remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Linear):
            seen.append((module, inputs[0]))

    hooks = [m.register_forward_pre_hook(remember) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        out = model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    layer, inputs = seen[-1] if seen else (None, out)
    return out, inputs.flatten(1), layer


@torch.no_grad()
def features(model: nn.Module, data: LabeledImages, batch_size: int = 128, precision: Precision = "float32") -> Tensor:
    """Penultimate features (N, D) on the CPU, see `penultimate`."""
    parts = _by_batches(model, data, batch_size, precision, lambda pixels: penultimate(model, pixels)[1].float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def activations(
    model: nn.Module, data: LabeledImages, taps: int = 4, batch_size: int = 128, precision: Precision = "float32"
) -> list[Tensor]:
    """What `taps` layers see, evenly spread over the depth and the last one among them: each (N, D) on the CPU.

    Layers are convolutions and linear maps in the order in which they run, the first left out; what goes into them is
    averaged and maximised over space (or tokens), so D is twice the number of channels for maps. Any architecture
    will do.
    """
    seen: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[module] = inputs[0].detach()

    kinds = (nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_pre_hook(remember) for m in model.modules() if isinstance(m, kinds)]

    def look(pixels: Tensor) -> list[Tensor]:
        seen.clear()
        model(pixels)
        layers = list(seen.values())[1:] or list(seen.values())
        places = sorted({round((k + 1) * len(layers) / taps) - 1 for k in range(taps)} - {-1})
        return [_pooled(layers[place]).float().cpu() for place in places]

    try:
        parts = _by_batches(model, data, batch_size, precision, look)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _pooled(layer: Tensor) -> Tensor:
    if layer.ndim == 4:  # (N, C, H, W)
        return torch.cat([layer.mean((2, 3)), layer.amax((2, 3))], 1)
    if layer.ndim == 3:  # (N, tokens, C)
        return torch.cat([layer.mean(1), layer.amax(1)], 1)
    return layer.flatten(1)
