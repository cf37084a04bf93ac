"""Architectures: shapes, sizes, and what can be named."""

import inspect
import textwrap

import pytest
import torch
from torch import nn

from unplant.errors import ModelFileError, UsageError
from unplant.models import architectures, build


def weights(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", list(architectures))
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 17), (32, 32), (64, 48)])
def test_logits_of_any_image_from_8_pixels_on(name, channels, num_classes, height, width):
    network = build(f"{name}:width=2", num_classes=num_classes, channels=channels).eval()
    with torch.no_grad():
        out = network(torch.rand(3, channels, height, width))
    assert out.shape == (3, num_classes)
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("spec", "channels", "count"),
    [("preact_resnet18", 3, 11.2e6), ("preact_resnet18:width=16", 3, 0.7e6), ("small_cnn", 1, 65e3)],
)
def test_the_published_number_of_weights(spec, channels, count):
    with torch.device("meta"):
        network = build(spec, num_classes=10, channels=channels)
    assert weights(network) == pytest.approx(count, rel=0.02)


def test_preact_resnet18_has_17_convolutions_on_its_main_path_and_three_projections():
    with torch.device("meta"):
        network = build("preact_resnet18", num_classes=10, channels=3)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [module.kernel_size for module in convolutions].count((3, 3)) == 17
    assert [module.kernel_size for module in convolutions].count((1, 1)) == 3


def test_width_scales_the_first_stage():
    assert build("preact_resnet18:width=4", num_classes=2, channels=1).conv1.out_channels == 4
    assert build("small_cnn:width=5", num_classes=2, channels=1)[0].out_channels == 5


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("resnet999", UsageError, "unknown architecture 'resnet999'; there are: preact_resnet18, small_cnn"),
        ("small_cnn:depth=3", UsageError, "no setting 'depth'; there are: num_classes, channels, width"),
        ("small_cnn:width", UsageError, "NAME=VALUE"),
        ("small_cnn:width=wide", ModelFileError, "can't be built"),
        ("small_cnn:width=-1", ModelFileError, "can't be built"),
        ("small_cnn:width=0", ModelFileError, "width must be at least 1"),
        ("preact_resnet18:width=0", ModelFileError, "width must be at least 1"),
        ("nowhere.py", UsageError, "name the factory after the file: nowhere.py:factory"),
        ("nowhere.py:net", UsageError, "there is no architecture file nowhere.py"),
    ],
)
def test_an_impossible_architecture_is_one_line(spec, error, message):
    with pytest.raises(error, match=message) as caught:
        build(spec, num_classes=10, channels=1)
    assert "\n" not in str(caught.value)


FILE = """
from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass
class Settings:
    hidden: int = 7


def net(num_classes, channels):
    return nn.Sequential(nn.Conv2d(channels, Settings().hidden, 3), nn.Flatten(), nn.LazyLinear(num_classes))


def fixed():
    return nn.Linear(2, 3)


def mapping():
    return {}


def fails():
    raise ValueError("no such net")


value = 3
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "my nets.py"
    path.write_text(textwrap.dedent(FILE))
    return path


def test_a_users_factory_gets_classes_and_channels_if_it_asks(source):
    network = build(f"{source}:net", num_classes=4, channels=2)
    assert network[0].weight.shape == (7, 2, 3, 3)
    assert network[2].out_features == 4
    assert build(f"{source}:fixed", num_classes=4, channels=2).out_features == 3


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing", UsageError, "has no factory 'nothing'"),
        ("value", UsageError, "has no factory 'value'"),
        ("mapping", ModelFileError, "must return a torch.nn.Module, got dict"),
        ("fails", ModelFileError, "can't be built: no such net"),
    ],
)
def test_a_wrong_factory_is_one_line(source, name, error, message):
    with pytest.raises(error, match=message):
        build(f"{source}:{name}", num_classes=4, channels=2)


def test_a_file_that_cannot_be_imported_says_why(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_that_name\n")
    with pytest.raises(UsageError, match="can't be imported: ModuleNotFoundError"):
        build(f"{path}:net", num_classes=2, channels=1)


def test_every_registered_architecture_takes_classes_and_channels():
    for name, factory in architectures.items():
        assert {"num_classes", "channels"} <= set(inspect.signature(factory).parameters), name
