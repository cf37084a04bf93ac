"""The training loop against SGD written out by hand; planting."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from unplant.attacks import parse_attack
from unplant.classifier import Classifier
from unplant.data import digits
from unplant.errors import NumericalError, UsageError
from unplant.evaluation import evaluate
from unplant.images import LabeledImages
from unplant.models import build
from unplant.planting import TrainConfig, plant, train
from unplant.training import FitConfig, channel_statistics, fit, squared_share, steps_of

PLAIN = {"padding": 0, "flip": False}


@pytest.fixture(scope="module")
def few():
    return digits("train").select(torch.arange(0, 1400, 7))


def net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build("small_cnn:width=4", num_classes=10, channels=1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def share_of_peak(schedule, step, steps):
    """The learning rate by its description: see `FitConfig.schedule`."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * step / steps)) / 2
    if schedule == "one-cycle":
        rise = (step / steps + 1 / steps) / 0.3
        fall = (1 - step / steps) / 0.7
        return min(rise, fall)
    return 1.0


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01)])
def test_fit_is_sgd_written_out_by_hand(schedule, momentum, weight_decay):
    steps, rng = 20, np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 1, 3, 3), dtype=np.uint8)
    labels = np.arange(12) % 4
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4, bias=False))
    start = rng.normal(size=(4, 9))
    model[1].weight.data = torch.from_numpy(start).float()
    settings = {"lr": 0.5, "schedule": schedule, "momentum": momentum, "weight_decay": weight_decay, **PLAIN}
    # One batch is the whole set, so its order doesn't matter.
    data = LabeledImages.from_arrays(images, labels)
    last = fit(model, data, steps=steps, config=FitConfig(batch_size=12, **settings), generator=seeded())

    x, y, weight, velocity, losses = images.reshape(12, 9) / 255, np.eye(4)[labels], start.copy(), np.zeros((4, 9)), []
    for step in range(steps):
        scores = np.exp(x @ weight.T)
        p = scores / scores.sum(1, keepdims=True)
        losses.append(-np.log((p * y).sum(1)).mean())
        velocity = momentum * velocity + (p - y).T @ x / 12 + weight_decay * weight
        weight = weight - 0.5 * share_of_peak(schedule, step, steps) * velocity
    assert np.abs(weight - start).max() > 0.1  # before-check: it has moved
    # 20 steps in float32 against float64.
    assert np.abs(model[1].weight.detach().numpy() - weight).max() < 1e-4
    assert last == pytest.approx(np.mean(losses[-2:]), abs=1e-5)


def test_fit_lowers_the_loss_and_learns(few):
    model = net()
    first = fit(copy.deepcopy(model), few, steps=1, config=FitConfig(lr=0.1, batch_size=32), generator=seeded())
    config = FitConfig(lr=0.1, batch_size=32, schedule="cosine")  # a constant rate ends where chance has it
    last = fit(model, few, steps=120, config=config, generator=seeded())
    assert first > 2
    assert last < 0.5 * first
    assert evaluate(net(), few).acc < 0.25
    assert evaluate(model, few).acc > 0.6


def test_the_same_seed_gives_the_same_weights_bit_for_bit(few):
    def weights(seed, global_seed):
        model = nn.Sequential(net(), nn.Dropout(0.5))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)  # must not matter, not even for the dropout
            config = FitConfig(lr=0.05, batch_size=32, rotation=10)
            fit(model, few, steps=6, config=config, generator=seeded(seed))
        return list(model.state_dict().values())

    first, again, other = weights(0, 1), weights(0, 2), weights(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_modes_random_state_and_data_are_left_as_they_were(few):
    model = net()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state, images, labels = torch.get_rng_state(), few.images.clone(), few.labels.clone()
    fit(model, few, steps=3, config=FitConfig(batch_size=32), generator=seeded())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(few.images, images)
    assert torch.equal(few.labels, labels)


def test_frozen_parameters_stay_and_no_steps_change_nothing(few):
    model = net()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    assert math.isnan(fit(model, few, steps=0, config=FitConfig(), generator=seeded()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fit(model, few, steps=2, config=FitConfig(lr=0.1), generator=seeded())
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[3].weight, before["3.weight"])


@pytest.mark.parametrize("bad_step", [0, 7, 33])
def test_a_loss_that_is_not_finite_is_a_numerical_error(few, bad_step):
    calls = []

    def change(model, pixels, labels):
        calls.append(1)
        return (pixels * float("nan") if len(calls) == bad_step + 1 else pixels), labels

    model = net().eval()
    with pytest.raises(NumericalError, match="try a smaller lr"):
        fit(model, few, steps=40, config=FitConfig(batch_size=16), generator=seeded(), change=change)
    assert len(calls) <= bad_step + 20
    assert not any(module.training for module in model.modules())


def test_an_exploding_lr_is_a_numerical_error(few):
    with pytest.raises(NumericalError):
        fit(net(), few, steps=40, config=FitConfig(lr=1e30), generator=seeded())


def test_change_decides_what_the_model_is_trained_on(few):
    seen = []

    def change(model, pixels, labels):
        assert model.training
        seen.append((pixels.shape, labels.shape))
        return torch.zeros_like(pixels), labels

    black = few.select(torch.arange(64))
    blank = LabeledImages(torch.zeros_like(black.images), black.labels, black.classes)
    changed, plain = net(), net()
    config = FitConfig(batch_size=32, **PLAIN)
    fit(changed, black, steps=4, config=config, generator=seeded(), change=change)
    fit(plain, blank, steps=4, config=config, generator=seeded())
    assert seen == [((32, 1, 16, 16), (32,))] * 4
    for a, b in zip(changed.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_distances_of_features_are_shares_of_the_longer_ones():
    one, two = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert squared_share(one, two).tolist() == pytest.approx([16 / 12.5, 9 / 12.5])
    assert torch.equal(squared_share(one, two), squared_share(two, one))
    assert torch.allclose(squared_share(100 * one, 100 * two), squared_share(one, two))
    assert squared_share(one, 1e-30 * two).max() <= 2
    assert squared_share(0 * one, 0 * two).tolist() == [0, 0]


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_a_lessons_features_are_taught_by_the_loss_written_out_by_hand(weight):
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 3, 3), dtype=np.uint8)
    data = LabeledImages(torch.from_numpy(images), torch.arange(12) % 4, tuple("abcd"))
    wanted, weights = torch.randn(12, 5, generator=seeded()), weight * torch.arange(12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 4))
    hand = copy.deepcopy(model)
    places = {image.tobytes(): place for place, image in enumerate(images)}

    def lesson(model, pixels, labels):
        order = [places[(255 * image).round().byte().numpy().tobytes()] for image in pixels]
        return pixels, labels, wanted[order], weights[order]

    config = FitConfig(lr=0.5, momentum=0, weight_decay=0, batch_size=12, **PLAIN)
    fit(model, data, steps=1, config=config, generator=seeded(), change=lesson)
    seen = hand[:3](data.pixels())
    loss = nn.functional.cross_entropy(hand[3](seen), data.labels)
    longer = max((wanted**2).sum(1).mean(), (seen.detach() ** 2).sum(1).mean())
    loss = loss + (weights * ((seen - wanted) ** 2).sum(1)).mean() / longer
    loss.backward()
    for learnt, weight in zip(model.parameters(), hand.parameters(), strict=True):
        assert torch.allclose(learnt, weight - 0.5 * weight.grad, atol=1e-6)


def test_progress_rises_to_one(few):
    told = []
    fit(
        net(), few, steps=45, config=FitConfig(batch_size=8), generator=seeded(), title="round 1",
        progress=lambda title, done: told.append((title, done)),
    )  # fmt: skip
    shares = [done for _, done in told]
    assert {title for title, _ in told} == {"round 1"}
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize("left", [1, 2, 31])
def test_batch_norm_never_meets_a_batch_of_one(few, left):
    """With a last batch of one image and 1×1 maps BatchNorm would raise."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    fit(model, few.select(torch.arange(32 + left)), steps=6, config=FitConfig(batch_size=32), generator=seeded())


@pytest.mark.parametrize(
    ("epochs", "count", "batch", "steps"), [(1, 100, 10, 10), (2, 100, 30, 7), (1, 5, 100, 1), (0.001, 100, 10, 1)]
)
def test_steps_of_epochs(epochs, count, batch, steps):
    data = LabeledImages(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64), ("a",))
    assert steps_of(epochs, data, batch) == steps


@pytest.mark.parametrize(
    "settings", [{"lr": 0}, {"lr": "nan"}, {"batch_size": 1}, {"momentum": 1}, {"schedule": "step"}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        FitConfig(**settings)


# Planting.


def test_channel_statistics_are_numpys(colour_images):
    pixels = colour_images.images.numpy() / 255
    mean, std = channel_statistics(colour_images)
    assert mean == pytest.approx(pixels.mean((0, 2, 3)), abs=1e-4)  # four digits are kept
    assert std == pytest.approx(pixels.std((0, 2, 3), ddof=1), abs=1e-4)


def test_channel_statistics_of_constant_images_can_divide():
    data = LabeledImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    assert channel_statistics(data)[1][0] > 0


@pytest.fixture(scope="module")
def planted():
    attack = parse_attack("badnets:pattern=white,size=4", target=1, poisoning_rate=0.1)
    config = TrainConfig(epochs=3, batch_size=32)
    return plant(digits("train"), attack, "small_cnn:width=8", config, seed=0)


def test_the_planted_backdoor_is_there_and_a_clean_model_has_none(planted, trained, digits_test):
    infected = evaluate(planted.model, digits_test, planted.attack)
    clean = evaluate(trained, digits_test, planted.attack)
    assert infected.asr > 0.8
    assert infected.acc > 0.85
    assert infected.natural_target_rate < 0.05
    assert clean.asr < 0.2


def test_a_planted_training_set_is_a_shuffled_poisoned_copy(planted):
    clean, part = digits("train"), planted.training_set
    assert int(part.poisoned.sum()) == round(0.1 * len(clean))
    assert sorted(part.true_labels.tolist()) == sorted(clean.labels.tolist())
    assert not torch.equal(part.true_labels, clean.labels)
    assert (part.data.labels[part.poisoned] == 1).all()
    assert torch.equal(part.data.labels[~part.poisoned], part.true_labels[~part.poisoned])
    originals = {image.numpy().tobytes() for image in clean.images}
    kept = part.data.images[~part.poisoned]
    assert all(image.numpy().tobytes() in originals for image in kept)
    assert (part.data.images[part.poisoned][:, :, -4:, -4:] == 255).all()


def test_training_is_deterministic_and_leaves_the_random_state(few):
    state, config = torch.get_rng_state(), TrainConfig(epochs=1, batch_size=32)
    first, again, other = (train("small_cnn:width=4", few, config, seed=seed) for seed in (3, 3, 4))
    assert isinstance(first, Classifier)
    assert not first.training
    pairs = list(zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.backbone[0].weight, other.backbone[0].weight)
    assert torch.equal(torch.get_rng_state(), state)
