"""What a trigger is: frozen settings and one pure function of the pixels; some have weights that planting learns."""

import base64
import binascii
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from unplant.errors import UnplantError, UsageError
from unplant.images import LabeledImages, to_pixels, to_stored
from unplant.params import Config
from unplant.registry import Registry
from unplant.results import Progress

Access = Literal["data", "surrogate", "training"]
"""What an attacker must control: the data alone; the data, with a surrogate model to prepare it; the training."""


class Trigger(Config, ABC):
    """What an attacker adds to an image: a pure, deterministic function of the pixels, one definition for all uses.

    Subclasses are frozen settings with a `__call__`; `presets` names the constants of published sources, `recipe` the
    settings of `Attack` that the attack's paper prescribes, `cover_ratio` its number of cover images for each poisoned
    one. The other methods have defaults that suit most attacks.
    """

    id: ClassVar[str]
    access: ClassVar[Access] = "data"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    recipe: ClassVar[Mapping[str, Any]] = {}
    cover_ratio: ClassVar[float] = 0.0

    @classmethod
    def preset(cls, name: str) -> Self:
        """The trigger with the constants of a published source.

        Raises:
            UsageError: there is no such preset.
        """
        if name not in cls.presets:
            raise UsageError(f"{cls.id} has no preset {name!r}; there are: {', '.join(cls.presets) or 'none'}")
        return cls(**cls.presets[name])

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """Float pixels (N, C, H, W) in [0, 1] → a changed copy, the same shape and range: the trigger at test time."""

    def on_poison(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """What poisoned training images carry, if that isn't the trigger of test time.

        Args:
            pixels: float (N, C, H, W) in [0, 1], not modified.
            labels: int64 (N,), the labels with which the images are trained on.
            generator: CPU generator of all that differs between images.
        """
        return self(pixels)

    def on_cover(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """What cover images carry: they keep their labels and teach the model what is *not* the trigger."""
        return self.on_poison(pixels, labels, generator)

    def learn(self, data: LabeledImages, *, seed: int, device: Any, progress: Progress | None) -> Self:
        """The trigger, prepared on the attacker's copy of the clean data, before any image is poisoned."""
        return self

    def stamp(self, stored: Tensor) -> Tensor:
        """uint8 (N, C, H, W) → the triggered images as they exist on disk, rounded to 8 bits."""
        return torch.cat([to_stored(self(to_pixels(part))) for part in stored.split(1024)]) if len(stored) else stored


triggers: Registry[type[Trigger]] = Registry("attack")


class LearnedTrigger(Trigger):
    """A trigger with weights of its own, that planting learns.

    The weights travel within the attack's JSON, as the base64 text of a safetensors file, so that the JSON describes
    the trigger to the last bit.
    """

    access: ClassVar[Access] = "surrogate"

    weights: str = Field(default="", max_length=2**26, repr=False, description="what planting learnt; not to be set")

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The trigger with those weights."""
        from safetensors.torch import save

        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        return self.but(weights=base64.b64encode(save(whole)).decode("ascii"))

    def tensors(self) -> dict[str, Tensor]:
        """The weights.

        Raises:
            UsageError: nothing has been learnt yet, or the text is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        if not self.weights:
            raise UsageError(
                f"the trigger of {self.id} is learnt while planting; pass the attack.json that `unplant plant` wrote"
            )
        try:
            found = load(base64.b64decode(self.weights, validate=True))
        except (binascii.Error, SafetensorError, ValueError, KeyError) as error:
            raise UsageError(f"the weights of the trigger {self.id} are damaged: {error}") from None
        broken = [name for name, tensor in found.items() if tensor.is_complex() or not tensor.double().isfinite().all()]
        if broken:
            raise UsageError(f"the weights of the trigger {self.id} hold no finite numbers in {broken[0][:100]!r}")
        return found

    def network(self, make: Callable[[], nn.Module]) -> Any:
        """The network that `make` makes, with the weights, in eval mode.

        It is made without memory first, so that a stranger's settings can't make us allocate more than the weights.

        Raises:
            UsageError: nothing has been learnt yet, or the weights don't fit it.
        """
        tensors = self.tensors()
        try:
            with torch.device("meta"):
                empty = make()
            for name, wanted in empty.state_dict().items():
                if name in tensors and tensors[name].dtype != wanted.dtype:
                    raise RuntimeError(f"{name} is {tensors[name].dtype}, not {wanted.dtype}")
            empty.load_state_dict(tensors, assign=True)
        except (RuntimeError, UnplantError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"the weights of the trigger {self.id} don't fit its settings: {reason}") from None
        return empty.eval().requires_grad_(False)
