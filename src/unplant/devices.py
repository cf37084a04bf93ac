"""Where and how precisely a model computes, and the global state that is left as it was."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import numpy as np
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


def check_precision(precision: Precision, device: torch.device) -> list[str]:
    """A warning, one line, if that device only emulates that precision; none if there is nothing to say.

    A convolutional net was ten times slower in bfloat16 than in float32 on an x86 processor without AVX-512.
    """
    if precision == "bfloat16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return ["this processor only emulates bfloat16, which may take ten times as long as float32"]
    return []


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Computes matrix products and convolutions in that precision; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


@contextmanager
def global_state_kept() -> Iterator[None]:
    """Puts back what a user's model may change: seeds of torch, numpy, random; torch's dtype, flags and grad mode."""
    cuda, state = torch.cuda.is_initialized(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 (the global one is meant)
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    strictness = _strictness()
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if _strictness() != strictness:  # setting it loads the compiler, which takes seconds
            torch.use_deterministic_algorithms(strictness[0], warn_only=strictness[1])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags


def _strictness() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that error says that memory, the processor's or the accelerator's, has run out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
