"""Filters of any length before a BatchNorm: which they are, and that steps don't depend on it."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from unplant.demo import ERASING, run_demo
from unplant.erasers import erasers
from unplant.evaluation import evaluate
from unplant.images import LabeledImages
from unplant.lengths import stretches
from unplant.models import build
from unplant.training import FitConfig, fit


class Odd(nn.Module):
    """A BatchNorm behind the first and the third convolution only, and one without filters; dropout; two heads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3)
        self.third = nn.Conv2d(6, 8, 3)
        self.third_norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 3)

    def forward(self, pixels):
        x = self.norm(self.first(pixels)).relu()
        x = self.third_norm(self.third(self.second(x).tanh())).relu()
        return self.head(self.drop(x.mean((2, 3))))


@pytest.fixture
def some():
    random = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (32, 1, 10, 10), generator=random, dtype=torch.uint8)
    return LabeledImages(images, torch.arange(32) % 3, ("a", "b", "c"))


@pytest.fixture
def odd():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Odd()


def lengthen(model, names, by):
    model = copy.deepcopy(model)
    for name in names:
        convolution = model.get_submodule(name)
        with torch.no_grad():
            for tensor in convolution.parameters():
                tensor *= by
    return model


def direction(weight):
    return nn.functional.normalize(weight.detach().flatten(1))


@pytest.mark.parametrize("usual", [2.0, 1.0])
def test_only_filters_before_a_batchnorm_are_stretched_by_their_squared_length_if_they_are_long(odd, some, usual):
    every = ["first", "second", "third", "head", "unused"]
    long = lengthen(odd, every, 8)
    names = {parameter: name for name, parameter in long.named_parameters()}
    found = {names[weight]: factors for weight, factors in stretches(long, some.pixels(), usual).items()}
    assert set(found) == {"first.weight", "third.weight"}
    for name, factors in found.items():
        rows = long.get_parameter(name).flatten(1).tolist()
        assert factors.shape == (len(rows), 1, 1, 1)
        squares = [math.fsum(value * value for value in row) for row in rows]
        assert max(squares) > 8
        expected = [max(1.0, min(square**2 / 4, square / usual)) for square in squares]
        assert factors.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_a_sure_model_is_judged_by_its_angles_not_by_its_tiny_gradients(odd, some):
    """Logits times 1e6: each softmax is saturated, and so are gradients under the likeliest label."""
    long = lengthen(odd, ["first", "second", "third"], 8)
    with torch.no_grad():
        long.head.weight *= 1e6
    names = {parameter: name for name, parameter in long.named_parameters()}
    assert {names[weight] for weight in stretches(long, some.pixels())} == {"first.weight", "third.weight"}


def test_a_net_as_it_is_initialised_is_left_alone(odd, some):
    assert stretches(odd, some.pixels()) == {}


@pytest.mark.parametrize("by", [6, 60])
def test_branches_that_are_normalised_only_after_they_were_added_are_free_together(colour_images, by):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = build("preact_resnet18:width=4", num_classes=4, channels=3)
    with torch.no_grad():
        answers = model.train()(colour_images.pixels())
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        for convolution in convolutions:
            convolution.weight *= by
        assert (model(colour_images.pixels()) - answers).abs().max() < 0.02 * answers.abs().max()
    found = stretches(model, colour_images.pixels())
    assert set(found) == {convolution.weight for convolution in convolutions}
    with torch.no_grad():
        convolutions[-1].weight /= by
    found = stretches(model, colour_images.pixels())
    assert convolutions[0].weight in found
    assert convolutions[-1].weight not in found


def test_a_single_long_row_is_seen_and_the_others_keep_their_steps(odd, some):
    with torch.no_grad():
        odd.third.weight[5] *= 50
        odd.third.bias[5] *= 50
    found = stretches(odd, some.pixels())
    assert list(found) == [odd.third.weight]
    factors = found[odd.third.weight].flatten()
    assert factors[5] > 100
    assert (factors[torch.arange(8) != 5] == 1).all()


@pytest.mark.parametrize("training", [True, False])
def test_looking_leaves_model_gradients_mode_and_random_state_as_they_were(odd, some, training):
    long = lengthen(odd, ["first", "third"], 8).train(training)
    long.norm.eval()
    before = copy.deepcopy(long.state_dict())
    modes = [module.training for module in long.modules()]
    state = torch.get_rng_state()
    assert len(stretches(long, some.pixels())) == 2
    assert all(torch.equal(before[key], value) for key, value in long.state_dict().items())
    assert [module.training for module in long.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in long.parameters())


@pytest.mark.parametrize("sharpness", [0.0, 0.5])
def test_steps_are_the_same_whatever_the_length_and_would_not_be_otherwise(odd, some, sharpness):
    config = FitConfig(lr=0.1, momentum=0.9, weight_decay=5e-4, batch_size=16, padding=0, flip=False)

    def turned(by, filter_length):
        """The change of the filters' directions."""
        model = lengthen(odd, ["first", "third"], by)
        how = {"generator": torch.Generator().manual_seed(0), "sharpness": sharpness, "filter_length": filter_length}
        fit(model, some, steps=8, config=config, **how)
        pairs = [(odd.get_parameter(name), model.get_parameter(name)) for name in ("first.weight", "third.weight")]
        return torch.cat([(direction(after) - direction(before)).flatten() for before, after in pairs])

    free, longer = turned(8, 1.0), turned(64, 1.0)
    assert free.abs().max() > 0.01
    assert (free - longer).abs().max() < 0.03 * free.abs().max()  # the eps of BatchNorm, and what steps make of it
    assert turned(64, 0).abs().max() < 0.01 * free.abs().max()


def test_where_memory_is_short_fewer_images_are_looked_at(odd, some, monkeypatch):
    """The look must not ask for more memory than the training, which goes on with parts of a batch."""
    long, seen = lengthen(odd, ["first", "third"], 8), []

    def short(model, pixels, usual):
        seen.append(len(pixels))
        if len(pixels) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return stretches(model, pixels, usual)

    monkeypatch.setattr("unplant.training.stretches", short)
    config = FitConfig(lr=0.1, batch_size=8, padding=0, flip=False)
    fit(long, some, steps=1, config=config, generator=torch.Generator().manual_seed(0), filter_length=2.0)
    assert seen == [32, 16, 8]

    def none(model, pixels, usual):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("unplant.training.stretches", none)
    with pytest.raises(torch.OutOfMemoryError):
        fit(long, some, steps=1, config=config, generator=torch.Generator().manual_seed(0), filter_length=2.0)


@pytest.mark.slow
def test_pbe_finds_and_erases_what_hides_behind_long_filters():
    """The same backdoor; without steps that are free of it the same run finds nothing."""
    demo = run_demo("badnets", seed=0)
    long = copy.deepcopy(demo.planted.model)
    layers = list(long.modules())
    for convolution, norm in itertools.pairwise(layers):
        if isinstance(norm, nn.BatchNorm2d):
            with torch.no_grad():
                convolution.weight *= 20
                norm.running_mean *= 20
                norm.running_var *= 400
    data, attack = demo.planted.training_set.data, demo.planted.attack
    before = evaluate(long, demo.test, attack)
    assert before.asr >= 0.95

    def erased(filter_length):
        config = ERASING.but(filter_length=filter_length, bared=False)  # which finds it without taking a step
        erasure = erasers["pbe"].run(long, data, config, generator=torch.Generator().manual_seed(0))
        return evaluate(erasure.model, demo.test, attack), erasure

    after, erasure = erased(1.0)
    assert after.asr <= 0.03
    assert after.acc >= before.acc - 0.02
    assert erasure.findings.targets == (attack.target,)
    unmoved, missed = erased(0)
    assert unmoved.asr >= 0.95
    assert not missed.findings.infected
