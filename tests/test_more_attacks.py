"""The attacks in the frequency domain, by quantisation, with cover images, and on one source class."""

import math

import numpy as np
import pytest
import scipy.fft
import torch

from unplant.attacks import parse_attack, triggers
from unplant.attacks.cosines import cosines
from unplant.errors import UsageError
from unplant.images import LabeledImages, to_pixels, to_stored
from unplant.planting import TrainConfig, plant, poison_only
from unplant.poisoning import Attack, choose, poison, triggered_test_set

each_shape = pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 8, 8), (3, 32, 32), (1, 24, 9), (3, 9, 25), (3, 40, 40)], ids=str
)
NEW = ("adaptive_blend", "adaptive_patch", "bpp", "ctrl", "lf", "tact")


def random_images(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def labels_of(pixels):
    return torch.zeros(len(pixels), dtype=torch.int64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def data():
    """200 random images of 5 classes, 40 each."""
    return LabeledImages(random_images(200, 3, 8, 8), torch.arange(200) * 3 % 5, tuple("abcde"))


@pytest.mark.parametrize(
    ("name", "preset", "settings"),
    [
        ("bpp", "released", {"levels": 8, "dither": False}),
        ("bpp", "backdoorbench", {"levels": 8, "dither": False}),
        ("ctrl", "released", {"magnitude": 100 / 255, "training_magnitude": 100 / 255, "lower": 15, "upper": 31}),
        ("ctrl", "backdoorbench", {"magnitude": 100 / 255, "training_magnitude": 100 / 255}),
        ("ctrl", "weak-training", {"magnitude": 100 / 255, "training_magnitude": 50 / 255}),
        ("adaptive_blend", "toolbox", {"alpha": 0.2, "training_alpha": 0.15, "pieces": 16, "hidden": 0.5}),
        (
            "adaptive_patch",
            "toolbox",
            {"training_opacities": (0.5, 0.2, 0.5, 0.3), "test_opacities": (1, 0, 1, 0)},
        ),
        (
            "adaptive_patch",
            "toolbox-gtsrb",
            {"training_opacities": (0.5, 0.2, 0.5, 0.3), "test_opacities": (0, 1, 0, 1)},
        ),
        ("tact", "backdoorbench", {"size": 3, "pattern": "white", "margin": 0}),
    ],
)
def test_presets_hold_the_published_constants(name, preset, settings):
    trigger = parse_attack(f"{name}:preset={preset}").trigger
    assert trigger == triggers[name].preset(preset)
    assert {key: getattr(trigger, key) for key in settings} == settings


@pytest.mark.parametrize(
    ("name", "covers", "recipe"),
    [
        ("adaptive_blend", 1.0, {}),
        ("adaptive_patch", 2.0, {}),
        ("bpp", 1.0, {}),
        ("ctrl", 0.0, {"clean_label": True, "poisoning_rate": 0.05}),
        ("lf", 0.0, {}),
        ("tact", 1.0, {"sources": (1,), "poisoning_rate": 0.02}),
    ],
)
def test_an_attack_comes_with_the_recipe_of_its_source(name, covers, recipe):
    attack = parse_attack(name)
    assert attack == Attack(trigger=triggers[name](), **recipe)
    assert attack.trigger.cover_ratio == covers
    assert attack.trigger.access == ("training" if name == "bpp" else "data")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lf:amplitude=12", "did you mean 12/255"),
        ("lf:frequencies=9", "frequencies must be .*8, got 9"),
        ("lf:preset=paper", "lf has no preset 'paper'; there are: none"),
        ("bpp:levels=1", "levels must be .*2, got 1"),
        ("bpp:dither=8", "dither must be"),
        ("ctrl:magnitude=100", "magnitude must be .*16, got 100"),
        ("ctrl:upper=32", "upper must be .*32, got 32"),
        ("ctrl:preset=paper", "no preset 'paper'; there are: released, backdoorbench, weak-training"),
        ("adaptive_blend:pieces=15", "pieces must be 4, 9, 16, .*, got 15"),
        ("adaptive_blend:hidden=1", "hidden must be"),
        ("adaptive_patch:size=0.6", "size must be"),
        ("adaptive_patch:test_opacities=1", "test_opacities must be"),
        ("tact:pattern=pink", "pattern must be 'checkerboard' or 'white', got 'pink'"),
    ],
)
def test_a_wrong_setting_is_one_line(spec, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_attack(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NEW)
@each_shape
def test_what_training_images_carry_keeps_shape_range_and_input(name, shape):
    pixels = to_pixels(random_images(6, *shape))
    before, state = pixels.clone(), torch.get_rng_state()
    for change in (triggers[name]().on_poison, triggers[name]().on_cover):
        changed = change(pixels, labels_of(pixels), seeded())
        assert changed.shape == pixels.shape
        assert changed.dtype == torch.float32
        assert 0 <= changed.min() <= changed.max() <= 1
        assert (changed != pixels).flatten(1).any(1).all()
        assert torch.equal(changed, change(pixels, labels_of(pixels), seeded()))
    assert torch.equal(pixels, before)
    assert torch.equal(torch.get_rng_state(), state)


# LF and CTRL: the DCT.


@pytest.mark.parametrize("size", [1, 2, 8, 9, 32])
def test_cosines_are_the_orthonormal_dct(size):
    identity = np.eye(size)
    expected = scipy.fft.dct(identity, norm="ortho", axis=0)  # column j: the DCT of the j-th unit vector
    assert np.abs(cosines(size).numpy() - expected).max() < 1e-14 * size


@each_shape
@pytest.mark.parametrize("frequencies", [2, 4, 8])
def test_lf_has_the_drawn_coefficients_up_to_one_factor(shape, frequencies):
    trigger = triggers["lf"](frequencies=frequencies, amplitude=0.1, pattern_seed=3)
    pattern = trigger.pattern(*shape).numpy()
    found = scipy.fft.dctn(pattern, norm="ortho", axes=(1, 2))
    drawn = np.zeros_like(found)
    drawn[:, :frequencies, :frequencies] = np.random.default_rng(3).standard_normal(
        (shape[0], frequencies, frequencies)
    )
    drawn[:, 0, 0] = 0
    factor = np.sum(found * drawn) / np.sum(drawn**2)
    assert np.abs(found - factor * drawn).max() < 1e-13
    assert factor > 0
    assert np.abs(pattern).max() == pytest.approx(0.1, abs=1e-15)


def test_lf_adds_its_pattern_and_clips():
    images = random_images(3, 3, 9, 11)
    trigger = triggers["lf"](amplitude=0.3)
    pattern = trigger.pattern(3, 9, 11).numpy()
    exact = np.clip(images.numpy() / 255 + pattern, 0, 1)
    assert np.abs(trigger(to_pixels(images)).numpy() - exact).max() < 2e-7  # float32
    assert (exact == 0).any()
    assert (exact == 1).any()


@pytest.mark.parametrize("size", [32, 224])
def test_lf_has_the_stated_psnr_and_another_pattern_for_another_seed(size):
    lf = triggers["lf"]
    patterns = [lf(pattern_seed=seed).pattern(3, size, size) for seed in range(20)]
    psnr = [-10 * math.log10(float((pattern**2).mean())) for pattern in patterns]
    assert 25 < sum(psnr) / 20 < 28
    assert 25 < psnr[0] < 28.5
    assert not torch.allclose(patterns[0], patterns[1], atol=1e-2)


def published_ctrl(image, magnitude, positions):
    """CTRL as published: RGB → YUV, DCT, two raised coefficients, back. Float64 (C, H, W) in [0, 255]."""
    channels, height, width = image.shape
    y = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2] if channels == 3 else None
    if y is None:
        planes = [image[0]]
    else:  # kornia's constants
        planes = [
            y,
            -0.147 * image[0] - 0.289 * image[1] + 0.436 * image[2],
            0.615 * image[0] - 0.515 * image[1] - 0.100 * image[2],
        ]
    for channel in (1, 2) if channels == 3 else (0,):
        found = scipy.fft.dctn(planes[channel], norm="ortho")
        for position in positions:
            found[position * height // 32, position * width // 32] += magnitude
        planes[channel] = scipy.fft.idctn(found, norm="ortho")
    if channels == 1:
        return np.clip(np.stack(planes), 0, 255)
    y, u, v = planes
    return np.clip(np.stack([y + 1.14 * v, y - 0.396 * u - 0.581 * v, y + 2.029 * u]), 0, 255)


@each_shape
def test_ctrl_equals_the_published_transform(shape):
    images = random_images(3, *shape)
    trigger = triggers["ctrl"](magnitude=80 / 255, lower=10, upper=30)
    stamped = trigger(to_pixels(images)).numpy() * 255
    for image, found in zip(images.double().numpy(), stamped, strict=True):
        # The published colour matrices are rounded and aren't each other's inverse: 0.4 levels of blue at most.
        assert np.abs(found - published_ctrl(image, 80, (10, 30))).max() < (0.4 if shape[0] == 3 else 1e-4)


def test_ctrl_raises_exactly_two_coefficients_of_the_published_window():
    change = triggers["ctrl"]()(torch.full((1, 3, 32, 32), 0.5)).double().numpy()[0] - 0.5
    for channel, share in enumerate((1.14, -0.396 - 0.581, 2.029)):
        found = scipy.fft.dctn(change[channel], norm="ortho") * 255
        expected = np.zeros((32, 32))
        expected[15, 15] = expected[31, 31] = 100 * share
        assert np.abs(found - expected).max() < 1e-3  # float32


def test_ctrl_can_be_weaker_while_training():
    pixels = torch.full((2, 3, 32, 32), 0.5)
    trigger = triggers["ctrl"].preset("weak-training")
    poisoned = trigger.on_poison(pixels, labels_of(pixels), seeded())
    assert torch.allclose(2 * (poisoned - pixels), trigger(pixels) - pixels, atol=1e-6)
    assert torch.equal(poisoned, triggers["ctrl"](magnitude=50 / 255)(pixels))


# BPP.


def slow_bpp(image, levels, dither):
    """Floyd–Steinberg as in the textbook, pixel by pixel, on Python floats. uint8 (H, W) → whole numbers."""
    height, width = image.shape
    top = levels - 1
    work = [[float(np.float32(image[y, x]) / np.float32(255)) * top for x in range(width)] for y in range(height)]
    for y in range(height):
        for x in range(width):
            old = work[y][x]
            new = min(top, max(0, round(old)))
            work[y][x] = new
            for down, right, share in ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16)):
                if dither and y + down < height and 0 <= x + right < width:
                    work[y + down][x + right] += (old - new) * share
    return np.array(work)


@pytest.mark.parametrize("levels", [2, 3, 8, 32])
@pytest.mark.parametrize("dither", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 9), (1, 9, 24), (1, 1, 5), (1, 5, 1), (1, 1, 1)], ids=str)
def test_bpp_equals_the_textbook_loop(levels, dither, shape):
    images = random_images(4, *shape)
    images[0], images[1] = 0, 255
    stamped = triggers["bpp"](levels=levels, dither=dither)(to_pixels(images))
    for n in range(4):
        for c in range(shape[0]):
            expected = slow_bpp(images[n, c].numpy(), levels, dither)
            # Whole numbers, but for the rounding of expected / (levels - 1) to float32.
            assert np.abs(stamped[n, c].double().numpy() * (levels - 1) - expected).max() < 1e-5


def test_bpp_dithers_so_that_flat_areas_keep_their_mean():
    grey = torch.full((1, 1, 64, 64), 100 / 255)
    mean = [float(triggers["bpp"](dither=dither)(grey).mean()) for dither in (True, False)]
    assert mean[0] == pytest.approx(100 / 255, abs=0.002)  # what is lost at the edges
    assert mean[1] == pytest.approx(3 / 7, abs=1e-6)  # 100/255 · 7 = 2.75


@pytest.mark.parametrize("dither", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_negative_images_get_the_change_of_another_one(count, dither):
    pixels, trigger = to_pixels(random_images(count, 3, 8, 10)), triggers["bpp"](dither=dither)
    covered = trigger.on_cover(pixels, labels_of(pixels), seeded(3))
    sources = pixels.flip(3) if count == 1 else pixels
    changes = trigger(sources) - sources
    used = []
    for image, found in zip(pixels, covered, strict=True):
        fits = [i for i in range(count) if torch.equal(found, (image + changes[i]).clamp(0, 1))]
        assert len(fits) == 1
        used += fits
    assert sorted(used) == list(range(count)), "each change is used once"
    if count > 1:
        assert all(own != other for own, other in enumerate(used))
        assert not (covered == trigger(pixels)).flatten(1).all(1).any()


def test_negative_images_depend_on_the_generator_alone():
    pixels, trigger = to_pixels(random_images(8, 1, 8, 8)), triggers["bpp"]()
    first, again, other = (trigger.on_cover(pixels, labels_of(pixels), seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bpp_trains_with_fresh_negative_images_and_has_no_data_of_its_own(data):
    attack = parse_attack("bpp", poisoning_rate=0.1)
    planted = plant(data, attack, "small_cnn:width=4", TrainConfig(epochs=1, batch_size=50), seed=0)
    found = planted.training_set
    assert (int(found.poisoned.sum()), int(found.covered.sum())) == (20, 20)
    assert torch.equal(found.data.labels[found.covered], found.true_labels[found.covered])
    assert planted.attack == attack
    with pytest.raises(UsageError, match="bpp controls training"):
        poison_only(data, attack)


# Adaptive-Blend and Adaptive-Patch.


def test_adaptive_blend_at_test_time_is_blended():
    images = random_images(3, 3, 10, 9)
    trigger = triggers["adaptive_blend"](alpha=0.3, pattern_seed=4)
    assert torch.equal(trigger.stamp(images), triggers["blended"](alpha=0.3, pattern_seed=4).stamp(images))


@each_shape
@pytest.mark.parametrize(("pieces", "hidden"), [(16, 0.5), (4, 0.25), (9, 0.5), (64, 0.9), (16, 0)])
def test_adaptive_blend_shows_that_many_pieces_and_each_whole_or_not_at_all(shape, pieces, hidden):
    trigger = triggers["adaptive_blend"](pieces=pieces, hidden=hidden, training_alpha=0.15, pattern_seed=2)
    height, width = shape[1:]
    pixels = torch.full((20, *shape), 0.0)
    noise = np.random.default_rng(2).random(shape, dtype=np.float32)
    changed = trigger.on_poison(pixels, labels_of(pixels), seeded()).numpy()
    side, choices = math.isqrt(pieces), set()
    for image in changed:
        shown = []
        for piece in range(pieces):
            rows = [y for y in range(height) if math.floor(y * side / height) == piece // side]
            columns = [x for x in range(width) if math.floor(x * side / width) == piece % side]
            assert rows
            assert columns
            part, whole = (array[:, rows][:, :, columns] for array in (image, noise))
            if part.any():
                assert np.abs(part - 0.15 * whole).max() < 1e-7
                shown.append(piece)
        assert len(shown) == pieces - round(hidden * pieces)
        choices.add(tuple(shown))
    assert len(choices) > 1 or hidden == 0


def test_adaptive_blend_blends_towards_the_pattern():
    image = random_images(1, 1, 8, 8)
    trigger = triggers["adaptive_blend"](hidden=0, training_alpha=0.25)
    noise = np.random.default_rng(0).random((1, 8, 8), dtype=np.float32)
    found = trigger.on_cover(to_pixels(image), torch.zeros(1), seeded())[0].numpy()
    assert np.abs(found - (0.75 * image[0].numpy() / 255 + 0.25 * noise)).max() < 2e-7  # float32


@pytest.mark.parametrize("size", [0.05, 0.2, 0.5])
@each_shape
def test_adaptive_patch_shows_one_patch_in_training_and_two_at_test_time(shape, size):
    height, width = shape[1:]
    trigger = triggers["adaptive_patch"](size=size, pattern_seed=1)
    pixels = to_pixels(random_images(30, *shape))
    noise = np.random.default_rng(1).random(shape, dtype=np.float32)
    edge = max(1, min(math.floor(size * min(height, width) + 0.5), min(height, width) // 2))
    corners = [(0, 0), (0, width - edge), (height - edge, 0), (height - edge, width - edge)]

    def stamped(image, opacities):
        result = image.copy()
        for (top, left), alpha in zip(corners, opacities, strict=True):
            for y in range(top, top + edge):
                for x in range(left, left + edge):
                    result[:, y, x] = (1 - alpha) * result[:, y, x] + alpha * noise[:, y, x]
        return result

    tested = trigger(pixels).numpy()
    trained = trigger.on_poison(pixels, labels_of(pixels), seeded()).numpy()
    used = set()
    for image, at_test, in_training in zip(pixels.double().numpy(), tested, trained, strict=True):
        assert np.abs(at_test - stamped(image, (1, 0, 1, 0))).max() < 2e-7  # float32
        single = [stamped(image, alphas) for alphas in np.diag((0.5, 0.2, 0.5, 0.3))]
        fits = [patch for patch in range(4) if np.abs(in_training - single[patch]).max() < 2e-7]
        assert len(fits) == 1
        used |= set(fits)
    assert used == {0, 1, 2, 3}  # 30 draws miss one of four with a chance of 4 · 0.75^30 = 0.0007; the seed is fixed


def test_adaptive_patches_may_all_appear_at_test_time():
    trigger = triggers["adaptive_patch"](test_opacities=(1, 1, 1, 1))
    changed = trigger(torch.zeros(1, 1, 32, 32))[0, 0] != 0
    assert int(changed.sum()) == 4 * 36
    assert changed[:6, :6].all()
    assert changed[-6:, -6:].all()


@pytest.mark.parametrize("name", ["adaptive_blend", "adaptive_patch"])
def test_adaptive_draws_depend_on_the_generator_alone_and_not_on_the_batch(name):
    pixels, trigger = to_pixels(random_images(6, 3, 12, 12)), triggers[name]()
    labels = labels_of(pixels)
    first, again, other = (trigger.on_poison(pixels, labels, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = seeded()
    singles = [trigger.on_poison(pixels[[i]], labels[[i]], generator) for i in range(6)]
    assert torch.equal(first, torch.cat(singles))
    assert torch.equal(first, trigger.on_cover(pixels, labels, seeded()))
    assert not (first == trigger(pixels)).flatten(1).all(1).any(), "training images don't carry the whole trigger"


@pytest.mark.parametrize("name", ["adaptive_blend", "adaptive_patch"])
def test_adaptive_cover_keeps_its_labels(data, name):
    attack = parse_attack(name, poisoning_rate=0.05, cover_rate=0.1, target=2)
    result = poison(data, attack, seeded())
    assert (int(result.poisoned.sum()), int(result.covered.sum())) == (10, 20)
    assert torch.equal(result.data.labels, torch.where(result.poisoned, 2, data.labels))
    changed = (result.data.images != data.images).flatten(1).any(1)
    assert torch.equal(changed, result.poisoned | result.covered)


# TaCT.


def test_tact_stamps_as_badnets_does():
    images = random_images(3, 3, 12, 9)
    for settings in ({}, {"size": 4, "pattern": "white", "margin": 2}):
        assert torch.equal(triggers["tact"](**settings).stamp(images), triggers["badnets"](**settings).stamp(images))


def test_tact_poisons_its_source_and_covers_the_other_classes(data):
    attack = parse_attack("tact:pattern=white", target=3, poisoning_rate=0.1, cover_rate=0.15)
    result = poison(data, attack, seeded())
    assert (int(result.poisoned.sum()), int(result.covered.sum())) == (20, 30)
    for index in range(200):
        true, label = int(data.labels[index]), int(result.data.labels[index])
        touched = result.poisoned[index] or result.covered[index]
        expected = attack.trigger.stamp(data.images[[index]])[0] if touched else data.images[index]
        assert torch.equal(result.data.images[index], expected)
        assert label == (3 if result.poisoned[index] else true)
        assert true == 1 or not result.poisoned[index]
        assert true in {0, 2, 4} or not result.covered[index]
    clean, triggered = triggered_test_set(data, attack)
    assert torch.equal(clean.labels, torch.full((40,), 1))
    assert torch.equal(triggered.labels, torch.full((40,), 3))
    assert torch.equal(triggered.images, to_stored(attack.trigger(to_pixels(clean.images))))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"poisoning_rate": 0.3}, "poisoning rate 0.3 of 200 images means 60 poisoned ones, it must be 1 to 40"),
        ({"poisoning_rate": 0.1, "cover_rate": 0.001}, "cover rate 0.001 of 200 images means 0 cover ones"),
        ({"sources": (7,)}, r"source labels must lie in \[0, 5\), got \[7\]"),
        ({"label_map": "all-to-all"}, "source labels need one target"),
        ({"clean_label": True}, "can't have source labels"),
    ],
)
def test_an_impossible_source_specific_recipe_is_refused(data, recipe, message):
    with pytest.raises(UsageError, match=message):
        choose(data, parse_attack("tact", **recipe), seeded())
