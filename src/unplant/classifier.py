"""The contract of a model: float pixels (N, C, H, W) in [0, 1] in, logits (N, K) out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from unplant.devices import Precision, autocast, global_state_kept, is_out_of_memory
from unplant.errors import ModelFileError, OutOfMemoryError, UnplantError
from unplant.images import LabeledImages

T = TypeVar("T")

ENOUGH = 50
"""With fewer images an accuracy says too little to refuse a model."""


class Classifier(nn.Module):
    """A backbone with its normalisation, so that epsilon always means pixels.

    Args:
        backbone: takes normalised images (N, C, H, W), returns logits (N, K).
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        outputs: what the backbone returns. Of probabilities p the logits are log p, as softmax(log p) = p; a p that
            has fallen to 0 counts as the smallest normal number, 1e-38.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        outputs: Literal["logits", "probabilities"] = "logits",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.outputs = outputs
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] → logits."""
        out = self.backbone((pixels - self.mean) / self.std)
        if self.outputs == "probabilities":
            return out.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        return out


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


@torch.no_grad()
def features(model: nn.Module, data: LabeledImages, batch_size: int = 128, precision: Precision = "float32") -> Tensor:
    """Penultimate features (N, D) on the CPU: what goes into the linear layer that runs last.

    A model without linear layers gives its logits.
    """
    seen: list[Tensor] = []

    def remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach())

    hooks = [m.register_forward_pre_hook(remember) for m in model.modules() if isinstance(m, nn.Linear)]

    def look(pixels: Tensor) -> Tensor:
        seen.clear()
        out = model(pixels)
        return (seen[-1] if seen else out).flatten(1).float().cpu()

    try:
        parts = _by_batches(model, data, batch_size, precision, look)
    finally:
        for hook in hooks:
            hook.remove()
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


@contextmanager
def blamed_on_the_model(doing: str) -> Iterator[None]:
    """Turns whatever a model raises into our error: its code is the user's own.

    Raises:
        ModelFileError: the kind of the exception and its first line. Running out of memory stays what it is.
    """
    try:
        yield
    except UnplantError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelFileError(f"the model can't {doing}: {type(error).__name__}: {first[:300]}") from None


def check_fits(model: nn.Module, data: LabeledImages) -> int:
    """Runs two images through the model and returns its number of classes.

    Raises:
        ModelFileError: it can't run on images of this shape, or doesn't return logits for the data's classes.
    """
    pixels = data.pixels(slice(0, 2)).to(device_of(model))
    with (
        global_state_kept(),
        frozen(model),
        torch.no_grad(),
        blamed_on_the_model(f"run on images of shape {data.shape}"),
    ):
        out = model(pixels)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(pixels):
        raise ModelFileError(f"the model must return logits ({len(pixels)}, K), got {_kind_and_remedy(out)}")
    if not out.is_floating_point():
        raise ModelFileError(
            f"the model must return logits, got whole numbers ({out.dtype}); return its scores instead"
        )
    if not torch.isfinite(out).all():
        raise ModelFileError("the model's outputs are NaN or infinite on the first images; its weights are damaged")
    if out.shape[1] < data.num_classes:
        raise ModelFileError(f"the model has {out.shape[1]} classes, the data {data.num_classes}")
    return out.shape[1]


def _kind_and_remedy(out: Any) -> str:
    wrap = "wrap it in a module whose forward returns model(pixels)"
    if isinstance(out, Tensor):
        return f"a tensor of shape {tuple(out.shape)}; wrap it in a module that returns one row of scores an image"
    if isinstance(out, Mapping) and "logits" in out:
        return f"{type(out).__name__} with 'logits'; {wrap}['logits']"
    if hasattr(out, "logits"):
        return f"{type(out).__name__} with .logits; {wrap}.logits"
    if isinstance(out, (tuple, list)):
        return f"{type(out).__name__} of {len(out)}; {wrap}[0], if the logits come first"
    return f"{type(out).__name__}; wrap it in a module whose forward returns the logits alone"


def check_knows(model: nn.Module, data: LabeledImages) -> None:
    """Refuses a model that does no better on (at most 1,000 of) the images than always saying the commonest label.

    Raises:
        ModelFileError: it knows nothing about these images.
    """
    part = data.sample(1000, torch.Generator().manual_seed(0))
    if len(part) < ENOUGH:
        return
    with blamed_on_the_model("run on the data"):
        accuracy = float((logits(model, part).argmax(1) == part.labels).float().mean())
    guess = float(torch.bincount(part.labels).max()) / len(part)
    if accuracy <= guess + 2 * math.sqrt(guess * (1 - guess) / len(part)):
        raise ModelFileError(
            f"the model gets {accuracy:.1%} of the data's labels right, no more than guessing ({guess:.1%}); "
            "check --mean and --std, the order of the classes, and whether these are its weights and data"
        )
