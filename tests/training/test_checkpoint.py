import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgate.training.checkpoint import load_checkpoint, save_checkpoint


def write_truncated(path: Path) -> None:
    save_checkpoint(path, {"weights": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:2000])


def write_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(print, protocol=2))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(write_truncated, "damaged or foreign file", id="truncated"),
        pytest.param(lambda path: path.write_bytes(b""), "damaged or foreign file", id="empty"),
        pytest.param(lambda path: path.write_text("hello"), "damaged or foreign file", id="text"),
        pytest.param(write_code, "damaged or foreign file", id="pickled-code"),
        pytest.param(lambda path: torch.save({"model": {}}, path), "got another file", id="somebody-elses"),
        pytest.param(lambda path: torch.save([1, 2], path), "got another file", id="a-list"),
    ],
)
def test_bad_files(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "checkpoint.pt"
    write(path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a checkpoint written by fastgate train"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_round_trip_loads_weights_only(tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(3)}, "epoch": 4, "recipe": {"a": None, "b": [1, "x"]}}
    save_checkpoint(tmp_path / "c.pt", state)
    plain = torch.load(tmp_path / "c.pt", weights_only=True)
    assert torch.equal(plain["model"]["w"], state["model"]["w"])
    assert load_checkpoint(tmp_path / "c.pt")["recipe"] == state["recipe"]


def test_every_part_of_the_state_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"model": {"w": torch.randn(3)}, "epoch": 4, "recipe": {"a": None, "b": [1, "x"]}})
    written = torch.load(path, weights_only=True)
    changes = [{"epoch": 5}, {"recipe": {"a": None, "b": [1, "y"]}}, {"model": {"w": -written["model"]["w"]}}, {"z": 1}]
    for change in changes:
        torch.save({**written, **change}, path)
        with pytest.raises(
            ValueError, match=r"c\.pt: its contents are not what was written \(their checksum differs\)"
        ):
            load_checkpoint(path)
    torch.save({name: value for name, value in written.items() if name != "sha256"}, path)
    with pytest.raises(ValueError, match="their checksum differs"):
        load_checkpoint(path)


def test_a_checkpoint_of_an_earlier_version_is_read_with_a_note(tmp_path: Path) -> None:
    torch.save({"format": "fastgate-checkpoint", "version": 1, "epoch": 4}, tmp_path / "c.pt")
    with pytest.warns(UserWarning, match=r"c\.pt: a checkpoint of an earlier version, which cannot be checked for dam"):
        assert load_checkpoint(tmp_path / "c.pt")["epoch"] == 4
