"""The look for a trigger in a model with clean images alone: toy models whose backdoor is known by construction."""

import copy

import pytest
import torch
from torch import nn

from unplant.detection.inverted import TALL, Inverted, invert
from unplant.detection.waves import CYCLES, leading_waves
from unplant.erasers import aft, erasers, shared
from unplant.erasers.aft import AFTConfig, to_see_through
from unplant.erasers.looks import known_dose
from unplant.erasers.shared import HIGHEST, any_wave, found_shift, seen_through, settle_sizes
from unplant.images import LabeledImages
from unplant.inversion import Patches, Shifts, new_perturbations
from unplant.training import fit

CLASSES, SHAPE = 4, (1, 8, 8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Rows(nn.Module):
    """Class k sees rows 2k and 2k + 1; with a backdoor, two bright pixels on the right mean more than all rows."""

    def __init__(self, *targets):
        super().__init__()
        weights = torch.zeros(CLASSES, *SHAPE)
        for k in range(CLASSES):
            weights[k, 0, 2 * k : 2 * k + 2, :4] = 1.0
        for place, target in enumerate(targets):
            weights[target, 0, 2 * place : 2 * place + 2, 7] = 8.0
        self.head = nn.Linear(64, CLASSES)
        self.head.weight = nn.Parameter(weights.flatten(1))
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels):
        return self.head(pixels.flatten(1))


class Faint(Rows):
    """A backdoor that answers to the whole right half at once: too faint for the first look's ball."""

    def __init__(self, target):
        super().__init__()
        weights = self.head.weight.detach().unflatten(1, SHAPE).clone()
        weights[target, 0, :, 4:] = 0.7
        self.head.weight = nn.Parameter(weights.flatten(1))


def clean_images(count=200):
    """Bright rows of the class on the left, darkness on the right."""
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 60, (count, *SHAPE), generator=generator(1), dtype=torch.uint8)
    for index, label in enumerate(labels.tolist()):
        images[index, 0, 2 * label : 2 * label + 2, :4] += 150
    images[..., 4:] = 0
    return LabeledImages(images, labels, tuple("abcd"))


def look(model, data, seed=0, eps=0.1, kinds=("patch", "universal", "warp"), waves=0):
    kinds = new_perturbations(kinds, CLASSES, SHAPE, area=0.04, eps=eps, reach=0.5, generator=generator(seed))
    around = {"steps": 60, "step_size": 0.1, "batch_size": 64, "precision": "float32", "generator": generator(seed)}
    return invert(model, data, kinds, waves=waves, **around)


def test_a_backdoor_stands_out_with_its_kind_and_target():
    model, data = Rows(2), clean_images()
    assert (model(data.pixels(slice(None))).argmax(1) == data.labels).all()
    found = look(model, data)
    assert found.standing_out == [("patch", 2)]
    assert found.rates["patch"][2] > 0.95
    assert found.obedience(model, "patch", [2, 0]).tolist() == pytest.approx(found.rates["patch"][[2, 0]].tolist())
    assert found.obedience(Rows(), "patch", [2]) < 0.2
    others = data.pixels(slice(None))[data.labels != 2]
    moved = found.kinds["patch"].apply(others, torch.full((len(others),), 2))
    assert (model(moved).argmax(1) == 2).float().mean() == pytest.approx(float(found.rates["patch"][2]), abs=0.05)


def test_two_backdoors_stand_out_both():
    assert {target for _, target in look(Rows(3, 1), clean_images()).standing_out} == {1, 3}


def test_nothing_stands_out_of_a_clean_model():
    assert look(Rows(), clean_images()).standing_out == []


def test_a_model_that_says_the_same_of_all_images_is_no_backdoor():
    model = Rows()
    model.head.bias = nn.Parameter(torch.tensor([0.0, 0.0, 99.0, 0.0]))
    data = clean_images()
    assert (model(data.pixels(slice(None))).argmax(1) == 2).all()
    found = look(model, data)
    assert found.standing_out == []
    assert all(float(rates.max()) == 0 for rates in found.rates.values())


def test_what_works_for_every_class_is_no_backdoor():
    data = clean_images(100)
    rates = {"patch": torch.tensor([0.9, 0.8, 0.95, 0.9]), "warp": torch.tensor([0.1, 0.9, 0.2, 0.1])}
    assert Inverted({}, rates, data).standing_out == [("warp", 1)]
    # All of the images beside two thirds, with a net that is easily led: odds of 201 beside 2.
    assert Inverted({}, {"patch": torch.tensor([0.67, 1.0, 0.67])}, data).standing_out == [("patch", 1)]
    assert Inverted({}, {"patch": torch.tensor([0.8, 0.2])}, data).standing_out == [("patch", 0)]  # two classes
    assert Inverted({}, {"patch": torch.tensor([0.4, 0.0, 0.0])}, data).standing_out == []


def test_beside_a_sure_target_weaker_classes_do_not_count():
    data = clean_images(100)
    weak, strong = [1.0, 0.05, 0.65, 0.05, 0.05], [0.97, 0.05, 0.95, 0.05, 0.05]
    warp = torch.tensor([0.7, 0.0, 0.0, 0.0, 0.0])  # of the sure class, which has other kinds
    both = Inverted({}, {"patch": torch.tensor(weak), "warp": warp}, data)
    assert both.standing_out == [("patch", 0), ("warp", 0)]
    assert Inverted({}, {"patch": torch.tensor(strong)}, data).standing_out == [("patch", 0), ("patch", 2)]
    alone = Inverted({}, {"patch": torch.tensor([0.8, 0.05, 0.65, 0.05, 0.05])}, data)
    assert alone.standing_out == [("patch", 0), ("patch", 2)]  # none is sure


def test_only_what_works_on_nearly_all_images_decides_the_dose():
    data = clean_images(100)
    for rate, sure in ((0.65, False), (0.95, True)):
        found = Inverted({}, {"warp": torch.tensor([0.0, rate, 0.0])}, data)
        assert (found.standing_out, found.sure) == ([("warp", 1)], sure)
    assert not Inverted({}, {"warp": torch.zeros(3)}, data).sure


def test_it_is_tried_on_images_that_it_was_not_made_with():
    data = clean_images(101)
    found = look(Rows(), data)
    assert len(found.held_out) == 51
    seen = {image.numpy().tobytes() for image in found.held_out.images}
    everything = [image.numpy().tobytes() for image in data.images]
    assert len(set(everything)) == 101
    assert sum(image in seen for image in everything) == 51


def test_the_same_seed_finds_the_same_and_the_model_stays_as_it_was():
    model = Rows(2).train()
    weights, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    first, again = (look(model, clean_images()).rates for _ in range(2))
    assert all(torch.equal(first[kind], again[kind]) for kind in first)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_the_purified_model_no_longer_obeys_stands_out_and_what_both_obey_does_not():
    data = clean_images()
    found = look(Rows(2), data)
    assert found.lost(Rows()).standing_out == [("patch", 2)]
    unerased = found.lost(Rows(2))
    assert unerased.standing_out == []
    assert float(unerased.rates["patch"].max()) == 0
    assert found.lost(Rows(3)).rates["patch"][2] == pytest.approx(float(found.rates["patch"][2]), abs=0.1)


def test_shown_under_true_labels_it_is_seen_through():
    """Half of a batch carries it, at strengths up to twice its own; no label changes, and the link breaks."""
    model, data, config = Faint(3), clean_images(), erasers["aft"].configure(batch_size=64, lr=1.0, flip=False)
    found = look(model, data, eps=0.25, kinds=("universal",)).kinds["universal"]
    change = seen_through(found_shift(found, 3, generator()), 0.5, None)
    pixels, shift = data.pixels(slice(0, 64)), found.shifts[3]
    shown, labels = change(model, pixels, data.labels[:64])
    moved = (shown - pixels)[:32, 0]
    assert torch.equal(labels, data.labels[:64])
    assert torch.equal(shown[32:], pixels[32:])
    assert 0 <= shown.min() <= shown.max() <= 1
    right = moved[:, :, 4:]  # dark, so that only what would be below 0 is clipped
    assert (right[:, shift[0, :, 4:] <= 0] == 0).all()
    strengths = right.amax((1, 2)) / shift[0, :, 4:].max()
    assert 0 <= strengths.min() < 0.3 < 1.7 < strengths.max() <= 2
    triggered = data.pixels(data.labels != 3).clone()
    triggered[..., 4:] += 0.25
    assert (model(triggered).argmax(1) == 3).all()
    fit(model, data, steps=200, config=config, change=change, generator=generator())
    assert (model(triggered).argmax(1) == data.labels[data.labels != 3]).all()


class Wavy(Rows):
    """A backdoor that answers to two cycles a row in all rows of the right half, as no patch or faint shift has."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, pixels):
        turn = torch.arange(4) * torch.pi / 2
        height = torch.stack([pixels[:, 0, :, 4:] @ turn.cos(), pixels[:, 0, :, 4:] @ turn.sin()]).norm(dim=0) / 4
        answer = torch.zeros(len(pixels), CLASSES)
        answer[:, self.target] = 2000 * torch.relu(height.amin(1) - 0.012)
        return super().forward(pixels) + answer


class TestLeadingWaves:
    """A kind that is found by trying."""

    def test_the_wave_that_leads_to_a_class_stands_out(self):
        model, data = Wavy(3), clean_images()
        assert (model(data.pixels(slice(None))).argmax(1) == data.labels).all()
        assert look(model, data, eps=0.03).standing_out == []
        found = look(model, data, eps=0.03, waves=200)
        assert found.standing_out == [("wave", 3)]
        assert found.certain
        assert found.only(("patch", "universal")).standing_out == []
        shift = found.kinds["wave"].shifts[3]
        assert shift.abs().max() == pytest.approx(TALL)
        triggered = (data.pixels(data.labels != 3) + shift).clamp(0, 1)
        assert (model(triggered).argmax(1) == 3).float().mean() > 0.95

    def test_none_does_in_a_clean_model(self):
        assert look(Rows(), clean_images(), waves=200).standing_out == []

    def test_the_other_kinds_are_what_they_are_without(self):
        with_waves, without = (look(Rows(), clean_images(), waves=waves) for waves in (50, 0))
        assert set(with_waves.rates) == {*without.rates, "wave"}
        for kind, rates in without.rates.items():
            assert torch.equal(rates, with_waves.rates[kind])

    def test_they_are_not_tried_where_the_others_are_sure(self):
        """Other classes may obey waves, too, and what is found is erased without them."""
        found = look(Rows(2), clean_images(), waves=50)
        assert found.sure
        assert set(found.rates) == {"patch", "universal", "warp"}

    @pytest.mark.parametrize(("images", "rate", "stands"), [(200, 0.9, False), (200, 0.97, True), (20, 0.97, False)])
    def test_they_count_only_beyond_chance(self, images, rate, stands):
        """Clean models obey waves by up to 0.7."""
        rates = torch.tensor([0.0, 0.1, rate, 0.0])
        assert bool(Inverted({}, {"wave": rates}, clean_images(images)).standing_out) == stands
        assert Inverted({}, {"patch": rates}, clean_images(images)).standing_out == [("patch", 2)]

    def test_the_best_of_many_is_kept_for_each_class(self):
        """More waves, the first of them the same, lead no fewer images."""
        data = clean_images()
        around = {"height": 0.2, "precision": "float32"}
        few, many = (leading_waves(Wavy(3), data, waves=n, generator=generator(), **around) for n in (1, 300))
        assert many.rates.shape == (CLASSES,)
        assert many.rates[3] > 0.95
        assert (few.rates >= 0).all()
        one = leading_waves(Rows(), data, waves=1, generator=generator(), **around)
        assert torch.equal(one.shifts[0], one.shifts[3])  # there is but one

    def test_better_ones_are_sought_near_the_best(self, monkeypatch):
        """Where waves lead to a class, and only there; what is tried is within the promised number."""
        data, tried, told = clean_images(), [], []
        model, around = Wavy(3), {"height": 0.062, "precision": "float32", "progress": lambda *at: told.append(at[1])}
        counting = model.register_forward_hook(lambda *_: tried.append(1))
        with_them = leading_waves(model, data, waves=60, generator=generator(), **around)
        assert len(tried) == len(told) == 1 + 60 + 20
        assert told[-1] == 1
        monkeypatch.setattr("unplant.detection.waves.AGAIN", 0)
        without = leading_waves(model, data, waves=60, generator=generator(), **around)
        counting.remove()
        assert 0.9 < without.rates[3] < with_them.rates[3] - 0.05
        assert torch.equal(without.rates[:3], with_them.rates[:3])
        assert with_them.shifts.abs().amax((1, 2, 3)).tolist() == pytest.approx([0.062] * CLASSES)

    @pytest.mark.parametrize("model", [Rows(), Wavy(3)], ids=["clean", "led by 0.82"])
    def test_where_none_leads_almost_surely_no_more_are_tried(self, model):
        """Else natural classes, which obey waves, too, would be searched for one that they obey almost surely."""
        told = []
        around = {"height": 0.06, "precision": "float32", "progress": lambda *at: told.append(at[1])}
        assert leading_waves(model, clean_images(), waves=60, generator=generator(), **around).rates.max() < 0.85
        assert len(told) == 61
        assert told[-1] == 1


class TestPlaneWaves:
    """What is shown where nothing was found."""

    def drawn(self, count, shape, seed=0):
        return any_wave(generator(seed))(torch.zeros(count, *shape))

    def test_they_are_as_high_as_said_and_other_ones_each_time(self):
        waves = self.drawn(500, (3, 32, 32))
        heights = waves.abs().amax((1, 2, 3))
        assert heights.max() <= HIGHEST
        assert heights.min() < 0.1 * HIGHEST < 0.9 * HIGHEST < heights.max()
        assert len({wave.numpy().tobytes() for wave in waves}) == 500
        assert torch.equal(waves, self.drawn(500, (3, 32, 32)))
        assert not torch.equal(waves, self.drawn(500, (3, 32, 32), seed=1))

    def test_half_of_them_are_grey_and_the_others_are_one_wave_in_other_heights(self):
        waves = self.drawn(500, (3, 16, 16)).flatten(2)
        grey = (waves == waves[:, :1]).all((1, 2))
        assert 0.4 < grey.float().mean() < 0.6
        alike = torch.nn.functional.cosine_similarity(waves[:, 0], waves[:, 1], dim=1).abs()
        assert alike.min() > 0.99

    @pytest.mark.parametrize("shape", [(1, 64, 64), (3, 96, 64), (1, 8, 8)])
    def test_each_is_one_wave_of_at_most_eight_cycles_over_the_shorter_side(self, shape):
        """By its spectrum: nearly all of its power lies beside one frequency, none of it beyond."""
        side, windows = min(shape[1:]), torch.outer(*(torch.hann_window(length) for length in shape[1:]))
        power = torch.fft.fft2(self.drawn(200, shape)[:, 0] * windows, norm="ortho").abs().square()
        down, right = (torch.fft.fftfreq(length) * side for length in shape[1:])  # in cycles over the shorter side
        finer = (down[:, None].square() + right.square()).sqrt() > min(CYCLES, side / 2) + 2
        assert (power * finer).sum() < 0.02 * power.sum()
        peaks = power.flatten(1).topk(30).values.sum(1) / power.flatten(1).sum(1)  # two peaks, spread by the window
        assert peaks.min() > 0.9

    def test_a_model_that_answers_to_a_wave_forgets_it(self):
        """And one that is only trained on doesn't."""
        data, config = clean_images(), erasers["aft"].configure(batch_size=64, lr=1.0, flip=False, padding=0)
        wave = 0.15 * torch.sin(torch.arange(8) * torch.pi / 2 + 0.5).expand(8, 8)
        model, triggered = Rows(), (data.pixels(data.labels != 3) + wave).clamp(0, 1)
        weights = model.head.weight.detach().unflatten(1, SHAPE).clone()
        weights[3, 0, :, 4:] = 60 * wave[:, 4:]
        model.head.weight = nn.Parameter(weights.flatten(1))
        assert (model(data.pixels(slice(None))).argmax(1) == data.labels).all()
        assert (model(triggered).argmax(1) == 3).all()
        shown, plain = copy.deepcopy(model), copy.deepcopy(model)
        for net, change in ((shown, seen_through(any_wave(generator()), 0.5, None)), (plain, None)):
            fit(net, data, steps=200, config=config, change=change, generator=generator())
        assert (shown(triggered).argmax(1) == data.labels[data.labels != 3]).float().mean() > 0.95
        assert (plain(triggered).argmax(1) == 3).float().mean() > 0.3

    def test_stand_ins_change_only_the_images_that_carry_no_wave(self):
        seen = []

        def inner(model, pixels, labels):
            seen.append((len(pixels), labels))
            return pixels + 7, labels

        pixels, labels = clean_images().pixels(slice(0, 40)), torch.arange(40)
        shown, after = seen_through(any_wave(generator()), 0.25, inner)(Rows(), pixels, labels)
        assert torch.equal(after, labels)
        assert seen[0][0] == 30
        assert torch.equal(seen[0][1], labels[10:])
        assert torch.equal(shown[10:], pixels[10:] + 7)
        assert 0 < (shown[:10] - pixels[:10]).abs().max() <= HIGHEST + 1e-6
        everything, _ = seen_through(any_wave(generator()), 1.0, inner)(Rows(), pixels, labels)
        assert (len(everything), len(seen)) == (40, 1)


def test_too_few_images_say_nothing():
    assert look(Rows(2), clean_images(19)) is None


@pytest.mark.parametrize(("area", "rate", "told"), [(0.02, 0.8, True), (0.0625, 0.8, False), (0.0625, 0.92, True)])
def test_patches_that_cover_much_must_take_nearly_all(area, rate, told):
    """On 16×16 images a patch takes four in five images of clean models to a class."""
    patches = Patches.new(4, SHAPE, area, generator())
    found = Inverted({"patch": patches}, {"patch": torch.tensor([0.1, 0.05, rate, 0.1])}, clean_images(100))
    assert found.standing_out == ([("patch", 2)] if told else [])
    shifts = Shifts.new(4, SHAPE, 0.1, generator())
    assert Inverted({"universal": shifts}, {"universal": torch.tensor([0, 0, 0.8, 0])}, clean_images(100)).standing_out


class TestAFT:
    """The verdict decides the dose, and is said."""

    def erase(self, model, data, **settings):
        config = erasers["aft"].configure(
            **{"lr": 0.01, "batch_size": 32, "patch_area": 0.04, "flip": False, "eps": 0.1, "padding": 0, "waves": 0.25}
            | settings
        )
        return erasers["aft"].run(model, data, config, generator=generator())

    def test_a_found_trigger_is_reported_and_decides_what_was_left_open(self):
        model, data = Rows(2), clean_images()
        erasure = self.erase(model, data, steps=40, lr=0.5)
        said, steps = erasure.findings, {entry["step"]: entry for entry in erasure.rounds}
        assert (said.infected, said.targets, said.by, said.poisoning_rate) == (True, (2,), "inversion", None)
        assert said.trigger_before > 0.95
        assert said.asr_estimate == said.trigger_after < said.trigger_before
        assert steps["stand-ins"]["kind"] == "mixed"
        assert steps["adversarial"]["steps"] == 40  # as the user said
        assert steps["examined"]["passes"] > 0
        pixels = data.pixels(data.labels != 2)
        obeyed = [(net(erasure.trigger(pixels)).argmax(1) == 2).float().mean() for net in (model, erasure.model)]
        assert obeyed == pytest.approx([said.trigger_before, said.trigger_after], abs=0.05)

    @pytest.mark.parametrize(("targets", "known"), [((2,), (2,)), ((), ())], ids=["infected", "clean"])
    def test_stand_ins_pull_to_what_the_look_is_sure_of(self, targets, known, monkeypatch):
        """And to nothing else: not where nothing was found."""
        told, real = set(), shared.choose_targets

        def choose(rates, labels, focus, generator, known, aim):
            told.add((known, aim))
            return real(rates, labels, focus, generator, known, aim)

        monkeypatch.setattr(shared, "choose_targets", choose)
        self.erase(Rows(*targets), clean_images(), steps=5, see_through=0, aim=0.25)
        assert told == {(known, 0.25)}

    @pytest.mark.parametrize(
        ("targets", "given", "weights"),
        [((2,), {}, {8}), ((2,), {"steadiness": 1}, {1}), ((), {}, {3}), ((), {"steadiness": 1}, {1})],
    )
    def test_what_is_taught_weighs_more_where_the_look_is_sure(self, targets, given, weights, monkeypatch):
        told, real = set(), aft.taught_by

        def taught(infected, change, belief, likeness, steadiness):
            told.add(steadiness)
            return real(infected, change, belief, likeness, steadiness)

        monkeypatch.setattr(aft, "taught_by", taught)
        self.erase(Rows(*targets), clean_images(), steps=5, see_through=0, **given)
        assert told == weights

    def test_where_none_is_found_all_is_as_the_config_says(self):
        erasure = self.erase(Rows(), clean_images(), steps=5)
        assert (erasure.findings.infected, erasure.findings.targets, erasure.trigger) == (False, (), None)
        assert erasure.findings.asr_estimate is None
        assert erasure.rounds[0]["kind"] == "mixed"

    def test_what_only_the_second_look_sees_is_said_with_its_target(self):
        settings = {"steps": 200, "lr": 1.0, "schedule": "constant", "belief": 0, "likeness": 0, "steadiness": 0}
        settings |= {"stand_ins": "universal", "adversarial_share": 0.5}
        erasure = self.erase(Faint(3), clean_images(), **settings)
        steps, said = {entry["step"]: entry for entry in erasure.rounds}, erasure.findings
        assert max(steps["examined"]["rates"]["universal"]) < 0.6
        assert (said.infected, said.targets, said.by) == (True, (3,), "inversion")
        assert said.trigger_before > 0.9 > 0.1 > said.trigger_after
        assert steps["second look"]["lost"]["universal"][3] > 0.9
        once = self.erase(Faint(3), clean_images(), second_look=0, **settings)
        assert not once.findings.infected
        assert [erased.rounds[-1]["under"] for erased in (erasure, once)] == ["found", "plane waves"]

    def test_the_second_look_asks_for_nearly_all_images(self, monkeypatch):
        """What half erased a link to any class is no proof of a backdoor: clean models lose up to 79 % to AFT."""
        lost = Inverted({}, {"universal": torch.tensor([0.0, 0.0, 0.0, 0.8])}, clean_images())
        assert lost.standing_out == [("universal", 3)]
        monkeypatch.setattr(Inverted, "lost", lambda *_: lost)
        erasure = self.erase(Rows(), clean_images(), steps=5, see_through=0)
        assert erasure.rounds[-1]["lost"]["universal"][3] == 0.8
        assert (erasure.findings.infected, erasure.trigger) == (False, None)

    @pytest.mark.parametrize(("images", "rate", "certain"), [(36, 0.97, False), (36, 1.0, True), (200, 0.97, True)])
    def test_of_few_images_all_must_go(self, images, rate, certain):
        """A clean model of the digits that was trained for long lost 31 of 32."""
        lost = Inverted({}, {"universal": torch.tensor([0.1, 0.2, 0.1, rate])}, clean_images(images))
        assert lost.sure
        assert lost.certain == certain

    @pytest.mark.parametrize(("second", "certain"), [(1.0, False), (0.91, False), (0.82, True), (0.1, True)])
    def test_of_no_other_class_nearly_as_many_may_go(self, second, certain):
        """Clean models of the digits that know their images by heart lost 0.91 and more of a second class."""
        lost = Inverted({}, {"universal": torch.tensor([0.1, second, 0.2, 1.0, 0.1])}, clean_images(36))
        assert lost.standing_out[0] in {("universal", 1), ("universal", 3)}
        assert lost.certain == certain

    def test_of_many_classes_one_in_ten_may_go(self):
        for others, certain in ((4, True), (5, False)):
            rates = torch.full((43,), 0.1)
            rates[: others + 1] = 1.0
            assert Inverted({}, {"universal": rates}, clean_images(100)).certain == certain

    @pytest.mark.parametrize(
        ("kind", "see_through", "then"),
        [
            ("patch", 5, [("adversarial", None), ("seeing through", "plane waves")]),
            ("universal", 5, [("second look", None), ("seeing through", "found")]),
            ("universal", 0, [("examined", None), ("adversarial", None)]),
        ],
    )
    def test_where_the_first_look_found_something_the_second_is_taken_only_to_see_through_shifts(
        self, monkeypatch, kind, see_through, then
    ):
        first = Inverted({}, {kind: torch.tensor([0.0, 0.0, 1.0, 0.0])}, clean_images())
        for module in ("aft", "looks"):
            monkeypatch.setattr(f"unplant.erasers.{module}.examined", lambda *_, **__: looks.pop(0))
        monkeypatch.setattr("unplant.erasers.aft.verdict", lambda found, *_: (found, None))
        monkeypatch.setattr(Inverted, "lost", lambda self, *_: self)
        shifts = new_perturbations(("universal",), 4, SHAPE, area=0.1, eps=0.1, reach=0.5, generator=generator())
        looks = [first, Inverted(shifts, {"universal": torch.zeros(4)}, clean_images())]
        erasure = self.erase(Rows(2), clean_images(), steps=5, see_through=see_through)
        assert [(entry["step"], entry.get("under")) for entry in erasure.rounds][-2:] == then
        assert erasure.findings is first

    @pytest.mark.parametrize("shown", ["shift", "wave", None])
    def test_what_was_found_is_shown_at_half_the_rate_and_without_sharpness(self, shown):
        config = settle_sizes(AFTConfig(eps=0.1, lr=0.02, waves=0.25, warm_up=0, batch_size=32), SHAPE)
        found = {
            "shift": ("universal", Shifts.new(4, SHAPE, 0.1, generator()), 2),
            "wave": ("wave", Shifts.new(4, SHAPE, 0.1, generator()), 2),
            None: None,
        }[shown]
        part, change, shared = to_see_through(Rows(2), clean_images(), config, found, generator())
        assert (part.lr, part.sharpness) == (0.01, 0)
        assert len(shared) == (0 if shown == "shift" else 2)
        assert (part.adversarial_share > 0) is (shown != "shift")
        pixels, labels = clean_images().pixels(slice(0, 32)), clean_images().labels[:32]
        moved, same = change(Rows(2), pixels, labels)
        assert torch.equal(same, labels)
        assert (moved != pixels).flatten(1).any(1)[: {"shift": 16, "wave": 8, None: 8}[shown]].all()

    def test_a_wave_that_stands_out_is_reported_and_seen_through(self):
        """Whatever `waves` says, which is about those that weren't found; and only where nothing else stands out."""
        model, data = Wavy(3), clean_images()
        erasure = self.erase(model, data, steps=5, eps=0.03, universal_eps=0.03, waves=0, second_look=0)
        assert (erasure.findings.infected, erasure.findings.targets) == (True, (3,))
        assert erasure.rounds[1]["rates"]["wave"][3] > 0.95
        assert [(entry["step"], entry.get("under")) for entry in erasure.rounds][-1] == ("seeing through", "a wave")
        shift = erasure.trigger(torch.full((1, *SHAPE), 0.5)) - 0.5
        assert shift.abs().max() == pytest.approx(TALL, abs=1e-4)
        deaf = self.erase(model, data, steps=5, eps=0.03, universal_eps=0.03, waves=0, second_look=0, waves_tried=0)
        assert not deaf.findings.infected
        assert deaf.rounds[-1]["step"] == "adversarial"

    def test_beside_a_patch_no_wave_is_seen_through(self, monkeypatch):
        rates = {"patch": torch.tensor([0.0, 0.0, 1.0, 0.0]), "wave": torch.tensor([0.0, 0.0, 0.0, 1.0])}
        waves = leading_waves(Rows(), clean_images(), waves=1, height=0.1, precision="float32", generator=generator())
        found = Inverted({"wave": waves}, rates, clean_images())
        monkeypatch.setattr("unplant.erasers.aft.examined", lambda *_, **__: found)
        monkeypatch.setattr("unplant.erasers.aft.verdict", lambda found, *_: (found, None))
        erasure = self.erase(Rows(2), clean_images(), steps=5, waves=0, second_look=0)
        assert erasure.rounds[-1]["step"] == "adversarial"
        assert set(erasure.findings.standing_out) == {("patch", 2), ("wave", 3)}

    def test_waves_on_all_images_leave_none_for_stand_ins(self):
        erasure = self.erase(Rows(), clean_images(), steps=5, waves=1)
        assert erasure.rounds[-1]["under"] == "plane waves"

    def test_without_waves_only_what_was_found_is_seen_through(self):
        erasure = self.erase(Rows(), clean_images(), steps=5, waves=0)
        assert [entry["step"] for entry in erasure.rounds][-2:] == ["adversarial", "second look"]

    def test_a_clean_model_passes_it(self):
        erasure, blind = (
            self.erase(Rows(), clean_images(), steps=60, lr=0.5, **settings) for settings in ({}, {"examination": 0})
        )
        assert [entry["step"] for entry in erasure.rounds][-3:] == ["adversarial", "second look", "seeing through"]
        assert not erasure.findings.infected
        pairs = zip(erasure.model.parameters(), blind.model.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)

    def test_the_last_part_is_taken_where_something_was_lost(self):
        settings = {"steps": 200, "lr": 1.0, "schedule": "constant", "belief": 0, "likeness": 0, "steadiness": 0}
        settings |= {"stand_ins": "universal", "adversarial_share": 0.5}
        blind, seeing = (self.erase(Faint(3), clean_images(), see_through=n, **settings) for n in (0, 1.12))
        assert blind.rounds[-1]["step"] == "second look"
        last = seeing.rounds[-1]
        assert (last["step"], last["steps"], last["images"]) == ("seeing through", 7, 200)
        assert last["passes"] == pytest.approx(7 * 32 / 200, abs=0.01)  # no sharpness, which would double it
        pairs = zip(blind.model.parameters(), seeing.model.parameters(), strict=True)
        assert not all(torch.equal(one, other) for one, other in pairs)

    def test_warps_join_where_one_stood_out_and_the_dose_is_in_proportion(self):
        data, nothing, patch = clean_images(100), torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 0.0])
        for rates, kind in (
            ({"patch": patch, "warp": nothing}, "mixed"),
            ({"patch": nothing, "warp": patch}, "all"),
        ):
            dose = known_dose(Inverted({}, rates, data))
            assert dose == {"stand_ins": kind, "in_proportion": True, "steadiness": 8, "steps": 300}

    def test_the_look_costs_the_purified_model_nothing(self):
        """Where nothing is found, the weights are those without a look: it has random numbers of its own."""
        looked, blind = (self.erase(Rows(), clean_images(), steps=5, examination=n) for n in (10, 0))
        assert blind.findings is None
        pairs = zip(looked.model.parameters(), blind.model.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
