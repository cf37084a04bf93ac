"""From weights to networks and back: every key must fit, and nothing that isn't finite is loaded or saved."""

import json
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from unplant.errors import ModelFileError, NumericalError, WriteError, shown
from unplant.files.atomic import write_atomically
from unplant.files.checkpoints import Checkpoint


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
        f"{shown(key)} is {tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} in the network"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    problems = [
        f"{title}: {_listed(keys)}{f' and {len(keys) - 10} more' if len(keys) > 10 else ''}"
        for title, keys in (("missing", missing), ("left over", extra), ("mis-shaped", shapes))
        if keys
    ]
    if problems:
        raise ModelFileError(f"{checkpoint.path} doesn't fit the architecture ({'; '.join(problems)}); check --arch")


def _listed(keys: list[str]) -> str:
    return ", ".join(shown(key) for key in keys[:10])


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
            f"{checkpoint.path}: {shown(kinds[0])} is {weights[kinds[0]].dtype}, the network's {own[kinds[0]].dtype}; "
            "save float weights"
        )
    cast = {key: value.to(own[key].dtype) for key, value in weights.items()}
    check_finite(checkpoint.path, cast)
    network.load_state_dict(cast, strict=False)


def check_finite(path: Path, weights: dict[str, Tensor]) -> None:
    """Refuses weights that hold NaN or infinity.

    Raises:
        ModelFileError: with the first ten such keys.
    """
    broken = [key for key, value in weights.items() if not _finite(value)]
    if broken:
        raise ModelFileError(f"{path} has NaN or infinite weights in {_listed(broken)}")


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    wide = value.float() if value.dtype.itemsize == 1 else value  # torch can't ask numbers of eight bits
    return bool(torch.isfinite(wide).all())


def save_weights(path: Path, network: nn.Module, metadata: dict[str, Any]) -> None:
    """Writes the network's state_dict as safetensors, with metadata that `load_checkpoint` reads back.

    Raises:
        NumericalError: the weights hold NaN or infinity.
        WriteError: it can't be written.
    """
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}
    for key, value in weights.items():
        if not _finite(value):
            raise NumericalError(f"{key} holds NaN or infinity; {path} is not written")
    content = safetensors.torch.save(weights, metadata={"format": "pt", "unplant": json.dumps(metadata)})
    write_atomically(path, _ordered(content))


def save_tensors(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes tensors as a safetensors file, each with bytes of its own.

    Raises:
        WriteError: it can't be written, or is there already.
    """
    if path.exists() or path.is_symlink():
        raise WriteError(f"{path} exists already; choose another file")
    copies = {key: value.contiguous().clone() for key, value in weights.items()}
    write_atomically(path, safetensors.torch.save(copies, metadata={"format": "pt"}))


def _ordered(content: bytes) -> bytes:
    """The same safetensors file with its metadata in a fixed order, as the library's is random."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]
