"""What an attacker who controls the training works with: a job, and draws of poison for each batch."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from unplant.images import LabeledImages, to_pixels, to_stored
from unplant.poisoning import Attack, Choice, PoisonedImages, apply
from unplant.triggers import Access, Trigger


@dataclass(eq=False)
class Draws:
    """Chooses which images of a batch are poisoned and which are cover, anew for each batch.

    Over a whole training the rates are kept to one image, however low: what a batch has no room for, later ones get,
    unless they lack eligible images, too.

    Attributes:
        seen: images so far.
        drawn: poisoned and cover images so far.
    """

    attack: Attack
    num_classes: int
    generator: torch.Generator
    seen: int = 0
    drawn: list[int] = field(default_factory=lambda: [0, 0])

    def __call__(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the batch they are, int64, in a random order; `labels` are the true ones, (N,), on the CPU."""
        self.seen += len(labels)
        order = torch.randperm(len(labels), generator=self.generator)
        poisoned = self._draw(
            0, self.attack.poisoning_rate, order[self.attack.eligible(labels, self.num_classes)[order]]
        )
        left = order[~torch.isin(order, poisoned)]
        may_cover = self.attack.may_cover(labels, self.num_classes)[left]
        return poisoned, self._draw(1, self.attack.cover_share, left[may_cover])

    def state_dict(self) -> dict[str, Tensor]:
        """How far it is."""
        return {"counts": torch.tensor([self.seen, *self.drawn])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to there."""
        self.seen, *self.drawn = state["counts"].tolist()

    def _draw(self, kind: int, rate: float, places: Tensor) -> Tensor:
        chosen = places[: round(rate * self.seen) - self.drawn[kind]]
        self.drawn[kind] += len(chosen)
        return chosen


@dataclass(frozen=True, eq=False)
class Job:
    """What an attack that controls training works with.

    Attributes:
        clean: the training images before the attack.
        attack: the recipe.
        choice: which of them are poisoned, which are cover.
        generator: CPU generator of the images' changes.
        steps: gradient steps that `fit` will do.
        fit: `training.fit` with steps, configuration, order and journal filled in:
            `fit(model, data, change=None, memory=())`. What the training learns or draws beside the model must be in
            `memory`, the job itself for its generator, so that a killed training goes on.
    """

    clean: LabeledImages
    attack: Attack
    choice: Choice
    generator: torch.Generator
    steps: int
    fit: Callable[..., float]

    def state_dict(self) -> dict[str, Tensor]:
        """The state of its generator."""
        return {"random": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to that."""
        self.generator.set_state(state["random"])

    def training_set(self) -> PoisonedImages:
        """The poisoned training set, as a defender would get it."""
        return apply(self.clean, self.attack, self.choice, self.generator)

    def fresh_cover(self) -> LabeledImages:
        """The poisoned training set whose cover images are drawn anew each time that they are read."""
        data = self.training_set().data
        return _FreshCover(data.images, data.labels, data.classes, data.names, self)

    def draws(self) -> Draws:
        """Poisoned and cover images, drawn anew for each batch."""
        return Draws(self.attack, self.clean.num_classes, self.generator)

    def redrawn(self, draws: Draws) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A change of batches of clean images, as `training.fit` takes it: poisons each anew, rounded to 8 bits."""
        trigger = self.attack.trigger

        def change(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            poisoned, covered = draws(labels.cpu())
            pixels, labels = pixels.clone(), labels.clone()
            labels[poisoned] = self.attack.wanted(labels[poisoned], self.clean.num_classes)
            for places, how in ((poisoned, trigger.on_poison), (covered, trigger.on_cover)):
                if len(places):
                    changed = how(pixels[places].cpu(), labels[places].cpu(), self.generator)
                    pixels[places] = to_pixels(to_stored(changed)).to(pixels)
            return pixels, labels

        return change


@dataclass(frozen=True, eq=False)
class _FreshCover(LabeledImages):
    job: Job = None  # type: ignore[assignment]

    def pixels(self, indices: Any = slice(None)) -> Tensor:
        pixels, job = super().pixels(indices), self.job
        covered = job.choice.covered[indices]
        if covered.any():
            clean, labels = job.clean.pixels(indices)[covered], self.labels[indices][covered]
            pixels[covered] = to_pixels(to_stored(job.attack.trigger.on_cover(clean, labels, job.generator)))
        return pixels


class ControlsTraining(Trigger):
    """A trigger whose attacker trains the model too."""

    access: ClassVar[Access] = "training"

    @abstractmethod
    def train(self, model: nn.Module, job: Job) -> Self:
        """Trains the infected model in place; returns the trigger, which may have been learnt along with it."""


class TrainsOnDraws(ControlsTraining):
    """A trigger whose attacker trains the model on images that are drawn while it trains; nothing else is learnt."""

    redrawn: bool = Field(
        default=False,
        description="poison other images in each batch, as the source does, and after augmentation, so that the "
        "trigger is never mirrored or cut off; the defender finds one draw",
    )

    def train(self, model: nn.Module, job: Job) -> Self:
        """Trains on poisoned images that are fixed, unless `redrawn`, and cover images that are changed anew."""
        if self.redrawn:
            draws = job.draws()
            job.fit(model, job.clean, change=job.redrawn(draws), memory=(job, draws))
        else:
            job.fit(model, job.fresh_cover(), memory=(job,))
        return self
