"""The programs under examples/ run as they are, on their small data, and leave a network of half the MACs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastgate as fg

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", [pytest.param(path.stem, id=path.stem) for path in sorted(EXAMPLES.glob("*.py"))])
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if name == "metering":
        assert re.search(r"^[\d.]+ s, ([\d.]+|None) J", done.stdout, re.M), done.stdout
        return
    share = re.search(r"small.safetensors: ([\d.]+) of the MACs", done.stdout)
    assert share is not None and float(share[1]) == pytest.approx(0.5, abs=0.005)  # within 1 % of the target
    assert ("small.onnx" in done.stdout) == (name == "timm_to_onnx")
    (file,) = tmp_path.rglob("small.safetensors")
    assert list(fg.named_gates(fg.load(file))) == []
