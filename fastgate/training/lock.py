"""A lock on a run folder, for one training at a time."""

import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fastgate import processes
from fastgate.files import remove_left_behind

LOCK = "lock"

_mutex = threading.Lock()
_held: dict[Path, "_Held"] = {}  # by this process


@dataclass
class _Held:
    file: int  # open, and locked
    times: int
    made: list[Path]  # the folders created for it, innermost first


def _close_in_child() -> None:
    """Close the files in a forked process, such as a data loader's: it would keep the lock after its parent's end."""
    for held in _held.values():
        os.close(held.file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder and lock it for the duration of a training; the main process locks it for all.

    The lock is on the file `lock` inside and ends with the process, however that ends; the same process may take it
    again. Partial files that killed processes left in the folder are removed. A file system without locks is a warning.

    Raises:
        ValueError: another process holds the lock.
    """
    folder = folder.resolve()
    processes.from_main(lambda: _take(folder))
    owner = os.getpid()
    try:
        yield
    finally:
        if processes.is_main() and os.getpid() == owner:
            _give_back(folder)


def _take(folder: Path) -> None:
    with _mutex:
        if folder in _held:
            _held[folder].times += 1
            return
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(folder / LOCK)
        if file is not None:
            _held[folder] = _Held(file, 1, made)
            remove_left_behind(folder)


def _open_locked(path: Path) -> int | None:
    """Open and lock the file; None if that is not possible."""
    try:
        import fcntl
    except ImportError:  # Windows
        _warn(path, "this system has no flock")
        return None
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _read_holder(file)
            os.close(file)
            raise ValueError(
                f"{path.parent}: another training is running in this folder{holder and f' ({holder})'}; wait for it or "
                "end it, or choose another --output"
            ) from error
        except OSError as error:
            os.close(file)
            _warn(path, str(error.strerror))
            return None
        if _is_same(file, path):
            break
        os.close(file)  # its holder has just ended and removed it
    host, before = socket.gethostname(), _read_holder(file)
    if before and not before.endswith(f" on {host}"):
        _warn(path, f"{before} ended without releasing it, or the file system keeps locks local to each machine")
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps({"pid": os.getpid(), "host": host}).encode(), 0)
    return file


def _give_back(folder: Path) -> None:
    with _mutex:
        held = _held.get(folder)
        if held is None:
            return
        held.times -= 1
        if held.times == 0:
            del _held[folder]
            (folder / LOCK).unlink(missing_ok=True)  # while it is locked: see _is_same
            os.close(held.file)
            with suppress(OSError):  # if the run has written anything, a folder is not empty
                for made in held.made:
                    made.rmdir()


def _read_holder(file: int) -> str:
    """The holder, such as "process 12 on node3"; empty if nothing is written yet."""
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        return f"process {int(holder['pid'])} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _is_same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _warn(path: Path, why: str) -> None:
    warnings.warn(
        f"{path}: no lock keeps out a second training in this folder ({why}); make sure there is none", stacklevel=2
    )
