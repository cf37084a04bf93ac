"""What a run has done so far, on disk: a run that was killed goes on from there and ends with the same weights.

The journal is a memory by content: what a training was started from (weights, data, settings, random state, versions)
names the page that holds what became of it. A run that is started again does the same once more, as all that is
random comes from its seed; but each training that is in the journal gives at once what it gave before, and the one
that was cut off goes on in the middle. A page of another run has another name, so it can't be taken by mistake.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from unplant.files import write_atomically

SECONDS = 60.0
"""So often a training in progress is written down."""


class Journal:
    """Pages of trainings, in a folder.

    Args:
        folder: where; made when it is needed, and it may hold pages already. None: nothing is remembered.
        seconds: so often a training in progress is written down, at most.
        salt: anything else that decides what a training gives, such as the code of the network.
    """

    def __init__(self, folder: Path | str | None = None, *, seconds: float = SECONDS, salt: str = "") -> None:
        self.folder, self.seconds, self.salt = Path(folder) if folder is not None else None, seconds, salt

    def of(self, matter: Any) -> "Journal":
        """The same, for trainings that depend on this (plain values) as well."""
        return Journal(self.folder, seconds=self.seconds, salt=json.dumps([self.salt, matter]))

    def page(self, *settings: Any, tensors: Iterable[Tensor]) -> "Page":
        """The page of the training that starts from these settings (plain values) and tensors."""
        if self.folder is None:
            return Page(None, self.seconds)
        digest = hashlib.sha256(self.salt.encode())
        about = [version("unplant"), torch.__version__, torch.get_num_threads(), *settings]
        digest.update(json.dumps(about, default=str).encode())
        for tensor in tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
        return Page(self.folder / f"{digest.hexdigest()[:32]}.page", self.seconds)


class Page:
    """What became of one training so far."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.written = time.monotonic()

    def read(self) -> dict[str, Tensor] | None:
        """What was written last; None if there is nothing, or if it is damaged: then it has to be done anew."""
        if self.path is None or not self.path.is_file():
            return None
        content = self.path.read_bytes()
        if hashlib.sha256(content[64:]).hexdigest().encode() != content[:64]:
            return None
        try:
            return safetensors.torch.load(content[64:])
        except SafetensorError:
            return None

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        return self.path is not None and time.monotonic() - self.written >= self.seconds

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the page in one step.

        Raises:
            WriteError: it can't be written; the old page is still there.
        """
        if self.path is None:
            return
        with suppress(OSError):  # if it can't be made, the page can't be written either, which is told then
            self.path.parent.mkdir(parents=True, exist_ok=True)
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        content = safetensors.torch.save(plain)
        write_atomically(self.path, hashlib.sha256(content).hexdigest().encode() + content)
        self.written = time.monotonic()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What of a model's state_dict are tensors."""
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


NOTHING = Journal()
"""Remembers nothing."""
