"""Stand-ins that many images share, as they share a trigger, and the part in which a found one is seen through."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unplant.classifier import device_of
from unplant.devices import autocast
from unplant.errors import UsageError
from unplant.images import EndlessBatches, LabeledImages
from unplant.inversion import Shared, choose_targets, new_perturbations
from unplant.training import Change

if TYPE_CHECKING:
    from unplant.erasers.aft import AFTConfig

SHOWN = 0.5
"""Share of the images that carry a perturbation which is to be seen through."""

STRONGEST = 2.0
"""How strong it is shown at most, in strengths of its own."""


def perturbations(
    config: "AFTConfig", data: LabeledImages, kinds: tuple[str, ...], generator: torch.Generator
) -> dict[str, Shared]:
    """Fresh ones of these kinds, of the sizes that the config says."""
    if config.universal_eps is None or config.warp_reach is None:
        raise UsageError("shared stand-ins need a universal_eps and a warp_reach; aft settles them")
    sizes = {"area": config.patch_area, "eps": config.universal_eps, "reach": config.warp_reach}
    return new_perturbations(kinds, data.num_classes, data.shape, **sizes, generator=generator)


def shared_stand_ins(
    infected: nn.Module, data: LabeledImages, config: "AFTConfig", generator: torch.Generator
) -> tuple[Change, list[Shared]]:
    """Step 1 with perturbations that many images share, as they share a trigger: one a class of each kind.

    They are inverted from the infected model first (`warm_up`), then go on from batch to batch against the model as
    it is now. No target is named: classes that give in easily get more of them (`choose_targets`).

    Returns:
        The change of a batch, and the perturbations.
    """
    kinds = list(perturbations(config, data, config.kinds, generator).values())

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
                dose = max(config.least_dose, float(shared.rates.max())) if config.in_proportion else 1.0
                tried = improved(shared, model, pixels[start:end], labels[start:end], config.inversion_steps)
                taught = round((end - start) * dose)
                moved += [tried[:taught], pixels[start + taught : end]]
        return torch.cat([*moved, pixels[count:]]), labels

    return change, kinds


def seen_through(found: Shared, target: int, generator: torch.Generator) -> Change:
    """Half of each batch under the perturbation to that class; the labels stay.

    A purified model isn't led to the target any more, but it sees no better through a trigger that covers the image
    than one that never met it. Shown the trigger under true labels, it does: at any strength up to twice that of what
    was found, as triggers are often larger than the ball in which they are looked for.
    """

    def change(_: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        count = round(SHOWN * len(pixels))
        plain, strength = pixels[:count], torch.rand((count, 1, 1, 1), generator=generator).to(pixels)
        under = found.apply(plain, torch.full((count,), target, device=pixels.device))
        return torch.cat([(plain + STRONGEST * strength * (under - plain)).clamp(0, 1), pixels[count:]]), labels

    return change
