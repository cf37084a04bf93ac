"""Class-folder trees, on disk or in a zip: `root/<class>/<image>`."""

import io
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from unplant.errors import DataError
from unplant.images import LabeledImages

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm"})
MAX_PIXELS = 50_000_000
"""An image with more pixels is refused before it is decoded."""
MAX_FILE_BYTES = 200 * 2**20
"""A larger file is refused before it is read."""

BROKEN = (
    *(OSError, ValueError, SyntaxError, RuntimeError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile),
    *(DataError, Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""What Pillow and zipfile raise on damaged, encrypted or hostile images."""

Entry = tuple[str, Callable[[], bytes]]
"""A path relative to the root, and how to read it."""


def read_folder(path: Path, *, image_size: tuple[int, int] | None = None, skip_bad: bool = False) -> LabeledImages:
    """Reads every image below `path`, which is a folder, a zip, or a folder inside a zip (`a.zip/train`).

    Class folders are labelled in name order, numbers by value. An image is RGB if any is; 16-bit greys are scaled,
    transparency is put on black, EXIF rotation is applied. Links that lead out of the folder and hidden files aren't
    read.

    Raises:
        DataError: nothing there, broken images (the first 20 are named), or images of several sizes.
    """
    archive, inside = _split_zip(path)
    if archive is None:
        if not path.exists():
            raise DataError(f"there is no data at {path}")
        if not path.is_dir():
            raise DataError(f"{path} is neither a folder, a zip nor an .npz file")
        data = _decode_all(path, _folder_entries(path), image_size, skip_bad)
        folders = {item.name for item in path.iterdir() if item.is_dir() and not item.name.startswith(".")}
        if empty := sorted(folders - set(data.classes)):
            raise DataError(
                f"{path}: no images in the class folders {', '.join(empty[:10])}; "
                "remove them, or the labels would be counted wrongly"
            )
        return data
    try:
        with zipfile.ZipFile(archive) as file:
            return _decode_all(path, _zip_entries(file, inside), image_size, skip_bad)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{archive} is a damaged zip: {error}") from None


def _split_zip(path: Path) -> tuple[Path | None, str]:
    for candidate in (path, *path.parents):
        if candidate.suffix.lower() == ".zip" and candidate.is_file():
            return candidate, path.relative_to(candidate).as_posix()
    return None, ""


def _folder_entries(root: Path) -> Iterable[Entry]:
    real_root = root.resolve()
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            if not Path(os.path.realpath(path)).is_relative_to(real_root):
                raise DataError(f"{path} is a link out of {root}; nothing outside the folder is read")
            yield path.relative_to(root).as_posix(), lambda path=path: _read_file(path)


def _unreadable(error: OSError) -> None:
    raise DataError(f"can't read {error.filename}: {error.strerror}") from None


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise DataError("not a regular file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"more than {MAX_FILE_BYTES:,} bytes")
    return path.read_bytes()


def _zip_entries(archive: zipfile.ZipFile, inside: str) -> Iterable[Entry]:
    prefix = "" if inside in ("", ".") else inside.rstrip("/") + "/"
    for info in sorted(archive.infolist(), key=lambda info: info.filename):
        relative = info.filename.removeprefix(prefix)
        if info.is_dir() or not info.filename.startswith(prefix) or Path(relative).suffix.lower() not in SUFFIXES:
            continue
        if any(part.startswith((".", "__MACOSX")) for part in relative.split("/")):
            continue
        yield relative, lambda info=info: _read_member(archive, info)


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_FILE_BYTES:
        raise DataError(f"more than {MAX_FILE_BYTES:,} bytes")
    if info.flag_bits & 1:
        raise DataError("encrypted")
    return archive.read(info)


def _decode_all(
    root: Path, entries: Iterable[Entry], image_size: tuple[int, int] | None, skip_bad: bool
) -> LabeledImages:
    found = list(entries)
    loose = [name for name, _ in found if "/" not in name]
    found = [entry for entry in found if "/" in entry[0]]
    if not found:
        hint = f" ({len(loose)} images lie outside of class folders)" if loose else ""
        raise DataError(f"{root} has no images in class folders{hint}; expected {root}/<class>/<image>.png")
    classes = sorted({name.split("/")[0] for name, _ in found}, key=lambda name: (_natural(name), name))
    if len(classes) < 2:
        folders = {name.split("/")[1] for name, _ in found if name.count("/") > 1}
        hint = f"; did you mean {root}/{classes[0]}?" if folders else ""
        raise DataError(f"{root} has only one class folder, {classes[0]!r}{hint}")
    images, names, bad = [], [], []
    for name, read in found:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                images.append(_decode(read(), image_size))
            names.append(name)
        except BROKEN as error:
            bad.append(f"{name!r} ({' '.join(str(error).split())[:80] or type(error).__name__})")
    if bad and (not skip_bad or len(bad) > 0.01 * len(found)):
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        remedy = "they are more than 1 %" if skip_bad else "mend or remove them, or pass --skip-bad-images"
        raise DataError(
            f"{root}: {len(bad)} of {len(found)} images can't be read, {remedy}: {', '.join(bad[:20])}{more}"
        )
    channels = 3 if any(image.ndim == 3 for image in images) else 1
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        named = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)[:5])
        raise DataError(f"{root} has images of {len(sizes)} sizes ({named}, …); pass --image-size WIDTHxHEIGHT")
    height, width = next(iter(sizes))
    stacked = np.empty((len(images), channels, height, width), dtype=np.uint8)
    for index, image in enumerate(images):
        stacked[index] = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    labels = torch.tensor([classes.index(name.split("/")[0]) for name in names])
    return LabeledImages(torch.from_numpy(stacked), labels, tuple(classes), tuple(names))


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _decode(content: bytes, image_size: tuple[int, int] | None) -> np.ndarray:
    """uint8 (H, W) for grey images, (H, W, 3) for others."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
        if getattr(image, "n_frames", 1) > 1:
            raise DataError("animated")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise DataError("floating-point pixels")
        if image.mode.startswith("I"):
            # Pillow would clip 16-bit greys to white instead of scaling them.
            grey = np.asarray(image, dtype=np.float64)
            image = Image.fromarray(np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8))
        elif image.has_transparency_data:
            over = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over).convert("RGB")
        elif image.mode in ("1", "L"):
            image = image.convert("L")
        else:
            image = image.convert("RGB")
        if image_size is not None and (image.height, image.width) != image_size:
            image = image.resize((image_size[1], image_size[0]), Image.Resampling.BILINEAR)
        return np.asarray(image)


def write_folder(data: LabeledImages, root: Path) -> None:
    """Writes a class-folder tree of PNG files, `<class>/<index>.png`, into an existing empty folder."""
    for name in data.classes:
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise DataError(f"class name {name!r} can't be a folder's name")
        (root / name).mkdir()
    for index, (image, label) in enumerate(zip(data.images.numpy(), data.labels.tolist(), strict=True)):
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        picture.save(root / data.classes[label] / f"{index:06d}.png", compress_level=1)
