"""Planting: poison a data set, train an infected model on it. For research on defences."""

from dataclasses import dataclass

import torch
from pydantic import Field

from unplant.attacks import parse_attack
from unplant.classifier import Classifier
from unplant.images import LabeledImages
from unplant.models import build
from unplant.params import Real
from unplant.poisoning import Attack, PoisonedImages, poison
from unplant.results import Progress
from unplant.training import FitConfig, Schedule, fit, steps_of

__all__ = ["Planted", "TrainConfig", "channel_statistics", "parse_attack", "plant", "train"]


class TrainConfig(FitConfig):
    """How infected models, and clean ones to compare with, are trained from scratch."""

    epochs: Real = Field(default=20, gt=0, description="passes over the training set")
    lr: Real = Field(default=0.1, gt=0, description="peak learning rate")
    schedule: Schedule = Field(default="one-cycle", description="constant, cosine or one-cycle")


@dataclass(frozen=True, eq=False)
class Planted:
    """An infected model with the training set that infected it."""

    model: Classifier
    training_set: PoisonedImages
    attack: Attack


def channel_statistics(data: LabeledImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in pixel units, from at most 5,000 images."""
    part = data.images[:: max(1, len(data) // 5000)].double() / 255
    mean, std = part.mean((0, 2, 3)), part.std((0, 2, 3)).clamp(min=1e-3)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def train(
    architecture: str,
    data: LabeledImages,
    config: TrainConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Classifier:
    """A new classifier, trained from scratch on the data as it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build(architecture, num_classes=data.num_classes, channels=data.shape[0])
    mean, std = channel_statistics(data)
    model = Classifier(backbone, mean, std).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = steps_of(config.epochs, data, config.batch_size)
    fit(model, data, steps=steps, config=config, generator=generator, progress=progress, title="training")
    return model.eval()


def plant(
    data: LabeledImages,
    attack: Attack,
    architecture: str = "small_cnn",
    config: TrainConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Planted:
    """Poisons a copy of the data and trains an infected model on it.

    The training set comes in a random order, so that an image's place doesn't tell its true label.

    Args:
        data: clean training images.
        attack: trigger, label map and poisoning rate.
        architecture: an architecture's id.
        config: how to train.
        seed: of the choice of poisoned images, the weights and the order.
        device: where to train.
        progress: told the share of training done.
    """
    generator = torch.Generator().manual_seed(seed)
    training_set = poison(data, attack, generator).select(torch.randperm(len(data), generator=generator))
    model = train(architecture, training_set.data, config or TrainConfig(), seed=seed, device=device, progress=progress)
    return Planted(model, training_set, attack)
