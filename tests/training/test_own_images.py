"""Own images and a network with weights of other classes, through the command line, as a user would run it."""

import json
import signal
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import fastgate as fg
from fastgate.training.run_folder import read_history
from tests.training.runs import checkpoint_state, differences, run_cli

CLASSES = ("blue", "green", "red")
# SIGKILL after the second batch of the third epoch
KILL = """
import os, signal
from fastgate.training.callbacks import Progress
def dying(self, trainer):
    if (trainer.epoch, trainer.step) == (2, 2):
        os.kill(os.getpid(), signal.SIGKILL)
Progress.on_step_end = dying
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small JPEGs of three colours, of several sizes."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("val", 6)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 90, (30 + i, 40, 3), generator=generator)
                pixels[..., 2 - label] += 160
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / split / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "other.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), path)
    return path


@pytest.mark.parametrize("gating", ["channel", pytest.param("layer", marks=pytest.mark.slow)])
def test_finetuning_own_images(gating: str, images: Path, weights: Path, tmp_path: Path) -> None:
    options = [
        *("--preset", f"finetune-{gating}", "--dataset", f"folder:{images}", "--network", "torchvision:resnet18"),
        *("--weights", weights, "--image-size", "32", "--target", "0.5", "--epochs", "4", "--batch-size", "12"),
        *("--open-until", "0.25", "--anneal-until", "0.5", "--settle-at", "0.75", "--workers", "1", "--device", "cpu"),
    ]
    result = run_cli("train", *options, "--output", tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    assert "the classifier fc (7 classes) was replaced by one of 3 classes, newly initialised" in result.stderr
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["preprocessing"]["class_names"] == list(CLASSES)
    share = summary["rows"]["compact"]["macs"] / summary["rows"]["unpruned"]["macs"]
    costs = fg.gate_costs(fg.attach(torchvision.models.resnet18(num_classes=3), "layer"), (3, 32, 32))
    half_a_block = max(int(cost) for cost in costs.values()) / 2 / costs.total
    assert share == pytest.approx(0.5, abs=half_a_block if gating == "layer" else 0.005)

    killed = run_cli("train", *options, "--output", tmp_path / "killed", code=KILL)
    assert killed.returncode == -signal.SIGKILL and len(read_history(tmp_path / "killed")) == 2
    resumed = run_cli("train", "--output", tmp_path / "killed", "--resume", "--device", "cpu")
    assert resumed.returncode == 0, resumed.stderr
    assert differences(checkpoint_state(tmp_path / "whole"), checkpoint_state(tmp_path / "killed")) == []
    again = run_cli("train", "--output", tmp_path / "killed", "--resume", "--device", "cpu")
    assert again.returncode == 0 and "this run is already finished; nothing is trained again" in again.stderr

    evaluated = run_cli("evaluate", tmp_path / "whole", "--device", "cpu")
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"{100 * summary['rows']['compact']['accuracy']:.2f}" in evaluated.stdout


@pytest.fixture
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's own in the current folder."""
    (tmp_path / "mynet.py").write_text(
        "from torchvision.models.resnet import BasicBlock, ResNet\n"
        "def small(num_classes):\n"
        "    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)


def train_own(images: Path, name: str, *more: str) -> float:
    """The loss of the only epoch, of a function's network, with AdamW and smoothed labels."""
    options = [
        *("--preset", "finetune-layer", "--dataset", f"folder:{images}", "--network", "mynet:small", "--weights"),
        *("none", "--optimizer", "adamw", "--learning-rate", "1e-4", "--label-smoothing", "0.1", "--image-size", "32"),
        *("--epochs", "1", "--batch-size", "12", "--workers", "0", "--settle-at", "none", "--device", "cpu"),
    ]
    result = run_cli("train", *options, *more, "--output", name)
    assert result.returncode == 0, result.stderr
    return float(read_history(Path(name))[0]["train"]["task"])


@pytest.mark.usefixtures("in_its_folder")
def test_a_function_in_the_current_folder_and_another_optimizer(images: Path) -> None:
    smoothed, plain = train_own(images, "smoothed"), train_own(images, "plain", "--label-smoothing", "0")
    assert 0 < smoothed < 3 and smoothed != plain
    state = torch.load("smoothed/checkpoint.pt", weights_only=True)["optimizer"]["state"]
    assert all({"exp_avg", "exp_avg_sq"} <= entry.keys() for entry in state.values())  # Adam's moments


@pytest.mark.slow
@pytest.mark.usefixtures("in_its_folder")
def test_a_compiled_network(images: Path) -> None:
    eager, compiled = train_own(images, "eager"), train_own(images, "compiled", "--compile", "true")
    assert compiled == pytest.approx(eager, rel=0.02)  # sums in another order, 4 steps
