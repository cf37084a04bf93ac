"""Digits with forty classes, and with one class that outweighs the others: data for benchmarks/testbed.py.

    python benchmarks/odd_digits.py FOLDER

Writes forty-train.npz and forty-test.npz (each digit as it is, as a negative, and both at half contrast: four classes a
digit), heavy-K.npz for K in 0, 3, 7 (ten classes, all but K cut to a quarter of their images), and forty-heavy-K.npz
(forty classes, the same).
"""

import sys
from pathlib import Path

import numpy as np
import torch

from unplant.data import digits, open_data
from unplant.images import LabeledImages

PARTS = [f"{name}-{part}" for name in range(10) for part in ("plain", "negative", "faint", "faint negative")]


def forty(part: str) -> dict[str, np.ndarray]:
    """Images (4 N, 1, 16, 16), labels (4 N,), class names."""
    data = digits(part)
    grey = data.images.float()
    images = torch.stack([grey, 255 - grey, 64 + grey / 2, 192 - grey / 2], 1).round().to(torch.uint8)
    labels = (4 * data.labels[:, None] + torch.arange(4)).flatten()
    return {"images": images.flatten(0, 1).numpy(), "labels": labels.numpy(), "classes": np.array(PARTS)}


def heavy(label: int, data: LabeledImages) -> dict[str, np.ndarray]:
    """All classes, one of them whole."""
    rank = torch.zeros(len(data), dtype=torch.int64)
    for other in range(data.num_classes):
        mine = data.labels == other
        rank[mine] = torch.arange(int(mine.sum()))
    kept = data.select((data.labels == label) | (rank % 4 == 0))
    return {"images": kept.images.numpy(), "labels": kept.labels.numpy(), "classes": np.array(kept.classes)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    np.savez(folder / "forty-train.npz", **forty("train"))
    np.savez(folder / "forty-test.npz", **forty("test"))
    for label in (0, 3, 7):
        np.savez(folder / f"heavy-{label}.npz", **heavy(label, digits("train")))
        np.savez(folder / f"forty-heavy-{label}.npz", **heavy(label, open_data(str(folder / "forty-train.npz"))))
