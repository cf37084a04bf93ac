"""Untrusted model files: weights are loaded by allow-list only, and nothing in a file is ever run."""

import json
import stat
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from unplant.errors import ModelFileError
from unplant.files.atomic import write_atomically

MAX_BYTES = 8 * 2**30
"""Larger files are refused before they are read."""

WRAPPERS = ("net", "state_dict", "model", "model_state_dict", "netC", "network", "weights")
"""Keys under which training scripts store the weights."""

_FOREIGN = {
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer (run `git lfs pull` to get the real file)",
    b"<!DOCTYPE": "an HTML page (the download failed?)",
    b"<!doctype": "an HTML page (the download failed?)",
    b"<html": "an HTML page (the download failed?)",
    b"\x93NUMPY": "a NumPy array",
    b"\x08\x07": "an ONNX model",
    b"\x08\x08": "an ONNX model",
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights from a file, and what else it said.

    Attributes:
        weights: dense CPU tensors by key, without a `module.` prefix.
        metadata: for files that Unplant wrote: arch, classes, mean, std, shape; else empty.
    """

    path: Path
    weights: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a safetensors file, or a pickle of tensors by torch's allow-list; runs nothing that is in it.

    Raises:
        ModelFileError: missing, damaged, unsafe, or no weights in it.
    """
    path = _regular_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ModelFileError(f"can't read {path}: {error.strerror or error}") from None
    metadata: dict[str, Any] = {}
    if head[:2] == b"PK":
        loaded = _from_zip(path)
    elif _is_safetensors(path, head):
        loaded, metadata = _from_safetensors(path)
    else:
        for magic, name in _FOREIGN.items():
            if head.startswith(magic):
                raise ModelFileError(f"{path} is {name}, not a file of weights; pass .safetensors or a state_dict .pth")
        if not head.startswith(b"\x80"):
            raise ModelFileError(f"{path} is not a model file: neither safetensors nor a torch checkpoint")
        loaded = _unpickle(path)
    weights = _unwrap(path, loaded)
    _check_tensors(path, weights)
    if weights and all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return Checkpoint(path, weights, metadata)


def check_fits_weights(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Compares keys and shapes; the network may be on the meta device, so that nothing is allocated.

    Raises:
        ModelFileError: keys are missing, left over or of another shape (the first ten of each are named).
    """
    own, weights = network.state_dict(), checkpoint.weights
    # BatchNorm's step counter is missing in old files and never used for inference.
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    extra = [key for key in weights if key not in own]
    shapes = [
        f"{key} is {tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} in the network"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    problems = [
        f"{title}: {', '.join(keys[:10])}{f' and {len(keys) - 10} more' if len(keys) > 10 else ''}"
        for title, keys in (("missing", missing), ("left over", extra), ("mis-shaped", shapes))
        if keys
    ]
    if problems:
        raise ModelFileError(f"{checkpoint.path} doesn't fit the architecture ({'; '.join(problems)}); check --arch")


def load_into(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies the weights into the network; every key must fit.

    Raises:
        ModelFileError: the keys don't fit, or the weights hold NaN or infinity.
    """
    check_fits_weights(network, checkpoint)
    weights = checkpoint.weights
    own = network.state_dict()
    kinds = [key for key, value in weights.items() if value.is_floating_point() != own[key].is_floating_point()]
    if kinds:
        raise ModelFileError(
            f"{checkpoint.path}: {kinds[0]} is {weights[kinds[0]].dtype}, the network's {own[kinds[0]].dtype}; "
            "save float weights"
        )
    cast = {key: value.to(own[key].dtype) for key, value in weights.items()}
    broken = [key for key, value in cast.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise ModelFileError(f"{checkpoint.path} has NaN or infinite weights in {', '.join(broken[:10])}")
    network.load_state_dict(cast, strict=False)


def save_weights(path: Path, network: nn.Module, metadata: dict[str, Any]) -> None:
    """Writes the network's state_dict as safetensors, with metadata that `load_checkpoint` reads back.

    Raises:
        ModelFileError: the weights hold NaN or infinity.
        WriteError: it can't be written.
    """
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}
    for key, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelFileError(f"{key} holds NaN or infinity; {path} is not written")
    content = safetensors.torch.save(weights, metadata={"format": "pt", "unplant": json.dumps(metadata)})
    write_atomically(path, _ordered(content))


def _ordered(content: bytes) -> bytes:
    """The same safetensors file with its metadata in a fixed order, as the library's is random."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _regular_file(path: Path) -> Path:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ModelFileError(f"there is no model file {path}") from None
    except OSError as error:
        raise ModelFileError(f"can't read {path}: {error.strerror or error}") from None
    if stat.S_ISDIR(status.st_mode):
        inside = path / "model.safetensors"
        if inside.is_file():
            return inside
        raise ModelFileError(f"{path} is a folder without a model.safetensors; name the file of weights")
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(f"{path} is not a regular file")
    if status.st_size == 0:
        raise ModelFileError(f"{path} is empty")
    if status.st_size > MAX_BYTES:
        raise ModelFileError(f"{path} has {status.st_size:,} bytes, more than the limit of {MAX_BYTES:,}")
    return path


def _is_safetensors(path: Path, head: bytes) -> bool:
    if len(head) < 9:
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return head[8:9] == b"{" and length + 8 <= path.stat().st_size


def _from_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = json.loads((file.metadata() or {}).get("unplant", "{}"))
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ModelFileError(f"{path} is a damaged safetensors file: {_one_line(error)}") from None
    return weights, metadata if isinstance(metadata, dict) else {}


def _from_zip(path: Path) -> object:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            # Inside the archive's own folder, which torch names after the file: models.pth holds models/data.pkl.
            inner = [name.partition("/")[2] for name in names]
            if any(name.startswith("code/") or name == "constants.pkl" for name in inner):
                raise ModelFileError(
                    f"{path} is a TorchScript archive, a program; export its weights with torch.save(m.state_dict(), …)"
                )
            if any(name.startswith("models/") or name == "archive_format" for name in inner):
                raise ModelFileError(f"{path} is an exported program (.pt2), which can run code; pass its state_dict")
            if not any(name.endswith("data.pkl") for name in names):
                raise ModelFileError(f"{path} is a zip archive but no torch checkpoint (no data.pkl in it)")
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            unpacked = sum(entry.file_size for entry in entries)
            if packed or unpacked > path.stat().st_size:
                raise ModelFileError(f"{path} has compressed entries, which torch never writes; refused as a bomb")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ModelFileError(f"{path} is a damaged checkpoint: {_one_line(error)}") from None
    if damaged is not None:
        raise ModelFileError(f"{path} is damaged: the checksum of {damaged} is wrong; download it again")
    return _unpickle(path)


def _unpickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on hostile pickles; each means: not loadable by allow-list
        culprit = _foreign_names(path)
        if culprit:
            raise ModelFileError(
                f"{path} is not loaded: besides tensors it names {culprit}, which could run code; "
                "save only the state_dict, best as .safetensors, on a machine that may run it"
            ) from None
        raise ModelFileError(f"{path} is damaged or no torch checkpoint: {type(error).__name__}") from None


def _foreign_names(path: Path) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # legacy and broken files: torch can't list them
        return ""
    return ", ".join(sorted(names)[:5])


def _unwrap(path: Path, loaded: object) -> dict[str, Tensor]:
    for _ in range(4):
        if not isinstance(loaded, dict):
            raise ModelFileError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors")
        if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
            if not all(isinstance(key, str) for key in loaded):
                raise ModelFileError(f"{path} has keys that aren't text")
            return dict(loaded)
        found = [key for key in WRAPPERS if isinstance(loaded.get(key), dict)]
        if len(found) > 1:
            raise ModelFileError(f"{path} holds several models ({', '.join(found)}); save the one you mean by itself")
        if not found:
            keys = ", ".join(key[:40] if isinstance(key, str) else type(key).__name__ for key in list(loaded)[:10])
            raise ModelFileError(f"{path} has no weights that unplant recognises; its keys are: {keys or 'none'}")
        loaded = loaded[found[0]]
    raise ModelFileError(f"{path} wraps its weights more than four times")


def _check_tensors(path: Path, weights: dict[str, Tensor]) -> None:
    for key, value in weights.items():
        name = str(key)[:80]
        if value.layout != torch.strided or value.is_quantized:
            raise ModelFileError(f"{path}: {name} is sparse or quantized; save dense weights")
        if value.device.type != "cpu":
            raise ModelFileError(f"{path}: {name} is on device {value.device}: no data in the file")
        if value.is_complex():
            raise ModelFileError(f"{path}: {name} is complex; no network here has complex weights")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ModelFileError(f"{path}: {name} claims {value.numel():,} numbers but stores fewer; refused as a bomb")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
