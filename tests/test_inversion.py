"""Shared perturbations: ranges, closed forms on linear models, and that the model is left as it was."""

import copy

import pytest
import torch
from torch import nn

from unplant.classifier import penultimate
from unplant.erasers.aft import AFTConfig
from unplant.erasers.shared import perturbations, settle_sizes, shared_stand_ins
from unplant.erasers.teacher import taught_by
from unplant.errors import UsageError
from unplant.images import LabeledImages
from unplant.inversion import Patches, Shifts, Warps, choose_targets, new_perturbations, within_area

CLASSES, SHAPE = 3, (2, 6, 5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Logits ⟨w_k, x⟩, small so that the softmax isn't saturated."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixels):
        return self.dropout(pixels.flatten(1)) @ self.weights.flatten(1).T


@pytest.fixture
def pixels():
    return torch.rand(30, *SHAPE, generator=generator(2))


@pytest.fixture
def spot():
    """A model of which class 1 hangs on one spot of 2×2 pixels: bright there in channel 0, dark in channel 1."""
    weights = torch.zeros(CLASSES, *SHAPE)
    weights[1, 0, 2:4, 1:3], weights[1, 1, 2:4, 1:3] = 0.2, -0.2
    return Linear(weights)


KINDS = [
    lambda: Patches.new(CLASSES, SHAPE, 0.2, generator()),
    lambda: Shifts.new(CLASSES, SHAPE, 0.1, generator()),
    lambda: Warps.new(CLASSES, 1.5, generator(), grid=3),
]


@pytest.mark.parametrize("new", KINDS, ids=["patches", "shifts", "warps"])
class TestShared:
    def test_stays_in_range_and_leaves_the_inputs_alone(self, new, pixels, spot):
        shared, targets, before = new(), torch.arange(30) % CLASSES, pixels.clone()
        for _ in range(5):
            shared.improve(spot, pixels, targets, steps=3, step_size=0.4)
            moved = shared.apply(pixels, targets)
            assert moved.shape == pixels.shape
            assert 0 <= moved.min() <= moved.max() <= 1
            assert torch.equal(pixels, before)
            assert ((shared.rates >= 0) & (shared.rates <= 1)).all()
            if isinstance(shared, Patches):
                assert shared.masks.mean((1, 2, 3)).max() <= 0.2 + 1e-6
                assert 0 <= shared.masks.min() <= shared.masks.max() <= 1
                assert 0 <= shared.patterns.min() <= shared.patterns.max() <= 1
            elif isinstance(shared, Warps):
                assert shared.flows.abs().max() <= 1.5
            else:
                assert (moved - pixels).abs().max() <= 0.1 + 1e-6

    def test_same_generator_gives_the_same_perturbations(self, new, pixels, spot):
        first, again = new(), new()
        for shared in (first, again):
            shared.improve(spot, pixels, torch.ones(30, dtype=torch.int64), steps=3, step_size=0.2)
        targets = torch.ones(30, dtype=torch.int64)
        assert torch.equal(first.apply(pixels, targets), again.apply(pixels, targets))

    def test_leaves_the_model_and_the_random_state_as_they_were(self, new, pixels, spot):
        model = nn.Sequential(spot, nn.BatchNorm1d(CLASSES)).train()
        model[1].eval()
        weights, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
        new().improve(model, pixels, torch.ones(30, dtype=torch.int64), steps=2, step_size=0.2)
        assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == [True, True, True, False]
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_improves_only_the_classes_asked_for(self, new, pixels, spot):
        shared, before = new(), new()
        shared.improve(spot, pixels, torch.ones(30, dtype=torch.int64), steps=3, step_size=0.2)
        for k, same in enumerate((True, False, True)):
            targets = torch.full((30,), k)
            assert torch.allclose(shared.apply(pixels, targets), before.apply(pixels, targets), atol=1e-6) == same
            assert (shared.rates[k] == 1) == same or k == 1

    def test_goes_back_to_what_it_had_learnt(self, new, pixels, spot):
        shared, targets = new(), torch.ones(30, dtype=torch.int64)
        shared.improve(spot, pixels, targets, steps=2, step_size=0.2)
        state = {key: value.clone() for key, value in shared.state_dict().items()}
        known = shared.apply(pixels, targets)
        shared.improve(spot, pixels, targets, steps=2, step_size=0.2)
        assert not torch.equal(shared.apply(pixels, targets), known)
        shared.load_state_dict(state)
        assert torch.equal(shared.apply(pixels, targets), known)


@pytest.mark.parametrize("new", KINDS[:2], ids=["patches", "shifts"])  # warps: see TestWarps
def test_finds_what_a_class_hangs_on(new, pixels, spot):
    shared, targets = new(), torch.ones(30, dtype=torch.int64)
    shared.improve(spot, pixels, targets, steps=60, step_size=0.2)
    moved = shared.apply(pixels, targets)
    # The best that the spot allows: fully bright and dark, or as far as the ball goes.
    reach = 1.0 if isinstance(shared, Patches) else 0.1
    best = pixels.clone()
    best[:, 0, 2:4, 1:3] = (pixels[:, 0, 2:4, 1:3] + reach).clamp(0, 1)
    best[:, 1, 2:4, 1:3] = (pixels[:, 1, 2:4, 1:3] - reach).clamp(0, 1)
    gained, possible = (spot.eval()(x)[:, 1] - spot(pixels)[:, 1] for x in (moved, best))
    assert gained.mean() >= 0.95 * possible.mean()


def test_shifts_have_the_closed_form_of_a_linear_model(pixels):
    weights = torch.randn(2, *SHAPE, generator=generator(1)) * 0.02
    shifts = Shifts.new(2, SHAPE, 0.1, generator())
    shifts.improve(Linear(weights), pixels, torch.ones(30, dtype=torch.int64), steps=10, step_size=0.2)
    assert torch.allclose(shifts.shifts[1], 0.1 * (weights[1] - weights[0]).sign(), atol=1e-7)


class TestWarps:
    def read(self, image, column, row):
        """A pixel of one channel by bilinear interpolation, the edge going on beyond itself: a slow reference."""
        height, width = image.shape
        column, row = min(max(column, 0), width - 1), min(max(row, 0), height - 1)
        left, top = int(column), int(row)
        right, low = min(left + 1, width - 1), min(top + 1, height - 1)
        over, down = column - left, row - top
        upper = (1 - over) * image[top, left] + over * image[top, right]
        return (1 - down) * upper + down * ((1 - over) * image[low, left] + over * image[low, right])

    @pytest.mark.parametrize(("right", "down"), [(1.0, 0.0), (0.0, -2.0), (0.25, 0.5), (-1.5, 0.75)])
    def test_an_even_displacement_reads_every_pixel_that_far_off(self, pixels, right, down):
        warps = Warps.new(2, 2.0, generator())
        warps.flows[1, 0], warps.flows[1, 1] = right, down
        moved = warps.apply(pixels[:2], torch.tensor([1, 1]))
        for channel in range(SHAPE[0]):
            for row in range(SHAPE[1]):
                for column in range(SHAPE[2]):
                    expected = self.read(pixels[0, channel], column + right, row + down)
                    assert float(moved[0, channel, row, column]) == pytest.approx(float(expected), abs=1e-5)

    def test_none_at_all_leaves_the_image(self, pixels):
        assert torch.allclose(Warps.new(2, 0.0, generator()).apply(pixels, torch.ones(30).long()), pixels, atol=1e-6)

    def test_finds_the_warp_that_a_class_hangs_on(self):
        # A line that is brightest in column 2; class 1 sees column 3, so it wants to read a pixel from the left.
        pixels = torch.tensor([0.0, 0.5, 1.0, 0.5, 0.0, 0.0]).expand(30, 1, 6, 6)
        weights = torch.zeros(2, 1, 6, 6)
        weights[1, 0, :, 3], weights[0, 0, :, 2] = 0.2, 0.2
        warps, targets = Warps.new(2, 1.0, generator()), torch.ones(30, dtype=torch.int64)
        warps.improve(Linear(weights), pixels, targets, steps=40, step_size=0.1)
        assert warps.apply(pixels, targets)[:, 0, :, 3].mean() > 0.8  # 0.5 before


def test_kinds_are_made_by_name():
    sizes = {"area": 0.1, "eps": 0.1, "reach": 1.0, "generator": generator()}
    assert list(new_perturbations(("warp", "patch"), 3, SHAPE, **sizes)) == ["patch", "warp"]
    made = new_perturbations(("patch", "universal", "warp"), 3, SHAPE, **sizes)
    assert [type(kind) for kind in made.values()] == [Patches, Shifts, Warps]


class TestWithinArea:
    def test_what_fits_is_only_clipped(self):
        masks = torch.tensor([[[[0.5, -0.2], [0.0, 0.1]]]])
        assert torch.equal(within_area(masks, 0.5), masks.clamp(0, 1))

    def test_is_the_nearest_point(self):
        masks = torch.randn(4, 1, 6, 5, generator=generator(3))
        found = within_area(masks, 0.1)
        assert found.mean((1, 2, 3)).max() <= 0.1 + 1e-6
        for seed in range(200):  # no other allowed point is nearer
            other = torch.rand(4, 1, 6, 5, generator=generator(seed))
            other = other * (0.1 / other.mean((1, 2, 3), keepdim=True)).clamp(max=1)
            for toward in (0.01, 1.0):
                point = found + toward * (other - found)
                assert ((point - masks).square().sum((1, 2, 3)) >= (found - masks).square().sum((1, 2, 3)) - 1e-5).all()


class TestChooseTargets:
    def test_never_the_own_class(self):
        labels = torch.arange(300) % CLASSES
        targets = choose_targets(torch.tensor([1.0, 0.0, 0.0]), labels, 2.0, generator())
        assert (targets != labels).all()
        assert ((targets >= 0) & (targets < CLASSES)).all()

    def test_prefers_what_works_and_still_tries_the_rest(self):
        labels = torch.full((2000,), 2)
        focused, even = (
            choose_targets(torch.tensor([0.5, 0.2, 0.0]), labels, focus, generator()) for focus in (2.0, 0.0)
        )
        # (0.53 / 0.23)² = 5.3 times as often; three standard errors.
        assert float((focused == 0).float().mean()) == pytest.approx(5.31 / 6.31, abs=0.025)
        assert float((even == 0).float().mean()) == pytest.approx(0.5, abs=0.034)

    def test_known_classes_get_their_share_however_seldom_they_work(self):
        """Beside what the rates give them: (0.03 / 1.03)² is next to nothing."""
        rates, labels = torch.tensor([1.0, 0.0, 1.0]), torch.full((2000,), 0)
        aimed, blind = (choose_targets(rates, labels, 2.0, generator(), known, 0.5) for known in ([1], []))
        assert float((aimed == 1).float().mean()) == pytest.approx(0.5, abs=0.034)
        assert float((blind == 1).float().mean()) < 0.01
        assert torch.equal(blind, choose_targets(rates, labels, 2.0, generator()))
        assert torch.equal(blind, choose_targets(rates, labels, 2.0, generator(), [1], 0.0))

    def test_images_of_the_known_class_are_pulled_elsewhere(self):
        labels = torch.arange(300) % CLASSES
        for aim in (0.5, 1.0):
            targets = choose_targets(torch.ones(CLASSES), labels, 2.0, generator(), [1], aim)
            assert (targets != labels).all()
        assert (targets[labels != 1] == 1).all()


def some_data():
    images = torch.randint(0, 256, (40, *SHAPE), generator=generator(), dtype=torch.uint8)
    return LabeledImages(images, torch.arange(40) % CLASSES, ("a", "b", "c"))


@pytest.mark.parametrize("kind", ["patch", "universal", "warp", "mixed", "all"])
def test_stand_ins_change_their_share_of_a_batch_and_no_label(kind, spot):
    data = some_data()
    config = AFTConfig(
        stand_ins=kind,
        universal_eps=8 / 255,
        warp_reach=1.0,
        warm_up=2,
        batch_size=20,
        adversarial_share=0.5,
        patch_area=0.2,
        in_proportion=False,
    )
    change, _ = shared_stand_ins(spot, data, config, generator())
    pixels, labels = data.pixels(slice(0, 20)), data.labels[:20]
    moved, same = change(spot, pixels, labels)
    assert torch.equal(same, labels)
    changed = (moved != pixels).flatten(1).any(1)
    assert changed[:10].all()
    assert not changed[10:].any()


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((3, 32, 32), (0.02, 8 / 255, 1.0)),
        ((1, 28, 30), (0.02, 8 / 255, 0.875)),
        ((1, 16, 16), (16 / 256, 8 / 255, 0.5)),  # 2 % would be five pixels
        ((3, 1, 2), (1.0, 8 / 255, 0.5)),
        ((3, 224, 320), (0.02, 8 / 255, 7.0)),
    ],
)
def test_sizes_of_stand_ins_suit_the_images(shape, sizes):
    settled = settle_sizes(AFTConfig(eps=0.03), shape)
    assert (settled.patch_area, settled.universal_eps, settled.warp_reach) == pytest.approx(sizes)
    assert settle_sizes(AFTConfig(eps=0.2), shape).universal_eps == 0.2


def test_sizes_that_were_given_stay():
    given = AFTConfig(eps=0.2, patch_area=0.01, universal_eps=0.05, warp_reach=0.1)
    settled = settle_sizes(given, (1, 8, 8))
    assert (settled.patch_area, settled.universal_eps, settled.warp_reach) == (0.01, 0.05, 0.1)


def test_without_sizes_there_are_no_perturbations():
    with pytest.raises(UsageError, match="patch_area"):
        perturbations(AFTConfig(universal_eps=0.1, warp_reach=1), some_data(), ("patch",), generator())


@pytest.mark.parametrize(
    ("rate", "least", "taught", "shifted"),
    [(0.0, 0, 0, 0), (0.4, 0, 4, 0), (1.0, 0, 10, 0), (0.4, 0.3, 4, 3), (0, 0.5, 5, 5)],
)
def test_as_many_stand_ins_are_taught_as_work_and_no_fewer_than_the_least(rate, least, taught, shifted, spot):
    data = some_data()
    settings = {"warm_up": 2, "batch_size": 40, "adversarial_share": 0.5, "patch_area": 0.2}
    config = AFTConfig(universal_eps=8 / 255, warp_reach=1.0, in_proportion=True, least_dose=least, **settings)
    change, (patches, shifts) = shared_stand_ins(spot, data, config, generator())
    patches.rates, shifts.rates = torch.tensor([0.0, rate, 0.0]), torch.zeros(CLASSES)
    masks, shift = patches.masks, shifts.shifts
    pixels = data.pixels(slice(0, 40))
    moved, _ = change(spot, pixels, data.labels)
    changed = (moved != pixels).flatten(1).any(1)
    # Ten of each kind; the shifts don't work.
    assert changed.nonzero().flatten().tolist() == [*range(taught), *range(10, 10 + shifted)]
    assert not torch.equal(patches.masks, masks)  # all go on being tried
    assert not torch.equal(shifts.shifts, shift)


def test_the_infected_model_teaches_its_word_and_its_eye_of_the_plain_image(spot, pixels):
    labels = torch.arange(30) % CLASSES

    def change(model, pixels, labels):
        return torch.cat([pixels[:10] * 0, pixels[10:]]), labels

    moved, targets, seen, weights = taught_by(spot, change, 0.25, 5.0, 15.0)(spot, pixels, labels)
    assert not moved[:10].any()
    said, features, _ = penultimate(spot.eval(), pixels)
    expected = 0.25 * said.softmax(1) + 0.75 * torch.eye(CLASSES)[labels]
    assert torch.allclose(targets, expected, atol=1e-6)
    assert torch.allclose(seen, features, atol=1e-6)
    assert not seen.requires_grad
    assert weights.tolist() == [15.0] * 10 + [5.0] * 20
    assert taught_by(spot, None, 0.25, 5.0, 15.0)(spot, pixels, labels)[3].tolist() == [5.0] * 30


def test_wrong_sizes_are_usage_errors():
    with pytest.raises(UsageError, match="area"):
        Patches.new(3, SHAPE, 0.0, generator())
    with pytest.raises(UsageError, match="eps"):
        Shifts.new(3, SHAPE, 8.0, generator())
    for length in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="reach"):
            Warps.new(3, length, generator())
    with pytest.raises(UsageError, match="aft settles"):
        shared_stand_ins(Linear(torch.zeros(3, *SHAPE)), some_data(), AFTConfig(), generator())
    for wrong in (
        {"stand_ins": "patches"},
        {"patch_area": 0},
        {"warp_reach": -1},
        {"examination": -1},
        {"universal_eps": 10},
        {"belief": 2},
        {"focus": -1},
    ):
        with pytest.raises(UsageError):
            AFTConfig(**wrong)
