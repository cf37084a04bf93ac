"""The one training loop: infected models, AFT, PBE and every baseline run through `fit`."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unplant.augment import Augment, augment
from unplant.classifier import Classifier, device_of
from unplant.devices import Precision, autocast
from unplant.errors import NumericalError
from unplant.images import LabeledImages, forever
from unplant.models import build
from unplant.params import Real
from unplant.results import Progress

Schedule = Literal["constant", "cosine", "one-cycle"]

Change = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(model, pixels, labels) → the pixels and labels that the model is trained on, for instance adversarial examples.

Other networks' parameters on which the pixels depend get their gradient from the step's backward pass too.
"""


class FitConfig(Augment):
    """How `fit` trains: SGD with Nesterov-free momentum, as the released PBE code does."""

    lr: Real = Field(default=0.01, gt=0, description="learning rate; with the one-cycle schedule its peak")
    schedule: Schedule = Field(
        default="constant",
        description="cosine falls to 0; one-cycle rises for 30 % of the steps first, in straight lines",
    )
    momentum: Real = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: Real = Field(default=5e-4, ge=0, description="weight decay of SGD")
    batch_size: int = Field(default=128, ge=2, description="images a step")
    precision: Precision = Field(
        default="float32", description="of convolutions and matrix products; weights are float32"
    )


class TrainConfig(FitConfig):
    """How models are trained from scratch: infected ones, and clean ones to compare with."""

    epochs: Real = Field(default=20, gt=0, description="passes over the training set")
    lr: Real = Field(default=0.1, gt=0, description="peak learning rate")
    schedule: Schedule = Field(default="one-cycle", description="constant, cosine or one-cycle")


def fit(
    model: nn.Module,
    data: LabeledImages,
    *,
    steps: int,
    config: FitConfig,
    generator: torch.Generator,
    change: Change | None = None,
    progress: Progress | None = None,
    title: str = "training",
) -> float:
    """Trains the model in place for that many steps and returns the mean loss of the last tenth of them.

    Args:
        model: pixels in [0, 1] → logits. Left in the mode in which it came.
        data: labelled images; each epoch in a new random order.
        steps: gradient steps.
        config: optimiser, schedule, batch, augmentation, precision.
        generator: CPU generator of order and augmentation, and of the seed of the model's own dropout.
        change: applied to each augmented batch before the step.
        progress: told the share of steps done.
        title: what `progress` is told.

    Raises:
        NumericalError: the loss became NaN or infinite; the model's weights are then of no use.
    """
    device = device_of(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(trainable, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(config.schedule, step, steps))
    batches = forever(data, config.batch_size, generator)
    modes = [(module, module.training) for module in model.modules()]
    losses: list[Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        try:
            for step in range(steps):
                indices = next(batches)
                pixels = augment(data.pixels(indices).to(device), config, generator)
                labels = data.labels[indices].to(device)
                model.train()
                with autocast(device, config.precision):
                    if change is not None:
                        pixels, labels = change(model, pixels, labels)
                    out = model(pixels)
                loss = F.cross_entropy(out.float(), labels)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                rate.step()
                losses.append(loss.detach())
                if step % 20 == 19 or step == steps - 1:
                    if not torch.isfinite(torch.stack(losses[-20:])).all():
                        raise NumericalError(f"{title}: the loss is not finite at step {step + 1}; try a smaller lr")
                    if progress is not None:
                        progress(title, (step + 1) / steps)
        finally:
            for module, mode in modes:
                module.training = mode
    last = losses[-max(1, steps // 10) :]
    return float(torch.stack(last).mean()) if last else float("nan")


def new_classifier(architecture: str, data: LabeledImages, *, seed: int, device: torch.device | str) -> Classifier:
    """An untrained classifier for such images; mean and std are theirs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build(architecture, num_classes=data.num_classes, channels=data.shape[0])
    mean, std = channel_statistics(data)
    return Classifier(backbone, mean, std).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def train(
    architecture: str,
    data: LabeledImages,
    config: TrainConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    title: str = "training",
) -> Classifier:
    """A new classifier, trained from scratch on the data as it is."""
    model = new_classifier(architecture, data, seed=seed, device=device)
    generator = torch.Generator().manual_seed(seed)
    steps = steps_of(config.epochs, data, config.batch_size)
    fit(model, data, steps=steps, config=config, generator=generator, progress=progress, title=title)
    return model.eval()


def channel_statistics(data: LabeledImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in pixel units, from at most 5,000 images."""
    part = data.images[:: max(1, len(data) // 5000)].double() / 255
    mean, std = part.mean((0, 2, 3)), part.std((0, 2, 3)).clamp(min=1e-3)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def steps_of(epochs: float, data: LabeledImages, batch_size: int) -> int:
    """Steps of that many epochs, at least one."""
    return max(1, round(epochs * len(data) / min(batch_size, len(data))))


def _rate(schedule: str, step: int, steps: int) -> float:
    done = step / max(1, steps)
    if schedule == "one-cycle":
        return min((done + 1 / steps) / 0.3, (1 - done) / 0.7) if steps else 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
