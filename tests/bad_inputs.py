"""Every bad input that we know of: how to make it, and what the command line must answer.

`tests/test_bad_inputs.py` tries each row; the table in docs/security.md is generated from them.
"""

import argparse
import io
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from file_helpers import F32, flipped, nested, npz, rezipped, safetensors_with, saved
from image_helpers import crc_broken, png_header
from PIL import Image
from torch import nn

from unplant.data import digits, write_folder
from unplant.images import LabeledImages
from unplant.models import build
from unplant.training import channel_statistics

Arguments = list[str]


@dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
        group: what kind of thing is bad.
        what: the row's name.
        make: makes it in a workspace and returns the arguments of `unplant`; `{out}` stands for the output.
        code: expected exit code.
        words: regular expression that the last line on standard error must hold; with code 0 any line, or none.
    """

    group: str
    what: str
    make: Callable[[Path], Arguments]
    code: int
    words: str


ROWS: list[Row] = []


def row(group: str, what: str, code: int, words: str) -> Callable[[Callable[[Path], Arguments]], None]:
    """Registers a maker as a row."""
    return lambda make: ROWS.append(Row(group, what, make, code, words))


# The workspace: an honest model and honest data, next to which each row puts one bad thing.


def workspace(root: Path, trained: nn.Module) -> Path:
    """An honest model (safetensors with a card, and a bare state_dict) and honest data."""
    from unplant.runs import ModelCard, save_classifier

    data = digits("test")
    (root / "good").mkdir()
    save_classifier(root / "good/model.safetensors", trained, ModelCard.of(trained, "small_cnn:width=8", data))
    torch.save(trained.backbone.state_dict(), root / "good/weights.pth")
    (root / "data").mkdir()
    write_folder(data.sample(120, torch.Generator().manual_seed(0)), root / "data")
    return root


def weights(w: Path) -> dict[str, torch.Tensor]:
    """The honest ones."""
    stored = torch.load(w / "good/weights.pth", weights_only=True)
    return {key: value.contiguous() for key, value in stored.items()}


def floats(w: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The honest ones, those that are floats changed."""
    return {key: change(value) if value.is_floating_point() else value for key, value in weights(w).items()}


MEAN, STD = (str(part[0]) for part in channel_statistics(digits("train")))
ARCH = ["--arch", "small_cnn:width=8", "--mean", MEAN, "--std", STD]


def erase(model: str | Path, *more: str) -> Arguments:
    """`erase` of a model of other people with honest data."""
    return ["erase", str(model), *ARCH, "--suspect", "{w}/data", "-o", "{out}", *more]


def quickly(model: str | Path, *more: str) -> Arguments:
    """A run that comes to an end in a second."""
    quick = ["--method", "fine_tune", "--set", "epochs=0.2", "--set", "batch_size=32"]
    return ["erase", str(model), *ARCH, "--clean", "{w}/data", *quick, "-o", "{out}", *more]


def on(data: str | Path, *more: str) -> Arguments:
    """`erase` of the honest model with other data."""
    return ["erase", "{w}/good/model.safetensors", "--suspect", str(data), "-o", "{out}", *more]


# Checkpoints.


def file_row(what: str, code: int, words: str, content: Callable[[Path], bytes], name: str = "model.pth") -> None:
    """A row whose bad thing is a file's content."""

    def make(w: Path) -> Arguments:
        (w / name).write_bytes(content(w))
        return erase(w / name) if code else quickly(w / name)

    ROWS.append(Row("checkpoint", what, make, code, words))


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.place,)


def on_cuda(content: bytes) -> bytes:
    """As saved on a machine with an accelerator."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            cpu, cuda = (b"X" + struct.pack("<I", len(place)) + place for place in (b"cpu", b"cuda:0"))
            part = old.read(name)
            new.writestr(name, part.replace(cpu, cuda) if name.endswith("data.pkl") else part)
    return stream.getvalue()


SMALL = {"w": torch.zeros(2)}


@row("checkpoint", "there is no such file", 3, "there is no model file {w}/nowhere.pth")
def _(w: Path) -> Arguments:
    return erase("{w}/nowhere.pth")


@row("checkpoint", "a folder without a model", 3, "folder without a model.safetensors")
def _(w: Path) -> Arguments:
    (w / "folder").mkdir()
    return erase("{w}/folder")


@row("checkpoint", "a FIFO, which would never end", 3, "not a regular file")
def _(w: Path) -> Arguments:
    os.mkfifo(w / "pipe.pth")
    return erase("{w}/pipe.pth")


@row("checkpoint", "a link to /dev/zero", 3, "not a regular file")
def _(w: Path) -> Arguments:
    (w / "zero.pth").symlink_to("/dev/zero")
    return erase("{w}/zero.pth")


@row("checkpoint", "a link to itself", 3, "can't read")
def _(w: Path) -> Arguments:
    (w / "loop.pth").symlink_to(w / "loop.pth")
    return erase("{w}/loop.pth")


@row("checkpoint", "a file larger than the limit", 3, "more than the limit")
def _(w: Path) -> Arguments:
    with (w / "huge.pth").open("wb") as file:
        file.truncate(9 * 2**30)  # sparse: takes no space
    return erase("{w}/huge.pth")


file_row("an empty file", 3, "is empty", lambda w: b"")
file_row("random bytes", 3, "not a model file", lambda w: np.random.default_rng(0).bytes(5000))
file_row("an HTML page", 3, "HTML page", lambda w: b"<!DOCTYPE html><html><body>404</body></html>")
file_row(
    "a Git LFS pointer", 3, "git lfs pull", lambda w: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
)
file_row("an HDF5 file", 3, "HDF5", lambda w: b"\x89HDF\r\n\x1a\n" + bytes(500))
file_row("an ONNX model", 3, "ONNX", lambda w: b"\x08\x07\x12\x07pytorch" + bytes(500))
file_row("an .npz under a .pth name", 3, "no torch checkpoint", lambda w: npz())
file_row("a zip cut off", 3, "damaged", lambda w: saved(weights(w))[:-3000])
file_row("a legacy file cut off", 3, "damaged", lambda w: saved(weights(w), False)[:200])
file_row("one flipped bit in a tensor", 3, "checksum", lambda w: flipped(saved(weights(w))))
file_row("a whole module, pickled", 3, "names ", lambda w: saved(nn.Linear(2, 2)))
file_row("a whole module, legacy", 3, "model.pth", lambda w: saved(nn.Linear(2, 2), False))
file_row("a payload that runs code", 3, "mkdir", lambda w: saved({"net": weights(w), "x": Payload(w / "ran")}))
file_row("the same, legacy", 3, "model.pth", lambda w: saved({"net": weights(w), "x": Payload(w / "ran")}, False))
file_row("the same, a bare pickle", 3, "model.pth", lambda w: pickle.dumps(Payload(w / "ran")))
file_row("a TorchScript archive", 3, "TorchScript", lambda w: rezipped(saved(SMALL), extra=("archive/code/m.py",)))
file_row(
    "an exported program (.pt2)", 3, "exported", lambda w: rezipped(saved(SMALL), extra=("archive/archive_format",))
)
file_row("a stride bomb: 4 TiB in 1.6 kB", 3, "bomb", lambda w: saved({"w": torch.zeros(1).expand(2**40)}))
file_row("a deflate bomb", 3, "bomb", lambda w: rezipped(saved({"w": torch.zeros(2**20)}), zipfile.ZIP_DEFLATED))
file_row("a meta tensor of 2^44 numbers", 3, "meta", lambda w: saved({"w": torch.empty(2**44, device="meta")}))
file_row("a nested list of 2^60 leaves", 3, "no weights", lambda w: saved({"w": nested(60)}))
file_row("two models in one file", 3, "several models", lambda w: saved({"net": weights(w), "state_dict": weights(w)}))
file_row("sparse weights", 3, "sparse", lambda w: saved({"w": torch.eye(3).to_sparse()}))
file_row("complex weights", 3, "complex", lambda w: saved({"w": torch.zeros(2, dtype=torch.complex64)}))
file_row("int8 weights", 3, "int8", lambda w: saved(floats(w, lambda v: v.to(torch.int8))))
file_row("NaN weights", 3, "NaN", lambda w: saved(floats(w, lambda v: v * torch.nan)))
file_row("keys that don't fit", 3, "missing: ", lambda w: saved({f"x{k}": torch.zeros(1) for k in range(20)}))
file_row(
    "10 classes against 43", 3, "mis-shaped",
    lambda w: saved(dict(build("small_cnn:width=8", num_classes=43, channels=1).state_dict())),
)  # fmt: skip
file_row(
    "3 channels against 1", 3, "mis-shaped",
    lambda w: saved(dict(build("small_cnn:width=8", num_classes=10, channels=3).state_dict())),
)  # fmt: skip
file_row(
    "safetensors: a header beyond the file", 3, "model.safetensors",
    lambda w: struct.pack("<Q", 2**60) + b"{}" + bytes(99), "model.safetensors",
)  # fmt: skip
file_row(
    "safetensors: offsets beyond the file", 3, "damaged",
    lambda w: safetensors_with({"w": {**F32, "shape": [2**40], "data_offsets": [0, 2**42]}}), "model.safetensors",
)  # fmt: skip
file_row(
    "safetensors: tensors that overlap", 3, "damaged",
    lambda w: safetensors_with({"v": F32, "w": F32}), "model.safetensors",
)  # fmt: skip
file_row("safetensors: cut off", 3, "damaged", lambda w: safetensors.torch.save(weights(w))[:-3], "model.safetensors")
file_row("half-precision weights", 0, "", lambda w: saved(floats(w, lambda v: v.half())))
file_row("tensors from an accelerator", 0, "", lambda w: on_cuda(saved(weights(w))))
file_row("a `module.` prefix", 0, "", lambda w: saved({f"module.{k}": v for k, v in weights(w).items()}))
file_row("a wrapper with epoch and score", 0, "", lambda w: saved({"net": weights(w), "epoch": 3, "acc": 0.5}))
file_row("a numpy scalar beside the weights", 0, "", lambda w: saved({"net": weights(w), "acc": np.float64(0.5)}))
file_row(
    "an argparse.Namespace beside them", 0, "", lambda w: saved({"net": weights(w), "a": argparse.Namespace(lr=1)})
)
file_row("a pathlib.Path beside them", 0, "", lambda w: saved({"net": weights(w), "data": Path("a")}))


# Models: factories in a Python file of the user's own.

FACTORIES = """
import torch
from torch import nn
from unplant.models import build
from unplant.training import channel_statistics


class Odd(nn.Module):
    def __init__(self, channels, num_classes):
        super().__init__()
        self.net = build("small_cnn:width=8", num_classes=num_classes, channels=channels)


class Softmax(Odd):
    def forward(self, x):
        return self.net(x).softmax(1)


class Pair(Odd):
    def forward(self, x):
        return self.net(x), x.mean()


class Named(Odd):
    def forward(self, x):
        return {"logits": self.net(x)}


class Output:
    def __init__(self, logits):
        self.logits = logits


class Wrapped(Odd):
    def forward(self, x):
        return Output(self.net(x))


class Dropout(Odd):
    def forward(self, x):
        return nn.functional.dropout(self.net(x), 0.1, training=True)


class Rounded(Odd):
    def forward(self, x):
        return self.net((x * 255).round() / 255)


class Detached(Odd):
    def forward(self, x):
        return self.net(x.detach())


class Constant(Odd):
    def forward(self, x):
        return self.net(x) * 0


class Raises(Odd):
    def forward(self, x):
        raise KeyError("forward is broken")


class Exits(Odd):
    def forward(self, x):
        raise SystemExit(0)


class Later(Odd):
    calls = 0

    def forward(self, x):
        Later.calls += 1
        if Later.calls > 20:
            raise IndexError("forward broke")
        return self.net(x)


class Reseeds(Odd):
    def forward(self, x):
        torch.manual_seed(0)
        return self.net(x)
"""


def model_row(name: str, what: str, code: int, words: str) -> None:
    """A row whose network is odd."""

    def make(w: Path) -> Arguments:
        (w / "odd.py").write_text(FACTORIES)
        torch.save({f"net.{key}": value for key, value in weights(w).items()}, w / "odd.pth")
        arguments = quickly(w / "odd.pth") if code == 0 else erase(w / "odd.pth")
        return [f"{w / 'odd.py'}:{name}" if part == ARCH[1] else part for part in arguments]

    ROWS.append(Row("model", what, make, code, words))


model_row("Softmax", "ends in a softmax", 0, "warning: .*probabilities")
model_row("Pair", "returns a tuple", 3, "tuple")
model_row("Named", "returns a dictionary", 3, "dict")
model_row("Wrapped", "returns an object with .logits", 3, "logits")
model_row("Dropout", "has dropout left on", 0, "warning: .*each time")
model_row("Rounded", "has a zero gradient", 3, "gradient")
model_row("Detached", "has no gradient", 3, "gradient")
model_row("Constant", "always gives the same output", 3, "guessing|same")
model_row("Raises", "raises an exception", 3, "KeyError")
model_row("Exits", "ends the program", 3, "sys.exit")
model_row("Later", "raises an exception in the middle of the run", 3, "IndexError: forward broke")
model_row("Reseeds", "sets global seeds", 0, "")


@row("model", "knows nothing about the data", 3, "guessing")
def _(w: Path) -> Arguments:
    data = digits("test")
    labels = np.random.default_rng(0).permutation(data.labels)
    np.savez(w / "shuffled.npz", images=data.images.numpy(), labels=labels)
    return on("{w}/shuffled.npz")


# Data.


def picture(mode: str = "L", size: tuple[int, int] = (16, 16), value: object = 99, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, value).save(stream, kind)  # type: ignore[arg-type]
    return stream.getvalue()


def noisy(kind: str) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def animated() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("L", (16, 16), value) for value in (0, 200)]
    frames[0].save(stream, "PNG", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def image_row(what: str, words: str, content: bytes, code: int = 4, name: str = "bad.png") -> None:
    """A row with one bad image in an otherwise honest folder."""

    def make(w: Path) -> Arguments:
        shutil.copytree(w / "data", w / "mine")
        (w / "mine/3" / name).write_bytes(content)
        return on("{w}/mine") if code else with_data("{w}/mine")

    ROWS.append(Row("data", what, make, code, words))


def with_data(data: str, *more: str) -> Arguments:
    """A run of the honest model on other data that comes to an end in a second."""
    quick = ["--method", "fine_tune", "--set", "epochs=0.2", "--set", "batch_size=32"]
    return ["erase", "{w}/good/model.safetensors", "--clean", data, *quick, "-o", "{out}", *more]


def folder_row(what: str, code: int, words: str, change: Callable[[Path], object], *more: str) -> None:
    """A row with a copy of the honest folder that something is done to."""

    def make(w: Path) -> Arguments:
        shutil.copytree(w / "data", w / "mine")
        change(w / "mine")
        return on("{w}/mine", *more) if code else with_data("{w}/mine", *more)

    ROWS.append(Row("data", what, make, code, words))


image_row("a zero-byte image", "1 of 121 images can't be read.*'3/bad.png'", b"")
image_row("a text file called .png", "no PNG, JPEG", b"this is no image\n")
image_row("half a JPEG", "truncated", noisy("JPEG")[: len(noisy("JPEG")) // 2])
image_row("half a PNG", "bad.png", noisy("PNG")[: len(noisy("PNG")) // 2])
image_row("a PNG with a wrong checksum", "bad.png", crc_broken(noisy("PNG")))
image_row("a header of 20,000×20,000 pixels", "pixels", png_header(20000, 20000))
image_row("a header of 0×5 pixels", "bad.png", png_header(0, 5))
image_row("an animated PNG", "animated", animated())
image_row("a GIF, a format that isn't read", "no PNG, JPEG", picture(kind="GIF"))
image_row("floating-point pixels", "no PNG, JPEG|floating", picture("F", value=0.5, kind="TIFF"))
image_row("an image of another size", "several sizes", picture(size=(9, 5)))
image_row("an image of 1×1", "several sizes", picture(size=(1, 1)))
image_row("a hidden file", "", b"no image", 0, ".DS_Store.png")
image_row("a name with a newline", "", picture(), 0, "new\nline.png")
image_row("a grey image with 16 bits", "", picture("I;16", value=30000), 0)
image_row("a grey image with transparency", "", picture("LA", value=(200, 51)), 0)


@row("data", "no such folder", 4, "there is no data at {w}/nowhere")
def _(w: Path) -> Arguments:
    return on("{w}/nowhere")


@row("data", "a folder without images", 4, "no images")
def _(w: Path) -> Arguments:
    (w / "empty").mkdir()
    return on("{w}/empty")


folder_row("one class only", 4, "only one class", lambda d: [shutil.rmtree(d / str(k)) for k in range(1, 10)])
folder_row("an empty class folder", 4, "class folders new", lambda d: (d / "new").mkdir())
folder_row("classes that the model doesn't have", 4, "frog", lambda d: (d / "3").rename(d / "frog"))
folder_row("a class folder that is a link out", 4, "extra", lambda d: (d / "extra").symlink_to(d.parent / "data/3"))
folder_row(
    "a link to a file outside", 4, "link out of",
    lambda d: (d / "3/x.png").symlink_to(next((d.parent / "data/3").iterdir())),
)  # fmt: skip
folder_row("a FIFO called .png", 4, "not a regular file", lambda d: os.mkfifo(d / "3/x.png"))
folder_row("a link to itself", 4, "x.png", lambda d: (d / "3/x.png").symlink_to(d / "3/x.png"))


def unreadable(folder: Path) -> None:
    """A file that vanishes while it is read looks the same, and is the same for root."""
    (folder / "3/x.png").symlink_to(folder / "3/gone.png")


folder_row("a file that is gone when it is read", 4, "x.png", unreadable)
folder_row(
    "the same image under two labels", 0, "warning: .*label",
    lambda d: shutil.copy(next((d / "3").iterdir()), d / "4/again.png"),
)  # fmt: skip


def colour(what: str, content: bytes, name: str = "bad.png") -> None:
    """A row with one odd image among colour images, which are the grey ones three times; the model is made for them."""

    def make(w: Path) -> Arguments:
        data = digits("test").sample(120, torch.Generator().manual_seed(0))
        write_folder_of(w / "mine", data.images.expand(-1, 3, -1, -1).contiguous().numpy(), labels=data.labels)
        (w / "mine/3" / name).write_bytes(content)
        wide = weights(w)
        wide["0.weight"] = wide["0.weight"].expand(-1, 3, -1, -1) / 3
        torch.save(wide, w / "colour.pth")
        return [part.replace("{w}/data", "{w}/mine") for part in quickly("{w}/colour.pth")]

    ROWS.append(Row("data", what, make, 0, ""))


def turned() -> bytes:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 16), (9, 99, 199)).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


colour("a CMYK photo", picture("CMYK", value=(0, 255, 255, 0), kind="JPEG"), "bad.jpg")
colour("an image with a palette", picture("P", value=3))
colour("an image with transparency", picture("RGBA", value=(200, 100, 50, 51)))
colour("a photo that its camera turned (EXIF)", turned(), "bad.jpg")


@row("data", "class folders 2 and 10, which text would sort the other way round", 0, "")
def _(w: Path) -> Arguments:
    names = tuple(str(k) for k in range(1, 11))
    shutil.copytree(w / "data", w / "mine")
    for number in range(9, -1, -1):
        (w / "mine" / str(number)).rename(w / "mine" / names[number])
    return [part.replace("{w}/data", "{w}/mine") for part in quickly("{w}/good/weights.pth")]


@row("data", "data of which 90 % is poison", 3, "guessing")
def _(w: Path) -> Arguments:
    data = digits("test")
    labels = torch.where(torch.arange(len(data)) % 10 > 0, 0, data.labels)
    np.savez(w / "mine.npz", images=data.images.numpy(), labels=labels.numpy())
    return on("{w}/mine.npz")


@row("data", "all images alike", 4, "alike|same")
def _(w: Path) -> Arguments:
    write_folder_of(w / "mine", np.full((60, 1, 16, 16), 7, np.uint8))
    return on("{w}/mine")


def write_folder_of(root: Path, images: np.ndarray, classes: int = 10, labels: torch.Tensor | None = None) -> None:
    """Images in class folders 0, 1, …; without labels, in turn."""
    root.mkdir()
    labels = torch.arange(len(images)) % classes if labels is None else labels
    write_folder(LabeledImages(torch.from_numpy(images), labels, tuple(str(k) for k in range(classes))), root)


@row("data", "test images that are training images", 0, "warning: .*test")
def _(w: Path) -> Arguments:
    return with_data("{w}/data", "--test", "{w}/data")


@row("data", "fewer images than a batch", 0, "warning: .*fewer than a batch")
def _(w: Path) -> Arguments:
    return with_data("{w}/data", "--max-images", "20", "--set", "lr=0.001")


@row("data", "colour images for a grey model", 3, "shape")
def _(w: Path) -> Arguments:
    write_folder_of(w / "mine", np.random.default_rng(0).integers(0, 256, (60, 3, 16, 16), dtype=np.uint8))
    return on("{w}/mine")


@row("data", "more classes than the model has", 3, "classes")
def _(w: Path) -> Arguments:
    write_folder_of(w / "mine", np.random.default_rng(0).integers(0, 256, (66, 1, 16, 16), dtype=np.uint8), 11)
    return on("{w}/mine")


@row("data", "a damaged zip", 4, "damaged zip")
def _(w: Path) -> Arguments:
    (w / "mine.zip").write_bytes(b"PK\x03\x04 nothing")
    return on("{w}/mine.zip")


@row("data", "a zip bomb: more images than the limit", 4, "limit")
def _(w: Path) -> Arguments:
    with zipfile.ZipFile(w / "mine.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(30):
            archive.writestr(f"{index % 10}/{index}.png", picture())
    return on("{w}/mine.zip", "--limit", "images=20")


@row("data", "an .npz with pickles in it", 4, "pickled")
def _(w: Path) -> Arguments:
    images = np.zeros((4, 1, 16, 16), np.uint8)
    np.savez(w / "mine.npz", images=images, labels=np.array([0, 1, None, Payload(w / "ran")], dtype=object))
    return on("{w}/mine.npz")


@row("data", "an .npz with normalised images", 4, "undo the normalisation")
def _(w: Path) -> Arguments:
    np.savez(w / "mine.npz", images=np.full((4, 1, 16, 16), -1.5), labels=np.arange(4))
    return on("{w}/mine.npz")


# Commands.


def command_row(what: str, code: int, words: str, *arguments: str) -> None:
    """A row whose bad thing is the command itself."""
    ROWS.append(Row("command", what, lambda w: on("{w}/data", *arguments), code, words))


command_row("eps below 0", 2, "eps", "--eps", "-0.1")
command_row("eps in grey levels", 2, "did you mean 8/255", "--eps", "8")
command_row("steps 0", 2, "steps", "--set", "steps=0")
command_row("lr nan", 2, "lr", "--set", "lr=nan")
command_row("an unknown setting", 2, "there is no setting", "--set", "speed=9")
command_row("an unknown option", 2, "--quick", "--quick")
command_row("an unknown device", 2, "toaster", "--device", "toaster")
if not torch.cuda.is_available():
    command_row("cuda without an accelerator", 2, "cuda", "--device", "cuda")
command_row("both suspect and clean", 2, "exactly one", "--clean", "{w}/data")
command_row("an attack without test images", 2, "--test", "--attack", "badnets")


@row("command", "a learning rate at which everything becomes infinite", 6, "smaller lr")
def _(w: Path) -> Arguments:
    return with_data("{w}/data", "--set", "lr=1e30")


@row("command", "a learning rate that ruins the model", 0, "warning: accuracy on the data fell")
def _(w: Path) -> Arguments:
    return with_data("{w}/data", "--set", "lr=50")


@row("command", "no architecture for other people's weights", 2, "--arch")
def _(w: Path) -> Arguments:
    return ["erase", "{w}/good/weights.pth", "--suspect", "{w}/data", "-o", "{out}"]


@row("command", "the output exists", 5, "--force")
def _(w: Path) -> Arguments:
    (w / "mine").mkdir()
    (w / "mine/thesis.txt").write_text("years of work")
    return [part.replace("{out}", "{w}/mine") for part in on("{w}/data")]


@row("command", "--force on a folder that isn't ours", 5, "not a folder that unplant wrote")
def _(w: Path) -> Arguments:
    (w / "mine").mkdir()
    (w / "mine/thesis.txt").write_text("years of work")
    return [part.replace("{out}", "{w}/mine") for part in on("{w}/data", "--force")]


@row("command", "the output is the model's folder", 2, "another folder")
def _(w: Path) -> Arguments:
    return [part.replace("{out}", "{w}/good") for part in on("{w}/data", "--force")]


@row("command", "the output lies within the data", 2, "data")
def _(w: Path) -> Arguments:
    return [part.replace("{out}", "{w}/data/out") for part in on("{w}/data")]


@row("command", "no folder to write into", 5, "there is no folder")
def _(w: Path) -> Arguments:
    return [part.replace("{out}", "{w}/a/b/out") for part in on("{w}/data")]
