"""Data sources: class folders and zips of them, `.npz`, scikit-learn's digits, any (image, label) Dataset."""

from pathlib import Path
from typing import Any

from unplant.data.digits import digits
from unplant.data.folder import read_folder, write_folder
from unplant.data.npz import read_npz
from unplant.errors import DataError
from unplant.images import LabeledImages
from unplant.limits import DEFAULT, Limits

__all__ = ["digits", "open_data", "read_folder", "read_npz", "write_folder"]


def open_data(
    source: Any,
    *,
    image_size: tuple[int, int] | None = None,
    skip_bad: bool = False,
    limits: Limits = DEFAULT,
) -> LabeledImages:
    """Images from where `source` says.

    Args:
        source: `"digits"`, `"digits:train"`, `"digits:test"` (also with `,seed=N`); `"folder:PATH"`, `"npz:PATH"`; a
            bare path to a class-folder tree, a zip of one (`a.zip` or a folder inside it, `a.zip/train`) or an
            `.npz`; `LabeledImages`; any object with a length and (image, label) items.
        image_size: (H, W) to which every image is resized; None: all images must have one size.
        skip_bad: go on without broken images, if they are at most 1 %.
        limits: on the files.

    Raises:
        DataError: there is nothing to read, or it can't be read.
    """
    if isinstance(source, LabeledImages):
        return source
    if not isinstance(source, (str, Path)):
        return LabeledImages.from_dataset(source)
    text = str(source)
    if image_size is not None and (text.startswith(("digits", "npz:")) or text.endswith(".npz")):
        raise DataError(f"--image-size resizes folders and zips of images, not {text}")
    if text == "digits" or text.startswith("digits:"):
        part, _, seed = text.partition(":")[2].partition(",seed=")
        if seed and not (seed.isascii() and seed.isdigit() and len(seed) <= 9):
            raise DataError(f"the split's seed must be a whole number of at most nine digits, got {seed!r} in {text!r}")
        return digits(part or "all", int(seed or 0))
    scheme, colon, rest = text.partition(":")
    path = Path(rest) if colon and scheme in {"folder", "npz"} else Path(text)
    if scheme == "npz" or path.suffix == ".npz":
        return read_npz(path)
    return read_folder(path, image_size=image_size, skip_bad=skip_bad)
