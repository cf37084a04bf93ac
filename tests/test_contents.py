"""What is left of a group's images without what they have in common."""

import math

import pytest
import torch
from torch import nn

from unplant.classifier import logits
from unplant.detection.clusters import Split
from unplant.detection.contents import LEAST, bared, by_right, hidden_contents
from unplant.images import LabeledImages, to_stored

PATTERN = torch.linspace(0, 1, 64).view(1, 8, 8)
WAVE = 0.1 * torch.sin(torch.arange(8) * math.pi / 2).view(1, 1, 8)


def patch(pixels):
    """In the corner."""
    changed = pixels.clone()
    changed[:, :, :2, :2] = 1.0
    return changed


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (lambda x: 0.8 * x + 0.2 * PATTERN, 0.02),
        (lambda x: 0.2 * x + 0.8 * PATTERN, 0.03),
        (lambda x: (x + WAVE).clamp(0, 1), 0.02),
    ],
    ids=["blend", "strong blend", "sinusoid"],
)
def test_what_is_in_common_is_undone(change, tolerance, generator):
    plain = torch.randint(40, 216, (2000, 1, 8, 8), generator=generator, dtype=torch.uint8)
    group = torch.arange(2000) < 1000
    images = plain.clone()
    images[group] = to_stored(change(images[group] / 255))
    data = LabeledImages(images, torch.arange(2000) % 4, tuple("abcd"))
    found = bared(data, group, ~group)
    assert torch.equal(found.labels, data.labels[group])
    assert float((found.pixels() - plain[group] / 255).abs().mean()) < tolerance
    assert float((images[group] / 255 - plain[group] / 255).abs().mean()) > 2 * tolerance


class Quarters(nn.Module):
    """Sees which quarter of the image is bright, and obeys a white corner: class 0."""

    def __init__(self, gain: float = 40.0) -> None:
        super().__init__()
        self.gain = gain
        self.anything = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        halves = x.unfold(2, 4, 4).unfold(3, 4, 4)
        seen = halves[..., 1:, 1:].mean((1, 4, 5)).flatten(1)
        obeyed = (x[:, :, :2, :2].amin((1, 2, 3)) > 0.97).float()
        return self.gain * seen + 100 * obeyed[:, None] * torch.tensor([1.0, 0, 0, 0]) + self.anything


def pictures(contents, generator):
    """A bright quarter each, and noise."""
    bright = torch.nn.functional.one_hot(contents, 4).view(-1, 1, 2, 2).float()
    light = bright.repeat_interleave(4, 2).repeat_interleave(4, 3) * 0.6
    return light + 0.3 * torch.rand(light.shape, generator=generator)


@pytest.mark.parametrize(
    ("kind", "count", "asked", "found"),
    [
        ("poison", 60, True, True),
        ("poison", LEAST, True, True),
        ("poison", LEAST - 1, True, False),
        ("poison", 60, False, False),
        ("of one source", 60, True, False),
        ("a natural kind", 60, True, False),
        ("covers", 60, True, False),
    ],
)
def test_poison_shows_other_classes_without_its_trigger(kind, count, asked, found, generator):
    """Each image its own, not all the same one; what a class has in common hides nothing."""
    labels = torch.arange(400) % 4
    group = torch.zeros(400, dtype=torch.bool)
    group[(labels == 0).nonzero().flatten()[:count]] = True
    contents = labels.clone()
    if kind == "poison":
        contents[group] = torch.arange(count) % 3 + 1
    elif kind == "of one source":
        contents[group] = 2
    pixels = pictures(contents, generator)
    if kind == "a natural kind":
        pixels[group, :, 6:, 6:] += 0.3
    else:
        pixels[group] = patch(pixels[group])
    data, model = LabeledImages(to_stored(pixels.clamp(0, 1)), labels, tuple("abcd")), Quarters()
    outputs = logits(model, data)
    assert torch.equal(outputs.argmax(1), labels)
    split = Split(group.long(), torch.ones(4), torch.tensor([2, 1, 1, 1]), torch.tensor([count / 100, 0.0, 0.0, 0.0]))
    wanted = torch.tensor([asked, True, True, True])
    hiding, shown = hidden_contents(model, data, split, outputs, wanted, "float32")
    assert torch.equal(hiding, group if found else torch.zeros_like(group))
    assert torch.equal(shown[~hiding], outputs[~hiding])
    if found:
        assert torch.equal(shown[group].argmax(1), contents[group])


@pytest.mark.parametrize(
    ("theirs", "others", "right"), [(0.0, 3, False), (0.1, 3, False), (0.6, 3, True), (1.0, 3, True), (0.0, 1, True)]
)
def test_carriers_have_their_label_by_right_unless_they_show_many_other_classes(theirs, others, right, generator):
    """60 images of class 0 carry the patch; that share of them shows class 0, the rest so many others."""
    contents, carriers = torch.arange(400) % 4, torch.arange(400) < 60
    contents[:60] = torch.where(torch.arange(60) < theirs * 60, 0, 1 + torch.arange(60) % others)
    pixels = pictures(contents, generator)
    pixels[carriers] = patch(pixels[carriers])
    data = LabeledImages(to_stored(pixels), torch.where(carriers, 0, contents), tuple("abcd"))
    model = Quarters(8)  # not sure of noise
    outputs = logits(model, data)
    assert (outputs[carriers].argmax(1) == 0).all(), "θ₀ gives the label either way"
    found, shares = by_right(model, data, carriers, outputs, "float32")
    assert torch.equal(found, carriers & right)
    assert set(shares) == {0}
    assert (shares[0] > 0.75) == (not right)
