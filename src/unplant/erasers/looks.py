"""AFT's looks for a trigger in the model: before it is purified, and afterwards at what it has lost."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unplant.detection.inverted import Inverted, invert
from unplant.erasers.shared import LEAST_UNIVERSAL, perturbations
from unplant.errors import UsageError
from unplant.images import LabeledImages
from unplant.inversion import Shared
from unplant.results import Progress

if TYPE_CHECKING:
    from unplant.erasers.aft import AFTConfig

Shown = tuple[str, Shared, int]
"""A kind, its perturbations, and the class whose perturbation is shown."""

SHARED = ("patch", "universal", "warp")
"""The kinds of stand-in that many images share."""

SECOND = ("universal",)
"""The kinds that the second look tries."""


def examined(
    infected: nn.Module,
    data: LabeledImages,
    config: "AFTConfig",
    seed: int,
    progress: Progress | None,
    kinds: tuple[str, ...] = SHARED,
    title: str = "looking for a trigger",
    waves: int = 0,
) -> Inverted | None:
    """Looks for the trigger in the infected model, with random numbers of its own; None if that isn't asked for."""
    if not config.examination:
        return None
    generator = torch.Generator().manual_seed(seed)
    return invert(
        infected,
        data,
        perturbations(config, data, kinds, generator),
        steps=config.examination,
        step_size=config.inversion_step_size,
        batch_size=config.batch_size,
        precision=config.precision,
        generator=generator,
        waves=waves,
        progress=progress,
        title=title,
    )


def look_again(
    infected: nn.Module,
    purified: nn.Module,
    data: LabeledImages,
    config: "AFTConfig",
    found: Inverted,
    seed: int,
    progress: Progress | None,
) -> tuple[Inverted, Shown | None, list[dict[str, Any]]]:
    """What the verdict goes by, what is to be seen through, and what the rounds say of the second look.

    That look is taken where the first one's gradients found nothing, or a shift that is to be seen through.
    """
    first, rounds = found.only(SHARED), []
    shifts = [target for kind, target in first.standing_out if kind in SECOND]
    if config.second_look and (not first.standing_out or (config.see_through and shifts)):
        again, lost = second_look(infected, purified, data, config, seed, progress)
        passes = config.passes_of_examination(data, SECOND, models=2)
        rounds.append({"step": "second look", "rates": rounded(again), "lost": rounded(lost), "passes": passes})
        if lost.certain and not first.standing_out:
            found, shifts = found if found.standing_out else lost, [lost.standing_out[0][1]]
        if shifts:
            return found, (SECOND[0], again.kinds[SECOND[0]], shifts[0]), rounds
    waves = [] if first.standing_out else [target for kind, target in found.standing_out if kind == "wave"]
    return found, ("wave", found.kinds["wave"], waves[0]) if waves else None, rounds


def second_look(
    infected: nn.Module,
    purified: nn.Module,
    data: LabeledImages,
    config: "AFTConfig",
    seed: int,
    progress: Progress | None,
) -> tuple[Inverted, Inverted]:
    """Shifts in a larger ball: how they work on the infected model, and what the purified one has lost of it."""
    radius = config.second_look * (config.universal_eps or LEAST_UNIVERSAL)
    wider = config.but(universal_eps=min(1.0, radius))
    again = examined(infected, data, wider, seed, progress, SECOND, "looking once more")
    if again is None:
        raise UsageError("a second look needs a first one")
    return again, again.lost(purified, config.precision)


def known_dose(found: Inverted) -> dict[str, Any]:
    """Settings for models in which a trigger was found.

    Stand-ins that imitate it are at hand, so little more is taught than works: but half, as what imitates a trigger at
    first may cease to before the trigger is erased. What is taught weighs more. Warps join where one stood out.
    """
    warps = any(kind == "warp" for kind, _ in found.standing_out)
    return {"stand_ins": "all" if warps else "mixed", "in_proportion": True, "steadiness": 8.0, "steps": 300}


def rounded(found: Inverted) -> dict[str, list[float]]:
    """The rates of each kind as plain numbers."""
    return {kind: [round(rate, 3) for rate in rates.tolist()] for kind, rates in found.rates.items()}
