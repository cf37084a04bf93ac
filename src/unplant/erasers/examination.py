"""Who is the poison? Groups are cross-examined before the first round, and heard again after the last."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unplant import metrics
from unplant.detection.clusters import Split
from unplant.erasers.selection import FLOOR, drop_score, mean_by, revealed, shown_instead
from unplant.results import Findings

LEAST_FALL = 0.1
"""Share of its label's probability that a group whose trigger works on one class must lose. On CIFAR-10 all-to-all
poison loses 0.12 and more, as the other classes go on teaching its trigger; the deer of `OBEYED_BY_CLASS` lose nothing.
"""

HINT = 0.05
"""Share of its label's probability that a group must lose to be tried for longer."""

REVEALED = 0.3
"""What its images turn out to show must have become likelier by this much. Digits, groups that lost more than `HINT`:
natural ones of three clean models 0.25 at most, poison that works on one class 0.44 and more (three models)."""

SEVERAL = 2, 0.25
"""If more classes and a larger share of them lose a group, poison has many targets, and others are likely to hold some:
what is tried for longer there need only lose half as much. An all-to-one attack convicts one class, by error two, be
they few or many."""

MOST = 0.4, 0.6
"""So it is if more than two classes, and more than 0.6 of them, lost more than 0.4 of what would convict them: true of
125 of 140 runs on all-to-all poison, and of none of 487 others."""

ALIKE = 2.0
"""Such a group is at most so many times as large a part of its class as those that show it are in the median: one
attack poisons its classes alike, and natural groups can be half of theirs."""

SHOWS = 0.8
"""Share of what the purified model gives an ordinary image's class at least that it must give what a group turns out to
show, on average, to convict the group. Without its link poison is an ordinary image of another class; a rare kind of
its class is none, and a model that knows its data by heart unlearns it if it isn't taught."""

DOUBT = 0.7
"""A group that lost this share of what would convict it is in doubt: two of 59 runs on clean models had such a group,
and ten of 16 that missed poison."""

Purify = Callable[[Tensor, str, int], tuple[nn.Module, Tensor]]
"""Steps 1 and 2 on the images of a mask (N,), the text says what for, so many times as long: the purified model and its
logits (N, K)."""


def retrial(suspects: Tensor, heard: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """Suspects, bool (N,), without those of classes that are cleared in the end.

    A class is cleared if the purified model gives most of the suspects that are `heard` (never taught) their label
    all the same: it has learnt from the others of the class to recognise them, and no trigger is left to do it.
    """
    agree = mean_by(labels, (after.argmax(1) == labels).float(), suspects & heard)
    return suspects & (agree <= 0.5)[labels]


def findings(
    suspects: Tensor,
    left_out: Tensor,
    witnesses: Tensor,
    after: Tensor,
    labels: Tensor,
    obeyed: Sequence[float | None],
    kin: Tensor,
    sources: tuple[int, ...] = (),
    in_doubt: Sequence[int] = (),
) -> Findings:
    """What the suspects say about the backdoor, and the witnesses about what is left of it.

    Args:
        suspects: bool (N,).
        left_out: bool (N,), the groups that stayed out.
        witnesses: bool (N,), images that were not trained on where they are suspects.
        after: float (N, K), the purified model's logits.
        labels: int64 (N,).
        obeyed: how far the infected and the purified model obey the recovered trigger.
        kin: bool (N,), images that were found out by their likeness to the suspects. They aren't heard: that the
            purified model gives them another label is why they were.
        sources: the classes on whose images alone the recovered trigger works.
        in_doubt: the classes of groups that are in doubt.
    """
    counts = torch.bincount(labels[suspects & left_out], minlength=after.shape[1])
    targets = [label for label in counts.argsort(descending=True, stable=True).tolist() if counts[label]]
    flagged = torch.bincount(labels[suspects | kin], minlength=after.shape[1])
    obeying = (after.argmax(1) == labels)[suspects & witnesses]
    return Findings(
        infected=bool(targets),
        targets=tuple(targets),
        poisoning_rate=float((suspects | kin).float().mean()),
        witnesses=len(obeying),
        asr_left=metrics.share(obeying.numpy()),
        asr_left_upper=metrics.upper_bound(int(obeying.sum()), len(obeying)),
        trigger_before=obeyed[0],
        trigger_after=obeyed[1],
        sources=sources,
        in_doubt=tuple(in_doubt),
        flagged=tuple(int(flagged[label]) for label in targets),
    )


@dataclass(frozen=True, eq=False)
class Examination:
    """What the cross-examination of the clusters found.

    Attributes:
        left_out: bool (N,), images that D_ext has to do without at first.
        score: float (N,), loss of its label's probability when its group was left out, or others were.
        outputs: float (N, K), the logits that gave this score.
        start: the model that was purified without just these images, or the infected one if none was.
        fall: float (K,), share of its label's probability that each class's most suspicious group lost, beyond the
            trusted one; 0 for classes of one group.
        shows: float (K,), how surely that group turns out to show another class, see `shown_instead`, as a share of how
            sure the purified model is of ordinary images.
        own_label: bool (N,), images that are left out for their trigger alone: their label didn't hang on it.
        longer: bool (K,), classes with a group in doubt that was tried for longer.
        in_doubt: bool (N,), groups that are trusted again, but lost nearly as much as would convict them.
    """

    left_out: Tensor
    score: Tensor
    outputs: Tensor
    start: nn.Module
    fall: Tensor
    shows: Tensor
    own_label: Tensor
    longer: Tensor
    in_doubt: Tensor

    def to_json(self, labels: Tensor) -> dict[str, list[float]]:
        """Per class: how far its more suspicious group fell, and how many of its images are left out; classes tried
        for longer."""
        counts = torch.bincount(labels[self.left_out], minlength=len(self.fall))
        return {
            "fall": [round(v, 3) for v in self.fall.tolist()],
            "shows": [round(v, 3) for v in self.shows.tolist()],
            "left_out": counts.tolist(),
            "longer": self.longer.nonzero().flatten().tolist(),
            "in_doubt": labels[self.in_doubt].unique().tolist(),
        }


def cross_examine(
    split: Split,
    carrying: tuple[Tensor, Tensor],
    infected: nn.Module,
    before: Tensor,
    labels: Tensor,
    purify: Purify,
    *,
    balanced: float,
    many: Tensor,
    fallen: float,
    longer: int = 1,
    believed: bool = False,
) -> Examination:
    """Finds, in each class, the groups of images that need a link to be recognised.

    A class that holds poison falls into groups in the infected model's features; which of them are the poison, the
    adversarial fine-tuning tells: purify with one of them alone, then with another. Clean images that were left out
    keep much of their label's probability, because the rest of their class still teaches it; poisoned ones lose it
    all, because their label hung on the trigger alone. So the group is trusted without which the others lose most. It
    is the largest, without further trials, where the others are few. In classes that outweigh the rest each is tried,
    and what the trusted group itself lost is taken off: poison that is kept alone can lose its label with the others.
    In the end, groups that lost less than a share `fallen` of their label's probability, beyond what the rest of their
    class lost, are trusted again: they are natural kinds, such as digits written another way. So are groups that lost
    more, but don't turn out to show another class instead (`SHOWS`): such kinds, too, in a model that knows its data by
    heart. If one lost little, but its images turn out to show what the infected model hadn't guessed (`revealed`), or
    many classes lost one (`SEVERAL`), or most nearly did (`MOST`), its link may only be slow to break: it is tried for
    longer, and judged by that; with many such classes half the loss convicts it, if it is as small a part of its class
    as theirs are (`ALIKE`). Groups that were seen to carry a working trigger need no trial. If it works on all classes
    they aren't trusted again, even where they have their label by right (clean-label poison); if it works on one class,
    a small fall must bear that out (`LEAST_FALL`).

    Poison that the infected model never learnt is in no group, as it shows nothing of a trigger that works; but it
    would go on teaching the link to what is tried without the groups. So trials do without all whose label the
    infected model doesn't give, if they are asked to (`believed`).

    Args:
        split: the groups.
        carrying: bool (N,) each, groups that carry a trigger that works on all classes' images, and on one class's.
        infected: θ₀.
        before: float (N, K), its logits.
        labels: int64 (N,).
        purify: Steps 1 and 2 from θ₀.
        balanced: share of a class outside of its largest group from which the other group is tried, too.
        many: bool (K,), classes that outweigh the others: poison may be most of them.
        fallen: share of its label's probability that a group must lose, beyond the rest of its class, to stay out.
        longer: times as long a group in doubt is tried once more; 1: not at all.
        believed: trials are taught only images to which θ₀ gives their label, if these are enough.
    """
    classes, width = len(many), int(split.count.max())
    everywhere, for_one = carrying
    seen_out = everywhere | for_one
    cell = labels * width + split.group
    had = before.softmax(1).gather(1, labels[:, None]).flatten()
    seen = torch.zeros_like(many).index_fill_(0, labels[seen_out], True)

    def lost(score: Tensor, where: Tensor, members: Tensor, count: int) -> Tensor:
        """Share of their label's probability that the members of each class or group have lost, (count,)."""
        return mean_by(where, score, members, count) / mean_by(where, had, members, count).clamp(min=1e-6)

    def by_group(score: Tensor, without: Tensor) -> Tensor:
        """The same of each group that was left out, (K, groups); −∞ for the others."""
        out = torch.bincount(cell[without], minlength=classes * width) > 0
        return lost(score, cell, without, classes * width).masked_fill(~out, -torch.inf).view(classes, width)

    left_out, score, outputs, most = seen_out, torch.zeros_like(had), before, torch.full((classes,), -torch.inf)
    models: list[tuple[Tensor, nn.Module]] = []
    agree = before.argmax(1) == labels

    def purified(without: Tensor, why: str, times: int) -> tuple[nn.Module, Tensor]:
        """Steps 1 and 2 without these."""
        taught = ~without & agree
        return purify(taught if believed and taught.float().mean() >= FLOOR else ~without, why, times)

    def falls() -> Tensor:
        """Share of its label's probability that each group lost beyond the rest of its class, (K, groups)."""
        return by_group(score, left_out) - lost(score, labels, ~left_out, classes)[:, None]

    def trial(kept: int, tried: Tensor) -> None:
        """Purifies with one group of each class that is tried, and the largest of the others; keeps what is better."""
        nonlocal left_out, score, outputs, most
        without = torch.where(seen[labels], seen_out, split.group != torch.where(tried, kept, 0)[labels])
        why = f"with group {kept + 1} alone" if models else "without the smaller groups"
        model, given = purified(without, why, 1)
        drop = drop_score(before, given, labels)
        share = by_group(drop, without).amax(1) - torch.where(many, lost(drop, labels, ~without, classes), 0)
        better = tried & (share > most) if models else torch.ones_like(many)
        models.append((without, model))
        most, turned = torch.where(better, share, most), better[labels]
        left_out, score = torch.where(turned, without, left_out), torch.where(turned, drop, score)
        outputs = torch.where(turned[:, None], given, outputs)

    trial(0, torch.ones_like(many))
    halves = (split.minor_share > balanced) & ~many & ~seen
    if halves.any():
        trial(1, halves)
    heavy = many & ~seen & (split.count > 1)
    for kept in range(1, int(split.count[heavy].max()) if heavy.any() else 0):
        trial(kept, heavy & (split.count > kept))
    shown = mean_by(cell, revealed(before, outputs, labels), left_out & ~seen_out, classes * width).view(classes, width)
    part = mean_by(labels, left_out.float(), torch.ones_like(left_out), classes)
    more = _some_more_of_it(falls().amax(1), fallen, part)
    doubted = ((falls() > HINT) & (falls() <= fallen) & ((shown > REVEALED) | more[:, None])).any(1)
    if longer == 1:
        doubted = torch.zeros_like(doubted)
    if doubted.any():
        model, given = purified(left_out, "groups in doubt, for longer", longer)
        models.insert(0, (left_out, model))
        turned = doubted[labels]
        score = torch.where(turned, drop_score(before, given, labels), score)
        outputs = torch.where(turned[:, None], given, outputs)
    start = next((model for without, model in models if torch.equal(without, left_out)), infected)
    fall = falls().amax(1)
    limit = torch.where(doubted & more, fallen / 2, fallen)
    lost_by, enough = falls().flatten()[cell], torch.where(for_one, LEAST_FALL, limit[labels])
    ordinary = outputs.softmax(1).amax(1)[~left_out].mean()
    shows = shown_instead(outputs, labels, cell, left_out, classes * width) / ordinary
    nothing_else = left_out & (lost_by > enough) & ~seen_out & (shows < SHOWS)[cell]
    fell = left_out & (lost_by > enough) & ~nothing_else
    out = fell | everywhere
    in_doubt = left_out & ~out & (lost_by > DOUBT * limit[labels])
    worst = falls().argmax(1, keepdim=True)
    return Examination(
        left_out=out,
        score=score.masked_fill(nothing_else, 0.0),
        outputs=outputs,
        start=start,
        fall=fall.masked_fill(fall.isinf(), 0.0),
        shows=shows.view(classes, width).gather(1, worst).flatten(),
        own_label=everywhere & ~fell,
        longer=doubted,
        in_doubt=in_doubt,
    )


def _some_more_of_it(fall: Tensor, fallen: float, part: Tensor) -> Tensor:
    """Bool (K,): where a group in doubt is likely to be poison too, as several classes are convicted, or most nearly.

    Args:
        fall: float (K,), the most that a group of each class lost.
        fallen: what convicts it.
        part: float (K,), share of each class that was left out and tried.
    """
    for lost, share in ((fall > fallen, SEVERAL[1]), (fall > MOST[0] * fallen, MOST[1])):
        alike = part <= ALIKE * part[lost].median() if lost.any() else lost
        if int((lost & alike).sum()) > max(SEVERAL[0], share * len(fall)):
            return alike & (fall <= fallen)
    return torch.zeros_like(fall, dtype=torch.bool)
