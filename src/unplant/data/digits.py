"""Handwritten digits that come with scikit-learn: 1,797 real images, so that the demo needs no download."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unplant.errors import DataError
from unplant.images import LabeledImages, to_stored

CLASSES = tuple("0123456789")


def digits(part: str = "all", seed: int = 0) -> LabeledImages:
    """Grey 16×16 digits, enlarged from 8×8 (Alpaydin and Kaynak, UCI Machine Learning Repository, 1998).

    Args:
        part: `all` (1,797 images), `train` (1,437) or `test` (360), split by class.
        seed: of the split.

    Raises:
        DataError: there is no such part.
    """
    if part not in {"all", "train", "test"}:
        raise DataError(f"digits has the parts all, train and test, got {part!r}")
    images, labels = _load()
    if part != "all":
        from sklearn.model_selection import train_test_split

        train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
        chosen = torch.from_numpy(np.sort(train if part == "train" else test))
        images, labels = images[chosen], labels[chosen]
    return LabeledImages(images, labels, CLASSES)


@cache
def _load() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels.astype(np.float32) / 16).view(-1, 1, 8, 8)
    return to_stored(F.interpolate(small, size=(16, 16), mode="bilinear")), torch.from_numpy(labels.astype(np.int64))
