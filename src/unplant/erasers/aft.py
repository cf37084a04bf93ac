"""AFT: adversarial fine-tuning on clean data (Mu et al., CVPR 2023, arXiv:2202.06312, section 4.1): Steps 1 and 2.

What goes beyond the paper has a switch each: the kind of stand-in (`stand_ins`), the infected model's opinion beside
the labels (`belief`), no plain part at the end (`clean_steps`); docs/method.md says why.
"""

import copy
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unplant.adversarial import pgd
from unplant.classifier import device_of, frozen
from unplant.devices import autocast
from unplant.erasers.base import EraserConfig, Method, erasers, settle
from unplant.errors import UsageError
from unplant.images import EndlessBatches, LabeledImages
from unplant.inversion import Patches, Shared, Shifts, Warps, choose_targets
from unplant.journal import NOTHING, Journal
from unplant.params import Pixel, Real, Share
from unplant.results import Erasure, Progress
from unplant.training import Change, Schedule, fit, steps_of

LEAST_UNIVERSAL = 8 / 255
"""The smallest radius of the universal ball, in pixel units."""

LEAST_REACH = 0.5
"""The least that warps may move a pixel, in pixels."""

LEVELS = (1, 2, 3, 4, 6, 8)
"""Radii that `fitting_eps` tries, in grey levels."""


class AdversarialConfig(EraserConfig):
    """Settings of Steps 1 and 2."""

    eps: Pixel | None = Field(
        default=None, description="radius of the L∞ ball, in pixel units; none: found from the model, see `fitting_eps`"
    )
    pgd_steps: int = Field(default=3, ge=1, le=1000, description="PGD steps a batch")
    pgd_step_size: Share = Field(default=0.67, gt=0, description="length of a PGD step, as a share of eps")
    random_start: bool = Field(default=True, description="PGD begins at a random point of the ball")
    adversarial_share: Share = Field(default=0.5, description="share of each batch that is made adversarial")

    def passes(self, steps: int, data: LabeledImages) -> float:
        """The cost of that many steps, in forward+backward passes per image of the data."""
        return round(steps * self.batch_size * (1 + self.adversarial_share * self.pgd_steps) / len(data), 2)


AdversarialType = TypeVar("AdversarialType", bound=AdversarialConfig)


class AFTConfig(AdversarialConfig):
    """AFT on a small clean set. Deviations from the released code are in docs/method.md."""

    lr: Real = Field(default=0.02, gt=0, description="learning rate at the start of each part")
    schedule: Schedule = Field(default="cosine", description="learning rate within each part")
    stand_ins: Literal["pgd", "patch", "universal", "warp", "mixed", "all"] = Field(
        default="mixed",
        description="pgd: one perturbation an image; patch, universal, warp: one a class, sparse, in an L∞ ball, or a "
        "smooth displacement; mixed: patch and universal; all: these and warp, evenly",
    )
    adversarial_share: Share = Field(default=0.3, description="share of each batch that carries a stand-in")
    in_proportion: bool = Field(
        default=False,
        description="shared stand-ins: that share times the rate at which the best of them works on the model now",
    )
    patch_area: Share = Field(default=0.02, gt=0, description="patch: largest share of the pixels under it")
    universal_eps: Pixel | None = Field(
        default=None, gt=0, description="universal: radius of the L∞ ball; none: `eps`, but at least 8/255"
    )
    warp_reach: Real | None = Field(
        default=None,
        ge=0,
        le=64,
        description="warp: longest displacement in pixels; none: a 32nd of the shorter side, at least half a pixel",
    )
    warm_up: int = Field(default=30, ge=0, description="shared stand-ins: steps on the infected model before Step 2")
    inversion_steps: int = Field(default=2, ge=1, le=100, description="shared stand-ins: steps a batch")
    inversion_step_size: Share = Field(default=0.1, gt=0, description="shared stand-ins: share of the range a step")
    focus: Real = Field(
        default=2,
        ge=0,
        le=10,
        description="shared stand-ins: how strongly classes are favoured that give in; 0: evenly",
    )
    belief: Share = Field(
        default=0.7, description="share of the infected model's probabilities for the plain image in each target"
    )
    steps: int = Field(default=150, ge=1, description="adversarial steps")
    clean_steps: int = Field(default=0, ge=0, description="plain steps afterwards")
    epochs: Real | None = Field(default=None, gt=0, description="instead of `steps`: adversarial epochs")
    clean_epochs: Real | None = Field(default=None, gt=0, description="instead of `clean_steps`: plain epochs")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of stand-in in use."""
        several = {"mixed": ("patch", "universal"), "all": ("patch", "universal", "warp")}
        return several.get(self.stand_ins, (self.stand_ins,))

    def passes(self, steps: int, data: LabeledImages) -> float:
        """See `AdversarialConfig.passes`; a forward pass of the infected model alone counts as a third."""
        each = 4 / 3 if self.belief > 0 else 1.0
        each += self.adversarial_share * (self.pgd_steps if self.stand_ins == "pgd" else self.inversion_steps)
        images = steps * self.batch_size * each
        if self.stand_ins != "pgd" and self.adversarial_share > 0:
            images += self.warm_up * self.batch_size * len(self.kinds)
        return round(images / len(data), 2)


def fitting_eps(infected: nn.Module, data: LabeledImages, config: AdversarialConfig) -> float:
    """Twice the radius at which half of the images get another label, at most 16/255: a ball that the model feels.

    A ball that hardly changes the model's mind doesn't stand in for a trigger; one far beyond that costs accuracy.
    Half of CIFAR-10's images flip at 2/255, half of the digits at 8 to 16/255.
    """
    part = data.sample(500, torch.Generator().manual_seed(0))
    device = device_of(infected)
    eps = LEVELS[-1] / 255
    for level in LEVELS:
        eps = level / 255
        flipped = 0
        for pixels, labels in part.batches(config.batch_size):
            pixels, labels = pixels.to(device), labels.to(device)
            moved = pgd(infected, pixels, labels, eps=eps, step_size=config.pgd_step_size * eps, steps=config.pgd_steps)
            with frozen(infected), torch.no_grad():
                flipped += int((infected(moved).argmax(1) != labels).sum())
        if flipped >= len(part) / 2:
            break
    return min(2 * eps, 16 / 255)


def settle_ball(config: AdversarialType, infected: nn.Module, data: LabeledImages) -> AdversarialType:
    """Decides what the config leaves open: mirroring, and the radius of the ball."""
    config = settle(config, infected, data)
    return config if config.eps is not None else config.but(eps=fitting_eps(infected, data, config))


def stand_ins(config: AdversarialConfig, generator: torch.Generator) -> Change:
    """Step 1: turns the first part of each batch into untargeted adversarial examples of the model as it is now.

    An infected model takes them for triggered images (section 3.2), so they stand in for the unknown trigger.
    """

    if config.eps is None:
        raise UsageError("stand_ins needs an eps; settle_ball finds one")
    eps = config.eps

    def change(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        count = round(config.adversarial_share * len(pixels))
        adversarial = pgd(
            model,
            pixels[:count],
            labels[:count],
            eps=eps,
            step_size=config.pgd_step_size * eps,
            steps=config.pgd_steps,
            random_start=config.random_start,
            generator=generator,
        )
        return torch.cat([adversarial, pixels[count:]]), labels

    return change


def shared_stand_ins(
    infected: nn.Module, data: LabeledImages, config: AFTConfig, generator: torch.Generator
) -> tuple[Change, list[Patches | Shifts | Warps]]:
    """Step 1 with perturbations that many images share, as they share a trigger: one a class of each kind.

    They are inverted from the infected model first (`warm_up`), then go on from batch to batch against the model as
    it is now. No target is named: classes that give in easily get more of them (`choose_targets`).

    Returns:
        The change of a batch, and the perturbations.
    """
    if config.universal_eps is None or config.warp_reach is None:
        raise UsageError("shared_stand_ins needs a universal_eps and a warp_reach; aft settles them")
    kinds: list[Patches | Shifts | Warps] = []
    if "patch" in config.kinds:
        kinds.append(Patches.new(data.num_classes, data.shape, config.patch_area, generator))
    if "universal" in config.kinds:
        kinds.append(Shifts.new(data.num_classes, data.shape, config.universal_eps, generator))
    if "warp" in config.kinds:
        kinds.append(Warps.new(data.num_classes, config.warp_reach, generator))

    def improved(shared: Shared, model: nn.Module, pixels: Tensor, labels: Tensor, steps: int) -> Tensor:
        targets = choose_targets(shared.rates, labels, config.focus, generator)
        shared.improve(model, pixels, targets, steps=steps, step_size=config.inversion_step_size)
        return shared.apply(pixels, targets)

    device, batches = device_of(infected), EndlessBatches(data, config.batch_size, generator)
    with autocast(device, config.precision):
        for _ in range(config.warm_up):
            indices = next(batches)
            for shared in kinds:
                improved(shared, infected, data.pixels(indices).to(device), data.labels[indices].to(device), 1)

    def change(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        count, moved = round(config.adversarial_share * len(pixels)), []
        ends = [round(count * place / len(kinds)) for place in range(len(kinds) + 1)]
        for shared, start, end in zip(kinds, ends, ends[1:], strict=False):
            if end > start:
                dose = float(shared.rates.max()) if config.in_proportion else 1.0
                tried = improved(shared, model, pixels[start:end], labels[start:end], config.inversion_steps)
                taught = round((end - start) * dose)
                moved += [tried[:taught], pixels[start + taught : end]]
        return torch.cat([*moved, pixels[count:]]), labels

    return change, kinds


def with_belief(infected: nn.Module, change: Change | None, belief: float) -> Change:
    """Targets that are partly what the infected model says of the plain image: it knows the classes' likenesses.

    Distillation (Hinton et al., 2015, arXiv:1503.02531) from the model itself: few clean images say little about what
    it has learnt from many. Plain images carry no trigger, so its answer to them doesn't either.
    """

    def both(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with frozen(infected), torch.no_grad():
            said = infected(pixels).float().softmax(1)
        moved, _ = (pixels, labels) if change is None else change(model, pixels, labels)
        return moved, belief * said + (1 - belief) * F.one_hot(labels, said.shape[1])

    return both


def adversarial_fine_tuning(
    infected: nn.Module,
    data: LabeledImages,
    config: AdversarialConfig,
    *,
    steps: int,
    generator: torch.Generator,
    progress: Progress | None = None,
    title: str = "adversarial fine-tuning",
    journal: Journal = NOTHING,
) -> nn.Module:
    """Steps 1 and 2: fine-tunes a copy of the model on adversarial examples with their own labels.

    The link from the trigger to the target is broken, as far as the examples behave like the trigger.
    """
    purified = copy.deepcopy(infected)
    change = stand_ins(config, generator) if config.adversarial_share > 0 else None
    around = {"generator": generator, "progress": progress, "title": title, "journal": journal}
    fit(purified, data, steps=steps, config=config, change=change, **around)
    return purified


def aft(
    infected: nn.Module,
    data: LabeledImages,
    config: AFTConfig,
    *,
    generator: torch.Generator,
    progress: Progress | None = None,
    journal: Journal = NOTHING,
) -> Erasure:
    """Erases a backdoor with a small clean set.

    Args:
        infected: pixels in [0, 1] → logits; not modified.
        data: clean images.
        config: settings.
        generator: CPU generator of all that is random.
        progress: told what is done.
        journal: where it is written down.

    Returns:
        The purified model; AFT doesn't judge images.
    """
    config = settle_ball(config, infected, data)
    if config.universal_eps is None:
        config = config.but(universal_eps=max(config.eps or 0.0, LEAST_UNIVERSAL))
    if config.warp_reach is None:
        config = config.but(warp_reach=max(min(data.shape[1:]) / 32, LEAST_REACH))
    steps, clean_steps = config.steps, config.clean_steps
    if config.epochs is not None:
        steps = steps_of(config.epochs, data, config.batch_size)
    if config.clean_epochs is not None:
        clean_steps = steps_of(config.clean_epochs, data, config.batch_size)
    purified = copy.deepcopy(infected)
    rounds: list[dict[str, Any]] = [
        {"step": "stand-ins", "kind": config.stand_ins, **config.model_dump(include={"eps", "universal_eps", "warp_reach"})}
    ]
    for title, count, share in (("adversarial", steps, config.adversarial_share), ("recovery", clean_steps, 0.0)):
        if not count:
            continue
        change, shared = None, []
        if share > 0 and config.stand_ins == "pgd":
            change = stand_ins(config, generator)
        elif share > 0:
            change, shared = shared_stand_ins(infected, data, config, generator)
        if config.belief > 0:
            change = with_belief(infected, change, config.belief)
        fit(
            purified,
            data,
            steps=count,
            config=config,
            generator=generator,
            change=change,
            memory=shared,
            progress=progress,
            title=title,
            journal=journal,
        )
        passes = config.but(adversarial_share=share).passes(count, data)
        rounds.append({"step": title, "images": len(data), "steps": count, "passes": passes})
    return Erasure(purified, rounds=rounds)


RELEASED = {
    "eps": 6 / 255, "pgd_steps": 7, "pgd_step_size": 0.2, "random_start": False, "adversarial_share": 1.0,
    "lr": 0.001, "schedule": "constant", "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128,
    "padding": 5, "rotation": 10, "flip": True,
}  # fmt: skip
"""Steps 1 and 2 as the released code sets them; it doesn't clip adversarial examples to [0, 1], we do."""

erasers.add(
    "aft",
    Method(
        "aft",
        "clean",
        AFTConfig,
        aft,
        presets={
            "released": {**RELEASED, "stand_ins": "pgd", "belief": 0, "epochs": 3, "clean_epochs": 17},
            "gentle": {"in_proportion": True, "adversarial_share": 0.4, "steps": 300},
        },
    ),
)
