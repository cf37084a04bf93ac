"""What a user should know about a data set before hours are spent on it."""

import hashlib

import numpy as np

from unplant.errors import DataError, printable
from unplant.images import LabeledImages

FEW_IMAGES = 10
"""A class with fewer images is told of."""
LARGE_CLASS = 0.25
"""A class with more of all images than this, and three times as many as others, is told of."""
MANY_COPIES = 0.01
"""A share of exact copies above this is told of."""


def check_data(data: LabeledImages, test: LabeledImages | None = None, *, batch_size: int = 0) -> list[str]:
    """Warnings about a data set, one line each; none if there is nothing to say.

    Images count as the same if every pixel is. 50,000 images of 32×32 take about 0.4 s.

    Args:
        data: training images, or any others.
        test: the test images that the result will be measured with.
        batch_size: images a training step; 0: unknown.

    Raises:
        DataError: there are no images, or all are alike.
    """
    if not len(data):
        raise DataError("the data set is empty")
    prints = _fingerprints(data)
    _, group, sizes = np.unique(prints, return_inverse=True, return_counts=True)
    if len(data) > 1 and len(sizes) == 1:
        raise DataError(f"all {len(data)} images are alike, pixel by pixel; there is nothing to learn from them")
    said = [_several_labels(data, group), _copies(group, sizes), _few(data), _one_sided(data)]
    if len(data) < batch_size:
        said.append(
            f"there are only {len(data)} images, fewer than a batch of {batch_size}: each step sees all of them"
        )
    if test is not None and test.shape == data.shape:
        shared = int(np.isin(_fingerprints(test), prints).sum())
        if shared:
            said.append(f"{shared} of {len(test)} test images are in the data too: ACC will look better than it is")
    return [printable(line) for line in said if line]


def _fingerprints(data: LabeledImages) -> np.ndarray:
    """A number per image (N,), the same for the same pixels."""
    digests = b"".join(hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in data.images.numpy())
    return np.frombuffer(digests, dtype=np.uint64)


def _several_labels(data: LabeledImages, group: np.ndarray) -> str | None:
    pairs = np.unique(group * data.num_classes + data.labels.numpy())
    torn = np.bincount(pairs // data.num_classes)[group] > 1
    if not torn.any():
        return None
    places = np.flatnonzero(group == group[torn.argmax()])
    labels = data.labels.numpy()[places]
    pair = (places[0], places[(labels != labels[0]).argmax()])
    named = " and ".join(data.names[i] if data.names else f"image {i} ({data.classes[data.labels[i]]})" for i in pair)
    return f"{int(torn.sum())} of {len(data)} images lie under several labels, pixel by pixel the same, such as {named}"


def _copies(group: np.ndarray, sizes: np.ndarray) -> str | None:
    copies = len(group) - len(sizes)
    if copies <= MANY_COPIES * len(group):
        return None
    return f"{copies} of {len(group)} images ({copies / len(group):.0%}) are exact copies of others"


def _few(data: LabeledImages) -> str | None:
    counts = np.bincount(data.labels.numpy(), minlength=data.num_classes)
    few = np.flatnonzero(counts < FEW_IMAGES)
    if not len(few):
        return None
    named = ", ".join(f"{data.classes[k]}: {counts[k]}" for k in few[:5]) + (", …" if len(few) > 5 else "")
    return f"{len(few)} of {data.num_classes} classes have fewer than {FEW_IMAGES} images ({named})"


def _one_sided(data: LabeledImages) -> str | None:
    counts = np.bincount(data.labels.numpy(), minlength=data.num_classes)
    largest = int(counts.argmax())
    share, usual = (
        counts[largest] / len(data),
        np.median(np.delete(counts, largest)) if data.num_classes > 2 else np.inf,
    )
    if share <= LARGE_CLASS or counts[largest] < 3 * usual:
        return None
    return (
        f"class {data.classes[largest]} holds {share:.0%} of all images, far more than others; "
        "if that is poison, it may be too much to be found as a group of its own"
    )
