"""A run that is killed or stopped loses nothing that was saved, and ends with the weights of an undisturbed one."""

import json
import signal
from pathlib import Path

import pytest
import torch

from fastgate.training.checkpoint import load_checkpoint
from tests.training.runs import TINY_OPTIONS, checkpoint_state, differences, run_cli, send_when_written, start_cli

# SIGKILL half-way through writing the second epoch's checkpoint
KILL_IN_CHECKPOINT = """
import io, os, signal, torch
save = torch.save
def dying_save(state, file):
    if state["epoch"] == 2:
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = dying_save
"""

# SIGKILL when the second epoch's metrics are written but not yet renamed
KILL_IN_METRICS = """
import os, signal
fsync, calls = os.fsync, []
def dying_fsync(number):
    name = os.readlink(f"/proc/self/fd/{number}")
    calls.append("metrics.jsonl" in name)
    if sum(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(number)
os.fsync = dying_fsync
"""

# SIGKILL right after the third epoch's decisions were written, before anything else of that epoch
KILL_AFTER_SETTLING = """
import os, signal
from fastgate.training.callbacks import MetricsFile
write = MetricsFile.on_train_begin
def dying_write(self, trainer):
    write(self, trainer)
    if (self.folder / "decisions.json").exists():
        os.kill(os.getpid(), signal.SIGKILL)
MetricsFile.on_train_begin = dying_write
"""

# from the second epoch's checkpoint on no file may be longer than a third of it: as on a full disk
FULL_DISK = """
import resource, torch
save = torch.save
def limited_save(state, file):
    if state["epoch"] == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    save(state, file)
torch.save = limited_save
"""

# at the last epoch waits to be told to stop: no machine is so fast that the signal finds the run ended
WAIT = """
import time
from fastgate.training.trainer import Trainer
train_epoch = Trainer._train_epoch
def waiting_train_epoch(self, interrupted):
    end = time.monotonic() + 120
    while self.epoch == self.epochs - 1 and not interrupted and time.monotonic() < end:
        time.sleep(0.01)
    train_epoch(self, interrupted)
Trainer._train_epoch = waiting_train_epoch
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    result = run_cli("train", *TINY_OPTIONS, "--output", folder)
    assert result.returncode == 0, result.stderr
    return folder


def assert_resumes_like(undisturbed: Path, folder: Path) -> None:
    result = run_cli("train", "--output", folder, "--resume", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert differences(checkpoint_state(undisturbed), checkpoint_state(folder)) == []
    assert (folder / "model.safetensors").stat().st_size > 0
    epochs = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3, 4]
    assert [path.name for path in folder.glob(".*")] == []


def test_the_same_seed_gives_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    result = run_cli("train", *TINY_OPTIONS, "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert differences(checkpoint_state(undisturbed), checkpoint_state(tmp_path / "run")) == []


def test_another_seed_gives_other_weights(undisturbed: Path, tmp_path: Path) -> None:
    result = run_cli("train", *TINY_OPTIONS, "--seed", "2", "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "model.conv1.weight" in differences(checkpoint_state(undisturbed), checkpoint_state(tmp_path / "run"))


def test_killed_from_outside(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_cli("train", *TINY_OPTIONS, "--output", folder, code=WAIT)
    send_when_written(process, folder / "checkpoint.pt", signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert_resumes_like(undisturbed, folder)


@pytest.mark.parametrize(
    ("code", "epochs_saved"),
    [
        pytest.param(KILL_IN_CHECKPOINT, 1, id="half-way-through-a-checkpoint"),
        pytest.param(KILL_IN_METRICS, 1, id="before-metrics-are-renamed"),
        pytest.param(KILL_AFTER_SETTLING, 3, id="between-decisions-and-the-first-step"),
    ],
)
def test_killed_while_writing(undisturbed: Path, tmp_path: Path, code: str, epochs_saved: int) -> None:
    folder = tmp_path / "run"
    result = run_cli("train", *TINY_OPTIONS, "--output", folder, code=code)
    assert result.returncode == -signal.SIGKILL
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == epochs_saved
    assert_resumes_like(undisturbed, folder)


def test_a_full_disk_ends_a_run_in_one_line(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert (undisturbed / "checkpoint.pt").stat().st_size > 200_000
    result = run_cli("train", *TINY_OPTIONS, "--output", folder, code=FULL_DISK)
    assert result.returncode == 1
    *_, error = result.stderr.splitlines()
    said = "checkpoint.pt: it could not be written (File too large); the previous file is kept"
    assert error == f"error: {folder}/{said}" and "Traceback" not in result.stderr
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == 1
    assert not list(folder.glob(".*"))
    assert_resumes_like(undisturbed, folder)


@pytest.mark.parametrize("damage", ["deleted", "shortened", "doubled", "swapped", "foreign"])
def test_what_happens_to_the_metrics_changes_nothing(undisturbed: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "run"
    result = run_cli("train", *TINY_OPTIONS, "--output", folder, code=KILL_AFTER_SETTLING)
    assert result.returncode == -signal.SIGKILL
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    metrics.write_text(
        {
            "deleted": "",
            "shortened": lines[0],
            "doubled": "".join(line * 2 for line in lines),
            "swapped": "".join(lines[::-1]),
            "foreign": "\x00 no JSON",
        }[damage]
    )
    if damage == "deleted":
        metrics.unlink()
    assert_resumes_like(undisturbed, folder)
    assert metrics.read_text().splitlines(keepends=True)[:3] == lines


def test_interrupted_saves_in_the_middle_of_an_epoch(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_cli("train", *TINY_OPTIONS, "--output", folder, code=WAIT)
    send_when_written(process, folder / "checkpoint.pt", signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"fastgate train --output {folder} --resume" in err
    assert "Traceback" not in err
    state = load_checkpoint(folder / "checkpoint.pt")
    assert state["epoch"] in (1, 2, 3) and state["step"] > 0
    assert_resumes_like(undisturbed, folder)


def test_interrupt_in_the_first_steps_is_kept(tmp_path: Path, undisturbed: Path) -> None:
    # the signal arrives while the third step of the first epoch runs
    code = """
import os, signal
from fastgate.training.data import Batches
start_at = Batches.__iter__
def with_interrupt(self):
    for i, batch in enumerate(start_at(self)):
        if i == 2 and self.augment and self.epoch == 0 and self.first_step == 0:
            os.kill(os.getpid(), signal.SIGINT)
        yield batch
Batches.__iter__ = with_interrupt
"""
    folder = tmp_path / "run"
    result = run_cli("train", *TINY_OPTIONS, "--output", folder, code=code)
    assert result.returncode == 130
    state = load_checkpoint(folder / "checkpoint.pt")
    assert (state["epoch"], state["step"]) == (0, 3)
    assert_resumes_like(undisturbed, folder)


def test_a_finished_run_resumes_to_its_table(undisturbed: Path) -> None:
    before = torch.load(undisturbed / "checkpoint.pt", weights_only=True)["model"]["fc.weight"]
    result = run_cli("train", "--output", undisturbed, "--resume", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "compact" in result.stdout
    assert torch.equal(before, torch.load(undisturbed / "checkpoint.pt", weights_only=True)["model"]["fc.weight"])


def test_resuming_with_another_recipe_is_refused(undisturbed: Path) -> None:
    result = run_cli("train", "--output", undisturbed, "--resume", "--learning-rate", "0.2")
    assert result.returncode == 2
    assert "learning_rate" in result.stderr
    assert "Traceback" not in result.stderr
