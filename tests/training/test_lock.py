"""A run folder is locked by one training at a time."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from fastgate.training.lock import locked
from tests.training.runs import TINY_OPTIONS, run_cli, start_cli
from tests.training.test_resume import WAIT

_FORK = multiprocessing.get_context("fork")


def hold(folder: Path, children: bool, taken: Any) -> None:
    with locked(folder):
        if children:
            _FORK.Process(target=time.sleep, args=(60,), daemon=True).start()
        taken.set()
        time.sleep(60)


def start_holder(folder: Path, *, children: bool = False) -> Any:
    taken = _FORK.Event()
    process = _FORK.Process(target=hold, args=(folder, children, taken))
    process.start()
    assert taken.wait(60)
    return process


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    holder = start_holder(tmp_path / "run")
    try:
        with (
            pytest.raises(
                ValueError,
                match=rf"run: another training is running in this folder \(process {holder.pid} on "
                rf"{socket.gethostname()}\); wait for it or end it, or choose another --output",
            ),
            locked(tmp_path / "run"),
        ):
            pass
        with locked(tmp_path / "other"):
            pass
    finally:
        holder.kill()
        holder.join()


def test_a_killed_process_blocks_nobody_nor_do_its_children(tmp_path: Path) -> None:
    holder = start_holder(tmp_path, children=True)
    leftover = tmp_path / f".checkpoint.pt.{holder.pid}.tmp"
    leftover.touch()
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
        assert os.listdir(tmp_path) == ["lock"]
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "run"):
        pass
    assert os.listdir(tmp_path) == []  # nothing came of the folder
    (tmp_path / "kept").mkdir()
    with locked(tmp_path / "kept"):
        pass
    with locked(tmp_path / "used"):
        (tmp_path / "used" / "config.json").touch()
    assert os.listdir(tmp_path / "kept") == [] and os.listdir(tmp_path / "used") == ["config.json"]


def test_a_process_may_take_it_again(tmp_path: Path) -> None:
    with locked(tmp_path):
        with locked(tmp_path / ".." / tmp_path.name):
            pass
        assert os.listdir(tmp_path) == ["lock"]
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_said_to_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    living = tmp_path / f".checkpoint.pt.{os.getppid()}.tmp"
    living.touch()
    with (
        pytest.warns(
            UserWarning, match=r"lock: no lock keeps out a second training in this folder \(No locks available"
        ),
        locked(tmp_path),
    ):
        assert living.exists()


def test_a_holder_on_another_machine_that_left_its_lock_is_named(tmp_path: Path) -> None:
    # its file system may keep the locks of every machine apart
    (tmp_path / "lock").write_text(json.dumps({"pid": 3, "host": "elsewhere"}))
    with pytest.warns(UserWarning, match=r"process 3 on elsewhere ended without releasing it, or"), locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x", "host": 1}', "\x00\xff"])
def test_whatever_stands_in_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    with locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_two_runs_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = start_cli("train", *TINY_OPTIONS, "--output", folder, code=WAIT)  # it waits in its last epoch
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.01)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name == "config.json"}
    for options in ([*TINY_OPTIONS, "--seed", "2"], ["--resume"]):
        second = run_cli("train", *options, "--output", folder)
        assert second.returncode == 2
        [line] = second.stderr.splitlines()
        assert line.startswith(f"error: {folder}: another training is running in this folder (process ")
    assert {name: (folder / name).read_bytes() for name in files} == files
    first.send_signal(signal.SIGINT)
    first.communicate()
    assert first.returncode == 130
    assert not (folder / "lock").exists()
