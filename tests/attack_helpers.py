"""Triggers that are ready for use: those that learn are given random images to learn from, with tiny settings."""

from functools import cache

import torch

from unplant.images import LabeledImages
from unplant.triggers import LearnedTrigger, Trigger

TINY = {"surrogate": "small_cnn:width=4", "surrogate_epochs": 0.1, "steps": 3, "mask_steps": 3, "width": 4}
"""Settings that make learning quick, for triggers that have them and need to learn."""

WITH_NETWORK = {"input_aware", "ssba"}
"""Triggers whose `__call__` runs a network."""


def ready(trigger: Trigger, shape: tuple[int, int, int], classes: int = 3) -> Trigger:
    """The trigger, prepared for images of that shape; one that learns nothing comes back as it is."""
    return _learnt(trigger, tuple(shape), classes) if isinstance(trigger, LearnedTrigger) else trigger


@cache
def _learnt(trigger: LearnedTrigger, shape: tuple[int, int, int], classes: int) -> Trigger:
    tiny = trigger.but(**{name: value for name, value in TINY.items() if name in type(trigger).model_fields})
    return tiny.learn(random_data(shape, classes), seed=0, device="cpu", progress=None)


def random_data(shape: tuple[int, int, int], classes: int = 3, count: int = 32, seed: int = 0) -> LabeledImages:
    """Random images with random labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return LabeledImages(images, labels, tuple(str(k) for k in range(classes)))


def same_images(trigger: Trigger, first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two batches of uint8 images are equal; a network's may differ by one level in 0.1 % of the pixels.

    A convolution sums in another order in another batch size, so its last bit differs; where that meets the middle
    between two of the 256 levels, rounding goes the other way.
    """
    if trigger.id not in WITH_NETWORK:
        return torch.equal(first, second)
    difference = (first.int() - second.int()).abs()
    return bool(difference.max() <= 1) and float((difference > 0).float().mean()) <= 1e-3
