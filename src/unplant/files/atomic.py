"""Files are written whole or not at all."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

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
        _sync_folder(path.parent)
    except OSError as error:
        raise WriteError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class OutputFolder:
    """A run's folder: filled under a temporary name beside its place, moved there in one step at the end.

    A run that fails or is interrupted leaves nothing behind, and an old folder stays as it was until then. Checks at
    once that the folder may be made, before hours of work.

    Raises:
        WriteError: it exists already and `force` is false, it isn't a run's folder, or it can't be written.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path, self.force = path, force
        if path.exists() or path.is_symlink():
            if not force:
                raise WriteError(f"{path} exists already; choose another -o, or pass --force to replace it")
            if not path.is_dir() or path.is_symlink() or (any(path.iterdir()) and not (path / "result.json").is_file()):
                raise WriteError(f"{path} is not a folder that unplant wrote (no result.json); it is left as it is")
        parent = path.absolute().parent
        if not parent.is_dir():
            raise WriteError(f"can't write {path}: there is no folder {parent}")
        try:
            self.part = Path(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}.", suffix=".part"))
        except OSError as error:
            raise WriteError(f"can't write {path}: {error.strerror or error}") from error

    def _is_ours(self, error: OSError) -> bool:
        """Whether writing here failed, not reading elsewhere."""
        inside = isinstance(error.filename, (str, Path)) and Path(error.filename).is_relative_to(self.part)
        return inside or error.errno in {errno.ENOSPC, errno.EROFS, errno.EDQUOT}

    def __enter__(self) -> Path:
        return self.part

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self.part, ignore_errors=True)
            if isinstance(error, OSError) and self._is_ours(error):
                raise WriteError(f"can't write {self.path}: {error.strerror or error}") from error
            return
        old = None
        if self.path.exists() and not self.force:
            raise WriteError(f"{self.path} has appeared meanwhile and is left as it is; the results are in {self.part}")
        try:
            self.part.chmod(0o755)
            if self.path.exists():
                old = self.part.with_suffix(".old")
                self.path.rename(old)
            self.part.rename(self.path)
            _sync_folder(self.path.absolute().parent)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as failure:
            shutil.rmtree(self.part, ignore_errors=True)
            if old is not None and old.exists() and not self.path.exists():
                old.rename(self.path)
            raise WriteError(f"can't write {self.path}: {failure.strerror or failure}") from failure
