"""What a backdoor attack is: a trigger, a map from true to wanted labels, and a recipe for the training set."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from unplant.errors import UsageError
from unplant.images import LabeledImages, to_pixels, to_stored
from unplant.params import Config, Share, parse_spec
from unplant.registry import Registry


class Trigger(Config, ABC):
    """What an attacker adds to an image: a pure, deterministic function of the pixels, one definition for all uses.

    Subclasses are frozen settings with a `__call__`; `presets` names the constants of published sources.
    """

    id: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def preset(cls, name: str) -> Self:
        """The trigger with the constants of a published source.

        Raises:
            UsageError: there is no such preset.
        """
        if name not in cls.presets:
            raise UsageError(f"{cls.id} has no preset {name!r}; there are: {', '.join(cls.presets)}")
        return cls(**cls.presets[name])

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """Float pixels (N, C, H, W) in [0, 1] → a changed copy, the same shape and range."""

    def stamp(self, stored: Tensor) -> Tensor:
        """uint8 (N, C, H, W) → the triggered images as they exist on disk, rounded to 8 bits."""
        return torch.cat([to_stored(self(to_pixels(part))) for part in stored.split(1024)]) if len(stored) else stored


triggers: Registry[type[Trigger]] = Registry("attack")


class Attack(Config):
    """A trigger with its goal and its share of the training set.

    `label_map` is all-to-one (every triggered image gets `target`) or all-to-all (label → label + 1 mod K, Gu et al.,
    arXiv:1708.06733, section 4.3).
    """

    trigger: Trigger
    label_map: Literal["all-to-one", "all-to-all"] = Field(default="all-to-one", description="which labels are wanted")
    target: int = Field(default=0, ge=0, description="target label of all-to-one")
    poisoning_rate: Share = Field(
        default=0.1, gt=0, lt=1, description="share of the whole training set that is poisoned"
    )
    clean_label: bool = Field(
        default=False, description="trigger only images of the target class and keep their labels"
    )

    def wanted(self, labels: Tensor, num_classes: int) -> Tensor:
        """The label that each triggered image shall get, (N,)."""
        if self.label_map == "all-to-all":
            return (labels + 1) % num_classes
        if self.target >= num_classes:
            raise UsageError(f"target label {self.target} doesn't exist: there are {num_classes} classes")
        return torch.full_like(labels, self.target)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `from_json` turns back into an equal attack."""
        values = self.model_dump(exclude={"trigger"})
        return {"attack": self.trigger.id, "trigger": self.trigger.model_dump(), **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Attack":
        """The attack that `to_json` described.

        Raises:
            UsageError: unknown attack or settings.
        """
        rest = dict(values)
        try:
            trigger = triggers[rest.pop("attack")](**rest.pop("trigger"))
        except (KeyError, TypeError):
            raise UsageError("an attack is described by `attack`, `trigger` and the settings of the recipe") from None
        return cls(trigger=trigger, **rest)


def parse_attack(spec: str, **recipe: Any) -> Attack:
    """An attack from `badnets`, `badnets:size=4,pattern=white`, `sig:preset=pbe`, or JSON as `plant` writes it."""
    if spec.lstrip().startswith("{"):
        if recipe:
            raise UsageError("an attack's JSON already says target, label map and rate; leave the other options out")
        try:
            return Attack.from_json(json.loads(spec))
        except (json.JSONDecodeError, RecursionError) as error:
            raise UsageError(f"the attack's JSON is damaged: {error}") from None
    name, settings = parse_spec(spec)
    kind = triggers[name]
    preset = settings.pop("preset", None)
    base = kind.preset(str(preset)) if preset is not None else kind()
    return Attack(trigger=base.but(**settings), **recipe)


@dataclass(frozen=True, eq=False)
class PoisonedImages:
    """A poisoned training set. Only `data` is what a defender may see.

    Attributes:
        data: the images and labels to train on.
        poisoned: bool (N,), true where the trigger was added.
        true_labels: int64 (N,), the labels before the attack.
    """

    data: LabeledImages
    poisoned: Tensor
    true_labels: Tensor

    def select(self, indices: Tensor) -> "PoisonedImages":
        """The images at those indices, in that order."""
        return PoisonedImages(self.data.select(indices), self.poisoned[indices], self.true_labels[indices])


def poison(data: LabeledImages, attack: Attack, generator: torch.Generator) -> PoisonedImages:
    """Poisons exactly round(rate × N) images; the input is not modified.

    All-to-one takes them from the other classes (clean-label: from the target class), all-to-all from all.

    Raises:
        UsageError: the rate gives no image, or more than there are to choose from.
    """
    wanted = attack.wanted(data.labels, data.num_classes)
    if attack.clean_label and attack.label_map == "all-to-all":
        raise UsageError("a clean-label attack keeps the labels, so it can't be all-to-all")
    eligible = wanted == data.labels if attack.clean_label else wanted != data.labels
    candidates = eligible.nonzero().flatten()
    count = round(attack.poisoning_rate * len(data))
    if not 0 < count <= len(candidates):
        raise UsageError(
            f"poisoning rate {attack.poisoning_rate:g} of {len(data)} images means {count} poisoned ones, "
            f"it must be 1 to {len(candidates)} (the images that the attack may change)"
        )
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    images, labels = data.images.clone(), data.labels.clone()
    images[chosen] = attack.trigger.stamp(data.images[chosen])
    labels[chosen] = wanted[chosen]
    mask = torch.zeros(len(data), dtype=torch.bool)
    mask[chosen] = True
    return PoisonedImages(LabeledImages(images, labels, data.classes, data.names), mask, data.labels.clone())


def triggered_test_set(test: LabeledImages, attack: Attack) -> tuple[LabeledImages, LabeledImages]:
    """The test images that can count for an ASR (true label ≠ wanted label): untouched, and with the trigger.

    The triggered ones carry the *wanted* labels, the untouched ones the true labels.
    """
    wanted = attack.wanted(test.labels, test.num_classes)
    clean = test.select(wanted != test.labels)
    images = attack.trigger.stamp(clean.images)
    return clean, LabeledImages(images, wanted[wanted != test.labels], test.classes, clean.names)
