"""One contract for every registered eraser, and what each of them must do."""

import copy

import pytest
import torch
from torch import nn

import unplant
from unplant.classifier import Classifier
from unplant.detection.clusters import Split
from unplant.detection.transplant import Recovered, Transplant
from unplant.erasers import erasers
from unplant.erasers.base import Method, settle
from unplant.erasers.examination import Examination
from unplant.erasers.pbe_run import Run
from unplant.erasers.selection import Lesson
from unplant.erasers.steps import adversarial_fine_tuning, familiar_padding
from unplant.errors import DataError, NumericalError, UsageError
from unplant.images import LabeledImages
from unplant.journal import Journal
from unplant.models import build

QUICK = {
    "examination": 2,
    "waves_tried": 6,
    "initial": "random",
    "steps": 2,
    "clean_steps": 2,
    "final_steps": 2,
    "rounds": 1,
    "pgd_steps": 1,
    "batch_size": 16,
}


def quick(method: Method):
    """The method's default with as little work as possible, whatever its settings are."""
    settings = {name: value for name, value in QUICK.items() if name in method.config.model_fields}
    if method.config.model_fields.get("epochs") and "steps" not in settings:
        settings["epochs"] = 0.1
    return method.configure(**settings)


def test_pbe_leaves_a_model_as_it_was_if_it_finds_nothing():
    """Noise has no groups: the weights come back bit for bit, in a module of their own, and nobody is suspected."""
    data = noise(count=200)
    model = network(data)
    config = erasers["pbe"].configure(steps=2, final_steps=2, batch_size=16)
    erasure = erasers["pbe"].run(model, data, config, generator=torch.Generator().manual_seed(0))
    assert erasure.model is not model
    assert all(torch.equal(model.state_dict()[key], value) for key, value in erasure.model.state_dict().items())
    assert not erasure.suspects.any()
    assert not erasure.findings.infected
    assert erasure.findings.in_doubt == ()


def test_pbe_reports_the_classes_that_its_examination_left_in_doubt(monkeypatch):
    """Nothing is convicted, so that the model stays as it is, but the report doesn't keep silent."""
    data = noise(count=200)
    model = network(data)

    def doubtful(split, carrying, infected, before, labels, purify, many, config):
        nobody = torch.zeros(len(labels), dtype=torch.bool)
        few, doubted = torch.zeros(4), (labels == 2) & (torch.arange(200) < 40)
        classes, score = few > 0, torch.arange(200) / 200
        return Examination(nobody, score, before, infected, few, few, nobody, classes, classes, nobody, doubted)

    monkeypatch.setattr("unplant.erasers.pbe_run.cross_examine", doubtful)
    config = erasers["pbe"].configure(batch_size=16)
    erasure = erasers["pbe"].run(model, data, config, generator=torch.Generator().manual_seed(0))
    assert (erasure.findings.infected, erasure.findings.in_doubt) == (False, (2,))
    assert erasure.ranked_in_doubt().tolist() == [i for i in reversed(range(40)) if data.labels[i] == 2]
    assert len(erasure.ranked()) == 0


@pytest.mark.parametrize(
    ("settings", "convicts", "tried"),
    [({}, 0, [0]), ({}, 1, [0, 1]), ({}, 2, [0, 1, 2]), ({}, None, [0, 1, 2]), ({"other_depths": False}, 1, [0])],
    ids=str,
)
def test_other_depths_are_asked_until_somebody_is_convicted(settings, convicts, tried, monkeypatch):
    """The first class is in doubt each time but where it is convicted."""
    data = noise(count=80)
    splits = [Split(torch.full((80,), turn), torch.ones(4), torch.ones(4).long(), torch.zeros(4)) for turn in range(3)]
    seen, nobody, few = [], torch.zeros(80, dtype=torch.bool), torch.zeros(4)

    def found(split, carrying, infected, before, labels, purify, many, config):
        seen.append(int(split.group[0]))
        guilty = (labels == seen[-1]) if seen[-1] == convicts else nobody
        score, none, doubted = torch.full((80,), float(seen[-1])), few > 0, (labels == 0) & ~guilty
        return Examination(guilty, score, before, infected, few, few, nobody, none, none, nobody, doubted)

    monkeypatch.setattr("unplant.erasers.pbe_run.split_classes", lambda *_, **__: splits)
    monkeypatch.setattr("unplant.erasers.pbe_run.carriers", lambda *_: (nobody, nobody))
    monkeypatch.setattr("unplant.erasers.pbe_run.cross_examine", found)
    config = erasers["pbe"].configure(batch_size=16, bared=False, **settings)
    state = Run(network(data), data, config, torch.Generator().manual_seed(0), None)
    said, convicted = state.examine(), convicts is not None and convicts in tried
    assert seen == tried
    assert [entry["step"] for entry in state.rounds].count("examined") == len(tried)
    assert torch.equal(state.left_out, data.labels == convicts if convicted else nobody)
    assert torch.equal(state.in_doubt, nobody if convicts == 0 else data.labels == 0)
    assert (said.score == (convicts if convicted else 0)).all()


@pytest.mark.parametrize("asked", [True, False])
def test_carriers_that_kept_their_label_have_it_by_right_unless_they_are_asked(asked, monkeypatch):
    """Here each of them would say that it hasn't."""
    data = noise(count=80)
    carriers = torch.arange(80) < 20
    nobody, few = torch.zeros(80, dtype=torch.bool), torch.zeros(4)

    def found(split, carrying, infected, before, labels, purify, many, config):
        score, none = torch.zeros(80), few > 0
        return Examination(carriers, score, before, infected, few, few, carriers, none, none, nobody, nobody)

    monkeypatch.setattr("unplant.erasers.pbe_run.cross_examine", found)
    monkeypatch.setattr("unplant.erasers.pbe_run.by_right", lambda *_: (nobody, {0: 0.9}))
    config = erasers["pbe"].configure(batch_size=16, bared=False, by_right=asked)
    state = Run(network(data), data, config, torch.Generator().manual_seed(0), None)
    state.examine()
    assert torch.equal(state.own_label, carriers)
    assert torch.equal(state.by_right, nobody if asked else carriers)
    assert ("kept their label" in [entry["step"] for entry in state.rounds]) == asked


def test_pbe_gives_back_the_model_as_it_was_if_all_are_cleared():
    """A group was left out, and in the end the purified model knows it without having been taught it."""
    data = noise(count=80)
    model, trained = network(data), network(data, seed=1)
    state = Run(model, data, erasers["pbe"].configure(batch_size=16), torch.Generator().manual_seed(0), None)
    state.left_out = (data.labels == 1) & (torch.arange(80) < 40)
    state.in_doubt = (data.labels % 3 == 0) & (torch.arange(80) < 8)
    knows = torch.nn.functional.one_hot(data.labels, 4).float()
    erasure = state.erasure(trained, torch.rand(80), state.left_out, knows)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in erasure.model.state_dict().items())
    assert erasure.model is not model
    assert not erasure.suspects.any()
    assert not erasure.findings.infected
    kept = state.erasure(trained, torch.rand(80), state.left_out, knows.roll(1, 1))
    assert kept.model is trained
    assert kept.findings.targets == (1,)
    assert erasure.findings.in_doubt == kept.findings.in_doubt == (0, 3)


class Undecided:
    """In some of four classes: 40 suspects, 40 images of D_ext, 20 undecided, of which ten look like suspects to θ₀."""

    def __init__(self, lost_a_group=(1,), **settings) -> None:
        data = noise(count=400)
        self.model, self.trained, self.data = network(data), network(data, seed=1), data
        config = erasers["pbe"].configure(batch_size=16, **settings)
        self.state = Run(self.model, data, config, torch.Generator().manual_seed(0), None)
        self.place = torch.div(torch.arange(400), 4, rounding_mode="floor")  # of an image within its class
        self.concerned = torch.isin(data.labels, torch.tensor(lost_a_group))
        self.suspects = self.state.left_out = self.concerned & (self.place < 40)
        self.extra = (self.place >= 40) & (self.place < 80)
        like = self.suspects | (self.place >= 90)
        self.state.layers = [torch.randn((400, 5), generator=torch.Generator().manual_seed(1)) + 6 * like[:, None]]
        self.after = torch.nn.functional.one_hot(data.labels, 4).float()
        self.after[self.suspects] = self.after[self.suspects].roll(1, 1)  # θ gives the suspects another label
        self.after[self.place >= 80] = 0.0  # and has no opinion of the undecided


@pytest.mark.parametrize("kinship", [True, False])
def test_kin_of_the_suspects_are_suspects_too_but_are_not_heard(kinship):
    case = Undecided(kinship=kinship)
    suspects, labels = case.suspects, case.data.labels
    lesson = Lesson(case.extra, labels)
    erasure = case.state.erasure(case.trained, torch.zeros(400), suspects, case.after, lesson)
    expected = suspects | ((labels == 1) & (case.place >= 90)) if kinship else suspects
    assert torch.equal(erasure.suspects, expected)
    assert erasure.findings.poisoning_rate == pytest.approx(int(expected.sum()) / 400)
    assert erasure.findings.witnesses == 40


TRIGGER = Recovered(Transplant(torch.ones(1, 16, 16), torch.zeros(1, 16, 16)))


@pytest.mark.parametrize("trigger", [TRIGGER, None])
def test_undecided_images_that_take_after_the_others_are_acquitted_with_and_without_a_trigger_in_view(trigger):
    case = Undecided((1, 2, 3))
    lesson = case.state.last_lesson(Lesson(case.extra, case.data.labels, trigger), case.suspects, case.after)
    acquitted = case.concerned & (case.place >= 80) & (case.place < 90)
    assert torch.equal(lesson.images, case.extra | acquitted)
    assert lesson.trigger is trigger
    assert case.state.rounds[-1] == {"step": "acquitted", "undecided": 60, "next": 30}


@pytest.mark.parametrize("lost_a_group", [(1,), (1, 2)])
def test_nobody_is_acquitted_unless_most_classes_lost_a_group(lost_a_group):
    case = Undecided(lost_a_group)
    lesson = case.state.last_lesson(Lesson(case.extra, case.data.labels, TRIGGER), case.suspects, case.after)
    assert torch.equal(lesson.images, case.extra)


def test_nobody_of_a_group_left_out_is_acquitted():
    case = Undecided((1, 2, 3))
    case.state.left_out = case.state.left_out | (case.concerned & (case.place >= 80))
    lesson = case.state.last_lesson(Lesson(case.extra, case.data.labels, TRIGGER), case.suspects, case.after)
    assert torch.equal(lesson.images, case.extra)


@pytest.mark.parametrize("settings", [{"acquit": None}, {"kinship": False}, {"acquit": 1e300}])
def test_nobody_is_acquitted_if_it_is_switched_off(settings):
    case = Undecided((1, 2, 3), **settings)
    lesson = case.state.last_lesson(Lesson(case.extra, case.data.labels, TRIGGER), case.suspects, case.after)
    assert torch.equal(lesson.images, case.extra)


def test_a_known_trigger_lies_in_its_own_place_whatever_the_crop_does():
    """The model's inputs are looked at: the last quarter of each batch has the marker, the rest doesn't."""
    data = noise(count=64, height=32, width=32)
    data = LabeledImages(data.images // 2, data.labels, data.classes)  # nothing is white but the marker
    model, seen = network(data), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    marker = torch.zeros(1, 32, 32)
    marker[0, 0, 0] = 1.0
    config = erasers["pbe"].configure(batch_size=16, adversarial_share=0.0, padding=4)

    def trained(**trigger) -> nn.Module:
        around = {"steps": 4, "generator": torch.Generator().manual_seed(0)}
        return adversarial_fine_tuning(model, data, config, **around, **trigger)

    with_marker = trained(trigger=Transplant(1 - marker, marker), triggered_share=0.25)
    assert len(seen) == 4
    for pixels in seen:
        assert [float(image[0, 0, 0]) == 1.0 for image in pixels] == [False] * 12 + [True] * 4
    plain = trained()
    assert any(not torch.equal(a, b) for a, b in zip(with_marker.parameters(), plain.parameters(), strict=True))


def noise(count=48, classes=4, channels=1, height=16, width=16, seed=0) -> LabeledImages:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    return LabeledImages(images, labels, tuple(str(k) for k in range(classes)))


def network(data: LabeledImages, seed=0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(build("small_cnn:width=4", num_classes=data.num_classes, channels=data.shape[0])).eval()


@pytest.fixture(params=sorted(erasers), ids=str)
def method(request) -> Method:
    return erasers[request.param]


def run(method: Method, model: nn.Module, data: LabeledImages, seed: int = 0):
    return method.run(model, data, quick(method), generator=torch.Generator().manual_seed(seed))


class TestContract:
    def test_leaves_model_data_and_global_state_as_they_were(self, method):
        data = noise()
        model = network(data)
        model.backbone[0].train()  # a mixed mode, as users have them
        next(model.parameters()).requires_grad_(False)
        weights = copy.deepcopy(model.state_dict())
        modes = [module.training for module in model.modules()]
        needs = [parameter.requires_grad for parameter in model.parameters()]
        images, state = data.images.clone(), torch.random.get_rng_state()
        run(method, model, data)
        assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == needs
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert torch.equal(data.images, images)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_returns_a_changed_model_of_the_same_kind(self, method):
        data = noise()
        model = network(data)
        purified = run(method, model, data).model
        assert type(purified) is type(model)
        assert purified is not model
        before, after = model.state_dict(), purified.state_dict()
        assert list(before) == list(after)
        assert all(before[key].dtype == after[key].dtype and before[key].shape == after[key].shape for key in before)
        assert any(not torch.equal(before[key], after[key]) for key in before)
        assert all(torch.isfinite(value).all() for value in after.values() if value.is_floating_point())

    def test_same_seed_gives_the_same_weights_and_another_seed_others(self, method):
        data = noise()
        model = network(data)
        first, again, other = (run(method, model, data, seed).model.state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert any(not torch.equal(first[key], other[key]) for key in first)

    def test_cut_off_after_any_training_it_goes_on_to_the_same_weights(self, method, tmp_path):
        data = noise()
        model = network(data)
        whole, told = run(method, model, data).model.state_dict(), []
        method.run(
            model, data, quick(method), generator=torch.Generator().manual_seed(0), progress=lambda *a: told.append(a)
        )
        assert told
        for cut in range(len(told)):
            journal, left = Journal(tmp_path / str(cut), seconds=0), iter(range(cut))
            (tmp_path / str(cut)).mkdir()

            def stop(title, done, left=left):
                if next(left, None) is None:
                    raise InterruptedError

            config, seed = quick(method), torch.Generator().manual_seed(0)
            with pytest.raises(InterruptedError):
                method.run(model, data, config, generator=seed, progress=stop, journal=journal)
            if not told[cut][0].startswith("looking for "):  # which is no training, and done again
                assert any((tmp_path / str(cut)).iterdir()), "nothing was written down: this eraser can't go on"
            again = method.run(model, data, config, generator=torch.Generator().manual_seed(0), journal=journal)
            assert all(torch.equal(whole[key], value) for key, value in again.model.state_dict().items())

    @pytest.mark.parametrize(
        "shape",
        [
            {"classes": 2},
            {"classes": 1000, "count": 60},
            {"channels": 3, "height": 12, "width": 20},
            {"count": 17},  # with a batch of 16 the last one would hold a single image
            {"count": 5},
        ],
        ids=["two classes", "1000 classes", "colour, not square", "rest of one image", "less than a batch"],
    )
    def test_runs_on_data_of_any_shape(self, method, shape):
        data = noise(**{"classes": 4, **shape})
        if data.num_classes == 1000:
            data = LabeledImages(data.images, torch.arange(len(data)), data.classes)
        erasure = run(method, network(data), data)
        assert torch.isfinite(erasure.model(data.pixels())).all()
        if erasure.suspicion is not None:
            assert erasure.suspicion.shape == erasure.suspects.shape == (len(data),)

    def test_runs_without_batch_normalisation(self, method):
        data = noise()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * 14 * 14, 4)
            )
        run(method, model, data)

    def test_stops_at_a_loss_that_is_not_finite(self, method):
        data = noise()
        model = network(data)
        with torch.no_grad():
            model.backbone[-1].bias[0] = float("nan")
        with pytest.raises((NumericalError, DataError)):
            run(method, model, data)

    def test_names_every_setting_with_a_meaning(self, method):
        for name, field in method.config.model_fields.items():
            assert field.description, f"{method.name}.{name} has no description"

    def test_every_preset_is_valid(self, method):
        for preset in ("default", *method.presets):
            assert isinstance(method.configure(preset), method.config)

    def test_wrong_settings_are_usage_errors(self, method):
        with pytest.raises(UsageError, match="no setting"):
            method.configure(no_such_thing=1)
        with pytest.raises(UsageError, match="no preset"):
            method.configure("no-such-preset")
        with pytest.raises(UsageError, match="lr must be"):
            method.configure(lr=float("nan"))


@pytest.mark.filterwarnings("ignore:with fewer than 50 images", "ignore:.* classes have fewer than 10")
class TestApi:
    def test_needs_exactly_one_kind_of_data(self):
        data = noise()
        with pytest.raises(UsageError, match="exactly one"):
            unplant.erase(network(data))
        with pytest.raises(UsageError, match="exactly one"):
            unplant.erase(network(data), data, clean=data)

    def test_suspect_data_is_never_taken_for_clean(self):
        data = noise()
        with pytest.raises(UsageError, match="aft needs clean data"):
            unplant.erase(network(data), data, method="aft")

    def test_suspect_data_means_pbe_and_clean_data_aft(self):
        data = noise()
        pbe = unplant.erase(network(data), data, config=quick(erasers["pbe"]))
        aft = unplant.erase(network(data), clean=data, config=quick(erasers["aft"]))
        assert pbe.suspicion is not None
        assert aft.suspicion is None

    def test_takes_any_image_label_dataset(self):
        data = noise()
        pairs = [(data.pixels(i), int(data.labels[i])) for i in range(len(data))]
        erasure = unplant.erase(network(data), pairs, config=quick(erasers["pbe"]))
        assert len(erasure.suspicion) == len(pairs)


class HalfMirror(nn.Module):
    """Calls an image 1 if its left half is brighter than its right one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))

    def forward(self, pixels):
        left, right = pixels.chunk(2, dim=3)
        difference = self.scale * (left.mean((1, 2, 3)) - right.mean((1, 2, 3)))
        return torch.stack([-difference, difference], 1)


class TopRow(nn.Module):
    """Sees the first row of pixels, wherever the image's content is; of crops it sees another one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, pixels):
        brightness = self.scale * (pixels[:, :, 0].mean((1, 2)) - 0.5)
        return torch.stack([-brightness, brightness], 1)


class Everywhere(TopRow):
    """Sees whether there is a bright pixel at all."""

    def forward(self, pixels):
        brightness = self.scale * (pixels.amax((1, 2, 3)) - 0.5)
        return torch.stack([-brightness, brightness], 1)


def test_trials_crop_images_only_if_the_model_knows_crops():
    rows = torch.full((64, 1, 8, 8), 20, dtype=torch.uint8)
    rows[::2, :, 0] = 240  # one bright row at the top: a crop moves it down, or cuts it off
    model, labels = TopRow(), (torch.arange(64) + 1) % 2
    striped = LabeledImages(rows, labels, ("dark", "bright"))
    flat = LabeledImages(rows[:, :, :1].expand(-1, -1, 8, -1).contiguous(), labels, ("dark", "bright"))
    config = quick(erasers["pbe"]).but(padding=None)
    assert familiar_padding(config, model, striped) == 0
    assert familiar_padding(config, Everywhere(), flat) is None  # the usual padding
    assert familiar_padding(config.but(padding=3), model, striped) == 3


def test_images_are_mirrored_only_if_the_model_does_not_mind():
    data = noise(count=64, classes=2)
    model = HalfMirror()
    labels = model(data.pixels()).argmax(1)
    sided = LabeledImages(data.images, labels, data.classes)
    config = quick(erasers["pbe"])
    assert settle(config, model, sided).flip is False
    even = LabeledImages(torch.cat([data.images, data.images.flip(3)], 3), labels, data.classes)
    assert settle(config, model, LabeledImages(even.images, torch.ones_like(labels) * 0, data.classes)).flip is True
    assert settle(config.but(flip=True), model, sided).flip is True
