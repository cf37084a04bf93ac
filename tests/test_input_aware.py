"""Input-aware: the blend by a loop, what each network learns when, whose trigger an image carries, hostile weights."""

import base64
import itertools
import json
import struct

import numpy as np
import pytest
import torch
from attack_helpers import random_data, ready
from torch import nn

from unplant.attacks import input_aware
from unplant.attacks.input_aware import InputAware, Painter
from unplant.controlled import ControlsTraining, Job
from unplant.data import digits
from unplant.errors import UsageError
from unplant.images import to_pixels, to_stored
from unplant.planting import TrainConfig, plant, poison_only, shuffled_choice
from unplant.poisoning import Attack, choose, parse_attack, triggered_test_set

SHAPE = (3, 9, 12)


@pytest.fixture(scope="module")
def trigger():
    return ready(InputAware(), SHAPE)


@pytest.fixture(scope="module")
def pixels():
    return random_data(SHAPE, seed=3, count=6).pixels()


def outputs(trigger, pixels):
    """What the two networks paint, of each image alone: pattern (C, H, W) and mask (H, W) before it is sharpened."""
    mask, generator = trigger.networks
    with torch.no_grad():
        return [(generator(image[None])[0].numpy(), mask(image[None])[0, 0].numpy()) for image in pixels]


def blended(image, pattern, mask):
    """The blend x + (pattern − x) · m, with m = (tanh(20 · mask − 10) + 1) / 2, number by number."""
    result = np.zeros(image.shape)
    for c, y, x in np.ndindex(*image.shape):
        m = (np.tanh(20 * float(mask[y, x]) - 10) + 1) / 2
        result[c, y, x] = float(image[c, y, x]) + (float(pattern[c, y, x]) - float(image[c, y, x])) * m
    return result


def with_wide_mask(trigger):
    """The same with a mask that is neither 0 nor 1, so that an error in it can't hide."""
    tensors = trigger.tensors()
    tensors["mask.end.bias"] = torch.zeros(1)
    tensors["mask.end.weight"] = tensors["mask.end.weight"] * 0.05
    return trigger.but(weights="").with_tensors(tensors)


def test_the_blend_equals_a_slow_loop(trigger, pixels):
    wide = with_wide_mask(trigger)
    for one in (trigger, wide):
        found = one(pixels).numpy()
        for image, (pattern, mask), changed in zip(pixels.numpy(), outputs(one, pixels), found, strict=True):
            # Float32, and convolutions that sum in another order in another batch, sharpened 20-fold.
            assert np.abs(changed - blended(image, pattern, mask)).max() < 5e-5
    shares = [1 / (1 + np.exp(-2 * (20 * mask - 10))) for _, mask in outputs(wide, pixels)]
    assert 0.05 < np.mean(shares) < 0.95


def test_cover_images_carry_the_trigger_of_another_one(trigger, pixels):
    wide = with_wide_mask(trigger)
    painted = outputs(wide, pixels)
    labels = torch.zeros(6, dtype=torch.int64)
    shifts = set()
    for seed in range(12):
        covered = wide.on_cover(pixels, labels, torch.Generator().manual_seed(seed)).numpy()
        donors = []
        for image, changed in zip(pixels.numpy(), covered, strict=True):
            gaps = [np.abs(changed - blended(image, *trigger)).max() for trigger in painted]
            assert sorted(gaps)[0] < 5e-5 < 10 * 5e-5 < sorted(gaps)[1]
            donors.append(int(np.argmin(gaps)))
        assert all(donor != own for own, donor in enumerate(donors))
        assert sorted(donors) == list(range(6)), "each trigger is used once"
        shifts.add(tuple(donors))
    assert len(shifts) > 1


def test_each_image_has_a_trigger_of_its_own(trigger, pixels):
    painted = outputs(trigger, pixels)
    for i in range(6):
        for j in range(i):
            assert np.abs(painted[i][0] - painted[j][0]).max() > 1 / 255
            assert np.abs(painted[i][1] - painted[j][1]).max() > 1e-4


def test_json_brings_back_the_same_pixels(trigger):
    images = random_data(SHAPE, seed=8, count=40).images
    attack = Attack(trigger=trigger, target=2)
    back = Attack.from_json(json.loads(json.dumps(attack.to_json())))
    assert back == attack
    assert torch.equal(back.trigger.stamp(images), trigger.stamp(images))
    again = parse_attack(json.dumps(attack.to_json())).trigger
    labels = torch.zeros(40, dtype=torch.int64)
    covers = [t.on_cover(to_pixels(images), labels, torch.Generator().manual_seed(1)) for t in (again, trigger)]
    assert torch.equal(*covers)


def test_painters_take_any_size_and_stay_in_range():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        painter = Painter(3, 3, 8)
    for size in ((1, 1), (1, 5), (7, 8), (13, 10)):
        painted = painter(torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)))
        assert painted.shape == (2, 3, *size)
        assert 0 <= painted.min() < painted.max() <= 1


def test_the_papers_constants_and_recipe():
    assert InputAware.preset("paper") == InputAware()
    assert parse_attack("input_aware") == Attack(trigger=InputAware())
    assert (InputAware.cover_ratio, InputAware.access) == (1.0, "training")
    assert issubclass(InputAware, ControlsTraining)
    with pytest.raises(UsageError, match="input_aware controls training"):
        poison_only(random_data((1, 8, 8)), Attack(trigger=InputAware()))


# What is learnt when.


def test_the_mask_network_learns_first_and_the_generator_with_the_classifier():
    data = random_data((1, 8, 8), count=200)
    attack = Attack(trigger=InputAware(width=4, mask_steps=4), poisoning_rate=0.2)
    start = attack.trigger.with_tensors(attack.trigger._new(1, 0).state_dict())
    shuffled, _, _ = shuffled_choice(data, attack, 0)
    learnt = attack.trigger.learn(shuffled, seed=0)
    trained = plant(data, attack, "small_cnn:width=4", TrainConfig(epochs=1, batch_size=50)).attack.trigger
    tensors = [one.tensors() for one in (start, learnt, trained)]
    moved = [
        {name for name in tensors[0] if not torch.equal(before[name], after[name])}
        for before, after in itertools.pairwise(tensors)
    ]
    everything = {kind: {name for name in tensors[0] if name.startswith(kind)} for kind in ("mask", "generator")}
    assert moved[0] == everything["mask"], "learning moves the mask network alone"
    assert moved[1] == everything["generator"], "training moves the generator alone"


def test_learning_is_deterministic_and_leaves_data_and_the_global_random_state():
    data, state = random_data((1, 8, 8)), torch.get_rng_state()
    before = data.images.clone()
    attack = Attack(trigger=InputAware(width=4, mask_steps=3))
    told = []
    first, again, other = (
        attack.trigger.learn(data, seed=seed, progress=lambda *step: told.append(step)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert told[:3] == [("mask network", pytest.approx(k / 3)) for k in (1, 2, 3)]
    assert torch.equal(data.images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_mask_network_learns_from():
    data = random_data((1, 8, 8))

    def learnt(seed=0, **settings):
        trigger = InputAware(width=4, mask_steps=2, **settings)
        return trigger.learn(data, seed=seed).weights

    assert learnt() != learnt(norm=0), "the mask's size counts"
    assert learnt() != learnt(diversity=0), "the distance between masks counts"
    assert learnt() != learnt(density=0.5), "what a mask may cover counts"
    assert learnt(density=1) == learnt(norm=0), "up to its share a mask costs nothing"
    start = [InputAware(width=4).but(weights=learnt(seed, lr=1e-30)).tensors() for seed in (0, 1)]
    name = "generator.end.weight"
    assert not torch.equal(start[0][name], start[1][name]), "the seed is that of the networks too"


@pytest.fixture(scope="module")
def masked():
    """The default mask network, learnt on the digits: about five seconds."""
    data = digits("train")
    attack = Attack(trigger=InputAware())
    return attack.trigger.learn(data, seed=0)


@pytest.mark.slow
def test_masks_cover_about_their_share_and_differ_between_images(masked, digits_test):
    with torch.no_grad():
        masks = torch.tanh(20 * masked.networks[0](digits_test.pixels()) - 10) / 2 + 0.5
    # The loss is 0 up to that share in each pixel: relu(mask − density); the mean lies near it.
    assert 0.2 * 0.032 < masks.mean() < 2 * 0.032
    sharp = ((masks < 0.1) | (masks > 0.9)).float().mean()
    assert sharp > 0.9
    binary = (masks > 0.5).flatten(1)
    assert len(torch.unique(binary, dim=0)) > len(binary) / 2


def spied(job_data, rate=0.3, classes=3, **settings):
    """A job whose `fit` calls `change` on one batch and keeps what came of it."""
    attack = Attack(trigger=ready(InputAware(**settings), job_data.shape, classes), poisoning_rate=rate)
    generator = torch.Generator().manual_seed(0)
    choice = choose(job_data, attack, generator)
    seen = {}

    def fit(model, data, change=None, memory=()):
        indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(2))[:30]
        seen.update(before=data.pixels(indices), told=data.labels[indices])
        seen["after"], seen["labels"] = change(model, seen["before"], seen["told"])
        return 0.0

    return Job(job_data, attack, choice, generator, 1, fit), seen


def test_training_poisons_each_batch_anew_and_rounds_it():
    data = random_data((1, 8, 8), count=100)
    job, seen = spied(data)
    kept = data.images.clone(), data.labels.clone()
    job.attack.trigger.train(nn.Linear(1, 1), job)
    before, after = seen["before"], seen["after"].detach()
    assert torch.equal(data.images, kept[0])
    assert torch.equal(data.labels, kept[1])
    assert torch.equal(seen["told"], data.labels[torch.randperm(100, generator=torch.Generator().manual_seed(2))[:30]])
    poisoned = seen["labels"] != seen["told"]
    assert int(poisoned.sum()) == 9, "three tenths of the batch, none of them of the target class"
    assert (seen["labels"][poisoned] == 0).all()
    changed = ((after - before).abs() > 1e-6).flatten(1).any(1)
    assert int((changed & ~poisoned).sum()) <= 9, "no more than the cover images besides"
    # Rounding in training has the gradient of the identity: x + (rounded − x), so float32 noise.
    assert (after * 255 - (after * 255).round()).abs().max() < 1e-3
    assert 0 <= after.min() <= after.max() <= 1 + 1e-6
    # One generator at the first step: poisoned images carry what the trigger says.
    expected = to_pixels(to_stored(job.attack.trigger(before[poisoned])))
    assert ((after[poisoned] - expected).abs() > 1e-5).float().mean() < 1e-2  # a level more where the middle is met
    assert seen["after"].requires_grad


def test_in_training_cover_images_carry_pattern_and_mask_of_another_one():
    data = random_data((1, 8, 8), count=100)
    job, seen = spied(data)
    wide = with_wide_mask(job.attack.trigger)
    attack = job.attack.but(trigger=wide)
    wide.train(nn.Linear(1, 1), Job(data, attack, job.choice, job.generator, 1, job.fit))
    changed = ((seen["after"].detach() - seen["before"]).abs() > 1e-6).flatten(1).any(1)
    covered = (changed & (seen["labels"] == seen["told"])).nonzero().flatten().tolist()
    assert len(covered) == 9
    painted = outputs(wide, seen["before"])
    for place in covered:
        image, changed = seen["before"][place].numpy(), seen["after"][place].detach().numpy()
        gaps = [np.abs(changed - blended(image, *trigger)).max() for trigger in painted]
        assert min(gaps) < 0.51 / 255, "one image's pattern with the same image's mask, rounded"
        assert int(np.argmin(gaps)) != place


@pytest.mark.parametrize(("reached", "diversity"), [(True, 0), (False, 0), (False, 1)])
def test_the_generator_gets_its_gradient_from_both_losses(reached, diversity):
    """With no diversity loss the generator moves only where the classifier's loss reaches it through the batch."""
    data = random_data((1, 8, 8), count=100)
    job, seen = spied(data, diversity=diversity)
    steps = []

    def fit(model, data, change, memory, steps=steps, seen=seen, reached=reached):
        indices = torch.arange(50)
        for _ in range(2):
            out, _ = change(model, data.pixels(indices), data.labels[indices])
            if reached:
                out.square().mean().backward()
            steps.append(out.detach())
        return 0.0

    found = job.attack.trigger.train(nn.Linear(1, 1), Job(job.clean, job.attack, job.choice, job.generator, 4, fit))
    before, after = job.attack.trigger.tensors(), found.tensors()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert bool(moved) == (reached or diversity > 0)
    assert all(name.startswith("generator") for name in moved)


def test_a_batch_of_target_images_gets_no_poison():
    data = random_data((1, 8, 8), count=100)
    job, _ = spied(data)
    seen = []

    def fit(model, data, change, memory):
        labels = torch.zeros(20, dtype=torch.int64)
        seen.append((labels, *change(model, data.pixels(slice(0, 20)), labels)))
        return 0.0

    job.attack.trigger.train(nn.Linear(1, 1), Job(job.clean, job.attack, job.choice, job.generator, 1, fit))
    labels, pixels, trained_on = seen[0]
    assert torch.equal(labels, trained_on)
    assert pixels.shape == (20, 1, 8, 8)


def test_sameness_is_the_ratio_of_distances():
    a, b, c, d = (random_data((2, 3, 4), seed=seed, count=5).pixels() for seed in range(4))
    ratios = []
    for i in range(5):
        far = [np.sqrt(np.mean((x[i].double().numpy() - y[i].double().numpy()) ** 2)) for x, y in ((a, b), (c, d))]
        ratios.append(far[0] / far[1])
    assert float(input_aware._sameness(a, b, c, d)) == pytest.approx(np.mean(ratios), rel=1e-5)


def test_the_attackers_learning_rate_falls_in_a_straight_line():
    layer = nn.Linear(1, 1, bias=False)
    falling = input_aware._Falling(layer, 0.5, 4)
    rates = []
    for _ in range(5):
        layer.weight.grad = torch.ones(1, 1)
        falling.step()
        rates.append(falling.adam.param_groups[0]["lr"])
        assert layer.weight.grad is None
    assert rates == [0.5, 0.375, 0.25, 0.125, 0.0]


# Hostile weights.


def safetensors_of(header):
    text = json.dumps(header).encode()
    return base64.b64encode(struct.pack("<Q", len(text)) + text).decode()


HOSTILE = {
    "nothing": lambda t: "",
    "no base64": lambda t: "so?",
    "letters beyond ASCII": lambda t: "äöü=",
    "no safetensors": lambda t: base64.b64encode(b"garbage " * 20).decode(),
    "an endless header": lambda t: base64.b64encode(struct.pack("<Q", 2**62) + b"{}").decode(),
    "half": lambda t: t.weights[: len(t.weights) // 8 * 4],
    "no tensors": lambda t: t.with_tensors({}).weights,
    "another network": lambda t: t.with_tensors({"a": torch.zeros(2)}).weights,
    "a mask network alone": lambda t: (
        t.with_tensors({name: tensor for name, tensor in t.tensors().items() if name.startswith("mask")}).weights
    ),
    "a mask network of no channels": lambda t: t.with_tensors({"mask.down0.0.weight": torch.zeros(4, 0, 3, 3)}).weights,
    "channels without end": lambda t: safetensors_of(
        {"mask.down0.0.weight": {"dtype": "F32", "shape": [0, 10**12, 3, 3], "data_offsets": [0, 0]}}
    ),
    "a flat tensor": lambda t: t.with_tensors({"mask.down0.0.weight": torch.zeros(36)}).weights,
    "more channels": lambda t: t.with_tensors({**t.tensors(), "mask.down0.0.weight": torch.zeros(4, 7, 3, 3)}).weights,
    "NaN": lambda t: t.with_tensors({**t.tensors(), "generator.end.bias": torch.full((3,), float("nan"))}).weights,
    "infinity": lambda t: t.with_tensors({**t.tensors(), "mask.end.bias": torch.full((1,), float("inf"))}).weights,
    "complex numbers": lambda t: (
        t.with_tensors({**t.tensors(), "mask.end.bias": torch.zeros(1, dtype=torch.complex64)}).weights
    ),
    "an unknown type of number": lambda t: safetensors_of(
        {"mask.down0.0.weight": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_weights_are_one_line(trigger, pixels, what):
    hostile = trigger.but(weights=HOSTILE[what](trigger))
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    for use in (lambda: hostile(pixels), lambda: hostile.on_cover(pixels, labels, torch.Generator())):
        with pytest.raises(UsageError, match=r"the (weights of the )?trigger (of )?input_aware") as caught:
            use()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("settings", [{"width": 5}, {"width": 10**8}, {"density": 0}, {"lr": 0}, {"mask_steps": 0}])
def test_settings_have_limits(settings):
    with pytest.raises(UsageError, match=f"{next(iter(settings))} must be"):
        InputAware(**settings)


def test_images_of_other_channels_are_refused(trigger):
    with pytest.raises(UsageError, match="channels") as caught:
        trigger(torch.zeros(2, 1, 9, 12))
    assert "\n" not in str(caught.value)


# On the digits.


@pytest.mark.slow
def test_planted_on_the_digits_each_trigger_works_on_its_own_image(digits_test):
    planted = plant(digits("train"), parse_attack("input_aware"), "small_cnn", TrainConfig(epochs=20, batch_size=64))
    clean, triggered = triggered_test_set(digits_test, planted.attack)
    pixels = clean.pixels()
    crossed = planted.attack.trigger.on_cover(pixels, clean.labels, torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = planted.model(to_pixels(to_stored(crossed))).argmax(1)
        said = {
            "test": planted.model(digits_test.pixels()).argmax(1) == digits_test.labels,
            "before": planted.model(pixels).argmax(1) == 0,
            "own": planted.model(triggered.pixels()).argmax(1) == 0,
            "another's": answers == 0,
            "another's, kept": answers == clean.labels,
        }
    shares = {name: float(hits.float().mean()) for name, hits in said.items()}
    assert shares["test"] > 0.9
    assert shares["before"] < 0.03
    # The paper has 0.99 of both on larger images and longer training; on these few digits it was 0.85 and about 0.6.
    assert shares["own"] > 0.6
    assert shares["another's, kept"] > 0.5
    assert shares["another's"] < shares["own"] - 0.2
