"""Files that a kill at any moment leaves whole: written under a temporary name, then renamed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: str | os.PathLike[str], write: str | Callable[[BinaryIO], Any]) -> None:
    """Write a text, or what `write(file)` puts into a binary file, to `path`: all of it or nothing.

    The data reaches the disk before the new name does, and a failed write leaves no temporary file behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if isinstance(write, str):
                file.write(write.encode())
            else:
                write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
