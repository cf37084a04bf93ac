"""Where and how precisely a model computes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from unplant.errors import UsageError

Precision = Literal["float32", "bfloat16"]


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: the name is unknown or there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} can't be used here ({reason}); try --device cpu") from None
    return device


def pick_precision(name: str, device: torch.device) -> Precision:
    """`auto` is bfloat16 on CUDA devices that have it, else float32.

    Raises:
        UsageError: the name is unknown.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    if name == "float32":
        return "float32"
    if name == "bfloat16":
        return "bfloat16"
    raise UsageError(f"precision must be auto, float32 or bfloat16, got {name!r}")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Computes matrix products and convolutions in that precision; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that error says that memory, the processor's or the accelerator's, has run out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
