"""Data sources: what is read, in which order, and what is refused with the path in the message."""

import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from image_helpers import crc_broken, encoded, png_header
from PIL import Image

from unplant.data import digits, open_data, read_folder, read_npz, write_folder
from unplant.errors import DataError
from unplant.images import LabeledImages

pytestmark = pytest.mark.timeout(60)

RNG = np.random.default_rng(0)


def picture(value=None, size=(6, 5), mode="RGB"):
    """A random image, or one of a single colour; `size` is (width, height)."""
    if value is not None:
        return Image.new(mode, size, value)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8))


def tree(root, classes=("cat", "dog"), count=3, mode="RGB"):
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.png").write_bytes(encoded(picture(mode=mode)))
    return root


def zipped(root, path, inside="", compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in root.rglob("*"):
            archive.write(file, f"{inside}{file.relative_to(root).as_posix()}")
    return path


def equal(first, second):
    return (
        torch.equal(first.images, second.images)
        and torch.equal(first.labels, second.labels)
        and first.classes == second.classes
        and first.names == second.names
    )


# Good data.


def test_a_tree_is_read_pixel_by_pixel_with_names(tmp_path):
    tree(tmp_path / "data")
    data = open_data(str(tmp_path / "data"))
    assert data.classes == ("cat", "dog")
    assert data.shape == (3, 5, 6)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for image, label, name in zip(data.images, data.labels, data.names, strict=True):
        with Image.open(tmp_path / "data" / name) as file:
            assert np.array_equal(image.numpy(), np.asarray(file).transpose(2, 0, 1))
        assert name.startswith(data.classes[label])


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["10", "2", "1"], ("1", "2", "10")),
        (["c10", "c9", "b100"], ("b100", "c9", "c10")),
        (["10", "b", "a", "9"], ("9", "10", "a", "b")),
        (["1.10", "1.9"], ("1.9", "1.10")),
        (["²", "³", "x"], ("x", "²", "³")),
        (["1", "01", "001"], ("001", "01", "1")),
    ],
)
def test_classes_are_in_natural_order(tmp_path, folders, expected):
    tree(tmp_path / "data", folders, count=1)
    data = read_folder(tmp_path / "data")
    assert data.classes == expected
    for label, name in zip(data.labels.tolist(), data.names, strict=True):
        assert data.classes[label] == name.split("/")[0]


@pytest.mark.parametrize(("inside", "suffix"), [("", ""), ("set/train/", "/set/train"), ("set/train/", "/set/train/")])
def test_a_zip_or_a_folder_in_it_equals_the_tree(tmp_path, inside, suffix):
    root = tree(tmp_path / "data", ("10", "9"))
    path = zipped(root, tmp_path / "data.zip", inside)
    assert equal(open_data(f"{path}{suffix}"), open_data(root))


def test_only_the_named_folder_of_a_zip_is_read(tmp_path):
    train, test = tree(tmp_path / "train"), tree(tmp_path / "test", ("cat", "dog"), count=2)
    path = tmp_path / "both.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for root in (train, test):
            for file in root.rglob("*.png"):
                archive.write(file, f"{root.name}/{file.relative_to(root)}")
    assert equal(open_data(f"{path}/test"), open_data(test))
    with pytest.raises(DataError, match="no images"):
        open_data(f"{path}/te")


def test_a_written_folder_reads_back_the_same(tmp_path, colour_images):
    write_folder(colour_images, tmp_path)
    back = read_folder(tmp_path)
    order = [int(name.split("/")[1].removesuffix(".png")) for name in back.names]
    assert sorted(order) == list(range(12))
    assert torch.equal(back.images, colour_images.images[order])
    assert torch.equal(back.labels, colour_images.labels[order])
    assert back.classes == colour_images.classes


def test_grey_images_are_written_and_read_as_grey(tmp_path):
    write_folder(digits("test").select(torch.arange(30)), tmp_path)
    assert read_folder(tmp_path).shape == (1, 16, 16)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a\\b"])
def test_a_class_name_that_is_no_folder_name_is_refused(tmp_path, colour_images, name):
    with pytest.raises(DataError, match="can't be a folder's name"):
        write_folder(LabeledImages(colour_images.images, colour_images.labels, ("a", "b", "c", name)), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_digits_are_split_by_class_without_overlap(seed):
    train, test = open_data(f"digits:train,seed={seed}"), open_data(f"digits:test,seed={seed}")
    everything = open_data("digits")
    assert (len(everything), len(train), len(test)) == (1797, 1437, 360)
    both = [*train.images.numpy().reshape(1437, -1).tolist(), *test.images.numpy().reshape(360, -1).tolist()]
    assert sorted(both) == sorted(everything.images.numpy().reshape(1797, -1).tolist())
    expected = everything.labels.bincount() * 0.2
    assert (test.labels.bincount() - expected).abs().max() < 1
    assert test.shape == (1, 16, 16)
    assert test.classes == tuple("0123456789")
    assert test.fingerprint() == digits("test", seed).fingerprint()
    assert test.fingerprint() != digits("test", seed + 1).fingerprint()


def test_the_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    source, ours = load_digits(), digits()
    assert ours.labels.tolist() == source.target.tolist()
    for image, original in zip(ours.images[::50, 0], source.images[::50], strict=True):
        large = Image.fromarray((original * 255 / 16).astype(np.float32)).resize((16, 16), Image.Resampling.BILINEAR)
        assert np.abs(image.numpy() - np.asarray(large)).max() <= 0.5 + 1e-3  # rounded


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHW"])
@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz_files_of_any_layout(tmp_path, layout, keys, compressed):
    stored = RNG.integers(0, 256, (4, 1 if layout == "NHW" else 3, 6, 7), dtype=np.uint8)
    array = {"NCHW": stored, "NHWC": stored.transpose(0, 2, 3, 1), "NHW": stored[:, 0]}[layout]
    path = tmp_path / "set.npz"
    save = np.savez_compressed if compressed else np.savez
    save(path, **{keys[0]: array, keys[1]: np.array([[0], [1], [2], [1]]), "classes": ["a", "b", "c"]})
    for data in (open_data(path), open_data(f"npz:{path}")):
        assert np.array_equal(data.images.numpy(), stored)
        assert data.labels.tolist() == [0, 1, 2, 1]
        assert data.classes == ("a", "b", "c")


@pytest.mark.parametrize("kind", ["pil", "array", "tensor", "uint8 tensor"])
def test_data_set_objects(kind):
    class Set:
        classes = ("x", "y", "z")

        def __len__(self):
            return 4

        def __getitem__(self, index):
            array = np.full((5, 6, 3), index, dtype=np.uint8)
            tensor = torch.from_numpy(array).permute(2, 0, 1)
            forms = {"pil": Image.fromarray(array), "array": array, "tensor": tensor / 255, "uint8 tensor": tensor}
            return forms[kind], torch.tensor(index % 3)

    data = open_data(Set())
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert data.shape == (3, 5, 6)
    assert data.labels.tolist() == [0, 1, 2, 0]
    assert data.classes == ("x", "y", "z")
    assert open_data(data) is data


def test_a_data_set_of_several_sizes_or_of_nothing_is_refused():
    with pytest.raises(DataError, match=r"image 0 is .* image 1 is"):
        open_data([(picture(), 0), (picture(size=(7, 5)), 1)])
    with pytest.raises(DataError, match="empty"):
        open_data([])


@pytest.mark.parametrize(("width", "height"), [(12, 9), (6, 5)])
def test_images_are_resized_to_the_wanted_size(tmp_path, width, height):
    root = tree(tmp_path / "data")
    (root / "cat" / "big.png").write_bytes(encoded(picture((10, 20, 30), (40, 50))))
    data = open_data(root, image_size=(height, width))
    assert data.shape == (3, height, width)
    big = data.images[data.names.index("cat/big.png")]
    assert torch.equal(big, torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand_as(big))


# Formats: each image below is read as this colour (grey: one number).

EXIF = Image.Exif()
EXIF[0x0112] = 6  # turn clockwise by a quarter


def sixteen_bits():
    return encoded(Image.fromarray(np.full((5, 6), 128 * 257, dtype=np.uint16)))


def rgba(alpha):
    return encoded(picture((200, 100, 50, alpha), mode="RGBA"))


def palette():
    return encoded(picture((255, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE))


def palette_with_transparency():
    image = Image.new("P", (6, 5), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return encoded(image, transparency=1)


@pytest.mark.parametrize(
    ("content", "colour", "tolerance"),
    [
        (encoded(picture(77, mode="L")), 77, 0),
        (encoded(picture(1, mode="1")), 255, 0),
        (sixteen_bits(), 128, 0),
        (rgba(255), (200, 100, 50), 0),
        (rgba(0), (0, 0, 0), 0),
        (rgba(51), (40, 20, 10), 1),  # a fifth
        (encoded(picture((200, 51), mode="LA")), 40, 0),
        (palette(), (255, 0, 0), 0),
        (palette_with_transparency(), (0, 0, 0), 0),
        (encoded(picture((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=100), (255, 0, 0), 3),
        (encoded(picture((9, 99, 199)), "BMP"), (9, 99, 199), 0),
        (encoded(picture((9, 99, 199)), "PPM"), (9, 99, 199), 0),
        (encoded(picture((9, 99, 199)), "WEBP", lossless=True), (9, 99, 199), 0),
        (encoded(picture((9, 99, 199)), "JPEG", quality=100), (9, 99, 199), 3),
    ],
    ids=[
        "grey", "bits", "16-bit grey", "opaque", "transparent", "faint", "grey with alpha", "palette",
        "palette with transparency", "CMYK", "BMP", "PPM", "WebP", "JPEG",
    ],
)  # fmt: skip
def test_each_format_gives_the_colour_that_people_see(tmp_path, content, colour, tolerance):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(content)
    data = read_folder(tmp_path)
    expected = torch.tensor([colour] if isinstance(colour, int) else colour)
    assert data.shape == (len(expected), 5, 6)
    assert (data.images.long() - expected[:, None, None]).abs().max() <= tolerance


def test_16_bit_greys_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 30).round().astype(np.uint16).reshape(5, 6)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encoded(Image.fromarray(values)))
    assert np.array_equal(read_folder(tmp_path).images[0, 0].numpy(), np.rint(values / 257))


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))  # white on the left; turned clockwise: on top
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(encoded(image, "JPEG", quality=95, exif=EXIF))
    data = read_folder(tmp_path)
    assert data.shape == (3, 16, 8)
    assert data.images[0, :, :7].min() > 240
    assert data.images[0, :, 9:].max() < 15


def test_one_colour_image_makes_all_of_them_colour(tmp_path):
    root = tree(tmp_path / "data", count=2, mode="L")
    grey = read_folder(root)
    (root / "dog" / "z.png").write_bytes(encoded(picture((1, 2, 3))))
    mixed = read_folder(root)
    assert (grey.shape[0], mixed.shape[0]) == (1, 3)
    assert torch.equal(mixed.images[:4], grey.images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("where", ["folder", "zip"])
def test_hidden_and_foreign_files_are_ignored(tmp_path, where):
    root = tree(tmp_path / "data")
    before = read_folder(root)
    for name in (
        ".DS_Store",
        "cat/.hidden.png",
        "cat/notes.txt",
        "dog/Thumbs.db",
        ".git/0.png",
        "__MACOSX/cat/._0.png",
    ):
        if where == "folder" and name.startswith("__MACOSX"):
            continue
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image")
    assert equal(read_folder(root if where == "folder" else zipped(root, tmp_path / "a.zip")), before)


def test_odd_file_names_are_kept(tmp_path):
    root = tree(tmp_path / "data")
    for name in ("new\nline.png", "späce ü.png", "[bold].PNG"):
        (root / "dog" / name).write_bytes(encoded(picture()))
    assert {"dog/new\nline.png", "dog/späce ü.png", "dog/[bold].PNG"} < set(read_folder(root).names)


# Bad data.


def half(content):
    return content[: len(content) // 2]


def animated():
    frames = [picture(), picture()]
    return encoded(frames[0], save_all=True, append_images=frames[1:])


BAD_IMAGES = {
    "zero bytes": (b"", ""),
    "half JPEG": (half(encoded(picture(size=(64, 64)), "JPEG")), "truncated"),
    "half PNG": (half(encoded(picture(size=(64, 64)))), ""),
    "CRC-broken PNG": (crc_broken(encoded(picture())), ""),
    "text": (b"this is no image\n", "no PNG, JPEG"),
    "HTML": (b"<html></html>", "no PNG, JPEG"),
    "header of 20,000×20,000": (png_header(20000, 20000), "pixel"),
    "header of 8,000×8,000": (png_header(8000, 8000), "pixel"),
    "header of 11,000×11,000": (png_header(11000, 11000), "pixel"),
    "header of 0×5": (png_header(0, 5), ""),
    "animated": (animated(), "animated"),
    "a format that isn't read": (encoded(picture(), "GIF"), "no PNG, JPEG"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no PNG, JPEG"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
@pytest.mark.parametrize("where", ["folder", "zip"])
def test_a_broken_image_is_named_in_one_line(tmp_path, kind, where):
    content, reason = BAD_IMAGES[kind]
    root = tree(tmp_path / "data")
    (root / "cat" / "broken.png").write_bytes(content)
    source = root if where == "folder" else zipped(root, tmp_path / "data.zip")
    with pytest.raises(DataError, match=f"1 of 7 images can't be read.*'cat/broken.png' .*{reason}") as caught:
        read_folder(source)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_twenty_broken_images_are_named_and_all_are_counted(tmp_path):
    root = tree(tmp_path / "data", count=30)
    for index in range(25):
        (root / "cat" / f"bad{index:02d}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"25 of 85 .*and 5 more") as caught:
        read_folder(root)
    assert [f"bad{index:02d}.png" in str(caught.value) for index in range(25)] == [True] * 20 + [False] * 5


@pytest.mark.parametrize(("bad", "accepted"), [(1, True), (2, True), (3, False)])
def test_skipping_broken_images_stops_at_one_percent(tmp_path, bad, accepted):
    root = tree(tmp_path / "data", count=(200 - bad) // 2 + (200 - bad) % 2)
    for index in range(bad):
        (root / "dog" / f"bad{index}.png").write_bytes(b"")
    if accepted:
        data = read_folder(root, skip_bad=True)
        assert len(data) == len(list(root.rglob("[0-9]*.png")))
        assert not any("bad" in name for name in data.names)
    else:
        with pytest.raises(DataError, match=r"3 of 20. images can't be read, they are more than 1 %"):
            read_folder(root, skip_bad=True)


def no_images(root):
    (root / "cat").mkdir(parents=True)
    (root / "dog").mkdir()


def loose_images(root):
    root.mkdir()
    (root / "0.png").write_bytes(encoded(picture()))


def mixed_sizes(root):
    tree(root)
    (root / "cat" / "z.png").write_bytes(encoded(picture(size=(9, 5))))


def link_out(root):
    tree(root)
    secret = root.parent / "secret.png"
    secret.write_bytes(encoded(picture()))
    (root / "cat" / "z.png").symlink_to(secret)


def link_to_itself(root):
    tree(root)
    (root / "cat" / "z.png").symlink_to("z.png")


def fifo(root):
    tree(root)
    os.mkfifo(root / "cat" / "z.png")


def a_file(root):
    root.write_bytes(b"x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "there is no data at"),
        (a_file, "neither a folder, a zip nor"),
        (no_images, "no images in class folders"),
        (loose_images, "1 images lie outside of class folders"),
        (lambda root: tree(root, ("cat",)), "only one class folder, 'cat'"),
        (lambda root: tree(root / "train"), "only one class folder, 'train'; did you mean .*/train"),
        (mixed_sizes, r"several sizes: .cat/0.png. is 6x5, .cat/z.png. is 9x5; pass --image-size"),
        (link_out, "link out of"),
        (link_to_itself, "cat/z.png"),
        (fifo, "cat/z.png.*not a regular file"),
    ],
    ids=[
        "missing", "file", "no images", "loose images", "one class", "one level too high", "mixed sizes", "link out",
        "link loop", "fifo",
    ],
)  # fmt: skip
def test_a_bad_folder_is_one_line_with_its_path(tmp_path, make, message):
    root = tmp_path / "data"
    make(root)
    with pytest.raises(DataError, match=message) as caught:
        open_data(root)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_within_the_folder_are_read(tmp_path):
    root = tree(tmp_path / "data")
    (root / "cat" / "z.png").symlink_to(root / "dog" / "0.png")
    data = read_folder(root)
    assert torch.equal(data.images[data.names.index("cat/z.png")], data.images[data.names.index("dog/0.png")])


@pytest.mark.parametrize("kind", ["linked outside", "empty", "no images"])
def test_a_class_folder_without_images_of_its_own_stops_so_that_labels_are_not_miscounted(tmp_path, kind):
    root, outside = tree(tmp_path / "data"), tree(tmp_path / "outside")
    if kind == "linked outside":
        (root / "bee").symlink_to(outside / "cat")
    else:
        (root / "bee").mkdir()
    if kind == "no images":
        (root / "bee" / "notes.txt").write_text("none")
    with pytest.raises(DataError, match="class folders bee"):
        read_folder(root)


def damaged_member(path):
    """One byte of a packed image is wrong."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        first = next(info for info in archive.infolist() if info.filename.endswith("cat/0.png"))
    for position in range(first.header_offset + 60, first.header_offset + 70):
        content[position] ^= 255
    path.write_bytes(bytes(content))


def encrypted_member(path):
    content = path.read_bytes()
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = content.index(b"cat/0.png") if signature == b"PK\x03\x04" else content.rindex(b"cat/0.png")
        start = content.rindex(signature, 0, position)
        content = content[: start + offset] + b"\x01" + content[start + offset + 1 :]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 nothing"), "damaged zip"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "damaged zip"),
        (lambda path: path.write_bytes(b""), "damaged zip"),
        (damaged_member, "1 of 6 images can't be read.*cat/0.png"),
        (encrypted_member, "1 of 6 images can't be read.*cat/0.png.*encrypted"),
    ],
    ids=["no zip", "truncated", "empty", "damaged member", "encrypted member"],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_damaged_zip_is_one_line_with_its_path(tmp_path, damage, message, compression):
    path = zipped(tree(tmp_path / "data"), tmp_path / "data.zip", compression=compression)
    assert len(open_data(path)) == 6
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        open_data(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


IMAGES, LABELS = np.zeros((4, 8, 8), dtype=np.uint8), np.array([0, 1, 0, 1])


def npz(path, **arrays):
    np.savez(path, **arrays)


def npy(path):
    with path.open("wb") as file:
        np.save(file, IMAGES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"no zip at all"), "damaged"),
        (npy, "damaged"),
        (lambda path: npz(path, a=IMAGES), "needs arrays `images` and `labels`, it has: a"),
        (lambda path: npz(path, images=IMAGES), "needs arrays"),
        (lambda path: npz(path, images=IMAGES, labels=np.array([0, "a", None, 1], dtype=object)), "pickled"),
        (lambda path: npz(path, images=IMAGES, labels=LABELS[:3]), "labels must be 4 whole numbers"),
        (lambda path: npz(path, images=IMAGES, labels=LABELS / 2), "whole numbers"),
        (lambda path: npz(path, images=IMAGES + 0.5 + 1, labels=LABELS), "undo the normalisation"),
        (lambda path: npz(path, images=IMAGES, labels=LABELS, classes=["a"]), "labels must lie"),
        (lambda path: npz(path, images=IMAGES, labels=np.array(3)), "labels must be"),
        (lambda path: npz(path, images=IMAGES[:0], labels=LABELS[:0]), "no images"),
    ],
)
def test_a_bad_npz_is_one_line_with_its_path(tmp_path, make, message):
    path = tmp_path / "set.npz"
    make(path)
    with pytest.raises(DataError, match=message) as caught:
        read_npz(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_member_of_an_npz_is_a_data_error(tmp_path):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, images=RNG.integers(0, 256, (4, 8, 8), dtype=np.uint8), labels=LABELS)
    content = bytearray(path.read_bytes())
    for position in range(120, 140):
        content[position] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="damaged"):
        read_npz(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digits:valid", "parts all, train and test, got 'valid'"),
        ("digits:train,seed=x", "whole number .*got 'x'"),
        ("digits:train,seed=-1", "whole number"),
        ("digits:train,seed=²", "whole number"),
        ("digits:train,seed=99999999999", "seed"),
        ("folder:/nowhere/at/all", "there is no data at /nowhere/at/all"),
        ("npz:/nowhere.npz", "there is no file /nowhere.npz"),
    ],
)
def test_a_wrong_source_is_one_line(source, message):
    with pytest.raises(DataError, match=message):
        open_data(source)


def test_reading_changes_nothing_on_disk(tmp_path):
    root = tree(tmp_path / "data")
    path = zipped(root, tmp_path / "data.zip")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    read_folder(root), read_folder(path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    shutil.rmtree(root)
