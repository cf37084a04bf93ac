"""Contents of model files for tests, good and bad."""

import io
import json
import struct
import zipfile

import numpy as np
import torch

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
"""Two float32 numbers, in a safetensors header."""


def saved(value, new_format=True, **how):
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=new_format, **how)
    return stream.getvalue()


def rezipped(content, compression=zipfile.ZIP_STORED, extra=(), drop=()):
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for name in old.namelist():
            if name not in drop:
                new.writestr(name, old.read(name))
        for name in extra:
            new.writestr(name, b"{}")
    return stream.getvalue()


def flipped(content):
    """One bit of the first weight, which is the first stored tensor."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        first = archive.read(next(name for name in archive.namelist() if name.endswith("data/0")))
    damaged = bytearray(content)
    damaged[content.index(first) + 5] ^= 1
    return bytes(damaged)


def npz():
    stream = io.BytesIO()
    np.savez(stream, w=np.zeros(3))
    return stream.getvalue()


def safetensors_with(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def nested(depth):
    """A list of 2^depth leaves that takes `depth` objects: printing it would never end."""
    value = []
    for _ in range(depth):
        value = [value, value]
    return value
