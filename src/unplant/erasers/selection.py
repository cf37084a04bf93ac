"""Whom PBE trusts: the first D_ext, the score of Step 3 and the next D_ext. No trigger, no target, no clean data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unplant.classifier import activations, logits
from unplant.detection.clusters import Split, split_classes
from unplant.images import LabeledImages

Purify = Callable[[Tensor, str], nn.Module]
"""Steps 1 and 2 from the infected model on the images of a mask (N,); the text says what for."""


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


FLOOR = 0.05
"""The smallest D_ext, as a share of the data: the size of the first one in the released code."""

SCORES = {"cosine": cosine_score, "drop": drop_score}


def least_suspicious(suspicion: Tensor, share: float) -> Tensor:
    """Bool (N,): the share of images with the lowest suspicion, the released code's selection."""
    chosen = torch.zeros(len(suspicion), dtype=torch.bool)
    chosen[suspicion.argsort(stable=True)[: max(2, round(share * len(suspicion)))]] = True
    return chosen


def surely_clean(suspicion: Tensor, purified: Tensor, labels: Tensor, clean_below: float, sure_above: float) -> Tensor:
    """Bool (N,): both models agree on the image's label, and the purified one is sure of it.

    Never less than the least suspicious 5 %, so that a hard data set doesn't end the run.
    """
    sure = purified.softmax(1).gather(1, labels[:, None]).flatten() > sure_above
    return (suspicion < clean_below) & sure | least_suspicious(suspicion, FLOOR)


def second_opinion(purified: Tensor, labels: Tensor, sure_above: float) -> tuple[Tensor, Tensor]:
    """What the purified model would call each image if its own label were out of the question.

    Returns:
        Labels (N,), and bool (N,): whether the model gives that label more than `sure_above`.
    """
    chances, others = purified.softmax(1).scatter(1, labels[:, None], 0).max(1)
    return others, chances > sure_above


@dataclass(frozen=True, eq=False)
class Examination:
    """What the cross-examination of the clusters found."""

    extra_set: Tensor
    split: Split
    left_out: Tensor
    suspicion: Tensor


def cross_examine(
    infected: nn.Module,
    data: LabeledImages,
    purify: Purify,
    *,
    least_gain: float,
    balanced: float,
    clean_below: float,
    sure_above: float,
) -> Examination:
    """The first D_ext: in each class the group of images that needs no link to be recognised.

    A class that holds poison falls into two groups in the infected model's features; which of them is the poison, the
    adversarial fine-tuning tells: purify without the one, then without the other. Clean images that were left out
    keep much of their label's probability, because the rest of their class still teaches it; poisoned ones lose it
    all, because their label hung on the trigger alone. Where one group is much smaller it is left out without a
    second trial: at worst a few clean images have to wait for Step 3.
    """
    layers = activations(infected, data)
    split = split_classes(layers, data.labels, data.num_classes, least_gain=least_gain)
    before = logits(infected, data)

    def drop_without(group: Tensor, title: str) -> tuple[Tensor, Tensor]:
        after = logits(purify(~group, title), data)
        return drop_score(before, after, data.labels), after

    left_out = split.minor.clone()
    suspicion, after = drop_without(left_out, "without the smaller groups")
    in_doubt = (split.minor_share > balanced)[data.labels]
    if in_doubt.any():
        other = torch.where(in_doubt, ~split.minor, split.minor)
        other_suspicion, other_after = drop_without(other, "without the larger groups")
        for label in (split.minor_share > balanced).nonzero().flatten().tolist():
            members = data.labels == label
            if other_suspicion[members & other].mean() > suspicion[members & left_out].mean():
                left_out = torch.where(members, other, left_out)
                suspicion = torch.where(members, other_suspicion, suspicion)
                after = torch.where(members[:, None], other_after, after)
    trusted = torch.where(left_out, suspicion.max() + 1, suspicion)
    extra_set = surely_clean(trusted, after, data.labels, clean_below, sure_above)
    return Examination(extra_set, split, left_out, suspicion)
