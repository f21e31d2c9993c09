"""The programs under examples/ run as they are, on small data, and leave a network of half the MACs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastgate as fg
from tests.training.data.pictures import write_splits
from tests.training.runs import ENVIRONMENT

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINED = ["with_accelerate", "with_lightning", "with_transformers"]


def run(folder: Path, name: str, *arguments: str, processes: int = 1) -> str:
    """What an example prints, run in a folder; in several processes by torchrun, on the CPU."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder,
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1", **({"ACCELERATE_USE_CPU": "true"} if processes > 1 else {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_half(said: str, folder: Path) -> None:
    """It says half of the MACs, and the file that it wrote holds a plain network."""
    (share,) = re.findall(r"^small.safetensors: ([\d.]+) of the MACs", said, re.M)
    assert float(share) == pytest.approx(0.5, abs=0.005)  # within 1 % of the target
    (file,) = folder.rglob("small.safetensors")
    assert list(fg.named_gates(fg.load(file))) == []


def test_every_example_is_run_here_and_short() -> None:
    names = {path.stem: path.read_text().count("\n") for path in EXAMPLES.glob("*.py")}
    assert names.keys() == {"metering", "own_loop", "timm_to_onnx", *TRAINED}
    assert all(lines < 80 for lines in names.values())


@pytest.mark.parametrize("name", TRAINED)
def test_a_trainer(name: str, tmp_path: Path) -> None:
    assert_half(run(tmp_path, name, "3"), tmp_path)


def test_accelerate_in_two_processes(tmp_path: Path) -> None:
    said = run(tmp_path, "with_accelerate", "3", processes=2)
    assert said.count("trained in 2 processes") == 1
    assert_half(said, tmp_path)


def test_own_images_in_an_own_loop(tmp_path: Path) -> None:
    images = write_splits(tmp_path / "images", train={"cats": 12, "dogs": 12}, val={"cats": 4, "dogs": 4})
    said = run(tmp_path, "own_loop", str(images), "--epochs", "3", "--image-size", "32", "--batch-size", "8")
    assert_half(said, tmp_path)
    accuracies = re.findall(r"^epoch \d: \w+, accuracy ([\d.]+), MACs", said, re.M)
    assert len(accuracies) == 3 and all(float(value) * 8 % 1 == 0 for value in accuracies)  # of 8 images
    assert "small.onnx" in said and (tmp_path / "small.onnx").exists()


def test_weights_to_onnx(tmp_path: Path) -> None:
    said = run(tmp_path, "timm_to_onnx", "3")
    assert_half(said, tmp_path)
    assert "small.onnx" in said and (tmp_path / "small.onnx").exists()


def test_metering(tmp_path: Path) -> None:
    assert re.search(r"^[\d.]+ s, ([\d.]+|None) J", run(tmp_path, "metering"), re.M)
