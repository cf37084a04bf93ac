"""Class-folder trees, on disk or in a zip: `root/<class>/<image>`."""

import io
import lzma
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from unplant.errors import DataError
from unplant.images import LabeledImages
from unplant.limits import DEFAULT, Limits

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm"})

BROKEN = (
    *(OSError, ValueError, SyntaxError, RuntimeError, MemoryError, EOFError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, DataError),
)
"""What Pillow and zipfile raise on damaged, encrypted or hostile images."""

Entry = tuple[str, Callable[[], bytes]]
"""A path relative to the root, and how to read it."""


def read_folder(
    path: Path, *, image_size: tuple[int, int] | None = None, skip_bad: bool = False, limits: Limits = DEFAULT
) -> LabeledImages:
    """Reads every image below `path`, which is a folder, a zip, or a folder inside a zip (`a.zip/train`).

    Class folders are labelled in name order, numbers by value. An image is RGB if any is; grey with transparency is
    grey. What is transparent is put on black, 16-bit greys are scaled, EXIF rotation is applied. Links that lead out of
    the folder and hidden files aren't read; nothing is ever unpacked to disk.

    Raises:
        DataError: nothing there, broken images (the first 20 are named), images of several sizes, or more than the
            limits allow.
    """
    try:
        archive, inside = _split_zip(path)
        if archive is not None:
            return _read_zip(path, archive, inside, image_size, skip_bad, limits)
        if not path.exists():
            raise DataError(f"there is no data at {path}")
        if not path.is_dir():
            raise DataError(f"{path} is neither a folder, a zip nor an .npz file")
        data = _decode_all(path, _folder_entries(path, limits), image_size, skip_bad, limits)
        folders = {item.name for item in path.iterdir() if item.is_dir() and not item.name.startswith(".")}
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}") from None
    except RecursionError:  # os.walk of Python 3.11 calls itself
        raise DataError(f"{path} holds more folders in folders than can be read") from None
    if empty := sorted(folders - set(data.classes)):
        raise DataError(
            f"{path}: no images in the class folders {', '.join(empty[:10])}; "
            "remove them, or the labels would be counted wrongly"
        )
    return data


def _split_zip(path: Path) -> tuple[Path | None, str]:
    for candidate in (path, *path.parents):
        if candidate.suffix.lower() == ".zip" and candidate.is_file():
            return candidate, path.relative_to(candidate).as_posix()
    return None, ""


def _folder_entries(root: Path, limits: Limits) -> Iterator[Entry]:
    real_root = root.resolve()
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            if not Path(os.path.realpath(path)).is_relative_to(real_root):
                raise DataError(f"{path} is a link out of {root}; nothing outside the folder is read")
            yield path.relative_to(root).as_posix(), lambda path=path: _read_file(path, limits)


def _unreadable(error: OSError) -> None:
    raise DataError(f"can't read {error.filename}: {error.strerror}") from None


def _read_file(path: Path, limits: Limits) -> bytes:
    status = path.stat()
    if not path.is_file():  # opening a FIFO would wait for ever
        raise DataError("not a regular file")
    _check_size(status.st_size, limits)
    return path.read_bytes()


def _check_size(size: int, limits: Limits) -> None:
    if size > limits.image_bytes:
        raise DataError(f"{size:,} bytes; --limit image_bytes=N allows more than {limits.image_bytes:,}")


def _read_zip(
    path: Path, archive: Path, inside: str, image_size: tuple[int, int] | None, skip_bad: bool, limits: Limits
) -> LabeledImages:
    try:
        if _entries_claimed(archive) > limits.images:
            raise DataError(f"{archive} has more than {limits.images:,} entries; --limit images=N allows more")
        with zipfile.ZipFile(archive) as file:
            members = list(_zip_members(file, inside))
            if (unpacked := sum(info.file_size for _, info in members)) > limits.data_bytes:
                raise DataError(
                    f"{path} unpacks to {unpacked:,} bytes; --limit data_bytes=N allows more than {limits.data_bytes:,}"
                )
            entries = ((name, lambda info=info: _read_member(file, info, limits)) for name, info in members)
            return _decode_all(path, entries, image_size, skip_bad, limits)
    except DataError:
        raise
    except BROKEN as error:
        raise DataError(f"{archive} is a damaged zip: {error}") from None


def _entries_claimed(archive: Path) -> int:
    """What a zip's end says of the number of its entries, before memory is taken for them; 0 if it has no end.

    An end that says too little doesn't help a bomb: an entry of the directory has rarely more than 256 bytes.
    """
    with archive.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2**16 - 22 - 76))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        return 0
    entries, length = struct.unpack_from("<HI", tail, end + 10)
    large = end - 76  # of a zip64: its own end (56 bytes) and where that is (20 bytes) lie just before
    if large >= 0 and tail.startswith(b"PK\x06\x06", large):
        entries, length = struct.unpack_from("<QQ", tail, large + 32)
    return max(entries, length // 256)


def _zip_members(archive: zipfile.ZipFile, inside: str) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    prefix = "" if inside in ("", ".") else inside.rstrip("/") + "/"
    for info in sorted(archive.infolist(), key=lambda info: info.filename):
        if info.filename.startswith("/") or ".." in info.filename.split("/"):
            raise DataError(f"{archive.filename} has an entry that leads out of it, {info.filename!r}; nothing is read")
        relative = info.filename.removeprefix(prefix)
        if info.is_dir() or not info.filename.startswith(prefix) or Path(relative).suffix.lower() not in SUFFIXES:
            continue
        if any(part.startswith((".", "__MACOSX")) for part in relative.split("/")):
            continue
        yield relative, info


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limits: Limits) -> bytes:
    _check_size(info.file_size, limits)
    if info.flag_bits & 1:
        raise DataError("encrypted")
    return archive.read(info)


def _decode_all(
    root: Path, entries: Iterable[Entry], image_size: tuple[int, int] | None, skip_bad: bool, limits: Limits
) -> LabeledImages:
    found = list(islice(entries, limits.images + 1))
    if len(found) > limits.images:
        raise DataError(f"{root} has more than {limits.images:,} images; --limit images=N allows more")
    loose = sum("/" not in name for name, _ in found)
    found = [entry for entry in found if "/" in entry[0]]
    if not found:
        hint = f" ({loose} images lie outside of class folders)" if loose else ""
        raise DataError(f"{root} has no images in class folders{hint}; expected {root}/<class>/<image>.png")
    label = {name: number for number, name in enumerate(_classes(root, [name for name, _ in found]))}
    images, names, bad = np.empty((0, 1, 0, 0), dtype=np.uint8), [], []
    with _pillow():
        for name, read in found:
            try:
                image = _decode(read(), image_size, limits)
            except BROKEN as error:
                bad.append(f"{name!r} ({_reason(error)})")
                continue
            if names and image.shape[1:] != images.shape[2:]:
                sizes = [f"{shape[-1]}x{shape[-2]}" for shape in (images.shape, image.shape)]
                raise DataError(
                    f"{root} has images of several sizes: {names[0]!r} is {sizes[0]}, {name!r} is {sizes[1]}; "
                    "pass --image-size WIDTHxHEIGHT"
                )
            if not names or len(image) > images.shape[1]:
                images = _room(root, (len(found), *image.shape), images[: len(names)], limits)
            images[len(names)] = image
            names.append(name)
    if bad and (not skip_bad or len(bad) > 0.01 * len(found)):
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        remedy = "they are more than 1 %" if skip_bad else "mend or remove them, or pass --skip-bad-images"
        raise DataError(
            f"{root}: {len(bad)} of {len(found)} images can't be read, {remedy}: {', '.join(bad[:20])}{more}"
        )
    labels = torch.tensor([label[name.split("/")[0]] for name in names])
    return LabeledImages(torch.from_numpy(images[: len(names)]), labels, tuple(label), tuple(names))


def _classes(root: Path, names: list[str]) -> list[str]:
    classes = sorted({name.split("/")[0] for name in names}, key=lambda name: (_natural(name), name))
    if len(classes) < 2:
        deeper = any(name.count("/") > 1 for name in names)
        hint = f"; did you mean {root}/{classes[0]}?" if deeper else ""
        raise DataError(f"{root} has only one class folder, {classes[0]!r}{hint}")
    return classes


def _natural(name: str) -> list[tuple[int, int | str]]:
    # int() refuses more than 4,300 digits, and a zip's names may have 65,535.
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(0, int(part)) if part.isdecimal() and len(part) <= 4000 else (1, part) for part in parts]


def _room(root: Path, shape: tuple[int, ...], known: np.ndarray, limits: Limits) -> np.ndarray:
    """Memory for all images at once, `known` put at its beginning; grey ones become colour where `shape` is."""
    count, _, height, width = shape
    if (size := int(np.prod(shape, dtype=object))) > limits.data_bytes:
        raise DataError(
            f"{root}: {count:,} images of {width}x{height} take {size:,} bytes; --limit data_bytes=N allows more than "
            f"{limits.data_bytes:,}, --image-size makes them smaller"
        )
    room = np.empty(shape, dtype=np.uint8)
    if len(known):
        room[: len(known)] = known
    return room


@contextmanager
def _pillow() -> Iterator[None]:
    """Pillow without warnings, without a limit of its own (ours comes before decoding), strict with half files."""
    most, lax = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = most, lax


def _reason(error: BaseException) -> str:
    """What is wrong with an image, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:120] or type(error).__name__


def _decode(content: bytes, image_size: tuple[int, int] | None, limits: Limits) -> np.ndarray:
    """uint8 (1, H, W) for grey images, (3, H, W) for others."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > limits.image_pixels:
            raise DataError(
                f"{image.width}x{image.height} pixels; --limit image_pixels=N allows more than {limits.image_pixels:,}"
            )
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's JPEG with a preview
            raise DataError("animated")
        image.load()
        plain = grey_or_rgb(ImageOps.exif_transpose(image))
        if image_size is not None and (plain.height, plain.width) != image_size:
            plain = plain.resize((image_size[1], image_size[0]), Image.Resampling.BILINEAR)
        pixels = np.asarray(plain)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def grey_or_rgb(image: Image.Image) -> Image.Image:
    """The picture that people see, in mode L or RGB: transparent parts on black, 16-bit greys scaled.

    Raises:
        DataError: its pixels are floats, whose range nobody knows.
    """
    if image.mode == "F":
        raise DataError("floating-point pixels")
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit greys to white instead of scaling them.
        grey = np.asarray(image, dtype=np.float64)
        grey = np.where(grey == image.info.get("transparency", -1), 0, grey)
        return Image.fromarray(np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8))
    is_grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over)
    return image.getchannel(0) if is_grey and image.mode == "RGBA" else image.convert("L" if is_grey else "RGB")


def write_folder(data: LabeledImages, root: Path) -> None:
    """Writes a class-folder tree of PNG files, `<class>/<index>.png`, into an existing empty folder."""
    for name in data.classes:
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise DataError(f"class name {name!r} can't be a folder's name")
        (root / name).mkdir()
    for index, (image, label) in enumerate(zip(data.images.numpy(), data.labels.tolist(), strict=True)):
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        picture.save(root / data.classes[label] / f"{index:06d}.png", compress_level=1)
