"""Untrusted model files: nothing in them is ever run, imported or unpickled.

`torch.load` isn't used, not even with `weights_only=True`: that runs the pickle on a restricted machine, which had
CVE-2025-32434 and CVE-2026-24747, takes bombs (a file of 1.6 kB that is a tensor of 4 TiB), hangs on keys whose hash
takes exponential time, doesn't see a flipped bit, and refuses harmless things beside honest weights. Here the pickle
is read as text is (`pickles`), its tensors are found (`skeletons`), their places in the file are checked (`tensors`),
and their bytes are copied (`archives`).
"""

import stat
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from unplant.errors import ModelFileError, shown
from unplant.files.archives import Pickled, open_pickled
from unplant.files.names import by_kind
from unplant.files.nodes import Name
from unplant.files.safe import is_safetensors, read_safetensors
from unplant.files.skeletons import find_weights
from unplant.files.tensors import Builder, View, view
from unplant.limits import DEFAULT, Limits

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

_COPIES = 100
"""Tensors may share storages (layers that are used several times do), but all together not claim more than this many
times the file's size, as each gets bytes of its own when it is saved."""


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


def load_checkpoint(path: Path, limits: Limits = DEFAULT) -> Checkpoint:
    """Reads a safetensors file, or the tensors of a torch checkpoint; runs nothing that is in it.

    Raises:
        ModelFileError: missing, damaged, over the limits, naming what weights don't need, or no weights in it.
    """
    path = regular_file(path, limits)
    metadata: dict[str, Any] = {}
    if format_of(path) == "safetensors":
        weights, metadata = read_safetensors(path, limits)
        check_dense(path, weights)
    else:
        with open_pickled(path, limits) as pickled:
            check_names(path, pickled.names)
            weights = read_weights(path, pickled, None, limits)
    return Checkpoint(path, without_prefix(weights), metadata)


def salvage(path: Path, key: str | None = None, limits: Limits = DEFAULT) -> dict[str, Tensor]:
    """The tensors of a file by key, whatever else it names: of whole modules too, as nothing but tensors is made.

    Args:
        path: any model file.
        key: of the dictionary in the file, where the tensors are; default: as `load_checkpoint` finds them.
        limits: on the file.

    Raises:
        ModelFileError: missing, damaged, over the limits, or no weights in it.
    """
    path = regular_file(path, limits)
    if format_of(path) == "safetensors":
        if key is not None:
            raise ModelFileError(f"{path} is a safetensors file: it holds one set of weights, and no key {key!r}")
        weights, _ = read_safetensors(path, limits)
        check_dense(path, weights)
    else:
        with open_pickled(path, limits) as pickled:
            weights = read_weights(path, pickled, key, limits)
    return without_prefix(weights)


def format_of(path: Path) -> str:
    """`safetensors`, `torch zip` or `torch legacy`.

    Raises:
        ModelFileError: something else, which is named if it is known.
    """
    try:
        with path.open("rb") as file:
            head, size = file.read(512), path.stat().st_size
    except OSError as error:
        raise ModelFileError(f"can't read {path}: {error.strerror or error}") from None
    if head.startswith(b"PK"):
        return "torch zip"
    if is_safetensors(head, size):
        return "safetensors"
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            raise ModelFileError(f"{path} is {name}, not a file of weights; pass .safetensors or a state_dict .pth")
    if head[257:262] == b"ustar" or head.startswith((b"storages\0", b"./PaxHeaders", b"sys_info\0")):
        raise ModelFileError(
            f"{path} is a tar archive, as torch wrote before 0.1.10 (2017) or another program; "
            "save its state_dict with a newer torch"
        )
    if not head.startswith(b"\x80"):
        raise ModelFileError(f"{path} is not a model file: neither safetensors nor a torch checkpoint")
    return "torch legacy"


def check_names(path: Path, names: tuple[Name, ...]) -> None:
    """Refuses a file that names what weights don't need.

    Raises:
        ModelFileError: with the first five such names, what runs code before what is unknown.
    """
    kinds = by_kind(names)
    foreign = [f"{shown(name, 50)} (known to run code)" for name in kinds["runs code"][:5]]
    foreign += [shown(name) for name in kinds["unknown"][:5]]
    if foreign:
        left = len(kinds["runs code"]) + len(kinds["unknown"]) - 5
        raise ModelFileError(
            f"{path} is not loaded: besides tensors it names {', '.join(foreign[:5])}"
            f"{f' and {left} more' if left > 0 else ''}, which weights don't need and other programs would run; "
            f"`unplant inspect {quote(str(path))} --weights OUT.safetensors` writes its tensors and runs nothing"
        )


def read_weights(path: Path, pickled: Pickled, key: str | None, limits: Limits) -> dict[str, Tensor]:
    """The tensors of an open checkpoint, by their keys."""
    views = views_of(path, find_weights(path, pickled.root, key, limits))
    builder = Builder(pickled.read)
    return {name: builder.build(found) for name, found in views.items()}


def views_of(path: Path, nodes: dict[str, Any]) -> dict[str, View]:
    """Where the tensors lie in the file.

    Raises:
        ModelFileError: one isn't dense, claims more than its storage has, or all together claim too much.
    """
    views = {name: view(f"{path}: {shown(name)}", node) for name, node in nodes.items()}
    claimed, size = sum(found.nbytes for found in views.values()), path.stat().st_size
    if claimed > _COPIES * size:
        raise ModelFileError(f"{path}: its tensors claim {claimed:,} bytes of a file of {size:,}; refused as a bomb")
    return views


def without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the `module.` of DataParallel, if all have it."""
    if weights and all(key.startswith("module.") for key in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def regular_file(path: Path, limits: Limits) -> Path:
    """The file itself, which for a folder is its model.safetensors; not opened yet.

    Raises:
        ModelFileError: missing, no regular file, empty, or too large.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ModelFileError(f"there is no model file {path}") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(status.st_mode):
        if (path / "model.safetensors").is_file():
            return regular_file(path / "model.safetensors", limits)
        raise ModelFileError(f"{path} is a folder without a model.safetensors; name the file of weights")
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(f"{path} is not a regular file")
    if status.st_size == 0:
        raise ModelFileError(f"{path} is empty")
    if status.st_size > limits.model_bytes:
        raise ModelFileError(
            f"{path} has {status.st_size:,} bytes, more than the limit of {limits.model_bytes:,}; "
            "raise --limit model_bytes=N if you trust it"
        )
    return path


def check_dense(path: Path, weights: dict[str, Tensor]) -> None:
    """Refuses what no network here has, in files whose tensors a library made.

    Raises:
        ModelFileError: none, or not dense and real.
    """
    if not weights:
        raise ModelFileError(f"{path} has no weights in it; its keys are: none")
    for key, value in weights.items():
        if value.layout != torch.strided or value.is_quantized:
            raise ModelFileError(f"{path}: {shown(key)} is sparse or quantized; save dense weights")
        if value.is_complex():
            raise ModelFileError(f"{path}: {shown(key)} is complex; no network here has complex weights")
