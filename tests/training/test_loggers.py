"""What --logger tensorboard writes, read back with TensorBoard's own reader."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from fastgate.training.loggers import list_scalars, open_logger
from tests.training.runs import TINY_OPTIONS, run_cli
from tests.training.test_resume import KILL_IN_CHECKPOINT


def steps_in_files(folder: Path) -> list[int]:
    """Every step of the training loss that any process wrote, counted or not."""
    files = sorted(folder.glob("events.*"))
    events = [event for file in files for event in EventFileLoader(str(file)).Load()]
    return [event.step for event in events if any(value.tag == "train/loss" for value in event.summary.value)]


def test_an_interrupted_run_is_written_once(tmp_path: Path) -> None:
    folder, logger = tmp_path / "run", ("--logger", "tensorboard")
    # killed after the second epoch was logged, before its checkpoint was whole: the epoch is repeated
    killed = run_cli("train", *TINY_OPTIONS, *logger, "--output", folder, code=KILL_IN_CHECKPOINT)
    assert killed.returncode == -9
    resumed = run_cli("train", "--output", folder, "--resume", "--device", "cpu", *logger)
    assert resumed.returncode == 0, resumed.stderr
    assert steps_in_files(folder / "tensorboard") == [1, 2, 2, 3, 4]

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    read = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    written: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        for tag, value in list_scalars(line):
            written.setdefault(tag, {})[line["epoch"]] = value
    assert read.keys() == written.keys()
    assert all(len(events.Scalars(tag)) == len(read[tag]) for tag in read)  # no step twice
    for tag, values in written.items():
        assert read[tag] == pytest.approx(values, rel=1e-6), tag  # events hold fp32
    assert {"train/loss", "train/accuracy", "eval/loss", "eval/accuracy", "open_ratio", "macs"} < read.keys()
    assert {"seconds/train", "learning_rate", "gates/layer1.0.gate"} < read.keys()


def test_list_scalars() -> None:
    record = {
        "epoch": 3,
        "train": {"loss": 0.5},
        "eval": {"split": "test", "accuracy": 0.75},
        "macs": 1000,
        "frozen": True,
        "gates": {"layer1.0.gate": [1.0, 0.0, 0.5, 0.5]},
        "joules": {"train": None, "eval": 12.5},
        "energy": {"warnings": ["shared"], "error_bound_joules": {"train": None}},
    }
    assert dict(list_scalars(record)) == {
        "train/loss": 0.5,
        "eval/accuracy": 0.75,
        "macs": 1000.0,
        "frozen": 1.0,
        "gates/layer1.0.gate": 0.5,
        "joules/eval": 12.5,
    }


def test_no_logger_and_an_unknown_one(tmp_path: Path) -> None:
    assert open_logger("none", tmp_path) is None
    with pytest.raises(ValueError, match="logger: expected one of none, tensorboard, got 'wandb'"):
        open_logger("wandb", tmp_path)


def test_a_missing_package_is_said_before_training(tmp_path: Path) -> None:
    hide = 'import sys; sys.modules["tensorboard"] = None'
    result = run_cli("train", *TINY_OPTIONS, "--logger", "tensorboard", "--output", tmp_path / "run", code=hide)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "pip install 'fastgate[tensorboard]'" in result.stderr
    assert list(tmp_path.iterdir()) == []
