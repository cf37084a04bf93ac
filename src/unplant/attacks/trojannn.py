"""TrojanNN: a patch whose pixels are optimised to fire chosen neurons (Liu et al., NDSS 2018)."""

from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from unplant.attacks.surrogate import UsesSurrogate
from unplant.classifier import device_of, frozen, penultimate
from unplant.errors import UsageError
from unplant.images import LabeledImages, to_pixels, to_stored
from unplant.params import Real, Share
from unplant.results import Progress
from unplant.triggers import LearnedTrigger, triggers


@triggers.register("trojannn")
class TrojanNN(UsesSurrogate, LearnedTrigger):
    """Replaces a square in the bottom right corner by pixels that make a clean model's best connected neurons fire.

    Liu, Ma, Aafer, Lee, Zhai, Wang and Zhang, "Trojaning Attack on Neural Networks", NDSS 2018: the neurons
    of a layer are ranked by the sum of the absolute weights that connect them to the next one; gradient descent on the
    patch's pixels minimises the sum of (target value − activation)². Here the layer is what goes into the last linear
    layer, as in BackdoorBench and TrojanZoo.

    Deviations: the paper retrains a foreign model on data that it reverse-engineers; here the patch poisons training
    data, as in BackdoorBench, so the attacker needs no access to the victim. The patch is optimised on some of the
    attacker's images rather than on a black picture: after a ReLU a neuron that is silent on that one picture gives no
    gradient at all (`background_images=0` does it as TrojanZoo).
    """

    id: ClassVar[str] = "trojannn"
    presets: ClassVar = {
        "trojanzoo": {"neurons": 2, "target_value": 100, "steps": 1000, "lr": 0.1, "background_images": 0}
    }

    size: Share = Field(default=0.2, gt=0, description="edge of the square, as a share of the image's shorter side")
    neurons: int = Field(default=2, ge=1, description="how many of the best connected neurons shall fire")
    target_value: Real = Field(default=100, gt=0, description="activation that they shall reach")
    steps: int = Field(default=300, ge=1, description="steps of Adam on the patch, with a cosine schedule")
    lr: Real = Field(default=0.1, gt=0, description="learning rate, of the patch before a tanh maps it to [0, 1]")
    background_images: int = Field(
        default=16, ge=0, description="clean images on which the patch is optimised; 0: on a black one"
    )

    def __call__(self, pixels: Tensor) -> Tensor:
        """The image with the patch.

        Raises:
            UsageError: nothing has been learnt, or on images of another shape.
        """
        tensors = self.tensors()
        patch, shape = tensors.get("patch"), tensors.get("shape")
        if patch is None or shape is None or patch.dtype != torch.uint8 or patch.ndim != 3 or shape.shape != (3,):
            raise UsageError(f"the weights of the trigger {self.id} are damaged: they hold no patch")
        if shape.tolist() != list(pixels.shape[1:]):
            raise UsageError(
                f"the patch of {self.id} was learnt on images of shape {tuple(shape.tolist())}, "
                f"got {tuple(pixels.shape[1:])}; plant anew on this data"
            )
        return _stamped(pixels, to_pixels(patch).to(pixels))

    def learn(self, data: LabeledImages, *, seed: int, device: Any, progress: Progress | None) -> Self:
        """Trains the surrogate, picks its neurons and optimises the patch."""
        model = self.train_surrogate(data, seed=seed, device=device, progress=progress)
        generator = torch.Generator().manual_seed(seed)
        channels, height, width = data.shape
        background = data.sample(self.background_images, generator).pixels().to(device_of(model))
        if not len(background):
            background = torch.zeros(1, *data.shape, device=device_of(model))
        edge = max(1, round(self.size * min(height, width)))
        start = torch.randn(channels, edge, edge, generator=generator)
        patch = self.optimise(model, background, start)
        return self.with_tensors({"patch": to_stored(patch), "shape": torch.tensor(data.shape)})

    def optimise(self, model: nn.Module, background: Tensor, start: Tensor) -> Tensor:
        """The patch (C, edge, edge) in [0, 1] on which the chosen neurons come closest to the target value."""
        with frozen(model), torch.enable_grad():
            raw = start.to(background).requires_grad_(True)
            optimiser = torch.optim.Adam([raw], lr=self.lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
            chosen = best_connected(model, background[:1], self.neurons)
            for _ in range(self.steps):
                fired = penultimate(model, _stamped(background, (raw.tanh() + 1) / 2))[1][:, chosen]
                loss = (self.target_value - fired).square().sum(1).mean()
                (raw.grad,) = torch.autograd.grad(loss, raw)
                optimiser.step()
                schedule.step()
            return ((raw.detach().tanh() + 1) / 2).cpu()


def best_connected(model: nn.Module, pixels: Tensor, count: int) -> Tensor:
    """Indices of the `count` inputs of the last linear layer with the largest sum of absolute weights.

    Raises:
        UsageError: the model has none.
    """
    layer = penultimate(model, pixels)[2]
    if layer is None:
        raise UsageError("TrojanNN needs a surrogate that ends in a linear layer")
    return layer.weight.detach().abs().sum(0).argsort(descending=True, stable=True)[:count]


def _stamped(pixels: Tensor, patch: Tensor) -> Tensor:
    height, width = patch.shape[1:]
    stamped = pixels.clone()
    stamped[:, :, pixels.shape[2] - height :, pixels.shape[3] - width :] = patch
    return stamped
