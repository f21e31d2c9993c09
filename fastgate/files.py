"""Files that a kill at any moment leaves whole: written under a temporary name, then renamed."""

import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, cast


class NotWritten(OSError):
    """A file could not be written, as on a full disk; what was there before is still there, whole."""


class _Noting:
    """An unbuffered file that writes all it is given and remembers why it could not: torch.save says only that."""

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
    """Write a text, or what `write(file)` puts into a binary file, to `path`: all of it or nothing.

    The data reaches the disk before the new name does, and a failed write leaves no temporary file behind.

    Raises:
        NotWritten: the disk is full, or writing failed otherwise.
        OSError: there is no place for the file: no such folder, no right to write there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    noting: _Noting | None = None
    try:
        # unbuffered: closing must not try once more to write what failed
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
                f"{path}: it could not be written ({cause.strerror or cause}); what was there before is kept"
            ) from error
        raise


def remove_left_behind(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder; those of others that are alive stay."""
    for path in folder.glob(".*.tmp"):
        owner = path.name.split(".")[-2]
        if owner.isdecimal() and (int(owner) == os.getpid() or not _is_alive(int(owner))):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # where asking would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's
        return True
    return True
