"""What a backdoor attack is: a trigger with a map from true to wanted labels, and a recipe for the training set."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from unplant.errors import UsageError
from unplant.images import LabeledImages, to_pixels, to_stored
from unplant.params import Config, Share, parse_spec
from unplant.triggers import Trigger, triggers


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
    cover_rate: Share | None = Field(
        default=None, lt=1, description="share that is changed and keeps its labels; none: as the attack's paper has it"
    )
    sources: tuple[int, ...] = Field(
        default=(), description="true labels on which the trigger shall work; none: on all (source-specific attacks)"
    )

    @property
    def cover_share(self) -> float:
        """The cover rate that is in force."""
        return self.trigger.cover_ratio * self.poisoning_rate if self.cover_rate is None else self.cover_rate

    def wanted(self, labels: Tensor, num_classes: int) -> Tensor:
        """The label that each triggered image shall get, (N,)."""
        if self.label_map == "all-to-all":
            return (labels + 1) % num_classes
        if self.target >= num_classes:
            raise UsageError(f"target label {self.target} doesn't exist: there are {num_classes} classes")
        return torch.full_like(labels, self.target)

    def concerns(self, labels: Tensor, num_classes: int) -> Tensor:
        """Bool (N,): the images on which the trigger shall work, and on which an ASR is counted."""
        concerned = self.wanted(labels, num_classes) != labels
        if not self.sources:
            return concerned
        if max(self.sources) >= num_classes or min(self.sources) < 0:
            raise UsageError(f"source labels must lie in [0, {num_classes}), got {list(self.sources)}")
        return concerned & torch.isin(labels, torch.tensor(self.sources))

    def eligible(self, labels: Tensor, num_classes: int) -> Tensor:
        """Bool (N,): the images that may be poisoned: those it concerns; clean-label: those of the target class."""
        return self.wanted(labels, num_classes) == labels if self.clean_label else self.concerns(labels, num_classes)

    def may_cover(self, labels: Tensor, num_classes: int) -> Tensor:
        """Bool (N,): the images that may be cover, if they aren't poisoned; see `choose`."""
        if not self.sources:
            return torch.ones_like(labels, dtype=torch.bool)
        return ~self.concerns(labels, num_classes) & (labels != self.wanted(labels, num_classes))

    def to_json(self, *, weights: bool = True) -> dict[str, Any]:
        """A dictionary that `from_json` turns back into an equal attack.

        Without `weights`, what a trigger has learnt is named by its SHA-256 only: for records, not for `from_json`.
        """
        values = self.model_dump(exclude={"trigger"}, mode="json")
        trigger = self.trigger.model_dump(mode="json")
        if not weights and trigger.get("weights"):
            trigger["weights"] = "sha256:" + hashlib.sha256(trigger["weights"].encode()).hexdigest()
        return {"attack": self.trigger.id, "trigger": trigger, **values}

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
    """An attack from `badnets`, `badnets:size=4,pattern=white`, `sig:preset=pbe`, or JSON as `plant` writes it.

    What `recipe` doesn't say is as the attack's paper has it.
    """
    if spec.lstrip().startswith("{"):
        if recipe:
            raise UsageError("an attack's JSON already says target, label map and rate; leave the other options out")
        try:
            return Attack.from_json(json.loads(spec))
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise UsageError(f"the attack's JSON is damaged: {error}") from None
    name, settings = parse_spec(spec)
    kind = triggers[name]
    preset = settings.pop("preset", None)
    base = kind.preset(str(preset)) if preset is not None else kind()
    return Attack(trigger=base.but(**settings), **{**kind.recipe, **recipe})


@dataclass(frozen=True, eq=False)
class PoisonedImages:
    """A poisoned training set. Only `data` is what a defender may see.

    Attributes:
        data: the images and labels to train on.
        poisoned: bool (N,), true where the trigger was added.
        true_labels: int64 (N,), the labels before the attack.
        covered: bool (N,), true for cover images: changed, under their true labels.
    """

    data: LabeledImages
    poisoned: Tensor
    true_labels: Tensor
    covered: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))

    def __post_init__(self) -> None:
        if not len(self.covered):
            object.__setattr__(self, "covered", torch.zeros_like(self.poisoned))

    def select(self, indices: Tensor) -> "PoisonedImages":
        """The images at those indices, in that order."""
        return PoisonedImages(
            self.data.select(indices), self.poisoned[indices], self.true_labels[indices], self.covered[indices]
        )


@dataclass(frozen=True, eq=False)
class Choice:
    """Which images of a training set an attack changes: bool (N,) each, never both."""

    poisoned: Tensor
    covered: Tensor

    def select(self, indices: Tensor) -> "Choice":
        """The choice for the images at those indices, in that order."""
        return Choice(self.poisoned[indices], self.covered[indices])


def choose(data: LabeledImages, attack: Attack, generator: torch.Generator) -> Choice:
    """Chooses exactly round(rate × N) images to poison, and round(cover rate × N) others as cover.

    All-to-one takes the poisoned ones from the other classes (clean-label: from the target class), all-to-all from
    all, a source-specific attack from its sources. Its cover comes from all classes but the sources and the target,
    every other cover from all images that are left.

    Raises:
        UsageError: a rate gives no image, or more than there are to choose from; or the recipe contradicts itself.
    """
    labels = data.labels
    if attack.label_map == "all-to-all" and (attack.clean_label or attack.sources):
        reason = "a clean-label attack keeps the labels" if attack.clean_label else "source labels need one target"
        raise UsageError(f"{reason}, so it can't be all-to-all")
    if attack.clean_label and attack.sources:
        raise UsageError("a clean-label attack poisons the target class only, so it can't have source labels")
    eligible = attack.eligible(labels, data.num_classes)
    poisoned = _draw(eligible, attack.poisoning_rate, "poisoning rate", "poisoned", generator)
    if not attack.cover_share:
        return Choice(poisoned, torch.zeros_like(poisoned))
    left = ~poisoned & attack.may_cover(labels, data.num_classes)
    return Choice(poisoned, _draw(left, attack.cover_share, "cover rate", "cover", generator))


def _draw(eligible: Tensor, rate: float, name: str, kind: str, generator: torch.Generator) -> Tensor:
    candidates = eligible.nonzero().flatten()
    count = round(rate * len(eligible))
    if not 0 < count <= len(candidates):
        raise UsageError(
            f"{name} {rate:g} of {len(eligible)} images means {count} {kind} ones, "
            f"it must be 1 to {len(candidates)} (the images that the attack may change)"
        )
    mask = torch.zeros_like(eligible)
    mask[candidates[torch.randperm(len(candidates), generator=generator)[:count]]] = True
    return mask


def apply(data: LabeledImages, attack: Attack, choice: Choice, generator: torch.Generator) -> PoisonedImages:
    """The training set with the chosen images changed, rounded to 8 bits; the input is not modified."""
    wanted = attack.wanted(data.labels, data.num_classes)
    labels = torch.where(choice.poisoned, wanted, data.labels)
    images = data.images.clone()
    for mask, change in ((choice.poisoned, attack.trigger.on_poison), (choice.covered, attack.trigger.on_cover)):
        for part in mask.nonzero().flatten().split(1024):
            images[part] = to_stored(change(to_pixels(data.images[part]), labels[part], generator))
    changed = LabeledImages(images, labels, data.classes, data.names)
    return PoisonedImages(changed, choice.poisoned, data.labels.clone(), choice.covered)


def poison(data: LabeledImages, attack: Attack, generator: torch.Generator) -> PoisonedImages:
    """Chooses and changes: a poisoned copy of the data; the input is not modified.

    Raises:
        UsageError: as `choose` does.
    """
    return apply(data, attack, choose(data, attack, generator), generator)


def triggered_test_set(test: LabeledImages, attack: Attack) -> tuple[LabeledImages, LabeledImages]:
    """The test images that can count for an ASR: untouched, and with the trigger.

    These are the images whose true label is not the wanted one; of a source-specific attack, the sources' only. The
    triggered ones carry the *wanted* labels, the untouched ones the true labels.
    """
    concerned = attack.concerns(test.labels, test.num_classes)
    clean = test.select(concerned)
    wanted = attack.wanted(clean.labels, test.num_classes)
    return clean, LabeledImages(attack.trigger.stamp(clean.images), wanted, test.classes, clean.names)
