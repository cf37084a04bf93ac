"""A run's folder: there whole or not at all, locked while it is filled, and gone on with after a kill."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from unplant.errors import InterruptedRunError, WriteError
from unplant.files.atomic import sync_folder

FEW = 200
"""So many files are synced one by one; with more, the whole disk is."""


class OutputFolder:
    """A run's folder: filled under another name beside its place, moved there in one step at the end.

    While the run lasts, `.NAME.part` holds what is written, and in its `.journal` what the run has done so far (see
    `unplant.journal`). A run that fails before it has done anything leaves nothing behind; one that is interrupted or
    killed later leaves `.NAME.part`, where the next run with the same output goes on. An old folder stays as it was
    until the end. All that can be checked before hours of work is checked at once.

    Attributes:
        path: the folder's place.
        journal: folder of the journal.
        resumed: whether an earlier run left pages there.

    Raises:
        WriteError: it exists already and `force` is false, it isn't a run's folder, another run is writing it, or it
            can't be written.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path, self.force = path, force
        parent = path.absolute().parent
        self.part, self.old = parent / f".{path.name}.part", parent / f".{path.name}.old"
        self.journal = self.part / ".journal"
        if not path.exists() and self.old.is_dir():  # killed between the two last steps
            self.old.rename(path)
        if path.exists() or path.is_symlink():
            if not force:
                raise WriteError(f"{path} exists already; choose another -o, or pass --force to replace it")
            if not path.is_dir() or path.is_symlink() or (any(path.iterdir()) and not (path / "result.json").is_file()):
                raise WriteError(f"{path} is not a folder that unplant wrote (no result.json); it is left as it is")
        if not parent.is_dir():
            raise WriteError(f"can't write {path}: there is no folder {parent}")
        try:
            self._take()
        except OSError as error:
            raise WriteError(f"can't write {path}: {error.strerror or error}") from error
        self.resumed = self._pages()

    def _take(self) -> None:
        """Makes the folder beside it, or takes over what a killed run left; nobody else writes there until the end."""
        self.part.mkdir(mode=0o700, exist_ok=True)
        if self.part.is_symlink() or self.part.stat().st_uid != os.geteuid():
            raise WriteError(f"{self.part} belongs to somebody else; choose another -o")
        self.journal.mkdir(mode=0o700, exist_ok=True)
        place = self.journal / "lock"
        self.lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.fstat(self.lock).st_ino == place.stat().st_ino  # and not of a run that has just ended
        except OSError:
            taken = False
        if not taken:
            os.close(self.lock)
            raise WriteError(f"another run is writing {self.path}; wait for it, or choose another -o")
        self._clear()
        if self.path.exists() and self.old.exists():
            shutil.rmtree(self.old)

    def _clear(self) -> None:
        """Removes what is half written; the pages of the journal stay."""
        for entry in self.part.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                if entry != self.journal:
                    shutil.rmtree(entry)
            else:
                entry.unlink()
        for entry in self.journal.glob(".*.tmp"):
            entry.unlink()

    def _pages(self) -> bool:
        return any(self.journal.glob("*.page"))

    def _is_ours(self, error: OSError) -> bool:
        """Whether writing here failed, not reading elsewhere."""
        inside = isinstance(error.filename, (str, Path)) and Path(error.filename).is_relative_to(self.part)
        return inside or error.errno in {errno.ENOSPC, errno.EROFS, errno.EDQUOT}

    def __enter__(self) -> Path:
        return self.part

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
            else:
                self._stop(error)
        finally:
            os.close(self.lock)

    def _stop(self, error: BaseException) -> None:
        """Keeps the journal, if anything is in it."""
        kept = self._pages()
        with contextlib.suppress(OSError):
            if kept:
                self._clear()
            else:
                shutil.rmtree(self.part)
        if isinstance(error, KeyboardInterrupt) and kept:
            raise InterruptedRunError("interrupted; the same command goes on from here") from error
        if isinstance(error, OSError) and self._is_ours(error):
            raise WriteError(f"can't write {self.path}: {error.strerror or error}{self._rest()}") from error
        if kept:
            error.add_note(self._rest())

    def _rest(self) -> str:
        """What to say of the journal."""
        return "; what was done so far is kept for the next run with the same -o" if self._pages() else ""

    def _finish(self) -> None:
        """Moves the folder to its place."""
        if self.path.exists() and not self.force:
            elsewhere = Path(tempfile.mkdtemp(dir=self.part.parent, prefix=f"{self.path.name}."))
            self.part.rename(elsewhere)
            shutil.rmtree(elsewhere / ".journal", ignore_errors=True)
            raise WriteError(f"{self.path} has appeared meanwhile and is left as it is; the results are in {elsewhere}")
        try:
            self._sync()
            self.part.chmod(0o755)
            if self.path.exists():
                self.path.rename(self.old)
            self.part.rename(self.path)
            sync_folder(self.part.parent)
        except OSError as failure:
            with contextlib.suppress(OSError):  # if even that fails, the next run does it
                if self.old.exists() and not self.path.exists():
                    self.old.rename(self.path)
            self._stop(failure)
            raise WriteError(f"can't write {self.path}: {failure.strerror or failure}{self._rest()}") from failure
        for rest in (self.path / ".journal", self.old):
            shutil.rmtree(rest, ignore_errors=True)

    def _sync(self) -> None:
        files = [path for path in self.part.rglob("*") if path.is_file() and path.parent != self.journal]
        if len(files) > FEW:
            os.sync()
            return
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
