"""PBE: progressive backdoor erasing without clean data (Mu et al., CVPR 2023, arXiv:2202.06312, Algorithm 1).

What goes beyond the paper has a switch each: the first D_ext (`initial`), the ball (`eps`), the score and selection of
Step 3 (`score`, `shares`), the use of the suspects (`relabel`) and the ending (`final_steps`); docs/method.md says why.
The preset `released` does what the released code does, without its faults.
"""

import copy
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unplant.classifier import activations, logits
from unplant.detection.clusters import split_classes
from unplant.detection.transplant import poisoned_side
from unplant.erasers.aft import RELEASED, AdversarialConfig, adversarial_fine_tuning, settle_ball
from unplant.erasers.base import Method, erasers
from unplant.erasers.selection import (
    SCORES,
    Lesson,
    cross_examine,
    findings,
    least_suspicious,
    next_lesson,
    obedience,
    random_part,
    recovered_trigger,
    retrial,
    shared_suspicion,
    step_three,
    with_trigger,
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
    fallen: Share = Field(
        default=0.5, description="clusters: share of its label's probability that a group must lose to stay out"
    )
    score: Literal["drop", "cosine"] = Field(
        default="drop", description="Step 3: of the label's probability, or of the logits"
    )
    clean_below: Share = Field(default=0.3, description="Step 3: suspicion below which an image is taken as clean")
    suspect_above: Share = Field(default=0.4, description="Step 3: suspicion above which an image is a suspect")
    sure_above: Share = Field(default=0.5, description="relabelling: probability that the new label must have")
    shares: tuple[Share, ...] = Field(default=(), description="Step 3: fixed shares for D_ext instead of the threshold")
    rounds: int = Field(default=2, ge=1, le=1000, description="repetitions of Steps 1 to 3")
    steps: int | None = Field(
        default=None, ge=1, description="adversarial steps a round; none: half an epoch of the data, at least 50"
    )
    epochs: Real | None = Field(
        default=None, gt=0, description="epochs a round on D_ext: the first adversarial, the others for `steps` only"
    )
    final_steps: int | None = Field(
        default=None, ge=0, description="steps of the ending; none: three epochs of the data, at least 150"
    )
    final_adversarial_share: Share = Field(default=0.0, description="ending: share of each batch made adversarial")
    relabel: bool = Field(
        default=True, description="teach the suspects too, under the labels that the purified model gives them"
    )
    witnesses: Share = Field(
        default=0.1, description="relabelling: share of the suspects that is kept out, to see if they are still obeyed"
    )
    transplants: Share = Field(
        default=0.25, lt=1, description="share of images that carry what suspects have in common, if it is a trigger"
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
        The purified model θ, and per image how suspicious it is: the loss of its label's probability from θ₀ to θ. If
        no class holds a group that hangs on its label, θ is θ₀ as it was.
    """
    config = settle_ball(config, infected, data)
    epoch = steps_of(1, data, config.batch_size)
    steps = max(50, epoch // 2) if config.steps is None else config.steps
    final_steps = max(150, 3 * epoch) if config.final_steps is None else config.final_steps
    outputs = partial(logits, data=data, precision=config.precision)
    before = outputs(infected)
    rounds: list[dict[str, Any]] = [{"step": "ball", "eps": config.eps, "flip": config.flip}]
    extra_sets: list[Tensor] = []
    nobody = torch.zeros(len(data), dtype=torch.bool)
    relabelled = nobody.clone()

    def learn(start: nn.Module, lesson: Lesson, steps: int, title: str, adversarial_share: float) -> nn.Module:
        """Steps 1 and 2: fine-tuning on adversarial examples of D_ext, with their own labels."""
        chosen = data.relabel(lesson.labels).select(lesson.images)
        if lesson.trigger is not None:
            chosen = with_trigger(chosen, lesson.trigger, config.transplants, generator)
        settings = config.but(adversarial_share=adversarial_share)
        passes = settings.passes(steps, data)
        rounds.append({"step": title, "images": len(chosen), "steps": steps, "passes": passes})
        extra_sets.append(lesson.images & (lesson.labels == data.labels))
        relabelled.logical_or_(lesson.images & (lesson.labels != data.labels))
        return adversarial_fine_tuning(
            start, chosen, settings, steps=steps, generator=generator, progress=progress, title=title
        )

    def purify(part: Tensor, why: str) -> tuple[nn.Module, Tensor]:
        model = learn(infected, Lesson(part, data.labels), steps, why, config.adversarial_share)
        return model, outputs(model)

    def teach(extra: Tensor, suspects: Tensor, after: Tensor) -> Lesson:
        """The next lesson; the suspects are in it by their trigger if that can be recovered, else by new labels."""
        lesson = next_lesson(
            extra, suspects, after, data.labels, taught=taught & ~own_label, sure_above=config.sure_above
        )
        if not config.transplants:
            return lesson
        contents = torch.where(own_label, data.labels, lesson.labels)
        trigger = recovered_trigger(infected, data, suspects, extra, contents, config.precision)
        return lesson if trigger is None else Lesson(extra & ~suspects, data.labels, trigger)

    judge = partial(step_three, clean_below=config.clean_below, suspect_above=config.suspect_above)

    # Initialisation: the first D_ext.
    witnesses = torch.rand(len(data), generator=generator) < config.witnesses
    taught = ~witnesses if config.relabel else nobody
    if config.initial == "random":
        purified, left_out, own_label = infected, nobody, nobody
        lesson = Lesson(random_part(data, config.initial_share, generator), data.labels)
    else:
        layers = activations(infected, data, precision=config.precision)
        split = split_classes(layers, data.labels, data.num_classes, least_gain=config.least_gain)
        side = poisoned_side(infected, data, split, config.precision)
        rounds.append({"step": "groups", **split.to_json(), "side": side.tolist()})
        found = cross_examine(
            split, side if config.transplants else side * 0, infected, before, data.labels, purify,
            balanced=config.balanced, fallen=config.fallen,
        )  # fmt: skip
        rounds.append({"step": "examined", **found.to_json(data.labels)})
        purified, left_out, own_label = found.start, found.left_out, found.own_label
        suspicion = shared_suspicion(found.score, data.labels, left_out).masked_fill(own_label, 1.0)
        if not left_out.any():  # nothing found: a clean model stays as it was
            said = findings(nobody, nobody, nobody, before, data.labels, (None, None))
            return Erasure(copy.deepcopy(infected), suspicion, nobody, rounds, extra_sets, said)
        extra, suspects = judge(suspicion, found.outputs, data.labels, left_out)
        lesson = teach(extra, left_out & suspects, found.outputs)

    after, suspicion, extra, suspects = before, torch.zeros(len(data)), lesson.images, left_out
    for number in range(config.rounds):
        adversarial, plain = steps, 0
        if config.epochs is not None:
            total = steps_of(config.epochs, data.select(lesson.images), config.batch_size)
            adversarial = total if number == 0 else min(steps, total)
            plain = total - adversarial
        # Steps 1 and 2.
        purified = learn(purified, lesson, adversarial, f"round {number + 1}", config.adversarial_share)
        if plain:
            purified = learn(purified, lesson, plain, f"round {number + 1}, plain", 0.0)
        # Step 3: images on which θ₀ and θ agree are the next D_ext.
        after = outputs(purified)
        suspicion = SCORES[config.score](before, after, data.labels)
        if config.shares:
            extra = least_suspicious(suspicion, config.shares[min(number, len(config.shares) - 1)])
            suspects = ~extra
        else:
            suspicion = shared_suspicion(suspicion, data.labels, left_out).masked_fill(own_label, 1.0)
            extra, suspects = judge(suspicion, after, data.labels, left_out)
        lesson = teach(extra, suspects, after)
        rounds[-1] |= {"next": int(extra.sum()), "suspects": int(suspects.sum()), "trigger": lesson.trigger is not None}

    # Ending: plain images, to get accuracy back; the suspects keep the trigger in view.
    if final_steps:
        purified = learn(purified, lesson, final_steps, "ending", config.final_adversarial_share)
        after = outputs(purified)
    said = None
    if config.initial == "clusters":
        heard, obeyed = (witnesses if relabelled.any() else ~nobody) & ~own_label, (None, None)
        suspects = retrial(suspects, heard, after, data.labels)
        if lesson.trigger is not None:
            targets = data.labels[suspects].unique()
            obeyed = tuple(
                obedience(model, data, extra, targets, lesson.trigger, config.precision)
                for model in (infected, purified)
            )
        said = findings(suspects, left_out, heard, after, data.labels, obeyed)
    return Erasure(purified, suspicion, suspects, rounds, extra_sets, said)


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
                "transplants": 0,
            }
        },
    ),
)
