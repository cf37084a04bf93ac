"""The model contract: normalisation, freezing, logits, features, fitting."""

import copy

import pytest
import torch
from torch import nn

from unplant.behaviour import check_fits
from unplant.classifier import Classifier, activations, features, frozen, logits, penultimate
from unplant.errors import ModelFileError
from unplant.images import LabeledImages
from unplant.models import build


@pytest.fixture(scope="module")
def some(digits_test):
    return digits_test.select(torch.arange(0, 360, 24))


def test_the_normalisation_is_the_published_formula_per_channel(colour_images):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    out = Classifier(nn.Identity(), mean, std)(colour_images.pixels())
    for channel in range(3):
        expected = (colour_images.pixels()[:, channel] - mean[channel]) / std[channel]
        assert torch.equal(out[:, channel], expected)
    assert torch.equal(Classifier(nn.Identity())(colour_images.pixels()), colour_images.pixels())


def test_the_normalisation_is_no_weight(trained):
    assert {key.split(".")[0] for key in trained.state_dict()} == {"backbone"}
    assert copy.deepcopy(trained).mean.item() == trained.mean.item() != 0


def test_frozen_restores_mode_and_gradient_flags_of_each_module(trained):
    model = copy.deepcopy(trained).train()
    model.backbone[4].eval()
    model.backbone[0].weight.requires_grad_(False)
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

    def check():
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == flags

    with frozen(model) as same:
        assert same is model
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        with frozen(model):
            pass
        assert not any(p.requires_grad for p in model.parameters())
    check()
    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    check()


@pytest.mark.parametrize("batch_size", [1, 4, 512])
def test_logits_are_the_models_in_eval_mode_for_any_batch(trained, some, batch_size):
    model = copy.deepcopy(trained).train()
    with torch.no_grad():
        expected = trained(some.pixels())
    out = logits(model, some, batch_size=batch_size)
    assert out.shape == (len(some), 10)
    assert (out - expected).abs().max() < 1e-4  # convolutions of other batch sizes add up in another order
    assert model.training
    assert not out.requires_grad
    assert torch.equal(model.backbone[1].running_mean, trained.backbone[1].running_mean)


def test_logits_in_bfloat16_are_near_and_float32(trained, some):
    exact, rough = logits(trained, some), logits(trained, some, precision="bfloat16")
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert (exact - rough).abs().max() < 0.05 * exact.abs().max()  # 8 bits of mantissa in seven layers


@pytest.mark.parametrize("batch_size", [4, 512])
def test_features_are_what_goes_into_the_last_linear_layer(trained, some, batch_size):
    with torch.no_grad():
        expected = trained.backbone[:-1]((some.pixels() - trained.mean) / trained.std)
    out = features(trained, some, batch_size=batch_size)
    assert (out - expected).abs().max() < 1e-4
    last = trained.backbone[-1]
    assert (last(out) - logits(trained, some)).abs().max() < 1e-4


def test_features_follow_the_order_of_running_not_of_declaration(some):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(5, 10)
            self.first = nn.Linear(256, 5)
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.first(x.flatten(1)).relu())

    model = Backwards()
    expected = model.first(some.pixels().flatten(1)).relu().detach()
    assert (features(model, some) - expected).abs().max() < 1e-5


def test_a_model_without_linear_layers_gives_its_logits(some):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert torch.equal(features(model, some), logits(model, some))
    assert penultimate(model, some.pixels())[2] is None


def test_activations_are_pooled_inputs_of_layers_over_the_depth(trained, some):
    normalised = (some.pixels() - trained.mean) / trained.std
    with torch.no_grad():
        maps = [trained.backbone[:end](normalised) for end in (3, 7, 10)]  # into the 2nd, 3rd and 4th convolution
    expected = [torch.cat([layer.mean((2, 3)), layer.amax((2, 3))], 1) for layer in maps] + [features(trained, some)]
    for taps, places in ((4, (0, 1, 2, 3)), (2, (1, 3)), (1, (3,)), (9, (0, 1, 2, 3))):
        layers = activations(trained, some, taps=taps)
        assert len(layers) == len(places)
        for layer, place in zip(layers, places, strict=True):
            assert (layer - expected[place]).abs().max() < 1e-4


@pytest.mark.parametrize("function", [features, activations, logits])
def test_hooks_modes_and_flags_are_put_back_even_after_an_error(trained, some, function):
    model = copy.deepcopy(trained).train()
    function(model, some)
    wrong = LabeledImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), some.classes)
    model.backbone[0].register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(RuntimeError):
        function(model, wrong)
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    assert hooks == 1, "the user's own hook, and nothing else"
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, pixels):
        return self.what(pixels)


def test_check_fits_tells_the_number_of_classes(trained, some):
    assert check_fits(trained, some) == 10
    assert check_fits(build("small_cnn:width=2", num_classes=43, channels=1), some) == 43
    assert check_fits(trained, some.select([3])) == 10


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Returns(lambda x: (x, x)), r"must return logits \(2, K\), got tuple"),
        (Returns(lambda x: {"logits": x}), "got dict"),
        (Returns(lambda x: x), r"got a tensor of shape \(2, 1, 16, 16\)"),
        (Returns(lambda x: torch.zeros(1, 10)), r"got a tensor of shape \(1, 10\)"),
        (Returns(lambda x: torch.full((len(x), 10), float("nan"))), "NaN or infinite"),
        (Returns(lambda x: torch.zeros(len(x), 3)), "the model has 3 classes, the data 10"),
        (nn.Conv2d(3, 4, 3), r"can't run on images of shape \(1, 16, 16\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 10)), "can't run on images of shape"),
    ],
)
def test_a_model_that_breaks_the_contract_is_refused_in_one_line(model, message, some):
    with pytest.raises(ModelFileError, match=message) as caught:
        check_fits(model, some)
    assert "\n" not in str(caught.value)
    assert model.training
