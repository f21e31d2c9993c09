"""Standard streams whose readers may go away: what is said to nobody is lost, and nothing else happens."""

import errno
import io
import os
import sys
from typing import Any, TextIO

# the reader of a pipe is gone, the terminal is closed
_GONE = (errno.EPIPE, errno.EIO)


class _Unbroken(io.FileIO):
    """A file that goes on as /dev/null when its reader goes away."""

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            nobody = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nobody, self.fileno())
            os.close(nobody)
            return super().write(data)


def outlive_readers() -> None:
    """Let this process go on when its standard output or error stream is closed, now or later (`| head`)."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed from the start: the next file that is opened would take its place
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _text(number, "utf-8", "backslashreplace", line_buffering=True))
        elif stream is getattr(sys, f"__{name}__") and stream.fileno() == number:
            stream.flush()
            setattr(sys, name, _text(number, stream.encoding, stream.errors, line_buffering=stream.line_buffering))


def _text(number: int, encoding: str, errors: str, *, line_buffering: bool) -> TextIO:
    raw = _Unbroken(number, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors, line_buffering=line_buffering, write_through=False
    )
