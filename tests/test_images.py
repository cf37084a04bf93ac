"""`LabeledImages`: what it takes, what it refuses, and that nothing is lost on the way."""

import numpy as np
import pytest
import torch

from unplant.errors import DataError
from unplant.images import EndlessBatches, LabeledImages, to_pixels, to_stored

ONE = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
LABELS = torch.tensor([0, 1])


def test_stored_and_pixels_are_inverse_on_all_256_levels():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_stored(to_pixels(levels)), levels)
    assert to_pixels(levels)[255] == 1
    assert to_pixels(levels)[51] == pytest.approx(0.2)


def test_storing_rounds_to_the_nearest_level_and_clips():
    values = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 0.5
    expected = [min(255, max(0, int(np.floor(v * 255 + 0.5)))) for v in values.tolist()]
    # Where two levels are equally near either will do: none of these values is such a one.
    assert not any(abs((v * 255) % 1 - 0.5) < 1e-9 for v in values.tolist())
    assert to_stored(values).tolist() == expected


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (ONE.float(), LABELS, r"images must be uint8 \(N, C, H, W\), got torch.float32"),
        (ONE[:, 0], LABELS, r"images must be uint8"),
        (ONE, LABELS.int(), r"labels must be int64 \(2,\)"),
        (ONE, LABELS[:1], r"labels must be int64 \(2,\)"),
        (ONE, LABELS[:, None], r"labels must be int64"),
        (ONE, LABELS + 1, r"labels must lie in \[0, 2\), got 1\.\.2"),
        (ONE, LABELS - 1, r"labels must lie in \[0, 2\), got -1\.\.0"),
        (ONE.float(), LABELS.int(), "images must be .*; labels must be"),
    ],
)
def test_a_wrong_shape_dtype_or_label_is_refused(images, labels, message):
    with pytest.raises(DataError, match=message):
        LabeledImages(images, labels, ("a", "b"))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHW"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_arrays_of_any_layout_and_dtype_give_the_same_images(layout, dtype):
    channels = 1 if layout == "NHW" else 3
    stored = np.random.default_rng(0).integers(0, 256, (5, channels, 6, 7), dtype=np.uint8)
    array = {"NCHW": stored, "NHWC": stored.transpose(0, 2, 3, 1), "NHW": stored[:, 0]}[layout]
    array = array if dtype == np.uint8 else (array / 255).astype(dtype)
    data = LabeledImages.from_arrays(array, [0, 1, 2, 0, 1])
    assert np.array_equal(data.images.numpy(), stored)
    assert data.labels.tolist() == [0, 1, 2, 0, 1]
    assert data.classes == ("0", "1", "2")
    assert data.shape == (channels, 6, 7)
    assert data.num_classes == 3


def test_a_read_only_array_is_taken_without_a_warning():
    array = np.zeros((2, 4, 4), dtype=np.uint8)
    array.flags.writeable = False
    assert len(LabeledImages.from_arrays(array, [0, 1])) == 2


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4)), [0, 1], "images must be .*got"),
        (np.zeros((2, 5, 4, 4)), [0, 1], "1 or 3 channels"),
        (np.zeros((0, 1, 4, 4)), [], "no images"),
        (np.zeros((2, 1, 0, 4)), [0, 1], "no images"),
        (np.full((2, 1, 4, 4), 1.5), [0, 1], r"\[0, 1\], got 1.5\.\.1.5; undo the normalisation"),
        (np.full((2, 1, 4, 4), -0.5), [0, 1], "undo the normalisation"),
        (np.full((2, 1, 4, 4), np.nan), [0, 1], "float images"),
        (np.array([[[[0.0]]], [[[np.inf]]]]), [0, 1], "float images"),
        (np.zeros((2, 1, 4, 4), dtype=np.int64), [0, 1], "uint8 or float"),
        (np.zeros((2, 1, 4, 4)), [0.0, 1.0], "whole numbers"),
        (np.zeros((2, 1, 4, 4)), [0, 1, 2], "whole numbers"),
        (np.zeros((2, 1, 4, 4)), [0, -1], "labels must lie"),
    ],
)
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_wrong_arrays_are_refused(images, labels, message):
    with pytest.raises(DataError, match=message):
        LabeledImages.from_arrays(images, labels)


def test_select_takes_indices_masks_and_nothing(colour_images):
    by_index = colour_images.select([3, 0, 7])
    assert torch.equal(by_index.images, colour_images.images[[3, 0, 7]])
    assert by_index.labels.tolist() == [3, 0, 3]
    mask = colour_images.labels == 2
    assert torch.equal(colour_images.select(mask).images, colour_images.images[mask])
    assert len(colour_images.select(torch.zeros(12, dtype=torch.bool))) == 0
    assert len(colour_images.select([])) == 0


def test_select_keeps_names_with_their_images(colour_images):
    named = LabeledImages(colour_images.images, colour_images.labels, colour_images.classes, tuple("abcdefghijkl"))
    assert named.select([5, 1]).names == ("f", "b")
    assert colour_images.select([5, 1]).names is None


def test_relabel_changes_labels_only(colour_images):
    before = colour_images.labels.clone()
    changed = colour_images.relabel(torch.zeros(12, dtype=torch.int64))
    assert changed.labels.sum() == 0
    assert torch.equal(changed.images, colour_images.images)
    assert torch.equal(colour_images.labels, before)


@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_batches_are_all_images_in_order(colour_images, size):
    parts = list(colour_images.batches(size))
    assert torch.equal(torch.cat([pixels for pixels, _ in parts]), colour_images.pixels())
    assert torch.equal(torch.cat([labels for _, labels in parts]), colour_images.labels)
    assert all(len(pixels) == size for pixels, _ in parts[:-1])


def test_a_sample_is_stratified_without_replacement_and_seeded():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 1, 2, 2).contiguous()
    data = LabeledImages(images, labels, tuple("abc"))
    part = data.sample(20, torch.Generator().manual_seed(0))
    assert part.labels.bincount().tolist() == [12, 6, 2]
    assert len(part.images[:, 0, 0, 0].unique()) == 20
    assert torch.equal(part.images, data.sample(20, torch.Generator().manual_seed(0)).images)
    assert not torch.equal(part.images, data.sample(20, torch.Generator().manual_seed(1)).images)
    assert data.sample(100, torch.Generator()) is data
    assert len(data.sample(1, torch.Generator())) == 1


def test_the_fingerprint_tells_every_change(colour_images):
    data = colour_images
    one_bit = data.images.clone()
    one_bit[3, 1, 2, 5] ^= 1
    one_label = data.labels.clone()
    one_label[0] = 3
    others = [
        LabeledImages(one_bit, data.labels, data.classes),
        LabeledImages(data.images, one_label, data.classes),
        LabeledImages(data.images, data.labels, ("a", "b", "c", "x")),
        LabeledImages(data.images.transpose(2, 3).contiguous(), data.labels, data.classes),
        LabeledImages(data.images.view(12, 3, 14, 10), data.labels, data.classes),
        data.select(list(range(11, -1, -1))),
    ]
    prints = {other.fingerprint() for other in others}
    assert len(prints) == len(others)
    assert data.fingerprint() not in prints
    copy = LabeledImages(data.images.clone(memory_format=torch.channels_last), data.labels.clone(), data.classes)
    assert copy.fingerprint() == data.fingerprint()
    assert len(data.fingerprint()) == 16


@pytest.mark.parametrize(("count", "size"), [(10, 3), (10, 10), (7, 2), (9, 4), (5, 100), (2, 2), (1, 8), (129, 128)])
def test_forever_covers_each_epoch_exactly_once_in_full_batches(count, size):
    data = LabeledImages(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64), ("a",))
    state = torch.get_rng_state()
    stream = EndlessBatches(data, size, torch.Generator().manual_seed(0))
    batches = [next(stream) for _ in range(4 * count)]
    assert {len(batch) for batch in batches} == {min(size, count)}
    indices = torch.cat(batches)
    epochs = [indices[start : start + count] for start in range(0, len(indices) - count + 1, count)]
    assert len(epochs) >= 4
    assert all(torch.equal(epoch.sort().values, torch.arange(count)) for epoch in epochs)
    if count > 4:
        assert any(not torch.equal(epochs[0], epoch) for epoch in epochs[1:])
    again = EndlessBatches(data, size, torch.Generator().manual_seed(0))
    assert all(torch.equal(batch, next(again)) for batch in batches)
    assert torch.equal(torch.get_rng_state(), state)


def test_forever_refuses_an_empty_set(generator):
    empty = LabeledImages(torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), ("a",))
    with pytest.raises(DataError, match="empty"):
        next(EndlessBatches(empty, 4, generator))
