"""Input-aware: a network makes each image its own trigger (Nguyen and Tran, NeurIPS 2020, arXiv:2010.08138)."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unplant.controlled import ControlsTraining, Job
from unplant.errors import UsageError
from unplant.images import EndlessBatches, LabeledImages
from unplant.params import Real, Share
from unplant.results import Progress
from unplant.training import channel_statistics
from unplant.triggers import Access, LearnedTrigger, triggers


@triggers.register("input_aware")
class InputAware(LearnedTrigger, ControlsTraining):
    """A generator makes a pattern out of the image, a mask network says where it is put.

    The mask network is trained first, to differ between images and to cover little; the generator is trained along
    with the classifier. Cover images carry the trigger of *another* image under their own label, so that the model
    learns that a trigger works on its own image only.

    As in its paper, every batch is poisoned anew while training; what a defender finds is one fixed choice of images
    with the final trigger. (With that choice fixed from the start, the model learns it by heart: on the digits 96 % of
    the poisoned training images obeyed, 72 % of the test images.)

    Deviations: networks of fewer channels, with GroupNorm, so that an image's trigger doesn't depend on its batch;
    both learning rates of the attacker's networks fall to 0.
    """

    id: ClassVar[str] = "input_aware"
    cover_ratio: ClassVar[float] = 1.0
    access: ClassVar[Access] = "training"
    presets: ClassVar = {"paper": {"density": 0.032, "diversity": 1.0, "norm": 100.0, "lr": 0.01}}

    density: Share = Field(default=0.032, gt=0, description="share of the image that the mask may cover")
    diversity: Real = Field(default=1.0, ge=0, description="weight of the loss that keeps triggers apart")
    norm: Real = Field(default=100.0, ge=0, description="weight of the loss that keeps the mask small")
    lr: Real = Field(default=0.01, gt=0, description="peak learning rate of the attacker's networks (Adam)")
    width: int = Field(default=16, ge=4, le=256, multiple_of=4, description="channels of the attacker's networks")
    mask_steps: int = Field(default=400, ge=1, description="steps for which the mask network is trained")

    def __call__(self, pixels: Tensor) -> Tensor:
        """The image with its own trigger."""
        mask, generator = self._networks_for(pixels)
        with torch.no_grad():
            return _blend(pixels, *_trigger(mask, generator, pixels)).clamp(0, 1)

    def on_cover(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The image with the trigger of another one."""
        mask, maker = self._networks_for(pixels)
        with torch.no_grad():
            return _blend(pixels, *_trigger(mask, maker, _others(pixels, generator))).clamp(0, 1)

    @cached_property
    def networks(self) -> "tuple[Painter, Painter]":
        """Mask network and generator, in eval mode.

        Raises:
            UsageError: they haven't been learnt, or don't fit the settings.
        """
        tensors = self.tensors()
        first = tensors.get("mask.down0.0.weight")
        if first is None or first.ndim != 4 or not first.numel():
            raise UsageError(f"the weights of the trigger {self.id} are damaged: there is no mask network")
        pair = self.network(lambda: self._new(first.shape[1]))
        return pair["mask"], pair["generator"]

    def _networks_for(self, pixels: Tensor) -> "tuple[Painter, Painter]":
        mask, generator = self.networks
        channels = generator.channels
        if pixels.shape[1] != channels:
            raise UsageError(
                f"the trigger of {self.id} was learnt on images of {channels} channels, got {pixels.shape[1]}; "
                "plant anew on this data"
            )
        return mask, generator

    def learn(self, data: LabeledImages, *, seed: int, device: Any = "cpu", progress: Progress | None = None) -> Self:
        """Trains the mask network (section 3.3: diversity and density, no classifier)."""
        random = torch.Generator().manual_seed(seed)
        pair = self._new(data.shape[0], seed).to(device)
        optimiser = _Falling(pair["mask"], self.lr, self.mask_steps)
        # The paper's weights are for normalised images; with pixels in [0, 1] a mask would be a third as large.
        std = torch.tensor(channel_statistics(data)[1]).view(-1, 1, 1).to(device)
        batches = EndlessBatches(data, 64, random)
        for step in range(self.mask_steps):
            pixels = data.pixels(next(batches)).to(device)
            others = _others(pixels, random)
            masks, different = _threshold(pair["mask"](pixels)), _threshold(pair["mask"](others))
            size = F.relu(masks - self.density).mean()
            loss = self.norm * size + self.diversity * _sameness(pixels / std, others / std, masks, different)
            loss.backward()
            optimiser.step()
            if progress is not None:
                progress("mask network", (step + 1) / self.mask_steps)
        return self.with_tensors(pair.state_dict())

    def train(self, model: nn.Module, job: Job) -> Self:
        """Trains the generator along with the classifier (equation 8; Algorithm 1 of the appendix)."""
        device = next(model.parameters()).device
        pair = self.network(lambda: self._new(job.clean.shape[0])).to(device)
        mask, maker = pair["mask"], pair["generator"].requires_grad_(True)
        optimiser = _Falling(maker, self.lr, job.steps)
        attack, random, draws = job.attack, job.generator, job.draws()

        def change(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            optimiser.step()  # with the gradients of the last batch's backward pass
            poisoned, covered = (drawn.to(device) for drawn in draws(labels.cpu()))
            places = torch.cat([poisoned, covered])
            shift = int(torch.randint(1, max(2, len(pixels)), (), generator=random))
            mine, others = pixels[places], pixels[(places + shift) % len(pixels)]
            patterns, masks = _trigger(mask, maker, mine)
            strange, elsewhere = _trigger(mask, maker, others)
            if self.diversity:
                (self.diversity * _sameness(mine, others, patterns, strange)).backward(retain_graph=True)
            count, changed, labels = len(poisoned), pixels.clone(), labels.clone()
            changed[poisoned] = _blend(mine[:count], patterns[:count], masks[:count]).to(pixels.dtype)
            changed[covered] = _blend(mine[count:], strange[count:], elsewhere[count:]).to(pixels.dtype)
            labels[poisoned] = attack.wanted(labels[poisoned], job.clean.num_classes)
            # Rounded as files are, with the gradient of the identity.
            return changed + ((changed.clamp(0, 1) * 255).round() / 255 - changed).detach(), labels

        job.fit(model, job.clean, change=change, memory=(job, draws, pair, optimiser))
        return self.with_tensors(pair.state_dict())

    def _new(self, channels: int, seed: int = 0) -> nn.ModuleDict:
        outputs = {"mask": 1, "generator": channels}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.ModuleDict({name: Painter(channels, count, self.width) for name, count in outputs.items()})


class Painter(nn.Module):
    """An encoder-decoder with two poolings: images (N, C, H, W) → (N, outputs, H, W) in [0, 1]."""

    def __init__(self, channels: int, outputs: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.down0 = _block(channels, width)
        self.down1 = _block(width, 2 * width)
        self.down2 = _block(2 * width, 4 * width)
        self.up1 = _block(4 * width, 2 * width)
        self.up0 = _block(2 * width, width)
        self.end = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images in, pictures out."""
        sizes = x.shape[2:], (-(-x.shape[2] // 2), -(-x.shape[3] // 2))
        x = self.down0(2 * x - 1)
        x = self.down1(F.max_pool2d(x, 2, ceil_mode=True))
        x = self.down2(F.max_pool2d(x, 2, ceil_mode=True))
        x = self.up1(F.interpolate(x, sizes[1], mode="nearest"))
        x = self.up0(F.interpolate(x, sizes[0], mode="nearest"))
        return self.end(x).tanh() / 2 + 0.5


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _threshold(mask: Tensor) -> Tensor:
    """Pushes a mask in [0, 1] towards 0 and 1, as the released code does."""
    return torch.tanh(20 * mask - 10) / 2 + 0.5


def _trigger(mask: nn.Module, generator: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The pattern (N, C, H, W) and the mask (N, 1, H, W) that belong to those images."""
    return generator(pixels).float(), _threshold(mask(pixels).float())


def _blend(pixels: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    return pixels + (pattern - pixels) * mask


def _others(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """For each image another one of the batch (itself if it is alone), at a random distance."""
    return pixels.roll(int(torch.randint(1, max(2, len(pixels)), (), generator=generator)), 0)


def _sameness(a: Tensor, b: Tensor, made_of_a: Tensor, made_of_b: Tensor) -> Tensor:
    """Equation 5: distance of two images over that of what is made of them, mean over the pairs."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return (x.float() - y.float()).square().mean((1, 2, 3)).add(1e-12).sqrt()

    return (distance(a, b) / (distance(made_of_a, made_of_b) + 1e-7)).mean()


class _Falling:
    """Adam whose learning rate falls to 0 in a straight line; its state is tensors, as a journal wants it."""

    def __init__(self, network: nn.Module, lr: float, steps: int) -> None:
        self.adam = torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.9))
        self.lr, self.steps, self.done = lr, steps, 0

    def step(self) -> None:
        """One step with the gradients that there are, and none left behind."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr * max(0.0, 1 - self.done / self.steps)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.done += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Adam's memory, and the gradients that wait for the next step."""
        state = {"done": torch.tensor(self.done)}
        for place, parameter in enumerate(self.adam.param_groups[0]["params"]):
            state |= {f"{place}.{name}": value for name, value in self.adam.state[parameter].items()}
            if parameter.grad is not None:
                state[f"{place}.grad"] = parameter.grad
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to that."""
        self.done = int(state["done"])
        for place, parameter in enumerate(self.adam.param_groups[0]["params"]):
            known = {name.partition(".")[2]: value for name, value in state.items() if name.startswith(f"{place}.")}
            grad = known.pop("grad", None)
            parameter.grad = None if grad is None else grad.to(parameter)
            for name, value in known.items():  # Adam counts its steps on the CPU
                self.adam.state[parameter][name] = value.clone() if name == "step" else value.to(parameter)
