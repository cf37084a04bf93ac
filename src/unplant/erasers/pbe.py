"""PBE: progressive backdoor erasing without clean data (Mu et al., CVPR 2023, arXiv:2202.06312, Algorithm 1).

What goes beyond the paper has a switch each: the first D_ext (`initial`), the ball (`eps`), the score and selection of
Step 3 (`score`, `shares`), the use of the suspects (`relabel`) and the ending (`final_steps`); docs/method.md says why.
The preset `released` does what the released code does, without its faults.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from unplant.erasers.base import Method, erasers
from unplant.erasers.examination import ExaminationConfig
from unplant.erasers.pbe_run import Run
from unplant.erasers.selection import SCORES, Lesson, least_suspicious, random_part
from unplant.erasers.steps import RELEASED, AdversarialConfig, settle_ball
from unplant.images import LabeledImages
from unplant.journal import NOTHING, Journal
from unplant.params import Real, Share
from unplant.results import Erasure, Progress


class PBEConfig(ExaminationConfig, AdversarialConfig):
    """Settings of PBE; those of Steps 1 and 2, and of the cross-examination, are among them."""

    padding: int | None = Field(
        default=None,
        ge=0,
        description="zero padding before a random crop, in pixels; none: an eighth of the height, 1 below 32, and in "
        "trials none at all if the infected model doesn't know such crops",
    )
    schedule: Literal["constant", "cosine", "one-cycle"] = Field(
        default="cosine", description="learning rate within a round"
    )
    filter_length: Real = Field(
        default=1.0,
        ge=0,
        le=2,
        description="squared length that long filters before a BatchNorm are taken to have; 0: their own",
    )
    initial: Literal["clusters", "random"] = Field(default="clusters", description="how the first D_ext is found")
    initial_share: Share = Field(default=0.05, gt=0, description="random: share of the data")
    least_gain: Real = Field(
        default=0.125, ge=0, description="clusters: nats an image from which a class is split in two"
    )
    other_depths: bool = Field(
        default=True, description="clusters: where nobody is convicted, try groups that are evident at other depths"
    )
    outweighs: Real = Field(
        default=3.0, ge=1, description="clusters: times the median class's images from which up to 5 groups are tried"
    )
    bared: bool = Field(
        default=True, description="clusters: ask what groups that nobody convicts show without what they have in common"
    )
    by_right: bool = Field(
        default=True, description="clusters: and groups that carry a trigger and kept their label, if it is by right"
    )
    score: Literal["drop", "cosine"] = Field(
        default="drop", description="Step 3: of the label's probability, or of the logits"
    )
    clean_below: Share = Field(default=0.3, description="Step 3: suspicion below which an image is taken as clean")
    suspect_above: Share = Field(default=0.4, description="Step 3: suspicion above which an image is a suspect")
    strict: bool = Field(
        default=True, description="Step 3: in classes that lost a group, D_ext gets only what still has its label"
    )
    sure_above: Share = Field(default=0.5, description="relabelling: probability that the new label must have")
    kinship: bool = Field(
        default=True, description="in the end, judge undecided images of classes with suspects by whom they take after"
    )
    acquit: Real | None = Field(
        default=10.0,
        ge=1,
        description="ending: odds of being clean at which undecided images join D_ext, where most classes lost a group",
    )
    shares: tuple[Share, ...] = Field(default=(), description="Step 3: fixed shares for D_ext instead of the threshold")
    retrial: bool = Field(
        default=True, description="clear classes whose suspects get their label back without being taught it"
    )
    rounds: int = Field(default=2, ge=1, le=1000, description="repetitions of Steps 1 to 3")
    steps: int | None = Field(
        default=None, ge=1, description="adversarial steps a round; none: half an epoch of the data, at least 50"
    )
    epochs: Real | None = Field(
        default=None, gt=0, description="epochs a round on D_ext: the first adversarial, the others for `steps` only"
    )
    final_steps: int | None = Field(
        default=None, ge=0, description="steps of the ending; none: three epochs, but 1,000 if twelve have as many"
    )
    final_adversarial_share: Share = Field(default=0.0, description="ending: share of each batch made adversarial")
    relabel: bool = Field(
        default=True, description="teach the suspects too, under the labels that the purified model gives them"
    )
    witnesses: Share = Field(
        default=0.1, description="relabelling: share of the suspects that is kept out, to see if they are still obeyed"
    )
    transplants: Share = Field(
        default=0.25, le=0.5, description="share of images that carry what suspects have in common, if it is a trigger"
    )


def pbe(
    infected: nn.Module,
    data: LabeledImages,
    config: PBEConfig,
    *,
    generator: torch.Generator,
    progress: Progress | None = None,
    journal: Journal = NOTHING,
) -> Erasure:
    """Erases a backdoor with nothing but the training set that may have planted it.

    Args:
        infected: θ₀, pixels in [0, 1] → logits; not modified.
        data: D, labelled images of which an unknown part is poisoned.
        config: settings.
        generator: CPU generator of all that is random.
        progress: told what is done.
        journal: where it is written down.

    Returns:
        The purified model θ, and per image how suspicious it is: the loss of its label's probability from θ₀ to θ. If
        no class holds a group that hangs on its label, or all are cleared in the end, θ is θ₀ as it was.
    """
    run = Run(infected, data, settle_ball(config, infected, data), generator, progress, journal)
    config = run.config

    # Initialisation: the first D_ext.
    if config.initial == "random":
        purified = infected
        lesson = Lesson(random_part(data, config.initial_share, generator), data.labels)
    else:
        found = run.examine()
        suspicion = run.shared(found.score)
        if not found.left_out.any():
            return run.erasure(infected, suspicion, run.nobody, run.before)
        extra, suspects = run.agreement(suspicion, found.outputs)
        purified, lesson = found.start, run.lesson(extra, found.left_out & suspects, found.outputs)

    after, suspicion, suspects = run.before, torch.zeros(len(data)), run.left_out
    for number in range(config.rounds):
        # Steps 1 and 2: fine-tuning on adversarial examples of D_ext.
        adversarial, plain = run.steps_of_round(number, lesson)
        purified = run.learn(purified, lesson, adversarial, f"round {number + 1}", config.adversarial_share)
        if plain:
            purified = run.learn(purified, lesson, plain, f"round {number + 1}, plain", 0.0)
        # Step 3: images on which θ₀ and θ agree are the next D_ext.
        after = run.outputs(purified)
        suspicion = SCORES[config.score](run.before, after, data.labels)
        if config.shares:
            extra = least_suspicious(suspicion, config.shares[min(number, len(config.shares) - 1)])
            suspects = ~extra
        else:
            suspicion = run.shared(suspicion)
            extra, suspects = run.agreement(suspicion, after)
        lesson = run.lesson(extra, suspects, after)
        run.rounds[-1] |= {"next": int(extra.sum()), "suspects": int(suspects.sum())}

    # Ending: plain images, to get accuracy back; the trigger stays in view, by a copy of it or by relabelled suspects.
    if run.final_steps:
        lesson = run.last_lesson(lesson, suspects, after)
        purified = run.learn(purified, lesson, run.final_steps, "ending", config.final_adversarial_share)
        after = run.outputs(purified)
    return run.erasure(purified, suspicion, suspects, after, lesson)


erasers.add(
    "pbe",
    Method(
        "pbe",
        "suspect",
        PBEConfig,
        pbe,
        presets={
            "released": {
                **RELEASED,
                "initial": "random",
                "initial_share": 0.05,
                "score": "cosine",
                "shares": (0.2, 0.5, 0.7),
                "rounds": 4,
                "steps": 31,
                "epochs": 10,
                "final_steps": 0,
                "relabel": False,
                "acquit": None,
                "transplants": 0,
            }
        },
    ),
)
