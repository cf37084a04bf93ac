"""Label-consistent: hard images of the target class with a patch in each corner (Turner et al., arXiv:1912.02771)."""

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unplant.adversarial import pgd
from unplant.attacks.surrogate import UsesSurrogate, keep, rebuild
from unplant.errors import UsageError
from unplant.images import LabeledImages
from unplant.params import Pixel
from unplant.results import Progress
from unplant.triggers import LearnedTrigger, triggers

RIGHT = ((-1, -1, 1), (-1, 1, -1), (1, -1, 1))
"""The patch of both right corners, row by row: 1 is white, -1 is black; the left ones mirror it."""


@triggers.register("label_consistent")
class LabelConsistent(UsesSurrogate, LearnedTrigger):
    """Images of the target class are made hard to recognise, so that the victim leans on the patch that they carry.

    Turner, Tsipras and Madry, "Label-Consistent Backdoor Attacks", 2019, arXiv:1912.02771. Poisoned images keep their
    label: each is moved away from it by PGD on a model of the attacker's own, then gets a 3×3 patch in all four
    corners, as `poison_attack.py` of MadryLab/label-consistent-backdoor-code draws it ("all-corners"): mirrored left to
    right, so that flipping the image leaves it as it is; the same at the top and at the bottom. Test images get the
    patch alone, at full amplitude, so the trigger of test time needs no weights.

    Deviations: the surrogate is a plainly trained `small_cnn`. BackdoorBox attacks a benign model too, a ResNet-18;
    others take an adversarially trained one, which costs many times as much. The share of poisoned images is of the
    whole training set, not of the target class.

    The attack is as strong as its images are hard and its patches are seen. On our digits it is weak: 8/255 fools the
    surrogate on 2 % of the poisoned images only, so the victim doesn't need the patch. On CIFAR-10 a surrogate of the
    victim's own architecture makes them hard enough; then it is random crops, which cut the corners off, that decide:
    see docs/attacks.md, and `margin`.
    """

    id: ClassVar[str] = "label_consistent"
    # Half of a class out of ten: the paper counts in shares of the target class; more than the class can't be poisoned.
    recipe: ClassVar = {"clean_label": True, "poisoning_rate": 0.05}
    presets: ClassVar = {
        "backdoorbox": {"eps": 8 / 255, "step_size": 1.5 / 255, "steps": 100, "train_opacity": 1.0},
        "released-32": {"train_opacity": 32 / 255},  # the reduced amplitude that the README of the released code names
    }

    eps: Pixel = Field(default=8 / 255, description="radius of the adversarial perturbation, L∞, in pixel units")
    step_size: Pixel = Field(default=1.5 / 255, gt=0, description="length of a PGD step, in pixel units")
    steps: int = Field(default=100, ge=0, description="PGD steps")
    margin: int = Field(default=0, ge=0, description="distance of the patches from the edges, in pixels")
    train_opacity: Pixel = Field(
        default=1.0,
        gt=0,
        description="amplitude of the patch on training images, added to them and clipped; 1 is black and white",
    )

    def __call__(self, pixels: Tensor) -> Tensor:
        """The image with the patch in its corners, black and white."""
        return self._patched(pixels, 1.0)

    def on_poison(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The image, moved away from its label within `eps`, with the patch at `train_opacity`."""
        model = rebuild(self, self.surrogate).to(pixels.device)
        channels, classes = model.mean.numel(), int(model.classes)
        if pixels.shape[1] != channels or (len(labels) and int(labels.max()) >= classes):
            raise UsageError(
                f"the surrogate of {self.id} knows images of {channels} channels in {classes} classes, got "
                f"{pixels.shape[1]} channels and label {int(labels.max())}; plant anew on this data"
            )
        moved = pgd(model, pixels, labels, eps=self.eps, step_size=self.step_size, steps=self.steps)
        return self._patched(moved, self.train_opacity)

    def learn(self, data: LabeledImages, *, seed: int, device: Any, progress: Progress | None) -> Self:
        """Trains the surrogate."""
        model = self.train_surrogate(data, seed=seed, device=device, progress=progress)
        return self.with_tensors(keep(model, data.num_classes))

    def _patched(self, pixels: Tensor, amplitude: float) -> Tensor:
        """The patch is added and clipped, as the released code does: at amplitude 1 this overwrites."""
        signs = self.signs(*pixels.shape[2:]).to(pixels)
        return (pixels + amplitude * signs).clamp(0, 1)

    def signs(self, height: int, width: int) -> Tensor:
        """Float (H, W): 1 where the patch is white, -1 where it is black, 0 elsewhere."""
        right = torch.tensor(RIGHT, dtype=torch.float32)
        inset = min(self.margin, max(0, height - 3) // 2, max(0, width - 3) // 2)
        inner_height, inner_width = height - 2 * inset, width - 2 * inset
        rows, columns = min(3, inner_height), min(3, inner_width)
        signs = torch.zeros(inner_height, inner_width)
        for patch, place in ((right.flip(1), slice(0, columns)), (right, slice(inner_width - columns, inner_width))):
            piece = patch[:, :columns] if place.start == 0 else patch[:, 3 - columns :]
            signs[:rows, place] = piece[:rows]
            signs[inner_height - rows :, place] = piece[3 - rows :]
        return F.pad(signs, (inset,) * 4)
