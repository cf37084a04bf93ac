"""`LabeledImages`: the one form in which images travel through Unplant."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unplant.errors import DataError

MOST_CLASSES = 100_000
"""Labels without class names that go beyond are no labels."""


def to_pixels(stored: Tensor) -> Tensor:
    """Stored uint8 → float pixels in [0, 1]."""
    return stored.to(torch.float32) / 255


def to_stored(pixels: Tensor) -> Tensor:
    """Float pixels → uint8 as a file on disk holds them: clipped to [0, 1], rounded to the nearest of 256 levels.

    >>> to_stored(torch.tensor([-0.1, 0.5, 1.2])).tolist()
    [0, 128, 255]
    """
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def in_proportion(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Places of `count` of the labels (N,) without replacement, each class in proportion, in order; all if no more."""
    if count >= len(labels):
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=generator)
    # Sorting by (rank within the class) / (size of the class) interleaves the classes in proportion.
    mixed = labels[order]
    position = torch.empty(len(order), dtype=torch.float64)
    for label in mixed.unique().tolist():
        mine = (mixed == label).nonzero().flatten()
        position[mine] = (torch.arange(len(mine), dtype=torch.float64) + 0.5) / len(mine)
    return order[position.argsort(stable=True)[:count]].sort().values


@dataclass(frozen=True, eq=False)
class LabeledImages:
    """Images with labels.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), each in [0, K).
        classes: the K class names, in label order.
        names: where each image comes from, (N,), or None.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            problems.append(f"images must be uint8 (N, C, H, W), got {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.ndim != 1 or self.labels.dtype != torch.int64 or len(self.labels) != len(self.images):
            problems.append(
                f"labels must be int64 ({len(self.images)},), got {self.labels.dtype} {tuple(self.labels.shape)}"
            )
        elif len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            problems.append(
                f"labels must lie in [0, {len(self.classes)}), got {int(self.labels.min())}..{int(self.labels.max())}"
            )
        if len(set(self.classes)) != len(self.classes):
            problems.append("class names must differ from each other")
        if self.names is not None and len(self.names) != len(self.images):
            problems.append(f"there must be {len(self.images)} names, got {len(self.names)}")
        if problems:
            raise DataError("; ".join(problems))

    @classmethod
    def from_arrays(cls, images: Any, labels: Any, classes: Sequence[str] | None = None) -> "LabeledImages":
        """From uint8 or [0, 1]-float arrays, (N, C, H, W), (N, H, W, C) or (N, H, W).

        Raises:
            DataError: another shape or dtype, floats outside [0, 1], or labels that aren't whole numbers.
        """
        pixels = np.asarray(images)
        if pixels.ndim == 3:
            pixels = pixels[:, None]
        if pixels.ndim != 4:
            raise DataError(f"images must be (N, C, H, W), (N, H, W, C) or (N, H, W), got {pixels.shape}")
        if pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
            pixels = pixels.transpose(0, 3, 1, 2)
        if pixels.shape[1] not in (1, 3):
            raise DataError(f"images must have 1 or 3 channels, got shape {pixels.shape}")
        if not len(pixels) or 0 in pixels.shape:
            raise DataError(f"there are no images: shape {pixels.shape}")
        if pixels.dtype.kind == "f":
            lowest, highest = pixels.min(), pixels.max()
            if not (lowest >= 0 and highest <= 1):  # also where they are NaN
                raise DataError(
                    f"float images must lie in [0, 1], got {lowest:g}..{highest:g}; "
                    "undo the normalisation (mean and std belong to the model), or pass uint8"
                )
            stored = to_stored(torch.from_numpy(np.require(pixels, requirements=["C", "W"])))
        elif pixels.dtype == np.uint8:
            stored = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
        else:
            raise DataError(f"images must be uint8 or float in [0, 1], got {pixels.dtype}")
        numbers = np.asarray(labels)
        if numbers.dtype.kind not in "iu" or numbers.shape != (len(stored),):
            raise DataError(f"labels must be {len(stored)} whole numbers, got {numbers.dtype} {numbers.shape}")
        if not classes and int(numbers.max()) >= MOST_CLASSES:
            raise DataError(f"labels must count classes from 0, got {int(numbers.max())}; name the classes if so many")
        names = tuple(classes) if classes else tuple(str(k) for k in range(int(numbers.max()) + 1))
        return cls(stored, torch.from_numpy(numbers.astype(np.int64)), names)

    @classmethod
    def from_dataset(cls, dataset: Any, classes: Sequence[str] | None = None) -> "LabeledImages":
        """From anything with a length and items (image, label): PIL images, uint8 arrays, float tensors in [0, 1].

        Raises:
            DataError: the set is empty, or its images differ in shape.
        """
        if isinstance(dataset, cls):
            return dataset
        images, labels = [], []
        for index in range(len(dataset)):
            image, label = dataset[index]
            array = np.asarray(image)
            if array.ndim == 2:
                array = array[None]
            elif array.ndim == 3 and array.shape[0] not in (1, 3):
                array = array.transpose(2, 0, 1)
            if images and array.shape != images[0].shape:
                raise DataError(
                    f"images must have one shape: image 0 is {images[0].shape}, image {index} is {array.shape}"
                )
            images.append(array)
            labels.append(int(label))
        if not images:
            raise DataError("the data set is empty")
        return cls.from_arrays(np.stack(images), np.array(labels), classes or getattr(dataset, "classes", None))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def pixels(self, indices: Any = slice(None)) -> Tensor:
        """The images at those indices as float pixels in [0, 1]."""
        return to_pixels(self.images[indices])

    def select(self, indices: Any) -> "LabeledImages":
        """The images at those indices (or where the mask is true), in that order."""
        chosen = torch.as_tensor(indices) if len(indices) else torch.empty(0, dtype=torch.int64)
        if chosen.dtype == torch.bool:
            chosen = chosen.nonzero().flatten()
        names = tuple(self.names[i] for i in chosen.tolist()) if self.names is not None else None
        return LabeledImages(self.images[chosen], self.labels[chosen], self.classes, names)

    def with_classes(self, classes: tuple[str, ...]) -> "LabeledImages":
        """The same images with labels that count in a model's classes: by name, or as they are if they have no names.

        Raises:
            DataError: a class is none of the model's.
        """
        if self.classes == classes:
            return self
        if self.classes == tuple(str(k) for k in range(self.num_classes)) and self.num_classes <= len(classes):
            return replace(self, classes=classes)
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise DataError(
                f"the data has classes that the model doesn't have: {', '.join(unknown[:5])}; "
                f"the model's are {', '.join(classes[:10])}"
            )
        place = torch.tensor([classes.index(name) for name in self.classes])
        return replace(self, labels=place[self.labels], classes=classes)

    def relabel(self, labels: Tensor) -> "LabeledImages":
        """The same images under other labels."""
        return replace(self, labels=labels)

    def sample(self, count: int, generator: torch.Generator) -> "LabeledImages":
        """`count` images without replacement, each class in proportion; all of them if there are no more."""
        return self if count >= len(self) else self.select(in_proportion(self.labels, count, generator))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixels (B, C, H, W), labels (B,)) in order, the last batch smaller."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self.pixels(part), self.labels[part]

    def fingerprint(self) -> str:
        """SHA-256 over shape, pixels, labels and class names, as 16 hexadecimal digits."""
        digest = hashlib.sha256()
        digest.update(repr((tuple(self.images.shape), self.classes)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class EndlessBatches(Iterator[Tensor]):
    """Endless index batches (B,), a new random order each epoch; B is `size`, or the whole set if it is smaller.

    A rest that doesn't fill a batch is carried into the next epoch, so no batch is ever of one image.

    Attributes:
        left: indices that were drawn and not used yet.
    """

    def __init__(self, data: LabeledImages, size: int, generator: torch.Generator) -> None:
        if not len(data):
            raise DataError("can't train on an empty set")
        self.count, self.size, self.generator = len(data), min(size, len(data)), generator
        self.left = torch.empty(0, dtype=torch.int64)

    def __next__(self) -> Tensor:
        while len(self.left) < self.size:
            self.left = torch.cat([self.left, torch.randperm(self.count, generator=self.generator)])
        batch, self.left = self.left[: self.size], self.left[self.size :]
        return batch
