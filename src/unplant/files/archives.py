"""Torch's two file formats: a zip archive, and the older row of pickles with the storages behind it."""

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from unplant.errors import ModelFileError, shown
from unplant.files.nodes import Dict, Name
from unplant.files.pickles import PickleReader
from unplant.files.tensors import Storage, storage_of
from unplant.limits import Limits

BROKEN = (
    *(zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError, struct.error),
    *(TypeError, LookupError),
)
"""What zipfile raises on damaged and hostile archives, and `storage_of` on ids that are none."""

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""How files of the older format begin."""

_CHUNK = 2**20


@dataclass(frozen=True, eq=False)
class Pickled:
    """A torch checkpoint, open and read, but for its storages.

    Attributes:
        format: "torch zip" or "torch legacy".
        root: what was saved, as nodes.
        names: all names in its pickle.
        storages: what the pickle says of storages, by key.
        read: gives the bytes of a storage, as a uint8 tensor; raises ModelFileError if they aren't all there, intact.
        check: reads all of them, to check their checksums; raises ModelFileError if one is wrong.
    """

    format: str
    root: Any
    names: tuple[Name, ...]
    read: Callable[[Storage], Tensor]
    check: Callable[[], None]


@contextmanager
def open_pickled(path: Path, limits: Limits) -> Iterator[Pickled]:
    """Opens a checkpoint of either format and checks its structure; unpickles nothing.

    Raises:
        ModelFileError: damaged, a bomb, a program, or no torch checkpoint.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                with _zip(path, file, limits) as archive:
                    yield _from_zip(path, archive, limits)
            else:
                yield _from_legacy(path, file, limits)
    except BROKEN as error:
        raise ModelFileError(f"{path} is a damaged checkpoint: {shown(error, 200)}") from None


@contextmanager
def _zip(path: Path, file: BinaryIO, limits: Limits) -> Iterator[zipfile.ZipFile]:
    """The archive, if nothing lies before, behind or beside its entries, and none is packed."""
    size = file.seek(0, io.SEEK_END)
    _check_directory(path, file, size, limits)
    with zipfile.ZipFile(file) as archive:
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
        if inner.count("data.pkl") != 1:
            raise ModelFileError(f"{path} is a zip archive but no torch checkpoint (no data.pkl in it, or several)")
        if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) > 1:
            raise ModelFileError(f"{path} has entries of the same name or in several folders, which torch never writes")
        if any(entry.orig_filename != entry.filename for entry in entries):
            raise ModelFileError(f"{path} has entries with two names each, which torch never writes")
        packed = any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > size:
            raise ModelFileError(
                f"{path} has compressed, encrypted or overlapping entries, which torch never writes; refused as a bomb"
            )
        yield archive


def _check_directory(path: Path, file: BinaryIO, size: int, limits: Limits) -> None:
    """The archive's table of contents: at the very end, reaching from its start to there, and not too long."""
    file.seek(max(0, size - 98))
    tail = file.read(98)
    end = tail[-22:]
    if len(end) < 22 or not end.startswith(b"PK\5\6") or end[-2:] != b"\0\0":
        raise ModelFileError(f"{path} is damaged, or not only a zip archive: it doesn't end as one")
    length, start = struct.unpack("<II", end[12:20])
    expected = size - 22
    if tail[-42:].startswith(b"PK\6\7"):  # the table for large archives, which torch always writes too
        expected = size - 98
        if not tail.startswith(b"PK\6\6"):
            raise ModelFileError(f"{path} is damaged: its zip64 table is missing")
        length, start = struct.unpack("<QQ", tail[40:56])
    if start + length != expected:
        raise ModelFileError(f"{path} is not only a zip archive: something lies before it or behind its entries")
    if length > limits.header_bytes:
        raise ModelFileError(f"{path}: its table of contents has {length:,} bytes; raise --limit header_bytes=N")
    file.seek(start)
    # Each entry begins with this mark: a bound, before zipfile makes an object of each.
    if (entries := file.read(length).count(b"PK\1\2")) > limits.tensors + 16:
        raise ModelFileError(f"{path} has {entries:,} entries; raise --limit tensors=N if you trust it")


def _from_zip(path: Path, archive: zipfile.ZipFile, limits: Limits) -> Pickled:
    names = set(archive.namelist())
    pickle = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
    folder = pickle.removesuffix("data.pkl")
    if (size := archive.getinfo(pickle).file_size) > limits.pickle_bytes:
        raise ModelFileError(f"{path}: its pickle has {size:,} bytes; raise --limit pickle_bytes=N if you trust it")
    order = f"{folder}byteorder"
    if order in names and bytes(_entry(path, archive, order, len(b"little"))) != b"little":
        raise ModelFileError(f"{path} was written on a big-endian machine; save it again on a usual one")
    reader = PickleReader(path, io.BytesIO(_entry(path, archive, pickle, size)), limits)
    root = reader.read()

    def read(storage: Storage) -> Tensor:
        name = f"{folder}data/{storage.key}"
        if name not in names or archive.getinfo(name).file_size != storage.nbytes:
            raise ModelFileError(f"{path} is damaged: the data of storage {shown(storage.key, 40)} aren't all there")
        return torch.frombuffer(_entry(path, archive, name, storage.nbytes), dtype=torch.uint8)

    def check() -> None:
        for name in archive.namelist():
            _entry(path, archive, name)

    return Pickled("torch zip", root, tuple(reader.names), read, check)


def _entry(path: Path, archive: zipfile.ZipFile, name: str, size: int | None = None) -> bytearray:
    """The first `size` bytes of an entry, or none of them; all are read, so that its checksum is checked."""
    buffer, place = bytearray(size or 0), 0
    try:
        with archive.open(name) as file:
            while part := file.read(_CHUNK):
                if size is not None:
                    part = part[: size - place]
                    buffer[place : place + len(part)] = part
                    place += len(part)
    except zipfile.BadZipFile as error:
        if "CRC" not in str(error):
            raise
        raise ModelFileError(f"{path} is damaged: the checksum of {shown(name)} is wrong; download it again") from None
    return buffer if place == len(buffer) else buffer[:place]


def _from_legacy(path: Path, file: io.BufferedReader, limits: Limits) -> Pickled:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    stream = io.BytesIO(file.read(limits.pickle_bytes))
    reader = PickleReader(path, stream, limits, cut=size > limits.pickle_bytes)
    if reader.read() != MAGIC or reader.read() != PROTOCOL:
        raise ModelFileError(f"{path} is damaged or no torch checkpoint: it is a pickle that torch didn't write")
    system, root, keys = reader.read(), reader.read(), reader.read()
    if isinstance(system, Dict) and ("little_endian", False) in system.pairs:
        raise ModelFileError(f"{path} was written on a big-endian machine; save it again on a usual one")
    places = _legacy_places(path, file, size, reader, keys)  # from where the last pickle ended

    def read(storage: Storage) -> Tensor:
        if storage.key not in places or places[storage.key][1] != storage.nbytes:
            raise ModelFileError(f"{path} is damaged: the data of storage {shown(storage.key, 40)} aren't all there")
        buffer = bytearray(storage.nbytes)
        file.seek(places[storage.key][0])
        if file.readinto(buffer) != len(buffer):
            raise ModelFileError(f"{path} is damaged: it is cut off")
        return torch.frombuffer(buffer, dtype=torch.uint8)

    return Pickled("torch legacy", root, tuple(reader.names), read, lambda: None)


def _legacy_places(
    path: Path, file: BinaryIO, size: int, reader: PickleReader, keys: Any
) -> dict[str, tuple[int, int]]:
    """Begin and length in bytes of each storage; the last one must end where the file ends."""
    declared: dict[str, Storage] = {}
    for node in reader.stored:
        if isinstance(node.id, tuple) and node.id[:1] == ("storage",):
            storage = storage_of(node)
            declared.setdefault(storage.key, storage)
    places: dict[str, tuple[int, int]] = {}
    place = reader.stream.tell()
    if not isinstance(keys, list):
        raise ModelFileError(f"{path} is damaged: its list of storages is missing")
    for key in keys:
        if not isinstance(key, str) or key not in declared or key in places:
            raise ModelFileError(f"{path} is damaged: its list of storages doesn't fit")
        file.seek(place)
        number = file.read(8)
        if len(number) < 8:
            raise ModelFileError(f"{path} is damaged: it is cut off")
        (numel,) = struct.unpack("<q", number)
        length = declared[key].nbytes
        if numel != declared[key].numel or place + 8 + length > size:
            raise ModelFileError(f"{path} is damaged: the data of storage {shown(key, 40)} aren't all there")
        places[key] = place + 8, length
        place += 8 + length
    if place != size:
        raise ModelFileError(f"{path} is damaged: {abs(size - place):,} bytes lie behind its last storage")
    return places
