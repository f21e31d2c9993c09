"""Atomic file writes: a file is written under a temporary name, then renamed, so that a kill leaves it whole."""

import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, cast


class NotWritten(OSError):
    """A file could not be written, for example on a full disk; the previous file is intact."""


class _Noting:
    """An unbuffered file that writes all data and keeps the error if it cannot, which torch.save does not report."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
            raise
        return size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def write_atomically(path: str | os.PathLike[str], write: str | Callable[[BinaryIO], Any]) -> None:
    """Write a text, or what `write(file)` writes to a binary file, atomically to `path`.

    The data is on disk before the file is renamed, and a failed write leaves no temporary file behind.

    Raises:
        NotWritten: the disk is full, or writing failed for another reason.
        OSError: the file cannot be created: no such folder, or no permission.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    noting: _Noting | None = None
    try:
        # unbuffered: closing must not retry a failed write
        with temporary.open("wb", buffering=0) as file:
            noting = _Noting(file)
            if isinstance(write, str):
                noting.write(write.encode())
            else:
                write(cast(BinaryIO, noting))
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error if noting is None or noting.error is None else noting.error
        if noting is not None and isinstance(cause, OSError):
            raise NotWritten(
                f"{path}: it could not be written ({cause.strerror or cause}); the previous file is kept"
            ) from error
        raise


def remove_left_behind(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder; keep those of other running processes."""
    for path in folder.glob(".*.tmp"):
        owner = path.name.split(".")[-2]
        if owner.isdecimal() and (int(owner) == os.getpid() or not _is_alive(int(owner))):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # on Windows os.kill would terminate it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process
        return True
    return True
