"""AFT: adversarial fine-tuning on clean data (Mu et al., CVPR 2023, arXiv:2202.06312, section 4.1): Steps 1 and 2.

What goes beyond the paper has a switch each: a look for the trigger in the model (`examination`), the kind of stand-in
(`stand_ins`), how many of them are taught (`in_proportion`, `least_dose`) and where they pull (`aim`), the infected
model's opinion and eye beside the labels (`belief`, `likeness`, `steadiness`), no plain part at the end (`clean_steps`)
but one that shows what was found (`second_look`, `see_through`) or, if asked for, plane waves (`waves`); docs/method.md
says why.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from unplant.detection.inverted import examination_steps, tried_first, verdict
from unplant.detection.waves import most_shown
from unplant.erasers.base import Method, erasers
from unplant.erasers.looks import SECOND, SHARED, Shown, examined, known_dose, look_again, rounded
from unplant.erasers.shared import SHOWN, any_wave, found_shift, seen_through, settle_sizes, shared_stand_ins
from unplant.erasers.steps import RELEASED, AdversarialConfig, settle_ball, stand_ins
from unplant.erasers.teacher import taught_by
from unplant.images import LabeledImages
from unplant.inversion import Shared
from unplant.journal import NOTHING, Journal
from unplant.params import Pixel, Real, Share
from unplant.results import Erasure, Progress
from unplant.training import Change, Schedule, fit, steps_of

UNDER = {"universal": "found", "wave": "a wave", None: "plane waves"}
"""What the last part shows, by the kind of what was found."""


class AFTConfig(AdversarialConfig):
    """AFT on a small clean set. Deviations from the released code are in docs/method.md."""

    lr: Real = Field(default=0.02, gt=0, description="learning rate at the start of each part")
    schedule: Schedule = Field(default="cosine", description="learning rate within each part")
    stand_ins: Literal["pgd", "patch", "universal", "warp", "mixed", "all"] = Field(
        default="mixed",
        description="pgd: one perturbation an image; patch, universal, warp: one a class, sparse, in an L∞ ball, or a "
        "smooth displacement; mixed: patch and universal; all: these and warp, evenly",
    )
    adversarial_share: Share = Field(default=0.15, description="share of each batch that carries a stand-in")
    sharpness: Real = Field(
        default=1,
        ge=0,
        le=100,
        description="sharpness-aware minimisation: its step in the weights, in shares of them; twice the cost; 0: none",
    )
    in_proportion: bool = Field(
        default=False,
        description="shared stand-ins: that share times the rate at which the best of them works on the model now",
    )
    least_dose: Share = Field(
        default=0.5, description="in proportion: share of the stand-ins that are taught however rarely they work"
    )
    examination: int = Field(
        default=60,
        ge=0,
        description="steps of each kind to look for a trigger in the infected model; being sure decides stand_ins, "
        "in_proportion, steadiness and steps where they aren't given; 0: no look, no verdict",
    )
    waves_tried: int = Field(
        default=300,
        ge=0,
        le=100_000,
        description="if that look isn't sure, so many plane waves are tried, a third as many near the best; 0: none",
    )
    second_look: Real = Field(
        default=2.5,
        ge=0,
        le=100,
        description="where nothing was found, or a shift: radius, in radii of the universal ball, within which one is "
        "looked for afterwards that the infected model obeys on nearly all images and the purified one doesn't; 0: no "
        "second look",
    )
    see_through: Real = Field(
        default=20,
        ge=0,
        description="epochs of a last part in which images carry the shift or wave under their labels; 0: none",
    )
    waves: Share = Field(
        default=0,
        description="where neither was found: share of that part's images which carry any plane wave; 0: no such part",
    )
    patch_area: Share | None = Field(
        default=None, gt=0, description="patch: largest share of the pixels under it; none: 0.02, but 16 pixels"
    )
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
    aim: Share = Field(
        default=0.5,
        description="share of the shared stand-ins that pull to the targets which the look is sure of, even if seldom "
        "by then",
    )
    belief: Share = Field(
        default=0.7, description="share of the infected model's probabilities for the plain image in each target"
    )
    likeness: Real = Field(
        default=5,
        ge=0,
        le=1000,
        description="weight of the squared distance, in shares of it, between what goes into the last linear layer and "
        "what goes into the infected model's; 0: only answers count",
    )
    steadiness: Real = Field(
        default=3, ge=0, le=1000, description="the same for images that carry something, from the plain image's"
    )
    steps: int = Field(default=150, ge=1, description="adversarial steps")
    clean_steps: int = Field(default=0, ge=0, description="plain steps afterwards")
    epochs: Real | None = Field(default=None, gt=0, description="instead of `steps`: adversarial epochs")
    clean_epochs: Real | None = Field(default=None, gt=0, description="instead of `clean_steps`: plain epochs")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of stand-in in use."""
        several = {"mixed": SHARED[:2], "all": SHARED}
        return several.get(self.stand_ins, (self.stand_ins,))

    @property
    def asks_the_infected(self) -> bool:
        """Whether the infected model is a teacher, too."""
        return self.belief > 0 or self.likeness > 0 or self.steadiness > 0

    def passes(self, steps: int, data: LabeledImages) -> float:
        """See `AdversarialConfig.passes`; a forward pass of the infected model alone counts as a third."""
        each = self.passes_a_step + (1 / 3 if self.asks_the_infected else 0.0)
        each += self.adversarial_share * (self.pgd_steps if self.stand_ins == "pgd" else self.inversion_steps)
        images = steps * self.batch_size * each
        if self.stand_ins != "pgd" and self.adversarial_share > 0:
            images += self.warm_up * self.batch_size * len(self.kinds)
        return round(images / len(data), 2)

    def passes_of_examination(
        self, data: LabeledImages, kinds: tuple[str, ...] = SHARED, models: int = 1, waves: int = 0
    ) -> float:
        """The most that a look for triggers costs, tried on so many models; a forward pass alone counts as a third."""
        steps = examination_steps(self.examination, data.num_classes)
        tried = min(tried_first(data.num_classes), len(data) - len(data) // 2) * (data.num_classes + 1) / 3
        batch = min(self.batch_size, len(data) // 2)
        under_waves = most_shown(waves, len(data) // 2) / 3 + (models * tried if waves else 0)
        return round((len(kinds) * (steps * batch + models * tried) + under_waves) / len(data), 2)


def step_one(
    infected: nn.Module,
    data: LabeledImages,
    config: AFTConfig,
    generator: torch.Generator,
    known: Sequence[int] = (),
) -> tuple[Change | None, list[Shared]]:
    """The stand-ins of one part, and the perturbations that they share; `known` are targets that a look is sure of."""
    if config.adversarial_share == 0:
        return None, []
    if config.stand_ins == "pgd":
        return stand_ins(config, generator), []
    return shared_stand_ins(infected, data, config, generator, known)


def step_two(
    purified: nn.Module,
    infected: nn.Module,
    data: LabeledImages,
    config: AFTConfig,
    change: Change | None,
    shared: list[Shared],
    *,
    steps: int,
    title: str,
    **around: Any,
) -> dict[str, Any]:
    """One part of Step 2, in place, and what the rounds say of it; `around` is what else `fit` is told."""
    lesson = change
    if config.asks_the_infected:
        lesson = taught_by(infected, change, config.belief, config.likeness, config.steadiness)
    how = {"sharpness": config.sharpness, "filter_length": config.filter_length}
    fit(purified, data, steps=steps, config=config, change=lesson, memory=shared, title=title, **how, **around)
    return {"step": title, "images": len(data), "steps": steps, "passes": config.passes(steps, data)}


def to_see_through(
    infected: nn.Module,
    data: LabeledImages,
    config: AFTConfig,
    shown: Shown | None,
    generator: torch.Generator,
) -> tuple[AFTConfig, Change, list[Shared]]:
    """The last part: what it shows under true labels, at which settings, with which stand-ins that it shares.

    A found shift is shown alone. A wave, the found one or else any, is shown beside stand-ins of all kinds, as plain
    steps bring back what was erased. At half the learning rate it costs less of the accuracy and shows as much.
    """
    config = config.but(sharpness=0, lr=config.lr / 2)
    if shown is not None and shown[0] in SECOND:
        return config.but(adversarial_share=0), seen_through(found_shift(*shown[1:], generator), SHOWN, None), []
    share, shift = config.waves, any_wave(generator)
    if shown is not None:
        share, shift = SHOWN / 2, found_shift(*shown[1:], generator)
    # The others carry as many stand-ins as a whole batch did.
    among_others = min(1.0, config.adversarial_share / (1 - share)) if share < 1 else 0.0
    config = config.but(adversarial_share=among_others)
    inner, shared = step_one(infected, data, config, generator)
    return config, seen_through(shift, share, inner), shared


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
        The purified model, and whether a trigger was found in the infected one; AFT doesn't judge images.
    """
    given = config.model_fields_set
    config = settle_sizes(settle_ball(config, infected, data), data.shape)
    last, seed = config if "stand_ins" in given else config.but(stand_ins="all"), generator.initial_seed()
    found = examined(infected, data, config, seed, progress, waves=config.waves_tried)
    first, known = None if found is None else found.only(SHARED), ()
    if first is not None and first.sure:
        known = tuple(sorted({target for _, target in first.standing_out}))
        config = config.but(**{name: value for name, value in known_dose(first).items() if name not in given})
    steps, clean_steps = config.steps, config.clean_steps
    if config.epochs is not None:
        steps = steps_of(config.epochs, data, config.batch_size)
    if config.clean_epochs is not None:
        clean_steps = steps_of(config.clean_epochs, data, config.batch_size)
    purified = copy.deepcopy(infected)
    balls = config.model_dump(include={"eps", "patch_area", "universal_eps", "warp_reach"})
    rounds: list[dict[str, Any]] = [{"step": "stand-ins", "kind": config.stand_ins, **balls}]
    if found is not None:
        passes = config.passes_of_examination(data, waves=config.waves_tried if "wave" in found.rates else 0)
        rounds.append({"step": "examined", "rates": rounded(found), "passes": passes})
    around = {"generator": generator, "progress": progress, "journal": journal}
    for title, count, share in (("adversarial", steps, config.adversarial_share), ("recovery", clean_steps, 0.0)):
        if not count:
            continue
        part = config.but(adversarial_share=share)
        change, shared = step_one(infected, data, part, generator, known)
        rounds.append(step_two(purified, infected, data, part, change, shared, steps=count, title=title, **around))
    shown = None
    if found is not None:
        found, shown, looked = look_again(infected, purified, data, config, found, seed, progress)
        rounds += looked
    if config.see_through and (shown is not None or config.waves):
        part, change, shared = to_see_through(infected, data, last, shown, generator)
        count, title = steps_of(config.see_through, data, config.batch_size), "seeing through"
        done = step_two(purified, infected, data, part, change, shared, steps=count, title=title, **around)
        rounds.append({**done, "under": UNDER[None if shown is None else shown[0]]})
    if found is None:
        return Erasure(purified, rounds=rounds)
    said, trigger = verdict(found, infected, purified, config.precision)
    return Erasure(purified, rounds=rounds, findings=said, trigger=trigger)


erasers.add(
    "aft",
    Method(
        "aft",
        "clean",
        AFTConfig,
        aft,
        presets={
            "released": {
                **RELEASED,
                "stand_ins": "pgd",
                "belief": 0,
                "likeness": 0,
                "steadiness": 0,
                "epochs": 3,
                "clean_epochs": 17,
                "examination": 0,
                "see_through": 0,
            }
        },
    ),
)
