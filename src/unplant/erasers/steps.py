"""Steps 1 and 2 (Mu et al., CVPR 2023, arXiv:2202.06312, section 4.1), which AFT and PBE share."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unplant.adversarial import pgd
from unplant.augment import Augment, augment
from unplant.classifier import device_of, frozen
from unplant.erasers.base import EraserConfig, knows, settle
from unplant.errors import UsageError
from unplant.images import LabeledImages
from unplant.journal import NOTHING, Journal
from unplant.params import Pixel, Real, Share
from unplant.results import Progress
from unplant.training import Change, fit

LEVELS = (1, 2, 3, 4, 6, 8)
"""Radii that `fitting_eps` tries, in grey levels."""


class AdversarialConfig(EraserConfig):
    """Settings of Steps 1 and 2."""

    eps: Pixel | None = Field(
        default=None, description="radius of the L∞ ball, in pixel units; none: found from the model, see `fitting_eps`"
    )
    pgd_steps: int = Field(default=3, ge=1, le=1000, description="PGD steps a batch")
    pgd_step_size: Share = Field(default=0.67, gt=0, description="length of a PGD step, as a share of eps")
    random_start: bool = Field(default=True, description="PGD begins at a random point of the ball")
    adversarial_share: Share = Field(default=0.5, description="share of each batch that is made adversarial")
    filter_length: Real = Field(
        default=2.0,
        ge=0,
        le=2,
        description="squared length that long filters before a BatchNorm are taken to have; 0: their own",
    )

    def passes(self, steps: int, data: LabeledImages) -> float:
        """The cost of that many steps, in forward+backward passes per image of the data."""
        return round(
            steps * self.batch_size * (self.passes_a_step + self.adversarial_share * self.pgd_steps) / len(data), 2
        )


AdversarialType = TypeVar("AdversarialType", bound=AdversarialConfig)


def fitting_eps(infected: nn.Module, data: LabeledImages, config: AdversarialConfig) -> float:
    """Twice the radius at which half of the images get another label, at most 16/255: a ball that the model feels.

    A ball that hardly changes the model's mind doesn't stand in for a trigger; one far beyond that costs accuracy.
    Half of CIFAR-10's images flip at 2/255, half of the digits at 8 to 16/255.
    """
    part = data.sample(500, torch.Generator().manual_seed(0))
    device = device_of(infected)
    eps = LEVELS[-1] / 255
    for level in LEVELS:
        eps = level / 255
        flipped = 0
        for pixels, labels in part.batches(config.batch_size):
            pixels, labels = pixels.to(device), labels.to(device)
            moved = pgd(infected, pixels, labels, eps=eps, step_size=config.pgd_step_size * eps, steps=config.pgd_steps)
            with frozen(infected), torch.no_grad():
                flipped += int((infected(moved).argmax(1) != labels).sum())
        if flipped >= len(part) / 2:
            break
    return min(2 * eps, 16 / 255)


def settle_ball(config: AdversarialType, infected: nn.Module, data: LabeledImages) -> AdversarialType:
    """Decides what the config leaves open: mirroring, and the radius of the ball."""
    config = settle(config, infected, data)
    return config if config.eps is not None else config.but(eps=fitting_eps(infected, data, config))


def familiar_padding(config: AdversarialConfig, infected: nn.Module, data: LabeledImages) -> int | None:
    """Padding of random crops for trials: none if θ₀ doesn't know crops.

    Else the images that are taught would lose their labels with those that aren't: on crops of its own training set,
    which it knows by heart as it is, a model that was trained without them is right on half. A padding that the config
    gives is kept.
    """
    if config.padding is not None:
        return config.padding
    crops, generator = Augment(flip=False), torch.Generator().manual_seed(0)
    return None if knows(infected, data, lambda images: augment(images, crops, generator)) else 0


def stand_ins(config: AdversarialConfig, generator: torch.Generator) -> Change:
    """Step 1: turns the first part of each batch into untargeted adversarial examples of the model as it is now.

    An infected model takes them for triggered images (section 3.2), so they stand in for the unknown trigger.
    """

    if config.eps is None:
        raise UsageError("stand_ins needs an eps; settle_ball finds one")
    eps = config.eps

    def change(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        count = round(config.adversarial_share * len(pixels))
        adversarial = pgd(
            model,
            pixels[:count],
            labels[:count],
            eps=eps,
            step_size=config.pgd_step_size * eps,
            steps=config.pgd_steps,
            random_start=config.random_start,
            generator=generator,
        )
        return torch.cat([adversarial, pixels[count:]]), labels

    return change


def adversarial_fine_tuning(
    infected: nn.Module,
    data: LabeledImages,
    config: AdversarialConfig,
    *,
    steps: int,
    generator: torch.Generator,
    progress: Progress | None = None,
    title: str = "adversarial fine-tuning",
    journal: Journal = NOTHING,
    trigger: Callable[[Tensor], Tensor] | None = None,
    triggered_share: float = 0.0,
) -> nn.Module:
    """Steps 1 and 2: fine-tunes a copy of the model on adversarial examples with their own labels.

    The link from the trigger to the target is broken, as far as the examples behave like the trigger. A known trigger
    is put on the last part of each batch, after augmentation, so that it lies where an attacker would put it; a journal
    takes it for the one that other images of the data carry.
    """
    purified = copy.deepcopy(infected)
    adversarial = stand_ins(config, generator) if config.adversarial_share > 0 else None

    def with_trigger(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if trigger is not None:
            plain = len(pixels) - round(triggered_share * len(pixels))
            pixels = torch.cat([pixels[:plain], trigger(pixels[plain:])])
        return adversarial(model, pixels, labels) if adversarial else (pixels, labels)

    change = adversarial if trigger is None else with_trigger
    around = {"generator": generator, "progress": progress, "title": title, "journal": journal}
    how = {"sharpness": config.sharpness, "filter_length": config.filter_length}
    fit(purified, data, steps=steps, config=config, change=change, **how, **around)
    return purified


RELEASED = {
    "eps": 6 / 255, "pgd_steps": 7, "pgd_step_size": 0.2, "random_start": False, "adversarial_share": 1.0,
    "lr": 0.001, "schedule": "constant", "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128,
    "padding": 5, "rotation": 10, "flip": True, "sharpness": 0,
    "filter_length": 0,
}  # fmt: skip
"""Steps 1 and 2 as the released code sets them; it doesn't clip adversarial examples to [0, 1], we do."""
