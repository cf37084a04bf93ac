"""safetensors files: the library reads them; what it leaves open is checked here."""

import json
import struct
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from unplant.errors import ModelFileError, shown
from unplant.limits import Limits

BROKEN = (safetensors.SafetensorError, ValueError, OSError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a hostile file raises."""


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins like this can be one."""
    return len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] + 8 <= size


def read_safetensors(path: Path, limits: Limits) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by key, and the metadata that Unplant wrote, if any.

    Raises:
        ModelFileError: damaged, or over the limits.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > limits.header_bytes:
                raise ModelFileError(
                    f"{path}: its header has {length:,} bytes, more than the limit of {limits.header_bytes:,}; "
                    "raise --limit header_bytes=N if you trust it"
                )
            header = file.read(length)
        with safetensors.safe_open(path, framework="pt", device="cpu") as opened:
            keys = list(opened.keys())
            # An entry has four colons: a bound, before Python makes objects of a header full of small things.
            if len(keys) > limits.tensors or header.count(b":") > 8 * limits.tensors + 1000:
                raise ModelFileError(
                    f"{path} has more than {limits.tensors:,} tensors; raise --limit tensors=N if you trust it"
                )
            json.loads(header, object_pairs_hook=_refuse_repeated)
            metadata = json.loads((opened.metadata() or {}).get("unplant", "{}"))
            weights = {key: opened.get_tensor(key) for key in keys}
    except BROKEN as error:
        raise ModelFileError(f"{path} is a damaged safetensors file: {shown(error, 200)}") from None
    return weights, metadata if isinstance(metadata, dict) else {}


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
    """Two readers of a header that says a thing twice can see two files in it."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a name is there twice")
