"""Who is the poison? Groups are cross-examined before the first round."""

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from unplant.detection.clusters import Split
from unplant.erasers.trials import Purify, Trials
from unplant.params import Config, Share

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

NAMED = 0.8, 0.6
"""A group names the class that so many of its images would be if not their own; a class is named if more than two other
classes, and more than such a share of those with a group, name it. Natural kinds resemble this class or that; covers,
which carry the trigger under their own label, show its target as long as it is taught. They are trusted again."""

CLEARLY = 0.1
"""Covers say which half of the class that they name is poison: they give it this much less of their probability where
that half was left out. Input-aware on the digits: 0.45 and 0.09."""

SHOWS = 0.8
"""Share of what the purified model gives an ordinary image's class at least that it must give what a group turns out to
show, on average, to convict the group. Without its link poison is an ordinary image of another class; a rare kind of
its class is none, and a model that knows its data by heart unlearns it if it isn't taught. Not asked where several
classes are convicted anyway: among small groups of all-to-all poison one of three images showed 0.79."""

HEEDED = 0.5
"""Share of a group to which the infected model must give its label to convict it: a trigger that works makes it do so.
Poison's groups had 0.70 and more, but for attacks that hardly worked (most of those lost nearly all, see `CERTAIN`); on
a clean transformer that is right on every other image 297 dogs that it called dogs in three of ten cases lost half of
that. Asked where `SHOWS` is."""

CERTAIN = 0.95
"""A group that lost so much of its label's probability (the rest of its class aside) is convicted whatever it shows: a
blend can hide what else is in its images. Natural groups of nine models that know the digits by heart lost 0.90 at
most, groups of all-to-all poison that hardly works 0.96 and more."""

DOUBT = 0.7
"""A group that lost this share of what would convict it is in doubt: two of 59 runs on clean models had such a group,
and ten of 16 that missed poison."""

APART = 1.3
"""Nats an image that a class gains by being taken for two groups: one that stands further apart is in doubt even if it
lost nothing. The most in 86 runs on clean models was 1.2; 11 of 16 runs that convicted nobody where there was poison
had more in the target class (in 8 it had lost nearly enough, in 14 either)."""


class ExaminationConfig(Config):
    """Settings of the cross-examination."""

    balanced: Share = Field(
        default=0.25, description="clusters: share outside of the largest group from which each is tried"
    )
    fallen: Share = Field(
        default=0.5, description="clusters: share of its label's probability that a group must lose to stay out"
    )
    longer: int = Field(
        default=6, ge=1, le=100, description="clusters: times as long a group in doubt is tried again; 1: not at all"
    )
    believed: bool = Field(
        default=True, description="clusters: trials are taught only images whose label the infected model gives"
    )
    shows: bool = Field(
        default=True, description="clusters: a group that fell must turn out to show another class, or is trusted again"
    )
    heeded: bool = Field(
        default=True, description="clusters: it must also have its label from the infected model, for the most part"
    )
    several: bool = Field(
        default=True, description="clusters: where many classes lose a group, or nearly, others are judged by half"
    )
    named: bool = Field(
        default=True, description="clusters: groups of most classes that show the same one testify against it"
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
        named: bool (K,), classes that groups of most others name, see `NAMED`.
        covers: bool (N,), those groups: trusted, whatever they lost.
        in_doubt: bool (N,), groups that are trusted again, but lost nearly as much as would convict them, or more, or
            stand further apart from their class than natural groups do.
    """

    left_out: Tensor
    score: Tensor
    outputs: Tensor
    start: nn.Module
    fall: Tensor
    shows: Tensor
    own_label: Tensor
    longer: Tensor
    named: Tensor
    covers: Tensor
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
            "named": self.named.nonzero().flatten().tolist(),
            "covers": torch.bincount(labels[self.covers], minlength=len(self.fall)).tolist(),
            "in_doubt": labels[self.in_doubt].unique().tolist(),
        }


def cross_examine(
    split: Split,
    carrying: tuple[Tensor, Tensor],
    infected: nn.Module,
    before: Tensor,
    labels: Tensor,
    purify: Purify,
    many: Tensor,
    config: ExaminationConfig,
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
    more, if not nearly all (`CERTAIN`), but don't turn out to show another class instead (`SHOWS`, beside few
    convictions): such kinds, too, in a model that knows its data by heart; and those that θ₀ mostly didn't take for
    their class in the first place (`HEEDED`), in one that has learnt little. If one lost little, but its images turn
    out to show what the infected model hadn't guessed (`revealed`), or many classes lost one (`SEVERAL`), or most
    nearly did (`MOST`), or groups of most others show its class (`NAMED`), its link may only be slow to break: it is
    tried for longer, and judged by that; with many such classes half the loss convicts it, if it is as small a part of
    its class as theirs are (`ALIKE`). Groups that name a class are trusted again: they carry its trigger under their
    own label; and they say which half of it is poison (`CLEARLY`). Groups that were seen to carry a working trigger
    need no trial. If it works on all classes they aren't trusted again, even where they have their label by right
    (clean-label poison); if it works on one class, a small fall must bear that out (`LEAST_FALL`).

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
        many: bool (K,), classes that outweigh the others: poison may be most of them.
        config: settings.
    """
    everywhere, for_one = carrying
    fallen = config.fallen
    trials = Trials(split, everywhere | for_one, infected, before, labels, many, purify, believed=config.believed)
    trials.run(balanced=config.balanced)
    names, asked = trials.names(NAMED[0])
    named = _named(names, asked) & config.named
    names = names.masked_fill(~named[names], -1)
    trials.settle(names, CLEARLY)
    covers = trials.trust(names >= 0)
    falls = trials.falls()
    more = _some_more_of_it(falls.amax(1), fallen, trials.part()) & config.several
    slow = more | (named & (falls.amax(1) <= fallen))
    doubted = ((falls > HINT) & (falls <= fallen) & ((trials.revealed() > REVEALED) | slow[:, None])).any(1)
    if config.longer == 1:
        doubted = torch.zeros_like(doubted)
    if doubted.any():
        trials.run_again(doubted, config.longer)

    falls, shows, left_out = trials.falls(), trials.shows(), trials.left_out
    limit = torch.where(doubted & more, fallen / 2, fallen)[labels]
    lost = falls.flatten()[trials.cell]
    convicted = left_out & (lost > torch.where(for_one, LEAST_FALL, limit))
    natural = (config.shows & (shows < SHOWS)) | (config.heeded & (trials.heeded() <= HEEDED))
    rare = convicted & ~trials.carrying & (natural & (trials.losses() <= CERTAIN)).flatten()[trials.cell]
    if config.several and _several(len(labels[convicted & ~rare].unique()), len(many), SEVERAL[1]):
        rare = torch.zeros_like(rare)
    convicted = convicted & ~rare
    out = convicted | everywhere
    most, group = falls.max(1)
    return Examination(
        left_out=out,
        score=trials.score.masked_fill(rare, 0.0),
        outputs=trials.outputs,
        start=trials.start(),
        fall=most.masked_fill(most.isinf(), 0.0),
        shows=shows.gather(1, group[:, None]).flatten(),
        own_label=everywhere & ~convicted,
        longer=doubted,
        named=named,
        covers=covers,
        in_doubt=left_out & ~out & ((lost > DOUBT * limit) | (split.gain > APART)[labels]),
    )


def _named(names: Tensor, asked: Tensor) -> Tensor:
    """Bool (K,): classes that groups of most others name.

    Args:
        names: int64 (K, groups), the class that each group names; −1 for none.
        asked: bool (K, groups), groups that were asked.
    """
    classes, group = (names >= 0).nonzero(as_tuple=True)
    votes = (classes * len(names) + names[classes, group]).unique() % len(names)
    others = asked.any(1).sum() - asked.any(1).long()
    return torch.bincount(votes, minlength=len(names)) > (NAMED[1] * others).clamp(min=SEVERAL[0])


def _some_more_of_it(fall: Tensor, fallen: float, part: Tensor) -> Tensor:
    """Bool (K,): where a group in doubt is likely to be poison too, as several classes are convicted, or most nearly.

    Args:
        fall: float (K,), the most that a group of each class lost.
        fallen: what convicts it.
        part: float (K,), share of each class that was left out and tried.
    """
    for lost, share in ((fall > fallen, SEVERAL[1]), (fall > MOST[0] * fallen, MOST[1])):
        alike = part <= ALIKE * part[lost].median() if lost.any() else lost
        if _several(int((lost & alike).sum()), len(fall), share):
            return alike & (fall <= fallen)
    return torch.zeros_like(fall, dtype=torch.bool)


def _several(count: int, classes: int, share: float) -> bool:
    """Whether so many of the classes are too many for an attack with one target, or for chance."""
    return count > max(SEVERAL[0], share * classes)
