"""Crops, flips and rotations against slow loops and exact symmetries."""

import math

import pytest
import torch

from unplant.augment import Augment, augment
from unplant.errors import UsageError


@pytest.fixture
def pixels():
    return torch.rand(40, 3, 6, 9, generator=torch.Generator().manual_seed(5))


def only(**settings):
    """These changes and no others."""
    return Augment(**{"padding": 0, "flip": False, **settings})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def shifted(images, down, right):
    """The images moved by whole pixels, zeros where they came from outside; pixel by pixel."""
    moved = torch.zeros_like(images)
    height, width = images.shape[2:]
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                moved[:, :, y, x] = images[:, :, y + down, x + right]
    return moved


@pytest.mark.parametrize("padding", [1, 2])
def test_a_crop_is_one_of_the_shifts_and_all_shifts_occur(pixels, padding):
    offsets = [(d, r) for d in range(-padding, padding + 1) for r in range(-padding, padding + 1)]
    many = pixels.repeat(5, 1, 1, 1)
    cropped = augment(many, only(padding=padding), seeded())
    matches = torch.stack([(shifted(many, *offset) == cropped).flatten(1).all(1) for offset in offsets])
    assert (matches.sum(0) == 1).all()
    # 200 draws of 25 shifts: the chance that one is missed is below 25 · (24/25)^200 = 0.7 %, and the seed is fixed.
    assert matches.any(1).all()


def test_a_flip_mirrors_about_half_of_the_images(pixels):
    flipped = augment(pixels, only(flip=True), seeded())
    mirrored = 0
    for before, after in zip(pixels, flipped, strict=True):
        same, turned = torch.equal(after, before), torch.equal(after, before[:, :, range(8, -1, -1)])
        assert same != turned
        mirrored += turned
    assert 10 <= mirrored <= 30  # 40 fair coins: ± 3 standard deviations


def test_without_settings_nothing_happens(pixels):
    assert torch.equal(augment(pixels, only(), seeded()), pixels)


@pytest.mark.parametrize(
    ("channels", "height", "explicit"),
    [
        (1, 16, {"padding": 1, "flip": False}),
        (3, 16, {"padding": 1, "flip": True}),
        (3, 32, {"padding": 4, "flip": True}),
        (1, 70, {"padding": 8, "flip": False}),
    ],
)
def test_the_defaults_follow_the_images(channels, height, explicit):
    images = torch.rand(30, channels, height, 12, generator=seeded())
    changed = augment(images, Augment(), seeded(1))
    assert torch.equal(changed, augment(images, Augment(**explicit), seeded(1)))
    assert not torch.equal(changed, images)


@pytest.mark.parametrize("shape", [(8, 8), (6, 9)])
def test_a_tiny_rotation_is_nearly_the_identity(shape):
    pixels = torch.rand(6, 1, *shape, generator=seeded())
    turned = augment(pixels, only(rotation=1e-4), seeded(1))
    # 1e-4 degrees moves no pixel by more than 1e-5 of a pixel, plus float32 noise of the grid.
    assert (turned - pixels).abs().max() < 1e-4


@pytest.mark.parametrize(("height", "width"), [(9, 9), (7, 11), (12, 6)])
def test_a_rotation_equals_a_slow_bilinear_loop(height, width):
    pixels, largest = torch.rand(3, 1, height, width, generator=seeded(3)), 40.0
    turned = augment(pixels, only(rotation=largest), seeded(4))
    angles = (torch.rand(3, generator=seeded(4)) * 2 - 1) * math.radians(largest)  # the contract: one draw per image
    assert angles.abs().max() > 0.2
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    for image, after, angle in zip(pixels, turned, angles.tolist(), strict=True):
        for y in range(height):
            for x in range(width):
                dx, dy = x - middle_x, y - middle_y
                from_x = middle_x + math.cos(angle) * dx - math.sin(angle) * dy
                from_y = middle_y + math.sin(angle) * dx + math.cos(angle) * dy
                left, top = math.floor(from_x), math.floor(from_y)
                value = 0.0
                for row, share_y in ((top, top + 1 - from_y), (top + 1, from_y - top)):
                    for column, share_x in ((left, left + 1 - from_x), (left + 1, from_x - left)):
                        if 0 <= row < height and 0 <= column < width:
                            value += share_y * share_x * float(image[0, row, column])
                assert float(after[0, y, x]) == pytest.approx(value, abs=2e-5)  # float32 coordinates up to 12


@pytest.mark.parametrize(
    "settings", [{"padding": 2}, {"flip": True}, {"rotation": 45}, {"padding": 1, "flip": True, "rotation": 180}]
)
def test_shape_range_and_randomness(settings):
    settings = only(**settings)
    pixels = (torch.rand(64, 3, 8, 8, generator=seeded()) * 1.4 - 0.2).clamp(0, 1)  # many exactly 0 and 1
    before, state = pixels.clone(), torch.get_rng_state()
    first, again, other = (augment(pixels, settings, seeded(seed)) for seed in (0, 0, 1))
    assert first.shape == pixels.shape
    assert first.dtype == pixels.dtype
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6  # the four weights of a bilinear sample add up to 1 in float32 only
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(pixels, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("settings", "message"), [({"padding": -1}, "padding"), ({"rotation": 181}, "rotation")])
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Augment(**settings)
