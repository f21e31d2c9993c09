"""The command line in processes of its own: results, and one clear line for every bad request."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastgate as fg
from fastgate.training.data import Batches, load_dataset
from fastgate.training.networks import evaluate
from fastgate.training.recipe import OPTIONS
from tests.training.runs import TINY_OPTIONS, run_cli


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = run_cli("train", *TINY_OPTIONS, "--output", folder)
    assert result.returncode == 0, result.stderr
    assert re.search(r"compact +\d+\.\d\d +\d+\.\d ", result.stdout)
    # no terminal here: one plain line per epoch
    assert [f"epoch {i}/4" in line for i, line in enumerate(result.stderr.splitlines()[-4:], 1)] == [True] * 4
    return folder


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose gates live to the end."""
    folder = tmp_path_factory.mktemp("cli-live") / "run"
    result = run_cli("train", *TINY_OPTIONS, "--epochs", "1", "--settle-at", "none", "--output", folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_evaluate(run: Path) -> None:
    data = load_dataset("digits")
    network = fg.load(run / "model.safetensors").to(memory_format=torch.channels_last)
    accuracy = evaluate(network, Batches(data, data.test, 256, channels_last=True))["accuracy"]
    # in training the batches were larger: an image whose two best classes are level may be another one's then
    rows = json.loads((run / "summary.json").read_text())["rows"]
    assert abs(accuracy - rows["compact"]["accuracy"]) < 1.5 / len(data.test)
    for source in (run, run / "model.safetensors"):
        result = run_cli("evaluate", source, "--device", "cpu")
        assert result.returncode == 0, result.stderr
        assert f"{100 * accuracy:.2f}" in result.stdout


def test_compact_a_frozen_checkpoint(run: Path, tmp_path: Path) -> None:
    result = run_cli("compact", run, "--output", tmp_path / "small.safetensors")
    assert result.returncode == 0, result.stderr
    ours, theirs = load_file(tmp_path / "small.safetensors"), load_file(run / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_compact_live_gates_with_decisions(live: Path, tmp_path: Path) -> None:
    refused = run_cli("compact", live / "checkpoint.pt", "--output", tmp_path / "x.safetensors")
    assert refused.returncode == 2
    assert "live gates layer1.0.gate, layer2.0.gate, layer3.0.gate" in refused.stderr
    result = run_cli("compact", live, "--decisions", live / "decisions.json", "--output", tmp_path / "x.safetensors")
    assert result.returncode == 0, result.stderr
    assert fg.load(tmp_path / "x.safetensors").fc.out_features == 10


def test_report(run: Path) -> None:
    result = run_cli("report", run)
    assert (result.returncode, result.stdout) == (0, f"wrote {run / 'report.html'}\n"), result.stderr
    command = shlex.join(["fastgate", "train", *TINY_OPTIONS, "--output", str(run)])
    assert command in (run / "report.html").read_text()


def test_env_in_a_fresh_process() -> None:
    result = subprocess.run([sys.executable, "-m", "fastgate", "env"], capture_output=True, text=True, check=True)
    described = json.loads(result.stdout)
    assert described["versions"]["torch"] == torch.__version__.split("+")[0] or described["versions"]["torch"]
    assert described["cpu_cores"] >= 1
    assert described["choices"].keys() == {"folder", "count"}


def test_tune_says_that_a_cpu_has_nothing_to_measure() -> None:
    result = run_cli("tune", "--network", "resnet8", "--device", "cpu")
    assert (result.returncode, result.stdout.count("a fixed rule")) == (0, 1), result.stderr


def foreign_network(folder: Path) -> Path:
    save_file({"w": torch.zeros(2)}, folder / "foreign.safetensors")
    return folder / "foreign.safetensors"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["train"], "--preset: expected one of demo", id="no-preset"),
        pytest.param(
            ["tune", "--batch-size", "1"], "expected a batch size of 2 and an image size of 1", id="tune-batch"
        ),
        pytest.param(["tune", "--precision", "int8"], "precision: expected one of auto", id="tune-precision"),
        pytest.param(["train", "--preset", "imagenet"], "preset: expected one of demo", id="unknown-preset"),
        pytest.param(["train", "--preset", "demo", "--estimator", "x"], "estimator: expected one of", id="estimator"),
        pytest.param(["train", "--preset", "demo", "--epochs", "many"], "epochs: expected a value of type", id="int"),
        pytest.param(["train", "--preset", "cifar10-layer"], "pass --data-root or set", id="no-data-root"),
        pytest.param(
            ["train", "--preset", "cifar10-layer", "--data-root", "/nonexistent"],
            "expected cifar-10-batches-bin or cifar-10-batches-py under /nonexistent",
            id="missing-data",
        ),
        pytest.param(["train", "--preset", "demo", "--device", "tpu"], "device: expected auto, cpu", id="device"),
        pytest.param(["train", "--preset", "demo", "--device", "cuda:99"], "'cuda:99' does not exist", id="cuda-99"),
        pytest.param(["train", "--resume"], "--resume: expected the run folder in --output", id="resume-what"),
        pytest.param(["evaluate", "nowhere.safetensors"], "expected a network file", id="no-network"),
        pytest.param(["compact", "nowhere.pt"], "expected a checkpoint written by fastgate train", id="no-checkpoint"),
    ],
)
def test_bad_requests_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_cli(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1, result.stderr
    assert message in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_bad_files_are_one_line_too(run: Path, live: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.pt"
    half.write_bytes((run / "checkpoint.pt").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:300])
    other = tmp_path / "other.json"
    decisions = fg.Decisions.from_json(live / "decisions.json")
    fg.Decisions({name.replace("layer1.0", "layer1.7"): gate for name, gate in decisions.items()}).to_json(other)
    # with one gate flipped: by hand, which the checksum notices, and written anew, over what is final
    flipped, anew = tmp_path / "flipped.json", tmp_path / "anew.json"
    flipped.write_text((run / "decisions.json").read_text().replace("true", "false", 1).replace("[1.0]", "[0.0]", 1))
    final = dict(fg.Decisions.from_json(run / "decisions.json"))
    first = next(iter(final))
    final[first] = replace(final[first], open=~final[first].open)
    fg.Decisions(final).to_json(anew)
    color = fg.models.resnet(8)
    fg.save(color, tmp_path / "color.safetensors")
    fg.save(fg.models.resnet(8, 7, in_channels=1), tmp_path / "gray.safetensors")
    for arguments, message in (
        (["compact", half], "damaged or foreign file"),
        (["evaluate", tmp_path / "cut.safetensors"], "damaged or other data"),
        (["evaluate", foreign_network(tmp_path)], "expected format 'fastgate-network'"),
        (["evaluate", tmp_path / "color.safetensors"], "pass --dataset"),
        (["evaluate", tmp_path / "color.safetensors", "--dataset", "digits"], "x: expected [N, 3, H, W], got [1, 1"),
        (["evaluate", tmp_path / "gray.safetensors", "--dataset", "digits"], "has 7 classes, but the data set has 10"),
        (["compact", live, "--decisions", other], "these are decisions of another network"),
        (["compact", run, "--decisions", flipped], "contents that are not what was written (their checksum differs)"),
        (["compact", run, "--decisions", anew], f"got others for {first}; use those of the same run"),
        (["report", run, tmp_path], "expected a run folder with config.json"),
        (["train", "--resume", "--output", tmp_path], "expected a run folder with config.json"),
        (["train", *TINY_OPTIONS, "--output", run], "got one that holds a run"),
    ):
        result = run_cli(*arguments)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr


def test_what_the_command_line_says_of_itself() -> None:
    version = run_cli("--version")
    assert (version.returncode, version.stdout) == (0, f"fastgate {fg.__version__}\n")
    shown = run_cli("train", "--preset", "demo", "--target-macs", "0.4", "--show-recipe")
    assert shown.returncode == 0
    values = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines() if line.startswith("  --"))
    options = {f"--{name.replace('_', '-')}" for name in OPTIONS}
    assert values.keys() == options and values["--target"] == "0.4" and values["--settle-at"] == "0.4"
    mistyped = run_cli("train", "--preset", "cifar-layer")
    assert mistyped.returncode == 2 and mistyped.stderr.endswith("did you mean cifar10-layer?\n")
    help_text = run_cli("train", "--help").stdout
    assert all(name in help_text for name in options) and "default 0.5" in help_text


def test_a_non_finite_loss_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = run_cli("train", *TINY_OPTIONS, "--learning-rate", "1e20", "--output", tmp_path / "run")
    assert result.returncode == 1
    assert "error: the loss is not finite in epoch" in result.stderr
    assert "Lower the learning rate (" in result.stderr
    assert "Traceback" not in result.stderr
