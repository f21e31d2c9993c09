"""Every table and figure at the smallest scale, on real digits; what is there is reused, what was killed goes on."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from fastgate.paper import runs
from fastgate.paper.runs import RUNS, Place
from fastgate.paper.targets import TARGETS, plan_target
from fastgate.reports.paper_tables import write_result
from fastgate.training import pipeline
from tests.training.runs import run_cli, send_when_written, start_cli
from tests.votes import CAST, cast_votes

# one epoch: that the numbers mean something is not looked at here
SHORT = {"epochs": 1, "network": "resnet8"}
OPTIONS = ["--epochs", "1", "--network", "resnet8", "--device", "cpu"]


def reproduce(target: str, output: Path) -> dict[str, Any]:
    for result in runs.reproduce(plan_target(target, "smoke", SHORT), Place(output)):
        write_result(result, output)
    return result


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        # no table of the paper has a latency, and measuring it takes a third of the time of such short runs
        patch.setattr(pipeline, "latency_quartiles", lambda networks, x, **options: dict.fromkeys(networks, (1.0,) * 3))
        cast_votes(patch.setattr)
        for target in TARGETS:
            reproduce(target, folder)
    return folder


def read(output: Path, target: str) -> dict[str, Any]:
    return json.loads((output / f"{target}.json").read_text())


def test_every_target_is_complete(output: Path) -> None:
    for target in TARGETS:
        result = read(output, target)
        assert result["unfinished"] == 0
        for row in result["rows"]:
            assert not row["pending"] and row["reason"] is None
            if not row["runs"]:
                assert row["ours"] is None and row["paper"]["flops_cut"] > 0  # quoted from Table 3
                continue
            assert 0 < row["ours"]["accuracy"] <= 100
            assert 0 < row["ours"]["macs"] < row["ours"]["flops"]
            assert row["ours"]["seconds"] > 0
            assert row["ours"]["joules"] is not None or row["ours"]["energy"]["warnings"]
        page = (output / f"{target}.md").read_text()
        assert all(f"| {row['name']} |" in page for row in result["rows"])
        assert f"]({target}.png)" in page
        assert (output / f"{target}.png").read_bytes()[1:4] == b"PNG"


def test_drops_and_shares_are_those_against_the_unpruned_network(output: Path) -> None:
    rows = read(output, "table2")["rows"]
    for dataset in ("CIFAR-10", "CIFAR-100"):
        baseline, *others = [row["ours"] for row in rows if row["dataset"] == dataset and row["ours"] is not None]
        assert (baseline["drop"], baseline["flops_share"], baseline["open_ratio"]) == (0, 1, 100)
        for row in others:
            assert row["drop"] == pytest.approx(baseline["accuracy"] - row["accuracy"])
            assert row["flops_share"] == pytest.approx(row["flops"] / baseline["flops"]) and row["flops_share"] <= 1


def compact_row(output: Path, run: str) -> dict[str, Any]:
    return json.loads((output / RUNS / run / "summary.json").read_text())["rows"]["compact"]


def test_plain_networks_have_equal_macs(output: Path) -> None:
    rows = [row for target in TARGETS for row in read(output, target)["rows"] if row["name"].startswith("plain")]
    assert len(rows) == len(TARGETS) + 1  # Table 2 has two data sets
    for row in rows:
        gated = compact_row(output, row["runs"][0].removesuffix("-equal-macs"))
        assert row["ours"]["macs"] == pytest.approx(gated["macs"], rel=0.01)
        assert row["ours"]["open_ratio"] == 100


def test_trials_have_mean_and_spread(output: Path) -> None:
    ours = next(row["ours"] for row in read(output, "table3")["rows"] if row["name"] == "Ours")
    trials = [f"digits-resnet8-batch128-layer-gumbel-activation0.2-seed{seed}" for seed in (1, 2)]
    accuracies = [100 * compact_row(output, trial)["accuracy"] for trial in trials]
    assert ours["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert ours["spread"]["accuracy"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)


def test_figure_4_has_the_naive_baselines_and_figure_6_the_maps(output: Path) -> None:
    naive = read(output, "figure4")["naive"]
    assert {point["kind"] for point in naive} == {"dropout", "layers"}
    maps = read(output, "figure6")["maps"]
    assert [one["name"] for one in maps] == [*(f"λ_polar = {i}" for i in range(4)), "λ_polar ↑"]
    for one in maps:
        assert [len(layers) for layers in one["open_ratios"]] == [3]  # one epoch, three layers
        assert all(0 <= ratio <= 1 for ratio in one["open_ratios"][0])
    assert [len(one["changes"]) for one in maps] == [0, 0, 0, 0, 2]


def test_finished_runs_are_reused(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (output / RUNS).rglob("*")}
    monkeypatch.setattr(runs, "train", None)  # not called again
    old = read(output, "table5")
    reproduce("table5", output)
    assert read(output, "table5") == old
    assert {path: path.stat().st_mtime_ns for path in (output / RUNS).rglob("*")} == before


# does not get further than training
WAIT = """
import time
from fastgate.training import pipeline
pipeline._save_network = lambda *_: time.sleep(120)
"""


def test_a_kill_goes_on_with_the_same_command(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "paper")
    folder = tmp_path / "paper" / RUNS / "digits-resnet8-batch128-layer-lambda3"
    shutil.rmtree(folder)
    command = ["reproduce", "table4", *OPTIONS, "--output", tmp_path / "paper"]
    process = start_cli(*command, code=CAST + WAIT)
    send_when_written(process, folder / "checkpoint.pt", signal.SIGKILL)
    process.communicate()
    assert not (folder / "summary.json").exists()
    result = run_cli(*command, code=CAST)
    assert result.returncode == 0, result.stderr
    measured = ("accuracy", "open_ratio", "polarization", "flops", "macs")
    resumed, undisturbed = (
        next(row["ours"] for row in read(place, "table4")["rows"] if row["name"] == "STE")
        for place in (tmp_path / "paper", output)
    )
    assert [resumed[name] for name in measured] == [undisturbed[name] for name in measured]
    assert "Gumbel-softmax" in result.stdout and "Bernoulli" in result.stdout
    assert list((tmp_path / "paper").rglob(".*.tmp")) == []


def other_version(output: Path, folder: Path) -> Path:
    config = folder / RUNS / "digits-resnet8-batch128-layer-lambda1" / "config.json"
    config.parent.mkdir(parents=True)
    content = json.loads((output / RUNS / config.parent.name / "config.json").read_text())
    content["recipe"]["new_field"] = 1
    config.write_text(json.dumps(content))
    return folder


def test_a_bad_request_is_one_line_and_exit_code_2(output: Path, tmp_path: Path) -> None:
    other = other_version(output, tmp_path / "other")
    for arguments, message in (
        (["table7"], "target: expected one of table2"),
        (["table2", *OPTIONS, "--output", other], "it holds a run of another version"),
    ):
        result = run_cli("reproduce", *arguments)
        assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, ""), result.stderr
        assert result.stderr.startswith("error: ") and message in result.stderr


def test_what_would_fail_later_is_refused_at_once(output: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    longer = plan_target("table2", "smoke", {**SHORT, "epochs": 2})
    for plan, place, message in (
        (longer, Place(output), "got one with epochs 1, not 2; choose another --output"),
        (longer, Place(tmp_path / "file"), "output: expected a folder, got the file"),
        (plan_target("table2", "short"), Place(tmp_path / "new", "/nonexistent"), "expected cifar-10-batches-bin or"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            next(runs.reproduce(plan, place))
    assert not (tmp_path / "new").exists()
