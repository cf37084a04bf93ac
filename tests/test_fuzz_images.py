"""Mutated images: each is a valid array or one of the errors that the reader expects, quickly and without a warning."""

import os
import time
import zlib

import numpy as np
import pytest
from image_helpers import encoded, interlaced
from PIL import Image

from unplant.data.folder import BROKEN, _decode, _pillow
from unplant.limits import DEFAULT

COUNT = int(os.environ.get("UNPLANT_SOAK_IMAGES", "2000"))
"""How many mutated images; a soak test sets more."""
SECONDS = 2.0
"""For one image; the slowest of 40,000 took 0.015 s."""
LIMITS = DEFAULT.but(image_pixels=1_000_000)

pytestmark = pytest.mark.timeout(max(120, COUNT // 20))


def seeds():
    """Small honest files of every kind that is read."""
    random = np.random.default_rng(0)
    colour = Image.fromarray(random.integers(0, 256, (12, 9, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112], turned[0x010E], turned[0x8769] = 6, "a picture", {0x9003: "2026:01:01 00:00:00"}
    see_through = colour.copy()
    see_through.putalpha(100)
    palette = colour.convert("P", palette=Image.Palette.ADAPTIVE)
    sixteen = Image.fromarray(random.integers(0, 2**16, (12, 9), dtype=np.uint16))
    return {
        "png": encoded(colour),
        "png rgba": encoded(see_through, exif=turned),
        "png la": encoded(see_through.convert("LA")),
        "png palette": encoded(palette, transparency=3),
        "png palette alphas": encoded(palette, transparency=bytes(range(100))),
        "png 16": encoded(sixteen),
        "png 1": encoded(colour.convert("1"), transparency=1),
        "png animated": encoded(colour, save_all=True, append_images=[see_through.convert("RGB")]),
        "png interlaced": interlaced(np.asarray(colour)),
        "jpeg": encoded(colour, "JPEG", exif=turned),
        "jpeg progressive": encoded(colour, "JPEG", progressive=True),
        "jpeg cmyk": encoded(colour.convert("CMYK"), "JPEG"),
        "jpeg grey": encoded(colour.convert("L"), "JPEG"),
        "mpo": encoded(colour, "MPO", save_all=True, append_images=[colour]),
        "bmp": encoded(colour, "BMP"),
        "bmp palette": encoded(palette, "BMP"),
        "webp": encoded(see_through, "WEBP", exif=turned),
        "webp lossless": encoded(colour, "WEBP", lossless=True),
        "ppm": encoded(colour, "PPM"),
        "pgm 16": encoded(sixteen.convert("I"), "PPM"),
        "pbm": b"P1 # bits\n9 2\n" + b"1 0 1 0 1 0 1 0 1 " * 2,
        "ppm text": b"P3\n2 2\n65535\n" + b"1 2 3 " * 4,
        "pfm": b"Pf\n2 2\n-1.0\n" + np.ones(4, dtype="<f4").tobytes(),
    }  # fmt: skip


INTERESTING = np.array([0, 1, 2, 3, 6, 16, 127, 128, 254, 255], dtype=np.uint8)


def mutated(random, content, other):
    """A few changes: bytes, headers, lengths, cuts, repeats and pieces of another file."""
    data = bytearray(content)
    for _ in range(random.integers(1, 5)):
        size = len(data)
        place = int(random.integers(0, max(1, min(size, 64) if random.random() < 0.5 else size)))
        match random.integers(0, 8):
            case 0:
                data[place : place + 1] = bytes([1 << random.integers(0, 8)])
            case 1:
                data[place : place + 1] = random.choice(INTERESTING, 1).tobytes()
            case 2:  # a number of two or four bytes, such as a length, a width or a tag
                number = int(random.choice([0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]))
                width = int(random.choice([2, 4]))
                data[place : place + width] = (number % 256**width).to_bytes(
                    width, str(random.choice(["big", "little"]))
                )
            case 3:
                del data[place:]
            case 4:
                del data[place : place + int(random.integers(1, 32))]
            case 5:
                start = int(random.integers(0, len(other)))
                data[place:place] = other[start : start + int(random.integers(1, 200))]
            case 6:
                data[place:place] = data[place : place + int(random.integers(1, 64))]
            case _:
                data[place : place + 8] = random.bytes(8)
    return bytes(data)


def mend_png(content):
    """Right CRCs, so that what is behind them is reached."""
    data, place = bytearray(content), 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        if place + 12 + length > len(data):
            break
        data[place + 8 + length : place + 12 + length] = zlib.crc32(data[place + 4 : place + 8 + length]).to_bytes(
            4, "big"
        )
        place += 12 + length
    return bytes(data)


def outcome(content, image_size=None):
    """What the reader makes of a file: an array or the error that it expects."""
    before = time.perf_counter()
    try:
        with _pillow():
            result = _decode(content, image_size, LIMITS)
    except BROKEN as error:
        result = error
    assert time.perf_counter() - before < SECONDS
    return result


def test_the_seeds_are_read_as_they_should():
    for name, content in seeds().items():
        result = outcome(content)
        if name in ("png animated", "pfm"):
            assert isinstance(result, BROKEN)
        else:
            assert isinstance(result, np.ndarray), (name, result)


def test_mutated_images_are_read_or_refused_and_nothing_else(recwarn):
    random, honest = np.random.default_rng(1), list(seeds().values())
    read = refused = 0
    for number in range(COUNT):
        content = mutated(random, honest[number % len(honest)], honest[random.integers(len(honest))])
        if content.startswith(b"\x89PNG") and number % 3:
            content = mend_png(content)
        result = outcome(content, (8, 8) if number % 2 else None)
        if isinstance(result, np.ndarray):
            assert result.dtype == np.uint8
            assert result.ndim == 3
            assert result.shape[0] in (1, 3)
            assert 0 < result.shape[1] * result.shape[2] <= LIMITS.image_pixels
            read += 1
        else:
            refused += 1
    assert min(read, refused) > COUNT / 10, "the mutations are too weak or too strong to test anything"
    assert not recwarn.list
    assert Image.MAX_IMAGE_PIXELS is not None
