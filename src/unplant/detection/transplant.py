"""What a group of images has in common, pixel by pixel: an estimate of the trigger, and what the model makes of it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unplant.classifier import logits
from unplant.detection.clusters import Split
from unplant.devices import Precision
from unplant.images import LabeledImages, to_pixels, to_stored

LEAST_SPREAD = 1 / 255
"""Pixels that vary less among the trusted images are left as they are."""

ENOUGH = 4000
"""Images of a group that are looked at, at most."""

OBEYED = 0.5
"""Share of other images that must get the group's label for the transplant to count as a trigger."""

FAVOURED = 2
"""How much more often than D_ext the suspects must show a class that their trigger may be made for."""

TEMPLATE = 0.3
"""Where an ordinary class's own moments make the model see that class in more images than that, the test says nothing:
images are aligned so well, as digits are, that the mean of a class is an image of it."""


@dataclass(frozen=True, eq=False)
class Transplant:
    """Gives an image the mean and the spread that each pixel has in a group: x → scale · x + shift.

    A pasted patch has no spread, so it is pasted; a blend shrinks the spread and shifts the mean; a sinusoid shifts
    only. Triggers that differ from image to image (WaNet, Input-aware) have no such moments in common, and little is
    changed.

    Attributes:
        scale: float (C, H, W), at most 1.
        shift: float (C, H, W), in pixel units.
    """

    scale: Tensor
    shift: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1] → the same with what the group has in common."""
        scale, shift = self.scale.to(pixels.device), self.shift.to(pixels.device)
        return (pixels * scale + shift).clamp(0, 1)


def transplant(data: LabeledImages, group: Tensor, others: Tensor, contents: Tensor | None = None) -> Transplant:
    """Compares a group with other images, if possible with such as show the same.

    Args:
        data: the suspect set.
        group: bool (N,), at least one.
        others: bool (N,), at least one.
        contents: int64 (N,), what each image is thought to show; the others are then weighted so that they show each
            class as often as the group does.
    """
    weights = others.double()
    if contents is not None:
        wanted, there = (
            torch.bincount(contents[part], minlength=data.num_classes).double() for part in (group, others)
        )
        alike = torch.where(others, (wanted / there.clamp(min=1))[contents], 0.0)
        weights = alike if alike.any() else weights
    mean, spread = _moments(data, group.double())
    other_mean, other_spread = _moments(data, weights)
    scale = torch.where(other_spread < LEAST_SPREAD, 1.0, spread / other_spread.clamp(min=LEAST_SPREAD)).clamp(max=1)
    return Transplant(scale.float(), (mean - scale * other_mean).float())


def _moments(data: LabeledImages, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation of each pixel, float64 (C, H, W)."""
    counted = weights.nonzero().flatten()
    counted = counted[:: max(1, len(counted) // ENOUGH)]
    total = weights[counted].sum()
    first, second = torch.zeros(2, *data.shape, dtype=torch.float64)
    for places in counted.split(1024):
        pixels = data.pixels(places).double()
        weight = (weights[places] / total)[:, None, None, None]
        first += (pixels * weight).sum(0)
        second += (pixels.square() * weight).sum(0)
    return first, (second - first.square()).clamp(min=0).sqrt()


def answers(model: nn.Module, images: LabeledImages, change: Transplant, precision: Precision = "float32") -> Tensor:
    """Labels (N,) that the model gives to the images after the transplant, rounded to 8 bits."""
    changed = LabeledImages(to_stored(change(images.pixels())), images.labels, images.classes)
    return logits(model, changed, precision=precision).argmax(1)


def carriers(model: nn.Module, data: LabeledImages, split: Split, precision: Precision = "float32") -> Tensor:
    """Groups that carry a trigger that works on images of the other classes.

    A group's moments, against those of all other classes, are transplanted into images of other classes. If the
    model then sees the class in most of them, it isn't for their contents: ordinary classes don't pass on their label
    like that, and where they do (`TEMPLATE`), or where all groups of a class do, the test abstains. It needs no
    fine-tuning, and poisoned images that have their true label don't escape it.

    Returns:
        bool (N,), the images of such groups.
    """
    part = data.sample(500, torch.Generator().manual_seed(0))

    def obeyed(group: Tensor, label: int) -> float:
        others = part.select(part.labels != label)
        if not len(others) or not group.any():
            return 0.0
        change = transplant(data, group, data.labels != label)
        return float((answers(model, others, change, precision) == label).float().mean())

    found = torch.zeros(len(data), dtype=torch.bool)
    present = data.labels.unique().tolist()
    halved = [label for label in present if split.count[label] > 1]
    if not halved or len(present) < 2:
        return found
    ordinary = torch.tensor([obeyed(data.labels == label, label) for label in present[:: max(1, len(present) // 10)]])
    if ordinary.median() > TEMPLATE:
        return found
    for label in halved:
        groups = [(data.labels == label) & (split.group == number) for number in range(int(split.count[label]))]
        carrying = [group for group in groups if obeyed(group, label) > OBEYED]
        if len(carrying) < len(groups):
            found |= torch.stack(carrying).any(0) if carrying else False
    return found


@dataclass(frozen=True, eq=False)
class Recovered:
    """A transplant that works as a trigger.

    Attributes:
        change: puts it on images.
        sources: the classes on whose images alone it was seen to work (TaCT); empty: on images of any.
    """

    change: Transplant
    sources: tuple[int, ...] = ()


def recovered_trigger(
    infected: nn.Module, data: LabeledImages, suspects: Tensor, extra: Tensor, contents: Tensor, precision: Precision
) -> Recovered | None:
    """What the suspects have in common, if it works as a trigger: made visible, and usable with true labels.

    It counts as one if the infected model, shown it on images of D_ext, gives most of them a label that suspects have
    and that isn't theirs. A trigger for images of some classes only is tried on those, if the suspects give them away.

    Args:
        infected: θ₀.
        data: D.
        suspects: bool (N,).
        extra: bool (N,), D_ext.
        contents: int64 (N,), what each image is thought to show.
        precision: of the infected model's answers.
    """
    wanted, trusted = data.labels[suspects].unique(), extra & ~suspects
    if not len(wanted) or not trusted.any():
        return None
    change = transplant(data, suspects, trusted, contents)
    for sources in dict.fromkeys(((), favoured_classes(contents, suspects, trusted, data.num_classes))):
        found = Recovered(change, sources)
        if obedience(infected, data, trusted, wanted, found, precision) > OBEYED:
            return found
    return None


def favoured_classes(contents: Tensor, suspects: Tensor, trusted: Tensor, num_classes: int) -> tuple[int, ...]:
    """Classes that suspects show `FAVOURED` times as often as D_ext does, if most suspects show one of these."""
    here, there = (torch.bincount(contents[part], minlength=num_classes) / part.sum() for part in (suspects, trusted))
    favoured = (here > 0) & (here >= FAVOURED * there)
    return tuple(favoured.nonzero().flatten().tolist()) if here[favoured].sum() > 0.5 else ()


def obedience(
    model: nn.Module, data: LabeledImages, extra: Tensor, wanted: Tensor, trigger: Recovered, precision: Precision
) -> float:
    """Share of (at most 500) images of D_ext that get another label than theirs, one of those wanted, by the trigger.

    Of D_ext only classes count on which the trigger works, and not the wanted one, if it is one.
    """
    if trigger.sources:
        extra = extra & torch.isin(data.labels, torch.tensor(trigger.sources))
    part = data.select(extra).sample(500, torch.Generator().manual_seed(0))
    if len(wanted) == 1:
        part = part.select(part.labels != wanted)
    if not len(part):
        return 0.0
    given = answers(model, part, trigger.change, precision)
    return float(((given != part.labels) & torch.isin(given, wanted)).float().mean())


def with_trigger(data: LabeledImages, trigger: Transplant, share: float, generator: torch.Generator) -> LabeledImages:
    """The images, and copies of some of them with the trigger and their own labels: a share of the whole."""
    count = round(share / (1 - share) * len(data))
    copies = data.select(torch.randperm(len(data), generator=generator)[:count])
    parts = [to_stored(trigger(to_pixels(images))) for images in copies.images.split(1024)]
    images, labels = torch.cat([data.images, *parts]), torch.cat([data.labels, copies.labels])
    return LabeledImages(images, labels, data.classes)
