"""What every eraser is: a function and a frozen config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unplant.classifier import logits
from unplant.errors import UsageError
from unplant.images import LabeledImages
from unplant.journal import NOTHING, Journal
from unplant.params import Real
from unplant.registry import Registry
from unplant.results import Erasure, Progress
from unplant.training import FitConfig


class EraserConfig(FitConfig):
    """Settings of an eraser; those of the training loop are among them.

    `flip` left at none means: mirror images if the infected model itself doesn't mind.
    """

    sharpness: Real = Field(
        default=0,
        ge=0,
        le=100,
        description="sharpness-aware minimisation: its step in the weights, in shares of them; twice the cost; 0: none",
    )

    @property
    def passes_a_step(self) -> int:
        """Forward+backward passes of the step itself, per image of a batch."""
        return 2 if self.sharpness else 1


class EraserFunction(Protocol):
    """Infected model and data in, purified model out; the inputs stay as they are."""

    def __call__(
        self,
        infected: nn.Module,
        data: LabeledImages,
        config: Any,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        journal: Journal = NOTHING,
    ) -> Erasure:
        """Purifies a copy of the model; the journal goes to every `fit`, so that a killed run can go on."""
        ...


@dataclass(frozen=True)
class Method:
    """A registered eraser.

    Attributes:
        name: its id.
        needs: `suspect`: training data that may be poisoned; `clean`: trusted data.
        config: the class of its settings.
        run: the eraser itself.
        presets: settings of published sources, by name; `default` is ours.
    """

    name: str
    needs: Literal["suspect", "clean"]
    config: type[EraserConfig]
    run: EraserFunction
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def configure(self, preset: str = "default", /, **settings: Any) -> EraserConfig:
        """The settings of a preset, with changes.

        Raises:
            UsageError: there is no such preset or setting, or a value is out of range.
        """
        if preset != "default" and preset not in self.presets:
            names = ", ".join(["default", *self.presets])
            raise UsageError(f"{self.name} has no preset {preset!r}; there are: {names}")
        return self.config(**{**self.presets.get(preset, {}), **settings})


ConfigType = TypeVar("ConfigType", bound=EraserConfig)


def settle(config: ConfigType, infected: nn.Module, data: LabeledImages) -> ConfigType:
    """Decides what the config leaves open: whether images may be mirrored.

    They may if the infected model `knows` mirrored images: so with animals, and not with digits or traffic signs.
    """
    if config.flip is not None:
        return config
    return config.but(flip=knows(infected, data, lambda images: images.flip(3)))


def knows(infected: nn.Module, data: LabeledImages, change: Callable[[Tensor], Tensor]) -> bool:
    """Whether its accuracy on 1,000 changed images is at least 0.95 of that on the same images as they are.

    Args:
        infected: pixels in [0, 1] → logits.
        data: D.
        change: uint8 images (N, C, H, W) → uint8 images of the same shape.
    """
    part = data.sample(1000, torch.Generator().manual_seed(0))
    changed = LabeledImages(change(part.images), part.labels, part.classes)
    right, right_changed = (
        float((logits(infected, images).argmax(1) == part.labels).float().mean()) for images in (part, changed)
    )
    return right_changed >= 0.95 * right


erasers: Registry[Method] = Registry("eraser")
