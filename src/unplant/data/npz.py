"""`.npz` files with images and labels."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from unplant.errors import DataError
from unplant.images import LabeledImages

IMAGES, LABELS = ("images", "x", "x_train", "data", "arr_0"), ("labels", "y", "y_train", "arr_1")

MAX_BYTES = 8 * 2**30
"""Archives that unpack to more are refused before they are read."""


def read_npz(path: Path) -> LabeledImages:
    """Images (under `images`, `x`, …) and labels (under `labels`, `y`, …), optionally `classes`; no pickles.

    Raises:
        DataError: no such file, damaged, or the arrays aren't there.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is damaged or no .npz file")
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_BYTES:
        raise DataError(f"{path} unpacks to {unpacked:,} bytes, more than the limit of {MAX_BYTES:,}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            image_key = next((key for key in IMAGES if key in arrays), None)
            label_key = next((key for key in LABELS if key in arrays), None)
            if image_key is None or label_key is None:
                raise DataError(f"{path} needs arrays `images` and `labels`, it has: {', '.join(arrays.files)}")
            images, labels = arrays[image_key], arrays[label_key]
            classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, RuntimeError, MemoryError, zlib.error) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path} is damaged or holds pickled objects: {reason}") from None
    try:
        return LabeledImages.from_arrays(images, labels.reshape(-1), classes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
