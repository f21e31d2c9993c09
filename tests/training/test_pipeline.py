import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastgate as fg
from fastgate.gates import Gate
from fastgate.pruning import search
from fastgate.pruning.equality import NotEqual
from fastgate.training import pipeline
from fastgate.training.pipeline import Run, train
from fastgate.training.recipe import change, list_values
from fastgate.training.run_folder import read_config
from tests.training.runs import TINY
from tests.votes import cast_votes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    return folder, train(Run(change(TINY, control="unpruned"), folder))


def test_run_folder_holds_everything(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "checkpoint.pt", "decisions.json", "model.safetensors", "summary.json"),
        "control-unpruned",
    }
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == 4


def test_rows_of_the_summary(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    rows = summary["rows"]
    # every gate left the network when it was settled: what was trained from then on is the compact network
    assert list(rows) == ["unpruned", "compact"]
    small = fg.load(folder / "model.safetensors")
    assert not any(isinstance(module, Gate) for module in small.modules())
    assert rows["compact"]["macs"] == fg.macs(small, (1, 8, 8))
    assert rows["compact"]["parameters"] == sum(p.numel() for p in small.parameters())
    assert rows["unpruned"]["macs"] == fg.macs(fg.models.resnet(8, in_channels=1), (1, 8, 8))
    assert rows["compact"]["open_ratio"] == fg.Decisions.from_json(folder / "decisions.json").open_ratio
    assert all(row["latency_ms"] > 0 and row["images_per_second"] > 0 for row in rows.values())
    assert summary["max_abs_difference"] == 0.0
    assert rows["compact"]["macs_training"] < rows["unpruned"]["macs_training"]


def test_a_network_that_keeps_its_gates_has_a_row(tmp_path: Path) -> None:
    summary = train(Run(change(TINY, compact_training=False), tmp_path / "run"))
    rows = summary["rows"]
    assert list(rows) == ["unpruned", "gated", "compact"]
    assert rows["gated"]["macs"] == rows["unpruned"]["macs"] > rows["compact"]["macs"]
    assert rows["gated"]["parameters"] > rows["unpruned"]["parameters"]
    # frozen before the last epoch, so the gated network and the compact one say the same
    assert rows["gated"]["accuracy"] == rows["compact"]["accuracy"]
    assert summary["max_abs_difference"] == 0.0


def test_control_has_the_same_recipe_without_gates(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    ours, theirs = (list_values(read_config(each)) for each in (folder, folder / "control-unpruned"))
    assert {key for key in ours if ours[key] != theirs[key]} == {"gating", "control"}
    assert not any("gate" in name for name in torch.load(folder / "control-unpruned/checkpoint.pt")["model"])


def test_a_plain_recipe_has_one_row(tmp_path: Path) -> None:
    summary = train(Run(change(TINY, gating="none", epochs=1), tmp_path / "run"))
    assert list(summary["rows"]) == ["unpruned"]
    assert 0 < summary["rows"]["unpruned"]["accuracy"] < 1
    assert fg.load(tmp_path / "run" / "model.safetensors").fc.out_features == 10


def test_channel_gates_live_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cast_votes(monkeypatch.setattr)
    recipe = change(TINY, gating="channel", epochs=3, open_until=0.0, settle_at=None, init_logit=None, target=None)
    summary = train(Run(recipe, tmp_path / "run"))
    rows = summary["rows"]
    assert rows["unpruned"]["accuracy"] is None  # no control was asked for
    assert rows["compact"]["macs"] < rows["unpruned"]["macs"]
    assert 0.5 <= summary["lowest_unanimity"] <= 1
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    assert not any("gate" in name for name in tensors)


@pytest.mark.parametrize(
    ("module", "name", "during_training"), [(pipeline, "compact", False), (search, "commit", True)]
)
def test_a_network_that_differs_is_not_saved(
    module: Any, name: str, during_training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = getattr(module, name)

    def spoiled(*arguments: Any) -> torch.nn.Module:
        small = cut(*arguments)
        with torch.no_grad():
            small.fc.bias[0] += 1e-3
        return small

    monkeypatch.setattr(module, name, spoiled)
    with pytest.raises(NotEqual, match=r"differs from the frozen one by 0.001\d*, expected at most 0"):
        train(Run(change(TINY, compact_training=during_training), tmp_path / "run"))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_new_run_does_not_overwrite_one(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    with pytest.raises(ValueError, match="expected a new or empty folder, got one that holds a run"):
        train(Run(TINY, folder))


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a run folder with config.json, found none"):
        train(Run(TINY, tmp_path), resume=True)
    (tmp_path / "config.json").write_text('{"recipe": {"epochs": 3}}')
    with pytest.raises(ValueError, match="expected every option of version 1, got one without"):
        train(Run(TINY, tmp_path), resume=True)
