"""Whom PBE trusts: the first D_ext, the score of Step 3 and the next D_ext. No trigger, no target, no clean data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unplant import metrics
from unplant.detection.clusters import Split
from unplant.detection.transplant import OBEYED, Transplant, answers, transplant
from unplant.devices import Precision
from unplant.images import LabeledImages, to_pixels, to_stored
from unplant.results import Findings

Purify = Callable[[Tensor, str], tuple[nn.Module, Tensor]]
"""Steps 1 and 2 on the images of a mask (N,), the text says what for: the purified model and its logits (N, K)."""

FLOOR = 0.05
"""The smallest D_ext, as a share of the data: the size of the first one in the released code."""


def random_part(data: LabeledImages, share: float, generator: torch.Generator) -> Tensor:
    """The paper's initialisation: bool (N,), a random part of the data."""
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[torch.randperm(len(data), generator=generator)[: max(2, round(share * len(data)))]] = True
    return chosen


def cosine_score(infected: Tensor, purified: Tensor, labels: Tensor) -> Tensor:
    """1 − cosine of the two models' logits (N, K): (N,), the score of the released code."""
    return 1 - F.cosine_similarity(infected, purified, dim=1)


def drop_score(infected: Tensor, purified: Tensor, labels: Tensor) -> Tensor:
    """p_infected(label) − p_purified(label): (N,), near 1 where the label came from a link that is gone."""
    before, after = (out.softmax(1).gather(1, labels[:, None]).flatten() for out in (infected, purified))
    return before - after


SCORES = {"cosine": cosine_score, "drop": drop_score}


def shared_suspicion(score: Tensor, labels: Tensor, left_out: Tensor) -> Tensor:
    """Half an image's own score, half the mean score of its group, both above the mean of its class's trusted group.

    A hard clean image can lose its label by itself; a poisoned one loses it together with all that share its trigger;
    and a class that suffers as a whole under the fine-tuning is not poisoned for that.

    Args:
        score: float (N,).
        labels: int64 (N,).
        left_out: bool (N,), the group of each class that wasn't trusted; the rest is the trusted one.
    """
    trusted = _mean_by(labels, score, ~left_out)[labels]
    distrusted = _mean_by(labels, score, left_out)[labels]
    return (score + torch.where(left_out, distrusted, trusted)) / 2 - trusted


def _mean_by(labels: Tensor, score: Tensor, members: Tensor) -> Tensor:
    """Mean score of the members of each class, (K,); 0 where a class has none."""
    size = int(labels.max()) + 1
    sums = torch.zeros(size).index_add_(0, labels[members], score[members])
    return sums / torch.bincount(labels[members], minlength=size).clamp(min=1)


def least_suspicious(suspicion: Tensor, share: float) -> Tensor:
    """Bool (N,): the share of images with the lowest suspicion, the released code's selection."""
    chosen = torch.zeros(len(suspicion), dtype=torch.bool)
    chosen[suspicion.argsort(stable=True)[: max(2, round(share * len(suspicion)))]] = True
    return chosen


def below(suspicion: Tensor, threshold: float) -> Tensor:
    """Bool (N,): images with less suspicion, never less than the least suspicious 5 %."""
    return (suspicion < threshold) | least_suspicious(suspicion, FLOOR)


def step_three(
    suspicion: Tensor, after: Tensor, labels: Tensor, left_out: Tensor, *, clean_below: float, suspect_above: float
) -> tuple[Tensor, Tensor]:
    """Step 3: the next D_ext and the suspects.

    In a class of which a group is left out, agreement is taken literally: D_ext gets images to which θ still gives
    their label, none of them from that group; and those of that group to which it doesn't are suspects.

    Args:
        suspicion: float (N,).
        after: float (N, K), logits of θ.
        labels: int64 (N,).
        left_out: bool (N,), the groups that are left out.
        clean_below: suspicion below which an image is taken as clean.
        suspect_above: suspicion above which it is a suspect.

    Returns:
        D_ext and the suspects, bool (N,) each.
    """
    agree = after.argmax(1) == labels
    marked = torch.zeros(after.shape[1], dtype=torch.bool).index_fill_(0, labels[left_out], True)[labels]
    extra = below(torch.where(left_out | (marked & ~agree), 1.0, suspicion), clean_below)
    suspects = (suspicion > suspect_above) | (left_out & ~agree)
    return extra & ~suspects, suspects


def second_opinion(purified: Tensor, labels: Tensor, sure_above: float) -> tuple[Tensor, Tensor]:
    """What the purified model would call each image if its own label were out of the question.

    Returns:
        Labels (N,), and bool (N,): whether the model gives that label more than `sure_above`.
    """
    chances, others = purified.softmax(1).scatter(1, labels[:, None], 0).max(1)
    return others, chances > sure_above


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the model is taught.

    Attributes:
        images: bool (N,).
        labels: int64 (N,).
        trigger: what the suspects have in common, for images that keep their labels; None where that is no trigger.
    """

    images: Tensor
    labels: Tensor
    trigger: Transplant | None = None


def next_lesson(
    extra: Tensor, suspects: Tensor, purified: Tensor, labels: Tensor, *, taught: Tensor, sure_above: float
) -> Lesson:
    """D_ext, and those suspects that are `taught`, under the labels of which the purified logits (N, K) are sure."""
    opinion, sure = second_opinion(purified, labels, sure_above)
    return Lesson((extra & ~suspects) | (suspects & taught & sure), torch.where(suspects, opinion, labels))


def recovered_trigger(
    infected: nn.Module, data: LabeledImages, suspects: Tensor, extra: Tensor, contents: Tensor, precision: Precision
) -> Transplant | None:
    """What the suspects have in common, if it works as a trigger: made visible, and usable with true labels.

    It counts as one if the infected model, shown it on images of D_ext, gives most of them a label that suspects have
    and that isn't theirs.

    Args:
        infected: θ₀.
        data: D.
        suspects: bool (N,).
        extra: bool (N,), D_ext.
        contents: int64 (N,), what each image is thought to show.
        precision: of the infected model's answers.
    """
    wanted = data.labels[suspects].unique()
    if not len(wanted) or not (extra & ~suspects).any():
        return None
    change = transplant(data, suspects, extra & ~suspects, contents)
    return change if obedience(infected, data, extra & ~suspects, wanted, change, precision) > OBEYED else None


def obedience(
    model: nn.Module, data: LabeledImages, extra: Tensor, wanted: Tensor, change: Transplant, precision: Precision
) -> float:
    """Share of (at most 500) images of D_ext that get another label than theirs, one of those wanted, when changed."""
    part = data.select(extra).sample(500, torch.Generator().manual_seed(0))
    if len(wanted) == 1:
        part = part.select(part.labels != wanted)
    if not len(part):
        return 0.0
    given = answers(model, part, change, precision)
    return float(((given != part.labels) & torch.isin(given, wanted)).float().mean())


def with_trigger(data: LabeledImages, trigger: Transplant, share: float, generator: torch.Generator) -> LabeledImages:
    """The images, and copies of some of them with the trigger and their own labels: a share of the whole."""
    count = round(share / (1 - share) * len(data))
    copies = data.select(torch.randperm(len(data), generator=generator)[:count])
    parts = [to_stored(trigger(to_pixels(images))) for images in copies.images.split(1024)]
    images, labels = torch.cat([data.images, *parts]), torch.cat([data.labels, copies.labels])
    return LabeledImages(images, labels, data.classes)


def retrial(suspects: Tensor, heard: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """Suspects, bool (N,), without those of classes that are cleared in the end.

    A class is cleared if the purified model gives most of the suspects that are `heard` (never taught) their label
    all the same: it has learnt from the others of the class to recognise them, and no trigger is left to do it.
    """
    agree = _mean_by(labels, (after.argmax(1) == labels).float(), suspects & heard)
    return suspects & (agree <= 0.5)[labels]


def findings(
    suspects: Tensor, left_out: Tensor, witnesses: Tensor, after: Tensor, labels: Tensor, obeyed: Sequence[float | None]
) -> Findings:
    """What the suspects say about the backdoor, and the witnesses about what is left of it.

    Args:
        suspects: bool (N,).
        left_out: bool (N,), the groups that stayed out.
        witnesses: bool (N,), images that were not trained on where they are suspects.
        after: float (N, K), the purified model's logits.
        labels: int64 (N,).
        obeyed: how far the infected and the purified model obey the recovered trigger.
    """
    counts = torch.bincount(labels[suspects & left_out], minlength=after.shape[1])
    targets = [label for label in counts.argsort(descending=True, stable=True).tolist() if counts[label]]
    obeying = (after.argmax(1) == labels)[suspects & witnesses]
    return Findings(
        infected=bool(targets),
        targets=tuple(targets),
        poisoning_rate=float(suspects.float().mean()),
        witnesses=len(obeying),
        asr_left=metrics.share(obeying.numpy()),
        asr_left_upper=metrics.upper_bound(int(obeying.sum()), len(obeying)),
        trigger_before=obeyed[0],
        trigger_after=obeyed[1],
    )


@dataclass(frozen=True, eq=False)
class Examination:
    """What the cross-examination of the clusters found.

    Attributes:
        left_out: bool (N,), images that D_ext has to do without at first.
        score: float (N,), loss of its label's probability when its group was left out, or others were.
        outputs: float (N, K), the logits that gave this score.
        start: the model that was purified without just these images, or the infected one if none was.
        fall: float (K,), share of its label's probability that each class's more suspicious group lost, beyond its
            other one.
        own_label: bool (N,), images that are left out for their trigger alone: their label didn't hang on it.
    """

    left_out: Tensor
    score: Tensor
    outputs: Tensor
    start: nn.Module
    fall: Tensor
    own_label: Tensor

    def to_json(self, labels: Tensor) -> dict[str, list[float]]:
        """Per class: how far its more suspicious group fell, and how many of its images are left out."""
        counts = torch.bincount(labels[self.left_out], minlength=len(self.fall))
        return {"fall": [round(v, 3) for v in self.fall.tolist()], "left_out": counts.tolist()}


def cross_examine(
    split: Split,
    side: Tensor,
    infected: nn.Module,
    before: Tensor,
    labels: Tensor,
    purify: Purify,
    *,
    balanced: float,
    fallen: float,
) -> Examination:
    """Finds, in each class, the group of images that needs no link to be recognised.

    A class that holds poison falls into two groups in the infected model's features; which of them is the poison, the
    adversarial fine-tuning tells: purify without the one, then without the other. Clean images that were left out
    keep much of their label's probability, because the rest of their class still teaches it; poisoned ones lose it
    all, because their label hung on the trigger alone. Where one group is much smaller it is left out without a
    second trial. In the end, a group that lost less than a share `fallen` of its label's probability, beyond what the
    rest of its class lost, is trusted again: it is a natural kind, such as digits written another way. Groups that
    were seen to carry a working trigger need no trial and aren't trusted again.

    Args:
        split: the groups.
        side: int64 (K,), which group carries a working trigger: 1 the smaller, −1 the larger, 0 not known.
        infected: θ₀.
        before: float (N, K), its logits.
        labels: int64 (N,).
        purify: Steps 1 and 2 from θ₀.
        balanced: share of the smaller group from which both are tried.
        fallen: share of its label's probability that a group must lose, beyond the rest of its class, to stay out.
    """
    left_out = torch.where((side < 0)[labels], ~split.minor, split.minor)
    had = before.softmax(1).gather(1, labels[:, None]).flatten()

    def lost(score: Tensor, group: Tensor) -> Tensor:
        """Share of its label's probability that the group of each class has lost, (K,)."""
        return _mean_by(labels, score, group) / _mean_by(labels, had, group).clamp(min=1e-6)

    first = left_out
    start, outputs = purify(~first, "without the smaller groups")
    score = drop_score(before, outputs, labels)
    doubtful = (split.minor_share > balanced) & (side == 0)
    if doubtful.any():
        other = torch.where(doubtful[labels], ~first, first)
        other_start, other_outputs = purify(~other, "without the larger groups")
        other_score = drop_score(before, other_outputs, labels)
        turned = (doubtful & (lost(other_score, other) > lost(score, first)))[labels]
        left_out = torch.where(turned, other, first)
        score = torch.where(turned, other_score, score)
        outputs = torch.where(turned[:, None], other_outputs, outputs)
        if torch.equal(left_out, other):
            start = other_start
        elif not torch.equal(left_out, first):
            start = infected
    fall = lost(score, left_out) - lost(score, ~left_out)
    fell, seen = (fall > fallen)[labels], (side != 0)[labels]
    return Examination(left_out & (fell | seen), score, outputs, start, fall, left_out & seen & ~fell)
