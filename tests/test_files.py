import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from fastgate.files import NotWritten, remove_left_behind, write_atomically


def test_text_and_bytes(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "grün")
    assert (tmp_path / "a").read_text() == "grün"
    write_atomically(tmp_path / "a", lambda file: file.write(b"\x00\x01"))
    assert (tmp_path / "a").read_bytes() == b"\x00\x01"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(NotWritten, match=r"/a: it could not be written \(disk full\); the previous file is kept"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def in_a_fork(act: Callable[[], Any]) -> int:
    """The exit status of a child in which `act` runs; 0 where it returns."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kind", ["text", "bytes", "torch.save"])
def test_a_file_size_limit_is_an_error_of_one_line(tmp_path: Path, kind: str) -> None:
    path, state = tmp_path / "a", torch.zeros(100_000)
    path.write_text("old")
    write: Any = {
        "text": "x" * 100_000,
        "bytes": lambda file: file.write(bytes(100_000)),
        "torch.save": lambda file: torch.save(state, file),
    }[kind]

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        with pytest.raises(NotWritten) as raised:
            write_atomically(path, write)
        assert str(raised.value) == f"{path}: it could not be written (File too large); the previous file is kept"

    assert in_a_fork(act) == 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_where_there_is_no_place_for_a_file_the_system_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        write_atomically(tmp_path / "none" / "a", "text")


def test_temporary_files_of_the_dead_are_removed_and_of_the_living_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with subprocess.Popen(["sleep", "60"]) as alive:
        for owner in (dead.pid, alive.pid, os.getpid(), "x"):
            (tmp_path / f".a.json.{owner}.tmp").touch()
        (tmp_path / ".hidden").touch()
        remove_left_behind(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted([f".a.json.{alive.pid}.tmp", ".a.json.x.tmp", ".hidden"])
        alive.kill()
