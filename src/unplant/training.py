"""The one training loop: infected models, AFT, PBE and every baseline run through `fit`."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unplant.augment import Augment, augment
from unplant.classifier import Classifier, device_of, penultimate
from unplant.devices import Precision, autocast, is_out_of_memory
from unplant.errors import NumericalError, OutOfMemoryError
from unplant.images import EndlessBatches, LabeledImages
from unplant.journal import NOTHING, Journal, Page, weights_of
from unplant.lengths import stretches
from unplant.models import build
from unplant.params import Real
from unplant.results import Progress
from unplant.sharpness import sharpest

Schedule = Literal["constant", "cosine", "one-cycle"]

PROBE = 32
"""Images by which it is seen which weights are free in their length."""

Change = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(model, pixels, labels) → the pixels and labels that the model is trained on, for instance adversarial examples.

Other networks' parameters on which the pixels depend get their gradient from the step's backward pass too.
"""

Lesson = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
"""The same, and the penultimate features that the model should have of these pixels, float (N, D), with their weights
(N,): added to the loss are the weighted squared distances from them, see `squared_share`.
"""


class Remembering(Protocol):
    """What learns from step to step beside the model."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that it has learnt."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes back to that."""
        ...


class FitConfig(Augment):
    """How `fit` trains: SGD with Nesterov-free momentum, as the released PBE code does."""

    lr: Real = Field(default=0.01, gt=0, description="learning rate; with the one-cycle schedule its peak")
    schedule: Schedule = Field(
        default="constant",
        description="cosine falls to 0; one-cycle rises for 30 % of the steps first, in straight lines",
    )
    momentum: Real = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: Real = Field(default=5e-4, ge=0, description="weight decay of SGD")
    batch_size: int = Field(default=128, ge=2, description="images a step")
    precision: Precision = Field(
        default="float32", description="of convolutions and matrix products; weights are float32"
    )


class TrainConfig(FitConfig):
    """How models are trained from scratch: infected ones, and clean ones to compare with."""

    epochs: Real = Field(default=20, gt=0, description="passes over the training set")
    lr: Real = Field(default=0.1, gt=0, description="peak learning rate")
    schedule: Schedule = Field(default="one-cycle", description="constant, cosine or one-cycle")


def fit(
    model: nn.Module,
    data: LabeledImages,
    *,
    steps: int,
    config: FitConfig,
    generator: torch.Generator,
    change: Change | Lesson | None = None,
    memory: Sequence[Remembering] = (),
    sharpness: float = 0.0,
    filter_length: float = 0.0,
    progress: Progress | None = None,
    title: str = "training",
    journal: Journal = NOTHING,
) -> float:
    """Trains the model in place for that many steps and returns the mean loss of the last tenth of them.

    Where memory is short, a batch is worked off in parts whose gradients are added up, so that it stays the batch it is
    (but for BatchNorm, which sees the parts).

    Args:
        model: pixels in [0, 1] → logits. Left in the mode in which it came.
        data: labelled images; each epoch in a new random order.
        steps: gradient steps.
        config: optimiser, schedule, batch, augmentation, precision.
        generator: CPU generator of order and augmentation, and of the seed of the model's own dropout.
        change: applied to each augmented batch before the step.
        memory: what `change` learns from step to step.
        sharpness: radius of the step in the weights at whose end gradients are taken, see `sharpest`; 0: none.
        filter_length: long filters that are free in their length take steps as if it were that, squared, see
            `stretches`; 0: they don't.
        progress: told the share of steps done.
        title: what `progress` is told.
        journal: where the training is written down, and taken up again if it was cut off. What decides it must be among
            the arguments: a `change` that depends on more (other networks) needs a title that says so, or no journal.

    Raises:
        NumericalError: the loss or a weight became NaN or infinite; the model's weights are then of no use.
        OutOfMemoryError: not even two images at a time can be trained on.
    """
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        running = Running(model, data, config, generator, memory, sharpness, filter_length)
        page = running.page(journal, title, steps)
        running.restore(page.read())
        modes = [(module, module.training) for module in model.modules()]
        try:
            while running.done < steps:
                running.step(config.lr * _rate(config.schedule, running.done, steps), change)
                if running.done % 20 == 0 or running.done == steps or page.due:
                    running.check(title)
                    if page.due:
                        page.write(running.state())
                    if progress is not None:
                        progress(title, running.done / steps)
        finally:
            for module, mode in modes:
                module.training = mode
        if running.fresh:
            page.write(running.state())
    last = running.losses[-max(1, steps // 10) :]
    return float(torch.stack(last).mean()) if last else float("nan")


class Running:
    """A training in progress: all that its next step depends on.

    Attributes:
        done: steps done.
        losses: of each of them, scalars.
        parts: parts in which a batch is worked off.
        fresh: whether any step was done here, not read from a page.
        stretches: factors of gradients, by weight.
    """

    def __init__(
        self,
        model: nn.Module,
        data: LabeledImages,
        config: FitConfig,
        generator: torch.Generator,
        memory: Sequence[Remembering],
        sharpness: float,
        filter_length: float,
    ) -> None:
        self.sharpness, self.filter_length = sharpness, filter_length
        self.model, self.data, self.config, self.generator, self.memory = model, data, config, generator, memory
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.SGD(
            trainable, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.batches = EndlessBatches(data, config.batch_size, generator)
        self.device = device_of(model)
        self.stretches = self._stretches(PROBE) if filter_length else {}
        self.done, self.parts, self.fresh = 0, 1, False
        self.losses: list[Tensor] = []

    def _stretches(self, images: int) -> dict[nn.Parameter, Tensor]:
        """By so many images, or by half as many and so on if memory runs out."""
        try:
            return stretches(self.model, self.data.pixels(slice(0, images)).to(self.device), self.filter_length)
        except Exception as error:
            if not is_out_of_memory(error) or images < 4:
                raise
        return self._stretches(images // 2)

    def page(self, journal: Journal, title: str, steps: int) -> Page:
        """Where this training is written down; nowhere if the model has a state that isn't tensors."""
        if journal.folder is None or len(weights_of(self.model)) < len(self.model.state_dict()):
            return NOTHING.page(tensors=())
        settings = self.config.model_dump(mode="json")
        about = (title, steps, settings, self.sharpness, self.filter_length, self.data.fingerprint(), str(self.device))
        return journal.page(*about, tensors=self.state().values())

    def step(self, lr: float, change: Change | Lesson | None) -> None:
        """One step; if memory runs out, once more with parts half as large."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        indices = next(self.batches)
        states = self.generator.get_state(), torch.get_rng_state()
        while True:
            try:
                loss = self._gradients(indices, change)
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(indices) // (2 * self.parts) < 2:
                    raise OutOfMemoryError(
                        f"not enough memory to train on {len(indices) // self.parts} images at a time; "
                        "use smaller images (--image-size), a smaller network, or a machine with more memory"
                    ) from error
            self.parts *= 2
            self.generator.set_state(states[0])
            torch.set_rng_state(states[1])
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        for weight, factors in self.stretches.items():
            if weight.grad is not None:
                weight.grad.mul_(factors)
        self.optimiser.step()
        self.losses.append(loss)
        self.done += 1
        self.fresh = True

    def _gradients(self, indices: Tensor, change: Change | Lesson | None) -> Tensor:
        self.optimiser.zero_grad(set_to_none=True)
        batch = augment(self.data.pixels(indices).to(self.device), self.config, self.generator)
        given = self.data.labels[indices].to(self.device)
        total = torch.zeros((), device=self.device)
        shown: list[tuple[Tensor, ...]] = []
        for pixels, labels in zip(batch.chunk(self.parts), given.chunk(self.parts), strict=True):
            self.model.train()
            lesson: tuple[Tensor, ...] = pixels, labels
            if change is not None:
                with autocast(self.device, self.config.precision):
                    lesson = change(self.model, pixels, labels)
            total += self._backward(len(batch), *lesson)
            shown.append((lesson[0].detach(), *lesson[1:]))
        if self.sharpness:
            with sharpest(self.model, self.sharpness):
                for lesson in shown:
                    self._backward(len(batch), *lesson)
        return total

    def _backward(self, whole: int, pixels: Tensor, labels: Tensor, *taught: Tensor) -> Tensor:
        with autocast(self.device, self.config.precision):
            out, seen, _ = penultimate(self.model, pixels) if taught else (self.model(pixels), pixels, None)
        loss = F.cross_entropy(out.float(), labels)
        if taught:
            features, weights = taught
            loss = loss + (weights * squared_share(seen.float(), features)).mean()
        loss = loss * (len(pixels) / whole)
        loss.backward()
        return loss.detach()

    def check(self, title: str) -> None:
        """Raises NumericalError if a loss, or a weight, isn't finite."""
        finite = torch.isfinite(torch.stack(self.losses[-20:])).all()
        for value in weights_of(self.model).values():
            if value.is_floating_point():
                finite &= torch.isfinite(value).all()
        if not finite:
            raise NumericalError(f"{title}: the loss or a weight is not finite at step {self.done}; try a smaller lr")

    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors."""
        state = {f"model.{key}": value for key, value in weights_of(self.model).items()}
        for place, parameter in enumerate(self.optimiser.param_groups[0]["params"]):
            momentum = self.optimiser.state[parameter].get("momentum_buffer")
            if momentum is not None:
                state[f"momentum.{place}"] = momentum
        for place, item in enumerate(self.memory):
            state |= {f"memory.{place}.{key}": value for key, value in item.state_dict().items()}
        losses = torch.stack(self.losses) if self.losses else torch.zeros(0)
        state |= {"losses": losses, "left": self.batches.left, "random": self.generator.get_state()}
        state["own random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["own random, cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, state: dict[str, Tensor] | None) -> None:
        """Goes on from there; with None, from the beginning."""
        if state is None:
            return

        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        for place, parameter in enumerate(self.optimiser.param_groups[0]["params"]):
            if f"momentum.{place}" in state:
                self.optimiser.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(
                    state[f"momentum.{place}"]
                )
        for place, item in enumerate(self.memory):
            item.load_state_dict(part(f"memory.{place}."))
        self.losses = list(state["losses"].to(self.device))
        self.done = len(self.losses)
        self.batches.left = state["left"]
        self.generator.set_state(state["random"])
        torch.set_rng_state(state["own random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["own random, cuda"], self.device)


def new_classifier(architecture: str, data: LabeledImages, *, seed: int, device: torch.device | str) -> Classifier:
    """An untrained classifier for such images; mean and std are theirs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build(architecture, num_classes=data.num_classes, channels=data.shape[0])
    mean, std = channel_statistics(data)
    return Classifier(backbone, mean, std).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def train(
    architecture: str,
    data: LabeledImages,
    config: TrainConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    title: str = "training",
    journal: Journal = NOTHING,
) -> Classifier:
    """A new classifier, trained from scratch on the data as it is."""
    model = new_classifier(architecture, data, seed=seed, device=device)
    generator = torch.Generator().manual_seed(seed)
    steps = steps_of(config.epochs, data, config.batch_size)
    fit(model, data, steps=steps, config=config, generator=generator, progress=progress, title=title, journal=journal)
    return model.eval()


def squared_share(seen: Tensor, wanted: Tensor) -> Tensor:
    """Squared distances (N,) of features (N, D), in shares of the mean square of the longer ones.

    So lengths don't matter, nor does it explode where what is wanted is next to nothing.
    """
    longer = torch.maximum(seen.detach().square().sum(1).mean(), wanted.square().sum(1).mean())
    return (seen - wanted).square().sum(1) / longer.clamp(min=torch.finfo(torch.float32).tiny)


def channel_statistics(data: LabeledImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in pixel units, from at most 5,000 images."""
    part = data.images[:: max(1, len(data) // 5000)].double() / 255
    mean, std = part.mean((0, 2, 3)), part.std((0, 2, 3)).clamp(min=1e-3)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def steps_of(epochs: float, data: LabeledImages, batch_size: int) -> int:
    """Steps of that many epochs, at least one."""
    return max(1, round(epochs * len(data) / min(batch_size, len(data))))


def _rate(schedule: str, step: int, steps: int) -> float:
    done = step / max(1, steps)
    if schedule == "one-cycle":
        return min((done + 1 / steps) / 0.3, (1 - done) / 0.7) if steps else 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
