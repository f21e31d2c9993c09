"""A run folder belongs to one training at a time."""

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
    made: list[Path]  # the folders that were made for it, the innermost first


def _close_in_child() -> None:
    """A forked process, as of a data loader, shares the locked file: it would hold the lock when its parent is gone."""
    for held in _held.values():
        os.close(held.file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made, for the life of a training; the main process holds it for all.

    A lock on the file `lock` inside, which ends with the process however that ends; the process may take it again. What
    killed processes left half written in the folder is removed. Where the file system has no locks a warning says so.

    Raises:
        ValueError: another process holds it.
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
    """The file, open and locked by this process; None where that is not possible."""
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
                f"{path.parent}: another training is at work in this folder{holder and f' ({holder})'}; wait for it or "
                "end it, or choose another --output"
            ) from error
        except OSError as error:
            os.close(file)
            _warn(path, str(error.strerror))
            return None
        if _is_same(file, path):
            break
        os.close(file)  # whoever held it has just ended and removed it
    host, before = socket.gethostname(), _read_holder(file)
    if before and not before.endswith(f" on {host}"):
        _warn(path, f"{before} ended without giving it back, or its file system keeps locks to each machine")
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
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: see _is_same
            os.close(held.file)
            with suppress(OSError):  # where something came of it, a folder is not empty
                for made in held.made:
                    made.rmdir()


def _read_holder(file: int) -> str:
    """Such as "process 12 on node3"; empty where nothing is written yet."""
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
        f"{path}: nothing keeps a second training from this folder ({why}); see to it that there is none", stacklevel=2
    )
