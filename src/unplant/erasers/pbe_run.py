"""What one run of PBE holds fast while `pbe.py` goes through Algorithm 1, and what it writes down."""

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unplant.classifier import activations, logits
from unplant.detection.clusters import Split, outweighing, split_classes
from unplant.detection.contents import by_right, hidden_contents
from unplant.detection.kinship import odds_of_poison
from unplant.detection.transplant import carriers, obedience, recovered_trigger, with_trigger
from unplant.erasers.examination import Examination, cross_examine
from unplant.erasers.selection import (
    Lesson,
    drop_score,
    next_lesson,
    shared_suspicion,
    step_three,
)
from unplant.erasers.steps import adversarial_fine_tuning, familiar_padding
from unplant.erasers.verdict import findings, retrial
from unplant.images import LabeledImages
from unplant.journal import NOTHING, Journal
from unplant.results import Erasure, Progress
from unplant.training import steps_of

if TYPE_CHECKING:
    from unplant.erasers.pbe import PBEConfig


MOST = 0.5
"""Undecided images are acquitted before the ending if more than this share of the classes lost a group."""


def ending_steps(epoch: int) -> int:
    """Steps of the ending, where an epoch has so many: three epochs; 1,000 steps, if twelve epochs have as many.

    With fewer the classes don't find their balance again: on 10,000 images one of them fell by 6 to 15 points.

    >>> [ending_steps(epoch) for epoch in (5, 23, 79, 157, 391)]
    [150, 276, 948, 1000, 1173]
    """
    return max(150, 3 * epoch, min(1000, 12 * epoch))


class Run:
    """One run of PBE.

    Attributes:
        config: settings, nothing left open.
        padding: of crops in trials, see `familiar_padding`.
        steps: adversarial steps a round.
        final_steps: steps of the ending.
        before: float (N, K), logits of θ₀.
        nobody: bool (N,), all false.
        left_out: bool (N,), groups that hang on their label.
        own_label: bool (N,), those of them that carry a trigger, but kept their label without being taught it.
        by_right: bool (N,), those of these whose label is theirs by right.
        in_doubt: bool (N,), groups of which it isn't decided whether they do.
        witnesses: bool (N,), images that are never taught under new labels.
        relabelled: bool (N,), images that were.
        acquitted: bool (N,), undecided images that joined D_ext before the ending.
        rounds: see `Erasure`.
        extra_sets: see `Erasure`.
        layers: features (N, D) of θ₀ at several depths.
    """

    def __init__(
        self,
        infected: nn.Module,
        data: LabeledImages,
        config: "PBEConfig",
        generator: torch.Generator,
        progress: Progress | None,
        journal: Journal = NOTHING,
    ) -> None:
        self.infected, self.data, self.config = infected, data, config
        self.padding = familiar_padding(config, infected, data)
        self.generator = generator
        self.around = {"generator": generator, "progress": progress, "journal": journal}
        epoch = steps_of(1, data, config.batch_size)
        self.steps = max(50, epoch // 2) if config.steps is None else config.steps
        self.final_steps = ending_steps(epoch) if config.final_steps is None else config.final_steps
        self.before = self.outputs(infected)
        self.nobody = torch.zeros(len(data), dtype=torch.bool)
        self.left_out = self.own_label = self.by_right = self.in_doubt = self.nobody
        self.witnesses = torch.rand(len(data), generator=generator) < config.witnesses
        self.relabelled = self.acquitted = self.nobody
        ball = {"eps": config.eps, "flip": config.flip, "padding": self.padding}
        self.rounds: list[dict[str, Any]] = [{"step": "ball", **ball}]
        self.extra_sets: list[Tensor] = []
        self.layers: list[Tensor] = []

    def outputs(self, model: nn.Module) -> Tensor:
        """Its logits (N, K) on D."""
        return logits(model, self.data, precision=self.config.precision)

    def learn(
        self, start: nn.Module, lesson: Lesson, steps: int, title: str, adversarial_share: float, *, trial: bool = False
    ) -> nn.Module:
        """Steps 1 and 2: fine-tuning on adversarial examples of D_ext, with their own labels."""
        chosen = self.data.relabel(lesson.labels).select(lesson.images)
        trigger = lesson.trigger.change if lesson.trigger is not None else None
        half = self.config.transplants / 2  # before augmentation, as the suspects carry it, and after it, in its place
        if lesson.trigger is not None:
            chosen = with_trigger(chosen, lesson.trigger, half, self.generator)
        padding = self.padding if trial else self.config.padding
        settings = self.config.but(adversarial_share=adversarial_share, padding=padding)
        own = lesson.labels == self.data.labels
        self.extra_sets.append(lesson.images & own)
        self.relabelled = self.relabelled | (lesson.images & ~own)
        self.rounds.append(
            {
                "step": title,
                "images": len(chosen),
                "steps": steps,
                "passes": settings.passes(steps, self.data),
                "trigger": trigger is not None,
            }
        )
        shown = {"trigger": trigger, "triggered_share": half}
        return adversarial_fine_tuning(start, chosen, settings, steps=steps, title=title, **shown, **self.around)

    def steps_of_round(self, number: int, lesson: Lesson) -> tuple[int, int]:
        """Adversarial and plain steps: with `epochs`, a round goes on plainly after its adversarial steps."""
        if self.config.epochs is None:
            return self.steps, 0
        total = steps_of(self.config.epochs, self.data.select(lesson.images), self.config.batch_size)
        adversarial = total if number == 0 else min(self.steps, total)
        return adversarial, total - adversarial

    def examine(self) -> Examination:
        """Groups in the features of θ₀, and what becomes of them when θ₀ is purified without them.

        The most evident ones; where that convicts nobody, others at other depths, until somebody is.
        """
        infected, data, config = self.infected, self.data, self.config
        self.layers = activations(infected, data, precision=config.precision)
        many = outweighing(data.labels, data.num_classes, config.outweighs)
        splits = split_classes(self.layers, data.labels, many, least_gain=config.least_gain)
        found = self.examined(splits[0], many)
        for other in splits[1:] if config.other_depths else ():
            if found.left_out.any():
                break
            again = self.examined(other, many)
            in_doubt = (found.in_doubt | again.in_doubt) & ~again.left_out
            found = replace(again if again.left_out.any() else found, in_doubt=in_doubt)
        self.left_out, self.own_label, self.in_doubt = found.left_out, found.own_label, found.in_doubt
        self.by_right = self.own_label
        if config.by_right and self.own_label.any():
            self.by_right, shares = by_right(infected, data, self.own_label, self.before, config.precision)
            self.rounds.append({"step": "kept their label", "show others": shares})
        return found

    def examined(self, split: Split, many: Tensor) -> Examination:
        """The same of these groups; `many` is what classes outweigh the others, bool (K,)."""
        infected, data, config = self.infected, self.data, self.config

        def purify(part: Tensor, why: str, times: int) -> tuple[nn.Module, Tensor]:
            lesson, steps = Lesson(part, data.labels), times * self.steps
            model = self.learn(infected, lesson, steps, why, config.adversarial_share, trial=True)
            return model, self.outputs(model)

        carrying = self.nobody, self.nobody
        if config.transplants:
            carrying = carriers(infected, data, split, self.before, config.precision)
        carried = torch.bincount(data.labels[carrying[0] | carrying[1]], minlength=data.num_classes)
        self.rounds.append({"step": "groups", **split.to_json(), "carriers": carried.tolist()})
        found = cross_examine(split, carrying, infected, self.before, data.labels, purify, many, config)
        self.rounds.append({"step": "examined", **found.to_json(data.labels)})
        return self.bared(found, split) if config.bared else found

    def bared(self, found: Examination, split: Split) -> Examination:
        """The same, and groups that kept their label in the trials, but hide what they show (`hidden_contents`)."""
        labels = self.data.labels
        lost_one, hide = (torch.zeros_like(found.longer) for _ in range(2))
        lost_one[labels[found.left_out]] = True
        hiding, shown = hidden_contents(self.infected, self.data, split, self.before, ~lost_one, self.config.precision)
        if not hiding.any():
            return found
        hide[labels[hiding]] = True
        counts = torch.bincount(labels[hiding], minlength=len(hide))
        self.rounds.append({"step": "bared", "left_out": counts.tolist()})
        return replace(
            found,
            left_out=found.left_out | hiding,
            score=torch.where(hiding, drop_score(self.before, shown, labels), found.score),
            outputs=torch.where(hiding[:, None], shown, found.outputs),
            start=self.infected,
            in_doubt=found.in_doubt & ~hide[labels],
        )

    def shared(self, score: Tensor) -> Tensor:
        """Suspicion (N,), shared within groups; a group that carries a trigger is suspect whatever it lost."""
        return shared_suspicion(score, self.data.labels, self.left_out).masked_fill(self.own_label, 1.0)

    def agreement(self, suspicion: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """D_ext and suspects, see `step_three`."""
        limits = {"clean_below": self.config.clean_below, "suspect_above": self.config.suspect_above}
        strictly = self.left_out if self.config.strict else self.nobody
        return step_three(suspicion, after, self.data.labels, strictly, **limits)

    def odds(self, suspects: Tensor, trusted: Tensor, after: Tensor) -> Tensor:
        """Log odds (N,) of poison for undecided images of classes that lost a group; NaN for all others."""
        labels = self.data.labels
        marked = torch.zeros(after.shape[1], dtype=torch.bool).index_fill_(0, labels[suspects & self.left_out], True)
        undecided = marked[labels] & ~suspects & ~trusted
        if not self.config.kinship or not undecided.any():
            return torch.full(labels.shape, torch.nan)
        return odds_of_poison(self.layers, after, labels, suspects, trusted, undecided)

    def last_lesson(self, lesson: Lesson, suspects: Tensor, after: Tensor) -> Lesson:
        """Undecided images that take after D_ext join it: the hard ones of their classes.

        Only where most classes lost a group (all-to-all). Elsewhere the one class that did pays for it with up to 11
        points, but a third of those who were acquitted in a model of SSBA were poisoned.
        """
        labels = self.data.labels
        most = len(labels[suspects & self.left_out].unique()) > MOST * len(labels.unique())
        if self.config.acquit is None or not most:
            return lesson
        odds = self.odds(suspects, lesson.images, after)
        self.acquitted = (odds < -math.log(self.config.acquit)) & ~self.left_out
        self.rounds.append(
            {"step": "acquitted", "undecided": int(odds.isfinite().sum()), "next": int(self.acquitted.sum())}
        )
        return Lesson(lesson.images | self.acquitted, lesson.labels, lesson.trigger)

    def lesson(self, extra: Tensor, suspects: Tensor, after: Tensor) -> Lesson:
        """D_ext; the suspects are in it by their trigger if that can be recovered, else under new labels."""
        data, config = self.data, self.config
        taught = ~self.witnesses & ~self.by_right if config.relabel else self.nobody
        lesson = next_lesson(extra, suspects, after, data.labels, taught=taught, sure_above=config.sure_above)
        if not config.transplants:
            return lesson
        contents = torch.where(self.by_right, data.labels, lesson.labels)
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
            kin = self.odds(suspects, lesson.images & (lesson.labels == data.labels), after) > 0
            suspicion = torch.where(kin, drop_score(self.before, after, data.labels), suspicion)
        obeyed: list[float | None] = [None, None]
        trigger = lesson.trigger if lesson is not None else None
        change, sources = (trigger.change, trigger.sources) if trigger is not None else (None, ())
        if lesson is not None and trigger is not None:
            targets, known = data.labels[suspects].unique(), lesson.images & ~self.acquitted
            obeyed = [
                obedience(model, data, known, targets, trigger, self.config.precision)
                for model in (self.infected, purified)
            ]
        flagged = suspects | kin
        in_doubt = self.in_doubt & ~flagged
        doubtful = data.labels[in_doubt].unique().tolist()
        said = findings(suspects, self.left_out, heard, after, data.labels, obeyed, kin, sources, doubtful)
        return Erasure(purified, suspicion, flagged, self.rounds, self.extra_sets, said, change, in_doubt)
