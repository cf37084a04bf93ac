"""Stand-ins that many images share, as they share a trigger, and shifts that are to be seen through."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unplant.classifier import device_of
from unplant.detection.waves import drawn_at_random, plane_waves
from unplant.devices import autocast
from unplant.errors import UsageError
from unplant.images import EndlessBatches, LabeledImages
from unplant.inversion import USUAL_AREA, Shared, choose_targets, new_perturbations
from unplant.training import Change

if TYPE_CHECKING:
    from unplant.erasers.aft import AFTConfig

SHOWN = 0.5
"""Share of the images that carry a shift which was found."""

STRONGEST = 2.0
"""How strong a found one is shown at most, in strengths of its own."""

HIGHEST = 48 / 255
"""Height of the highest plane wave, in pixel units."""


LEAST_UNIVERSAL = 8 / 255
"""The smallest radius of the universal ball, in pixel units."""

LEAST_PATCH = 16
"""The fewest pixels under a patch: on small images, too, a square of 4×4 must fit."""

LEAST_REACH = 0.5
"""The least that warps may move a pixel, in pixels."""


def settle_sizes(config: "AFTConfig", shape: tuple[int, int, int]) -> "AFTConfig":
    """With sizes of shared stand-ins that suit images (C, H, W) where none are given."""
    _, height, width = shape
    sizes = {
        "patch_area": min(1.0, max(USUAL_AREA, LEAST_PATCH / (height * width))),
        "universal_eps": max(config.eps or 0.0, LEAST_UNIVERSAL),
        "warp_reach": max(min(height, width) / 32, LEAST_REACH),
    }
    return config.but(**{name: size for name, size in sizes.items() if getattr(config, name) is None})


def perturbations(
    config: "AFTConfig", data: LabeledImages, kinds: tuple[str, ...], generator: torch.Generator
) -> dict[str, Shared]:
    """Fresh ones of these kinds, of the sizes that the config says."""
    if config.patch_area is None or config.universal_eps is None or config.warp_reach is None:
        raise UsageError("shared stand-ins need a patch_area, a universal_eps and a warp_reach; aft settles them")
    sizes = {"area": config.patch_area, "eps": config.universal_eps, "reach": config.warp_reach}
    return new_perturbations(kinds, data.num_classes, data.shape, **sizes, generator=generator)


def shared_stand_ins(
    infected: nn.Module,
    data: LabeledImages,
    config: "AFTConfig",
    generator: torch.Generator,
    known: Sequence[int] = (),
) -> tuple[Change, list[Shared]]:
    """Step 1 with perturbations that many images share, as they share a trigger: one a class of each kind.

    They are inverted from the infected model first (`warm_up`), then go on from batch to batch against the model as
    it is now. Classes that give in easily get more of them (`choose_targets`), and those that are known to be targets.

    Returns:
        The change of a batch, and the perturbations.
    """
    kinds = list(perturbations(config, data, config.kinds, generator).values())

    def improved(shared: Shared, model: nn.Module, pixels: Tensor, labels: Tensor, steps: int) -> Tensor:
        targets = choose_targets(shared.rates, labels, config.focus, generator, known, config.aim)
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
                dose = max(config.least_dose, float(shared.rates.max())) if config.in_proportion else 1.0
                tried = improved(shared, model, pixels[start:end], labels[start:end], config.inversion_steps)
                taught = round((end - start) * dose)
                moved += [tried[:taught], pixels[start + taught : end]]
        return torch.cat([*moved, pixels[count:]]), labels

    return change, kinds


def seen_through(shift: Callable[[Tensor], Tensor], share: float, inner: Change | None) -> Change:
    """The first images of each batch, that share, under shifts, the others as `inner` changes them; the labels stay.

    A purified model isn't led to the target any more, but it sees no better through a trigger that covers the image
    than one that never met it, and what no stand-in imitates is still there. Shown shifts under true labels, it learns
    that they say nothing.
    """

    def change(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        count = round(share * len(pixels))
        under, others = (pixels[:count] + shift(pixels[:count])).clamp(0, 1), pixels[count:]
        if inner is not None and len(others):
            others, _ = inner(model, others, labels[count:])
        return torch.cat([under, others]), labels

    return change


def found_shift(found: Shared, target: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """The perturbation to that class, at up to twice its strength: triggers are often larger than a look's ball."""

    def shift(pixels: Tensor) -> Tensor:
        strength = STRONGEST * torch.rand((len(pixels), 1, 1, 1), generator=generator).to(pixels)
        return strength * (found.apply(pixels, torch.full((len(pixels),), target, device=pixels.device)) - pixels)

    return shift


def any_wave(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A wave an image, of any direction, length, phase and height: Fourier-basis augmentation.

    Shown at random they are seen through (Vaish et al., CVPR 2024, arXiv:2403.01944).
    """

    def shift(pixels: Tensor) -> Tensor:
        count, channels, height, width = pixels.shape
        draw = drawn_at_random(count, channels, generator).to(pixels)
        return HIGHEST * plane_waves(draw, (channels, height, width))

    return shift
