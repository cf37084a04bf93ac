"""Step 3 of PBE: whom it trusts, and what it teaches next. No trigger, no target, no clean data."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unplant.detection.transplant import Recovered
from unplant.images import LabeledImages

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


def revealed(infected: Tensor, purified: Tensor, labels: Tensor) -> Tensor:
    """What an image turns out to show, its label left aside, and how much likelier that has become: (N,).

    Some triggers hide from the infected model what else is in the image, and a purified one sees it again, even while
    it still obeys (TaCT's patch; not Input-aware's). Of clean images both think much alike.
    """
    before, after = (out.scatter(1, labels[:, None], -torch.inf).softmax(1) for out in (infected, purified))
    seen = after.argmax(1, keepdim=True)
    return (after - before).gather(1, seen).flatten()


def shown_instead(purified: Tensor, labels: Tensor, where: Tensor, members: Tensor, count: int) -> Tensor:
    """Of what the labels of each group's members don't get, the share that one other class an image gets: (count,).

    Without its link poison is an ordinary image of another class, and near 1 is for that; a rare kind of its own class
    that was unlearnt is none. 0 for groups without members.

    Args:
        purified: float (N, K), logits.
        labels: int64 (N,).
        where: int64 (N,), each image's group.
        members: bool (N,).
        count: of groups.
    """
    chances = purified.softmax(1)
    missing = 1 - chances.gather(1, labels[:, None]).flatten()
    other = chances.scatter(1, labels[:, None], 0).amax(1)
    return mean_by(where, other, members, count) / mean_by(where, missing, members, count).clamp(min=1e-6)


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
    trusted = mean_by(labels, score, ~left_out)[labels]
    distrusted = mean_by(labels, score, left_out)[labels]
    return (score + torch.where(left_out, distrusted, trusted)) / 2 - trusted


def mean_by(labels: Tensor, score: Tensor, members: Tensor, num_classes: int | None = None) -> Tensor:
    """Mean score of the members of each class, (K,), or up to the highest label; 0 where a class has none."""
    size = num_classes or int(labels.max()) + 1
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
    trigger: Recovered | None = None


def next_lesson(
    extra: Tensor, suspects: Tensor, purified: Tensor, labels: Tensor, *, taught: Tensor, sure_above: float
) -> Lesson:
    """D_ext, and those suspects that are `taught`, under the labels of which the purified logits (N, K) are sure."""
    opinion, sure = second_opinion(purified, labels, sure_above)
    return Lesson((extra & ~suspects) | (suspects & taught & sure), torch.where(suspects, opinion, labels))
