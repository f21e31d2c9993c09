from pathlib import Path
from typing import BinaryIO

import pytest

from fastgate.files import write_atomically


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

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
