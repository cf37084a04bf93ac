"""What a group of images has in common, pixel by pixel: an estimate of the trigger, and what the model makes of it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unplant.classifier import logits
from unplant.detection.clusters import Split
from unplant.devices import Precision
from unplant.images import LabeledImages, in_proportion, to_pixels, to_stored

LEAST_SPREAD = 1 / 255
"""Pixels that vary less among the trusted images are left as they are."""

ENOUGH = 4000
"""Images of a group that are looked at, at most."""

OBEYED = 0.5
"""Share of other images that must get the group's label for the transplant to count as a trigger."""

CARRIED = 0.8
"""The same for a group that is taken for poison whether it loses its label or not. On CIFAR-10 triggers that are one
change make their class of 99 % of other images and more, Adaptive-Blend's poison of 60 % (it loses its label);
natural groups of 38 % at most on convolutional nets, airplanes of 65 % on a small transformer."""

OBEYED_BY_CLASS = 0.7
"""The same of the images of one class, for a trigger that works on some classes only. On CIFAR-10 a natural group of
deer makes deer of 66 % of another class's images, the next one 27 %; all-to-all triggers work on 70 to 97 %."""

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
    mean, spread = moments(data, group.double())
    other_mean, other_spread = moments(data, weights)
    scale = torch.where(other_spread < LEAST_SPREAD, 1.0, spread / other_spread.clamp(min=LEAST_SPREAD)).clamp(max=1)
    return Transplant(scale.float(), (mean - scale * other_mean).float())


def moments(data: LabeledImages, weights: Tensor) -> tuple[Tensor, Tensor]:
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


def carriers(
    model: nn.Module, data: LabeledImages, split: Split, outputs: Tensor, precision: Precision = "float32"
) -> tuple[Tensor, Tensor]:
    """Groups that carry a trigger that works on images of the other classes, or of one of them.

    A group's moments, against those of all other classes, are transplanted into images of other classes. If the
    model then sees the class in so many, it isn't for their contents: ordinary classes don't pass on their label
    like that, and where they do (`TEMPLATE`), or where all groups of a class do, the test abstains. It needs no
    fine-tuning, and poisoned images that have their true label don't escape it.

    Args:
        model: the infected one.
        data: D.
        split: the groups.
        outputs: float (N, K), the model's logits.
        precision: of the model's answers.

    Returns:
        Bool (N,) each: the images of groups whose trigger works on all classes' images, and on one class's.
    """
    found = torch.zeros(2, len(data), dtype=torch.bool)
    present = data.labels.unique().tolist()
    halved = [label for label in present if split.count[label] > 1]
    if not halved or len(present) < 2:
        return found[0], found[1]
    some = present[:: max(1, len(present) // 10)]
    ordinary = [carried(model, data, data.labels == label, label, outputs, precision) for label in some]
    tests = [test for test in range(2) if torch.tensor([rates[test] for rates in ordinary]).median() <= TEMPLATE]
    for label in halved:
        groups = [(data.labels == label) & (split.group == number) for number in range(int(split.count[label]))]
        rates = [carried(model, data, group, label, outputs, precision, alike=True) for group in groups]
        for test in tests:
            enough = (CARRIED, OBEYED_BY_CLASS)[test]
            carrying = [group for group, rate in zip(groups, rates, strict=True) if rate[test] > enough]
            if 0 < len(carrying) < len(groups):
                found[test] |= torch.stack(carrying).any(0)
                break
    return found[0], found[1]


def carried(
    model: nn.Module,
    data: LabeledImages,
    group: Tensor,
    label: int,
    outputs: Tensor,
    precision: Precision = "float32",
    *,
    alike: bool = False,
) -> tuple[float, float]:
    """How a group's label passes on by its moments: to images of all other classes, and of the one where it works best.

    The latter counts only images that the model gets right as they are. If `alike`, the moments are compared there with
    those of images that show what the group shows, by the model's second opinion.

    Returns:
        Shares in [0, 1]; see `carriers`.
    """
    others = data.labels != label
    if not others.any() or not group.any():
        return 0.0, 0.0
    change, wanted = transplant(data, group, others), torch.tensor([label])
    everywhere = obedience(model, data, others, wanted, Recovered(change), precision)
    opinion = outputs.scatter(1, data.labels[:, None], -torch.inf).argmax(1)
    if alike:
        change = transplant(data, group, others, torch.where(group, opinion, data.labels))
    known = others & (outputs.argmax(1) == data.labels)
    rates = by_class(model, data, known, wanted, change, opinion[group], precision)
    return everywhere, max(rates.values(), default=0.0)


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
    and that isn't theirs; or those of one class. Its sources are then the classes on most images of which it works.

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
    if obedience(infected, data, trusted, wanted, Recovered(change), precision) > OBEYED:
        return Recovered(change)
    rates = by_class(infected, data, trusted, wanted, change, contents[suspects], precision)
    sources = tuple(label for label, rate in rates.items() if rate > OBEYED)
    return Recovered(change, sources) if sources else None


def by_class(
    model: nn.Module,
    data: LabeledImages,
    extra: Tensor,
    wanted: Tensor,
    change: Transplant,
    contents: Tensor,
    precision: Precision,
) -> dict[int, float]:
    """Of each class, the share of (at most 100) images of D_ext to which the change gives one wanted label.

    Only the ten classes most often among the contents, those of them with at least 20 images, and not the wanted one,
    if it is one.
    """
    part = torch.zeros_like(extra)
    seen = torch.bincount(contents, minlength=data.num_classes).argsort(descending=True, stable=True)[:10]
    for label in seen.tolist():
        places = (extra & (data.labels == label)).nonzero().flatten()
        if len(places) >= 20 and [label] != wanted.tolist():
            part[places[:: max(1, len(places) // 100)][:100]] = True
    if not part.any():
        return {}
    images = data.select(part)
    given = answers(model, images, change, precision)
    moved = torch.isin(given, wanted) & (given != images.labels)
    pairs = torch.bincount(images.labels[moved] * data.num_classes + given[moved], minlength=data.num_classes**2)
    counts = torch.bincount(images.labels, minlength=data.num_classes)
    rates = pairs.view(data.num_classes, -1).amax(1) / counts.clamp(min=1)
    return {label: float(rates[label]) for label in counts.nonzero().flatten().tolist()}


def obedience(
    model: nn.Module, data: LabeledImages, extra: Tensor, wanted: Tensor, trigger: Recovered, precision: Precision
) -> float:
    """Share of (at most 500) images of D_ext that get another label than theirs, one of those wanted, by the trigger.

    Of D_ext only classes count on which the trigger works, and not the wanted one, if it is one.
    """
    if trigger.sources:
        extra = extra & torch.isin(data.labels, torch.tensor(trigger.sources))
    places = extra.nonzero().flatten()
    part = data.select(places[in_proportion(data.labels[places], 500, torch.Generator().manual_seed(0))])
    if len(wanted) == 1:
        part = part.select(part.labels != wanted)
    if not len(part):
        return 0.0
    given = answers(model, part, trigger.change, precision)
    return float(((given != part.labels) & torch.isin(given, wanted)).float().mean())


def with_trigger(data: LabeledImages, trigger: Recovered, share: float, generator: torch.Generator) -> LabeledImages:
    """The images, and copies of some of them with the trigger and their own labels: a share of the whole.

    Copied are images of the trigger's sources, if it has any that are there.
    """
    count = round(share / (1 - share) * len(data))
    order = torch.randperm(len(data), generator=generator)
    if trigger.sources:
        obeying = order[torch.isin(data.labels[order], torch.tensor(trigger.sources))]
        order = obeying.repeat(-(-count // len(obeying))) if len(obeying) else order
    copies = data.select(order[:count])
    parts = [to_stored(trigger.change(to_pixels(images))) for images in copies.images.split(1024)]
    images, labels = torch.cat([data.images, *parts]), torch.cat([data.labels, copies.labels])
    return LabeledImages(images, labels, data.classes)
