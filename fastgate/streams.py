"""Standard streams that survive a closed reader: output that nobody reads is discarded without an error."""

import errno
import io
import os
import sys
from typing import Any, TextIO

# broken pipe, closed terminal
_GONE = (errno.EPIPE, errno.EIO)


class _Unbroken(io.FileIO):
    """A file that turns into /dev/null when its reader is gone."""

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
    """Keep this process running when its stdout or stderr is closed, now or later (`| head`)."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed from the start: the next opened file would get its descriptor
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
