"""PBE: progressive backdoor erasing without clean data (Mu et al., CVPR 2023, arXiv:2202.06312, Algorithm 1).

What goes beyond the paper has a switch each: the first D_ext (`initial`), the ball (`eps`), the score and selection of
Step 3 (`score`, `shares`), the use of the suspects (`relabel`) and the ending (`final_steps`); docs/method.md says why.
The preset `released` does what the released code does, without its faults.
"""

import copy
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unplant.classifier import activations, logits
from unplant.detection.clusters import outweighing, split_classes
from unplant.detection.kinship import kin_of_suspects
from unplant.detection.transplant import carriers, obedience, recovered_trigger, with_trigger
from unplant.erasers.base import Method, erasers
from unplant.erasers.examination import Examination, cross_examine, findings, retrial
from unplant.erasers.selection import (
    SCORES,
    Lesson,
    drop_score,
    least_suspicious,
    next_lesson,
    random_part,
    shared_suspicion,
    step_three,
)
from unplant.erasers.steps import RELEASED, AdversarialConfig, adversarial_fine_tuning, settle_ball
from unplant.images import LabeledImages
from unplant.journal import NOTHING, Journal
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
    balanced: Share = Field(
        default=0.25, description="clusters: share outside of the largest group from which each is tried"
    )
    outweighs: Real = Field(
        default=3.0, ge=1, description="clusters: times the median class's images from which up to 5 groups are tried"
    )
    fallen: Share = Field(
        default=0.5, description="clusters: share of its label's probability that a group must lose to stay out"
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
        run.left_out, run.own_label = found.left_out, found.own_label
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
        purified = run.learn(purified, lesson, run.final_steps, "ending", config.final_adversarial_share)
        after = run.outputs(purified)
    return run.erasure(purified, suspicion, suspects, after, lesson)


class Run:
    """What one run of PBE holds fast, and what it writes down.

    Attributes:
        config: settings, nothing left open.
        steps: adversarial steps a round.
        final_steps: steps of the ending.
        before: float (N, K), logits of θ₀.
        nobody: bool (N,), all false.
        left_out: bool (N,), groups that hang on their label.
        own_label: bool (N,), those of them whose label is theirs by right.
        witnesses: bool (N,), images that are never taught under new labels.
        relabelled: bool (N,), images that were.
        rounds: see `Erasure`.
        extra_sets: see `Erasure`.
        layers: features (N, D) of θ₀ at several depths.
    """

    def __init__(
        self,
        infected: nn.Module,
        data: LabeledImages,
        config: PBEConfig,
        generator: torch.Generator,
        progress: Progress | None,
        journal: Journal = NOTHING,
    ) -> None:
        self.infected, self.data, self.config = infected, data, config
        self.generator = generator
        self.around = {"generator": generator, "progress": progress, "journal": journal}
        epoch = steps_of(1, data, config.batch_size)
        self.steps = max(50, epoch // 2) if config.steps is None else config.steps
        self.final_steps = max(150, 3 * epoch) if config.final_steps is None else config.final_steps
        self.before = self.outputs(infected)
        self.nobody = torch.zeros(len(data), dtype=torch.bool)
        self.left_out = self.own_label = self.nobody
        self.witnesses = torch.rand(len(data), generator=generator) < config.witnesses
        self.relabelled = self.nobody
        self.rounds: list[dict[str, Any]] = [{"step": "ball", "eps": config.eps, "flip": config.flip}]
        self.extra_sets: list[Tensor] = []
        self.layers: list[Tensor] = []

    def outputs(self, model: nn.Module) -> Tensor:
        """Its logits (N, K) on D."""
        return logits(model, self.data, precision=self.config.precision)

    def learn(self, start: nn.Module, lesson: Lesson, steps: int, title: str, adversarial_share: float) -> nn.Module:
        """Steps 1 and 2: fine-tuning on adversarial examples of D_ext, with their own labels."""
        chosen = self.data.relabel(lesson.labels).select(lesson.images)
        if lesson.trigger is not None:
            chosen = with_trigger(chosen, lesson.trigger, self.config.transplants, self.generator)
        settings = self.config.but(adversarial_share=adversarial_share)
        own = lesson.labels == self.data.labels
        self.extra_sets.append(lesson.images & own)
        self.relabelled = self.relabelled | (lesson.images & ~own)
        self.rounds.append(
            {
                "step": title,
                "images": len(chosen),
                "steps": steps,
                "passes": settings.passes(steps, self.data),
                "trigger": lesson.trigger is not None,
            }
        )
        return adversarial_fine_tuning(start, chosen, settings, steps=steps, title=title, **self.around)

    def steps_of_round(self, number: int, lesson: Lesson) -> tuple[int, int]:
        """Adversarial and plain steps: with `epochs`, a round goes on plainly after its adversarial steps."""
        if self.config.epochs is None:
            return self.steps, 0
        total = steps_of(self.config.epochs, self.data.select(lesson.images), self.config.batch_size)
        adversarial = total if number == 0 else min(self.steps, total)
        return adversarial, total - adversarial

    def examine(self) -> Examination:
        """Groups in the features of θ₀, and what becomes of them when θ₀ is purified without them."""
        infected, data, config = self.infected, self.data, self.config

        def purify(part: Tensor, why: str) -> tuple[nn.Module, Tensor]:
            model = self.learn(infected, Lesson(part, data.labels), self.steps, why, config.adversarial_share)
            return model, self.outputs(model)

        self.layers = activations(infected, data, precision=config.precision)
        many = outweighing(data.labels, data.num_classes, config.outweighs)
        split = split_classes(self.layers, data.labels, many, least_gain=config.least_gain)
        carrying = carriers(infected, data, split, config.precision) if config.transplants else self.nobody
        carried = torch.bincount(data.labels[carrying], minlength=data.num_classes)
        self.rounds.append({"step": "groups", **split.to_json(), "carriers": carried.tolist()})
        found = cross_examine(
            split,
            carrying,
            infected,
            self.before,
            data.labels,
            purify,
            balanced=config.balanced,
            many=many,
            fallen=config.fallen,
        )
        self.rounds.append({"step": "examined", **found.to_json(data.labels)})
        return found

    def shared(self, score: Tensor) -> Tensor:
        """Suspicion (N,), shared within groups; a group that carries a trigger is suspect whatever it lost."""
        return shared_suspicion(score, self.data.labels, self.left_out).masked_fill(self.own_label, 1.0)

    def agreement(self, suspicion: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """D_ext and suspects, see `step_three`."""
        limits = {"clean_below": self.config.clean_below, "suspect_above": self.config.suspect_above}
        strictly = self.left_out if self.config.strict else self.nobody
        return step_three(suspicion, after, self.data.labels, strictly, **limits)

    def kin(self, suspects: Tensor, trusted: Tensor, after: Tensor) -> Tensor:
        """Undecided images of classes that lost a group which take after their suspects, bool (N,)."""
        labels = self.data.labels
        marked = torch.zeros(after.shape[1], dtype=torch.bool).index_fill_(0, labels[suspects & self.left_out], True)
        undecided = marked[labels] & ~suspects & ~trusted
        if not self.config.kinship or not undecided.any():
            return self.nobody
        return kin_of_suspects(self.layers, after, labels, suspects, trusted, undecided)

    def lesson(self, extra: Tensor, suspects: Tensor, after: Tensor) -> Lesson:
        """D_ext; the suspects are in it by their trigger if that can be recovered, else under new labels."""
        data, config = self.data, self.config
        taught = ~self.witnesses & ~self.own_label if config.relabel else self.nobody
        lesson = next_lesson(extra, suspects, after, data.labels, taught=taught, sure_above=config.sure_above)
        if not config.transplants:
            return lesson
        contents = torch.where(self.own_label, data.labels, lesson.labels)
        trigger = recovered_trigger(self.infected, data, suspects, extra, contents, config.precision)
        return lesson if trigger is None else Lesson(extra & ~suspects, data.labels, trigger)

    def erasure(
        self, purified: nn.Module, suspicion: Tensor, suspects: Tensor, after: Tensor, lesson: Lesson | None = None
    ) -> Erasure:
        """The result; the suspects have their retrial, and the witnesses are heard."""
        if self.config.initial == "random":
            return Erasure(purified, suspicion, suspects, self.rounds, self.extra_sets)
        data, heard = self.data, ~self.own_label
        if self.relabelled.any():
            heard = heard & self.witnesses
        if self.config.retrial:
            suspects = retrial(suspects, heard, after, data.labels)
        if not (suspects & self.left_out).any():  # nothing found, or all cleared: a clean model stays as it was
            purified, suspects, after, lesson = copy.deepcopy(self.infected), self.nobody, self.before, None
        kin = self.nobody
        if lesson is not None:
            kin = self.kin(suspects, lesson.images & (lesson.labels == data.labels), after)
            suspicion = torch.where(kin, drop_score(self.before, after, data.labels), suspicion)
        obeyed: list[float | None] = [None, None]
        trigger = lesson.trigger if lesson is not None else None
        if lesson is not None and trigger is not None:
            targets = data.labels[suspects].unique()
            obeyed = [
                obedience(model, data, lesson.images, targets, trigger, self.config.precision)
                for model in (self.infected, purified)
            ]
        said = findings(suspects, self.left_out, heard, after, data.labels, obeyed, kin)
        return Erasure(purified, suspicion, suspects | kin, self.rounds, self.extra_sets, said, trigger)


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
