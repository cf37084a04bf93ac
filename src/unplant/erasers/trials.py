"""Trials of groups: θ₀ is purified without them, and what they lose is counted."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unplant.detection.clusters import Split
from unplant.erasers.selection import FLOOR, drop_score, mean_by, revealed, shown_instead

Purify = Callable[[Tensor, str, int], tuple[nn.Module, Tensor]]
"""Steps 1 and 2 on the images of a mask (N,), the text says what for, so many times as long: the purified model and its
logits (N, K)."""


class Trial(NamedTuple):
    """One of them: the images (N,) that it did without, the purified model, and its logits (N, K)."""

    without: Tensor
    model: nn.Module
    given: Tensor


class Trials:
    """The trials of one cross-examination; of several, each class keeps the one in which its groups lost most.

    Attributes:
        left_out: bool (N,), the groups that were tried: all but one of each class, or those that carry a trigger.
        score: float (N,), loss of its label's probability in the trial that its class keeps.
        outputs: float (N, K), the logits that gave this score.
        cell: int64 (N,), each image's group, counted over all classes.
    """

    def __init__(
        self,
        split: Split,
        carrying: Tensor,
        infected: nn.Module,
        before: Tensor,
        labels: Tensor,
        many: Tensor,
        purify: Purify,
        *,
        believed: bool,
    ) -> None:
        self.split, self.carrying, self.infected, self.before, self.labels = split, carrying, infected, before, labels
        self.many, self.purify, self.believed = many, purify, believed
        self.classes, self.width = len(many), int(split.count.max())
        self.cell = labels * self.width + split.group
        self.left_out, self.score, self.outputs = carrying, torch.zeros(len(labels)), before
        self._agree = before.argmax(1) == labels
        self._had = before.softmax(1).gather(1, labels[:, None]).flatten()
        self._seen = torch.zeros_like(many).index_fill_(0, labels[carrying], True)
        self._most = torch.full((self.classes,), -torch.inf)
        self._tried: list[Trial] = []

    def run(self, *, balanced: float) -> None:
        """Tries what is to be tried: all but the largest groups; and the largest where another is as likely clean."""
        split, open_case = self.split, ~self._seen
        self._try(0, torch.ones_like(self.many))
        halves = (split.minor_share > balanced) & ~self.many & open_case
        if halves.any():
            self._try(1, halves)
        heavy = self.many & open_case & (split.count > 1)
        for kept in range(1, int(split.count[heavy].max()) if heavy.any() else 0):
            self._try(kept, heavy & (split.count > kept))

    def run_again(self, classes: Tensor, times: int) -> None:
        """Tries the same groups so many times as long, and takes that for the classes of a mask (K,)."""
        model, given = self._purified(self.left_out, "groups in doubt, for longer", times)
        self._tried.insert(0, Trial(self.left_out, model, given))
        turned = classes[self.labels]
        self.score = torch.where(turned, drop_score(self.before, given, self.labels), self.score)
        self.outputs = torch.where(turned[:, None], given, self.outputs)

    def falls(self) -> Tensor:
        """Share of its label's probability that each group lost beyond the rest of its class, (K, groups).

        −∞ for groups that weren't tried.
        """
        rest = self._lost(self.score, self.labels, ~self.left_out, self.classes)
        return self.losses() - rest[:, None]

    def losses(self) -> Tensor:
        """Share of its label's probability that each group lost by itself, (K, groups); −∞ for those not tried."""
        return self._by_group(self.score, self.left_out)

    def revealed(self) -> Tensor:
        """How much likelier what the images of each tried group turn out to show has become, (K, groups)."""
        shown = revealed(self.before, self.outputs, self.labels)
        count = self.classes * self.width
        return mean_by(self.cell, shown, self.left_out & ~self.carrying, count).view(self.classes, self.width)

    def shows(self) -> Tensor:
        """How surely each tried group turns out to show another class, (K, groups): see `shown_instead`.

        As a share of how sure the purified model is of what it was taught, that is, of ordinary images.
        """
        shown = shown_instead(self.outputs, self.labels, self.cell, self.left_out, self.classes * self.width)
        ordinary = self.outputs.softmax(1).amax(1)[~self.left_out].mean()
        return (shown / ordinary).view(self.classes, self.width)

    def heeded(self) -> Tensor:
        """Share of each tried group to which the infected model gives its label, (K, groups)."""
        count = self.classes * self.width
        return mean_by(self.cell, self._agree.float(), self.left_out, count).view(self.classes, self.width)

    def names(self, agreed: float) -> tuple[Tensor, Tensor]:
        """The class that each tried group names, (K, groups), −1 for none, and which groups were asked, bool.

        That is the class that so large a share of its images, more than half, would be if not their own. Carriers of a
        trigger aren't asked.
        """
        other = self.outputs.scatter(1, self.labels[:, None], -torch.inf).argmax(1)
        heard = self.left_out & ~self.carrying
        size = torch.bincount(self.cell[heard], minlength=self.classes * self.width)
        pairs, counts = (self.cell * self.classes + other)[heard].unique(return_counts=True)
        where, named = pairs // self.classes, pairs % self.classes
        clear = counts >= agreed * size[where]
        names = torch.full_like(size, -1).index_put_((where[clear],), named[clear])
        return names.view(self.classes, self.width), (size > 0).view(self.classes, self.width)

    def settle(self, names: Tensor, clearly: float) -> None:
        """Takes, of each class that groups name, the trial after which these show it least, if it is clearly less.

        They show a class while its trigger is taught: the trial that left its poison out is the one that they forget
        it in. Classes with the same images left out in all trials stay as they are.

        Args:
            names: int64 (K, groups), the class that each group names; −1 for none.
            clearly: by how much their mean probability of that class must be less than in the trial that was kept.
        """
        covers = names.flatten()[self.cell].masked_fill(~self.left_out, -1)
        for label in names[names >= 0].unique().tolist():
            mine, naming = self.labels == label, covers == label
            found = [trial for trial in self._tried if (naming & trial.without).any()]
            shown = [float(trial.given.softmax(1)[naming & trial.without, label].mean()) for trial in found]
            as_kept = [torch.equal(trial.without[mine], self.left_out[mine]) for trial in found]
            if not any(as_kept):
                continue
            least = min(range(len(found)), key=shown.__getitem__)
            if as_kept[least] or shown[least] > shown[as_kept.index(True)] - clearly:
                continue
            drop = drop_score(self.before, found[least].given, self.labels)
            self.left_out = torch.where(mine, found[least].without, self.left_out)
            self.score = torch.where(mine, drop, self.score)
            self.outputs = torch.where(mine[:, None], found[least].given, self.outputs)

    def trust(self, groups: Tensor) -> Tensor:
        """Takes groups (K, groups) as if they had never been left out; which images that are, (N,)."""
        trusted = self.left_out & groups.flatten()[self.cell]
        self.left_out, self.score = self.left_out & ~trusted, self.score.masked_fill(trusted, 0.0)
        return trusted

    def part(self) -> Tensor:
        """Share of each class that was tried, (K,)."""
        return mean_by(self.labels, self.left_out.float(), torch.ones_like(self.left_out), self.classes)

    def start(self) -> nn.Module:
        """The model that was purified without just the groups that were tried; θ₀ if none was."""
        found = (trial.model for trial in self._tried if torch.equal(trial.without, self.left_out))
        return next(found, self.infected)

    def _purified(self, without: Tensor, why: str, times: int) -> tuple[nn.Module, Tensor]:
        """Steps 1 and 2 without these images; and without those that θ₀ doesn't believe."""
        taught = ~without & self._agree
        return self.purify(taught if self.believed and taught.float().mean() >= FLOOR else ~without, why, times)

    def _try(self, kept: int, tried: Tensor) -> None:
        """Purifies with one group of each class that is tried, and the largest of the others; keeps what is better."""
        alone = self.split.group != torch.where(tried, kept, 0)[self.labels]
        without = torch.where(self._seen[self.labels], self.carrying, alone)
        why = f"with group {kept + 1} alone" if self._tried else "without the smaller groups"
        model, given = self._purified(without, why, 1)
        drop = drop_score(self.before, given, self.labels)
        rest = self._lost(drop, self.labels, ~without, self.classes)
        share = self._by_group(drop, without).amax(1) - torch.where(self.many, rest, 0)
        better = tried & (share > self._most) if self._tried else torch.ones_like(self.many)
        self._tried.append(Trial(without, model, given))
        self._most, turned = torch.where(better, share, self._most), better[self.labels]
        self.left_out = torch.where(turned, without, self.left_out)
        self.score = torch.where(turned, drop, self.score)
        self.outputs = torch.where(turned[:, None], given, self.outputs)

    def _lost(self, score: Tensor, where: Tensor, members: Tensor, count: int) -> Tensor:
        """Share of their label's probability that the members of each class or group have lost, (count,)."""
        return mean_by(where, score, members, count) / mean_by(where, self._had, members, count).clamp(min=1e-6)

    def _by_group(self, score: Tensor, without: Tensor) -> Tensor:
        """The same of each group that was left out, (K, groups); −∞ for the others."""
        count = self.classes * self.width
        out = torch.bincount(self.cell[without], minlength=count) > 0
        return self._lost(score, self.cell, without, count).masked_fill(~out, -torch.inf).view(self.classes, self.width)
