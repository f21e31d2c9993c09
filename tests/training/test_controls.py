"""Baselines of the compact network: the networks of the controls, their runs, and the comparison."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgate as fg
from fastgate.pruning import search
from fastgate.pruning.costs import Costs
from fastgate.reports.comparison import compare_runs
from fastgate.training.controls import control_recipe, draw_decisions, match_recipe
from fastgate.training.data import load_dataset
from fastgate.training.networks import build_network
from fastgate.training.pipeline import Run, train
from fastgate.training.presets import get_preset
from fastgate.training.recipe import CONTROLS, change, list_values, recipe_from_dict
from tests.training.runs import TINY, checkpoint_state, differences, run_cli, trainer_of
from tests.votes import cast_votes

CIFAR = (3, 32, 32)
# a target that leaves random sub-networks something to choose from
ALL = change(TINY, network="resnet14", epochs=2, control=",".join(CONTROLS), open_until=0.0, settle_at=0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same recipe with two seeds, and all controls."""
    folders = []
    with pytest.MonkeyPatch.context() as patch:
        cast_votes(patch.setattr)
        for seed in (1, 2):
            folders.append(tmp_path_factory.mktemp("controls") / f"seed{seed}")
            train(Run(change(ALL, seed=seed), folders[-1]))
    return folders


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("network", "shortcut"), [("resnet20", "conv"), ("resnet20", "pad"), ("resnet56", "conv")])
def test_a_plain_network_of_equal_macs(network: str, shortcut: str, share: float) -> None:
    recipe = change(get_preset("cifar10-layer"), gating="none", network=network, shortcut=shortcut)
    wanted = round(share * fg.macs(build_network(recipe, CIFAR, 10), CIFAR))
    found = match_recipe(recipe, CIFAR, 10, wanted)
    assert fg.macs(build_network(found, CIFAR, 10), CIFAR) == pytest.approx(wanted, rel=0.01)
    assert found.model.cifar_depth <= recipe.model.cifar_depth
    assert change(found, network=network, widths="16,32,64") == recipe
    if share == 1.0:
        assert found == recipe


def test_depth_first_then_width() -> None:
    """The depth whose MACs come closest: ResNet-56 is half a ResNet-110, ResNet-14 nearer half a ResNet-20."""
    for network, expected, widths in (("resnet110", "resnet56", "16,32,64"), ("resnet20", "resnet14", "12,32,56")):
        recipe = change(get_preset("cifar10-layer"), gating="none", network=network)
        found = match_recipe(recipe, CIFAR, 10, fg.macs(build_network(recipe, CIFAR, 10), CIFAR) // 2)
        assert (found.model.network, found.model.widths) == (expected, widths)


def test_no_plain_network_is_small_enough() -> None:
    with pytest.raises(ValueError, match=r"wanted: expected at least .* MACs, of the smallest network like resnet8"):
        match_recipe(change(TINY, gating="none"), (1, 8, 8), 10, 10)


@pytest.mark.parametrize("gating", ["layer", "channel"])
def test_random_decisions_of_the_same_macs(gating: str) -> None:
    model = fg.models.resnet20(gating=gating)
    costs, total = fg.gate_costs(model, CIFAR), fg.macs(model, CIFAR)
    found = fg.decide(model, [torch.randn(4, *CIFAR)])
    costs_closed = sum(int(cost[: len(cost) // 2].sum()) if len(cost) > 1 else 0 for cost in costs.values())
    # layers: four identity blocks of nine; channels: half of each gate
    wanted = total - (costs_closed or 4 * int(costs["layer1.1.gate"]))
    drawn = [draw_decisions(found, costs, wanted, total, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for decisions in drawn:
        fg.freeze(model, decisions)
        assert fg.macs(fg.compact(model), CIFAR) == pytest.approx(wanted, rel=0.0 if gating == "layer" else 0.01)


def test_controls_of_a_run(runs: list[Path]) -> None:
    summary = read(runs[0], "summary.json")
    rows = summary["rows"]
    assert list(rows) == ["unpruned", "compact", *CONTROLS[1:]]
    compact = fg.load(runs[0] / "model.safetensors")
    assert rows["compact"]["macs"] == rows["retrain"]["macs"] == fg.macs(compact, (1, 8, 8))
    assert rows["retrain"]["parameters"] == rows["compact"]["parameters"]
    assert rows["equal-macs"]["macs"] == pytest.approx(rows["compact"]["macs"], rel=0.01)
    assert rows["random"]["macs"] == rows["compact"]["macs"]
    # the plain network for as many whole epochs as cost what the gated run did
    assert rows["equal-training"]["macs"] == rows["equal-macs"]["macs"]
    epoch = rows["equal-macs"]["macs_training"] / 2
    assert abs(rows["equal-training"]["macs_training"] - rows["compact"]["macs_training"]) <= epoch / 2
    assert all(0 < row["accuracy"] <= 1 and row["seconds_training"] > 0 for row in rows.values())
    # sub-networks trained from scratch cost their own MACs from the first epoch on
    assert rows["retrain"]["macs_training"] == rows["compact"]["macs"] * summary["images_trained"]
    assert rows["unpruned"]["macs_training"] == rows["unpruned"]["macs"] * summary["images_trained"]
    assert rows["retrain"]["macs_training"] < rows["compact"]["macs_training"] < rows["unpruned"]["macs_training"]


def test_controls_have_the_same_recipe(runs: list[Path]) -> None:
    ours = read(runs[0], "config.json")
    assert ours["control"] is None
    changed = {
        "unpruned": {"gating", "control"},
        "equal-macs": {"gating", "control", "network", "widths"},
        "equal-training": {"gating", "control", "network", "widths", "epochs"},
        "equal-latency": {"gating", "control", "network", "widths"},
        "random": {"control"},
        "retrain": {"control"},
    }
    for kind in CONTROLS:
        theirs = read(runs[0] / f"control-{kind}", "config.json")
        assert theirs["control"] == kind
        values, other = (list_values(recipe_from_dict(config["recipe"])) for config in (ours, theirs))
        differ = {key for key in values if other[key] != values[key]}
        assert differ <= changed[kind] and "control" in differ
    found = fg.Decisions.from_json(runs[0] / "decisions.json")
    again = fg.Decisions.from_json(runs[0] / "control-retrain" / "decisions.json")
    drawn = fg.Decisions.from_json(runs[0] / "control-random" / "decisions.json")
    assert again == found
    assert [gate.open.tolist() for gate in drawn.values()] != [gate.open.tolist() for gate in found.values()]


def test_controls_resume_to_the_same_bits(tmp_path: Path) -> None:
    """A kill after the first epoch of the last control: everything before it is kept, it goes on itself."""
    options = ["--preset", "demo", "--network", "resnet8", "--epochs", "2", "--batch-size", "128", "--open-until", "0"]
    options += ["--settle-at", "0.5", "--control", "random,retrain", "--device", "cpu"]
    assert run_cli("train", *options, "--output", tmp_path / "whole").returncode == 0
    code = """
import os, signal
from fastgate.training.callbacks import Checkpoints
save = Checkpoints._save
def dying(self, trainer):
    save(self, trainer)
    if self.path.parent.name == "control-retrain" and trainer.epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints._save = dying
"""
    assert run_cli("train", *options, "--output", tmp_path / "run", code=code).returncode == -9
    resumed = run_cli("train", "--output", tmp_path / "run", "--resume", "--device", "cpu")
    assert resumed.returncode == 0, resumed.stderr
    for name in (".", "control-random", "control-retrain"):
        assert differences(checkpoint_state(tmp_path / "whole" / name), checkpoint_state(tmp_path / "run" / name)) == []


def test_compare(runs: list[Path]) -> None:
    comparison = compare_runs(runs)
    (group,) = comparison["groups"]
    assert (comparison["dataset"], group["seeds"], group["differs"]) == ("digits", [1, 2], {})
    rows = [read(folder, "summary.json")["rows"] for folder in runs]
    accuracy = group["networks"]["random"]["accuracy"]
    first, second = (row["random"]["accuracy"] for row in rows)
    assert accuracy["values"] == [first, second]
    assert accuracy["mean"] == pytest.approx((first + second) / 2)
    assert accuracy["spread"] == pytest.approx(abs(first - second) / 2**0.5)
    to_compact = group["networks"]["unpruned"]["to_compact"]["values"]
    assert to_compact == [row["unpruned"]["accuracy"] - row["compact"]["accuracy"] for row in rows]
    assert group["networks"]["compact"]["joules_per_image"] is None or rows[0]["compact"]["joules_per_image"]


def test_compare_on_the_command_line(runs: list[Path], tmp_path: Path) -> None:
    result = run_cli("compare", *runs, "--output", tmp_path / "comparison.json")
    assert result.returncode == 0, result.stderr
    assert "; seeds 1, 2;" in result.stdout and "mean ± standard deviation over the seeds" in result.stdout
    mean = compare_runs(runs)["groups"][0]["networks"]["compact"]["accuracy"]
    assert f"{100 * mean['mean']:.2f}±{100 * mean['spread']:.2f}" in result.stdout
    assert read(tmp_path, "comparison.json") == compare_runs(runs)


def test_runs_that_differ_stand_apart(runs: list[Path], tmp_path: Path) -> None:
    train(Run(change(TINY, epochs=1, settle_at=None, open_until=0.0, anneal_until=0.0), tmp_path / "other"))
    comparison = compare_runs([runs[0], tmp_path / "other"])
    first, second = comparison["groups"]
    assert (first["differs"]["epochs"], second["differs"]["epochs"]) == (2, 1)
    assert "seed" not in first["differs"] and "window" not in first["differs"]
    assert second["networks"]["compact"]["accuracy"]["spread"] is None
    assert "unpruned" not in second["networks"]  # it was not trained


def test_runs_that_cannot_be_compared(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least one run folder, got none"):
        compare_runs([])
    with pytest.raises(ValueError, match=r"expected a run folder with config\.json, found none"):
        compare_runs([tmp_path])
    with pytest.raises(ValueError, match=r"expected another recipe or seed than that of .*, got seed 1 again"):
        compare_runs([runs[0], runs[0]])
    other = tmp_path / "other"
    other.mkdir()
    config = read(runs[0], "config.json")
    config["recipe"]["dataset"] = "cifar10"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expected a finished run with summary\.json, found none"):
        compare_runs([other])
    (other / "summary.json").write_text(json.dumps(read(runs[0], "summary.json")))
    with pytest.raises(ValueError, match="runs: expected one data set, got digits, cifar10"):
        compare_runs([runs[0], other])
    result = run_cli("compare", runs[0], other)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def search_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)["search"]
    decisions = fg.Decisions.from_json(folder / "decisions.json")
    closed = sum(int(state["costs"][name][~gate.open].sum()) for name, gate in decisions.items())
    return {**state, "left": state["total"] - closed}


def test_a_target_in_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cast_votes(monkeypatch.setattr)
    recipe = change(TINY, gating="channel", cost="params", target=0.6, epochs=2, open_until=0.0, settle_at=0.5)
    rows, state = train(Run(recipe, tmp_path / "run"))["rows"], search_state(tmp_path / "run")
    assert state["total"] == rows["unpruned"]["parameters"]
    assert rows["compact"]["parameters"] == state["left"] == pytest.approx(0.6 * state["total"], rel=0.01)


def test_a_target_in_measured_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The costs are measured once: a resumed run continues with its first ones."""
    measured: list[int] = []

    def measure(model: Any, inputs: Any, cost: str = "macs", **options: Any) -> Costs:
        if cost != "latency":
            return fg.gate_costs(model, inputs, cost, **options)
        measured.append(100_000 + 7 * len(measured))  # nanoseconds, others every time
        return Costs({name: torch.tensor([measured[-1]]) for name, _ in fg.named_gates(model)}, 1_000_000)

    monkeypatch.setattr(search, "gate_costs", measure)
    recipe = change(TINY, cost="latency", target=0.9, epochs=2, open_until=0.0, settle_at=0.5)
    train(Run(recipe, tmp_path / "run"))
    state = search_state(tmp_path / "run")
    assert state["left"] == 900_000  # one of three blocks is closed
    costs = [int(cost) for cost in state["costs"].values()]
    resumed = trainer_of(recipe, load_dataset("digits"), tmp_path / "run", resume=True)
    assert {name: int(cost) for name, cost in resumed.search.costs.items()} == dict(
        zip(state["costs"], costs, strict=True)
    )
    assert len(measured) == 2 and set(costs) == {measured[0]}


def test_a_control_that_is_trained_longer_has_its_schedule_stretched() -> None:
    recipe = change(TINY, gating="layer", epochs=10, lr_schedule="0:1, 4:0.1")
    longer = control_recipe("equal-training", recipe, lambda name: name, training=1.5)
    assert (longer.run.epochs, longer.optimizer.lr_schedule) == (15, "0:1, 6:0.1")
    cosine = control_recipe("equal-training", change(recipe, lr_schedule="cosine"), lambda name: name, training=1.5)
    assert cosine.optimizer.lr_schedule == "cosine"
    assert control_recipe("equal-macs", recipe, lambda name: name, training=1.5).run.epochs == 10
