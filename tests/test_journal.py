"""A training that is cut off anywhere goes on to the weights that it would have had; memory that runs out."""

import copy
import itertools

import pytest
import torch
from torch import nn

from unplant.classifier import activations, logits
from unplant.devices import is_out_of_memory
from unplant.errors import NumericalError, OutOfMemoryError, WriteError
from unplant.images import LabeledImages
from unplant.inversion import Patches
from unplant.journal import Journal
from unplant.training import FitConfig, fit

STEPS = 12
CONFIG = FitConfig(lr=0.05, batch_size=10, schedule="cosine", padding=2, rotation=5, flip=True)


class Cut(BaseException):
    """As a kill would."""


def images(seed=3, count=37):
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return LabeledImages(stored, torch.arange(count) % 3, ("a", "b", "c"))


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 3))
        return nn.Sequential(*parts)


class Learner:
    """A change that uses the generator, and learns from step to step; it is cut off before step `cut`."""

    def __init__(self, generator, cut=None):
        self.generator, self.cut, self.calls = generator, cut, 0
        self.patches = Patches.new(3, (1, 8, 8), 0.1, generator)

    def __call__(self, model, pixels, labels):
        if self.calls == self.cut:
            raise Cut
        self.calls += 1
        targets = torch.randint(3, (len(pixels),), generator=self.generator)
        self.patches.improve(model, pixels, targets, steps=1, step_size=0.1)
        return self.patches.apply(pixels, targets), labels


def train(journal, *, cut=None, model=None, data=None, config=CONFIG, seed=5, steps=STEPS, title="training", **more):
    """Weights, loss, a draw of the generator afterwards, and how many steps were done here; or None if it was cut."""
    model = copy.deepcopy(model or network())
    generator = torch.Generator().manual_seed(seed)
    learner = Learner(generator, cut)
    around = {"change": learner, "memory": [learner.patches], "journal": journal, "title": title, **more}
    try:
        loss = fit(model, data or images(), steps=steps, config=config, generator=generator, **around)
    except Cut:
        return None
    tensors = [*model.state_dict().values(), learner.patches.masks, torch.rand(3, generator=generator)]
    return tensors, loss, learner.calls


def equal(first, second):
    assert first[1] == second[1]
    return all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


@pytest.fixture(scope="module")
def whole():
    return train(Journal())


def test_a_journal_changes_nothing(tmp_path, whole):
    written = train(Journal(tmp_path, seconds=0))
    assert equal(written, whole)
    assert (written[2], whole[2]) == (STEPS, STEPS)
    assert len(list(tmp_path.glob("*.page"))) == 1


@pytest.mark.parametrize("cut", range(1, STEPS))
def test_a_training_cut_off_at_any_step_goes_on_to_the_same_weights(tmp_path, whole, cut):
    assert train(Journal(tmp_path, seconds=0), cut=cut) is None
    resumed = train(Journal(tmp_path, seconds=0))
    assert equal(resumed, whole)
    assert resumed[2] == STEPS - cut, "steps that were written down were done again"


def test_sharpness_goes_on_too_and_is_another_training_than_none(tmp_path, whole):
    sharp = train(Journal(), sharpness=0.5)
    assert not torch.allclose(sharp[0][0], whole[0][0], atol=1e-4)
    assert train(Journal(tmp_path, seconds=0), cut=5, sharpness=0.5) is None
    resumed = train(Journal(tmp_path, seconds=0), sharpness=0.5)
    assert equal(resumed, sharp)
    assert resumed[2] == STEPS - 5
    assert train(Journal(tmp_path, seconds=0))[2] == STEPS, "a page of another sharpness was taken"


def test_the_folder_is_made_when_it_is_needed_or_told_of(tmp_path, whole):
    assert train(Journal(str(tmp_path / "a" / "b"), seconds=0), cut=4) is None
    assert train(Journal(tmp_path / "a" / "b"))[2] == STEPS - 4
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="can't write"):
        train(Journal(tmp_path / "file" / "journal"))


def test_one_cut_off_before_its_first_page_begins_anew(tmp_path, whole):
    assert train(Journal(tmp_path, seconds=1000), cut=5) is None
    assert not list(tmp_path.iterdir())
    assert equal(train(Journal(tmp_path)), whole)


def test_a_finished_one_is_not_done_again(tmp_path, whole):
    train(Journal(tmp_path, seconds=1000))
    again = train(Journal(tmp_path))
    assert equal(again, whole)
    assert again[2] == 0


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "empty", "text", "someone else's tensors"])
def test_a_damaged_page_is_done_anew(tmp_path, whole, damage):
    train(Journal(tmp_path, seconds=0), cut=5)
    (page,) = tmp_path.glob("*.page")
    content = bytearray(page.read_bytes())
    content[len(content) // 2] ^= 1
    made = {"flipped bit": content, "cut short": content[:100], "empty": b"", "text": b"no page", "tensors": b""}
    page.write_bytes(bytes(made.get(damage, b"0" * 64 + bytes(content[64:]))))
    resumed = train(Journal(tmp_path))
    assert equal(resumed, whole)
    assert resumed[2] == STEPS


OTHER = {
    "weights": {"model": network(1)},
    "data": {"data": images(4)},
    "settings": {"config": CONFIG.but(lr=0.06)},
    "seed": {"seed": 6},
    "steps": {"steps": STEPS + 1},
    "title": {"title": "another"},
}


@pytest.mark.parametrize("what", OTHER)
def test_a_page_of_another_training_is_not_taken(tmp_path, what):
    train(Journal(tmp_path, seconds=0), cut=6)
    other = OTHER[what]
    assert equal(train(Journal(tmp_path), **other), train(Journal(), **other))
    assert train(Journal(tmp_path))[2] == STEPS - 6, "the page itself is still there"


def test_what_else_decides_belongs_into_the_salt(tmp_path):
    train(Journal(tmp_path, salt="a"))
    assert train(Journal(tmp_path, salt="b"))[2] == STEPS
    assert train(Journal(tmp_path, salt="a"))[2] == 0


def test_a_model_with_a_state_of_its_own_is_not_written_down(tmp_path):
    class Stateful(nn.Sequential):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    assert train(Journal(tmp_path, seconds=0), model=Stateful(*network()))[2] == STEPS
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_and_the_last_finite_state_stays(tmp_path):
    wild = CONFIG.but(lr=1e30)

    class Late(Learner):
        def __call__(self, model, pixels, labels):
            if self.calls == 5:
                with torch.no_grad():
                    model[-1].bias[0] = float("nan")
            return super().__call__(model, pixels, labels)

    model, generator = network(), torch.Generator().manual_seed(5)
    learner = Late(generator)
    with pytest.raises(NumericalError, match="not finite at step"):
        fit(
            model, images(), steps=STEPS, config=CONFIG, generator=generator,
            change=learner, memory=[learner.patches], journal=Journal(tmp_path, seconds=0),
        )  # fmt: skip
    resumed = train(Journal(tmp_path))
    assert resumed[2] == STEPS - 5
    assert equal(resumed, train(Journal()))
    with pytest.raises(NumericalError):
        train(Journal(), config=wild)


# Memory that runs out.


class Greedy:
    """Runs out of memory where more than `limit` images come at once."""

    def __init__(self, limit, error):
        self.limit, self.error, self.sizes = limit, error, []

    def __call__(self, model, pixels, labels):
        self.sizes.append(len(pixels))
        if len(pixels) > self.limit:
            raise self.error
        return pixels, labels


ERRORS = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "allocator": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "python": MemoryError(),
}


@pytest.mark.parametrize(("kind", "sharpness"), [*((kind, 0.0) for kind in ERRORS), ("accelerator", 0.5)])
def test_a_batch_that_does_not_fit_is_worked_off_in_parts_and_stays_the_batch_it_is(kind, sharpness):
    config = FitConfig(lr=0.1, batch_size=16, padding=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    start, halved, greedy = copy.deepcopy(plain), copy.deepcopy(plain), Greedy(5, ERRORS[kind])
    for model, change in ((plain, None), (halved, greedy)):
        generator = torch.Generator().manual_seed(0)
        fit(model, images(), steps=6, config=config, generator=generator, change=change, sharpness=sharpness)
    assert greedy.sizes[:6] == [16, 8, 4, 4, 4, 4], "16, then 8, then 4 that fit"
    assert set(greedy.sizes[6:]) == {4}, "what didn't fit is not tried again"
    for a, b in itertools.zip_longest(plain.parameters(), halved.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    assert not torch.allclose(plain[1].weight, start[1].weight, atol=1e-3), "nothing was learnt"


def test_out_of_memory_with_two_images_is_said_with_its_exit_code():
    greedy = Greedy(1, ERRORS["accelerator"])
    with pytest.raises(OutOfMemoryError, match="not enough memory to train on 2 images at a time") as caught:
        fit(network(), images(), steps=2, config=CONFIG.but(batch_size=8), generator=torch.Generator(), change=greedy)
    assert caught.value.exit_code == 7
    assert greedy.sizes == [8, 4, 2]


def test_another_error_is_not_taken_for_memory():
    assert not is_out_of_memory(RuntimeError("shapes (2,3) and (4,) don't fit"))
    greedy = Greedy(1, RuntimeError("shapes don't fit"))
    with pytest.raises(RuntimeError, match="shapes don't fit"):
        fit(network(), images(), steps=2, config=CONFIG, generator=torch.Generator(), change=greedy)
    assert greedy.sizes == [10]


def test_outputs_are_taken_in_smaller_batches_where_memory_is_short():
    class Small(nn.Module):
        def __init__(self, limit):
            super().__init__()
            self.net, self.limit, self.sizes = network(), limit, []

        def forward(self, pixels):
            self.sizes.append(len(pixels))
            if len(pixels) > self.limit:
                raise ERRORS["accelerator"]
            return self.net(pixels)

    data, small = images(), Small(5)
    assert torch.allclose(logits(small, data, batch_size=16), logits(network(), data), atol=1e-6)
    assert small.sizes == [16, 8, 4, *[4] * 8, 1]
    assert [len(part) for part in activations(Small(7), data, batch_size=16)] == [37]
    with pytest.raises(OutOfMemoryError, match="not enough memory for one image"):
        logits(Small(0), data)
