"""PBE: progressive backdoor erasing without clean data (Mu et al., CVPR 2023, arXiv:2202.06312, Algorithm 1).

Three choices go beyond the paper, each with a switch: the first D_ext (`initial`), the score of Step 3 (`score`) and
the ending (`relabel`); docs/method.md says why. The preset `released` does what the released code does, without its
faults.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unplant.classifier import logits
from unplant.erasers.aft import RELEASED, AdversarialConfig, adversarial_fine_tuning
from unplant.erasers.base import Method, erasers, settle
from unplant.erasers.selection import (
    SCORES,
    cross_examine,
    least_suspicious,
    random_part,
    second_opinion,
    surely_clean,
)
from unplant.images import LabeledImages
from unplant.params import Real, Share
from unplant.results import Erasure, Progress
from unplant.training import steps_of


class PBEConfig(AdversarialConfig):
    """Settings of PBE; those of Steps 1 and 2 are among them."""

    schedule: Literal["constant", "cosine", "one-cycle"] = Field(
        default="cosine", description="learning rate within a round"
    )
    initial: Literal["clusters", "random"] = Field(default="clusters", description="how the first D_ext is found")
    initial_share: Share = Field(default=0.05, gt=0, description="random: share of the data")
    least_gain: Real = Field(
        default=0.125, ge=0, description="clusters: nats an image from which a class is split in two"
    )
    balanced: Share = Field(default=0.25, description="clusters: share of the smaller group from which both are tried")
    score: Literal["drop", "cosine"] = Field(
        default="drop", description="Step 3: of the label's probability, or of the logits"
    )
    clean_below: Share = Field(
        default=0.5, description="Step 3: loss of probability up to which an image is taken as clean"
    )
    suspect_above: Share = Field(
        default=0.8, description="Step 3: loss of probability from which an image is a suspect"
    )
    sure_above: Share = Field(
        default=0.5, description="probability that the purified model must give to a label it vouches for"
    )
    shares: tuple[Share, ...] = Field(default=(), description="Step 3: fixed shares for D_ext instead of the threshold")
    rounds: int = Field(default=2, ge=1, le=1000, description="repetitions of Steps 1 to 3")
    steps: int = Field(default=50, ge=1, description="adversarial steps a round")
    epochs: Real | None = Field(
        default=None, gt=0, description="epochs a round: the first adversarial, the others `steps` only"
    )
    final_steps: int = Field(default=150, ge=0, description="steps of the ending, on D_ext and the relabelled suspects")
    relabel: bool = Field(
        default=True, description="ending: suspects under the labels that the purified model gives them"
    )


def pbe(
    infected: nn.Module,
    data: LabeledImages,
    config: PBEConfig,
    *,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Erasure:
    """Erases a backdoor with nothing but the training set that may have planted it.

    Args:
        infected: θ₀, pixels in [0, 1] → logits; not modified.
        data: D, labelled images of which an unknown part is poisoned.
        config: settings.
        generator: CPU generator of all that is random.
        progress: told what is done.

    Returns:
        The purified model θ, and per image how suspicious it is: the loss of its label's probability from θ₀ to θ.
    """
    config = settle(config, infected, data)
    before = logits(infected, data)
    rounds: list[dict[str, Any]] = []
    extra_sets: list[Tensor] = []

    def learn(
        start: nn.Module,
        extra: Tensor,
        steps: int,
        title: str,
        settings: PBEConfig = config,
        labels: Tensor = data.labels,
    ) -> nn.Module:
        chosen = data.relabel(labels).select(extra)
        passes = steps * settings.batch_size * (1 + settings.adversarial_share * settings.pgd_steps) / len(data)
        rounds.append({"step": title, "images": len(chosen), "steps": steps, "passes": round(passes, 2)})
        extra_sets.append(extra & (labels == data.labels))
        return adversarial_fine_tuning(
            start, chosen, settings, steps=steps, generator=generator, progress=progress, title=title
        )

    # Initialisation: the first D_ext.
    if config.initial == "random":
        extra = random_part(data, config.initial_share, generator)
    else:
        examined = cross_examine(
            infected, data, lambda part, title: learn(infected, part, config.steps, title),
            least_gain=config.least_gain, balanced=config.balanced,
            clean_below=config.clean_below, sure_above=config.sure_above,
        )  # fmt: skip
        extra = examined.extra_set
        rounds[-1] |= {
            "gain": [round(v, 3) for v in examined.split.gain.tolist()],
            "minor_share": [round(v, 3) for v in examined.split.minor_share.tolist()],
        }

    purified = infected
    for number in range(config.rounds):
        # Steps 1 and 2: adversarial examples of D_ext, and fine-tuning on them with their own labels.
        plain = 0
        adversarial = config.steps
        if config.epochs is not None:
            total = steps_of(config.epochs, data.select(extra), config.batch_size)
            adversarial = total if number == 0 else min(config.steps, total)
            plain = total - adversarial
        purified = learn(purified, extra, adversarial, f"round {number + 1}")
        if plain:
            purified = learn(purified, extra, plain, f"round {number + 1}, plain", config.but(adversarial_share=0))

        # Step 3: images on which θ₀ and θ agree are the next D_ext.
        after = logits(purified, data)
        suspicion = SCORES[config.score](before, after, data.labels)
        if config.shares:
            extra = least_suspicious(suspicion, config.shares[min(number, len(config.shares) - 1)])
            suspects = ~extra
        else:
            extra = surely_clean(suspicion, after, data.labels, config.clean_below, config.sure_above)
            suspects = suspicion > config.suspect_above
        rounds[-1] |= {"next": int(extra.sum()), "suspects": int(suspects.sum())}

    # Ending: the suspects teach what they show, instead of what they were labelled.
    if config.final_steps:
        labels = data.labels
        if config.relabel:
            opinion, sure = second_opinion(after, data.labels, config.sure_above)
            labels = torch.where(suspects, opinion, data.labels)
            extra = extra | (suspects & sure)
        purified = learn(purified, extra, config.final_steps, "ending", labels=labels)
    return Erasure(purified, suspicion, suspects, rounds, extra_sets)


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
            }
        },
    ),
)
