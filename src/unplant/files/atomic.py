"""Files are written whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

from unplant.errors import WriteError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes beside the target, syncs, then renames: after a crash there is the old file or the new one.

    Raises:
        WriteError: it can't be written; an old file is still there.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise WriteError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes renamings in it last through a power failure, if the disk is able to; they are done in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
