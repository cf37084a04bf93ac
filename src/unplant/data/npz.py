"""`.npz` files with images and labels."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from unplant.errors import DataError
from unplant.images import LabeledImages
from unplant.limits import DEFAULT, Limits

IMAGES, LABELS = ("images", "x", "x_train", "data", "arr_0"), ("labels", "y", "y_train", "arr_1")

DAMAGED = (ValueError, TypeError, OSError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise on damaged or hostile archives."""


def read_npz(path: Path, *, limits: Limits = DEFAULT) -> LabeledImages:
    """Images (under `images`, `x`, …) and labels (under `labels`, `y`, …), optionally `classes`; no pickles.

    Raises:
        DataError: no such file, damaged, the arrays aren't there, or they are more than the limits allow.
    """
    try:
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is damaged or no .npz file")
        _check_members(path, limits)
        with np.load(path, allow_pickle=False) as arrays:
            image_key = next((key for key in IMAGES if key in arrays), None)
            label_key = next((key for key in LABELS if key in arrays), None)
            if image_key is None or label_key is None:
                raise DataError(f"{path} needs arrays `images` and `labels`, it has: {', '.join(arrays.files)}")
            images, labels = arrays[image_key], arrays[label_key]
            classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path} is damaged or holds pickled objects: {reason}") from None
    try:
        return LabeledImages.from_arrays(images, labels.reshape(-1), classes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _check_members(path: Path, limits: Limits) -> None:
    """Refuses too much, and headers that promise more than their file holds: numpy takes memory for what they say."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > limits.data_bytes:
            raise DataError(
                f"{path} unpacks to {unpacked:,} bytes; --limit data_bytes=N allows more than {limits.data_bytes:,}"
            )
        for entry in archive.infolist():
            if entry.filename.removesuffix(".npy") not in {*IMAGES, *LABELS, "classes"}:
                continue
            with archive.open(entry) as file:
                shape, dtype = _header(file)
            if math.prod(shape) * dtype.itemsize > entry.file_size and not dtype.hasobject:
                raise ValueError(f"{entry.filename!r} says {shape} of {dtype}, more than it holds")
            if entry.filename.removesuffix(".npy") in IMAGES and shape and shape[0] > limits.images:
                raise DataError(f"{path} has {shape[0]:,} images; --limit images=N allows more than {limits.images:,}")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype
