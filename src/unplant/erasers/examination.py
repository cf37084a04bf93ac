"""Who is the poison? Groups are cross-examined before the first round, and heard again after the last."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unplant import metrics
from unplant.detection.clusters import Split
from unplant.erasers.selection import drop_score, mean_by
from unplant.results import Findings

Purify = Callable[[Tensor, str], tuple[nn.Module, Tensor]]
"""Steps 1 and 2 on the images of a mask (N,), the text says what for: the purified model and its logits (N, K)."""


def retrial(suspects: Tensor, heard: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """Suspects, bool (N,), without those of classes that are cleared in the end.

    A class is cleared if the purified model gives most of the suspects that are `heard` (never taught) their label
    all the same: it has learnt from the others of the class to recognise them, and no trigger is left to do it.
    """
    agree = mean_by(labels, (after.argmax(1) == labels).float(), suspects & heard)
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


def doubtful_classes(split: Split, labels: Tensor, balanced: float, outweighs: float) -> Tensor:
    """Bool (K,): classes of which either group may be the poison.

    Where poison is more than its class, it is the larger group: so it is at a tenth of the images with thirty classes
    and more. Such a class has far more images than others.

    Args:
        split: the groups.
        labels: int64 (N,).
        balanced: share of the smaller group from which a class is doubtful.
        outweighs: times the median class's images from which it is, whatever the share.
    """
    counts = torch.bincount(labels, minlength=len(split.minor_share))
    heavy = counts >= outweighs * counts[counts > 0].float().median()
    return (split.minor_share > balanced) | (heavy & (split.minor_share > 0))


def cross_examine(
    split: Split,
    side: Tensor,
    infected: nn.Module,
    before: Tensor,
    labels: Tensor,
    purify: Purify,
    *,
    doubtful: Tensor,
    fallen: float,
) -> Examination:
    """Finds, in each class, the group of images that needs no link to be recognised.

    A class that holds poison falls into two groups in the infected model's features; which of them is the poison, the
    adversarial fine-tuning tells: purify without the one, then without the other. Clean images that were left out
    keep much of their label's probability, because the rest of their class still teaches it; poisoned ones lose it
    all, because their label hung on the trigger alone. Where it isn't doubtful which one is the poison, the smaller one
    is left out without a second trial. In the end, a group that lost less than a share `fallen` of its label's
    probability, beyond what the rest of its class lost, is trusted again: it is a natural kind, such as digits written
    another way. Groups that were seen to carry a working trigger need no trial and aren't trusted again.

    Args:
        split: the groups.
        side: int64 (K,), which group carries a working trigger: 1 the smaller, −1 the larger, 0 not known.
        infected: θ₀.
        before: float (N, K), its logits.
        labels: int64 (N,).
        purify: Steps 1 and 2 from θ₀.
        doubtful: bool (K,), classes of which both groups are tried.
        fallen: share of its label's probability that a group must lose, beyond the rest of its class, to stay out.
    """
    left_out = torch.where((side < 0)[labels], ~split.minor, split.minor)
    had = before.softmax(1).gather(1, labels[:, None]).flatten()

    def lost(score: Tensor, group: Tensor) -> Tensor:
        """Share of its label's probability that the group of each class has lost, (K,)."""
        probability = mean_by(labels, had, group, len(side))
        return mean_by(labels, score, group, len(side)) / probability.clamp(min=1e-6)

    first = left_out
    start, outputs = purify(~first, "without the smaller groups")
    score = drop_score(before, outputs, labels)
    doubtful = doubtful & (side == 0)
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
