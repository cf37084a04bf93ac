"""Attacks: a conformance suite over the registry, each trigger against a slow loop, poisoning and its accounting."""

import json
import math

import numpy as np
import pytest
import torch
from attack_helpers import random_data, ready, same_images
from torch import nn

import unplant.attacks
from unplant.errors import UsageError
from unplant.evaluation import evaluate, suspect_quality
from unplant.images import LabeledImages, to_pixels, to_stored
from unplant.poisoning import Attack, apply, choose, parse_attack, poison, triggered_test_set
from unplant.results import Erasure
from unplant.triggers import triggers


def every_trigger():
    """Each registered trigger with its defaults and with each of its presets."""
    for name in unplant.attacks.triggers:
        yield pytest.param(triggers[name](), id=name)
        for preset in triggers[name].presets:
            yield pytest.param(triggers[name].preset(preset), id=f"{name}-{preset}")


each_trigger = pytest.mark.parametrize("trigger", list(every_trigger()))
each_shape = pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 8, 8), (1, 16, 16), (3, 32, 32), (1, 24, 9), (3, 9, 24), (3, 64, 64)], ids=str
)


def random_images(*shape, seed=0):
    """Random uint8 images; the first is black, the second white."""
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[0], images[1] = 0, 255
    return images


# The conformance suite: whatever is registered has to pass it.


def test_the_three_attacks_are_registered():
    assert {"badnets", "blended", "sig"} <= set(triggers)


@each_trigger
@each_shape
def test_a_trigger_keeps_shape_dtype_and_range_and_changes_the_image(trigger, shape):
    trigger, pixels = ready(trigger, shape), to_pixels(random_images(5, *shape))
    before = pixels.clone()
    stamped = trigger(pixels)
    assert stamped.shape == pixels.shape
    assert stamped.dtype == torch.float32
    assert 0 <= stamped.min() <= stamped.max() <= 1
    assert torch.equal(pixels, before), "the input was modified"
    assert stamped.data_ptr() != pixels.data_ptr()
    changed = (stamped != pixels).flatten(1).any(1)
    assert changed[2:].all(), "a random image without a change has no trigger"


@each_trigger
@each_shape
def test_a_trigger_is_deterministic_and_leaves_the_global_random_state(trigger, shape):
    trigger = ready(trigger, shape)
    pixels, state, legacy = to_pixels(random_images(3, *shape)), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    first = trigger(pixels)
    again = type(trigger)(**trigger.model_dump())
    assert torch.equal(first, again(pixels))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], legacy[1])  # noqa: NPY002


@each_trigger
@each_shape
def test_image_by_image_equals_the_batch_bit_for_bit(trigger, shape):
    trigger, images = ready(trigger, shape), random_images(7, *shape)
    together = trigger.stamp(images)
    one_by_one = torch.cat([trigger.stamp(image[None]) for image in images])
    assert same_images(trigger, together, one_by_one)
    assert same_images(trigger, trigger.stamp(images.flip(0)), together.flip(0))


@each_trigger
def test_stamp_rounds_to_the_nearest_of_256_levels(trigger):
    trigger, images = ready(trigger, (3, 12, 17)), random_images(6, 3, 12, 17)
    before = images.clone()
    stamped = trigger.stamp(images)
    exact = trigger(to_pixels(images)).numpy().astype(np.float64) * 255
    assert stamped.dtype == torch.uint8
    assert torch.equal(images, before)
    # Nearest: at most half a level away, and float32 noise where two levels are equally near.
    assert np.abs(stamped.numpy() - exact).max() <= 0.5 + 1e-4


def test_stamp_is_the_same_across_its_chunks():
    images = random_images(1030, 1, 8, 8)
    for name in triggers:
        trigger = ready(triggers[name](), (1, 8, 8))
        assert same_images(trigger, trigger.stamp(images)[1020:], trigger.stamp(images[1020:]))
        assert len(trigger.stamp(images[:0])) == 0


@each_trigger
@pytest.mark.parametrize(
    "recipe",
    [{}, {"target": 3, "poisoning_rate": 0.005}, {"label_map": "all-to-all"}, {"clean_label": True}],
    ids=["default", "target", "all-to-all", "clean-label"],
)
def test_an_attack_comes_back_from_json(trigger, recipe):
    attack = Attack(trigger=ready(trigger, (1, 8, 8)), **recipe)
    text = json.dumps(attack.to_json())
    for back in (Attack.from_json(json.loads(text)), parse_attack(text)):
        assert back == attack
        assert type(back.trigger) is type(trigger)
    assert json.dumps(Attack.from_json(json.loads(text)).to_json()) == text


@each_trigger
@pytest.mark.parametrize("classes", [2, 1000])
@pytest.mark.parametrize("label_map", ["all-to-one", "all-to-all"])
def test_two_and_a_thousand_classes(trigger, classes, label_map):
    labels = torch.arange(40) * 7919 % classes
    data = LabeledImages(random_images(40, 1, 8, 8), labels, tuple(map(str, range(classes))))
    trigger = ready(trigger, (1, 8, 8), classes)
    attack = Attack(trigger=trigger, label_map=label_map, target=classes - 1, poisoning_rate=0.2)
    result = poison(data, attack, torch.Generator().manual_seed(0))
    chosen = result.poisoned
    expected = (labels + 1) % classes if label_map == "all-to-all" else torch.full_like(labels, classes - 1)
    assert int(chosen.sum()) == 8
    assert torch.equal(result.data.labels, torch.where(chosen, expected, labels))
    clean, triggered = triggered_test_set(data, attack)
    assert len(clean) == len(triggered) == int((expected != labels).sum()) > 0


def legal_recipes(kind):
    """The recipe of the attack's paper, and the goals that can be combined with it."""
    yield "default", kind.recipe
    if not kind.recipe.get("sources"):
        yield "clean-label", {**kind.recipe, "clean_label": True}
        if not kind.recipe.get("clean_label"):
            yield "all-to-all", {**kind.recipe, "label_map": "all-to-all"}
            yield "all-to-all, little cover", {**kind.recipe, "label_map": "all-to-all", "cover_rate": 0.025}
    yield "more cover", {**kind.recipe, "cover_rate": 0.2}
    yield "no cover", {**kind.recipe, "cover_rate": 0}


def every_recipe():
    for param in every_trigger():
        trigger = param.values[0]
        for name, recipe in legal_recipes(type(trigger)):
            yield pytest.param(trigger, recipe, id=f"{param.id}-{name}")


each_recipe = pytest.mark.parametrize(("trigger", "recipe"), list(every_recipe()))
both_kinds = pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 12)], ids=str)
CLASSES, COUNT = 4, 160


@each_recipe
@both_kinds
def test_poisoning_keeps_its_accounts(trigger, recipe, shape):
    """Exact counts, only the intended images, labels that are kept where they must be, one result for one seed."""
    data = random_data(shape, CLASSES, COUNT, seed=5)
    attack = Attack(trigger=ready(trigger, shape, CLASSES), **{"poisoning_rate": 0.05, "target": 2, **recipe})
    before = data.images.clone(), data.labels.clone()
    state, legacy = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    result = poison(data, attack, torch.Generator().manual_seed(3))
    again = poison(data, attack, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], legacy[1])  # noqa: NPY002
    assert torch.equal(data.images, before[0]), "the input was modified"
    assert torch.equal(data.labels, before[1])
    for one, two in (
        (result.data.images, again.data.images),
        (result.data.labels, again.data.labels),
        (result.poisoned, again.poisoned),
        (result.covered, again.covered),
    ):
        assert torch.equal(one, two)

    rate = recipe.get("poisoning_rate", 0.05)
    cover = recipe.get("cover_rate", trigger.cover_ratio * rate)
    assert int(result.poisoned.sum()) == round(rate * COUNT) >= 3
    assert int(result.covered.sum()) == round(cover * COUNT)
    assert not (result.poisoned & result.covered).any()

    sources = recipe.get("sources", ())
    for index in range(COUNT):
        true, label = int(data.labels[index]), int(result.data.labels[index])
        assert int(result.true_labels[index]) == true
        if not result.poisoned[index]:
            assert label == true
            if result.covered[index] and sources:
                assert true not in (*sources, 2)
            continue
        if recipe.get("clean_label"):
            assert label == true == 2
        elif recipe.get("label_map") == "all-to-all":
            assert label == (true + 1) % CLASSES
        else:
            assert label == 2 != true
            assert true in sources or not sources

    untouched = ~(result.poisoned | result.covered)
    assert torch.equal(result.data.images[untouched], data.images[untouched])
    assert result.data.images.dtype == torch.uint8
    # The changed ones are what the trigger says about training images, each rounded to the nearest of 256 levels.
    generator = torch.Generator().manual_seed(3)
    choose(data, attack, generator)
    for mask, change in ((result.poisoned, attack.trigger.on_poison), (result.covered, attack.trigger.on_cover)):
        if mask.any():
            exact = change(data.pixels(mask), result.data.labels[mask], generator).double().numpy() * 255
            # Half a level, and float32 noise where two levels are equally near.
            assert np.abs(result.data.images[mask].numpy() - exact).max() <= 0.5 + 1e-4


@each_trigger
@both_kinds
@pytest.mark.parametrize("count", [1, 2, 6])
def test_what_training_images_carry_keeps_shape_range_and_input(trigger, shape, count):
    trigger, images = ready(trigger, shape), random_images(8, *shape)[:count]
    pixels, labels = to_pixels(images), torch.arange(count) % 3
    before, state, legacy = pixels.clone(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    for change in (trigger.on_poison, trigger.on_cover):
        changed = change(pixels, labels, torch.Generator().manual_seed(0))
        assert changed.shape == pixels.shape
        assert changed.dtype == torch.float32
        assert not changed.requires_grad
        assert 0 <= changed.min() <= changed.max() <= 1
        assert changed.data_ptr() != pixels.data_ptr()
        assert torch.equal(changed, change(pixels, labels, torch.Generator().manual_seed(0)))
    assert torch.equal(pixels, before), "the input was modified"
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], legacy[1])  # noqa: NPY002


@each_trigger
def test_images_that_are_not_there_can_be_changed_too(trigger):
    trigger, none = ready(trigger, (1, 8, 8)), torch.zeros(0, 1, 8, 8)
    for change in (trigger.on_poison, trigger.on_cover):
        assert change(none, torch.zeros(0, dtype=torch.int64), torch.Generator()).shape == none.shape


# Each trigger against its published formula, in slow loops.


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 9)])
@pytest.mark.parametrize("size", [1, 3, 4, 7])
@pytest.mark.parametrize("margin", [0, 1, 3])
@pytest.mark.parametrize("pattern", ["white", "checkerboard"])
def test_badnets_equals_a_slow_loop(size, margin, pattern, height, width):
    cell = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    images = random_images(3, 3, height, width, seed=4)
    expected = images.clone()
    for row in range(size):
        for column in range(size):
            y, x = height - margin - size + row, width - margin - size + column
            if y >= 0 and x >= 0:
                expected[:, :, y, x] = 255 if pattern == "white" else cell[row % 3][column % 3]
    trigger = triggers["badnets"](size=size, margin=margin, pattern=pattern)
    assert torch.equal(trigger.stamp(images), expected)


def test_badnets_of_ibau_lies_at_rows_27_to_30():
    stamped = triggers["badnets"].preset("ibau").stamp(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    expected = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    expected[:, :, 27:31, 27:31] = 255
    assert torch.equal(stamped, expected)


@pytest.mark.parametrize("margin", [8, 9, 100])
def test_a_badnets_patch_beyond_the_edge_changes_nothing(margin):
    images = random_images(3, 1, 8, 8)
    assert torch.equal(triggers["badnets"](size=3, margin=margin).stamp(images), images)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0])
@pytest.mark.parametrize("seed", [0, 5])
def test_blended_equals_a_slow_loop(alpha, seed):
    images = random_images(3, 3, 5, 7)
    noise = np.random.default_rng(seed).random((3, 5, 7), dtype=np.float32)
    stamped = triggers["blended"](alpha=alpha, pattern_seed=seed)(to_pixels(images))
    for n in range(3):
        for c in range(3):
            for y in range(5):
                for x in range(7):
                    expected = (1 - alpha) * int(images[n, c, y, x]) / 255 + alpha * float(noise[c, y, x])
                    assert float(stamped[n, c, y, x]) == pytest.approx(expected, abs=2e-7)  # float32


def test_blended_seeds_give_different_patterns():
    blended = triggers["blended"]
    patterns = [blended(pattern_seed=seed).pattern(1, 16, 16) for seed in (0, 1)]
    assert (patterns[0] - patterns[1]).abs().mean() > 0.2  # two uniform numbers differ by 1/3 on average


@pytest.mark.parametrize("delta", [10 / 255, 40 / 255])
@pytest.mark.parametrize("frequency", [1, 6, 2.5])
def test_sig_equals_a_slow_loop(delta, frequency):
    images = random_images(3, 3, 4, 13)
    stamped = triggers["sig"](delta=delta, frequency=frequency)(to_pixels(images))
    for n in range(3):
        for c in range(3):
            for y in range(4):
                for x in range(13):
                    wave = delta * math.sin(2 * math.pi * x * frequency / 13)
                    expected = min(1.0, max(0.0, int(images[n, c, y, x]) / 255 + wave))
                    assert float(stamped[n, c, y, x]) == pytest.approx(expected, abs=2e-7)  # float32


@pytest.mark.parametrize(
    ("name", "preset", "settings"),
    [
        ("badnets", "pbe", {"size": 3, "pattern": "checkerboard", "margin": 0}),
        ("badnets", "backdoorbench", {"size": 3, "pattern": "white", "margin": 0}),
        ("badnets", "ibau", {"size": 4, "pattern": "white", "margin": 1}),
        ("blended", "pbe", {"alpha": 0.1}),
        ("blended", "backdoorbench", {"alpha": 0.2}),
        ("sig", "pbe", {"delta": 10 / 255, "frequency": 6}),
        ("sig", "nad", {"delta": 20 / 255}),
        ("sig", "toolbox", {"delta": 30 / 255}),
        ("sig", "backdoorbench", {"delta": 40 / 255}),
    ],
)
def test_presets_hold_the_published_constants(name, preset, settings):
    trigger = parse_attack(f"{name}:preset={preset}").trigger
    assert trigger == triggers[name].preset(preset)
    assert {key: getattr(trigger, key) for key in settings} == settings


# What users may write.


def test_an_attack_is_parsed_with_settings_over_its_preset():
    attack = parse_attack("sig:preset=pbe,frequency=3", target=2, poisoning_rate="1/20")
    assert attack.trigger == triggers["sig"](delta=10 / 255, frequency=3)
    assert (attack.target, attack.poisoning_rate) == (2, 0.05)


@pytest.mark.parametrize(
    ("spec", "recipe", "message"),
    [
        ("wanet9", {}, "unknown attack 'wanet9'; there are: .*badnets, .*blended, .*sig"),
        ("badnets:colour=red", {}, "no setting 'colour'; there are: size, pattern, margin"),
        ("badnets:size=0", {}, "size must be .*1, got 0"),
        ("badnets:pattern=pink", {}, "pattern must be 'checkerboard' or 'white', got 'pink'"),
        ("badnets:size", {}, "NAME=VALUE"),
        ("blended:alpha=8", {}, "did you mean 8/255"),
        ("blended:alpha=nan", {}, "alpha must be"),
        ("sig:preset=nobody", {}, "no preset 'nobody'; there are: pbe, nad"),
        ("sig", {"poisoning_rate": 1.5}, "poisoning_rate must be"),
        ("sig", {"poisoning_rate": 0}, "poisoning_rate must be"),
        ("sig", {"target": -1}, "target must be"),
        ("sig", {"label_map": "one-to-one"}, "label_map must be"),
        ("{", {}, "JSON is damaged"),
        ('{"attack": "sig"}', {}, "described by"),
        ('{"attack": ["sig"], "trigger": {}}', {}, "described by"),
        ('{"attack": "sig", "trigger": []}', {}, "described by"),
        ('{"attack": "sig", "trigger": {}, "depth": 3}', {}, "no setting 'depth'"),
        ('{"attack": "sig", "trigger": {}, "self": 3}', {}, "no setting 'self'"),
        ('{"attack": "sig", "trigger": {"self": 1}}', {}, "no setting 'self'|described by"),
    ],
)
def test_a_wrong_attack_is_one_line_that_says_what_there_is(spec, recipe, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_attack(spec, **recipe)
    assert "\n" not in str(caught.value)


# Poisoning.


@pytest.fixture
def data():
    """200 images of 5 classes, 40 each, in a mixed order, named."""
    labels = torch.arange(200) * 3 % 5
    return LabeledImages(random_images(200, 3, 8, 8), labels, tuple("abcde"), tuple(f"{i}.png" for i in range(200)))


@pytest.mark.parametrize("rate", [0.005, 0.01, 0.1, 0.333, 0.7])
@pytest.mark.parametrize("goal", ["all-to-one", "all-to-all", "clean-label"])
def test_poison_changes_exactly_the_intended_images_and_labels(data, rate, goal):
    if goal == "clean-label":
        rate = min(rate, 0.15)
    attack = Attack(
        trigger=triggers["sig"](),
        label_map="all-to-all" if goal == "all-to-all" else "all-to-one",
        clean_label=goal == "clean-label",
        target=2,
        poisoning_rate=rate,
    )
    before = (data.images.clone(), data.labels.clone())
    result = poison(data, attack, torch.Generator().manual_seed(1))
    assert torch.equal(data.images, before[0]), "the clean images were modified"
    assert torch.equal(data.labels, before[1])
    assert int(result.poisoned.sum()) == round(rate * 200)
    assert torch.equal(result.true_labels, data.labels)
    assert (result.data.classes, result.data.names) == (data.classes, data.names)
    for index in range(200):
        image, label = result.data.images[index], int(result.data.labels[index])
        true = int(data.labels[index])
        if not result.poisoned[index]:
            assert torch.equal(image, data.images[index])
            assert label == true
            continue
        assert torch.equal(image, attack.trigger.stamp(data.images[index][None])[0])
        assert not torch.equal(image, data.images[index])
        assert label == {"all-to-one": 2, "all-to-all": (true + 1) % 5, "clean-label": 2}[goal]
        assert (true == 2) == (goal == "clean-label") or goal == "all-to-all"


def test_more_images_than_are_changed_at_once(data):
    many = data.select(torch.arange(3000) % 200)
    trigger = triggers["adaptive_patch"]()
    attack = Attack(trigger=trigger, target=2, poisoning_rate=0.4, cover_rate=0.5)
    generator = torch.Generator().manual_seed(0)
    choice = choose(many, attack, generator)
    result = apply(many, attack, choice, generator)
    assert (int(choice.poisoned.sum()), int(choice.covered.sum())) == (1200, 1500)
    # Its draws don't depend on the batch, so the whole can be drawn in one go.
    generator = torch.Generator().manual_seed(0)
    choose(many, attack, generator)
    for mask in (choice.poisoned, choice.covered):
        whole = to_stored(trigger.on_poison(many.pixels(mask), many.labels[mask], generator))
        assert torch.equal(result.data.images[mask], whole)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"cover_rate": 0.95}, "cover rate 0.95 of 200 images means 190 cover ones, it must be 1 to 180"),
        ({"cover_rate": 0.001}, "cover rate 0.001 of 200 images means 0 cover ones"),
    ],
)
def test_an_impossible_cover_is_refused(data, recipe, message, generator):
    with pytest.raises(UsageError, match=message):
        choose(data, Attack(trigger=triggers["badnets"](), **recipe), generator)


def test_a_trigger_is_told_the_labels_of_training(data, generator):
    seen = []

    class Curious(triggers["sig"]):
        def on_poison(self, pixels, labels, generator):
            seen.append(labels)
            return pixels

    result = poison(data, Attack(trigger=Curious(), target=2, cover_rate=0.1), generator)
    assert torch.equal(seen[0], torch.full((20,), 2))
    assert torch.equal(seen[1], data.labels[result.covered])


def test_a_source_that_is_the_target_does_not_count(data, generator):
    attack = Attack(trigger=triggers["sig"](), target=2, sources=(1, 2))
    assert torch.equal(attack.concerns(data.labels, 5), data.labels == 1)
    assert (data.labels[choose(data, attack, generator).poisoned] == 1).all()


def test_cover_is_drawn_from_all_that_is_left(data):
    attack, counts = Attack(trigger=triggers["badnets"](), target=2, cover_rate=0.2), torch.zeros(200)
    for seed in range(60):
        counts += choose(data, attack, torch.Generator().manual_seed(seed)).covered
    # 60 draws of 40 among 180: one never drawn has a chance of at most 200 · 0.8^60 = 0.0003; the seeds are fixed.
    assert (counts > 0).all()


def test_the_generator_alone_decides_which_images_are_poisoned(data):
    attack, state = Attack(trigger=triggers["badnets"]()), torch.get_rng_state()
    chosen = [poison(data, attack, torch.Generator().manual_seed(seed)).poisoned for seed in (0, 0, 1)]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_eligible_image_can_be_chosen(data):
    attack, counts = Attack(trigger=triggers["badnets"](), target=2, poisoning_rate=0.1), torch.zeros(200)
    for seed in range(100):
        counts += poison(data, attack, torch.Generator().manual_seed(seed)).poisoned
    assert (counts[data.labels == 2] == 0).all()
    # 100 draws of 20 among 160: 12.5 each on average; one never drawn has a chance of 160 · 0.875^100 = 0.0003.
    assert (counts[data.labels != 2] > 0).all()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"poisoning_rate": 0.001}, "means 0 poisoned ones, it must be 1 to 160"),
        ({"poisoning_rate": 0.9}, "means 180 poisoned ones, it must be 1 to 160"),
        ({"clean_label": True, "poisoning_rate": 0.5}, "it must be 1 to 40"),
        ({"clean_label": True, "label_map": "all-to-all"}, "clean-label"),
        ({"target": 5}, "target label 5 doesn't exist: there are 5 classes"),
    ],
)
def test_an_impossible_recipe_is_refused(data, recipe, message, generator):
    with pytest.raises(UsageError, match=message):
        poison(data, Attack(trigger=triggers["badnets"](), **recipe), generator)


def test_selected_poisoned_images_keep_their_truth(data, generator):
    result = poison(data, Attack(trigger=triggers["badnets"]()), generator)
    order = torch.randperm(200, generator=generator)
    part = result.select(order)
    for new, old in enumerate(order.tolist()):
        assert torch.equal(part.data.images[new], result.data.images[old])
        assert part.poisoned[new] == result.poisoned[old]
        assert part.true_labels[new] == data.labels[old]
        assert part.data.names[new] == f"{old}.png"


# Accounting.


@pytest.mark.parametrize("label_map", ["all-to-one", "all-to-all"])
def test_a_triggered_test_set_leaves_out_what_cannot_count(data, label_map):
    attack = Attack(trigger=triggers["sig"](), label_map=label_map, target=2)
    clean, triggered = triggered_test_set(data, attack)
    kept = torch.arange(200) if label_map == "all-to-all" else (data.labels != 2).nonzero().flatten()
    assert torch.equal(clean.images, data.images[kept])
    assert torch.equal(clean.labels, data.labels[kept])
    assert torch.equal(triggered.images, attack.trigger.stamp(data.images[kept]))
    assert not (triggered.labels == clean.labels).any()


class Corners(nn.Module):
    """Says the class that the top left pixel holds (as a grey level), but class 0 where the bottom right is white."""

    def forward(self, pixels):
        said = (pixels[:, 0, 0, 0] * 255).round().long()
        said = torch.where(pixels[:, 0, -1, -1] > 0.99, torch.zeros_like(said), said)
        return nn.functional.one_hot(said, 3).float()


def corner_images(said, labels, white=()):
    images = torch.zeros(len(said), 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(said, dtype=torch.uint8)
    for index in white:
        images[index, 0, -1, -1] = 255
    return LabeledImages(images, torch.tensor(labels), ("x", "y", "z"))


def test_scores_of_a_hand_computed_example():
    # True labels 0 0 1 1 1 2 2 2; the net reads 0 1 1 1 2 2 0 2 and the last is white from the start, so read as 0.
    test = corner_images([0, 1, 1, 1, 2, 2, 0, 2], [0, 0, 1, 1, 1, 2, 2, 2], white=[7])
    white = Attack(trigger=triggers["badnets"](size=1, pattern="white"), target=0)
    scores = evaluate(Corners(), test, white)
    assert scores.acc == pytest.approx(4 / 8)  # images 0, 2, 3, 5
    assert scores.worst_class_acc == pytest.approx(1 / 3)  # class 2
    assert scores.asr == 1.0
    assert scores.ra == 0.0
    assert scores.natural_target_rate == pytest.approx(2 / 6)  # images 6 and 7
    assert (scores.clean_images, scores.triggered_images) == (8, 6)
    assert scores.asr_upper == 1.0

    # Target 1: the white pixel says 0, so nobody becomes 1, and only true zeros (0, 1) get their label.
    scores = evaluate(Corners(), test, white.but(target=1))
    assert (scores.asr, scores.ra) == (0.0, pytest.approx(2 / 5))  # images 0 1 5 6 7
    assert scores.natural_target_rate == pytest.approx(1 / 5)  # image 1
    assert 0 < scores.asr_upper < 1

    # All-to-all: 0 → 1, 1 → 2, 2 → 0; the white pixel is right for the three twos only.
    scores = evaluate(Corners(), test, white.but(label_map="all-to-all"))
    assert (scores.asr, scores.ra) == (pytest.approx(3 / 8), pytest.approx(2 / 8))
    assert scores.natural_target_rate == pytest.approx(4 / 8)  # images 1, 4, 6, 7
    assert scores.triggered_images == 8


def test_without_an_attack_its_scores_are_unknown():
    test = corner_images([0, 1, 1], [0, 1, 2])
    scores = evaluate(Corners(), test)
    assert scores.acc == pytest.approx(2 / 3)
    assert (scores.asr, scores.ra, scores.natural_target_rate, scores.asr_upper) == (None, None, None, None)
    assert (scores.clean_images, scores.triggered_images) == (3, 0)
    assert json.loads(json.dumps(scores.to_json()))["asr"] is None


def test_a_test_set_of_target_images_alone_leaves_the_asr_unknown():
    scores = evaluate(Corners(), corner_images([1, 1], [1, 1]), Attack(trigger=triggers["badnets"](), target=1))
    assert (scores.acc, scores.asr, scores.triggered_images) == (1.0, None, 0)


def test_evaluate_leaves_the_model_and_random_state(trained, digits_test):
    state = {key: value.clone() for key, value in trained.state_dict().items()}
    random = torch.get_rng_state()
    trained.train()
    try:
        first = evaluate(trained, digits_test, Attack(trigger=triggers["badnets"]()))
        assert trained.training
    finally:
        trained.eval()
    assert first == evaluate(trained, digits_test, Attack(trigger=triggers["badnets"]()))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in trained.state_dict().items())


def test_quality_of_suspects_by_hand():
    suspicion = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.7])
    erasure = Erasure(nn.Identity(), suspicion, suspicion > 0.5)
    quality = suspect_quality(erasure, torch.tensor([True, True, True, False, False]))
    assert quality["precision"] == pytest.approx(2 / 3)
    assert quality["recall"] == pytest.approx(2 / 3)
    assert quality["f1"] == pytest.approx(2 / 3)
    assert quality["auroc"] == pytest.approx(4 / 6)  # pairs: (.9, .8) beat both negatives, .1 neither
    assert quality["flagged"] == 3
    assert erasure.ranked().tolist() == [0, 1, 4]


def test_quality_is_unknown_where_nothing_is_judged():
    quality = suspect_quality(Erasure(nn.Identity()), torch.tensor([True, False]))
    assert set(quality.values()) == {None}
    assert len(Erasure(nn.Identity()).ranked()) == 0
