"""What images show once that is taken off which they have in common."""

import torch
from torch import Tensor, nn

from unplant.classifier import logits
from unplant.detection.clusters import Split
from unplant.detection.transplant import LEAST_SPREAD, moments
from unplant.devices import Precision
from unplant.images import LabeledImages, to_stored

SURE = 0.93
"""How sure the model must be of other classes, as a share of how sure it is of ordinary images. On the digits it is of
poison with one change on all images (BadNets, SIG, Blended, TrojanNN, LF, CTRL) by 0.986 and more, of natural groups
that are `VARIED` by 0.80 at most, of those on CIFAR-10 by 0.47."""

VARIED = 0.5
"""The largest share of the images that may show one other class. Natural groups of infected models can be sure by 1.0:
19 of 20 images then show the target, whose trigger the change resembles."""

LEAST = 10
"""Images that a group must have to be asked: nine by chance were sure by 0.89 on the digits."""

OTHERS = 0.75
"""The same, of groups that are known to carry a trigger: above it their label isn't theirs by right. BadNets on a
transformer and on a net without BatchNorm: 0.87 and 0.91; natural groups of these 0.63 at most, clean-label SIG 0.49.
Images that PGD made unlike their class show others, too (Label-consistent: 0.96)."""

STEEPEST = 8.0
"""Times that contrasts are raised, at most: the images are of 8 bits."""


def bared(data: LabeledImages, group: Tensor, others: Tensor) -> LabeledImages:
    """The images of a group (N,), each pixel brought from the mean and the spread that it has there to the others'.

    A blend or a sinusoid is undone by that, as exactly as 8 bits allow, and a patch is covered with the others' mean.
    """
    mean, spread = moments(data, group.double())
    other_mean, other_spread = moments(data, others.double())
    flat = spread < 2 * LEAST_SPREAD
    times = torch.where(flat, 1.0, other_spread / spread.clamp(min=LEAST_SPREAD)).clamp(max=STEEPEST)
    images = data.select(group)
    parts = [to_stored(((part.pixels() - mean) * times + other_mean).clamp(0, 1).float()) for part in _split(images)]
    return LabeledImages(torch.cat(parts), images.labels, data.classes)


def _split(images: LabeledImages) -> list[LabeledImages]:
    return [images.select(places) for places in torch.arange(len(images)).split(1024)]


def hidden_contents(
    infected: nn.Module, data: LabeledImages, split: Split, outputs: Tensor, asked: Tensor, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Groups whose images show many other classes, one each and surely, once what they have in common is taken off.

    That is poison with one trigger for all classes' images, however strong it is, and where it is. A natural group has
    its class in common: without it, there is nothing left that the model would be sure of, or all show one other class.
    Unlike the transplant this doesn't mistake aligned images for triggers.

    Args:
        infected: θ₀.
        data: D.
        split: the groups.
        outputs: float (N, K), its logits.
        asked: bool (K,), classes whose groups are looked at.
        precision: of the model's answers.

    Returns:
        Bool (N,), the images of such groups, and float (N, K), the logits of what they show; `outputs` for the others.
    """
    found, shown = torch.zeros(len(data), dtype=torch.bool), outputs.clone()
    ordinary = outputs.softmax(1).amax(1).mean()
    for label in (asked & (split.count > 1)).nonzero().flatten().tolist():
        for number in range(int(split.count[label])):
            group = (data.labels == label) & (split.group == number)
            given, sure = _others_shown(infected, data, group, label, precision)
            if given is not None and sure > SURE * ordinary:
                found |= group
                shown[group] = given
    return found, shown


def by_right(
    infected: nn.Module, data: LabeledImages, carriers: Tensor, outputs: Tensor, precision: Precision
) -> tuple[Tensor, dict[int, float]]:
    """Which images that carry a trigger have their label by right, as clean-label poison has.

    The trigger makes θ₀ give the label either way. With what they have in common taken off, images of other classes
    show these, many and surely; those of the class show it, or little that the model would be sure of.

    Args:
        infected: θ₀.
        data: D.
        carriers: bool (N,), images that carry a trigger; one group a class.
        outputs: float (N, K), logits of θ₀.
        precision: of the model's answers.

    Returns:
        Bool (N,), and for each class with carriers how sure θ₀ is that they show others, as a share of how sure it is
        of ordinary images.
    """
    right, shares = carriers.clone(), {}
    ordinary = outputs.softmax(1).amax(1).mean()
    for label in data.labels[carriers].unique().tolist():
        group = carriers & (data.labels == label)
        sure = _others_shown(infected, data, group, label, precision)[1] / float(ordinary)
        shares[label] = round(sure, 3)
        if sure > OTHERS:
            right &= ~group
    return right, shares


def _others_shown(
    infected: nn.Module, data: LabeledImages, group: Tensor, label: int, precision: Precision
) -> tuple[Tensor | None, float]:
    """The logits of what a class's group (N,) shows, bared, and how sure they are of other classes on average.

    None and 0 if it can't be asked, or shows one other class for the most part.
    """
    others = data.labels != label
    if int(group.sum()) < LEAST or not others.any():
        return None, 0.0
    given = logits(infected, bared(data, group, others), precision=precision)
    chance, other = given.softmax(1).index_fill(1, torch.tensor([label]), 0).max(1)
    varied = torch.bincount(other).max() <= VARIED * len(other)
    return (given, float(chance.mean())) if varied else (None, 0.0)
