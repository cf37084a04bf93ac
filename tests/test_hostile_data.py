"""Data that lie: limits, kinds of pixels with a known answer, names and links that lead elsewhere, files that fail."""

import io
import os
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_helpers import chunk, encoded, interlaced, png
from PIL import Image, ImageFile

from unplant.data import open_data, read_folder, read_npz
from unplant.data.folder import grey_or_rgb
from unplant.errors import DataError, UnplantError
from unplant.images import LabeledImages
from unplant.limits import DEFAULT

pytestmark = pytest.mark.timeout(60)

RNG = np.random.default_rng(0)


def colour(width=6, height=5):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def tree(root, content=None, count=3, classes=("cat", "dog")):
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.png").write_bytes(content or encoded(colour()))
    return root


def zipped(path, names, content=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in names:
            archive.writestr(name, content or encoded(colour()))
    return path


def read_one(tmp_path, content):
    return read_folder(tree(tmp_path / "data", content, 1)).images[0]


# Limits.


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"images": 5}, "has more than 5 images; --limit images=N"),
        ({"image_bytes": 80}, r"6 of 6 images can't be read.*bytes; --limit image_bytes=N allows more than 80"),
        ({"image_pixels": 29}, r"6 of 6 .*6x5 pixels; --limit image_pixels=N allows more than 29"),
        ({"data_bytes": 539}, "540 bytes; --limit data_bytes=N allows more than 539"),
    ],
)
@pytest.mark.parametrize("where", ["folder", "zip"])
def test_each_limit_is_named_with_its_remedy_and_just_reached_it_holds(tmp_path, where, limits, message):
    source = tree(tmp_path / "data")
    if where == "zip":
        names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*.png"))]
        source = zipped(tmp_path / "data.zip", names)
        if "images" in limits:
            message = "has more than 5 entries; --limit images=N"
        if "data_bytes" in limits:  # there the packed files count as well
            with zipfile.ZipFile(source) as archive:
                size = sum(info.file_size for info in archive.infolist())
            limits, message = {"data_bytes": size - 1}, rf"unpacks to {size} bytes; --limit data_bytes=N"
    name, value = next(iter(limits.items()))
    assert len(open_data(source, limits=DEFAULT.but(**{name: value + (120 if name == "image_bytes" else 1)}))) == 6
    with pytest.raises(DataError, match=message) as caught:
        open_data(source, limits=DEFAULT.but(**limits))
    assert str(source) in str(caught.value)


def test_colour_after_grey_counts_thrice(tmp_path):
    root = tree(tmp_path / "data", encoded(colour().convert("L")))
    assert len(read_folder(root, limits=DEFAULT.but(data_bytes=180))) == 6
    (root / "dog" / "z.png").write_bytes(encoded(colour()))
    read_folder(root, limits=DEFAULT.but(data_bytes=630))
    with pytest.raises(DataError, match="630 bytes"):
        read_folder(root, limits=DEFAULT.but(data_bytes=629))


def test_large_images_are_refused_after_the_first_one(tmp_path):
    """Each is small as a file, 3 MB in memory, and 40 of them more than the limit."""
    root = tree(tmp_path / "data", encoded(Image.new("RGB", (1000, 1000))), 20)
    started = time.perf_counter()
    with pytest.raises(DataError, match="40 images of 1000x1000 take 120,000,000 bytes"):
        read_folder(root, limits=DEFAULT.but(data_bytes=10**8))
    assert time.perf_counter() - started < 1
    assert read_folder(root, image_size=(2, 2), limits=DEFAULT.but(data_bytes=10**8)).shape == (3, 2, 2)


def test_a_zip_of_too_many_entries_is_refused_before_its_directory_is_read(tmp_path, monkeypatch):
    path = tmp_path / "many.zip"
    directory = b"PK\x01\x02" + bytes(42)
    large_end = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 10**6, 10**6, 10**6 * 60, 0)
    where = b"PK\x06\x07" + struct.pack("<IQI", 0, len(directory), 1)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(directory + large_end + where + end)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(DataError, match="more than 1,000 entries; --limit images=N"):
        read_folder(path, limits=DEFAULT.but(images=1000))


def test_a_zip_that_understates_its_entries_is_refused_too(tmp_path):
    path = zipped(tmp_path / "data.zip", [f"{label}/{n}.png" for label in "ab" for n in range(50)])
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    content[end + 8 : end + 12] = bytes(4)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="more than 99 images"):
        read_folder(path, limits=DEFAULT.but(images=99))


def test_a_zip_bomb_is_refused_before_anything_is_unpacked(tmp_path, monkeypatch):
    path = zipped(tmp_path / "bomb.zip", [f"a/{n}.png" for n in range(20)], bytes(10**6), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    with pytest.raises(DataError, match=r"unpacks to 20,000,000 bytes; --limit data_bytes=N"):
        read_folder(path, limits=DEFAULT.but(data_bytes=10**7))


def test_a_member_that_unpacks_to_more_than_it_says_is_cut_and_named(tmp_path):
    path = zipped(tmp_path / "data.zip", ["a/0.png", "b/0.png"], encoded(Image.new("RGB", (300, 300))), 8)
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 24 : place + 28] = (10).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"1 of 2 images can't be read.*a/0.png"):
        read_folder(path)


def npy(header, content=b""):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ("(1099511627776, 3, 32, 32)", "|u1", "more than it holds"),
        ("(4, 3, 32, 32)", "<f8", "more than it holds"),
        ("(2000000,)", "|V1000000", "more than it holds"),
        ("(11, 0)", "|u1", "has 11 images; --limit images=N allows more than 10"),
    ],
)
def test_an_npz_that_promises_more_than_it_holds_is_refused_before_memory_is_taken(tmp_path, shape, kind, message):
    path = tmp_path / "set.npz"
    labels = io.BytesIO()
    np.save(labels, np.zeros(4, dtype=np.int64))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "images.npy", npy(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}", bytes(9))
        )
        archive.writestr("labels.npy", labels.getvalue())
    with pytest.raises(DataError, match=message):
        read_npz(path, limits=DEFAULT.but(images=10))


def test_the_limits_of_an_npz_hold_when_just_reached(tmp_path):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, images=np.zeros((10, 8, 8), dtype=np.uint8), labels=np.arange(10))
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
    assert len(open_data(path, limits=DEFAULT.but(images=10, data_bytes=size))) == 10
    with pytest.raises(DataError, match=f"unpacks to {size:,} bytes; --limit data_bytes=N"):
        open_data(path, limits=DEFAULT.but(data_bytes=size - 1))


@pytest.mark.parametrize("labels", [np.array([0, 10**15]), np.array([0, 2**63], dtype=np.uint64)])
def test_labels_that_count_no_classes_are_refused_before_names_are_made(labels):
    with pytest.raises(DataError, match="labels must count classes from 0, got"):
        LabeledImages.from_arrays(np.zeros((2, 8, 8), dtype=np.uint8), labels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5])
def test_pixels_that_are_no_shares_are_refused(bad):
    with pytest.raises(DataError, match=r"must lie in \[0, 1\], got"):
        LabeledImages.from_arrays(np.full((2, 8, 8), bad, dtype=np.float32), np.arange(2))


# Kinds of pixels.


def grey_alpha_16():
    """16-bit grey with alpha, 200 at a fifth; Pillow gives such images as RGBA."""
    return png((1, 1, 16, 4, 0), b"\0" + struct.pack(">HH", 200 * 257, 51 * 257))


def transparent_16(grey):
    """16-bit grey in which one value is transparent."""
    return png((1, 1, 16, 0, 0), b"\0" + struct.pack(">H", grey), chunk(b"tRNS", struct.pack(">H", 30000)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.new("LA", (1, 1), (200, 51))), [40]),
        (encoded(Image.new("LA", (1, 1), (200, 0))), [0]),
        (encoded(Image.new("L", (1, 1), 200), transparency=200), [0]),
        (encoded(Image.new("L", (1, 1), 200), transparency=100), [200]),
        (encoded(Image.new("1", (1, 1), 1), transparency=1), [0]),
        (grey_alpha_16(), [40, 40, 40]),
        (transparent_16(30000), [0]),
        (transparent_16(200 * 257), [200]),
        (encoded(Image.new("RGB", (1, 1), (9, 99, 199)), transparency=(9, 99, 199)), [0, 0, 0]),
        (encoded(Image.new("RGB", (1, 1), (9, 99, 199)), transparency=(8, 99, 199)), [9, 99, 199]),
        (encoded(Image.new("RGBA", (1, 1), (255, 255, 255, 128))), [128, 128, 128]),
        (b"P1\n1 1\n1\n", [0]),
        (b"P5\n1 1\n65535\n" + struct.pack(">H", 128 * 257), [128]),
        (b"P5\n1 1\n1\n\1", [255]),
    ],
    ids=[
        "LA", "LA clear", "L tRNS", "L other tRNS", "bit tRNS", "LA 16", "grey 16 tRNS", "grey 16 other tRNS",
        "RGB tRNS", "RGB other tRNS", "half white", "PBM", "PGM 16", "PGM of two greys",
    ],
)  # fmt: skip
def test_a_pixel_of_each_kind_is_what_is_seen_on_black(tmp_path, content, expected):
    assert read_one(tmp_path, content).flatten().tolist() == expected


def test_grey_with_alpha_leaves_a_grey_set_grey(tmp_path):
    root = tree(tmp_path / "data", encoded(colour().convert("L")))
    (root / "dog" / "z.png").write_bytes(encoded(Image.new("LA", (6, 5), (100, 255))))
    data = read_folder(root)
    assert data.shape == (1, 5, 6)
    assert (data.images[-1] == 100).all()


@pytest.mark.parametrize("alphas", [5, bytes([255, 51])], ids=["one colour", "shares"])
def test_a_palette_with_transparency_is_put_on_black(tmp_path, alphas):
    image = Image.new("P", (6, 1), 1)
    image.putpalette([9] * 15 + [200, 100, 50])
    image.paste(5, (0, 0, 3, 1))
    root = tree(tmp_path / "data", encoded(image, transparency=alphas), 1)
    left, right = read_folder(root).images[0, :, 0, [0, 5]].T.tolist()
    assert (left, right) == (([0, 0, 0], [9, 9, 9]) if alphas == 5 else ([200, 100, 50], [2, 2, 2]))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_16_bits_of_each_byte_order_are_scaled(mode):
    values = np.arange(0, 65536, 257, dtype=np.int64).reshape(16, 16)
    kinds = {"I;16": "<u2", "I;16B": ">u2", "I;16L": "<u2", "I": "<i4"}
    image = Image.frombytes(mode, (16, 16), values.astype(kinds[mode]).tobytes())
    assert np.array_equal(np.asarray(grey_or_rgb(image)).ravel(), np.arange(256))


def test_other_colour_spaces_become_rgb():
    assert grey_or_rgb(Image.new("RGB", (1, 1), (200, 30, 60)).convert("YCbCr")).getpixel((0, 0)) == pytest.approx(
        (200, 30, 60),
        abs=2,  # YCbCr has whole numbers
    )
    assert grey_or_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    assert grey_or_rgb(Image.new("PA", (1, 1))).mode == "RGB"


def test_floating_point_pixels_are_refused_in_words(tmp_path):
    content = b"Pf\n1 1\n-1.0\n" + np.ones(1, dtype="<f4").tobytes()
    with pytest.raises(DataError, match="floating-point pixels"):
        read_one(tmp_path, content)


TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: np.rot90,
}
"""What brings a picture upright that was stored with that orientation (EXIF 2.32, 4.6.4)."""


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_each_exif_orientation_is_undone(tmp_path, orientation, kind):
    pixels = RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    image = read_one(tmp_path, encoded(Image.fromarray(pixels), kind, exif=exif, **options))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), TURNS[orientation](pixels))


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (9, 17)])
def test_interlaced_images_are_read_exactly(tmp_path, size):
    pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    assert np.array_equal(read_one(tmp_path, interlaced(pixels)).permute(1, 2, 0).numpy(), pixels)


def test_a_photo_with_a_preview_is_no_animation(tmp_path):
    content = encoded(
        Image.new("RGB", (8, 8), (9, 99, 199)), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    image = read_one(tmp_path, content).long()
    assert (image - torch.tensor([9, 99, 199])[:, None, None]).abs().max() <= 3  # JPEG


def test_pillow_stays_as_it_was_and_half_images_are_refused_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1234)
    content = encoded(colour(64, 64), "JPEG")
    with pytest.raises(DataError, match="truncated"):
        read_one(tmp_path, content[: len(content) // 2])
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == (True, 1234)


def test_a_larger_limit_of_pixels_goes_beyond_pillows_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    root = tree(tmp_path / "data", encoded(Image.new("L", (100, 100))), 1)
    assert read_folder(root).shape == (1, 100, 100)


def test_what_pillow_warns_of_doesnt_reach_the_user(tmp_path):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"  # says five entries, holds a part of one
    content = encoded(colour(), "JPEG", exif=exif)
    with pytest.warns(UserWarning, match="Corrupt EXIF"), Image.open(io.BytesIO(content)) as image:
        image.getexif()
    assert read_one(tmp_path, content).shape == (3, 5, 6)  # a warning would be an error here


# Names and links.


@pytest.mark.parametrize("name", ["../0.png", "a/../../0.png", "/etc/0.png", "a/../b/0.png", ".."])
def test_a_zip_that_leads_out_of_itself_is_refused(tmp_path, name):
    path = zipped(tmp_path / "data.zip", ["a/0.png", "b/0.png", name])
    with pytest.raises(DataError, match="leads out of it"):
        read_folder(path)
    assert [file.name for file in tmp_path.iterdir()] == ["data.zip"]


def test_a_folder_may_itself_be_a_link(tmp_path):
    root = tree(tmp_path / "data")
    (tmp_path / "link").symlink_to(root)
    assert torch.equal(read_folder(tmp_path / "link").images, read_folder(root).images)


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\nb", "a\u202eb", "a\rb", "a\x9bb", "a\udc80b"])
@pytest.mark.parametrize("place", ["class", "only class", "link", "image", "unreadable"])
def test_names_cannot_drive_the_terminal(tmp_path, monkeypatch, name, place):
    root = tree(tmp_path / "data", classes=("cat",) if place == "only class" else ("cat", "dog"))
    if place == "class":
        (root / name).mkdir()
    elif place == "only class":
        (root / "cat").rename(root / name)
    elif place == "link":
        (tmp_path / "secret.png").write_bytes(encoded(colour()))
        (root / "cat" / f"{name}.png").symlink_to(tmp_path / "secret.png")
    elif place == "image":
        (root / "cat" / f"{name}.png").write_bytes(b"")
    else:
        (root / name).mkdir()
        scan = os.scandir

        def refuse(path):
            if str(path).endswith(name):
                raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError) as caught:
        read_folder(root)
    text = str(caught.value)
    assert text.isprintable()
    assert name.encode("unicode_escape").decode() in text.replace("\\\\", "\\")


def test_every_error_is_printable():
    assert str(UnplantError("one\ntwo\x07 ü ₀")) == r"one\ntwo\x07 ü ₀"


def test_names_of_thousands_of_digits_are_sorted(tmp_path):
    path = zipped(tmp_path / "data.zip", ["9" * 5000 + "/0.png", "10/0.png", "9/0.png"])
    assert [len(name) for name in read_folder(path).classes] == [1, 2, 5000]


def test_ten_thousand_classes_take_no_time(tmp_path):
    content = encoded(Image.new("L", (1, 1)))
    path = zipped(tmp_path / "data.zip", [f"{number}/0.png" for number in range(10_000)], content)
    started = time.perf_counter()
    assert open_data(path).classes == tuple(str(number) for number in range(10_000))
    assert time.perf_counter() - started < 10


def test_a_thousand_folders_in_folders_are_read_or_refused(tmp_path):
    root = deepest = tree(tmp_path / "data")
    for name in ["cat", *["d"] * 1200]:
        deepest = deepest / name
        deepest.mkdir(exist_ok=True)
    (deepest / "z.png").write_bytes(encoded(colour()))
    said = ""
    try:
        assert len(read_folder(root)) == 7
    except DataError as error:
        said = str(error)
    finally:
        (deepest / "z.png").unlink()
        while deepest.name == "d":  # rmtree of Python 3.11 calls itself too
            deepest.rmdir()
            deepest = deepest.parent
    assert said == "" or "folders in folders" in said


# Files that fail.


@pytest.mark.parametrize("failing", range(6))
def test_a_read_error_at_each_image_is_named(tmp_path, monkeypatch, failing):
    root = tree(tmp_path / "data")
    read, count = Path.read_bytes, iter(range(100))

    def read_bytes(path):
        if next(count) == failing:
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    name = f"{('cat', 'dog')[failing // 3]}/{failing % 3}.png"
    with pytest.raises(DataError, match=f"1 of 6 images can't be read.*'{name}' .*Input/output error"):
        read_folder(root)


def test_a_file_that_vanishes_after_the_listing_is_named(tmp_path, monkeypatch):
    root = tree(tmp_path / "data")
    read = Path.read_bytes

    def read_bytes(path):
        (root / "dog" / "2.png").unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(DataError, match=r"1 of 6 .*'dog/2.png' .*No such file"):
        read_folder(root)


@pytest.mark.parametrize("what", ["folder", "zip", "npz"])
def test_a_source_that_may_not_be_read_is_one_line(tmp_path, monkeypatch, what):
    source = {"folder": tree(tmp_path / "data"), "zip": tmp_path / "a.zip", "npz": tmp_path / "a.npz"}[what]
    if what != "folder":
        zipped(source, ["a/0.png", "b/0.png"])

    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    for owner, name in ((os, "scandir"), (Path, "open"), (zipfile, "_EndRecData"), (io, "open")):
        monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(DataError, match=r"can't read|damaged") as caught:
        open_data(source)
    assert str(source) in str(caught.value)


@pytest.mark.parametrize("what", ["fifo", "device"])
def test_fifos_and_devices_are_never_opened(tmp_path, monkeypatch, what):
    root = tree(tmp_path / "data")
    odd = root / "cat" / "z.png"
    if what == "fifo":
        os.mkfifo(odd)
    else:
        try:
            os.mknod(odd, 0o020666, os.makedev(1, 5))  # /dev/zero: endless
        except PermissionError:
            pytest.skip("only root makes device files")
    with pytest.raises(DataError, match=r"1 of 7 .*cat/z.png.*not a regular file"):
        read_folder(root)
    for suffix in (".zip", ".npz"):
        os.mkfifo(tmp_path / f"x{suffix}")
        with pytest.raises(DataError, match=r"neither a folder|there is no file"):
            open_data(tmp_path / f"x{suffix}")
