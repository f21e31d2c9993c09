"""A command goes on when nobody reads what it says, or nobody ever did."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgate.training.progress import RunProgress

# says more than a pipe holds, on both streams, and leaves word that it came to its end
TALK = """
import sys
from fastgate.streams import outlive_readers
outlive_readers()
from rich.console import Console
console = Console(stderr=True)
for i in range(3000):
    print("x" * 99)
    print("y" * 99, file=sys.stderr)
    console.print("z" * 50)
sys.stdout.flush()
with open(sys.argv[1], "w") as file:
    print("done", file.fileno() > 2, file=file)
"""


@pytest.mark.parametrize("how", ["| head -1", "2>&1 | head -1", "2> >(head -1)", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_nobody_reads_is_lost_and_no_more(how: str, tmp_path: Path) -> None:
    script = tmp_path / "talk.py"
    script.write_text(TALK)
    command = f"set -o pipefail; '{sys.executable}' '{script}' '{tmp_path}/end' {how}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (tmp_path / "end").read_text() == "done True\n"
    assert done.returncode == 0
    assert "Error" not in done.stderr + done.stdout


def test_what_is_read_is_all_there(tmp_path: Path) -> None:
    script = tmp_path / "talk.py"
    script.write_text(TALK)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "end"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == ("x" * 99 + "\n") * 3000
    assert done.stderr == ("y" * 99 + "\n" + "z" * 50 + "\n") * 3000


def test_progress_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        with RunProgress("resnet8", total_steps=2) as progress:
            for _ in range(3):
                progress.note("epoch")  # would end the process
        assert progress.console.quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), writes)  # for what the file still holds
