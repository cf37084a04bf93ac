"""Whom PBE trusts: the first D_ext, the score of Step 3 and the next D_ext. No trigger, no target, no clean data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unplant import metrics
from unplant.detection.clusters import Split
from unplant.images import LabeledImages
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


def second_opinion(purified: Tensor, labels: Tensor, sure_above: float) -> tuple[Tensor, Tensor]:
    """What the purified model would call each image if its own label were out of the question.

    Returns:
        Labels (N,), and bool (N,): whether the model gives that label more than `sure_above`.
    """
    chances, others = purified.softmax(1).scatter(1, labels[:, None], 0).max(1)
    return others, chances > sure_above


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the model is taught: images, bool (N,), and labels (N,)."""

    images: Tensor
    labels: Tensor


def next_lesson(
    extra: Tensor, suspects: Tensor, purified: Tensor, labels: Tensor, *, taught: Tensor, sure_above: float
) -> Lesson:
    """D_ext, and those suspects that are `taught`, under the labels of which the purified logits (N, K) are sure."""
    opinion, sure = second_opinion(purified, labels, sure_above)
    return Lesson((extra & ~suspects) | (suspects & taught & sure), torch.where(suspects, opinion, labels))


def findings(suspects: Tensor, left_out: Tensor, witnesses: Tensor, purified: Tensor, labels: Tensor) -> Findings:
    """What the suspects say about the backdoor, and the witnesses about what is left of it.

    Args:
        suspects: bool (N,).
        left_out: bool (N,), the groups that fell.
        witnesses: bool (N,), images that were not trained on where they are suspects.
        purified: float (N, K), the final logits.
        labels: int64 (N,).
    """
    counts = torch.bincount(labels[suspects & left_out], minlength=purified.shape[1])
    targets = [label for label in counts.argsort(descending=True, stable=True).tolist() if counts[label]]
    heard = suspects & witnesses
    obeyed = int((purified.argmax(1) == labels)[heard].sum())
    return Findings(
        infected=bool(targets),
        targets=tuple(targets),
        poisoning_rate=float(suspects.float().mean()),
        witnesses=int(heard.sum()),
        asr_left=metrics.share((purified.argmax(1) == labels)[heard].numpy()),
        asr_left_upper=metrics.upper_bound(obeyed, int(heard.sum())),
    )


@dataclass(frozen=True, eq=False)
class Examination:
    """What the cross-examination of the clusters found.

    Attributes:
        left_out: bool (N,), images that D_ext has to do without at first.
        score: float (N,), loss of its label's probability when its group was left out, or others were.
        outputs: float (N, K), the logits that gave this score.
        start: the model that was purified without just these images, or the infected one if none was.
        fall: float (K,), mean score of each class's more suspicious group above that of its other one.
    """

    left_out: Tensor
    score: Tensor
    outputs: Tensor
    start: nn.Module
    fall: Tensor

    def to_json(self, labels: Tensor) -> dict[str, list[float]]:
        """Per class: how far its more suspicious group fell, and how many of its images are left out."""
        counts = torch.bincount(labels[self.left_out], minlength=len(self.fall))
        return {"fall": [round(v, 3) for v in self.fall.tolist()], "left_out": counts.tolist()}


def cross_examine(
    split: Split, infected: nn.Module, before: Tensor, labels: Tensor, purify: Purify, *, balanced: float, fallen: float
) -> Examination:
    """Finds, in each class, the group of images that needs no link to be recognised.

    A class that holds poison falls into two groups in the infected model's features; which of them is the poison, the
    adversarial fine-tuning tells: purify without the one, then without the other. Clean images that were left out
    keep much of their label's probability, because the rest of their class still teaches it; poisoned ones lose it
    all, because their label hung on the trigger alone. Where one group is much smaller it is left out without a
    second trial. In the end, a group whose label's probability fell by less than `fallen` in the mean, beyond that of
    the rest of its class, is trusted again: it is a natural kind, such as digits written another way.

    Args:
        split: the groups.
        infected: θ₀.
        before: float (N, K), its logits.
        labels: int64 (N,).
        purify: Steps 1 and 2 from θ₀.
        balanced: share of the smaller group from which both are tried.
        fallen: mean loss of its label's probability from which a group stays out.
    """
    start, outputs = purify(~split.minor, "without the smaller groups")
    left_out, score = split.minor, drop_score(before, outputs, labels)
    doubtful = split.minor_share > balanced
    if doubtful.any():
        other = torch.where(doubtful[labels], ~split.minor, split.minor)
        other_start, other_outputs = purify(~other, "without the larger groups")
        other_score = drop_score(before, other_outputs, labels)
        for label in doubtful.nonzero().flatten().tolist():
            members = labels == label
            if other_score[members & other].mean() > score[members & left_out].mean():
                left_out = torch.where(members, other, left_out)
                score = torch.where(members, other_score, score)
                outputs = torch.where(members[:, None], other_outputs, outputs)
        if torch.equal(left_out, other):
            start = other_start
        elif not torch.equal(left_out, split.minor):
            start = infected
    trusted, distrusted = (_mean_by(labels, score, group) for group in (~left_out, left_out))
    fall = distrusted - trusted
    return Examination(left_out & (fall > fallen)[labels], score, outputs, start, fall)
