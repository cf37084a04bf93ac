"""Tensors from the nodes of a pickle: where each lies is checked in exact integers before anything is allocated."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unplant.errors import ModelFileError
from unplant.files.nodes import Call, Name, Stored

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    "_UntypedStorage": torch.uint8,
}
"""Kinds of storages, by the names that pickles use; quantized ones aren't read."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *_STORAGES.values(),
        *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    )
}

_MAKERS = {"_rebuild_tensor": 4, "_rebuild_tensor_v2": 6, "_rebuild_tensor_v3": 7}
"""Functions that make dense tensors, and how many arguments each has at least."""
_PARAMETERS = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
_OTHERS = {
    "_rebuild_sparse_tensor": "is sparse or quantized; save dense weights",
    "_rebuild_sparse_csr_tensor": "is sparse or quantized; save dense weights",
    "_rebuild_qtensor": "is sparse or quantized; save dense weights",
    "_rebuild_meta_tensor_no_storage": "is on device meta: no data in the file",
    "_rebuild_nested_tensor": "is a nested tensor; save dense weights",
    "_rebuild_device_tensor_from_numpy": "was saved on a device without storages; save it from the CPU",
    "_rebuild_device_tensor_from_cpu_tensor": "was saved on a device without storages; save it from the CPU",
}

_MANY = 2**62
"""More than any size, stride or offset can be."""


@dataclass(frozen=True)
class Storage:
    """A run of bytes outside the pickle.

    Attributes:
        key: its name in the file.
        dtype: of its numbers; uint8 for untyped ones.
        numel: how many the whole storage has.
        start: the first number of the part that is used; not 0 in very old files only.
        count: how many numbers that part has.
    """

    key: str
    dtype: torch.dtype
    numel: int
    start: int
    count: int

    @property
    def nbytes(self) -> int:
        """Of the whole storage."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """A dense tensor that lies within a storage, as was checked; offset and strides in numbers of its dtype."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """What it takes when it is copied."""
        return math.prod(self.shape) * self.dtype.itemsize


def _maker(node: Any) -> str:
    """The function of `torch._utils` that would make this tensor; empty if it is none."""
    if not isinstance(node, Call) or not isinstance(node.function, Name):
        return ""
    if str(node.function) == "torch._tensor._rebuild_from_type_v2":
        return "_rebuild_from_type_v2"
    known = node.function.name in _MAKERS or node.function.name in _PARAMETERS or node.function.name in _OTHERS
    return node.function.name if node.function.module == "torch._utils" and known else ""


def is_tensor(node: Any) -> bool:
    """Whether the node would be a tensor or a parameter, of whatever layout."""
    return bool(_maker(node))


def view(where: str, node: Any) -> View:
    """Where the tensor lies, and that it lies within its storage.

    Args:
        where: file and key, for errors.
        node: one of which `is_tensor` is true.

    Raises:
        ModelFileError: not dense, without data, or it claims more than its storage has.
    """
    try:
        return _view(where, _unwrapped(node))
    except (TypeError, ValueError, LookupError) as error:
        raise ModelFileError(f"{where} is damaged: {str(error)[:80]}") from None


def _unwrapped(node: Any) -> Call:
    """Without what makes a parameter of a tensor, or gives it attributes."""
    for _ in range(4):
        maker = _maker(node)
        if maker in _PARAMETERS:
            node = node.args[0]
        elif maker == "_rebuild_from_type_v2":
            node = Call(node.args[0], node.args[2])
        elif maker:
            return node
        else:
            break
    raise ValueError("no tensor within the parameter")


def _view(where: str, node: Call) -> View:
    maker = _maker(node)
    if maker in _OTHERS:
        raise ModelFileError(f"{where} {_OTHERS[maker]}")
    if not isinstance(node.args, tuple) or not _MAKERS[maker] <= len(node.args) <= _MAKERS[maker] + 1:
        raise ValueError("wrong arguments for a tensor")
    if node.args[_MAKERS[maker] :] not in ((), (None,)):
        raise ModelFileError(f"{where} is negated or conjugated when it is read; save it after .resolve_neg()")
    storage = storage_of(node.args[0])
    dtype = storage.dtype if maker != "_rebuild_tensor_v3" else _DTYPES[_torch_name(node.args[6])]
    offset, shape, strides = _whole(node.args[1]), _wholes(node.args[2]), _wholes(node.args[3])
    if dtype.is_complex:
        raise ModelFileError(f"{where} is complex; no network here has complex weights")
    if len(shape) != len(strides) or len(shape) > 64 or math.prod(max(size, 1) for size in shape) >= _MANY:
        raise ValueError("sizes and strides don't fit")
    found = View(storage, dtype, offset, shape, strides)
    held = storage.count * storage.dtype.itemsize
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else -1
    if found.nbytes > held or (offset + last + 1) * dtype.itemsize > held:
        raise ModelFileError(
            f"{where} claims {math.prod(shape):,} numbers but stores fewer, {held:,} bytes; refused as a bomb"
        )
    return found


def storage_of(node: Any) -> Storage:
    """What the id of a storage says.

    Raises:
        ValueError, TypeError, LookupError: it is no such id.
    """
    if not isinstance(node, Stored) or not isinstance(node.id, tuple):
        raise ValueError("no storage for a tensor")
    word, kind, key, _, numel, *more = node.id
    if word != "storage" or not isinstance(key, str):
        raise ValueError("an unknown kind of storage")
    start, count = 0, _whole(numel)
    if more and more[0] is not None:
        _, start, count = more[0]
    if _whole(start) + _whole(count) > numel:
        raise ValueError("a part beyond its storage")
    return Storage(key, _STORAGES[_torch_name(kind)], numel, start, count)


def _torch_name(node: Any) -> str:
    if not isinstance(node, Name) or node.module not in ("torch", "torch.storage"):
        raise ValueError("no name of torch where one belongs")
    return node.name


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MANY:
        raise ValueError("a size, stride or offset that can't be")
    return value


def _wholes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > 64:
        raise ValueError("sizes and strides that aren't a short tuple")
    return tuple(_whole(value) for value in values)


class Builder:
    """Builds tensors; each storage is read once and shared by its tensors only.

    Args:
        read: gives the bytes of a storage, as a uint8 tensor of exactly its length.
    """

    def __init__(self, read: Callable[[Storage], Tensor]) -> None:
        self._read = read
        self._bytes: dict[str, Tensor] = {}

    def build(self, view: View) -> Tensor:
        """The tensor, on the CPU, without gradient."""
        storage = view.storage
        if 0 in view.shape:
            return torch.empty(view.shape, dtype=view.dtype)
        if storage.key not in self._bytes:
            self._bytes[storage.key] = self._read(storage)
        start = storage.start * storage.dtype.itemsize
        held = self._bytes[storage.key][start : start + storage.count * storage.dtype.itemsize]
        if view.dtype == torch.bool:  # a byte that is neither 0 nor 1 would be neither true nor false
            return held.as_strided(view.shape, view.strides, held.storage_offset() + view.offset) != 0
        whole = held[: len(held) // view.dtype.itemsize * view.dtype.itemsize].view(view.dtype)
        return whole.as_strided(view.shape, view.strides, whole.storage_offset() + view.offset)
