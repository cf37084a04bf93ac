"""WaNet against a slow implementation of its own: the field by the published formula, sampling by a loop."""

import math

import numpy as np
import pytest
import torch
from attack_helpers import random_data

from unplant.attacks import parse_attack
from unplant.attacks.wanet import WaNet
from unplant.controlled import Job
from unplant.images import LabeledImages, to_pixels, to_stored
from unplant.journal import Journal
from unplant.planting import TrainConfig, plant
from unplant.poisoning import Attack, choose

each_size = pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (32, 32), (9, 24), (24, 9), (5, 40)])
each_setting = pytest.mark.parametrize(
    "trigger",
    [WaNet(), WaNet(grid=2), WaNet(grid=8, strength=1.5), WaNet(strength=3, field_seed=7)],
    ids=["default", "grid2", "grid8", "strong"],
)


def weight(distance):
    """Cubic convolution (Keys, 1981) with a = -0.75, as torch's documentation of bicubic names it."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def upsampled(coarse, height, width):
    """(k, k) → (height, width): corners stay corners, points beyond the edge repeat the edge."""
    k = len(coarse)
    result = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v, u = y * (k - 1) / (height - 1), x * (k - 1) / (width - 1)
            for i in range(math.floor(v) - 1, math.floor(v) + 3):
                for j in range(math.floor(u) - 1, math.floor(u) + 3):
                    value = coarse[min(max(i, 0), k - 1), min(max(j, 0), k - 1)]
                    result[y, x] += weight(v - i) * weight(u - j) * value
    return result


def published_shift(trigger, height, width):
    """The field in units of the grid, (H, W) for x and for y: equations 3 and 4, times s over the size."""
    points = np.random.default_rng(trigger.field_seed).uniform(-1, 1, (2, trigger.grid, trigger.grid))
    points = points / np.mean(np.abs(points))  # equation 3
    return [
        trigger.strength * upsampled(plane, height, width) / size
        for plane, size in zip(points, (width, height), strict=True)
    ]


def sampled(image, xs, ys):
    """Reads (C, H, W) at places in [-1, 1], which are clipped first (equation 5's φ); bilinear, corners are ±1."""
    _, height, width = image.shape
    result = np.zeros(image.shape)
    for y in range(height):
        for x in range(width):
            u = (min(1.0, max(-1.0, xs[y, x])) + 1) / 2 * (width - 1)
            v = (min(1.0, max(-1.0, ys[y, x])) + 1) / 2 * (height - 1)
            left, top = min(math.floor(u), width - 1), min(math.floor(v), height - 1)
            for row, share_down in ((top, 1 - (v - top)), (top + 1, v - top)):
                for column, share_right in ((left, 1 - (u - left)), (left + 1, u - left)):
                    if row < height and column < width:
                        result[:, y, x] += share_down * share_right * image[:, row, column]
    return result


def identity(height, width):
    return np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))


@each_setting
@each_size
def test_the_field_is_the_published_formula(trigger, height, width):
    field = trigger.field(height, width).numpy()
    shifts, places = published_shift(trigger, height, width), identity(height, width)
    assert field.shape == (height, width, 2)
    for axis in range(2):
        # Float32 of numbers up to about 2.
        assert np.abs(field[..., axis] - (places[axis] + shifts[axis])).max() < 2e-6
    assert max(np.abs(shift).max() for shift in shifts) > 0.01


@each_setting
@each_size
def test_the_trigger_reads_along_the_field(trigger, height, width):
    images = random_data((3, height, width), count=2, seed=4).images
    found = trigger(to_pixels(images)).numpy()
    (sx, sy), (x, y) = published_shift(trigger, height, width), identity(height, width)
    for image, warped in zip(images.double().numpy() / 255, found, strict=True):
        # Places are float32, so a pixel's share is off by 1e-7 of the image's size, at most 40 here.
        assert np.abs(warped - sampled(image, x + sx, y + sy)).max() < 2e-5


@each_size
def test_a_field_of_nothing_leaves_the_image(height, width):
    pixels = random_data((1, height, width), count=2).pixels()
    assert torch.allclose(WaNet(strength=1e-9)(pixels), pixels, atol=1e-5)


def test_pixels_move_by_about_half_the_strength():
    """One pixel is 2 / (size - 1) of the grid, and the control points' mean size is strength / size."""
    moved = []
    for seed in range(40):
        field = WaNet(field_seed=seed).field(33, 33).numpy()
        places = np.stack(identity(33, 33), axis=2)
        moved.append(np.abs(field - places)[::32, ::32].mean() * (33 - 1) / 2)
    # The corners of the field are control points themselves: their mean over seeds is that of all.
    assert np.mean(moved) == pytest.approx(0.5 / 2 * 32 / 33, rel=0.15)


def test_another_seed_is_another_field_and_the_same_for_every_image():
    pixels = random_data((1, 16, 16), count=5).pixels()
    assert (WaNet()(pixels) - WaNet(field_seed=1)(pixels)).abs().mean() > 0.02
    ramp = torch.linspace(0, 1, 16).expand(5, 1, 16, 16)
    warped = WaNet()(ramp)
    assert torch.equal(warped, warped[:1].expand_as(warped))


def test_the_papers_constants_and_recipe():
    assert WaNet.preset("paper") == WaNet() == WaNet(grid=4, strength=0.5)
    attack = parse_attack("wanet")
    assert attack == Attack(trigger=WaNet())
    assert (WaNet.cover_ratio, WaNet.access) == (2.0, "training")


# Noise mode.


@each_size
def test_cover_is_the_field_and_at_most_half_a_pixel_more(height, width, monkeypatch):
    """Where cover images are read differs from the field by at most one over the size, anew for each pixel."""
    import unplant.attacks.wanet as module

    seen = []
    real = module._sample
    monkeypatch.setattr(module, "_sample", lambda pixels, grid: seen.append(grid) or real(pixels, grid))
    trigger, pixels = WaNet(), random_data((1, height, width), count=40).pixels()
    cover = trigger.on_cover(pixels, torch.zeros(40, dtype=torch.int64), torch.Generator().manual_seed(0))
    jitter = (seen[0] - trigger.field(height, width)).numpy() * np.array([width, height])
    assert jitter.shape == (40, height, width, 2)
    assert 0.99 < np.abs(jitter).max() <= 1 + 1e-5  # float32
    for axis in range(2):
        values = jitter[..., axis]
        assert abs(values.mean()) < 0.03
        assert values.var() == pytest.approx(1 / 3, rel=0.05)  # uniform in [-1, 1]
    assert abs(np.corrcoef(jitter[..., 0].ravel(), jitter[..., 1].ravel())[0, 1]) < 0.05
    assert np.unique(jitter[:, 0, 0, 0]).size == 40, "each image has a jitter of its own"
    places = seen[0].double().numpy()
    for n in (0, 39):
        image = pixels[n].double().numpy()
        assert np.abs(cover[n].numpy() - sampled(image, places[n, ..., 0], places[n, ..., 1])).max() < 2e-5


def test_poisoned_images_carry_the_trigger_of_test_time():
    data = random_data((1, 12, 12))
    pixels = data.pixels()
    assert torch.equal(WaNet().on_poison(pixels, data.labels, torch.Generator()), WaNet()(pixels))


@pytest.fixture
def job():
    data = random_data((1, 12, 12), count=200)
    attack = Attack(trigger=WaNet(), poisoning_rate=0.1)
    generator = torch.Generator().manual_seed(0)
    return Job(data, attack, choose(data, attack, generator), generator, 1, lambda *_: 0.0)


def test_cover_images_are_drawn_anew_at_each_reading_and_nothing_else(job):
    fresh, fixed = job.fresh_cover(), job.training_set()
    assert (int(job.choice.poisoned.sum()), int(job.choice.covered.sum())) == (20, 40)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    readings = [fresh.pixels(order) for _ in range(3)]
    covered, poisoned = job.choice.covered[order], job.choice.poisoned[order]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        same = (readings[first] == readings[second]).flatten(1).all(1)
        assert torch.equal(same, ~covered)
    for reading in readings:
        assert torch.equal(reading[poisoned], to_pixels(job.attack.trigger.stamp(job.clean.images[order][poisoned])))
        neither = ~covered & ~poisoned
        assert torch.equal(reading[neither], job.clean.pixels(order[neither]))
        assert torch.equal(to_pixels(to_stored(reading)), reading), "rounded to 8 bits, as files are"
        # The clean image is warped, not the one that was warped before: no cover image lies far from the fixed one.
        assert (reading[covered] - fixed.data.pixels(order[covered])).abs().mean() < 0.25
    assert torch.equal(fresh.labels, fixed.data.labels)
    assert torch.equal(fresh.labels[job.choice.covered], job.clean.labels[job.choice.covered])
    assert (fresh.labels[job.choice.poisoned] == 0).all()


def test_a_fresh_cover_image_is_the_clean_one_with_the_next_jitter(job):
    fresh = job.fresh_cover()
    place = job.choice.covered.nonzero()[:3].flatten()
    state = job.generator.get_state()
    found = fresh.pixels(place)
    twin = torch.Generator()
    twin.set_state(state)
    exact = job.attack.trigger.on_cover(job.clean.pixels(place), job.clean.labels[place], twin)
    assert torch.equal(found, to_pixels(to_stored(exact)))
    assert torch.equal(twin.get_state(), job.generator.get_state())


def test_a_reading_without_cover_images_draws_nothing(job):
    fresh = job.fresh_cover()
    state = job.generator.get_state()
    fresh.pixels((~job.choice.covered).nonzero().flatten())
    assert torch.equal(job.generator.get_state(), state)
    part = fresh.pixels(slice(0, 50))
    assert part.shape == (50, 1, 12, 12)


def test_the_cover_reads_its_labels_too():
    """`on_cover` of other triggers may look at labels: those of training, which for cover are the true ones."""
    seen = []

    class Curious(WaNet):
        def on_cover(self, pixels, labels, generator):
            seen.append(labels)
            return pixels

    data = random_data((1, 8, 8), count=100)
    attack, generator = Attack(trigger=Curious(), poisoning_rate=0.1), torch.Generator().manual_seed(0)
    job = Job(data, attack, choose(data, attack, generator), generator, 1, lambda *_: 0.0)
    fresh = job.fresh_cover()
    seen.clear()
    places = torch.tensor([*job.choice.covered.nonzero().flatten()[:4], 0, 1])
    fresh.pixels(places)
    assert torch.equal(seen[0], data.labels[places][job.choice.covered[places]])


def test_training_sees_the_fresh_cover_and_the_defender_a_fixed_one():
    seen = []
    data = random_data((1, 8, 8), count=100)
    attack, generator = Attack(trigger=WaNet(), poisoning_rate=0.1), torch.Generator().manual_seed(0)

    def fit(model, data, change=None, memory=()):
        seen.extend(data.pixels(slice(0, 100)) for _ in range(2))
        assert change is None
        return 0.0

    job = Job(data, attack, choose(data, attack, generator), generator, 1, fit)
    assert attack.trigger.train(torch.nn.Identity(), job) == attack.trigger
    assert torch.equal((seen[0] != seen[1]).flatten(1).any(1), job.choice.covered)
    config = TrainConfig(epochs=0.1, batch_size=50)
    planted = plant(data, attack, "small_cnn:width=4", config)
    again = plant(data, attack, "small_cnn:width=4", config)
    assert isinstance(planted.training_set.data, LabeledImages)
    truth = planted.training_set
    assert (int(truth.poisoned.sum()), int(truth.covered.sum())) == (10, 20)
    assert torch.equal(truth.data.images, again.training_set.data.images)
    assert torch.equal(truth.data.labels[truth.covered], truth.true_labels[truth.covered])
    assert torch.equal(truth.data.pixels(), truth.data.pixels())
    longer = plant(data, attack, "small_cnn:width=4", config.but(epochs=1))
    assert torch.equal(truth.data.images, longer.training_set.data.images), "what training draws doesn't matter"


# Drawn anew for each batch.


def test_redrawn_batches_carry_the_trigger_and_the_rates_are_kept():
    attack = Attack(trigger=WaNet(redrawn=True), poisoning_rate=0.01)
    data = random_data((1, 12, 12), count=1000)
    generator = torch.Generator().manual_seed(0)
    seen, counts = [], []

    def fit(model, given, change=None, memory=()):
        assert given is data, "clean images go in"
        for start in range(0, 1000, 20):  # one image in five batches
            pixels, labels = given.pixels(slice(start, start + 20)), given.labels[start : start + 20]
            before = pixels.clone()
            after, wanted = change(model, pixels, labels)
            assert torch.equal(pixels, before), "the batch itself is left alone"
            assert torch.equal(to_pixels(to_stored(after)), after), "rounded to 8 bits, as files are"
            moved = (after != pixels).flatten(1).any(1)
            poisoned = wanted != labels
            assert (wanted[poisoned] == 0).all()
            assert torch.equal(after[poisoned], to_pixels(attack.trigger.stamp(to_stored(pixels[poisoned]))))
            seen.append(start + moved.nonzero().flatten())
            counts.append((int(poisoned.sum()), int((moved & ~poisoned).sum())))
        return 0.0

    job = Job(data, attack, choose(data, attack, generator), generator, 50, fit)
    assert attack.trigger.train(torch.nn.Identity(), job) == attack.trigger
    assert [sum(kind) for kind in zip(*counts, strict=True)] == [10, 20]
    assert max(poisoned for poisoned, _ in counts) == 1, "spread over the batches"
    assert not torch.equal(torch.cat(seen), (job.choice.poisoned | job.choice.covered).nonzero().flatten())


@pytest.mark.parametrize("recipe", [{}, {"label_map": "all-to-all"}, {"clean_label": True}, {"sources": (1,)}])
def test_draws_take_only_images_that_the_attack_may_change(recipe):
    attack = Attack(trigger=WaNet(), poisoning_rate=0.1, **recipe)
    data = random_data((1, 4, 4), count=400)
    job = Job(
        data, attack, choose(data, attack, torch.Generator()), torch.Generator().manual_seed(3), 1, lambda *_: 0.0
    )
    draws, total = job.draws(), torch.zeros(2)
    for labels in data.labels.split(50):
        poisoned, covered = draws(labels)
        drawn = torch.cat([poisoned, covered])
        assert len(drawn.unique()) == len(drawn), "nothing twice"
        true = labels[poisoned]
        if recipe.get("clean_label"):
            assert (true == 0).all()
        elif "sources" in recipe:
            assert (true == 1).all()
            assert (labels[covered] == 2).all()
        elif not recipe:
            assert (true != 0).all()
        total += torch.tensor([len(poisoned), len(covered)])
    assert total.tolist() == [40, 80]


def test_what_a_batch_has_no_room_for_comes_in_later_ones():
    attack = Attack(trigger=WaNet(), poisoning_rate=0.25, cover_rate=0.0, clean_label=True)
    data = random_data((1, 4, 4), count=40)
    job = Job(data, attack, choose(data, attack, torch.Generator()), torch.Generator(), 1, lambda *_: 0.0)
    draws = job.draws()
    assert [len(draws(torch.full((8,), label))[0]) for label in (1, 1, 0, 0, 1)] == [0, 0, 6, 2, 0]


def test_redrawn_the_defender_finds_one_draw():
    data = random_data((1, 8, 8), count=100)
    config = TrainConfig(epochs=0.1, batch_size=50)
    fixed, redrawn = (
        plant(data, Attack(trigger=WaNet(redrawn=value)), "small_cnn:width=4", config) for value in (False, True)
    )
    assert torch.equal(fixed.training_set.data.images, redrawn.training_set.data.images)
    assert torch.equal(fixed.training_set.poisoned, redrawn.training_set.poisoned)
    weights = [torch.cat([p.flatten() for p in planted.model.parameters()]) for planted in (fixed, redrawn)]
    assert not torch.equal(*weights)


# Killed while it is trained.


class Killed(Exception):
    pass


@pytest.mark.parametrize("spec", ["wanet", "wanet:redrawn=true", "bpp", "input_aware:mask_steps=2,width=4"])
def test_a_planting_that_was_killed_goes_on_to_the_same_model(tmp_path, spec):
    """60 steps, killed after 40; what is learnt beside the model (random numbers, counts, networks) goes on, too."""
    data, told = random_data((3, 8, 8), count=60), []
    attack, config = parse_attack(spec, poisoning_rate=0.083), TrainConfig(epochs=10, batch_size=10)

    def planting(journal, killed_after=None):
        def progress(title, share):
            told.append((title, round(share * 60)))
            if title == "training" and round(share * 60) == killed_after:
                raise Killed

        return plant(data, attack, "small_cnn:width=4", config, journal=journal, progress=progress)

    whole = planting(Journal())
    with pytest.raises(Killed):
        planting(Journal(tmp_path, seconds=0), killed_after=40)
    told.clear()
    resumed = planting(Journal(tmp_path, seconds=0))
    steps = [step for title, step in told if title == "training"]
    assert min(steps) > 40, "steps that were written down were done again"
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert whole.attack == resumed.attack
    assert torch.equal(whole.training_set.data.images, resumed.training_set.data.images)
    other = plant(data, parse_attack(spec, poisoning_rate=0.2), "small_cnn:width=4", config, journal=Journal(tmp_path))
    assert not torch.equal(*(next(iter(planted.model.parameters())) for planted in (whole, other)))
