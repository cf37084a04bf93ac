"""The demo: a backdoor planted in a small net on real digits and erased without clean data."""

from dataclasses import dataclass
from typing import Any

import torch

from unplant import pictures
from unplant.classifier import logits
from unplant.data import digits
from unplant.erasers.pbe import PBEConfig, pbe
from unplant.evaluation import evaluate, suspect_quality
from unplant.images import LabeledImages
from unplant.planting import Planted, TrainConfig, parse_attack, plant
from unplant.poisoning import triggered_test_set
from unplant.results import Erasure, Progress, Scores

TRAINING = TrainConfig(epochs=20, batch_size=64)
ERASING = PBEConfig(batch_size=64)
"""The method's own default, but for the batch: 1,437 images are few."""


@dataclass(frozen=True, eq=False)
class Demo:
    """What the demo did."""

    planted: Planted
    erasure: Erasure
    test: LabeledImages
    before: Scores
    after: Scores
    suspects: dict[str, Any]


def run_demo(attack: str, seed: int, progress: Progress | None = None) -> Demo:
    """Plants, erases, measures. The eraser gets the infected model and the poisoned training set, nothing else.

    Args:
        attack: `badnets`, `blended` or `sig`, optionally with settings.
        seed: of the split, the poison, the weights and the erasing.
        progress: told what is done.
    """
    train, test = digits("train", seed), digits("test", seed)
    planted = plant(train, parse_attack(attack), "small_cnn", TRAINING, seed=seed, progress=progress)
    suspect_set = planted.training_set.data
    generator = torch.Generator().manual_seed(seed)
    erasure = pbe(planted.model, suspect_set, ERASING, generator=generator, progress=progress)
    return Demo(
        planted=planted,
        erasure=erasure,
        test=test,
        before=evaluate(planted.model, test, planted.attack),
        after=evaluate(erasure.model, test, planted.attack),
        suspects=suspect_quality(erasure, planted.training_set.poisoned),
    )


def triggered_picture(demo: Demo, count: int = 12) -> bytes:
    """A PNG: test images, the same with the trigger, and what both models call the latter."""
    clean, triggered = triggered_test_set(demo.test, demo.planted.attack)
    places = torch.linspace(0, len(clean) - 1, min(count, len(clean))).long()
    clean, triggered = clean.select(places), triggered.select(places)
    infected = logits(demo.planted.model, triggered).argmax(1).tolist()
    purified = logits(demo.erasure.model, triggered).argmax(1).tolist()
    name = demo.test.classes
    return pictures.grid(
        [
            ("Test images and their true labels", clean.images, [name[k] for k in clean.labels.tolist()]),
            ("With the trigger: what the infected model sees in them", triggered.images, [name[k] for k in infected]),
            ("The same: what the purified model sees in them", triggered.images, [name[k] for k in purified]),
        ]
    )
