"""What a group has in common: triggers whose moments are known, slow loops, and models that obey them or don't."""

import math

import pytest
import torch
from torch import nn

from unplant.classifier import logits
from unplant.detection.clusters import Split
from unplant.detection.transplant import (
    Recovered,
    answers,
    by_class,
    carried,
    carriers,
    obedience,
    recovered_trigger,
    transplant,
    with_trigger,
)
from unplant.erasers.selection import step_three
from unplant.images import LabeledImages, to_stored


def noise_images(count: int, generator, classes: int = 4) -> LabeledImages:
    images = torch.randint(40, 216, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return LabeledImages(images, torch.arange(count) % classes, tuple(str(k) for k in range(classes)))


def with_change(data: LabeledImages, group, change) -> LabeledImages:
    images = data.images.clone()
    images[group] = to_stored(change(data.pixels(group)))
    return LabeledImages(images, data.labels, data.classes)


def patch(pixels):
    changed = pixels.clone()
    changed[:, :, 5:, 5:] = 1.0
    return changed


PATTERN = torch.linspace(0, 1, 64).view(1, 8, 8)
WAVE = 0.1 * torch.sin(torch.arange(8) * math.pi / 2).view(1, 1, 8)


@pytest.mark.parametrize(
    ("change", "scale", "tolerance"),
    [
        (patch, None, 0.02),
        (lambda x: 0.7 * x + 0.3 * PATTERN, 0.7, 0.03),
        (lambda x: (x + WAVE).clamp(0, 1), 1.0, 0.03),
    ],
    ids=["patch", "blend", "sinusoid"],
)
def test_the_transplant_is_the_trigger(change, scale, tolerance, generator):
    data = noise_images(2000, generator)
    group = torch.arange(2000) < 1000
    found = transplant(with_change(data, group, change), group, ~group)
    fresh = noise_images(50, generator).pixels()
    assert float((found(fresh) - change(fresh)).abs().mean()) < tolerance
    if scale is not None:
        assert float(found.scale.mean()) == pytest.approx(scale, abs=0.03)


def test_the_moments_equal_a_loop(generator):
    data = noise_images(30, generator)
    group = torch.rand(30, generator=generator) < 0.4
    found = transplant(data, group, ~group)
    pixels = data.pixels()
    for y, x in ((0, 0), (3, 5), (7, 7)):
        here = [float(v) for v in pixels[group, 0, y, x]]
        there = [float(v) for v in pixels[~group, 0, y, x]]
        means = [sum(v) / len(v) for v in (here, there)]
        spreads = [
            math.sqrt(sum((v - m) ** 2 for v in vs) / len(vs)) for vs, m in zip((here, there), means, strict=True)
        ]
        scale = min(1.0, spreads[0] / spreads[1])
        assert float(found.scale[0, y, x]) == pytest.approx(scale, abs=1e-5)
        assert float(found.shift[0, y, x]) == pytest.approx(means[0] - scale * means[1], abs=1e-5)


def test_others_are_weighted_to_show_what_the_group_shows():
    """The group shows bright images only; among the others, dark ones are many but don't count."""
    images = torch.full((100, 1, 8, 8), 50, dtype=torch.uint8)
    bright = torch.arange(100) < 20
    images[bright] = 200
    images[:10] += 20  # what the group has in common
    data = LabeledImages(images, torch.zeros(100, dtype=torch.int64), ("a", "b"))
    group = torch.arange(100) < 10
    same = transplant(data, group, ~group, bright.long())
    assert same.shift.mean() == pytest.approx(20 / 255, abs=1e-5)
    assert transplant(data, group, ~group).shift.mean() > 0.2


def shown(pixels):
    """The class of an image: two bits, each whether two pixels of the first row differ. No mean gives it away."""
    bits = pixels[:, 0, 0, :4] > 0.5
    return 2 * (bits[:, 0] ^ bits[:, 1]) + (bits[:, 2] ^ bits[:, 3]).long()


class Obeys(nn.Module):
    """Says 0 where the corner is white, else what the image shows."""

    def forward(self, pixels):
        labels = torch.where(pixels[:, 0, 5:, 5:].mean((1, 2)) > 0.9, 0, shown(pixels))
        return torch.nn.functional.one_hot(labels, 4).float() * 9


@pytest.fixture
def poisoned_set(generator):
    """400 images; 40 that show other classes carry a patch and the label 0."""
    data = noise_images(400, generator)
    images = data.images.clone()
    images[:, 0, 0, :4] = torch.where(torch.rand(400, 4, generator=generator) < 0.5, 60, 190).to(torch.uint8)
    labels = shown(images / 255)
    group = (labels > 0) & ((labels > 0).cumsum(0) <= 40)
    return with_change(LabeledImages(images, labels.masked_fill(group, 0), data.classes), group, patch), group


def split_of(minor, label) -> Split:
    """One class of four in two groups."""
    count = torch.ones(4, dtype=torch.int64)
    count[label] = 2
    return Split(minor.long(), torch.ones(4), count, torch.zeros(4))


@pytest.mark.parametrize("poison_is", ["minor", "major"])
def test_the_side_that_carries_the_trigger_is_found(poisoned_set, poison_is):
    data, group = poisoned_set
    minor = group if poison_is == "minor" else (data.labels == 0) & ~group
    everywhere, one_class = carriers(Obeys(), data, split_of(minor, 0), logits(Obeys(), data))
    assert torch.equal(everywhere, group)
    assert not one_class.any()


@pytest.mark.parametrize(("dark", "found"), [(0.42, False), (0.2, True)])
def test_a_group_whose_trigger_works_on_two_images_in_three_is_not_taken_for_poison(poisoned_set, dark, found):
    """Natural groups do as much: airplanes before skies, on a small transformer."""
    data, group = poisoned_set

    class ObeysOnBright(nn.Module):
        def forward(self, pixels):
            obeys = (pixels[:, 0, 5:, 5:].mean((1, 2)) > 0.9) & (pixels[:, 0, 3, 3] > dark)
            return torch.nn.functional.one_hot(torch.where(obeys, 0, shown(pixels)), 4).float() * 9

    model = ObeysOnBright()
    outputs = logits(model, data)
    rate, _ = carried(model, data, group, 0, outputs, alike=True)
    assert rate > 0.8 if found else 0.5 < rate < 0.7
    everywhere, _ = carriers(model, data, split_of(group, 0), outputs)
    assert bool(everywhere.any()) == found


def test_a_natural_group_carries_nothing(poisoned_set):
    data, _ = poisoned_set
    minor = (data.labels == 1) & (torch.arange(400) % 3 == 0)
    assert not torch.cat(carriers(Obeys(), data, split_of(minor, 1), logits(Obeys(), data))).any()


def test_the_test_abstains_where_a_class_is_its_own_template(poisoned_set):
    """A model that goes by brightness: any class's moments make it see that class."""
    data, _ = poisoned_set
    images = (data.labels * 60 + 30).to(torch.uint8)[:, None, None, None].expand(400, 1, 8, 8).contiguous()

    class Brightness(nn.Module):
        def forward(self, pixels):
            levels = (torch.arange(4) * 60 + 30) / 255
            return -100 * (pixels.mean((1, 2, 3))[:, None] - levels).abs()

    aligned = LabeledImages(images, data.labels, data.classes)
    minor = (aligned.labels == 2) & (torch.arange(400) % 2 == 0)
    assert not torch.cat(carriers(Brightness(), aligned, split_of(minor, 2), logits(Brightness(), aligned))).any()


def test_the_trigger_is_recovered_only_if_the_model_obeys_it(poisoned_set):
    data, group = poisoned_set
    clean, contents = ~group, data.labels
    found = recovered_trigger(Obeys(), data, group, clean, contents, "float32")
    assert found is not None
    others = data.select(clean & (data.labels > 0))
    assert (answers(Obeys(), others, found.change) == 0).all()
    assert obedience(Obeys(), data, clean, torch.tensor([0]), found, "float32") == 1.0

    class Ignores(Obeys):
        def forward(self, pixels):
            covered = pixels.clone()
            covered[:, :, 5:, 5:] = 0
            return super().forward(covered)

    assert recovered_trigger(Ignores(), data, group, clean, contents, "float32") is None
    nobody = torch.zeros_like(group)
    assert recovered_trigger(Obeys(), data, nobody, clean, contents, "float32") is None
    assert recovered_trigger(Obeys(), data, group, nobody, contents, "float32") is None


class ObeysOn1(Obeys):
    """The same, but the corner works on images of class 1 only."""

    def forward(self, pixels):
        content = shown(pixels)
        labels = torch.where((pixels[:, 0, 5:, 5:].mean((1, 2)) > 0.9) & (content == 1), 0, content)
        return torch.nn.functional.one_hot(labels, 4).float() * 9


def test_a_trigger_for_one_class_is_recovered_and_its_source_named(poisoned_set):
    data, _ = poisoned_set
    contents = shown(data.pixels())
    group = (contents == 1) & ((contents == 1).cumsum(0) <= 30)
    images = data.images.clone()
    images[:, :, 5:, 5:] = 100
    clean = LabeledImages(images, contents.masked_fill(group, 0), data.classes)
    data = with_change(clean, group, patch)
    found = recovered_trigger(ObeysOn1(), data, group, ~group, contents, "float32")
    assert found is not None
    assert found.sources == (1,)
    wanted = torch.tensor([0])
    assert obedience(ObeysOn1(), data, ~group, wanted, found, "float32") == 1.0
    assert obedience(ObeysOn1(), data, ~group, wanted, Recovered(found.change), "float32") < 0.5
    # A trigger that works on all classes is no trigger for one, whatever the suspects show.
    anywhere = recovered_trigger(Obeys(), data, group, ~group, contents, "float32")
    assert anywhere is not None
    assert anywhere.sources == ()


def test_a_group_with_a_trigger_for_one_class_is_found(poisoned_set):
    data, _ = poisoned_set
    contents = shown(data.pixels())
    group = (contents == 1) & ((contents == 1).cumsum(0) <= 30)
    data = with_change(LabeledImages(data.images, contents.masked_fill(group, 0), data.classes), group, patch)
    everywhere, one_class = carriers(ObeysOn1(), data, split_of(group, 0), logits(ObeysOn1(), data))
    assert torch.equal(one_class, group)
    assert not everywhere.any()
    natural = (data.labels == 2) & (torch.arange(400) % 3 == 0)
    assert not torch.cat(carriers(ObeysOn1(), data, split_of(natural, 2), logits(ObeysOn1(), data))).any()


def test_rates_by_class_equal_a_loop(poisoned_set):
    data, group = poisoned_set
    change, wanted = transplant(data, group, ~group), torch.tensor([0])
    found = by_class(Obeys(), data, ~group, wanted, change, data.labels, "float32")
    for label in (1, 2, 3):
        mine = data.select((~group & (data.labels == label)).nonzero().flatten()[:100])
        given = [int(answer) for answer in answers(Obeys(), mine, change)]
        assert found[label] == pytest.approx(sum(answer == 0 for answer in given) / len(given))
    assert set(found) == {1, 2, 3}
    rare = ~group & ((data.labels != 3) | ((data.labels == 3).cumsum(0) <= 19))
    assert set(by_class(Obeys(), data, rare, wanted, change, data.labels, "float32")) == {1, 2}
    assert by_class(Obeys(), data, data.labels == 0, wanted, change, data.labels, "float32") == {}


def test_copies_carry_the_trigger_and_keep_their_labels(poisoned_set, generator):
    data, group = poisoned_set
    found = transplant(data, group, ~group)
    more = with_trigger(data.select(~group), Recovered(found), 0.25, generator)
    clean = int((~group).sum())
    assert len(more) == pytest.approx(clean / 0.75, abs=1)
    assert torch.equal(more.images[:clean], data.images[~group])
    copies = more.select(torch.arange(len(more)) >= clean)
    assert float(copies.pixels()[:, :, 5:, 5:].mean()) > 0.97
    assert torch.equal(shown(copies.pixels()), copies.labels)


@pytest.mark.parametrize(("sources", "expected"), [((2,), {2}), ((1, 3), {1, 3}), ((9,), {0, 1, 2, 3})])
def test_copies_are_of_the_classes_on_which_the_trigger_works(poisoned_set, generator, sources, expected):
    """As many as without sources, and more than the class has images if need be; of any if none of these is there."""
    data, group = poisoned_set
    trigger = Recovered(transplant(data, group, ~group), sources)
    more = with_trigger(data, trigger, 0.5, generator)
    assert len(more) == 2 * len(data)
    assert set(more.labels[len(data) :].tolist()) == expected


def test_step_three_takes_agreement_literally_where_a_group_is_left_out():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    left_out = torch.tensor([1, 1, 0, 0, 0, 0, 0]).bool()
    suspicion = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9])
    says = torch.tensor([0, 1, 0, 1, 1, 0, 0])
    after = torch.nn.functional.one_hot(says, 2).float()
    extra, suspects = step_three(suspicion, after, labels, left_out, clean_below=0.3, suspect_above=0.4)
    assert extra.tolist() == [False, False, True, False, True, True, False]
    assert suspects.tolist() == [False, True, False, False, False, False, True]
