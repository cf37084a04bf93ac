"""What is said about a data set before training: true, short, and nothing where there is nothing to say."""

import time

import pytest
import torch

from unplant.data import check_data, digits
from unplant.errors import DataError
from unplant.images import LabeledImages


def noise(count=100, classes=4, seed=0, names=None):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 4, 5), generator=generator, dtype=torch.uint8)
    return LabeledImages(images, torch.arange(count) % classes, tuple("abcdefghij"[:classes]), names)


def with_copies(data, copies):
    """Image `to` becomes a copy of image `of`, for each pair."""
    images = data.images.clone()
    for to, of in copies:
        images[to] = images[of]
    return LabeledImages(images, data.labels, data.classes, data.names)


def test_there_is_nothing_to_say_about_good_data(digits_test):
    assert check_data(digits("train"), digits_test) == []
    assert check_data(noise(), noise(seed=1)) == []


def test_the_same_image_under_two_labels_is_counted_and_named():
    data = with_copies(noise(names=tuple(f"x/{k}.png" for k in range(100))), [(9, 4), (13, 4), (22, 8), (30, 26)])
    # 9, 13 and 4 are b, b and a; 22 and 8 are c and a; 30 and 26 are both c
    lines = check_data(data)
    assert "5 of 100 images lie under several labels, pixel by pixel the same, such as x/4.png and x/9.png" in lines
    unnamed = LabeledImages(data.images, data.labels, data.classes)
    assert "such as image 4 (a) and image 9 (b)" in check_data(unnamed)[0]


def test_names_are_escaped():
    data = with_copies(noise(names=tuple(f"\x1b[2J\udc80{k}\n" for k in range(100))), [(9, 4)])
    (line,) = check_data(data)
    assert r"such as \x1b[2J\udc804\n and \x1b[2J\udc809\n" in line


@pytest.mark.parametrize(("copies", "said"), [(1, False), (2, True), (40, True)])
def test_copies_are_told_of_above_one_percent(copies, said):
    data = with_copies(
        noise(), [(4 * (k + 1), 4 * k) for k in range(min(copies, 24))] + [(97 - 4 * k, 1) for k in range(copies - 24)]
    )
    lines = [line for line in check_data(data) if "copies" in line]
    if said:
        distinct = len({tuple(image) for image in data.images.flatten(1).tolist()})
        assert lines == [f"{100 - distinct} of 100 images ({100 - distinct}%) are exact copies of others"]
    else:
        assert lines == []


@pytest.mark.parametrize("count", [2, 500])
def test_images_that_are_all_alike_are_refused(count):
    images = torch.full((count, 1, 8, 8), 7, dtype=torch.uint8)
    with pytest.raises(DataError, match=f"all {count} images are alike"):
        check_data(LabeledImages(images, torch.arange(count) % 2, ("a", "b")))
    images[0, 0, 0, 0] = 8
    check_data(LabeledImages(images, torch.arange(count) % 2, ("a", "b")))


def test_an_empty_set_is_refused():
    with pytest.raises(DataError, match="empty"):
        check_data(noise().select([]))


def test_test_images_that_were_trained_on_are_counted():
    data, other = noise(), noise(40, seed=1)
    mixed = LabeledImages(torch.cat([other.images[:37], data.images[5:8]]), other.labels, other.classes)
    assert check_data(data, mixed) == ["3 of 40 test images are in the data too: ACC will look better than it is"]
    assert "100 of 100 test images" in check_data(data, data)[0]
    grey = LabeledImages(data.images[:, :1], data.labels, data.classes)
    assert check_data(data, grey) == [], "images of another shape can't be the same"


def test_small_classes_are_named_with_their_sizes():
    data = noise(104)
    kept = [k for k in range(104) if int(data.labels[k]) != 2 or k < 30]  # seven of the third class
    assert check_data(data.select(kept)) == ["1 of 4 classes have fewer than 10 images (c: 7)"]
    empty = LabeledImages(data.images, data.labels, (*data.classes, "e"))
    assert check_data(empty) == ["1 of 5 classes have fewer than 10 images (e: 0)"]


def test_a_class_that_outweighs_the_others_is_named():
    data = noise(200)
    mostly = data.relabel(torch.where(torch.arange(200) < 120, 1, data.labels))
    (said,) = check_data(mostly)
    assert said.startswith("class b holds 70% of all images, far more than others; if that is poison")
    tenth = noise(200, classes=10)
    poisoned = tenth.relabel(torch.where(torch.arange(200) % 10 < 3, 1, tenth.labels))
    assert check_data(tenth) == []
    assert check_data(poisoned)[-1].startswith("class b holds 30% of all images")
    two = noise(200, classes=2)
    assert check_data(two.relabel((torch.arange(200) < 20).long())) == [], "of two classes one is always larger"


def test_a_set_smaller_than_a_batch_is_told_of():
    assert check_data(noise(), batch_size=101) == [
        "there are only 100 images, fewer than a batch of 101: each step sees all of them"
    ]
    assert check_data(noise(), batch_size=100) == []


def test_fifty_thousand_images_take_a_moment():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50_000, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = LabeledImages(images, torch.arange(50_000) % 10, tuple("abcdefghij"))
    started = time.perf_counter()
    assert check_data(data) == []
    assert time.perf_counter() - started < 5  # 0.3 s on a free core
