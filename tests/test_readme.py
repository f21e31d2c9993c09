"""The README's example runs as printed, and its numbers are those of the committed result files."""

import json
import re
from pathlib import Path

import torch
from torch import nn

import fastgate as fg

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    names = {"epochs": 4, "criterion": nn.CrossEntropyLoss(), "loader": [(images, labels)] * 2}
    exec(code[1], names)
    assert torch.isfinite(names["loss"])  # type: ignore[call-overload]
    assert fg.load(tmp_path / "small.safetensors").fc.out_features == 10


def test_the_speed_is_that_of_the_result_file() -> None:
    summary = json.loads((ROOT / "bench/results/training/cifar10-resnet20-layer/summary.json").read_text())
    whole, small = (summary["rows"][name] for name in ("unpruned", "compact"))
    text = " ".join(README.split())
    assert f"{small['macs'] / whole['macs']:.0%} of its MACs takes {small['latency_ms']:.2f} ms" in text
    assert f"instead of {whole['latency_ms']:.2f} for one image" in text
    assert f"{small['images_per_second']:,.0f} instead of {whole['images_per_second']:,.0f} images/s" in text


def test_the_table_of_controls_is_that_of_its_results() -> None:
    table = re.findall(r"^\|.*$", README.partition("| against compact |")[2], re.M)[1:]
    results = (ROOT / "bench/results/controls/README.md").read_text()
    assert len(table) == 5 and all(line in results for line in table)


def test_the_readme_is_short() -> None:
    assert README.count("\n") < 120


def test_the_table_from_weights_is_that_of_its_runs() -> None:
    lines = (ROOT / "bench/results/search/weights/table.md").read_text().splitlines()
    rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in lines if line.startswith("| ")]
    runs = {(f"{row[1]}%", row[3], row[4]) for row in rows}
    table = README.partition("MACs of training |\n")[2].partition("\n\n")[0].splitlines()[1:]
    shown = [tuple(re.split(r"\s*\|\s*", line)[2:-1]) for line in table]
    assert len(shown) == 6 and set(shown) <= runs
