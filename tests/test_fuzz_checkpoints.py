"""Mutated checkpoints either load as dense tensors on the CPU, as torch reads them, or are refused; nothing else.

`UNPLANT_SOAK_CHECKPOINTS` says how many (default 2,000; `make soak` takes 100,000).
"""

import json
import os
import pickletools
import resource
import struct
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import hostile
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from unplant.errors import ModelFileError
from unplant.files import Checkpoint, load_checkpoint
from unplant.models import build

COUNT = int(os.environ.get("UNPLANT_SOAK_CHECKPOINTS", "2000"))

SECONDS = 2.0
"""Processor time that one file may take."""

GROWTH = 600
"""MiB that the process may grow at most: the seeds have a few kB, so this is torch's own overhead and luck."""

NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    255,
    256,
    2**15,
    2**16,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**64 - 1,
]
"""What lengths, offsets and counts are replaced by."""

Random = np.random.Generator


def pick(random: Random, values: list):
    return values[random.integers(len(values))]


# Honest seeds.


def seeds() -> list[bytes]:
    """Zips, legacy streams and safetensors files of small dictionaries of many kinds."""
    generator = torch.Generator().manual_seed(0)
    plain: dict[str, Tensor] = {
        "conv.weight": torch.randn(2, 1, 3, 3, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.randn(5, generator=generator).half(),
        "empty": torch.zeros(0, 3),
    }
    kinds = (torch.float64, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.bool)
    typed = {str(kind): torch.arange(4).to(kind) for kind in kinds}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build("small_cnn:width=1", num_classes=2, channels=1).state_dict()
    base = torch.arange(12.0)
    values = [
        plain,
        typed,
        network,
        {f"module.{key}": value for key, value in plain.items()},
        {"net": plain, "epoch": 3, "acc": 0.5, "name": "run", "list": [1, (2, None), True]},
        {"state_dict": OrderedDict(typed), "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
        {"view": base[2:8].view(2, 3), "transposed": base.view(3, 4).t(), "same": base},
        {"w": torch.nn.Parameter(torch.ones(2, 2))},
    ]
    files = [hostile.saved(value, legacy=legacy) for value in values for legacy in (False, True)]
    return [*files, *(safetensors.torch.save(dict(value), {"format": "pt", "unplant": "{}"}) for value in values[:4])]


# Mutations.


def bytes_changed(content: bytes, random: Random, others: list[bytes]) -> bytes:
    """One to four small accidents anywhere."""
    data = bytearray(content)
    for _ in range(random.integers(1, 5)):
        at, length = int(random.integers(len(data) + 1)), int(random.integers(1, 40))
        match random.integers(8):
            case 0 if at < len(data):
                data[at] ^= 1 << int(random.integers(8))
            case 1 if at < len(data):
                data[at] = int(random.integers(256))
            case 2:
                del data[at:]
            case 3:
                data[at:at] = random.bytes(length)
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length]
            case 6:
                other = pick(random, others)
                start = int(random.integers(len(other)))
                data[at : at + length] = other[start : start + length]
            case _:
                width = pick(random, [1, 2, 4, 8])
                number = pick(random, NUMBERS) % 2 ** (8 * width)
                data[at : at + width] = number.to_bytes(width, pick(random, ["little", "big"]))
        if not data:
            data = bytearray(b"\x80")
    return bytes(data)


def spliced(content: bytes, random: Random, others: list[bytes]) -> bytes:
    """The beginning of one and the end of another."""
    other = pick(random, others)
    return content[: random.integers(len(content) + 1)] + other[random.integers(len(other)) :]


def instructions(pickled: bytes) -> list[bytes]:
    starts = [position for _, _, position in pickletools.genops(pickled)]
    return [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]


POOL = [
    *(fragment for name, fragment in hostile.opcodes("marker").items() if name not in {"FRAME", "LONG_BINPUT", "PUT"}),
    *(part for part in instructions(hostile.entries(hostile.saved(hostile.weights()))["archive/data.pkl"])),
    *(hostile.glob("torch", name) for name in ("FloatStorage", "HalfStorage", "LongStorage", "float32", "Size")),
    *(hostile.push(number) for number in NUMBERS),
    *(hostile.push(value) for value in (-1, True, None, "cpu", "meta", "storage", "net", (), (2, 3), [], {}, 0.5)),
    hostile.call(hostile.glob("posix", "mkdir"), hostile.text("marker")),
    hostile.glob("torch._utils", "_rebuild_tensor_v2"), hostile.glob("torch._utils", "_rebuild_parameter"),
    hostile.glob("numpy", "dtype"), hostile.glob("numpy._core.multiarray", "scalar"),
    hostile.glob("argparse", "Namespace"), hostile.honest_tensor(),
]  # fmt: skip
"""Pieces of pickles: opcodes with their arguments, names, tensors, and one payload."""


def pickle_changed(pickled: bytes, random: Random, others: list[bytes]) -> bytes:
    """Instructions dropped, doubled, swapped or replaced, or their arguments changed; still a pickle, mostly."""
    if random.random() < 0.2:
        return bytes_changed(pickled, random, others)
    steps = instructions(pickled)
    for _ in range(pick(random, [1, 1, 1, 2, 3])):
        at, other = int(random.integers(len(steps))), int(random.integers(len(steps)))
        match random.integers(7):
            case 0 if len(steps) > 1:
                del steps[at]
            case 1:
                steps.insert(at, steps[at])
            case 2:
                steps[at], steps[other] = steps[other], steps[at]
            case 3:
                steps[at] = pick(random, POOL)
            case 4:
                steps.insert(at, pick(random, POOL))
            case 5:
                block = steps[min(at, other) : max(at, other)]
                steps[at:at] = block
            case _:
                numbers = [k for k, step in enumerate(steps) if step[:1] in b"KMJ" and len(step) > 1]
                if numbers:
                    steps[pick(random, numbers)] = hostile.push(pick(random, [*NUMBERS, -1, -(2**31), -(2**63)]))
    return b"".join(steps)


def archive_changed(content: bytes, random: Random, others: list[bytes]) -> bytes:
    """A zip rebuilt, with right checksums, around a changed pickle, changed data or changed names."""
    files = list(hostile.entries(content).items())
    at = next(number for number, (name, _) in enumerate(files) if name.endswith("data.pkl"))
    chance = random.random()
    if chance < 0.75:
        files[at] = (files[at][0], pickle_changed(files[at][1], random, others))
    else:
        at = int(random.integers(len(files)))
        name, data = files[at]
        match random.integers(5):
            case 0:
                del files[at]
            case 1:
                files[at] = (name, bytes_changed(data, random, others) if data else b"x")
            case 2:
                files[at] = (name, data[: random.integers(len(data) + 1)])
            case 3:
                files[at] = (bytes_changed(name.encode(), random, others).decode("latin1"), data)
            case _:
                files.append((name.replace("archive", pick(random, ["archive2", "other/archive", "data"])), data))
    stored = zipfile.ZIP_STORED if random.random() < 0.97 else zipfile.ZIP_DEFLATED
    return hostile.zipped(files, stored)


def headers_changed(content: bytes, random: Random, others: list[bytes]) -> bytes:
    """Numbers overwritten in the headers of a zip: lengths, offsets, counts, flags, methods, checksums."""
    del others
    data = bytearray(content)
    layouts = {
        b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
        b"PK\x01\x02": ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2), (42, 4)),
        b"PK\x05\x06": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    }
    for _ in range(random.integers(1, 3)):
        magic = pick(random, list(layouts))
        starts = [at for at in range(len(data)) if data[at : at + 4] == magic]
        if starts:
            offset, width = pick(random, list(layouts[magic]))
            number = pick(random, NUMBERS) if random.random() < 0.7 else int(random.integers(len(data)))
            at = pick(random, starts) + offset
            data[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(data)


def legacy_changed(content: bytes, random: Random, others: list[bytes]) -> bytes:
    """One of the five pickles of a legacy stream changed, or the storages after them."""
    pieces = hostile.parts(content)
    at = int(random.choice(6, p=[0.05, 0.05, 0.05, 0.55, 0.15, 0.15]))
    pieces[at] = (pickle_changed if at < 5 else bytes_changed)(pieces[at], random, others)
    return b"".join(pieces)


def json_changed(value, random: Random):
    """A JSON value with something in it replaced."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = pick(random, list(value))
        changed = {**value, key: json_changed(value[key], random)}
        match random.integers(8):
            case 0:
                del changed[key]
            case 1:
                changed[pick(random, ["w", "__metadata__", "dtype", "shape", "\u0000", "é"])] = changed.pop(key)
        return changed
    if isinstance(value, list) and value and random.random() < 0.9:
        at = int(random.integers(len(value)))
        return [*value[:at], json_changed(value[at], random), *value[at + 1 :], *([1] if random.random() < 0.1 else [])]
    dtypes = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F4", "U64", "X"]
    return pick(random, [*NUMBERS, -1, 0.5, None, True, [], {}, "x", [0, 8], [2**62, 4], *dtypes])


def header_changed(content: bytes, random: Random, others: list[bytes]) -> bytes:
    """A safetensors file with another header of the right length, or of a wrong one."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(random.integers(1, 3)):
        header = json_changed(header, random)
    text = json.dumps(header).encode()
    if random.random() < 0.1:
        text = bytes_changed(text, random, others)
    length = len(text) if random.random() < 0.9 else pick(random, NUMBERS)
    return struct.pack("<Q", length) + text + content[8 + struct.unpack("<Q", content[:8])[0] :]


def mutated(random: Random, originals: list[bytes]) -> tuple[str, bytes]:
    content = pick(random, originals)
    chance = random.random()
    if chance < 0.12:
        return "bytes", bytes_changed(content, random, originals)
    if chance < 0.18:
        return "splice", spliced(content, random, originals)
    if content[:2] == b"PK":
        change: Callable[..., bytes] = archive_changed if random.random() < 0.8 else headers_changed
        return change.__name__, change(content, random, originals)
    change = legacy_changed if content[:1] == b"\x80" else header_changed
    return change.__name__, change(content, random, originals)


# What must hold.


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def dirty(weights: Mapping[str, Tensor], value: int) -> None:
    """Leaves this byte in the memory that storages of these sizes are likely to get next."""
    sizes = {size for w in weights.values() for size in (w.nbytes, w.untyped_storage().nbytes()) if size < 2**20}
    kept = [torch.full((size,), value, dtype=torch.uint8) for size in sizes for _ in range(4)]
    kept.clear()


def by_torch(path: Path) -> dict[str, Tensor] | None:
    """What torch's allow-list loads, if that is a flat dictionary of tensors."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        return None
    if all(key.startswith("module.") for key in loaded):
        loaded = {key.removeprefix("module."): value for key, value in loaded.items()}
    return loaded


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """Keys whose tensors aren't the same in type, shape and bits."""
    if first.keys() != second.keys():
        return sorted(map(str, first.keys() ^ second.keys()))
    return [
        key
        for key, value in first.items()
        if (value.dtype, value.shape) != (second[key].dtype, second[key].shape) or bits(value) != bits(second[key])
    ]


def agrees_with_torch(path: Path, weights: dict[str, Tensor]) -> bool:
    """Whether torch loads the same file as a flat dictionary of tensors; then they must be the same, bit for bit.

    torch leaves a storage as the memory was if a legacy file's list of keys doesn't name it: then it can't tell.
    """
    dirty(weights, 0x55)
    theirs = by_torch(path)
    if theirs is None:
        return False
    dirty(weights, 0xAA)
    again = by_torch(path)
    if again is None or differences(theirs, again):
        return False
    assert differences(weights, theirs) == []
    return True


def test_the_seeds_load_as_torch_and_safetensors_read_them(tmp_path):
    compared = 0
    for number, content in enumerate(seeds()):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(content)
        loaded = load_checkpoint(path).weights
        if content[8:9] == b"{":
            theirs = {key.removeprefix("module."): value for key, value in safetensors.torch.load(content).items()}
            assert differences(loaded, theirs) == []
        compared += agrees_with_torch(path, loaded)
    assert compared == 12  # 8 values in two formats, less two with a wrapper in each


def peak() -> float:
    """MiB that this process has used at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def problem(path: Path, outcome: Checkpoint | ModelFileError) -> str | None:
    """What is wrong with a refusal, or with what was loaded; or None."""
    if isinstance(outcome, ModelFileError):
        return None if str(path) in str(outcome) and "\n" not in str(outcome) else f"bad message {outcome!r}"
    for key, value in outcome.weights.items():
        if (type(key), value.device.type, value.layout, value.is_quantized) != (str, "cpu", torch.strided, False):
            return f"{key} is no dense tensor on the CPU"
        if value.nbytes > value.untyped_storage().nbytes():
            return f"{key} is larger than its storage"
    return None


@pytest.mark.timeout(max(300, COUNT // 20))
def test_mutated_checkpoints_load_or_are_refused(tmp_path):
    originals, path, outcomes, compared = seeds(), tmp_path / "fuzzed.pth", Counter(), 0
    for content in originals:  # whatever is imported or allocated at the first use
        path.write_bytes(content)
        load_checkpoint(path)
    before = peak()
    for number in range(COUNT):
        kind, content = mutated(np.random.default_rng(number), originals)
        where = f"mutation {number} ({kind}), which lies at {path},"
        path.write_bytes(content)
        started = time.process_time()
        try:
            outcome = load_checkpoint(path)
        except ModelFileError as error:
            outcome = error
        except Exception as error:
            raise AssertionError(f"{where} raises {error!r}") from error
        assert time.process_time() - started < SECONDS, where
        assert problem(path, outcome) is None, where
        assert path.read_bytes() == content, where
        loaded = isinstance(outcome, Checkpoint)
        outcomes[kind, loaded] += 1
        compared += loaded and agrees_with_torch(path, outcome.weights)
    assert peak() - before < GROWTH
    assert sorted(tmp_path.iterdir()) == [path]
    kinds = {kind for kind, _ in outcomes}
    assert kinds == {"bytes", "splice", "archive_changed", "headers_changed", "legacy_changed", "header_changed"}
    for kind in kinds - {"splice"}:  # else the mutations were too weak, or too strong to get past the first check
        assert outcomes[kind, True] > 0, outcomes
        assert outcomes[kind, False] > 0, outcomes
    assert compared > COUNT // 50, (compared, outcomes)
