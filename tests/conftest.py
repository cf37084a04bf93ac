"""What all tests share: one thread, a tiny trained model, a tiny set of random colour images."""

import pytest
import torch

from unplant.classifier import Classifier
from unplant.data import digits
from unplant.images import LabeledImages
from unplant.planting import TrainConfig, train

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test goes first, so that processes side by side end at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_third_party.py")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def colour_images() -> LabeledImages:
    """Twelve random colour images of 10×14 pixels, in four classes."""
    random = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (12, 3, 10, 14), generator=random, dtype=torch.uint8)
    return LabeledImages(images, torch.arange(12) % 4, ("a", "b", "c", "d"))


@pytest.fixture(scope="session")
def digits_test() -> LabeledImages:
    return digits("test")


@pytest.fixture(scope="session")
def trained(digits_test: LabeledImages) -> Classifier:
    """A net of width 8 with about 95 % accuracy on the digits; tests must leave it as it is."""
    config = TrainConfig(epochs=3, batch_size=32)
    model = train("small_cnn:width=8", digits("train"), config, seed=0)
    with torch.no_grad():
        accuracy = (model(digits_test.pixels()).argmax(1) == digits_test.labels).float().mean()
    assert accuracy > 0.9, "the shared model has learnt nothing: every test on it would be empty"
    return model
