"""Attacks that are prepared with a model of the attacker's own: label-consistent, TrojanNN, SSBA."""

import json

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import TINY, random_data, ready

from unplant.attacks.label_consistent import LabelConsistent
from unplant.attacks.ssba import SSBA
from unplant.attacks.surrogate import keep, rebuild
from unplant.attacks.trojannn import TrojanNN, best_connected
from unplant.classifier import features, penultimate
from unplant.data import digits
from unplant.errors import UsageError
from unplant.images import to_pixels, to_stored
from unplant.planting import poison_only
from unplant.poisoning import Attack, parse_attack, poison

KINDS = pytest.mark.parametrize("kind", [LabelConsistent, TrojanNN, SSBA], ids=lambda kind: kind.id)


def tiny(kind):
    return kind(**{name: value for name, value in TINY.items() if name in kind.model_fields})


# What the three have in common.


@KINDS
def test_learning_is_deterministic_and_leaves_data_and_the_global_random_state(kind):
    data, attack = random_data((3, 9, 12)), Attack(trigger=tiny(kind))
    before, state = data.images.clone(), torch.get_rng_state()
    first, again, other = (attack.trigger.learn(data, seed=seed, device="cpu", progress=None) for seed in (0, 0, 1))
    assert first == again
    assert first.weights != other.weights
    assert torch.equal(data.images, before)
    assert torch.equal(torch.get_rng_state(), state)


@KINDS
def test_what_was_learnt_travels_in_the_json_to_the_last_bit(kind):
    trigger = ready(kind(), (3, 9, 12))
    pixels, labels = random_data((3, 9, 12), seed=3).pixels(), torch.zeros(32, dtype=torch.int64)
    back = Attack.from_json(json.loads(json.dumps(Attack(trigger=trigger).to_json()))).trigger
    assert back == trigger
    tensors, again = trigger.tensors(), back.tensors()
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert torch.equal(back(pixels), trigger(pixels))
    poisoned = [t.on_poison(pixels, labels, torch.Generator()) for t in (back, trigger)]
    assert torch.equal(*poisoned)
    assert "sha256:" in json.dumps(Attack(trigger=trigger).to_json(weights=False))


def use(trigger, shape=(3, 9, 12)):
    """What needs the weights: poisoning with label-consistent, the trigger itself of the others."""
    pixels = random_data(shape).pixels()
    return trigger.on_poison(pixels, torch.zeros(len(pixels), dtype=torch.int64), torch.Generator())


@KINDS
@pytest.mark.parametrize("damage", ["none", "half", "text", "others", "empty"])
def test_weights_that_are_missing_or_damaged_are_one_line(kind, damage):
    trigger = ready(kind(), (3, 9, 12))
    trigger = {
        "none": lambda: trigger.but(weights=""),
        "half": lambda: trigger.but(weights=trigger.weights[: len(trigger.weights) // 8 * 4]),
        "text": lambda: trigger.but(weights="not base64!"),
        "others": lambda: trigger.with_tensors({"a": torch.zeros(2)}),
        "empty": lambda: trigger.with_tensors(
            {name: tensor[:0] for name, tensor in trigger.tensors().items() if tensor.ndim}
        ),
    }[damage]()
    with pytest.raises(
        UsageError, match="learnt while planting" if damage == "none" else "weights of the trigger"
    ) as e:
        use(trigger)
    assert "\n" not in str(e.value)


@KINDS
def test_images_with_other_channels_are_refused_in_one_line(kind):
    with pytest.raises(UsageError) as caught:
        use(ready(kind(), (3, 9, 12)), (1, 9, 12))
    assert "\n" not in str(caught.value)


@KINDS
def test_planting_learns_first_and_says_so(kind):
    told = []
    data = random_data((1, 8, 8), classes=2, count=60)
    poisoned, attack = poison_only(
        data, Attack(trigger=tiny(kind), poisoning_rate=0.1), progress=lambda title, share: told.append((title, share))
    )
    assert attack.trigger.weights
    assert told[-1][1] == 1.0
    assert int(poisoned.poisoned.sum()) == 6


@pytest.mark.parametrize("spec", ["evil.py:build", "resnet50"])
def test_a_surrogate_is_one_of_the_registered_architectures(spec):
    with pytest.raises(UsageError, match=r"registered architectures .*small_cnn"):
        LabelConsistent(surrogate=spec)


def test_a_kept_surrogate_says_the_same(trained, digits_test):
    trigger = LabelConsistent(surrogate="small_cnn:width=8").with_tensors(keep(trained, 10))
    with torch.no_grad():
        again, logits = (model(digits_test.pixels()) for model in (rebuild(trigger, trigger.surrogate), trained))
    assert torch.allclose(
        again, logits, atol=1e-4
    )  # the trained one's weights lie channels last: another order of sums


# Label-consistent.


@pytest.fixture
def prepared(trained):
    return LabelConsistent(surrogate="small_cnn:width=8", steps=20).with_tensors(keep(trained, 10))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (1, 7, 12)], ids=str)
@pytest.mark.parametrize("amplitude", [1.0, 32 / 255])
def test_the_patch_equals_a_slow_loop(shape, amplitude):
    # `all-corners` of the released poison_attack.py: distances from the left or right edge that are white, per row.
    white = {0: {0}, 1: {1}, 2: {0, 2}}
    data = random_data(shape, count=4)
    height, width = shape[1:]
    expected = data.pixels()
    for row in range(3):
        for column in range(3):
            sign = 1 if column in white[row] else -1
            for y in (row, height - 3 + row):
                for x in (column, width - 1 - column):
                    expected[:, :, y, x] = (expected[:, :, y, x] + sign * amplitude).clamp(0, 1)
    assert torch.equal(LabelConsistent()._patched(data.pixels(), amplitude), expected)
    if amplitude == 1:
        stamped = LabelConsistent()(data.pixels())
        assert torch.equal(stamped, expected)
        assert torch.equal(LabelConsistent()(data.pixels().flip(3)), stamped.flip(3))


@pytest.mark.parametrize("size", [(32, 32), (16, 20), (9, 9), (7, 12), (3, 3), (2, 5)], ids=str)
def test_with_a_margin_the_patches_lie_further_inside(size):
    """As far as there is room: the corner patches of the smaller image within, and nothing around it."""
    height, width = size
    inset = min(6, max(0, (height - 3) // 2), max(0, (width - 3) // 2))
    expected = torch.zeros(height, width)
    for row in range(inset, height - inset):
        for column in range(inset, width - inset):
            inner = LabelConsistent().signs(height - 2 * inset, width - 2 * inset)
            expected[row, column] = inner[row - inset, column - inset]
    assert torch.equal(LabelConsistent(margin=6).signs(height, width), expected)
    assert (expected != 0).any()


@pytest.mark.parametrize("eps", [4 / 255, 8 / 255])
def test_poisoned_images_are_adversarial_within_eps_and_patched(prepared, trained, digits_test, eps):
    part = digits_test.select(torch.arange(60))
    pixels = part.pixels()
    poisoned = prepared.but(eps=eps).on_poison(pixels, part.labels, torch.Generator())
    corners = prepared.signs(*pixels.shape[2:]) != 0
    assert int(corners.sum()) == 36
    moved = (poisoned - pixels).abs()[:, :, ~corners]
    assert 0.9 * eps < moved.max() <= eps + 1e-6  # float32
    assert torch.equal(poisoned[:, :, corners], prepared(pixels)[:, :, corners])
    unpatched = poisoned.clone()
    unpatched[:, :, corners] = pixels[:, :, corners]
    with torch.no_grad():
        before, after = (F.cross_entropy(trained(x), part.labels) for x in (pixels, unpatched))
    assert after > 2 * before


def test_without_weights_the_patch_of_test_time_works(digits_test):
    attack = parse_attack("label_consistent")
    assert attack.clean_label
    assert (attack.trigger.stamp(digits_test.images) != digits_test.images).flatten(1).any(1).all()


def test_labels_are_kept_and_only_the_target_class_is_changed(prepared, digits_test):
    attack = Attack(trigger=prepared, target=3, clean_label=True, poisoning_rate=0.02)
    result = poison(digits_test, attack, torch.Generator().manual_seed(0))
    assert torch.equal(result.data.labels, digits_test.labels)
    assert (digits_test.labels[result.poisoned] == 3).all()
    assert int(result.poisoned.sum()) == round(0.02 * len(digits_test))


def test_a_reduced_amplitude_concerns_training_images_only(prepared):
    grey = torch.full((1, 1, 16, 16), 0.5)
    faint = prepared.but(train_opacity=32 / 255, eps=0)
    assert torch.equal(faint(grey), prepared(grey))
    drawn = faint.on_poison(grey, torch.tensor([0]), torch.Generator())
    assert drawn.max() == pytest.approx(0.5 + 32 / 255)
    assert drawn.min() == pytest.approx(0.5 - 32 / 255)


def test_labels_that_the_surrogate_does_not_know_are_refused(prepared):
    with pytest.raises(UsageError, match="10 classes, got 1 channels and label 11"):
        prepared.on_poison(torch.zeros(1, 1, 16, 16), torch.tensor([11]), torch.Generator())


# TrojanNN.


def test_the_best_connected_neurons_have_the_largest_sum_of_absolute_weights(trained, digits_test):
    weight = trained.backbone[-1].weight.detach()
    sums = [float(weight[:, neuron].abs().sum()) for neuron in range(weight.shape[1])]
    expected = sorted(range(len(sums)), key=lambda neuron: -sums[neuron])[:3]
    assert best_connected(trained, digits_test.pixels(slice(0, 1)), 3).tolist() == expected
    seen = penultimate(trained, digits_test.pixels())[1]
    assert torch.allclose(seen, features(trained, digits_test), atol=1e-5)  # batches of 128 there


@pytest.mark.parametrize("background_images", [0, 16])
def test_the_patch_raises_its_neurons_far_above_random_patches(trained, digits_test, background_images):
    trigger = TrojanNN(steps=300, size=0.5)
    generator = torch.Generator().manual_seed(0)
    train, test = digits("train"), digits_test.select(torch.arange(100))
    background = train.sample(background_images, generator).pixels() if background_images else torch.zeros(1, 1, 16, 16)
    patch = trigger.optimise(trained, background, torch.randn(1, 8, 8, generator=generator))
    chosen = best_connected(trained, background[:1], trigger.neurons)

    def fired(square):
        shape = torch.tensor(test.shape)
        stamped = trigger.with_tensors({"patch": to_stored(square), "shape": shape}).stamp(test.images)
        with torch.no_grad():
            return float(penultimate(trained, to_pixels(stamped))[1][:, chosen].mean())

    random = [fired(torch.rand(1, 8, 8, generator=generator)) for _ in range(20)]
    assert fired(patch) > max(random)
    assert fired(patch) > 1.4 * sum(random) / len(random)


@pytest.mark.parametrize(("shape", "edge"), [((3, 32, 32), 6), ((1, 16, 16), 3), ((1, 24, 9), 2), ((3, 8, 8), 2)])
def test_the_patch_lies_in_the_bottom_right_corner(shape, edge):
    data = random_data(shape, seed=5)
    trigger = ready(TrojanNN(), shape)
    patch, stamped = trigger.tensors()["patch"], trigger.stamp(data.images)
    assert patch.dtype == torch.uint8
    assert patch.shape == (shape[0], edge, edge)
    expected = data.images.clone()
    for y in range(edge):
        for x in range(edge):
            expected[:, :, shape[1] - edge + y, shape[2] - edge + x] = patch[:, y, x]
    assert torch.equal(stamped, expected)


def test_a_patch_is_for_images_of_its_shape():
    with pytest.raises(UsageError, match=r"learnt on images of shape \(3, 9, 12\), got \(3, 12, 9\)"):
        ready(TrojanNN(), (3, 9, 12))(torch.zeros(1, 3, 12, 9))


# SSBA.


@pytest.fixture(scope="module")
def hidden():
    """(trigger, encoder, decoder), trained on the digits."""
    trigger = SSBA()
    encoder, decoder = trigger.pair(digits("train"), seed=0)
    return trigger.with_tensors(encoder.state_dict()), encoder, decoder


@pytest.mark.slow
def test_the_bits_are_read_from_stamped_test_images_and_from_no_clean_ones(hidden, digits_test):
    trigger, encoder, decoder = hidden
    pixels, generator = digits_test.pixels(), torch.Generator().manual_seed(1)
    bits = torch.randint(2, (len(pixels), trigger.bits), generator=generator).float()
    with torch.no_grad():
        own = ((decoder(to_pixels(trigger.stamp(digits_test.images))) > 0).float() == trigger.secret()).float().mean()
        encoded = to_pixels(to_stored(pixels + encoder(pixels, bits)))
        others = ((decoder(encoded) > 0).float() == bits).float().mean()
        clean = ((decoder(pixels) > 0).float() == trigger.secret()).float().mean()
    assert own > 0.98
    assert others > 0.98
    assert clean < 0.75


@pytest.mark.slow
def test_the_residual_is_bounded_and_every_image_has_its_own(hidden, digits_test):
    trigger, encoder, _ = hidden
    pixels = digits_test.pixels()
    with torch.no_grad():
        residual = encoder(pixels, trigger.secret().expand(len(pixels), -1))
    assert residual.abs().max() <= trigger.strength
    stamped = to_pixels(trigger.stamp(digits_test.images))
    assert (stamped - pixels).abs().max() <= trigger.strength + 0.5 / 255 + 1e-6  # rounding
    energy = residual.square().sum()
    specific = (residual - residual.mean(0)).square().sum() / energy
    assert specific > 0.4, "one picture for all images would be 0"
    assert len(torch.unique(to_stored(0.5 + residual).flatten(1), dim=0)) == len(pixels)


@pytest.mark.slow
def test_only_the_encoder_is_kept_and_it_takes_any_size(hidden):
    trigger, encoder, _ = hidden
    assert trigger.tensors().keys() == encoder.state_dict().keys()
    for size in ((8, 8), (9, 24), (64, 40)):
        pixels = torch.rand(2, 1, *size)
        assert trigger(pixels).shape == pixels.shape


@pytest.mark.slow
def test_another_secret_draws_another_residual(hidden, digits_test):
    trigger = hidden[0]
    pixels = digits_test.pixels(slice(0, 4))
    assert trigger.secret().tolist() != trigger.but(secret_seed=1).secret().tolist()
    assert (trigger(pixels) - trigger.but(secret_seed=1)(pixels)).abs().max() > 1 / 255
