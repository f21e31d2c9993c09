"""Runs in two processes of torchrun (gloo, CPU) against runs in one: the same training, and an end that is mended."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgate.training.checkpoint import load_checkpoint
from tests.training.parallel_work import RECIPES, STOP, UNSYNCHRONISED
from tests.training.runs import (
    ENVIRONMENT,
    TINY_OPTIONS,
    run_cli,
    run_parallel,
    send_when_written,
    start_parallel,
)

# Sums are taken in other parts, in fp64. Before the first update gradients differ by roundings alone (seen: 4e-15 of
# the largest one), which twenty steps multiply (seen: 2e-13); statistics of half a batch are off by 1e-2 at once.
AT_ONCE, LATER = 1e-12, 1e-9

# process 1 dies at the beginning of the third epoch
DYING = """
import os, signal
from fastgate.cli import main
from fastgate.training.trainer import Trainer
begin = Trainer._begin_epoch
def dying_begin(self):
    if self.epoch == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    begin(self)
Trainer._begin_epoch = dying_begin
main()
"""


def work(processes: int, *arguments: Path) -> None:
    if processes == 1:
        command = [sys.executable, "-m", "tests.training.parallel_work", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False)
    else:
        result = run_parallel(processes, "-m", "tests.training.parallel_work", *arguments)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same work in one and in two processes, by their number."""
    folders = {processes: tmp_path_factory.mktemp(f"work-{processes}") for processes in (1, 2)}
    for processes, folder in folders.items():
        work(processes, folder)
    return folders


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor up to a share of its largest value; what should be 0 (a bias before a batch norm) up to 1e-12."""
    assert got.keys() == expected.keys() != set()
    for name, tensor in expected.items():
        few = max(tolerance * float(tensor.abs().max()), 1e-12)
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=few, msg=lambda text, name=name: f"{name}: {text}")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_batch_norm_over_two_processes(runs: dict[int, Path]) -> None:
    facts = {processes: json.loads((folder / "facts.json").read_text()) for processes, folder in runs.items()}
    assert [fact["processes"] for fact in facts.values()] == [1, 2]
    one, two = (torch.load(runs[processes] / "batch_norms.pt") for processes in (1, 2))
    assert one.keys() == two.keys() and len(one) == 12
    for name, tensors in one.items():
        for expected, got in zip(tensors, two[name], strict=True):
            # a few roundings of the largest terms
            few = 16 * torch.finfo(got.dtype).eps * float(expected.abs().max())
            torch.testing.assert_close(got, expected, rtol=0, atol=few, msg=name)


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_as_one(runs: dict[int, Path], name: str) -> None:
    one, two = (torch.load(runs[processes] / name / "record.pt") for processes in (1, 2))
    first = [{key: grad for key, grad in run["gradients"].items() if key.startswith("epoch 0")} for run in (one, two)]
    assert_close(first[1], first[0], AT_ONCE)
    assert_close(two["gradients"], one["gradients"], LATER)
    assert_close(two["state"], one["state"], LATER)
    assert two["agree"]
    lines = [metrics(runs[processes] / name) for processes in (1, 2)]
    assert len(lines[0]) == len(lines[1]) == RECIPES[name].run.epochs
    for expected, got in zip(*lines, strict=True):
        assert got["train"] == pytest.approx(expected["train"], rel=LATER)
        assert (got["gates"], got["macs_training"]) == (expected["gates"], expected["macs_training"])
        if name != "mean_threshold":  # which decides by the mean of a batch, in evaluation of other batches
            assert got["eval"]["accuracy"] == expected["eval"]["accuracy"]
            assert got["eval"]["loss"] == pytest.approx(expected["eval"]["loss"], rel=LATER)


def test_a_head_converted_to_sync_batch_norm(runs: dict[int, Path]) -> None:
    """One process has one sample of three, the other two."""
    one, *two = (torch.load(runs[processes] / f"head-{rank}.pt") for processes, rank in ((1, 0), (2, 0), (2, 1)))
    for got in two:
        for expected, tensor in zip(one, got, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=AT_ONCE, atol=AT_ONCE)


def test_a_gate_frozen_in_one_process_is_frozen_in_all_by_a_broadcast_of_buffers(runs: dict[int, Path]) -> None:
    assert all(json.loads((folder / "facts.json").read_text())["frozen"] for folder in runs.values())


def test_batch_norms_may_keep_to_their_process(runs: dict[int, Path]) -> None:
    one, two = (torch.load(runs[processes] / UNSYNCHRONISED / "record.pt") for processes in (1, 2))
    assert two["agree"]  # at the end they all have the main one's
    name = "epoch 0 conv1.weight"
    # the statistics of half a batch are others
    assert (two["gradients"][name] - one["gradients"][name]).abs().max() > 1e-4 * one["gradients"][name].abs().max()


@pytest.mark.parametrize("name", ["layer", "channel"])
def test_decisions_and_commits_are_the_same(runs: dict[int, Path], name: str) -> None:
    one, two = (runs[processes] / name for processes in (1, 2))
    assert (one / "decisions.json").read_text() == (two / "decisions.json").read_text()
    lines = metrics(two)
    assert lines[-1]["frozen"] and lines[-1]["macs_training"]["per_image"] < lines[0]["macs_training"]["per_image"]


@pytest.mark.parametrize(("began", "resumed"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_stopped_and_resumed_on_another_number_of_processes(
    runs: dict[int, Path], tmp_path: Path, began: int, resumed: int
) -> None:
    for name in ("layer", "channel"):
        state = load_checkpoint(runs[began] / f"{name}-stopped" / "checkpoint.pt")
        # one process was told to stop, and all did, after the same step
        assert (state["epoch"], state["step"]) == (STOP[0], STOP[1] + 1)
    work(resumed, tmp_path, runs[began])
    for name in ("layer", "channel"):
        undisturbed, got = runs[1] / name, tmp_path / f"{name}-resumed"
        assert_close(torch.load(got / "record.pt")["state"], torch.load(undisturbed / "record.pt")["state"], LATER)
        for expected, line in zip(metrics(undisturbed), metrics(got), strict=True):
            assert line["train"] == pytest.approx(expected["train"], rel=LATER)


def test_a_kernel_with_statistics_of_its_own_is_refused(runs: dict[int, Path]) -> None:
    said = {processes: json.loads((folder / "facts.json").read_text())["refusal"] for processes, folder in runs.items()}
    assert "batch statistics of one process, and these are over 2; use 'auto' or 'torch'" in said[2]
    assert "batch statistics" not in said[1]


def test_joules_are_those_of_all_devices_once(runs: dict[int, Path]) -> None:
    spent = {processes: json.loads((folder / "facts.json").read_text())["joules"] for processes, folder in runs.items()}
    # every process meters 3 J of a GPU of its own, and all of them the 4 J of their machine's processor
    assert spent == {1: 3 + 4, 2: 2 * 3 + 4}


def assert_finished(folder: Path, processes: int) -> None:
    assert [line["epoch"] for line in metrics(folder)] == [1, 2, 3, 4]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["processes"] == processes
    assert {"unpruned", "compact"} <= summary["rows"].keys()
    assert [line["epoch"] for line in metrics(folder / "control-unpruned")] == [1, 2, 3, 4]
    assert (folder / "model.safetensors").stat().st_size > 0
    assert [path.name for path in folder.rglob(".*")] == []


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_resumes_on_one_and_on_two(tmp_path: Path) -> None:
    folder, program = tmp_path / "run", tmp_path / "dying.py"
    program.write_text(DYING)
    result = run_parallel(2, program, "train", *TINY_OPTIONS, "--control", "unpruned", "--output", folder)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--resume, on any number of processes" in errors[0], result.stderr
    assert "fastgate/training" not in result.stderr  # no traceback of ours, only torchrun's report of who died
    assert re.search(r"rank +: 1 ", result.stderr) and "SIGKILL" in result.stderr
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] == 2
    first = metrics(folder)
    shutil.copytree(folder, tmp_path / "copy")

    result = run_cli("train", "--output", folder, "--resume", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert_finished(folder, 1)
    result = run_parallel(2, "-m", "fastgate", "train", "--output", tmp_path / "copy", "--resume", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert_finished(tmp_path / "copy", 2)
    assert metrics(folder)[:2] == metrics(tmp_path / "copy")[:2] == first
    # one process speaks: a line per epoch of the run and of its control, one table
    assert len(re.findall(r"epoch \d/4 ", result.stderr)) == 2 + 4
    assert result.stdout.count("run folder:") == 1


def test_interrupted_by_ctrl_c(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_parallel(2, "-m", "fastgate", "train", *TINY_OPTIONS, "--epochs", "400", "--output", folder)
    send_when_written(process, folder / "checkpoint.pt", signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    told = f"stopped; everything is saved. Resume with: torchrun ... -m fastgate train --output {folder} --resume"
    assert err.count(told) == 1, err
    assert "error: " not in err and "fastgate/training" not in err
    state = load_checkpoint(folder / "checkpoint.pt")
    assert (state["epoch"], state["step"]) >= (1, 0)
    assert len(metrics(folder)) == state["epoch"]


def test_a_batch_that_cannot_be_shared_is_one_clear_error(tmp_path: Path) -> None:
    options = [*TINY_OPTIONS, "--batch-size", "127", "--output", tmp_path / "run"]
    result = run_parallel(2, "-m", "fastgate", "train", *options)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: batch_size: expected a multiple of the 2 processes, among which a batch is shared, got 127; "
        "change one of them"
    ], result.stderr
    assert not (tmp_path / "run").exists()
